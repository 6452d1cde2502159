//! Header maps as proxy-wasm writes them: the number of headers, the sizes of each one's name and value, then each name
//! and value followed by a zero byte. Integers have 32 bits, little-endian.

use crate::host::HeaderList;
use std::ops::Deref;

/// A header map in these bytes, which may be anything.
#[derive(Debug, Default)]
pub struct HeaderPairs<B>(pub B);

impl<B: Deref<Target = [u8]>> HeaderList for HeaderPairs<B> {
    /// Ends early where the bytes make no sense.
    fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
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

fn integer(bytes: &[u8], at: usize) -> Option<usize> {
    bytes.get(at..)?.first_chunk().map(|four| u32::from_le_bytes(*four) as usize)
}

/// Writes headers in this form.
pub fn encode<T: AsRef<[u8]>>(headers: &[(T, T)]) -> Vec<u8> {
    let mut bytes = (headers.len() as u32).to_le_bytes().to_vec();
    for (name, value) in headers {
        bytes.extend_from_slice(&(name.as_ref().len() as u32).to_le_bytes());
        bytes.extend_from_slice(&(value.as_ref().len() as u32).to_le_bytes());
    }
    for text in headers.iter().flat_map(|(name, value)| [name, value]) {
        bytes.extend_from_slice(text.as_ref());
        bytes.push(0);
    }
    bytes
}
