//! The process's own metrics, by the names that every Prometheus client has for them. Elsewhere than on Linux there are
//! none.

use super::Page;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use std::fmt;

/// Looks at the process whenever it is asked.
#[derive(Debug)]
pub(super) struct Process;

impl Collector for Process {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let page = &mut Page(encoder);
        // What the system does not say is left out.
        let Some(seen) = look() else { return Ok(()) };
        page.counter("process_cpu_seconds", "CPU time of user and system.", [(Vec::new(), seen.cpu_seconds)])?;
        page.one("process_start_time_seconds", "When the process started, in seconds since 1970.", seen.started)?;
        page.one("process_resident_memory_bytes", "Memory in RAM.", seen.resident_bytes)?;
        page.one("process_virtual_memory_bytes", "Memory mapped.", seen.virtual_bytes)?;
        page.one("process_threads", "Threads.", seen.threads)?;
        page.one("process_open_fds", "Open file descriptors.", seen.open_fds)?;
        page.gauge("process_max_fds", "File descriptors that may be open.", seen.max_fds.map(|max| (Vec::new(), max)))
    }
}

struct Seen {
    cpu_seconds: f64,
    started: f64,
    resident_bytes: f64,
    virtual_bytes: f64,
    threads: f64,
    open_fds: f64,
    max_fds: Option<f64>,
}

#[cfg(target_os = "linux")]
fn look() -> Option<Seen> {
    use procfs::WithCurrentSystemInfo;
    use procfs::process::{LimitValue, Process};
    let process = Process::myself().ok()?;
    let (stat, limits) = (process.stat().ok()?, process.limits().ok()?);
    let seconds = |ticks: u64| ticks as f64 / procfs::ticks_per_second() as f64;
    Some(Seen {
        cpu_seconds: seconds(stat.utime + stat.stime),
        started: procfs::boot_time_secs().ok()? as f64 + seconds(stat.starttime),
        resident_bytes: stat.rss_bytes().get() as f64,
        virtual_bytes: stat.vsize as f64,
        threads: stat.num_threads as f64,
        open_fds: process.fd_count().ok()? as f64,
        max_fds: match limits.max_open_files.soft_limit {
            LimitValue::Value(most) => Some(most as f64),
            LimitValue::Unlimited => None,
        },
    })
}

#[cfg(not(target_os = "linux"))]
fn look() -> Option<Seen> {
    None
}
