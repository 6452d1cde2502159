//! How many simulated rollouts a test runs, and running them on all cores.

#![allow(dead_code)] // Each test program uses a part of it.

/// What a run is for. Without optimization the tables would take an hour, so none is printed.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum For {
    Tables,
    Assertions,
    Nothing,
}

pub(crate) fn what_for() -> For {
    match std::env::var_os("VERDICT_TABLES") {
        Some(_) => For::Tables,
        None if cfg!(debug_assertions) => For::Nothing,
        None => For::Assertions,
    }
}

/// A number of runs of a table, divided by `DIVIDE_RUNS`.
pub(crate) fn divided(table: u64) -> u64 {
    let divisor = std::env::var("DIVIDE_RUNS").ok().and_then(|by| by.parse().ok()).unwrap_or(1);
    (table / divisor).max(1)
}

/// The results of so many runs, by their seeds, on all cores.
pub(crate) fn many<T: Send>(runs: u64, run: impl Fn(u64) -> T + Sync) -> Vec<T> {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get) as u64;
    let run = &run;
    std::thread::scope(|scope| {
        let play = |core| (1..=runs).filter(move |seed| seed % cores == core).map(run).collect::<Vec<_>>();
        let threads: Vec<_> = (0..cores).map(|core| scope.spawn(move || play(core))).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    })
}
