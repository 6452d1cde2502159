//! A host call's view of its caller: the VM's memory and state.

use wasmi::{Caller, Memory};

use super::{abi::Status, vm::State};

/// How a host call ends before its end: with a status for the module, or by a trap.
pub(super) enum Stop {
    Status(Status),
    Trap(wasmi::Error),
}

impl From<Status> for Stop {
    fn from(status: Status) -> Self {
        Self::Status(status)
    }
}

impl From<wasmi::Error> for Stop {
    fn from(trap: wasmi::Error) -> Self {
        Self::Trap(trap)
    }
}

/// What a host call returns.
pub(super) type Called = Result<(), Stop>;

/// The VM that makes a host call.
pub(super) struct Guest<'a>(pub(super) Caller<'a, State>);

impl Guest<'_> {
    pub(super) fn state(&mut self) -> &mut State {
        self.0.data_mut()
    }

    /// Bytes that the module passes.
    pub(super) fn read(&self, address: u32, size: u32) -> Result<Vec<u8>, Stop> {
        let (start, size) = (address as usize, size as usize);
        let bytes = self.memory()?.data(&self.0).get(start..start + size);
        bytes.map(<[u8]>::to_vec).ok_or(Stop::Status(Status::InvalidMemoryAccess))
    }

    /// Writes where the module wants a result.
    pub(super) fn write(&mut self, address: u32, bytes: &[u8]) -> Called {
        let memory = self.memory()?;
        memory.write(&mut self.0, address as usize, bytes).map_err(|_| Stop::Status(Status::InvalidMemoryAccess))
    }

    pub(super) fn write_u32(&mut self, address: u32, value: u32) -> Called {
        self.write(address, &value.to_le_bytes())
    }

    pub(super) fn write_u64(&mut self, address: u32, value: u64) -> Called {
        self.write(address, &value.to_le_bytes())
    }

    /// Hands bytes over in memory that the module allocates; no bytes are a null pointer.
    pub(super) fn give(&mut self, bytes: &[u8], address: u32, size: u32) -> Called {
        let given = if bytes.is_empty() { 0 } else { self.allocate(bytes.len() as u32)? };
        self.write(given, bytes)?;
        self.write_u32(address, given)?;
        self.write_u32(size, bytes.len() as u32)
    }

    fn allocate(&mut self, size: u32) -> Result<u32, Stop> {
        let allocator = ["proxy_on_memory_allocate", "malloc"].iter().find_map(|name| self.0.get_export(name));
        let function = allocator.and_then(wasmi::Extern::into_func);
        let function = function.ok_or_else(|| wasmi::Error::new("the module exports no allocator"))?;
        Ok(function.typed::<u32, u32>(&self.0)?.call(&mut self.0, size)?)
    }

    fn memory(&self) -> Result<Memory, Stop> {
        let memory = self.0.get_export("memory").and_then(wasmi::Extern::into_memory);
        memory.ok_or_else(|| Stop::Trap(wasmi::Error::new("the module exports no memory")))
    }
}
