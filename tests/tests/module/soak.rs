//! The real module in the wasm host for a long time: after a warm-up its memory does not grow, and nothing is lost of what
//! it counts. `make soak` makes ten million requests of it; REQUESTS=N as many as you like.

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::env;
use std::time::{Duration, Instant};
use tideshift_tests::wasm_host::{Answer, Ending, Exchange, MAIN, Random, WasmHost};

const WORKERS: usize = 2;
/// Streams that stay open while others come and go; each for as many requests.
const OPEN: usize = 300;
/// Users who send their cookies back.
const USERS: u64 = 1_000;

/// One of a few policies, each unlike the one before.
fn policy(revision: u64) -> Value {
    let weight = 10 + revision % 7 * 10;
    let rules: Vec<Value> = (0..revision % 5 * 4)
        .map(|n| json!({"matches": [{"headers": [{"name": "x-tester", "value": n.to_string()}]}, {"path": {"value": format!("/{n}")}}],
                        "versions": [{"name": "v2"}]}))
        .collect();
    let mut shop = json!({
        "name": "shop",
        "hostnames": ["*.example.com"],
        "versions": [{"name": "v1", "weight": 100 - weight}, {"name": "v2", "weight": weight}, {"name": "v3", "weight": 1}],
        "rules": rules,
        "session": {"type": "Cookie", "name": "s", "generation": revision / 3},
        "mirror": {"version": "v3", "percent": 5},
    });
    if revision.is_multiple_of(4) {
        shop["session"] = json!({"type": "Header", "name": "x-user"});
    }
    let mut services = vec![shop, json!({"name": "every", "versions": [{"name": "only"}]})];
    if revision.is_multiple_of(3) {
        services.push(
            json!({"name": "now-and-then", "hostnames": ["now.test"], "versions": [{"name": "a"}, {"name": "b"}]}),
        );
    }
    json!({
        "controller": {"cluster": "tideshift_controller", "authority": "c"},
        "explain": {"header": "x-why", "token": "why"},
        "stripClientHeaders": revision.is_multiple_of(2),
        "revision": revision,
        "services": services,
    })
}

/// Clients and controller of the proxy that is tried.
struct Soak {
    host: WasmHost,
    random: Random,
    cookies: Vec<Option<Vec<u8>>>,
    open: VecDeque<Exchange>,
    revision: u64,
    /// Requests that a version was found for.
    marked: u64,
}

impl Soak {
    fn new() -> anyhow::Result<Self> {
        let mut soak = Self {
            host: WasmHost::new(WORKERS)?,
            random: Random::new(7),
            cookies: vec![None; USERS as usize],
            open: VecDeque::new(),
            revision: 0,
            marked: 0,
        };
        soak.configure()?;
        Ok(soak)
    }

    fn configure(&mut self) -> anyhow::Result<()> {
        self.revision += 1;
        ensure!(self.host.configure(&policy(self.revision).to_string())?, "refused: {:?}", self.host.log().pop());
        ensure!(!self.host.configure(r#"{"revision": 1, "services": [{"name": 1}]}"#)?, "nonsense was taken");
        Ok(())
    }

    /// One request comes, and one ends: it or one that has been open for long.
    fn request(&mut self) -> anyhow::Result<()> {
        let user = self.random.below(USERS) as usize;
        let number = self.random.below(1_000);
        let path = format!("/{number}?a=b");
        let tester = (number % 20).to_string();
        let authority = match number % 10 {
            0 => "elsewhere.test",
            1 => "now.test",
            _ => "shop.example.com",
        };
        let mut headers: Vec<(&str, &[u8])> = vec![
            (":authority", authority.as_bytes()),
            (":path", path.as_bytes()),
            (":method", b"GET"),
            ("user-agent", b"Mozilla/5.0 (X11; Linux x86_64) and so on and so forth"),
        ];
        match number % 7 {
            0 => headers.push(("x-tester", tester.as_bytes())),
            1 => headers.push(("x-tideshift-version", b"v3")),
            2 => headers.push(("x-user", path.as_bytes())),
            3 => headers.push(("x-why", b"why")),
            _ => {}
        }
        let cookie = self.cookies.get(user).cloned().flatten();
        if let Some(cookie) = &cookie {
            headers.push(("cookie", cookie));
        }
        let exchange = self.host.request(1 + user % WORKERS, &headers)?;
        self.marked += u64::from(exchange.version().is_some());
        self.open.push_back(exchange);
        // Mostly this one ends, now and then the oldest.
        let is_long = number.is_multiple_of(16);
        let ends = if is_long && self.open.len() > OPEN { self.open.pop_front() } else { None };
        let ends = if is_long { ends } else { self.open.pop_back() };
        let Some(ends) = ends else { return Ok(()) };
        let ending = match self.random.below(20) {
            0 => Ending::status(500),
            1 => Ending::status(503).flags(64),
            2 => Ending::status(200).flags(64).body(100),
            3 => Ending::client_gone(),
            4 => Ending::status(404).body(10),
            5 => Ending::status(200).header("content-type", "application/grpc").trailer("grpc-status", "14"),
            _ => Ending::status(200).body(1_000),
        };
        let answer = self.host.finish(ends, &ending)?.unwrap_or_default();
        let cookie = answer.iter().find(|(name, _)| name == b"set-cookie").map(|(_, value)| value);
        if let Some(cookie) = cookie.filter(|_| !user.is_multiple_of(3)) {
            self.cookies[user] = cookie.split(|b| *b == b';').next().map(<[u8]>::to_vec);
        }
        Ok(())
    }

    /// A second passes; the controller answers, now and then with a policy.
    fn second(&mut self) -> anyhow::Result<()> {
        self.host.advance(Duration::from_secs(1))?;
        for call in self.host.take_callouts() {
            let answer = match (call.header(":path").as_deref(), self.random.below(4)) {
                (Some("/v1/reports"), _) => Answer::new(204, ""),
                (_, 0) => Answer::broken(),
                (_, 1) => Answer::new(200, "nonsense"),
                _ => {
                    self.revision += 1;
                    Answer::new(200, policy(self.revision).to_string()).header("x-tideshift-epoch", "e")
                }
            };
            self.host.answer(&call, &answer)?;
            self.host.wake()?;
        }
        Ok(())
    }

    fn pages(&self) -> Vec<u64> {
        (MAIN..=WORKERS).map(|thread| self.host.pages(thread)).collect()
    }

    fn run(&mut self, requests: u64) -> anyhow::Result<()> {
        for n in 1..=requests {
            self.request().with_context(|| format!("request {n}"))?;
            if n % 500 == 0 {
                self.second()?;
            }
            if n % 20_000 == 0 {
                self.configure()?;
            }
            if n % 100_000 == 0 {
                self.host.malformed(1, &Ending::status(400))?;
                self.host.clear_log();
            }
        }
        Ok(())
    }

    /// All policies come by, and everything else that can, mostly with few requests.
    fn warm_up(&mut self) -> anyhow::Result<()> {
        for n in 0..1_000 {
            (0..10).try_for_each(|_| self.request())?;
            self.second()?;
            if n % 100 == 0 {
                self.configure()?;
            }
        }
        // As many at once as there will be.
        self.run(20_000)
    }

    /// All streams end.
    fn finish(&mut self) -> anyhow::Result<()> {
        while let Some(exchange) = self.open.pop_front() {
            self.host.end(exchange, &Ending::status(200))?;
        }
        Ok(())
    }
}

/// What was counted for versions and services that are gone is forgotten in the end.
#[test]
fn memory_stays_however_many_versions_come_and_go() -> anyhow::Result<()> {
    const KEPT: u64 = 30;
    let policy = |n: u64| {
        let versions = [json!({"name": format!("v{n}")}), json!({"name": format!("v{}", n + 1)})];
        let of_this = json!({"name": format!("s{n}"), "hostnames": ["gone.example.com"], "versions": versions});
        json!({
            "controller": {"cluster": "tideshift_controller"},
            "revision": n,
            "services": [of_this, {"name": "shop", "versions": versions, "stable": format!("v{n}"), "step": n}],
        })
    };
    let mut host = WasmHost::new(WORKERS)?;
    let mut pass = |policies: std::ops::Range<u64>| {
        for n in policies {
            // By configurations and by the controller in turn.
            if n % 2 == 0 {
                ensure!(host.configure(&policy(n).to_string())?, "refused: {:?}", host.log().pop());
            }
            for request in 0..20 {
                let authority = if request % 4 == 0 { "gone.example.com" } else { "shop.example.com" };
                let exchange = host.request(1 + request % WORKERS, &[(":authority", authority), (":path", "/")])?;
                host.end(exchange, &Ending::status(if request % 5 == 0 { 500 } else { 200 }))?;
            }
            host.advance(Duration::from_secs(300 / KEPT))?;
            for call in host.take_callouts() {
                let answer = match call.header(":path").as_deref() {
                    Some("/v1/reports") => Answer::new(204, ""),
                    _ => Answer::new(200, policy(n).to_string()).header("x-tideshift-epoch", format!("e{n}")),
                };
                host.answer(&call, &answer)?;
                host.wake()?;
            }
        }
        host.clear_log();
        Ok((MAIN..=WORKERS).map(|thread| host.pages(thread)).collect::<Vec<u64>>())
    };
    let before = pass(2..3 * KEPT)?;
    let after = pass(3 * KEPT..12 * KEPT)?;
    println!("pages of 64 KiB by VM: {before:?} when warm, {after:?} at the end");
    ensure!(after == before, "memory grew from {before:?} to {after:?} pages");
    Ok(())
}

#[test]
fn memory_stays_and_no_count_is_lost() -> anyhow::Result<()> {
    let requests = env::var("REQUESTS").map_or(Ok(40_000), |number| number.replace('_', "").parse::<u64>())?;
    let mut soak = Soak::new()?;
    soak.warm_up()?;
    let before = soak.pages();
    let start = Instant::now();
    soak.run(requests)?;
    let took = start.elapsed();
    let after = soak.pages();
    soak.finish()?;
    println!(
        "{requests} requests in {:.0} s, {:.1} µs each; pages of 64 KiB by VM: {before:?} when warm, {after:?} at the end",
        took.as_secs_f64(),
        took.as_secs_f64() * 1e6 / requests as f64
    );
    ensure!(after == before, "memory grew from {before:?} to {after:?} pages");
    soak.host.advance(Duration::from_secs(1))?;
    let metrics = soak.host.metrics();
    let sum = |what: &str| metrics.iter().filter(|(name, _)| name.ends_with(what)).map(|(_, value)| value).sum::<u64>();
    ensure!(sum("tideshift_requests_total") == soak.marked, "{metrics:?}\nof {}", soak.marked);
    ensure!(sum("tideshift_requests_in_flight") == 0, "{metrics:?}");
    Ok(())
}
