//! The request's headers as `core` asks for them: a few by name, or all at once, read in place from what the host returns.

use crate::host::{HeaderList, HeaderMap, Host};
use std::borrow::Cow;
use tideshift_core::matching::request;
use tideshift_core::matching::request::Request;

/// The headers of the request that is being called for.
pub enum RequestHeaders<'n, H: Host> {
    /// Everything that the client sent.
    All(H::Headers),
    /// Just these, asked for one by one: cheaper than all as long as they are few, most of all those that are absent.
    Few(&'n [String], Vec<Option<H::Bytes>>),
}

impl<'n, H: Host> RequestHeaders<'n, H> {
    /// Reads all.
    pub fn all(host: &H) -> Self {
        Self::All(host.headers(HeaderMap::Request))
    }

    /// Reads these.
    pub fn few(host: &H, names: &'n [String]) -> Self {
        Self::Few(names, names.iter().map(|name| read(host, name)).collect())
    }

    /// Whether this is a gRPC request, whose response must have a gRPC status in its trailers or headers; gRPC-Web has it
    /// in the body.
    pub fn is_grpc(&self, host: &H) -> bool {
        const CONTENT_TYPE: &str = "content-type";
        match self {
            Self::All(_) => self.header(CONTENT_TYPE).is_some_and(|kind| is_grpc(&kind)),
            Self::Few(..) => host.header(HeaderMap::Request, CONTENT_TYPE).is_some_and(|kind| is_grpc(&kind)),
        }
    }
}

/// One header of the request, its values joined if there are several.
fn read<H: Host>(host: &H, name: &str) -> Option<H::Bytes> {
    let first = host.header(HeaderMap::Request, name)?;
    // Pseudo-headers have one value; of the others that was the first one.
    if name.starts_with(':') {
        return Some(first);
    }
    Some(host.property(&["request\0headers\0", name].concat()).unwrap_or(first))
}

/// Whether a content type is that of gRPC, but not gRPC-Web.
pub fn is_grpc(kind: &[u8]) -> bool {
    let rest = kind.strip_prefix(b"application/grpc");
    rest.is_some_and(|rest| rest.first().is_none_or(|next| matches!(next, b'+' | b';' | b' ')))
}

impl<H: Host> Request for RequestHeaders<'_, H> {
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
