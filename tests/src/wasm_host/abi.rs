//! The numbers and encodings of the ABI: statuses, map and buffer types, the layout of header maps and property paths.

/// A header or trailer.
pub type Header = (Vec<u8>, Vec<u8>);

/// The status of a host call; the discriminants are the ABI's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs, reason = "the ABI's own names")]
pub enum Status {
    Ok = 0,
    NotFound = 1,
    BadArgument = 2,
    SerializationFailure = 3,
    ParseFailure = 4,
    InvalidMemoryAccess = 6,
    Empty = 7,
    CasMismatch = 8,
    InternalFailure = 10,
    Unimplemented = 12,
}

/// The level of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the ABI's own names")]
pub enum Level {
    Trace,
    Debug,
    Info,
    Warn,
    Error,
    Critical,
}

impl Level {
    pub(super) fn from_abi(level: u32) -> Option<Self> {
        use Level::{Critical, Debug, Error, Info, Trace, Warn};
        [Trace, Debug, Info, Warn, Error, Critical].get(level as usize).copied()
    }
}

/// The header maps that a module can request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Map {
    RequestHeaders,
    RequestTrailers,
    ResponseHeaders,
    ResponseTrailers,
    CalloutHeaders,
    CalloutTrailers,
}

impl Map {
    pub(super) fn from_abi(map: u32) -> Option<Self> {
        match map {
            0 => Some(Self::RequestHeaders),
            1 => Some(Self::RequestTrailers),
            2 => Some(Self::ResponseHeaders),
            3 => Some(Self::ResponseTrailers),
            6 => Some(Self::CalloutHeaders),
            7 => Some(Self::CalloutTrailers),
            _ => None,
        }
    }
}

pub(super) const CALLOUT_BODY: u32 = 4;
pub(super) const VM_CONFIGURATION: u32 = 6;
pub(super) const PLUGIN_CONFIGURATION: u32 = 7;

/// `count, (name length, value length)*, (name \0 value \0)*`, all numbers u32 little-endian; an empty map is no bytes.
pub(super) fn encode_map(headers: &[Header]) -> Vec<u8> {
    if headers.is_empty() {
        return Vec::new();
    }
    let mut bytes = (headers.len() as u32).to_le_bytes().to_vec();
    for (name, value) in headers {
        bytes.extend((name.len() as u32).to_le_bytes());
        bytes.extend((value.len() as u32).to_le_bytes());
    }
    for part in headers.iter().flat_map(|(name, value)| [name, value]) {
        bytes.extend(part);
        bytes.push(0);
    }
    bytes
}

/// The reverse of [`encode_map`]; `None` for invalid bytes.
pub(super) fn decode_map(bytes: &[u8]) -> Option<Vec<Header>> {
    if bytes.is_empty() {
        return Some(Vec::new());
    }
    let (count, mut lengths) = bytes.split_first_chunk::<4>()?;
    let count = u32::from_le_bytes(*count) as usize;
    let mut parts = lengths.get(count.checked_mul(8)?..)?;
    let mut part = || {
        let (length, rest) = lengths.split_first_chunk::<4>()?;
        lengths = rest;
        let length = u32::from_le_bytes(*length) as usize;
        let bytes = parts.get(..length)?;
        parts = parts.get(length + 1..)?;
        Some(bytes.to_vec())
    };
    (0..count).map(|_| Some((part()?, part()?))).collect()
}

/// `response.flags` in the encoding of the ABI: the elements of the path separated by zero bytes.
pub(super) fn property_path(dotted: &str) -> Vec<u8> {
    dotted.replace('.', "\0").into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_survive_the_way_there_and_back() {
        let headers =
            vec![(b":path".to_vec(), b"/".to_vec()), (b"x-odd".to_vec(), vec![0xff, 0]), (b"e".to_vec(), vec![])];
        assert_eq!(decode_map(&encode_map(&headers)), Some(headers));
        assert_eq!(decode_map(&encode_map(&[])), Some(vec![]));
        for broken in [&[1][..], &[1, 0, 0, 0], &[0xff; 12], &[1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, b'a']] {
            assert_eq!(decode_map(broken), None, "{broken:?}");
        }
    }
}
