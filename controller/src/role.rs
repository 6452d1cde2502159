//! Whether this replica decides.

/// Who leads.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Role {
    /// This replica does.
    Leads,
    /// Another one does, which is reached at this address, or nobody that is known.
    Follows(Option<String>),
    /// There is nobody else.
    #[default]
    Alone,
}

impl Role {
    /// Whether decisions are made here.
    pub fn decides(&self) -> bool {
        !matches!(self, Self::Follows(_))
    }
}
