//! The clock. Holds, deadlines and evidence depend on differences of times: only the first time of a process is the
//! system's, all others add the time that a monotonic clock has counted since. Setting the system's clock forwards or
//! backwards neither skips nor extends a hold. Times shown to users are the system's.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

static CLOCK: Mutex<Option<Clock>> = Mutex::new(None);

/// The system's clock is read a moment apart from the other, and says no more than whole milliseconds.
const TOLERANCE: Millis = 1_000;

/// Milliseconds since 1970 as the system had it when the process began, and those that have passed since.
pub fn now() -> Millis {
    with(|clock, _| clock.now(Instant::now()))
}

/// Goes on from there if it is earlier than that, as after a restart on a machine whose clock is behind.
pub fn not_before(time: Millis) {
    with(|clock, _| clock.not_before(time, Instant::now()));
}

/// What the system's clock says where [`now`] says this.
pub fn wall(time: Millis) -> Millis {
    with(|clock, system| clock.wall(time, Instant::now(), system))
}

/// A time of the controller's, as RFC 3339 has it and the system's clock shows it.
pub fn timestamp(millis: u64) -> jiff::Timestamp {
    let millis = wall(millis);
    jiff::Timestamp::from_millisecond(i64::try_from(millis).unwrap_or(i64::MAX)).unwrap_or(jiff::Timestamp::MAX)
}

fn with<T>(what: impl FnOnce(&mut Clock, Millis) -> T) -> T {
    let mut clock = CLOCK.lock().unwrap_or_else(PoisonError::into_inner);
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let system = since.map_or(0, |since| since.as_millis() as Millis);
    what(clock.get_or_insert_with(|| Clock { instant: Instant::now(), time: system }), system)
}

/// Where it goes on from.
#[derive(Debug)]
struct Clock {
    instant: Instant,
    time: Millis,
}

impl Clock {
    fn now(&self, instant: Instant) -> Millis {
        let passed = instant.checked_duration_since(self.instant).unwrap_or(Duration::ZERO);
        self.time + passed.as_millis() as Millis
    }

    fn not_before(&mut self, time: Millis, instant: Instant) {
        if self.now(instant) < time {
            *self = Self { instant, time };
        }
    }

    fn wall(&self, time: Millis, instant: Instant, system: Millis) -> Millis {
        let now = self.now(instant);
        match now.abs_diff(system) {
            0..TOLERANCE => time,
            _ => (time + system).saturating_sub(now),
        }
    }
}

/// Milliseconds since 1970.
pub type Millis = u64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_the_system_is_set_to_time_goes_on_and_is_shown_right() {
        let begun = Instant::now();
        let clock = Clock { instant: begun, time: 10_000_000 };
        let at = |millis: u64| begun + Duration::from_millis(millis);
        assert_eq!([0, 5, 3_700_000].map(|millis| clock.now(at(millis))), [10_000_000, 10_000_005, 13_700_000]);
        // In step, an hour ahead, an hour behind: of an event that was 500 s ago.
        for (system, shown) in
            [(11_000_000, 10_500_000), (11_000_999, 10_500_000), (14_600_000, 14_100_000), (7_400_000, 6_900_000)]
        {
            assert_eq!((clock.now(at(1_000_000)), clock.wall(10_500_000, at(1_000_000), system)), (11_000_000, shown));
        }
    }

    #[test]
    fn it_goes_on_from_what_was_kept_where_the_system_is_behind() {
        let begun = Instant::now();
        let mut clock = Clock { instant: begun, time: 10_000 };
        let at = |millis: u64| begun + Duration::from_millis(millis);
        clock.not_before(10_004, at(5));
        assert_eq!(clock.now(at(5)), 10_005);
        clock.not_before(50_000, at(5));
        assert_eq!([5, 6, 1_005].map(|millis| clock.now(at(millis))), [50_000, 50_001, 51_000]);
        assert_eq!(clock.wall(50_000, at(1_005), 11_005), 10_005);
    }
}
