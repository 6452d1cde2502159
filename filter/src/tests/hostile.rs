//! A proxy that returns nonsense: the filter does not panic, and works as ever once the proxy is right again.

use super::proxy::{CONTROLLER, Proxy, Response};
use crate::header_pairs::{HeaderPairs, encode};
use crate::host::HeaderList;
use fastrand::Rng;
use serde_json::{Value, json};

/// A policy in which every part of the filter has something to do.
fn rich(revision: u64) -> Value {
    json!({
        "controller": {"cluster": CONTROLLER, "token": "secret"},
        "explain": {"token": "why"},
        "stripClientHeaders": true,
        "revision": revision,
        "services": [
            {
                "name": "checkout",
                "hostnames": ["a.test"],
                "versions": [{"name": "v1", "weight": 90}, {"name": "v2", "weight": 10}],
                "stable": "v1",
                "step": revision,
                "rules": [
                    {"matches": [{"headers": [{"name": "x-beta", "value": "1"}]}], "versions": [{"name": "v2"}]},
                    {"matches": [{"cookies": [{"name": "c", "type": "RegularExpression", "value": "a+"}]}],
                        "versions": [{"name": "v2", "weight": 3}, {"name": "v1"}]},
                ],
                "session": {"type": "Cookie", "name": "session"},
                "mirror": {"version": "v1", "percent": 50},
            },
            {"name": "every", "versions": [{"name": "v1"}]},
        ],
    })
}

/// A policy for which headers are read one by one.
fn plain(revision: u64) -> Value {
    let matches = json!([{"headers": [{"name": "x-beta", "value": "1"}]}]);
    let service = json!({"name": "checkout", "versions": [{"name": "v1"}, {"name": "v2"}], "session": {"type": "Header", "name": "x-user"},
        "rules": [{"matches": matches, "versions": [{"name": "v2"}]}]});
    json!({"stripClientHeaders": false, "revision": revision, "services": [service]})
}

const REQUESTS: [&[(&[u8], &[u8])]; 4] = [
    &[(b":authority", b"a.test"), (b":path", b"/"), (b":method", b"GET"), (b"x-beta", b"1")],
    &[(b":authority", b"\xff\xfe"), (b"cookie", b"c=aaa; session=v1~0~0~zz~\xff"), (b"x-tideshift-\xff", b"")],
    &[(b"", b""), (b"\0", b"\0\0"), (b":authority", b"[::1]:x")],
    &[(b"content-type", b"application/grpc"), (b"x-user", b"\xc3\x28"), (b"x-tideshift-explain", b"why")],
];

fn storm(seed: u64, percent: u32) {
    let mut proxy = Proxy::with(1, &rich(1));
    let mut random = Rng::with_seed(seed);
    let mut open = Vec::new();
    for step in 0..600_u64 {
        proxy.storm(percent, seed ^ step);
        match random.u32(..100) {
            0..35 => {
                let at = random.usize(..REQUESTS.len());
                open.push(proxy.request(1, REQUESTS[at]));
            }
            35..65 if !open.is_empty() => {
                let exchange = open.swap_remove(random.usize(..open.len()));
                let status = ["200", "404", "500", "101", "", "\u{fffd}", "99999999999"][random.usize(..7)];
                let trailers = if random.bool() { vec![("grpc-status", "14")] } else { Vec::new() };
                let response = Response { trailers, flags: random.u64(..), ..Response::status(status) };
                proxy.finish(&exchange, &response);
            }
            65..80 => proxy.pass(100 * random.u64(1..20)),
            80..88 => {
                for call in proxy.take_calls() {
                    match random.u32(..4) {
                        0 => proxy.respond(&call, &[], b""),
                        1 => {
                            proxy.respond(&call, &[(":status", "200"), ("x-tideshift-epoch", "e")], b"{\"revision\": 1")
                        }
                        _ => proxy.send(&call, "e", &rich(random.u64(..100))),
                    }
                }
            }
            88..94 => {
                let size = random.usize(..40);
                let bytes: Vec<u8> = std::iter::repeat_with(|| random.u8(..)).take(size).collect();
                proxy.spoil_shared(random.usize(..100), &bytes);
            }
            94..96 => proxy.set_now(random.u64(..)),
            _ => {
                let next = if random.bool() { rich(step) } else { plain(step) };
                proxy.configure(&next);
            }
        }
    }
    proxy.storm(0, 0);
    // All is well again with a new configuration.
    assert!(proxy.configure(&plain(1)), "seed {seed}");
    proxy.pass(500);
    let marked = proxy.request(1, &[(":authority", "a.test"), ("x-beta", "1")]);
    assert_eq!(marked.version().as_deref(), Some("v2"), "seed {seed}");
}

#[test]
fn nonsense_from_the_proxy_panics_nowhere() {
    for (seed, percent) in [(1, 0), (2, 5), (3, 20), (4, 40), (5, 80)] {
        storm(seed, percent);
    }
}

#[test]
fn header_maps_are_read_as_they_are_written_and_nonsense_ends_early() {
    let headers = [(b":path".to_vec(), b"/".to_vec()), (b"x-\xff".to_vec(), Vec::new()), (Vec::new(), b"\0".to_vec())];
    let bytes = encode(&headers);
    let pairs = HeaderPairs(bytes.as_slice());
    let read: Vec<_> = pairs.iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect();
    assert_eq!(read, headers);
    let mut random = Rng::with_seed(7);
    for cut in 0..bytes.len() {
        assert!(HeaderPairs(&bytes[..cut]).iter().count() < headers.len());
        let mut broken = bytes.clone();
        broken[cut] = random.u8(..);
        assert!(HeaderPairs(broken.as_slice()).iter().count() <= 4 * broken.len());
    }
    assert_eq!(HeaderPairs(&[0xff_u8; 12][..]).iter().count(), 0);
}
