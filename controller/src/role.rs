//! The role of this replica: leader, follower or standalone.

/// The role of a replica.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Role {
    /// This replica is the leader.
    Leads,
    /// Another replica is the leader; its address, if known.
    Follows(Option<String>),
    /// There are no other replicas.
    #[default]
    Alone,
}

impl Role {
    /// Whether this replica makes decisions.
    pub fn decides(&self) -> bool {
        !matches!(self, Self::Follows(_))
    }
}
