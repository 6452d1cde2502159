//! Statuses for the web page: one with fixed numbers, and a scripted sequence of some minutes in which a version fails,
//! is rolled back, and the next one does better. It does not use the rollout engine: the script defines what happens
//! when.

use std::time::Duration;

use fastrand::Rng;
use jiff::Timestamp;
use serde_json::{Value, json};

/// The top-level fields of a status.
pub fn status(services: Vec<Value>) -> Value {
    json!({ "epoch": "e1", "revision": 12, "services": services, "proxies": [] })
}

/// A version with `ready` of `listed` endpoints and its requests: ok, error, client error, cancelled.
pub fn version(name: &str, weight: f64, [ready, listed]: [u64; 2], requests: [u64; 4]) -> Value {
    let [ok, error, client_error, cancelled] = requests;
    let unready: Vec<Value> = (ready..listed)
        .map(|number| json!({ "endpoint": format!("10.0.2.{}:8080", number + 1), "reason": "HTTP status 503" }))
        .collect();
    json!({
        "name": name,
        "weight": weight,
        "serving": ready > 0,
        "endpoints": { "ready": ready, "listed": listed, "notReady": unready },
        "requests": { "ok": ok, "error": error, "clientError": client_error, "cancelled": cancelled },
        "inFlight": 0,
        "drain": { "state": "Serving", "inFlight": 0, "since": now(), "message": "it has traffic" },
    })
}

/// A service of these versions, the first one stable, at rest.
pub fn service(name: &str, versions: Vec<Value>) -> Value {
    json!({
        "name": name,
        "rollout": name,
        "phase": "Initialized",
        "reason": "Started",
        "paused": false,
        "stable": versions.first().map(|version| version["name"].clone()),
        "message": "v1 serves",
        "since": now(),
        "unrouted": 0,
        "versions": versions,
        "steps": [],
    })
}

/// `checkout` halfway from v1 to v2, with three versions, in the second of four steps, with round numbers.
pub fn half_way() -> Value {
    let versions = vec![
        version("v1", 75.0, [4, 4], [12_345, 21, 34, 5]),
        version("v2", 25.0, [3, 4], [2_100, 42, 3, 2]),
        version("v3", 0.0, [0, 1], [0; 4]),
    ];
    let mut checkout = service("checkout", versions);
    checkout["phase"] = "Progressing".into();
    checkout["reason"] = "Holding".into();
    checkout["target"] = "v2".into();
    checkout["message"] = "step 2: v2 has its 25 %, held for 12 of 60 s".into();
    checkout["steps"] = json!([
        { "weight": 5, "holdSeconds": 30, "pause": false, "matches": 1 },
        { "weight": 25, "holdSeconds": 60, "pause": false, "matches": 0 },
        { "weight": 25, "holdSeconds": 0, "pause": true, "matches": 0 },
        { "weight": 100, "holdSeconds": 0, "pause": false, "matches": 0 },
    ]);
    checkout["step"] = json!({ "number": 2, "of": 4, "weight": 25, "holdSeconds": 60, "heldSeconds": 12 });
    checkout["verdict"] = json!({
        "outcome": "undecided",
        "message": "v2 looks worse than v1: 42 of 2,145 failed, v1 21 of 12,400; by chance in fewer than 1 of 31; taken back at 1 of 1,000",
        "target": { "version": "v2", "requests": 2_145, "errors": 42 },
        "stable": { "version": "v1", "requests": 12_400, "errors": 21 },
        "evidence": 31.6,
        "bound": 1000.0,
        "passEvidence": 4.0,
        "passBound": 20.0,
    });
    checkout["versions"][1]["inFlight"] = 3.into();
    let mut status = status(vec![checkout]);
    status["proxies"] = json!([proxy("edge-1", 12), proxy("edge-2", 11)]);
    status
}

/// A proxy with four workers that has just reported and runs this revision.
pub fn proxy(id: &str, revision: u64) -> Value {
    json!({ "id": id, "revision": revision, "workers": 4, "lastSeen": now() })
}

/// The current time, RFC 3339.
pub fn now() -> String {
    format!("{:.3}", Timestamp::now())
}

/// Requests per second in the timeline.
const LOAD: f64 = 320.0;
/// The steps: percent and seconds; the last but one is a pause.
const STEPS: [(u64, u64); 5] = [(5, 30), (25, 60), (50, 60), (50, 0), (100, 0)];
/// The tested ratios for "the target is worse".
const RATIOS: [f64; 6] = [1.5, 2.0, 3.0, 5.0, 10.0, 30.0];
const BOUND: f64 = 1000.0;
const PASS_BOUND: f64 = 20.0;

/// The second at which the rollout of v2 starts, and that of v3 after it.
const FIRST: u64 = 12;
const SECOND: u64 = 128;
/// The seconds after its start at which v2 begins to fail.
const BUG: u64 = 62;

/// The timeline: `checkout` moves from v1 to v2, which begins to fail at 25 % and is rolled back; then to v3.
#[derive(Debug)]
pub struct Timeline {
    begin: Timestamp,
    second: u64,
    random: Rng,
    requests: [[u64; 4]; 3],
    phase: &'static str,
    reason: &'static str,
    message: String,
    since: u64,
    target: Option<usize>,
    rollout: u64,
    step: usize,
    held: u64,
    revision: u64,
    bets: [f64; RATIOS.len()],
    pass: f64,
    seen: [[u64; 2]; 2],
    told: Vec<Value>,
}

impl Timeline {
    /// The timeline from its start, at `begin`.
    pub fn new(begin: Timestamp) -> Self {
        Self {
            begin,
            second: 0,
            random: Rng::with_seed(7),
            requests: [[1_204_113, 3_713, 22_871, 641], [0; 4], [0; 4]],
            phase: "Succeeded",
            reason: "Completed",
            message: "v1 has all traffic".to_owned(),
            since: 0,
            target: None,
            rollout: 6,
            step: 0,
            held: 0,
            revision: 211,
            bets: [0.0; RATIOS.len()],
            pass: 0.0,
            seen: [[0; 2]; 2],
            told: Vec::new(),
        }
    }

    /// The transitions since the last call.
    pub fn told(&mut self) -> Vec<Value> {
        std::mem::take(&mut self.told)
    }

    /// The number of seconds that have passed.
    pub fn second(&self) -> u64 {
        self.second
    }

    /// Advances by one second.
    pub fn tick(&mut self) {
        self.second += 1;
        match self.second {
            FIRST => self.start(1),
            SECOND => self.start(2),
            _ => {}
        }
        let shares = self.shares();
        let mut ended = [[0; 2]; 3];
        for (version, share) in shares.iter().enumerate() {
            let all = share / 100.0 * LOAD * (0.94 + 0.12 * self.random.f64());
            let failing = version == 1 && self.phase == "Progressing" && self.second >= FIRST + BUG;
            let rate = if failing { 0.07 } else { 0.003 };
            let all = (all + self.random.f64()) as u64;
            let errors = (0..all).filter(|_| self.random.f64() < rate).count() as u64;
            let client = (0..all).filter(|_| self.random.f64() < 0.018).count() as u64;
            let cancelled = u64::from(all > 0 && self.random.f64() < 0.1);
            let ok = all.saturating_sub(errors + client + cancelled);
            for (sum, more) in self.requests[version].iter_mut().zip([ok, errors, client, cancelled]) {
                *sum += more;
            }
            ended[version] = [ok + errors + client, errors];
        }
        if let Some(target) = self.target.filter(|_| self.phase == "Progressing") {
            self.judge(ended[target], ended[0], shares[target] / 100.0);
            self.advance(target);
        }
    }

    fn start(&mut self, target: usize) {
        (self.target, self.step, self.held) = (Some(target), 0, 0);
        self.rollout += 1;
        (self.bets, self.pass, self.seen) = ([0.0; RATIOS.len()], 0.0, [[0; 2]; 2]);
        self.turn("Progressing", "Started", format!("from v1 to v{}", target + 1));
        self.revision += 1;
    }

    fn turn(&mut self, phase: &'static str, reason: &'static str, message: String) {
        (self.phase, self.reason, self.since) = (phase, reason, self.second);
        self.message.clone_from(&message);
        let (time, rollout) = (self.time(self.second), self.rollout);
        let mut transition =
            json!({ "time": time, "rollout": rollout, "phase": phase, "reason": reason, "message": message });
        if phase == "Progressing" {
            transition["step"] = (self.step + 1).into();
        }
        self.told.push(transition);
    }

    /// The evidence of `core`'s verdict, as described in design.md; approximate, which suffices here.
    fn judge(&mut self, target: [u64; 2], stable: [u64; 2], share: f64) {
        let [x, both] = [target[1] as f64, (target[1] + stable[1]) as f64];
        for (bet, ratio) in self.bets.iter_mut().zip(RATIOS) {
            *bet += (x * ratio.ln() - both * (ratio * share + 1.0 - share).ln()).min(3.0);
        }
        self.pass += x * (0.7_f64).ln() + (target[0] - target[1]) as f64 * (0.993_f64 / 0.99).ln();
        for (sum, more) in self.seen.iter_mut().zip([target, stable]) {
            sum[0] += more[0];
            sum[1] += more[1];
        }
    }

    fn evidence(&self) -> f64 {
        self.bets.iter().map(|bet| bet.exp()).sum::<f64>() / RATIOS.len() as f64
    }

    fn advance(&mut self, target: usize) {
        let name = format!("v{}", target + 1);
        if self.evidence() >= BOUND {
            self.revision += 1;
            let [requests, errors] = self.seen[0];
            let why = format!("{name} failed {errors} of {requests} requests, evidence {:.0}", self.evidence());
            return self.turn("Failed", "VerdictFail", format!("{why}: all traffic is back on v1"));
        }
        let (weight, hold) = STEPS[self.step];
        self.held += 1;
        let (held, number) = (self.held.min(hold), self.step + 1);
        self.reason = "Holding";
        self.message = format!("step {number}: {name} has its {weight} %, held for {held} of {hold} s");
        if self.held > hold && self.step < 3 {
            (self.step, self.held) = (self.step + 1, 0);
            self.revision += 1;
            let (weight, hold) = STEPS[self.step];
            match hold {
                0 => self.turn("Paused", "PauseStep", format!("step {}: until it is promoted", self.step + 1)),
                _ => self.turn("Progressing", "StepStarted", format!("step {}: {name} gets {weight} %", self.step + 1)),
            }
        }
    }

    /// The shares of the versions in percent.
    pub fn shares(&self) -> [f64; 3] {
        let mut shares = [100.0, 0.0, 0.0];
        if let Some(target) = self.target.filter(|_| self.phase != "Failed") {
            shares[target] = STEPS[self.step].0 as f64;
            shares[0] -= shares[target];
        }
        shares
    }

    fn time(&self, second: u64) -> String {
        let time = self.begin.checked_add(Duration::from_secs(second)).unwrap_or(self.begin);
        format!("{time:.3}")
    }

    /// The current status.
    pub fn status(&self) -> Value {
        let shares = self.shares();
        let versions = (0..3).map(|index| {
            let mut version = version(&format!("v{}", index + 1), shares[index], [4, 4], self.requests[index]);
            version["inFlight"] = ((shares[index] / 100.0 * 14.0) as u64).into();
            if index == 2 && self.second < SECOND + 20 {
                let unready = json!([{ "endpoint": "10.0.3.4:8080", "reason": "connection refused" }]);
                version["endpoints"] = json!({ "ready": 3, "listed": 4, "notReady": unready });
            }
            if index == 1 && self.phase == "Failed" {
                let (since, in_flight) = (self.time(self.since + 1), 0);
                version["drain"] = json!({ "state": "Drained", "inFlight": in_flight, "since": since, "message": "" });
            }
            version
        });
        let mut checkout = service("checkout", versions.collect());
        checkout["phase"] = self.phase.into();
        checkout["reason"] = self.reason.into();
        checkout["message"] = self.message.clone().into();
        checkout["since"] = self.time(self.since).into();
        let steps = STEPS.iter().enumerate();
        checkout["steps"] = steps
            .map(|(index, (weight, hold))| {
                json!({ "weight": weight, "holdSeconds": hold, "pause": index == 3, "matches": 0 })
            })
            .collect();
        if let Some(target) = self.target {
            let name = format!("v{}", target + 1);
            let [[n, x], [m, y]] = self.seen;
            let (evidence, pass) = (self.evidence(), self.pass.exp());
            let outcome = match () {
                () if evidence >= BOUND => "fail",
                () if pass >= PASS_BOUND => "pass",
                () => "undecided",
            };
            checkout["target"] = name.clone().into();
            checkout["verdict"] = json!({
                "outcome": outcome,
                "message": format!("{name}: {x} of {n} failed, v1: {y} of {m}: {outcome}"),
                "target": { "version": name, "requests": n, "errors": x },
                "stable": { "version": "v1", "requests": m, "errors": y },
                "evidence": evidence,
                "bound": BOUND,
                "passEvidence": pass,
                "passBound": PASS_BOUND,
            });
            let (weight, hold) = STEPS[self.step];
            if self.phase == "Progressing" {
                let (number, of) = (self.step + 1, STEPS.len());
                let held = self.held.min(hold);
                checkout["step"] = json!({
                    "number": number, "of": of, "weight": weight, "holdSeconds": hold, "heldSeconds": held,
                });
            }
        }
        let mut status = status(vec![checkout, self.other("catalog"), self.other("payments"), self.other("search")]);
        status["revision"] = self.revision.into();
        let seen = self.time(self.second);
        let proxies = ["edge-fra-1", "edge-fra-2", "edge-iad-1"]
            .map(|id| json!({ "id": id, "revision": self.revision, "workers": 4, "lastSeen": seen }));
        status["proxies"] = proxies.to_vec().into();
        if self.phase == "Failed" {
            status["proxies"][1]["vetoes"] = json!([{
                "service": "checkout", "version": "v2", "until": self.time(self.since + 30),
                "requests": 243, "errors": 18, "othersRequests": 731, "othersErrors": 2,
            }]);
        }
        status
    }

    /// The other rollouts, which do not change.
    fn other(&self, name: &str) -> Value {
        let two = |stable, target| {
            let requests = |share: f64| [(4000.0 * share) as u64, 3, 12, 1];
            vec![version("v1", stable, [3, 3], requests(stable)), version("v2", target, [3, 3], requests(target))]
        };
        let (versions, phase, message) = match name {
            "catalog" => (two(0.0, 100.0), "Succeeded", "v2 has all traffic"),
            "payments" => (two(75.0, 25.0), "Paused", "step 3: waits until it is promoted"),
            _ => (two(100.0, 0.0), "Initialized", "v1 has all traffic"),
        };
        let mut service = service(name, versions);
        service["phase"] = phase.into();
        service["message"] = message.into();
        service["since"] = self.time(0).into();
        service
    }
}
