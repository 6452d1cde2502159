//! A host call's view of its caller: the VM's memory and state.

use wasmi::{Caller, Memory};

use super::abi::Status;
use super::hostile::{Fault, Word, spoil};
use super::vm::State;

/// Aborts a host call: with a status for the module, which may not exist in the ABI, or with a trap.
pub(super) enum Stop {
    Status(Status),
    Odd(u32),
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

/// The result of a host call.
pub(super) type Called = Result<(), Stop>;

/// The VM that makes a host call.
pub(super) struct Guest<'a>(pub(super) Caller<'a, State>);

impl Guest<'_> {
    pub(super) fn state(&mut self) -> &mut State {
        self.0.data_mut()
    }

    /// Reads bytes that the module passes.
    pub(super) fn read(&self, address: u32, size: u32) -> Result<Vec<u8>, Stop> {
        let (start, size) = (address as usize, size as usize);
        let bytes = self.memory()?.data(&self.0).get(start..start + size);
        bytes.map(<[u8]>::to_vec).ok_or(Stop::Status(Status::InvalidMemoryAccess))
    }

    /// Writes a result to the module's memory.
    pub(super) fn write(&mut self, address: u32, bytes: &[u8]) -> Called {
        let memory = self.memory()?;
        memory.write(&mut self.0, address as usize, bytes).map_err(|_| Stop::Status(Status::InvalidMemoryAccess))
    }

    /// Writes a number as a result.
    pub(super) fn write_u32(&mut self, address: u32, value: u32) -> Called {
        let value = self.number().map_or(value, |other| other as u32);
        self.write(address, &value.to_le_bytes())
    }

    pub(super) fn write_u64(&mut self, address: u32, value: u64) -> Called {
        let value = self.number().unwrap_or(value);
        self.write(address, &value.to_le_bytes())
    }

    fn number(&mut self) -> Option<u64> {
        match self.state().fault {
            Some(Fault::Number(number)) => Some(number),
            _ => None,
        }
    }

    /// Passes bytes in memory that the module allocates; empty bytes are a null pointer.
    pub(super) fn give(&mut self, bytes: &[u8], address: u32, size: u32) -> Called {
        let (mut words, mut other) = ((Word::Right, Word::Right), None);
        match &self.state().fault {
            Some(Fault::Bytes(bytes)) => other = Some(bytes.clone()),
            Some(Fault::Spoilt(seed)) => other = Some(spoil(bytes.to_vec(), *seed)),
            Some(Fault::Handed { address, size }) => words = (*address, *size),
            _ => {}
        }
        let bytes = other.as_deref().unwrap_or(bytes);
        let given = if bytes.is_empty() { 0 } else { self.allocate(bytes.len() as u32)? };
        if given == 0 && !bytes.is_empty() {
            return Err(Status::InvalidMemoryAccess.into());
        }
        self.write(given, bytes)?;
        for (place, word) in [(address, words.0.of(given)), (size, words.1.of(bytes.len() as u32))] {
            if let Some(word) = word {
                self.write(place, &word.to_le_bytes())?;
            }
        }
        Ok(())
    }

    /// Requests memory from the module; 0 if it refuses. The returned memory must exist.
    pub(super) fn allocate(&mut self, size: u32) -> Result<u32, Stop> {
        let allocator = ["proxy_on_memory_allocate", "malloc"].iter().find_map(|name| self.0.get_export(name));
        let function = allocator.and_then(wasmi::Extern::into_func);
        let function = function.ok_or_else(|| wasmi::Error::new("the module exports no allocator"))?;
        let lent = function.typed::<u32, u32>(&self.0)?.call(&mut self.0, size)?;
        let end = self.memory()?.data_size(&self.0) as u64;
        if lent != 0 && u64::from(lent) + u64::from(size) > end {
            return Err(wasmi::Error::new(format!("the module lends {size} bytes at {lent}, of {end}")).into());
        }
        Ok(lent)
    }

    /// Calls an export of the module, if it exists, during a host call.
    pub(super) fn call_back(&mut self, name: &str, arguments: &[u32]) -> Called {
        let Some(function) = self.0.get_export(name).and_then(wasmi::Extern::into_func) else { return Ok(()) };
        let (arguments, mut results) = super::vm::values(&function.ty(&self.0), arguments);
        Ok(function.call(&mut self.0, &arguments, &mut results)?)
    }

    fn memory(&self) -> Result<Memory, Stop> {
        let memory = self.0.get_export("memory").and_then(wasmi::Extern::into_memory);
        memory.ok_or_else(|| Stop::Trap(wasmi::Error::new("the module exports no memory")))
    }
}
