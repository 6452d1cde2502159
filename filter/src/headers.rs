//! The request's headers as `core` asks for them, read in place from what Envoy hands over.

use crate::host::{self, Map, Received};
use std::borrow::Cow;
use tideshift_core::request::{self, Request};

/// The headers of the request that is being called for.
#[derive(Default)]
pub struct Headers {
    bytes: Received,
}

impl Headers {
    /// Reads them all.
    pub fn of_request() -> Self {
        Self { bytes: host::headers(Map::Request).unwrap_or_default() }
    }

    /// Names (in lower case, as Envoy has them) and values. Ends early where the bytes make no sense.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let count = integer(&self.bytes, 0).unwrap_or_default();
        let mut sizes = self.bytes.get(4..).unwrap_or_default();
        let mut text = count.checked_mul(8).and_then(|length| sizes.get(length..)).unwrap_or_default();
        std::iter::from_fn(move || {
            let (name_size, value_size) = (integer(sizes, 0)?, integer(sizes, 4)?);
            let (name, rest) = text.split_at_checked(name_size)?;
            let (value, rest) = rest.get(1..)?.split_at_checked(value_size)?;
            (sizes, text) = (sizes.get(8..)?, rest.get(1..)?);
            Some((name, value))
        })
        .take(count)
    }
}

impl Request for Headers {
    fn header(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        request::joined(name, self.iter().filter(|(n, _)| *n == name.as_bytes()).map(|(_, value)| value))
    }
}

fn integer(bytes: &[u8], at: usize) -> Option<usize> {
    bytes.get(at..)?.first_chunk().map(|four| u32::from_le_bytes(*four) as usize)
}
