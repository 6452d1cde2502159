//! Faults of an API server that tests can inject.

use std::collections::BTreeMap;
use std::time::Duration;

/// The users that a fault affects.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Whom {
    /// Every client.
    All,
    /// The clients of one user, by its name.
    User(String),
}

impl Whom {
    /// The clients of this user.
    pub fn user(name: &str) -> Self {
        Self::User(name.to_owned())
    }

    fn meets(&self, user: &str) -> bool {
        match self {
            Self::All => true,
            Self::User(name) => name == user,
        }
    }
}

/// The faults in force.
#[derive(Clone, Debug, Default)]
pub(super) struct Faults {
    /// How often watches were cut: each watch ends when this has increased.
    pub(super) cuts: u64,
    /// How often bookmarks were sent to all watches.
    pub(super) bookmarks: u64,
    held: Vec<Whom>,
    delays: BTreeMap<Whom, Duration>,
    /// The number of writes to a kind that are still to be rejected.
    conflicts: BTreeMap<String, usize>,
}

impl Faults {
    pub(super) fn hold(&mut self, whom: Whom) {
        self.held.push(whom);
    }

    pub(super) fn release(&mut self, whom: &Whom) {
        self.held.retain(|held| held != whom);
    }

    pub(super) fn holds(&self, user: &str) -> bool {
        self.held.iter().any(|whom| whom.meets(user))
    }

    pub(super) fn delay(&mut self, whom: Whom, delay: Duration) {
        self.delays.insert(whom, delay);
    }

    /// The delay of a user's watch events.
    pub(super) fn delay_of(&self, user: &str) -> Duration {
        self.delays.iter().filter(|(whom, _)| whom.meets(user)).map(|(_, delay)| *delay).max().unwrap_or_default()
    }

    pub(super) fn conflict(&mut self, resource: String, writes: usize) {
        self.conflicts.insert(resource, writes);
    }

    /// Whether to reject this write; it is counted.
    pub(super) fn take_conflict(&mut self, resource: &str) -> bool {
        match self.conflicts.get_mut(resource) {
            Some(left) if *left > 0 => {
                *left -= 1;
                true
            }
            _ => false,
        }
    }
}
