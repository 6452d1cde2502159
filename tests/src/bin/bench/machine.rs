//! The machine properties that the numbers depend on: the assignment of cores, and the CPU time of a thread.

use std::fs;
use std::time::Instant;

use anyhow::{Context as _, bail, ensure};
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use tideshift_tests::envoy_fixture::DEADLINE;

/// The cores, and their assignment while CPU time is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cores {
    /// All cores that this process may use.
    pub(crate) all: CpuSet,
    /// The core of the proxy alone.
    pub(crate) proxy: CpuSet,
    /// The core of all clients and backends.
    pub(crate) others: CpuSet,
}

impl Cores {
    /// The last of the allowed cores: the first ones handle interrupts.
    pub(crate) fn choose() -> anyhow::Result<Self> {
        let all = sched_getaffinity(None)?;
        let mut last = (0..CpuSet::MAX_CPU).rev().filter(|&core| all.is_set(core)).map(|core| {
            let mut only = CpuSet::new();
            only.set(core);
            only
        });
        let (Some(proxy), Some(others)) = (last.next(), last.next()) else {
            bail!("the bench needs two cores: one for Envoy, one for clients and backends");
        };
        Ok(Self { all, proxy, others })
    }
}

/// Keeps every thread of a process on these cores; threads that it starts later stay there too.
pub(crate) fn pin(process: u32, cores: &CpuSet) -> anyhow::Result<()> {
    // A thread that is being started meanwhile may have other cores, so repeat until there is none.
    let deadline = Instant::now() + DEADLINE;
    loop {
        let mut missed = false;
        for thread in threads(process)? {
            let id = Pid::from_raw(i32::try_from(thread)?);
            // A thread may have ended meanwhile.
            if sched_getaffinity(id).is_ok_and(|now| now != *cores) {
                missed |= sched_setaffinity(id, cores).is_ok();
            }
        }
        if !missed {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "process {process} starts threads faster than they can be pinned");
    }
}

fn threads(process: u32) -> anyhow::Result<Vec<u32>> {
    let directory = fs::read_dir(format!("/proc/{process}/task")).context("cannot list threads: is this Linux?")?;
    let id = |entry: std::io::Result<fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().parse()?);
    directory.map(id).collect()
}

/// The usage of a core by a thread, in nanoseconds.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Used {
    /// CPU time.
    pub(crate) cpu: u64,
    /// How long it was runnable while others ran.
    pub(crate) waited: u64,
}

/// A thread of another process, by its name.
#[derive(Clone, Debug)]
pub(crate) struct Thread {
    stat: String,
    schedstat: String,
}

impl Thread {
    /// Envoy's first worker.
    pub(crate) fn worker(envoy: u32) -> anyhow::Result<Self> {
        for thread in threads(envoy)? {
            let directory = format!("/proc/{envoy}/task/{thread}");
            if fs::read_to_string(format!("{directory}/comm"))?.trim() == "wrk:worker_0" {
                return Ok(Self { stat: format!("{directory}/stat"), schedstat: format!("{directory}/schedstat") });
            }
        }
        bail!("Envoy has no thread wrk:worker_0")
    }

    /// What it has used of its core, once it has nothing left to do: the kernel counts a running thread's time only now
    /// and then, and an exchange is not over for the proxy when the client has the answer.
    pub(crate) fn used(&self) -> anyhow::Result<Used> {
        let deadline = Instant::now() + DEADLINE;
        while !self.sleeps()? {
            ensure!(Instant::now() < deadline, "Envoy's worker has work without requests");
        }
        let schedstat = fs::read_to_string(&self.schedstat)?;
        let mut numbers = schedstat.split(' ').map(str::parse);
        let (Some(Ok(cpu)), Some(Ok(waited))) = (numbers.next(), numbers.next()) else {
            bail!("cannot read {}: {schedstat}", self.schedstat);
        };
        Ok(Used { cpu, waited })
    }

    fn sleeps(&self) -> anyhow::Result<bool> {
        let stat = fs::read_to_string(&self.stat)?;
        // The state comes after the name, which is in parentheses and may hold anything.
        Ok(stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('S')))
    }
}

/// The processor's name.
pub(crate) fn processor() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    name.map_or_else(|| "unknown processor".to_owned(), |(_, name)| name.trim().to_owned())
}
