//! The identity of a caller from its credential: its name, the proxies it may speak for, and the services it may see.

use super::Published;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// The maximum length of a credential's name: more than Envoy's node ids have in meshes.
const MAX_NAME: usize = 253;

/// The caller of a request. The default: a local program, where no tokens are needed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Caller {
    /// The credential's name, if it has one.
    pub(super) name: Option<Arc<str>>,
    /// The proxies that it may speak for.
    pub(super) speaks_for: SpeaksFor,
    /// The services that it may see.
    pub(super) sees: Arc<Sees>,
}

/// The proxies that a credential may speak for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) enum SpeaksFor {
    /// Any proxy.
    #[default]
    All,
    /// The proxy with this id.
    One(Arc<str>),
    /// The proxy with any of these names as its id: a certificate may have several names.
    Named(Arc<[Arc<str>]>),
    /// The proxy in this pod.
    Pod {
        /// The pod's namespace.
        namespace: Arc<str>,
        /// The pod's name.
        name: Arc<str>,
    },
}

impl SpeaksFor {
    /// Whether the id of a proxy is included. The id of a pod's proxy is `NAME.NAMESPACE`, or Istio's
    /// `TYPE~ADDRESS~NAME.NAMESPACE~DOMAIN`.
    fn includes(&self, id: &str) -> bool {
        match self {
            Self::All => true,
            Self::One(own) => **own == *id,
            Self::Named(names) => names.iter().any(|own| **own == *id),
            Self::Pod { namespace, name } => {
                let is_full = |id: &str| {
                    let rest = id.strip_prefix(&**name).and_then(|rest| rest.strip_prefix('.'));
                    rest == Some(&**namespace)
                };
                *id == **name || is_full(id) || id.split('~').nth(2).is_some_and(is_full)
            }
        }
    }
}

impl std::fmt::Display for SpeaksFor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::All => f.write_str("any proxy"),
            Self::One(id) => write!(f, "proxy {id}"),
            Self::Named(names) => write!(f, "proxy {}", names.join(" or ")),
            Self::Pod { namespace, name } => write!(f, "the proxy of pod {namespace}/{name}"),
        }
    }
}

/// The identity in a verified client certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Certificate {
    /// Another replica; all replicas share one certificate.
    Replica,
    /// A proxy with any of these names.
    Proxy(Arc<[Arc<str>]>),
}

impl Certificate {
    /// The identity of a proxy. Invalid names are dropped.
    pub fn proxy(names: impl IntoIterator<Item = String>) -> Self {
        Self::Proxy(names.into_iter().filter_map(|name| read_name(&name).ok()).collect())
    }

    /// The caller, with the services that its names may see; `None` if it has no names.
    pub(super) fn caller(&self, sees: impl Fn(&str) -> Option<Arc<Sees>>) -> Option<Caller> {
        let Self::Proxy(names) = self else { return None };
        let name = names.first()?.clone();
        let sees = names.iter().find_map(|name| sees(name)).unwrap_or_default();
        Some(Caller { name: Some(name), speaks_for: SpeaksFor::Named(names.clone()), sees })
    }
}

/// The services that a credential may see.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Sees {
    /// All.
    #[default]
    All,
    /// Services that match any of these patterns.
    Only(Vec<Pattern>),
}

/// `NAMESPACE/NAME` in a cluster, otherwise `NAME`; the name may end in `*`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Pattern {
    namespace: Option<String>,
    name: String,
    is_prefix: bool,
}

impl Pattern {
    fn read(text: &str) -> Result<Self, String> {
        let (namespace, name) = match text.split_once('/') {
            Some((namespace, name)) => (Some(namespace.to_owned()), name),
            None => (None, text),
        };
        let (name, is_prefix) = name.strip_suffix('*').map_or((name, false), |name| (name, true));
        let is_plain = |text: &str| text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b));
        let is_right = is_plain(name) && (is_prefix || !name.is_empty());
        match is_right && namespace.as_deref().is_none_or(|of| !of.is_empty() && is_plain(of)) {
            true => Ok(Self { namespace, name: name.to_owned(), is_prefix }),
            false => Err(format!("services {text:?}: expected NAME, PREFIX*, NAMESPACE/NAME or NAMESPACE/*")),
        }
    }

    /// Matches a service. In a cluster the name of a service is `NAME.NAMESPACE`.
    fn is_for(&self, service: &str) -> bool {
        let name = match &self.namespace {
            None => Some(service),
            Some(namespace) => service.strip_suffix(namespace.as_str()).and_then(|rest| rest.strip_suffix('.')),
        };
        name.is_some_and(|name| if self.is_prefix { name.starts_with(&self.name) } else { *name == self.name })
    }
}

impl Sees {
    /// Parses `PATTERN,PATTERN`.
    pub(super) fn read(text: &str) -> Result<Self, String> {
        text.split(',').map(Pattern::read).collect::<Result<_, _>>().map(Self::Only)
    }

    /// Whether all services are included.
    pub(super) fn is_all(&self) -> bool {
        *self == Self::All
    }

    /// Whether a service is included.
    pub(super) fn includes(&self, service: &str) -> bool {
        match self {
            Self::All => true,
            Self::Only(patterns) => patterns.iter().any(|pattern| pattern.is_for(service)),
        }
    }
}

/// Parses the name of a credential from a file.
pub(super) fn read_name(text: &str) -> Result<Arc<str>, String> {
    match (1..=MAX_NAME).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic()) {
        true => Ok(text.into()),
        false => Err(format!("a name is 1 to {MAX_NAME} visible ASCII characters")),
    }
}

impl Caller {
    /// Checks whether the caller may speak for a proxy.
    pub(super) fn may_speak_for(&self, proxy: &str) -> Result<(), String> {
        match self.speaks_for.includes(proxy) {
            true => Ok(()),
            false => {
                let whose = &self.speaks_for;
                Err(format!("this credential speaks for {whose} only; the request is of proxy {proxy:?}"))
            }
        }
    }

    /// The name for logs and history.
    pub(super) fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }
}

/// The latest policy for each kind of credential that sees only part of it.
#[derive(Debug, Default)]
pub struct Filtered(Mutex<BTreeMap<Arc<Sees>, Published>>);

impl Filtered {
    /// The part of a policy that a caller may see.
    pub(super) fn of(&self, published: Published, sees: &Arc<Sees>) -> Published {
        if sees.is_all() {
            return published;
        }
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_same = |known: &&Published| known.epoch == published.epoch && known.revision == published.revision;
        if let Some(known) = known.get(sees).filter(is_same) {
            return known.clone();
        }
        let filtered = published.only(|name| sees.includes(name));
        known.retain(|_, known| known.revision == published.revision);
        known.insert(sees.clone(), filtered.clone());
        filtered
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use tideshift_core::protocol::policy::Policy;

    #[test]
    fn a_pods_proxy_goes_by_the_names_that_such_proxies_have() {
        let pod = SpeaksFor::Pod { namespace: "shop".into(), name: "edge-1".into() };
        for own in ["edge-1", "edge-1.shop", "sidecar~10.0.0.1~edge-1.shop~shop.svc.cluster.local"] {
            assert!(pod.includes(own), "{own}");
        }
        for other in
            ["edge-10", "edge-1.other", "edge", "sidecar~10.0.0.1~edge-1.other~x", "sidecar~edge-1.shop~x~y", ""]
        {
            assert!(!pod.includes(other), "{other}");
        }
        let caller = Caller { speaks_for: SpeaksFor::One("edge-1".into()), ..Caller::default() };
        let why = caller.may_speak_for("edge-2").unwrap_err();
        assert!(why.contains("edge-1") && why.contains("edge-2"), "{why}");
        assert!(caller.may_speak_for("edge-1").is_ok() && Caller::default().may_speak_for("edge-2").is_ok());
    }

    #[test]
    fn a_credential_sees_the_services_that_it_names() {
        let sees = |text: &str| Sees::read(text).unwrap();
        for (patterns, service, expected) in [
            ("checkout", "checkout", true),
            ("checkout", "checkout-2", false),
            ("checkout*", "checkout-2", true),
            ("*", "anything", true),
            ("shop/*", "payment.shop", true),
            ("shop/*", "payment.workshop", false),
            ("shop/*", "payment", false),
            ("shop/pay*,cart", "payment.shop", true),
            ("shop/pay*,cart", "cart", true),
            ("shop/pay*,cart", "stock.shop", false),
        ] {
            assert_eq!(sees(patterns).includes(service), expected, "{patterns} {service}");
        }
        for wrong in ["", "a,", "/x", "shop/", "a*b", "a b"] {
            assert!(Sees::read(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn each_kind_of_credential_has_its_own_part_of_the_newest_policy() {
        let of = |revision: u64| {
            let services = ["a.shop", "b.bank"].map(|name| {
                json!({"name": name, "hostnames": [name], "versions": [{"name": format!("v{revision}"), "weight": 1}]})
            });
            let policy = Policy::read(&json!({"revision": revision, "services": services})).unwrap();
            Published::next(None, "e".to_owned(), &policy)
        };
        let (filtered, shop) = (Filtered::default(), Arc::new(Sees::read("shop/*").unwrap()));
        let text = |published: Published| String::from_utf8_lossy(&published.json).into_owned();
        for revision in [7, 7, 8] {
            let sent = text(filtered.of(of(revision), &shop));
            assert!(sent.contains(&format!("v{revision}")) && !sent.contains("bank"), "{sent}");
        }
        assert!(text(filtered.of(of(8), &Arc::new(Sees::read("bank/b").unwrap()))).contains("b.bank"));
        assert_eq!(text(filtered.of(of(8), &Arc::default())), text(of(8)));
    }
}
