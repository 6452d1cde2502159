//! The time as everything here is told it: the system's, which may be set back, but never going back or standing still
//! with it. Holds, deadlines and evidence are made of differences, and would wait until the old time is reached again.

use crate::rollout::Millis;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

static CLOCK: Mutex<Option<Clock>> = Mutex::new(None);

/// Milliseconds since 1970; later than what was said before, whatever has become of the system's clock.
pub fn now() -> Millis {
    now_and_not_before(0)
}

/// Goes on from there where the system's clock says that it is earlier, as after a restart.
pub fn not_before(time: Millis) {
    now_and_not_before(time);
}

fn now_and_not_before(time: Millis) -> Millis {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let system = since.map_or(0, |since| since.as_millis() as Millis).max(time);
    let mut clock = CLOCK.lock().unwrap_or_else(PoisonError::into_inner);
    let instant = Instant::now();
    clock.get_or_insert(Clock { instant, time: system }).now(instant, system)
}

/// Where it goes on from.
#[derive(Debug)]
struct Clock {
    instant: Instant,
    time: Millis,
}

impl Clock {
    /// Follows the system's clock forwards; where that goes back, time goes on as it would have.
    fn now(&mut self, instant: Instant, system: Millis) -> Millis {
        let passed = instant.checked_duration_since(self.instant).unwrap_or(Duration::ZERO);
        let now = self.time + passed.as_millis() as Millis;
        if system > now {
            *self = Self { instant, time: system };
        }
        now.max(system)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_goes_on_while_the_system_says_that_it_is_earlier() {
        let begun = Instant::now();
        let mut clock = Clock { instant: begun, time: 10_000 };
        let mut at = |millis: u64, system| clock.now(begun + Duration::from_millis(millis), system);
        assert_eq!(at(5, 10_005), 10_005);
        // Forwards with the system.
        assert_eq!(at(10, 20_000), 20_000);
        // Set back, time passes all the same, also when it is asked more often than each millisecond.
        assert_eq!([at(10, 1_000), at(11, 1_001), at(11, 1_001), at(510, 1_500)], [20_000, 20_001, 20_001, 20_500]);
        // Once the system has caught up, it is followed again.
        assert_eq!([at(1_010, 20_999), at(1_010, 21_007)], [21_000, 21_007]);
    }
}
