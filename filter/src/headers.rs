//! The request's headers as `core` asks for them: a few by name, or all at once, read in place from what Envoy hands over.

use crate::host::{self, Map, Received};
use std::borrow::Cow;
use tideshift_core::request::{self, Request};

/// The headers of the request that is being called for.
pub enum Headers<'n> {
    /// Everything that the client sent.
    All(AllHeaders),
    /// Just these, asked for one by one: cheaper than all as long as they are few, most of all those that are absent.
    Few(&'n [String], Vec<Option<Received>>),
}

/// All headers as Envoy writes them down: see [`host::headers`].
#[derive(Default)]
pub struct AllHeaders(Received);

impl<'n> Headers<'n> {
    /// Reads all.
    pub fn all() -> Self {
        Self::All(AllHeaders(host::headers(Map::Request).unwrap_or_default()))
    }

    /// Reads these.
    pub fn few(names: &'n [String]) -> Self {
        Self::Few(names, names.iter().map(|name| read(name)).collect())
    }
}

/// One header of the request, its values joined if there are several.
fn read(name: &str) -> Option<Received> {
    let first = host::header(Map::Request, name)?;
    // Pseudo-headers have one value; of the others that was the first one.
    if name.starts_with(':') {
        return Some(first);
    }
    Some(host::property(&["request\0headers\0", name].concat()).unwrap_or(first))
}

impl Headers<'_> {
    /// Whether this is a gRPC request, whose answer must have a gRPC status in its trailers or headers; gRPC-Web has it in
    /// the body.
    pub fn is_grpc(&self) -> bool {
        const KIND: &str = "content-type";
        match self {
            Self::All(_) => self.header(KIND).is_some_and(|kind| is_grpc(&kind)),
            Self::Few(..) => host::header(Map::Request, KIND).is_some_and(|kind| is_grpc(&kind)),
        }
    }
}

/// Whether a content type is that of gRPC, but not gRPC-Web.
pub fn is_grpc(kind: &[u8]) -> bool {
    let rest = kind.strip_prefix(b"application/grpc");
    rest.is_some_and(|rest| rest.first().is_none_or(|next| matches!(next, b'+' | b';' | b' ')))
}

impl AllHeaders {
    /// Names (in lower case, as Envoy has them) and values. Ends early where the bytes make no sense.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let count = integer(&self.0, 0).unwrap_or_default();
        let mut sizes = self.0.get(4..).unwrap_or_default();
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

impl Request for Headers<'_> {
    fn header(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        match self {
            Self::All(all) => {
                request::joined(name, all.iter().filter(|(n, _)| *n == name.as_bytes()).map(|(_, value)| value))
            }
            Self::Few(names, values) => {
                let at = names.iter().position(|known| known == name)?;
                values.get(at)?.as_deref().map(Cow::Borrowed)
            }
        }
    }
}

fn integer(bytes: &[u8], at: usize) -> Option<usize> {
    bytes.get(at..)?.first_chunk().map(|four| u32::from_le_bytes(*four) as usize)
}
