//! The few WASI functions that a module without files, arguments and environment still imports.

use wasmi::{Caller, Error, Linker};

use super::abi::Level;
use super::calls::guard;
use super::guest::{Called, Guest, Stop};
use super::vm::State;

const MODULE: &str = "wasi_snapshot_preview1";

/// WASI's numbers for success, bad descriptor and bad address.
const SUCCESS: u32 = 0;
const BADF: u32 = 8;
const FAULT: u32 = 21;

pub(super) fn define(linker: &mut Linker<State>) -> anyhow::Result<()> {
    linker
        .func_wrap(MODULE, "fd_write", |caller: Caller<'_, State>, fd: u32, slices: u32, count: u32, written: u32| {
            errno(caller, "fd_write", |guest| fd_write(guest, fd, slices, count, written))
        })?
        .func_wrap(MODULE, "environ_sizes_get", |caller: Caller<'_, State>, count: u32, size: u32| {
            errno(caller, "environ_sizes_get", |guest| nothing(guest, count, size))
        })?
        .func_wrap(MODULE, "environ_get", |caller: Caller<'_, State>, _: u32, _: u32| {
            errno(caller, "environ_get", |_| Ok(()))
        })?
        .func_wrap(MODULE, "args_sizes_get", |caller: Caller<'_, State>, count: u32, size: u32| {
            errno(caller, "args_sizes_get", |guest| nothing(guest, count, size))
        })?
        .func_wrap(MODULE, "args_get", |caller: Caller<'_, State>, _: u32, _: u32| {
            errno(caller, "args_get", |_| Ok(()))
        })?
        .func_wrap(MODULE, "clock_time_get", |caller: Caller<'_, State>, _: u32, _: u64, time: u32| {
            errno(caller, "clock_time_get", |guest| {
                let now = guest.state().shared().now.as_nanos() as u64;
                guest.write_u64(time, now)
            })
        })?
        .func_wrap(MODULE, "random_get", |caller: Caller<'_, State>, address: u32, size: u32| {
            errno(caller, "random_get", |guest| random_get(guest, address, size))
        })?
        .func_wrap(MODULE, "sched_yield", |caller: Caller<'_, State>| errno(caller, "sched_yield", |_| Ok(())))?
        .func_wrap(MODULE, "fd_close", |_: Caller<'_, State>, _: u32| BADF)?
        .func_wrap(MODULE, "fd_fdstat_get", |_: Caller<'_, State>, _: u32, _: u32| BADF)?
        .func_wrap(MODULE, "fd_seek", |_: Caller<'_, State>, _: u32, _: u64, _: u32, _: u32| BADF)?
        .func_wrap(MODULE, "proc_exit", |_: Caller<'_, State>, status: u32| -> Result<(), Error> {
            Err(Error::i32_exit(status.cast_signed()))
        })?;
    Ok(())
}

fn errno(
    caller: Caller<'_, State>,
    name: &'static str,
    call: impl FnOnce(&mut Guest<'_>) -> Called,
) -> Result<u32, Error> {
    match guard(&mut Guest(caller), name, call) {
        Ok(()) => Ok(SUCCESS),
        Err(Stop::Status(_)) => Ok(FAULT),
        Err(Stop::Odd(status)) => Ok(status),
        Err(Stop::Trap(trap)) => Err(trap),
    }
}

/// The output of the module goes to the log: Rust's panic messages are printed this way if no hook is set.
fn fd_write(guest: &mut Guest<'_>, _fd: u32, slices: u32, count: u32, written: u32) -> Called {
    let mut text = Vec::new();
    for slice in guest.read(slices, count.saturating_mul(8))?.chunks_exact(8) {
        let (address, size) = slice.split_at(4);
        let number = |bytes: &[u8]| bytes.try_into().map(u32::from_le_bytes).unwrap_or_default();
        text.extend(guest.read(number(address), number(size))?);
    }
    let state = guest.state();
    let thread = state.thread;
    state.shared().log(thread, Level::Error, String::from_utf8_lossy(&text).trim_end().to_owned());
    guest.write_u32(written, text.len() as u32)
}

fn random_get(guest: &mut Guest<'_>, address: u32, size: u32) -> Called {
    let mut bytes = Vec::new();
    while bytes.len() < size as usize {
        bytes.extend(guest.state().shared().random.next().to_le_bytes());
    }
    bytes.truncate(size as usize);
    guest.write(address, &bytes)
}

fn nothing(guest: &mut Guest<'_>, count: u32, size: u32) -> Called {
    guest.write_u32(count, 0)?;
    guest.write_u32(size, 0)
}
