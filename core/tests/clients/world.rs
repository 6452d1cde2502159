//! Simulated rollouts: clients send requests at random times, proxies deal them, count them and tell the verdict of them,
//! each proxy with a guard of its own. Vetoes are counted and change nothing, since they never fail a rollout.

use crate::dice::{Dice, mix, unit};
use crate::thresholds::Thresholds;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::time::Duration;
use tideshift_core::choice::sequence::EvenSequence;
use tideshift_core::counts::{Counts, DURATION_BOUNDS, duration_bucket};
use tideshift_core::guard::{Guard, GuardPolicy, Observed};
use tideshift_core::outcome::Outcome as Ended;
use tideshift_core::verdict::{Analysis, Ground, Outcome, Request, RollingBaseline, Sample, Settings, Tick};

pub const TARGET: usize = 0;
pub const STABLE: usize = 1;
const NAMES: [&str; 2] = ["v2", "v1"];

/// Seconds between looks; reports are that much apart at least.
const SLOT: f64 = 0.1;
const SLOTS_A_SECOND: u64 = 10;
/// Of all requests, each proxy tells so many a second at most, by chance.
const SAMPLED: f64 = 50.0;
/// The most bad requests that a report tells one by one.
const MOST_TOLD: usize = 128;
/// For so many slots a client of the sample is remembered.
const REMEMBERED: u64 = 1_200;
/// The client that breaks things.
const VILLAIN: u32 = u32::MAX;

/// How users stay with their version.
#[derive(Clone, Copy)]
pub enum Users {
    /// Not at all: each request is dealt.
    None,
    /// So many users by a hash of a header.
    Header(u32),
    /// By cookie. So many of the requests are of clients that keep none, and fail so often at either version.
    Cookie { without: f64, fails: f64 },
}

/// What is wrong with the target.
#[derive(Clone, Copy)]
pub enum Bad {
    Nothing,
    Errors(f64),
    /// So many of its requests are never answered, and given up after 1 s.
    Hangs(f64),
    NotFound(f64),
    /// So many times slower.
    Slow(f64),
}

/// What else happens, whichever version serves.
#[derive(Clone, Copy)]
pub enum Fault {
    None,
    /// One user has so many of the requests, and each fails.
    BrokenClient(f64),
    /// One user in so many fails with each request.
    BrokenUsers(u32),
    /// Testers that a rule sends to the target: so many requests a second, of which so many fail.
    Testers(f64, f64),
    /// The only client repeats so many calls, one of which fails.
    Serial(u64),
    /// At each proxy once a minute, a client fails ten times within 1 s at one version.
    Clumps,
    Hostile(Way),
}

/// How a client makes 50 requests a second fail.
#[derive(Clone, Copy)]
pub enum Way {
    /// It keeps a cookie of this version.
    Cookie(usize, Ended),
    /// It makes up users until the target has them.
    ManyUsers,
    /// It knows which version is next, and fails at this one only.
    Predicts(usize),
    /// The testers' header.
    Rule,
}

#[derive(Clone, Copy)]
pub struct Scene<'a> {
    /// Requests a second, of all proxies.
    pub rate: f64,
    /// Addresses that they come from.
    pub callers: u32,
    /// So many of them from one of these.
    pub heavy: f64,
    /// How many fail at either version.
    pub base: f64,
    pub users: Users,
    pub bad: Bad,
    /// From when on, in seconds.
    pub from: f64,
    /// How many seconds those last that do not fail, on average; else they end at once.
    pub lasts: Option<f64>,
    pub fault: Fault,
    pub proxies: usize,
    /// The target's shares, and how many seconds each lasts.
    pub steps: &'a [(f64, f64)],
    pub settings: &'a Settings,
    /// Whether to go on after a fail.
    pub goes_on: bool,
}

/// What came of a rollout.
#[derive(Clone, Default)]
pub struct End {
    /// When the target failed, and why.
    pub failed: Option<f64>,
    pub ground: Ground,
    /// When the first guard vetoed the target.
    pub vetoed: Option<f64>,
    /// Vetoes of target and stable version.
    pub vetoes: [u64; 2],
    /// Seconds for which both versions were called bad.
    pub held: f64,
    /// Steps that ended with a pass.
    pub passes: usize,
    pub thresholds: Thresholds,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Call {
    proxy: usize,
    version: usize,
    client: u32,
    user: Option<u32>,
    kind: Kind,
    /// Whether chance gave it its version at the present step.
    is_compared: bool,
    ended: Ended,
    millis: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Dealt,
    Session,
    Rule,
}

/// One worker of one proxy.
struct Vm {
    sequence: EvenSequence,
    guard: Guard,
    waited: u64,
    first_error: Option<u64>,
    told: Vec<(u32, usize, Ended)>,
    told_in_report: usize,
    heard: Vec<(&'static str, Request)>,
    ended: [Counts; 2],
    dealt: [Counts; 2],
    started: [u64; 2],
    news: [Sample; 2],
    requests: Vec<Request>,
}

struct World<'a> {
    scene: Scene<'a>,
    dice: Dice,
    seed: u64,
    slot: u64,
    step: usize,
    share: f64,
    vms: Vec<Vm>,
    under_way: BinaryHeap<Reverse<(u64, Call)>>,
    /// Users with cookies that were given since the rollout began, each with its version and step.
    given: Vec<(usize, usize)>,
    calls: u64,
    seen: HashMap<u32, u64>,
    samples: u64,
    second: (u64, u64),
}

impl<'a> Scene<'a> {
    /// 100 requests a second from 100 addresses, of which 1 of 1,000 fail.
    pub fn new(settings: &'a Settings, steps: &'a [(f64, f64)]) -> Self {
        Self {
            rate: 100.0,
            callers: 100,
            heavy: 0.0,
            base: 0.001,
            users: Users::None,
            bad: Bad::Nothing,
            from: 0.0,
            lasts: None,
            fault: Fault::None,
            proxies: 1,
            steps,
            settings,
            goes_on: true,
        }
    }

    pub fn play(self, seed: u64) -> End {
        let mut world = World::new(self, seed);
        let mut known = RollingBaseline::default();
        let errors = (9_000.0 * self.base) as u64;
        let durations = match self.settings.latency {
            Some(_) => world.usual_durations(9_000),
            None => Vec::new(),
        };
        known.add(&Sample { requests: 9_000, errors, durations, ..Sample::default() });
        let mut analysis = Analysis::new(known);
        let mut end = End::default();
        world.warm_up();
        world.know_clients();
        for (step, (share, seconds)) in self.steps.iter().enumerate() {
            analysis.step_started();
            (world.step, world.share) = (step, *share);
            let (slots, mut ticked) = ((seconds / SLOT) as u64, world.slot);
            let mut outcome = Outcome::Undecided;
            for _ in 0..slots {
                world.play_slot();
                let tick = world.report(&mut end);
                if world.slot.is_multiple_of(SLOTS_A_SECOND) {
                    let (requests, errors) = std::mem::take(&mut world.second);
                    end.thresholds.second(requests, errors);
                }
                let Some(tick) = tick else { continue };
                let elapsed = Duration::from_secs_f64((world.slot - ticked) as f64 * SLOT);
                ticked = world.slot;
                analysis.tick(self.settings, &Tick { elapsed, ..tick });
                let judgement = analysis.judgement(self.settings);
                outcome = judgement.outcome;
                end.held += if judgement.both_bad { elapsed.as_secs_f64() } else { 0.0 };
                if outcome == Outcome::Fail && end.failed.is_none() {
                    (end.failed, end.ground) = (Some(world.slot as f64 * SLOT), judgement.ground);
                }
                if end.failed.is_some() && !self.goes_on {
                    return end;
                }
            }
            end.passes += usize::from(outcome == Outcome::Pass);
        }
        end
    }
}

impl<'a> World<'a> {
    fn new(scene: Scene<'a>, seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let vm = |_| Vm {
            sequence: EvenSequence::new(dice.roll()),
            guard: Guard::new(GuardPolicy::default()),
            waited: dice.roll() % SLOTS_A_SECOND,
            first_error: None,
            told: Vec::new(),
            told_in_report: 0,
            heard: Vec::new(),
            ended: Default::default(),
            dealt: Default::default(),
            started: [0; 2],
            news: Default::default(),
            requests: Vec::new(),
        };
        let vms = (0..scene.proxies).map(vm).collect();
        Self {
            scene,
            dice,
            seed,
            slot: 0,
            step: 0,
            share: 0.0,
            vms,
            under_way: BinaryHeap::new(),
            given: Vec::new(),
            calls: 0,
            seen: HashMap::new(),
            samples: 0,
            second: (0, 0),
        }
    }

    /// Streams that began before the rollout.
    fn warm_up(&mut self) {
        let Some(lasts) = self.scene.lasts else { return };
        let slots = (lasts * 4.0_f64.min(1_800.0 / lasts) / SLOT) as u64;
        for _ in 0..slots {
            self.play_slot();
            for vm in &mut self.vms {
                vm.requests.clear();
                vm.news = Default::default();
            }
        }
        let slot = std::mem::take(&mut self.slot);
        self.second = (0, 0);
        self.seen.clear();
        self.under_way = std::mem::take(&mut self.under_way)
            .into_iter()
            .map(|Reverse((at, call))| Reverse((at.saturating_sub(slot), call)))
            .collect();
        for vm in &mut self.vms {
            vm.first_error = None;
        }
    }

    /// What the sample showed of the clients before the rollout.
    fn know_clients(&mut self) {
        self.samples = (self.scene.rate.min(SAMPLED) * REMEMBERED as f64 * SLOT) as u64;
        for _ in 0..self.samples {
            let client = self.caller();
            self.seen.insert(client, 0);
        }
    }

    fn caller(&mut self) -> u32 {
        if self.dice.happens(self.scene.heavy) { 0 } else { self.dice.below(self.scene.callers) }
    }

    fn now(&self) -> f64 {
        self.slot as f64 * SLOT
    }

    fn takes(&mut self, version: usize) -> u64 {
        let slower = match self.scene.bad {
            Bad::Slow(times) if version == TARGET && self.now() >= self.scene.from => times,
            _ => 1.0,
        };
        (30.0 * slower * (0.7 * self.dice.normal()).exp()).ceil() as u64
    }

    fn usual_durations(&mut self, requests: u64) -> Vec<u64> {
        let mut durations = vec![0; DURATION_BOUNDS.len() + 1];
        (0..requests).for_each(|_| durations[duration_bucket(self.takes(STABLE))] += 1);
        durations
    }

    fn deal(&mut self, proxy: usize) -> usize {
        version_of(self.vms[proxy].sequence.next_below(1_000_000), self.share)
    }

    fn play_slot(&mut self) {
        self.slot += 1;
        let each = self.scene.rate / self.scene.proxies as f64 * SLOT;
        for proxy in 0..self.scene.proxies {
            for _ in 0..self.dice.events(each) {
                self.honest(proxy);
            }
            self.fault(proxy);
        }
        while let Some(Reverse((_, call))) = self.under_way.peek().filter(|next| next.0.0 <= self.slot).copied() {
            self.under_way.pop();
            self.end(call);
        }
    }

    fn honest(&mut self, proxy: usize) {
        let (callers, mut fails) = (self.scene.callers, self.scene.base);
        let caller = self.caller();
        let (client, user, kind, version, is_compared) = match self.scene.users {
            Users::None => (caller, None, Kind::Dealt, self.deal(proxy), true),
            Users::Header(users) => {
                let is_broken = matches!(self.scene.fault, Fault::BrokenClient(part) if self.dice.happens(part));
                let user = if is_broken { VILLAIN } else { self.dice.below(users) };
                let client = if is_broken { VILLAIN } else { user % callers };
                let is_broken = is_broken
                    || matches!(self.scene.fault, Fault::BrokenUsers(one_in) if (user / callers).is_multiple_of(one_in));
                fails = if is_broken { 1.0 } else { fails };
                let at = unit(mix(mix(self.seed) ^ u64::from(user)));
                (client, Some(user), Kind::Session, version_at(at, self.share), true)
            }
            Users::Cookie { without, fails: failing } => {
                let client = caller;
                if self.dice.happens(without) {
                    fails = failing;
                    (client, None, Kind::Dealt, self.deal(proxy), true)
                } else if self.dice.happens(0.01) {
                    let version = self.deal(proxy);
                    self.given.push((version, self.step));
                    (client, None, Kind::Dealt, version, true)
                } else {
                    // A thousand had theirs before the rollout began.
                    let user = self.dice.below(1_000 + self.given.len() as u32);
                    let (version, is_compared) = match (user as usize).checked_sub(1_000) {
                        None => (STABLE, false),
                        Some(at) => (self.given[at].0, self.given[at].1 == self.step),
                    };
                    (user % callers, Some(user), Kind::Session, version, is_compared)
                }
            }
        };
        let mut failed = self.dice.happens(fails);
        if let Fault::Serial(calls) = self.scene.fault {
            self.calls += 1;
            failed = self.calls.is_multiple_of(calls);
        }
        let mut ended = if failed { Ended::Error } else { Ended::Ok };
        let mut millis = if self.scene.settings.latency.is_some() { self.takes(version) } else { 0 };
        if let Some(lasts) = self.scene.lasts {
            millis = (1e3 * self.dice.wait(if failed { 0.1 } else { lasts })) as u64;
        }
        if version == TARGET && self.now() >= self.scene.from {
            match self.scene.bad {
                Bad::Errors(part) if self.dice.happens(part) => ended = Ended::Error,
                Bad::NotFound(part) if self.dice.happens(part) => ended = Ended::ClientError,
                Bad::Hangs(part) if self.dice.happens(part) => (ended, millis) = (Ended::Cancelled, 1_000),
                _ => (),
            }
        }
        self.begin(Call { proxy, version, client, user, kind, is_compared, ended, millis });
    }

    fn fault(&mut self, proxy: usize) {
        let call = Call {
            proxy,
            version: TARGET,
            client: VILLAIN,
            user: None,
            kind: Kind::Dealt,
            is_compared: true,
            ended: Ended::Error,
            millis: 0,
        };
        match self.scene.fault {
            Fault::Testers(rate, fails) => {
                for _ in 0..self.dice.events(rate * SLOT) {
                    let ended = if self.dice.happens(fails) { Ended::Error } else { Ended::Ok };
                    self.begin(Call { kind: Kind::Rule, ended, ..call });
                }
            }
            Fault::Clumps if self.dice.happens(SLOT / 60.0) => {
                let (version, client) = (self.deal(proxy), self.dice.below(self.scene.callers));
                for _ in 0..10 {
                    self.vms[proxy].started[version] += 1;
                    self.vms[proxy].news[version].started += 1;
                    let at = self.slot + self.dice.roll() % SLOTS_A_SECOND;
                    self.under_way.push(Reverse((at, Call { version, client, ..call })));
                }
            }
            Fault::Hostile(way) if proxy == 0 => {
                for _ in 0..self.dice.events(50.0 * SLOT) {
                    let call = match way {
                        Way::Rule => Call { kind: Kind::Rule, ..call },
                        Way::Cookie(version, ended) => {
                            Call { version, ended, user: Some(VILLAIN), kind: Kind::Session, ..call }
                        }
                        Way::ManyUsers => Call { user: Some(self.dice.roll() as u32), kind: Kind::Session, ..call },
                        Way::Predicts(at) => {
                            let version = self.deal(proxy);
                            Call { version, ended: if version == at { Ended::Error } else { Ended::Ok }, ..call }
                        }
                    };
                    self.begin(call);
                }
            }
            _ => (),
        }
    }

    fn begin(&mut self, call: Call) {
        if call.kind == Kind::Dealt {
            let vm = &mut self.vms[call.proxy];
            vm.started[call.version] += 1;
            vm.news[call.version].started += 1;
        }
        match call.millis / 100 {
            0 => self.end(call),
            slots => self.under_way.push(Reverse((self.slot + slots, call))),
        }
    }

    fn end(&mut self, call: Call) {
        let failed = call.ended == Ended::Error;
        if call.version == TARGET {
            self.second.0 += 1;
            self.second.1 += u64::from(failed);
        }
        if call.kind == Kind::Rule {
            return;
        }
        let vm = &mut self.vms[call.proxy];
        count(&mut vm.ended[call.version], call.ended);
        let duration = duration_bucket(call.millis);
        if call.kind == Kind::Dealt {
            count(&mut vm.dealt[call.version], call.ended);
            let (news, times) = (&mut vm.news[call.version], self.scene.settings.latency.is_some());
            let is_given_up = call.ended == Ended::Cancelled;
            news.requests += u64::from(!is_given_up);
            news.cancelled += u64::from(is_given_up);
            news.errors += u64::from(failed);
            news.client_errors += u64::from(call.ended == Ended::ClientError);
            if times {
                let durations = if is_given_up { &mut news.waited } else { &mut news.durations };
                durations.resize(DURATION_BOUNDS.len() + 1, 0);
                durations[duration] += 1;
            }
        }
        if failed {
            vm.first_error = vm.first_error.or(Some(self.slot));
        }
        let is_sampled = self.dice.happens(SAMPLED * self.scene.proxies as f64 / self.scene.rate);
        if is_sampled {
            self.samples += 1;
            self.seen.insert(call.client, self.slot);
        }
        let is_bad = call.ended != Ended::Ok;
        if !call.is_compared || !(is_bad || is_sampled) {
            return;
        }
        if is_bad {
            let key = (call.client, call.version, call.ended);
            let is_repeated = vm.told.contains(&key);
            if !is_sampled && (is_repeated || vm.told_in_report >= MOST_TOLD) {
                return;
            }
            vm.told.push(key);
            vm.told_in_report += 1;
        }
        let request = Request {
            client: call.client,
            user: call.user,
            is_session: call.kind == Kind::Session,
            is_sampled,
            is_target: call.version == TARGET,
            outcome: call.ended,
            duration,
        };
        vm.requests.push(request);
        if is_bad {
            vm.heard.push((NAMES[call.version], request));
        }
    }

    fn has_few_clients(&self) -> bool {
        self.samples >= 20 && self.seen.len() <= 3
    }

    /// Guards look, and reports come in. What is new in them, if any came.
    fn report(&mut self, end: &mut End) -> Option<Tick> {
        if self.slot.is_multiple_of(100) {
            let since = self.slot.saturating_sub(REMEMBERED);
            self.seen.retain(|_, at| *at >= since);
        }
        let few_clients = self.has_few_clients();
        let mut tick = Tick { share: self.share, few_clients, ..Tick::default() };
        let mut came = false;
        let nanos = 1_800_000_000_000_000_000 + self.slot * 100_000_000;
        for vm in &mut self.vms {
            vm.told.clear();
            vm.guard.hear(nanos, few_clients, &vm.heard);
            vm.heard.clear();
            let target = (self.share * 1e6) as u32;
            let observed = [TARGET, STABLE].map(|version| Observed {
                name: NAMES[version],
                weight: if version == TARGET { target } else { 1_000_000 - target },
                serving: true,
                stable: version == STABLE,
                ended: vm.ended[version],
                dealt: Some(vm.dealt[version]),
                started: vm.started[version],
            });
            let before = vm.guard.vetoes().len();
            if vm.guard.observe(nanos, &observed) && vm.guard.vetoes().len() > before {
                for veto in &vm.guard.vetoes()[before..] {
                    let version = if veto.version == NAMES[TARGET] { TARGET } else { STABLE };
                    end.vetoes[version] += 1;
                    if version == TARGET {
                        end.vetoed = end.vetoed.or(Some(self.slot as f64 * SLOT));
                    }
                }
            }
            vm.waited += 1;
            let is_urgent = vm.first_error.is_some_and(|at| self.slot >= at + 2);
            if vm.waited < SLOTS_A_SECOND && !is_urgent {
                continue;
            }
            (vm.waited, vm.first_error, vm.told_in_report, came) = (0, None, 0, true);
            let [target, stable] = std::mem::take(&mut vm.news);
            add(&mut tick.target, &target);
            add(&mut tick.stable, &stable);
            tick.requests.append(&mut vm.requests);
        }
        came.then_some(tick)
    }
}

fn version_of(point: u32, share: f64) -> usize {
    version_at((f64::from(point) + 0.5) / 1e6, share)
}

fn version_at(point: f64, share: f64) -> usize {
    if point < share { TARGET } else { STABLE }
}

fn count(counts: &mut Counts, ended: Ended) {
    let count = match ended {
        Ended::Ok => &mut counts.ok,
        Ended::Error => &mut counts.error,
        Ended::ClientError => &mut counts.client_error,
        Ended::Cancelled => &mut counts.cancelled,
    };
    *count += 1;
}

fn add(to: &mut Sample, more: &Sample) {
    to.requests += more.requests;
    to.errors += more.errors;
    to.client_errors += more.client_errors;
    to.cancelled += more.cancelled;
    to.started += more.started;
    for (to, more) in [(&mut to.durations, &more.durations), (&mut to.waited, &more.waited)] {
        to.resize(to.len().max(more.len()), 0);
        to.iter_mut().zip(more).for_each(|(to, more)| *to += more);
    }
}
