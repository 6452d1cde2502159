//! Egress rules for webhooks: the operator's allow list, checked against the address of the actual connection. A name
//! is resolved once, and the connection goes to one of the addresses that passed the check, which defeats DNS
//! rebinding.

use futures_util::future::BoxFuture;
use reqwest::Url;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use std::{fmt, io};

/// Addresses of cloud metadata services that no other excluded range contains.
const METADATA: [IpAddr; 5] = [
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
    IpAddr::V4(Ipv4Addr::new(192, 0, 0, 192)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V6(Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254)),
];

/// An entry of the allow list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Allowed {
    /// Public Internet addresses.
    Public,
    /// Addresses of private networks, such as 10.0.0.0/8 and fc00::/7.
    Private,
    /// This machine.
    Loopback,
    /// A network; with the full length, one address.
    Network(IpAddr, u8),
    /// All addresses of a host.
    Host(String),
    /// All addresses of hosts below a domain.
    Below(String),
}

/// The allow list with its exceptions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Egress {
    allowed: Vec<Allowed>,
    /// Hosts and addresses that only an exact entry allows: the API server.
    apart: Vec<String>,
}

/// The class of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Public,
    Private,
    Loopback,
    /// Link-local, metadata, multicast, unspecified and the like: no keyword allows these.
    Special,
}

impl FromStr for Allowed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let host = text.to_ascii_lowercase();
        let is_name = |name: &str| {
            let fine = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
            !name.is_empty() && name.chars().all(fine) && !name.starts_with('.')
        };
        let network = text.split_once('/').map(|(address, length)| (address.parse::<IpAddr>(), length.parse::<u8>()));
        match (host.as_str(), host.strip_prefix("*."), network) {
            ("public", ..) => Ok(Self::Public),
            ("private", ..) => Ok(Self::Private),
            ("loopback", ..) => Ok(Self::Loopback),
            (_, _, Some((Ok(address), Ok(length)))) if length <= bits(address) => Ok(Self::Network(address, length)),
            (_, Some(domain), None) if is_name(domain) => Ok(Self::Below(domain.to_owned())),
            (name, None, None) => match name.parse::<IpAddr>() {
                Ok(address) => Ok(Self::Network(address, bits(address))),
                Err(_) if is_name(name) => Ok(Self::Host(name.to_owned())),
                Err(_) => Err(EXPECTED.to_owned()),
            },
            _ => Err(EXPECTED.to_owned()),
        }
    }
}

const EXPECTED: &str =
    "expected public, private, loopback, an address, a network such as 10.0.0.0/8, a host, or *. and a domain";

fn bits(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

impl Egress {
    /// In a cluster, where documents belong to several tenants: by default public addresses only.
    pub fn of_cluster(allowed: Vec<Allowed>, api_server: Vec<String>) -> Self {
        let allowed = if allowed.is_empty() { vec![Allowed::Public] } else { allowed };
        Self { allowed, apart: api_server }
    }

    /// Where all documents belong to the operator: by default everything except link-local and metadata addresses.
    pub fn of_machine(allowed: Vec<Allowed>) -> Self {
        let all = || vec![Allowed::Public, Allowed::Private, Allowed::Loopback];
        Self { allowed: if allowed.is_empty() { all() } else { allowed }, apart: Vec::new() }
    }

    /// Whether a request to this host may connect to this address.
    fn permits(&self, host: &str, address: IpAddr) -> bool {
        let address = plain(address);
        let named = |entry: &Allowed| match entry {
            Allowed::Host(name) => name.eq_ignore_ascii_case(host),
            Allowed::Network(network, length) => *length == bits(*network) && plain(*network) == address,
            _ => false,
        };
        let is_apart = |apart: &String| {
            apart.eq_ignore_ascii_case(host) || apart.parse::<IpAddr>().is_ok_and(|apart| plain(apart) == address)
        };
        if self.apart.iter().any(is_apart) {
            return self.allowed.iter().any(named);
        }
        let kind = kind(address);
        self.allowed.iter().any(|entry| match entry {
            Allowed::Public => kind == Kind::Public,
            Allowed::Private => kind == Kind::Private,
            Allowed::Loopback => kind == Kind::Loopback,
            Allowed::Network(network, length) => is_within(address, *network, *length),
            Allowed::Host(_) => named(entry),
            Allowed::Below(domain) => {
                let below = host.len().checked_sub(domain.len()).and_then(|at| host.split_at_checked(at));
                below.is_some_and(|(head, tail)| head.ends_with('.') && tail.eq_ignore_ascii_case(domain))
            }
        })
    }

    /// Rejects a URL whose host is an address that is not allowed; names are checked when they are resolved.
    ///
    /// # Errors
    ///
    /// Why it is not allowed.
    pub(super) fn check(&self, url: &Url) -> Result<(), String> {
        let host = url.host_str().unwrap_or_default();
        let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        match address {
            Ok(address) if !self.permits(host, address) => Err(refusal(host, &[address])),
            _ => Ok(()),
        }
    }
}

fn refusal(host: &str, addresses: &[IpAddr]) -> String {
    let addresses = addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    match host.trim_matches(['[', ']']) == addresses {
        true => format!("webhooks may not go to {addresses} (see --webhook-allow)"),
        false => format!("webhooks may not go to {host}, which is {addresses} (see --webhook-allow)"),
    }
}

/// The address without encodings that hide IPv4 in IPv6: mapped, compatible, NAT64 and 6to4.
fn plain(address: IpAddr) -> IpAddr {
    let IpAddr::V6(six) = address else { return address };
    let [a, b, c, d, e, f, g, h] = six.segments();
    let four = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        IpAddr::V4(Ipv4Addr::new(a, b, c, d))
    };
    match (a, b, c, d, e, f) {
        (0, 0, 0, 0, 0, 0xffff) | (0x64, 0xff9b, 0, 0, 0, 0) => four(g, h),
        (0, 0, 0, 0, 0, 0) if !six.is_loopback() && !six.is_unspecified() => four(g, h),
        (0x2002, ..) => four(b, c),
        _ => address,
    }
}

fn kind(address: IpAddr) -> Kind {
    if METADATA.contains(&address) {
        return Kind::Special;
    }
    match address {
        IpAddr::V4(four) => match four.octets() {
            [127, ..] => Kind::Loopback,
            [10, ..] | [172, 16..=31, ..] | [192, 168, ..] | [100, 64..=127, ..] | [198, 18..=19, ..] => Kind::Private,
            [0, ..] | [169, 254, ..] | [192, 0, 0, _] | [224..=255, ..] => Kind::Special,
            _ => Kind::Public,
        },
        IpAddr::V6(six) if six.is_loopback() => Kind::Loopback,
        IpAddr::V6(six) => match six.segments()[0] {
            0xfc00..=0xfdff | 0xfec0..=0xfeff => Kind::Private,
            0x2000..=0x3fff => Kind::Public,
            _ => Kind::Special,
        },
    }
}

fn is_within(address: IpAddr, network: IpAddr, length: u8) -> bool {
    let number = |address: IpAddr| match address {
        IpAddr::V4(four) => u128::from(u32::from(four)) << 96,
        IpAddr::V6(six) => u128::from(six),
    };
    let differing = number(address) ^ number(network);
    address.is_ipv4() == network.is_ipv4() && (length == 0 || differing >> (128 - u32::from(length)) == 0)
}

/// The lookup of a name.
type Lookup = Arc<dyn Fn(String) -> BoxFuture<'static, io::Result<Vec<IpAddr>>> + Send + Sync>;

/// Resolves names and drops addresses that are not allowed.
#[derive(Clone)]
pub(super) struct Resolver {
    egress: Egress,
    /// The hosts of proxies from the environment. These proxies enforce their own rules.
    proxies: Vec<String>,
    lookup: Lookup,
}

impl Resolver {
    pub(super) fn new(egress: Egress) -> Self {
        let lookup = |name: String| -> BoxFuture<'static, io::Result<Vec<IpAddr>>> {
            Box::pin(async move {
                let found = tokio::net::lookup_host((name, 0)).await?;
                Ok(found.map(|address| address.ip()).collect())
            })
        };
        Self { egress, proxies: proxies(), lookup: Arc::new(lookup) }
    }

    async fn addresses(&self, name: &str) -> Result<Vec<IpAddr>, Box<dyn std::error::Error + Send + Sync>> {
        let found = (self.lookup)(name.to_owned()).await?;
        if self.proxies.iter().any(|proxy| proxy.eq_ignore_ascii_case(name)) {
            return Ok(found);
        }
        let good: Vec<_> = found.iter().copied().filter(|address| self.egress.permits(name, *address)).collect();
        if good.is_empty() && !found.is_empty() { Err(refusal(name, &found).into()) } else { Ok(good) }
    }
}

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let resolver = self.clone();
        Box::pin(async move {
            let addresses = resolver.addresses(name.as_str()).await?;
            let addresses: Addrs = Box::new(addresses.into_iter().map(|address| SocketAddr::new(address, 0)));
            Ok(addresses)
        })
    }
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resolver").field("egress", &self.egress).finish_non_exhaustive()
    }
}

/// The hosts of proxies from the environment, which an HTTP client uses on its own.
fn proxies() -> Vec<String> {
    let names = ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"].map(str::to_owned);
    let names = names.iter().flat_map(|name| [name.clone(), name.to_ascii_lowercase()]);
    let texts = names.filter_map(|name| std::env::var(name).ok()).filter(|text| !text.is_empty());
    let url = |text: String| Url::parse(&text).or_else(|_| Url::parse(&format!("http://{text}"))).ok();
    texts.filter_map(|text| url(text)?.host_str().map(str::to_owned)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(entries: &[&str]) -> Vec<Allowed> {
        entries.iter().map(|entry| entry.parse().unwrap()).collect()
    }

    fn cluster(entries: &[&str]) -> Egress {
        Egress::of_cluster(list(entries), vec!["10.96.0.1".to_owned()])
    }

    fn goes(egress: &Egress, host: &str, address: &str) -> bool {
        egress.permits(host, address.parse().unwrap())
    }

    #[test]
    fn what_is_in_the_cluster_and_around_it_is_closed_by_default() {
        let (cluster, machine) = (cluster(&[]), Egress::of_machine(Vec::new()));
        for public in ["93.184.215.14", "2606:2800:21f:cb07::1"] {
            assert!(goes(&cluster, "a", public) && goes(&machine, "a", public), "{public}");
        }
        for near in
            ["127.0.0.1", "::1", "::ffff:127.0.0.1", "10.1.2.3", "192.168.0.1", "172.31.0.1", "100.64.0.1", "fd12::1"]
        {
            assert!(!goes(&cluster, "a", near) && goes(&machine, "a", near), "{near}");
        }
        for special in [
            "169.254.169.254",
            "169.254.170.2",
            "::ffff:169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "2002:a9fe:a9fe::1",
            "fe80::1",
            "fd00:ec2::254",
            "fd20:ce::254",
            "100.100.100.200",
            "168.63.129.16",
            "192.0.0.192",
            "0.0.0.0",
            "::",
            "224.0.0.1",
            "255.255.255.255",
            "ff02::1",
        ] {
            assert!(!goes(&cluster, "a", special) && !goes(&machine, "a", special), "{special}");
        }
    }

    #[test]
    fn what_the_operator_lists_is_all_there_is() {
        let some = cluster(&["10.0.0.0/8", "hooks.example.com", "*.corp.example", "fd12::/16"]);
        assert!(goes(&some, "a", "10.255.0.1") && goes(&some, "a", "fd12:1::1"));
        assert!(!goes(&some, "a", "11.0.0.1") && !goes(&some, "a", "93.184.215.14"));
        assert!(goes(&some, "Hooks.Example.com", "127.0.0.1") && goes(&some, "ci.corp.example", "192.168.0.1"));
        assert!(!goes(&some, "evilcorp.example", "192.168.0.1") && !goes(&some, "corp.example", "192.168.0.1"));
        assert!(goes(&cluster(&["169.254.10.1"]), "a", "169.254.10.1"), "also what no word allows");
    }

    #[test]
    fn the_api_server_is_reached_only_where_it_is_named() {
        assert!(!goes(&cluster(&["10.0.0.0/8", "private", "*.svc"]), "kubernetes.default.svc", "10.96.0.1"));
        assert!(goes(&cluster(&["10.96.0.1"]), "kubernetes.default.svc", "10.96.0.1"));
        assert!(goes(&cluster(&["kubernetes.default.svc"]), "kubernetes.default.svc", "10.96.0.1"));
    }

    #[test]
    fn entries_that_make_no_sense_are_refused() {
        for wrong in ["", "10.0.0.0/33", "a b", "http://a", "10.0.0/8", "*.", ".a", "a/8", "fd00::/129"] {
            assert!(wrong.parse::<Allowed>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn addresses_in_urls_are_seen_however_they_are_written() {
        let check = |url: &str| cluster(&[]).check(&Url::parse(url).unwrap());
        for hidden in [
            "http://169.254.169.254/",
            "http://2852039166/",
            "http://0xa9.0xfe.0xa9.0xfe/",
            "http://0251.0376.169.254/",
        ] {
            let why = "webhooks may not go to 169.254.169.254 (see --webhook-allow)";
            assert_eq!(check(hidden), Err(why.to_owned()), "{hidden}");
        }
        assert!(check("http://[::1]:80/").is_err() && check("http://[::ffff:a9fe:a9fe]/").is_err());
        assert!(check("https://hooks.example.com/").is_ok() && check("https://93.184.215.14/").is_ok());
    }

    /// A resolver of a zone in which a name has these addresses.
    fn zone(addresses: &[&str]) -> Resolver {
        let addresses: Vec<IpAddr> = addresses.iter().map(|address| address.parse().unwrap()).collect();
        let lookup: Lookup = Arc::new(move |_| Box::pin(std::future::ready(Ok(addresses.clone()))));
        Resolver { egress: cluster(&[]), proxies: vec!["proxy.corp".to_owned()], lookup }
    }

    #[tokio::test]
    async fn a_name_leads_only_to_addresses_that_are_allowed() {
        let to_metadata = zone(&["169.254.169.254"]).addresses("metadata.evil.example").await.unwrap_err();
        let why = "webhooks may not go to metadata.evil.example, which is 169.254.169.254 (see --webhook-allow)";
        assert_eq!(to_metadata.to_string(), why);
        let mixed = zone(&["127.0.0.1", "93.184.215.14"]).addresses("a.example").await.unwrap();
        assert_eq!(mixed, ["93.184.215.14".parse::<IpAddr>().unwrap()], "what is not allowed is left out");
        assert_eq!(zone(&["10.0.0.9"]).addresses("proxy.corp").await.unwrap().len(), 1, "the operator's own proxy");
    }
}
