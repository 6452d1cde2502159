//! A rollout played through in a made-up world, in no time: what would the strategy of a document do if the versions
//! behaved like this? It is decided by what decides in production: [`Reconciler`](crate::reconciler::Reconciler) with its engine
//! and verdict, the proxies' plan, sequence and guard. Made up are only requests, their outcomes, readiness and the clock.

mod many;
mod proxy;
mod random;
mod record;
mod run;
mod scenario;
mod svg;
mod text;

pub use many::{End, Ending, Many, Quantiles, many};
pub use record::{Event, Judged, Run, Sample, ServiceTotals, Transition, VersionSample, VersionTotals};
pub use run::run;
pub use scenario::{Action, Behaviour, Clumps, Load, Planned, Scenario, Series};
pub use svg::draw;

pub mod format;
#[cfg(test)]
mod tests;
