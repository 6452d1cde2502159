//! The host calls of ABI 0.2.1, with Envoy's statuses. Each is counted, and fails if the test says so.

#![allow(clippy::too_many_arguments, reason = "the ABI has that many")]

use std::time::Duration;

use wasmi::{Caller, Error, Linker};

use super::abi::{Level, Map, Status};
use super::guest::{Called, Guest, Stop};
use super::hostile::Fault;
use super::shared::Kind;
use super::vm::{State, Tick};
use super::{Callout, LocalResponse, abi};

const MODULE: &str = "env";

/// Defines host calls whose functions below have the name of the import.
macro_rules! define {
    ($linker:ident: $($name:ident($($argument:ident: $type:ty),*);)*) => {
        $($linker.func_wrap(MODULE, stringify!($name), |caller: Caller<'_, State>, $($argument: $type),*| {
            enter(caller, stringify!($name), |guest| $name(guest, $($argument),*))
        })?;)*
    };
}

/// Defines host calls that this host does not support.
macro_rules! refuse {
    ($linker:ident: $($name:ident($($type:ty),*);)*) => {
        $($linker.func_wrap(MODULE, stringify!($name), |caller: Caller<'_, State>, $(_: $type),*| {
            enter(caller, stringify!($name), |_| Err(Status::Unimplemented.into()))
        })?;)*
    };
}

pub(super) fn define(linker: &mut Linker<State>) -> anyhow::Result<()> {
    define! { linker:
        proxy_log(level: u32, message: u32, size: u32);
        proxy_get_log_level(level: u32);
        proxy_get_current_time_nanoseconds(time: u32);
        proxy_set_tick_period_milliseconds(period: u32);
        proxy_get_buffer_bytes(buffer: u32, start: u32, length: u32, data: u32, size: u32);
        proxy_get_header_map_pairs(map: u32, data: u32, size: u32);
        proxy_set_header_map_pairs(map: u32, data: u32, size: u32);
        proxy_get_header_map_value(map: u32, name: u32, name_size: u32, data: u32, size: u32);
        proxy_add_header_map_value(map: u32, name: u32, name_size: u32, value: u32, value_size: u32);
        proxy_replace_header_map_value(map: u32, name: u32, name_size: u32, value: u32, value_size: u32);
        proxy_remove_header_map_value(map: u32, name: u32, name_size: u32);
        proxy_get_property(path: u32, path_size: u32, data: u32, size: u32);
        proxy_set_property(path: u32, path_size: u32, value: u32, value_size: u32);
        proxy_get_shared_data(key: u32, key_size: u32, data: u32, size: u32, cas: u32);
        proxy_set_shared_data(key: u32, key_size: u32, value: u32, value_size: u32, cas: u32);
        proxy_register_shared_queue(name: u32, name_size: u32, id: u32);
        proxy_resolve_shared_queue(vm_id: u32, vm_id_size: u32, name: u32, name_size: u32, id: u32);
        proxy_dequeue_shared_queue(id: u32, data: u32, size: u32);
        proxy_enqueue_shared_queue(id: u32, value: u32, value_size: u32);
        proxy_send_local_response(status: u32, details: u32, details_size: u32, body: u32, body_size: u32,
            headers: u32, headers_size: u32, grpc_status: i32);
        proxy_http_call(cluster: u32, cluster_size: u32, headers: u32, headers_size: u32, body: u32, body_size: u32,
            trailers: u32, trailers_size: u32, timeout: u32, token: u32);
        proxy_set_effective_context(context: u32);
        proxy_define_metric(kind: u32, name: u32, name_size: u32, id: u32);
        proxy_get_metric(id: u32, value: u32);
        proxy_record_metric(id: u32, value: u64);
        proxy_increment_metric(id: u32, offset: i64);
        proxy_continue_stream(stream: u32);
        proxy_close_stream(stream: u32);
        proxy_done();
        proxy_call_foreign_function(name: u32, name_size: u32, arguments: u32, arguments_size: u32, data: u32,
            size: u32);
    }
    refuse! { linker:
        proxy_set_buffer_bytes(u32, u32, u32, u32, u32);
        proxy_get_status(u32, u32, u32);
        proxy_grpc_call(u32, u32, u32, u32, u32, u32, u32, u32, u32, u32, u32, u32);
        proxy_grpc_stream(u32, u32, u32, u32, u32, u32, u32, u32, u32);
        proxy_grpc_send(u32, u32, u32, u32);
        proxy_grpc_cancel(u32);
        proxy_grpc_close(u32);
    }
    Ok(())
}

fn enter(
    caller: Caller<'_, State>,
    name: &'static str,
    call: impl FnOnce(&mut Guest<'_>) -> Called,
) -> Result<u32, Error> {
    let mut guest = Guest(caller);
    match guard(&mut guest, name, call) {
        Ok(()) => Ok(Status::Ok as u32),
        Err(Stop::Status(status)) => Ok(status as u32),
        Err(Stop::Odd(status)) => Ok(status),
        Err(Stop::Trap(trap)) => Err(trap),
    }
}

/// Counts a call and executes it, unless a fault applies.
pub(super) fn guard(guest: &mut Guest<'_>, name: &'static str, call: impl FnOnce(&mut Guest<'_>) -> Called) -> Called {
    let fault = guest.state().shared().enter(name);
    match &fault {
        Some(Fault::Status(status)) => return Err(Stop::Odd(*status)),
        Some(Fault::Allocate(size)) => drop(guest.allocate(*size)?),
        Some(Fault::CallBack(export, arguments)) => guest.call_back(export, arguments)?,
        _ => {}
    }
    guest.state().fault = fault;
    let called = call(guest);
    guest.state().fault = None;
    called
}

// The log and the clock.

fn proxy_log(guest: &mut Guest<'_>, level: u32, message: u32, size: u32) -> Called {
    let level = Level::from_abi(level).ok_or(Status::BadArgument)?;
    let message = String::from_utf8_lossy(&guest.read(message, size)?).into_owned();
    let state = guest.state();
    state.shared().log(state.thread, level, message);
    Ok(())
}

fn proxy_get_log_level(guest: &mut Guest<'_>, level: u32) -> Called {
    let current = guest.state().shared().log_level;
    guest.write_u32(level, current)
}

fn proxy_get_current_time_nanoseconds(guest: &mut Guest<'_>, time: u32) -> Called {
    let now = guest.state().shared().now.as_nanos() as u64;
    guest.write_u64(time, now)
}

/// 0 stops the ticks.
fn proxy_set_tick_period_milliseconds(guest: &mut Guest<'_>, period: u32) -> Called {
    let state = guest.state();
    let period = Duration::from_millis(period.into());
    let due = state.shared().uptime + period;
    let root = state.root();
    let root = state.roots.get_mut(&root).ok_or(Status::BadArgument)?;
    root.tick = (!period.is_zero()).then_some(Tick { period, due });
    Ok(())
}

// Buffers and header maps.

fn proxy_get_buffer_bytes(guest: &mut Guest<'_>, buffer: u32, start: u32, length: u32, data: u32, size: u32) -> Called {
    let state = guest.state();
    let bytes = match buffer {
        abi::VM_CONFIGURATION => Some(Vec::new()),
        abi::PLUGIN_CONFIGURATION => state.roots.get(&state.root()).map(|root| root.configuration.clone()),
        abi::CALLOUT_BODY => state.callout.as_ref().filter(|answer| !answer.failed).map(|answer| answer.body.clone()),
        _ => None,
    };
    let bytes = bytes.ok_or(Status::NotFound)?;
    let start = (start as usize).min(bytes.len());
    let end = start.saturating_add(length as usize).min(bytes.len());
    guest.give(&bytes[start..end], data, size)
}

fn proxy_get_header_map_pairs(guest: &mut Guest<'_>, map: u32, data: u32, size: u32) -> Called {
    let map = Map::from_abi(map).ok_or(Status::BadArgument)?;
    let headers = guest.state().map(map).cloned().unwrap_or_default();
    guest.give(&abi::encode_map(&headers), data, size)
}

fn proxy_set_header_map_pairs(guest: &mut Guest<'_>, map: u32, data: u32, size: u32) -> Called {
    let headers = abi::decode_map(&guest.read(data, size)?).ok_or(Status::BadArgument)?;
    *changeable(guest.state(), map)? = headers;
    Ok(())
}

/// The first value of a repeated header, as in Envoy.
fn proxy_get_header_map_value(
    guest: &mut Guest<'_>,
    map: u32,
    name: u32,
    name_size: u32,
    data: u32,
    size: u32,
) -> Called {
    let map = Map::from_abi(map).ok_or(Status::BadArgument)?;
    let name = guest.read(name, name_size)?;
    let state = guest.state();
    let absent = if state.is_logging() { Status::NotFound } else { Status::BadArgument };
    let headers = state.map(map).ok_or(absent)?;
    let value = headers.iter().find(|(other, _)| other.eq_ignore_ascii_case(&name)).map(|(_, value)| value.clone());
    guest.give(&value.ok_or(Status::NotFound)?, data, size)
}

fn proxy_add_header_map_value(
    guest: &mut Guest<'_>,
    map: u32,
    name: u32,
    name_size: u32,
    value: u32,
    value_size: u32,
) -> Called {
    let header = (guest.read(name, name_size)?.to_ascii_lowercase(), guest.read(value, value_size)?);
    changeable(guest.state(), map)?.push(header);
    Ok(())
}

/// Leaves a single header with that name.
fn proxy_replace_header_map_value(
    guest: &mut Guest<'_>,
    map: u32,
    name: u32,
    name_size: u32,
    value: u32,
    value_size: u32,
) -> Called {
    let (name, value) = (guest.read(name, name_size)?.to_ascii_lowercase(), guest.read(value, value_size)?);
    let headers = changeable(guest.state(), map)?;
    let place = headers.iter().position(|(other, _)| *other == name).unwrap_or(headers.len());
    headers.retain(|(other, _)| *other != name);
    headers.insert(place, (name, value));
    Ok(())
}

fn proxy_remove_header_map_value(guest: &mut Guest<'_>, map: u32, name: u32, name_size: u32) -> Called {
    let name = guest.read(name, name_size)?;
    changeable(guest.state(), map)?.retain(|(other, _)| !other.eq_ignore_ascii_case(&name));
    Ok(())
}

fn changeable(state: &mut State, map: u32) -> Result<&mut Vec<abi::Header>, Stop> {
    let map = Map::from_abi(map).filter(|_| !state.is_logging()).ok_or(Status::BadArgument)?;
    state.map(map).ok_or(Stop::Status(Status::BadArgument))
}

// Properties.

fn proxy_get_property(guest: &mut Guest<'_>, path: u32, path_size: u32, data: u32, size: u32) -> Called {
    let path = read_path(guest, path, path_size)?;
    let state = guest.state();
    let own = state.stream().and_then(|stream| stream.property(&path));
    let value = own.or_else(|| state.shared().properties.get(&path).cloned());
    guest.give(&value.ok_or(Status::NotFound)?, data, size)
}

fn proxy_set_property(guest: &mut Guest<'_>, path: u32, path_size: u32, value: u32, value_size: u32) -> Called {
    let (path, value) = (read_path(guest, path, path_size)?, guest.read(value, value_size)?);
    guest.state().stream().ok_or(Status::BadArgument)?.properties.insert(path, value);
    Ok(())
}

/// The SDK ends the path with a zero byte; others do not.
fn read_path(guest: &Guest<'_>, path: u32, size: u32) -> Result<Vec<u8>, Stop> {
    let mut path = guest.read(path, size)?;
    if path.last() == Some(&0) {
        path.pop();
    }
    Ok(path)
}

// Shared data and queues.

fn proxy_get_shared_data(guest: &mut Guest<'_>, key: u32, key_size: u32, data: u32, size: u32, cas: u32) -> Called {
    let key = guest.read(key, key_size)?;
    let (value, current) = guest.state().shared().data.get(&key)?;
    guest.give(&value, data, size)?;
    guest.write_u32(cas, current)
}

fn proxy_set_shared_data(
    guest: &mut Guest<'_>,
    key: u32,
    key_size: u32,
    value: u32,
    value_size: u32,
    cas: u32,
) -> Called {
    let (key, value) = (guest.read(key, key_size)?, guest.read(value, value_size)?);
    Ok(guest.state().shared().data.set(key, value, cas)?)
}

fn proxy_register_shared_queue(guest: &mut Guest<'_>, name: u32, name_size: u32, id: u32) -> Called {
    let name = guest.read(name, name_size)?;
    let state = guest.state();
    let consumer = (state.number, state.root());
    let queue = state.shared().queues.register(super::VM_ID.as_bytes(), &name, consumer);
    guest.write_u32(id, queue)
}

fn proxy_resolve_shared_queue(
    guest: &mut Guest<'_>,
    vm_id: u32,
    vm_id_size: u32,
    name: u32,
    name_size: u32,
    id: u32,
) -> Called {
    let (vm_id, name) = (guest.read(vm_id, vm_id_size)?, guest.read(name, name_size)?);
    // An empty VM id is the caller's own.
    let vm_id = if vm_id.is_empty() { super::VM_ID.as_bytes().to_vec() } else { vm_id };
    let queue = guest.state().shared().queues.resolve(&vm_id, &name)?;
    guest.write_u32(id, queue)
}

fn proxy_dequeue_shared_queue(guest: &mut Guest<'_>, id: u32, data: u32, size: u32) -> Called {
    let message = guest.state().shared().queues.dequeue(id)?;
    guest.give(&message, data, size)
}

fn proxy_enqueue_shared_queue(guest: &mut Guest<'_>, id: u32, value: u32, value_size: u32) -> Called {
    let message = guest.read(value, value_size)?;
    Ok(guest.state().shared().queues.enqueue(id, message)?)
}

// Exchanges.

fn proxy_send_local_response(
    guest: &mut Guest<'_>,
    status: u32,
    _details: u32,
    _details_size: u32,
    body: u32,
    body_size: u32,
    headers: u32,
    headers_size: u32,
    _grpc_status: i32,
) -> Called {
    let headers = abi::decode_map(&guest.read(headers, headers_size)?).ok_or(Status::BadArgument)?;
    let body = guest.read(body, body_size)?;
    guest.state().stream().ok_or(Status::BadArgument)?.local_response = Some(LocalResponse { status, headers, body });
    Ok(())
}

fn proxy_continue_stream(_: &mut Guest<'_>, _stream: u32) -> Called {
    Ok(())
}

fn proxy_close_stream(_: &mut Guest<'_>, _stream: u32) -> Called {
    Ok(())
}

fn proxy_set_effective_context(guest: &mut Guest<'_>, context: u32) -> Called {
    let state = guest.state();
    if !state.roots.contains_key(&context) && !state.streams.contains_key(&context) {
        return Err(Status::BadArgument.into());
    }
    state.current = context;
    Ok(())
}

fn proxy_done(_: &mut Guest<'_>) -> Called {
    Err(Status::NotFound.into())
}

fn proxy_call_foreign_function(
    _: &mut Guest<'_>,
    _name: u32,
    _name_size: u32,
    _arguments: u32,
    _arguments_size: u32,
    _data: u32,
    _size: u32,
) -> Called {
    Err(Status::NotFound.into())
}

// Callouts.

/// Requires a known cluster and the three pseudo-headers, as Envoy does.
fn proxy_http_call(
    guest: &mut Guest<'_>,
    cluster: u32,
    cluster_size: u32,
    headers: u32,
    headers_size: u32,
    body: u32,
    body_size: u32,
    _trailers: u32,
    _trailers_size: u32,
    timeout: u32,
    token: u32,
) -> Called {
    let cluster = String::from_utf8_lossy(&guest.read(cluster, cluster_size)?).into_owned();
    let headers = abi::decode_map(&guest.read(headers, headers_size)?).ok_or(Status::BadArgument)?;
    let body = guest.read(body, body_size)?;
    let state = guest.state();
    let has = |name: &str| headers.iter().any(|(other, value)| other == name.as_bytes() && !value.is_empty());
    if !state.shared().clusters.contains(&cluster) || ![":method", ":path", ":authority"].into_iter().all(has) {
        return Err(Status::BadArgument.into());
    }
    state.last_token += 4;
    let callout = Callout {
        vm: state.thread,
        cluster,
        headers,
        body,
        timeout: Duration::from_millis(timeout.into()),
        sent: state.shared().now,
        number: state.number,
        root: state.root(),
        token: state.last_token,
    };
    let number = callout.token;
    state.shared().callouts.push(callout);
    guest.write_u32(token, number)
}

// Metrics. Their ids are the VM's own; the low two bits are the kind, as in Envoy.

const KINDS: [Kind; 3] = [Kind::Counter, Kind::Gauge, Kind::Histogram];

fn proxy_define_metric(guest: &mut Guest<'_>, kind: u32, name: u32, name_size: u32, id: u32) -> Called {
    let kind_of_metric = *KINDS.get(kind as usize).ok_or(Status::BadArgument)?;
    let name = String::from_utf8_lossy(&guest.read(name, name_size)?).into_owned();
    let state = guest.state();
    state.shared().metrics.define(kind_of_metric, &name);
    state.metrics.push((kind_of_metric, name));
    let number = (state.metrics.len() as u32) << 2 | kind;
    guest.write_u32(id, number)
}

fn metric(state: &State, id: u32) -> Result<(Kind, String), Stop> {
    let known = ((id >> 2) as usize).checked_sub(1).and_then(|index| state.metrics.get(index));
    let (kind, name) = known.ok_or(Status::NotFound)?;
    if *kind as u32 == id & 3 { Ok((*kind, name.clone())) } else { Err(Status::NotFound.into()) }
}

fn proxy_get_metric(guest: &mut Guest<'_>, id: u32, value: u32) -> Called {
    let state = guest.state();
    let (kind, name) = metric(state, id)?;
    if kind == Kind::Histogram {
        return Err(Status::BadArgument.into());
    }
    let current = state.shared().metrics.values.get(&name).copied().unwrap_or_default();
    guest.write_u64(value, current)
}

fn proxy_record_metric(guest: &mut Guest<'_>, id: u32, value: u64) -> Called {
    let state = guest.state();
    let (kind, name) = metric(state, id)?;
    state.shared().metrics.record(kind, &name, value);
    Ok(())
}

fn proxy_increment_metric(guest: &mut Guest<'_>, id: u32, offset: i64) -> Called {
    let state = guest.state();
    let (kind, name) = metric(state, id)?;
    Ok(state.shared().metrics.increment(kind, &name, offset)?)
}
