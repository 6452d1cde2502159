//! The client of the controller's API, through the proxy's callouts, on the one VM that holds the lease: a long poll for
//! newer policies, and a report every second.

use crate::host::{HeaderMap, Host};
use crate::shared_data::{Number, PolicyVersion, SharedData};
use crate::urgent::UrgentCounts;
use crate::workers::Live;
use fastrand::Rng;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use std::time::Duration;
use tideshift_core::decode::Errors;
use tideshift_core::protocol::delivery;
use tideshift_core::protocol::delivery::{Before, Delivery, Refusal};
use tideshift_core::protocol::policy::{ControllerRef, Policy};
use tideshift_core::protocol::report::{Refused, Report, ServiceReport};

/// The controller answers a poll after at most 25 s; this is for one that does not.
const POLL_TIMEOUT: Duration = Duration::from_secs(30);
/// From one poll to the next if the first brought nothing, also where it is answered at once instead of being held.
const POLL_PERIOD: Duration = Duration::from_secs(1);
/// A report that takes longer is given up; the next one says the same and more.
const REPORT_TIMEOUT: Duration = Duration::from_secs(5);
/// From one report to the next, and if there is something that should not wait.
const REPORT_PERIOD: Duration = Duration::from_secs(1);
const SHORTEST_REPORT_PERIOD: Duration = Duration::from_millis(200);
/// The wait after a first failure; doubles with each further one up to the longest.
const FIRST_BACKOFF: Duration = Duration::from_millis(250);
const LONGEST_BACKOFF: Duration = Duration::from_secs(5);

/// The client of one controller.
pub struct ControllerClient {
    controller: ControllerRef,
    proxy: String,
    start: String,
    authorization: Option<String>,
    poll: Option<u32>,
    poll_at: u64,
    failures: u32,
    report: Option<u32>,
    report_at: u64,
    /// What was reported last of what should not wait, and when something new of it may be reported.
    reported: (UrgentCounts, Option<PolicyVersion>),
    news_at: u64,
    /// The newest version that was seen, taken or not, so that a refused policy is not asked for again at once.
    seen: Option<PolicyVersion>,
    refused: Option<Refused>,
    /// Changes came that were since another policy: the next one has to be whole.
    wants_whole: bool,
}

/// What a response brought.
pub enum CallResult {
    /// A newer policy, valid and already stored for all VMs.
    Policy,
    /// Nothing to act on.
    Nothing,
}

impl ControllerClient {
    /// A client that has not polled yet.
    pub fn new(controller: &ControllerRef, shared: &SharedData<impl Host>) -> Self {
        // Where Envoy 1.40 has it, and where older ones do.
        let node = shared.host.property("xds\0node\0id").or_else(|| shared.host.property("node\0id"));
        let node = node.unwrap_or_default();
        let start = shared.start();
        Self {
            controller: controller.clone(),
            // A proxy without a node id is told from others by its start.
            proxy: if node.is_empty() { start.clone() } else { String::from_utf8_lossy(&node).into_owned() },
            start,
            authorization: controller.token.as_ref().map(|token| format!("Bearer {token}")),
            poll: None,
            poll_at: 0,
            failures: 0,
            report: None,
            report_at: 0,
            reported: (UrgentCounts::default(), None),
            news_at: 0,
            seen: None,
            refused: None,
            wants_whole: false,
        }
    }

    /// Polls if no poll is under way and none has failed just now. `applied` is what this VM runs.
    pub fn poll(&mut self, host: &impl Host, now: u64, applied: &PolicyVersion, random: &mut Rng) {
        if self.poll.is_some() || !is_due(self.poll_at, now) {
            return;
        }
        let seen = self.seen.as_ref().unwrap_or(applied);
        let encode = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
        let (proxy, epoch) = (encode(&self.proxy), encode(&seen.epoch));
        // What has changed is enough where what came last runs.
        let takes_changes = seen == applied && !applied.epoch.is_empty() && !self.wants_whole;
        let delta = if takes_changes { "&delta=true" } else { "" };
        let path = format!("/v1/policy?proxy={proxy}&epoch={epoch}&after={}{delta}", seen.revision);
        self.poll_at = now.saturating_add(POLL_PERIOD.as_nanos() as u64);
        self.poll = self.call(host, "GET", &path, b"", POLL_TIMEOUT);
        if self.poll.is_none() {
            let why = format!("Envoy has no cluster {} to call", self.controller.cluster);
            self.poll_failed(now, random, &why);
        }
    }

    /// Lets the next report not wait for its time.
    pub fn report_soon(&mut self) {
        self.report_at = 0;
    }

    /// Reports if it is time and the last report has been answered. New urgent counts, or a policy that all workers have
    /// just taken, do not wait for the whole period.
    pub fn report(
        &mut self,
        shared: &SharedData<impl Host>,
        now: u64,
        live: Live,
        urgent: UrgentCounts,
        number: Option<Number>,
        services: impl FnOnce() -> Vec<ServiceReport>,
    ) {
        let state = (urgent, live.applied);
        let is_time = is_due(self.report_at, now) || (state != self.reported && is_due(self.news_at, now));
        if self.report.is_some() || !is_time {
            return;
        }
        let Some(number) = number else { return };
        let services = services();
        if !shared.take_number(&number) {
            return;
        }
        self.report_at = now.saturating_add(REPORT_PERIOD.as_nanos() as u64);
        self.news_at = now.saturating_add(SHORTEST_REPORT_PERIOD.as_nanos() as u64);
        let applied = state.1.clone().unwrap_or_default();
        self.reported = state;
        let refused = || delivery::report(applied.revision, &shared.refused(&applied));
        let refused = self.refused.clone().or_else(refused);
        let report = Report {
            proxy: self.proxy.clone(),
            start: self.start.clone(),
            sequence: number.sequence,
            epoch: applied.epoch,
            revision: applied.revision,
            workers: u32::try_from(live.published.len()).unwrap_or(u32::MAX),
            refused,
            format: Report::FORMAT,
            services,
        };
        let Ok(body) = serde_json::to_vec(&report) else { return };
        self.report = self.call(&shared.host, "POST", "/v1/reports", &body, REPORT_TIMEOUT);
    }

    /// Takes the response to a callout; `headers` and `body` are its sizes. `runs` is the policy in force on this VM.
    pub fn response(
        &mut self,
        shared: &SharedData<impl Host>,
        token: u32,
        (headers, body): (usize, usize),
        now: u64,
        runs: (&Policy, &PolicyVersion),
        random: &mut Rng,
    ) -> CallResult {
        // A response without headers is one that broke off; asking for its headers would be a mistake.
        let status = (headers > 0).then(|| shared.host.header(HeaderMap::CallResponse, ":status")).flatten();
        if self.report == Some(token) {
            self.report = None;
            return CallResult::Nothing;
        }
        if self.poll != Some(token) {
            return CallResult::Nothing;
        }
        self.poll = None;
        let taken = match status.as_deref() {
            Some(b"200") => self.take(body, shared, runs),
            Some(b"204") => Ok(CallResult::Nothing),
            Some(status) => Err(format!("status {}", String::from_utf8_lossy(status))),
            None => Err("no answer".to_owned()),
        };
        match taken {
            Ok(result) => {
                self.failures = 0;
                if let CallResult::Policy = result {
                    self.poll_at = now;
                }
                result
            }
            Err(why) => {
                self.poll_failed(now, random, &why);
                CallResult::Nothing
            }
        }
    }

    /// Takes what the controller sent, as far as it is right.
    fn take(
        &mut self,
        size: usize,
        shared: &SharedData<impl Host>,
        (policy, applied): (&Policy, &PolicyVersion),
    ) -> Result<CallResult, String> {
        let epoch: Vec<u8> =
            shared.host.header(HeaderMap::CallResponse, "x-tideshift-epoch").unwrap_or_default().into();
        let epoch = String::from_utf8(epoch).map_err(|_| "an epoch that is not UTF-8".to_owned())?;
        let json = shared.host.http_call_response_body(size);
        let refused = shared.refused(applied);
        let revision = (epoch == applied.epoch).then_some(applied.revision);
        match Delivery::read(&json, Before { policy, revision, refused: &refused }) {
            Ok(delivery) => self.store(shared, delivery, epoch, &json, applied),
            Err(Refusal::OtherBase(base)) => {
                self.wants_whole = true;
                Err(format!("changes since revision {base}, and revision {} runs", applied.revision))
            }
            Err(Refusal::Wrong { revision, errors }) => self.refuse(revision, &errors, epoch, applied),
        }
    }

    /// Stores a policy for all VMs.
    fn store(
        &mut self,
        shared: &SharedData<impl Host>,
        Delivery { policy, refused, base, ignored }: Delivery,
        epoch: String,
        json: &[u8],
        applied: &PolicyVersion,
    ) -> Result<CallResult, String> {
        let version = PolicyVersion { epoch, revision: policy.revision };
        if !version.replaces(self.seen.as_ref().unwrap_or(applied)) {
            return Err(format!("revision {}, which is not newer than {}", version.revision, applied.revision));
        }
        log::info!("policy revision {} from the controller", version.revision);
        for service in &refused {
            let (name, errors) = (&service.name, service.errors.join("; "));
            let revision = version.revision;
            log::error!("refused service {name} of policy revision {revision}, it stays as it was: {errors}");
        }
        for field in &ignored {
            log::warn!("ignored in policy revision {}, the controller seems to be newer: {field}", version.revision);
        }
        // As it came only if all VMs can read it as a policy.
        match (base, refused.is_empty() && ignored.is_empty()) {
            (None, true) => shared.store(&version, json, None, &[]),
            _ => {
                let whole = serde_json::to_vec(&policy).map_err(|error| error.to_string())?;
                shared.store(&version, &whole, base.and(Some(json)), &refused);
            }
        }
        self.seen = Some(version);
        self.refused = None;
        self.wants_whole = false;
        Ok(CallResult::Policy)
    }

    /// Notes a policy that cannot be taken, for the next report.
    fn refuse(
        &mut self,
        revision: Option<u64>,
        errors: &Errors,
        epoch: String,
        applied: &PolicyVersion,
    ) -> Result<CallResult, String> {
        let errors: Vec<String> = errors.0.iter().map(ToString::to_string).collect();
        let kept = format!("revision {} stays in force", applied.revision);
        log::error!("refused a policy from the controller, {kept}: {}", errors.join("; "));
        self.refused = Some(Refused { revision, errors, services: Vec::new() });
        // With its revision known it is not asked for again; else only after a while.
        let revision = revision.ok_or("a policy without a revision")?;
        self.seen = Some(PolicyVersion { epoch, revision });
        Ok(CallResult::Nothing)
    }

    fn poll_failed(&mut self, now: u64, random: &mut Rng, why: &str) {
        let doubled = FIRST_BACKOFF.saturating_mul(1 << self.failures.min(8));
        let longest = doubled.min(LONGEST_BACKOFF).as_nanos() as u64;
        // Between half and all of it, so that many proxies do not come back at once.
        let wait = random.u64(longest / 2..=longest);
        self.poll_at = now.saturating_add(wait);
        self.failures = self.failures.saturating_add(1);
        if self.failures == 1 {
            log::warn!("no policy from the controller ({why}); the last one stays in force, will try again");
        }
    }

    fn call(&self, host: &impl Host, method: &str, path: &str, body: &[u8], timeout: Duration) -> Option<u32> {
        let mut headers =
            vec![(":method", method), (":path", path), (":authority", self.controller.authority.as_str())];
        if let Some(authorization) = &self.authorization {
            headers.push(("authorization", authorization));
        }
        if !body.is_empty() {
            headers.push(("content-type", "application/json"));
        }
        host.http_call(&self.controller.cluster, &headers, body, timeout)
    }
}

/// Whether it is time. Nothing is ever put off for longer than the longest backoff; what seems to be lies beyond a
/// clock that has jumped back.
fn is_due(at: u64, now: u64) -> bool {
    now >= at || at - now > LONGEST_BACKOFF.as_nanos() as u64
}
