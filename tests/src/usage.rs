//! The resource usage of a process, as the system counts it.

use std::fs;
use std::str::FromStr as _;
use std::time::Duration;

use anyhow::Context as _;

/// A process.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// Its id.
    pub process: u32,
}

impl Usage {
    /// `VmRSS` or `VmHWM`, in MB.
    pub fn resident(&self, field: &str) -> anyhow::Result<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process))?;
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        let kilobytes: f64 = line.context("no such field")?.trim().trim_end_matches(" kB").parse()?;
        Ok(kilobytes / 1000.0)
    }

    /// CPU time so far, of all its threads.
    pub fn cpu(&self) -> anyhow::Result<Duration> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.process))?;
        // The second field is the name, in parentheses; user and system time are the 14th and 15th.
        let fields = stat.rsplit(") ").next().context("no fields")?.split(' ').skip(11).take(2);
        let ticks = fields.map(u64::from_str).sum::<Result<u64, _>>()?;
        Ok(Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64))
    }
}
