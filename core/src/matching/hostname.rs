//! Finds the service of a request by its hostname, with Gateway API's rules: the most specific hostname first.

use crate::decode::Decoder;
use crate::name::is_subdomain;
use serde_json::Value;
use std::borrow::Cow;
use std::collections::BTreeMap;

/// Parses a hostname: exact (`shop.example.com`) or with a first label `*` that stands for one or more labels.
pub(crate) fn read(d: &mut Decoder, value: &Value) -> Option<String> {
    let allowed = "a hostname without port, such as shop.example.com or *.example.com (leave hostnames out for every \
                   host)";
    let text = d.text_where(value, allowed, |text| {
        let text = text.to_ascii_lowercase();
        is_subdomain(text.strip_prefix("*.").unwrap_or(&text), 253)
    })?;
    Some(text.to_ascii_lowercase())
}

/// An index from hostnames to targets: exact names before `*.suffix`, longer suffixes before shorter ones, and the
/// catch-all last. A lookup takes logarithmic time for each label.
#[derive(Debug, Clone, Default)]
pub struct Hostnames {
    exact: BTreeMap<String, usize>,
    suffix: BTreeMap<String, usize>,
    every: Option<usize>,
}

impl Hostnames {
    /// Maps `hostname` (`None`: every host) to `target`.
    pub(crate) fn insert(&mut self, hostname: Option<&str>, target: usize) {
        match hostname {
            None => self.every = Some(target),
            Some(name) => {
                let (names, name) = match name.strip_prefix("*.") {
                    Some(suffix) => (&mut self.suffix, suffix),
                    None => (&mut self.exact, name),
                };
                names.insert(name.to_owned(), target);
            }
        }
    }

    /// Whether the host affects the decision; if not, the filter need not read it.
    pub fn refer_to_host(&self) -> bool {
        !(self.exact.is_empty() && self.suffix.is_empty())
    }

    /// The target of an `:authority` (any case, with or without a port, possibly not UTF-8).
    pub fn find(&self, authority: &[u8]) -> Option<usize> {
        if !self.refer_to_host() {
            return self.every;
        }
        let named = std::str::from_utf8(authority).ok().and_then(|authority| self.find_named(&host(authority)));
        named.or(self.every)
    }

    fn find_named(&self, host: &str) -> Option<usize> {
        if let Some(target) = self.exact.get(host) {
            return Some(*target);
        }
        let mut rest = host;
        while let Some((_, suffix)) = rest.split_once('.') {
            if let Some(target) = self.suffix.get(suffix) {
                return Some(*target);
            }
            rest = suffix;
        }
        None
    }
}

/// The host of an authority, in lower case: without the port, and an IPv6 address without its brackets.
fn host(authority: &str) -> Cow<'_, str> {
    let host = match authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => authority.rsplit_once(':').map_or(authority, |(host, _)| host),
    };
    match host.bytes().any(|b| b.is_ascii_uppercase()) {
        true => Cow::Owned(host.to_ascii_lowercase()),
        false => Cow::Borrowed(host),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn index() -> Hostnames {
        let mut index = Hostnames::default();
        index.insert(Some("shop.example.com"), 1);
        index.insert(Some("*.example.com"), 2);
        index.insert(Some("*.eu.example.com"), 3);
        index
    }

    #[test]
    fn the_most_specific_hostname_wins() {
        let index = index();
        assert_eq!(index.find(b"shop.example.com"), Some(1));
        assert_eq!(index.find(b"cart.example.com"), Some(2));
        assert_eq!(index.find(b"cart.eu.example.com"), Some(3));
        assert_eq!(index.find(b"a.b.eu.example.com"), Some(3));
        assert_eq!(index.find(b"eu.example.com"), Some(2));
    }

    #[test]
    fn a_wildcard_does_not_match_its_own_suffix_nor_other_hosts() {
        let index = index();
        assert_eq!(index.find(b"example.com"), None);
        assert_eq!(index.find(b"badexample.com"), None);
        assert_eq!(index.find(b""), None);
        assert_eq!(index.find(b"\xff.example.com"), None);
    }

    #[test]
    fn case_and_port_do_not_matter() {
        let mut index = index();
        assert_eq!(index.find(b"Shop.EXAMPLE.com:8443"), Some(1));
        assert_eq!(index.find(b"[2001:db8::1]:80"), None);
        index.insert(None, 9);
        assert_eq!(index.find(b"[2001:db8::1]:80"), Some(9));
        assert_eq!(index.find(b"\xff\xfe"), Some(9));
    }
}
