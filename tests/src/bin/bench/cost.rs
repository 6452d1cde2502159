//! Measures the CPU time of Envoy's worker for each variant: batches to all listeners in random order, in many rounds,
//! and the median over the rounds of the difference between two variants in the same round.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, ensure};
use fastrand::Rng;
use tideshift_tests::envoy::Envoy;
use tideshift_tests::envoy_fixture::{DEADLINE, VMS_CREATED};
use tideshift_tests::wait::eventually;

use crate::client::{Client, request};
use crate::machine::{Cores, Thread, pin};
use crate::progress;
use crate::proxy::Proxy;
use crate::settings::Settings;
use crate::statistics::Summary;
use crate::variants::{Counted, Expected, Requests, Variant, WEIGHTS};

/// The result of one variant.
#[derive(Debug)]
pub(crate) struct Cost {
    pub(crate) variant: Variant,
    /// CPU time per request, in microseconds, of each round.
    pub(crate) rounds: Vec<f64>,
    /// The duration of all rounds.
    pub(crate) took: Duration,
    /// How long the worker waited for its core because other processes used it.
    pub(crate) waited: Duration,
}

impl Cost {
    /// All rounds.
    pub(crate) fn summary(&self) -> Option<Summary> {
        Summary::of(self.rounds.iter().copied())
    }

    /// Each round's value combined with that of another variant in the same round.
    pub(crate) fn with(&self, other: &Self, of: impl Fn(f64, f64) -> f64) -> Option<Summary> {
        Summary::of(self.rounds.iter().zip(&other.rounds).map(|(&own, &other)| of(own, other)))
    }
}

/// Measures all of `variants`.
pub(crate) async fn measure(
    variants: Vec<Variant>,
    backends: &[SocketAddr],
    cores: &Cores,
    settings: &Settings,
) -> anyhow::Result<Vec<Cost>> {
    let proxy = Proxy::new(&variants, backends)?;
    let envoy = proxy.options(1).start().await?;
    pin(envoy.id(), &cores.proxy)?;
    let worker = Thread::worker(envoy.id())?;
    let vms = envoy.stat(VMS_CREATED).await?;
    let addresses: Vec<SocketAddr> = proxy.addresses().collect();
    let settings = settings.clone();
    // Dropping this future drops Envoy, and the thread ends when it loses its connections.
    let rounds = tokio::task::spawn_blocking(move || rounds(variants, &addresses, &worker, &settings));
    let measured = rounds.await?.map_err(|error| anyhow!("{error:#}\n{}", envoy.tail()))?;
    for (cost, client) in &measured {
        check_shares(&cost.variant, client).with_context(|| cost.variant.name.clone())?;
    }
    check_counts(&measured, &envoy).await?;
    ensure!(envoy.stat(VMS_CREATED).await? == vms, "a VM has trapped:\n{}", envoy.tail());
    Ok(measured.into_iter().map(|(cost, _)| cost).collect())
}

/// Why Envoy rejects a variant, from its log; `None` if it accepts it.
pub(crate) async fn refusal(variant: &Variant, backends: &[SocketAddr]) -> anyhow::Result<Option<String>> {
    let proxy = Proxy::new(std::slice::from_ref(variant), backends)?;
    let Err(error) = proxy.options(1).start().await else { return Ok(None) };
    let error = error.to_string();
    let why = error.lines().find_map(|line| line.split_once("plugin configuration: "));
    Ok(Some(why.map(|(_, why)| why.to_owned()).context(error)?))
}

fn rounds(
    variants: Vec<Variant>,
    addresses: &[SocketAddr],
    worker: &Thread,
    settings: &Settings,
) -> anyhow::Result<Vec<(Cost, Client)>> {
    let mut measured = Vec::new();
    for (variant, &address) in variants.into_iter().zip(addresses) {
        let client = client(&variant, address).with_context(|| variant.name.clone())?;
        measured.push((Cost { variant, rounds: Vec::new(), took: Duration::ZERO, waited: Duration::ZERO }, client));
    }
    let mut order: Vec<usize> = (0..measured.len()).collect();
    let mut random = Rng::new();
    let begun = Instant::now();
    let all = settings.warm_up + settings.rounds;
    for round in 1..=all {
        random.shuffle(&mut order);
        for &index in &order {
            let (cost, client) = &mut measured[index];
            let (before, begun) = (worker.used()?, Instant::now());
            client.batch(settings.batch).with_context(|| cost.variant.name.clone())?;
            let (took, after) = (begun.elapsed(), worker.used()?);
            if round > settings.warm_up {
                cost.rounds.push((after.cpu - before.cpu) as f64 / 1e3 / settings.batch as f64);
                cost.took += took;
                cost.waited += Duration::from_nanos(after.waited - before.waited);
            }
        }
        if round % 10 == 0 || round == all {
            let left = begun.elapsed().as_secs_f64() / round as f64 * (all - round) as f64;
            progress(&format!(
                "{} listeners, {} requests each, {round} of {all} rounds, {left:.0} s left",
                order.len(),
                settings.batch
            ));
        }
    }
    Ok(measured)
}

fn client(variant: &Variant, address: SocketAddr) -> anyhow::Result<Client> {
    match &variant.requests {
        Requests::With(headers) => {
            let requests = headers.iter().map(|headers| request(None, headers)).collect();
            Client::connect(address, requests, variant.expected == Expected::Sticky)
        }
        Requests::Cookies(users) => Client::with_cookies(address, *users),
    }
}

/// A variant that chooses wrong versions is not worth measuring.
fn check_shares(variant: &Variant, client: &Client) -> anyhow::Result<()> {
    let answers = |version: &str| client.answers.get(version).copied().unwrap_or_default();
    let all = client.answered();
    match variant.expected {
        Expected::All(version) => ensure!(answers(version) == all, "not all to {version}: {:?}", client.answers),
        Expected::Shares => {
            let sum: u32 = WEIGHTS.iter().map(|(_, weight)| weight).sum();
            for (version, weight) in WEIGHTS {
                let (share, due) = (answers(version) as f64 / all as f64, f64::from(weight) / f64::from(sum));
                // Envoy's own choice is random: 5 standard deviations.
                let tolerance = 5.0 * (due * (1.0 - due) / all as f64).sqrt();
                ensure!((share - due).abs() <= tolerance, "{version} got {share:.3} of all instead of {due:.3}");
            }
        }
        // Checked with each response.
        Expected::Sticky => {}
    }
    Ok(())
}

/// Nor is a variant that does not count.
async fn check_counts(measured: &[(Cost, Client)], envoy: &Envoy) -> anyhow::Result<()> {
    // A chain counts for the same service as the variant that it is compared with.
    let mut due: BTreeMap<&Counted, u64> = BTreeMap::new();
    for (cost, client) in measured {
        if let Some(counted) = &cost.variant.counted {
            *due.entry(counted).or_default() += client.answered() * cost.variant.filters.len() as u64;
        }
    }
    eventually("all requests to be counted", DEADLINE, async || {
        let metrics = envoy.prometheus().await?;
        for (Counted { stat, service }, due) in &due {
            // In a chain the last filter decides where a request goes: for the others it may be misrouted.
            let misrouted = match *stat {
                "tideshift_requests_total" => {
                    metrics.sum("tideshift_misrouted_requests_total", &[("service", service)])
                }
                _ => None,
            };
            let count = metrics.sum(stat, &[("service", service)]).unwrap_or_default() + misrouted.unwrap_or_default();
            ensure!(count == *due as f64, "{stat} of {service} says {count} of {due}");
        }
        Ok(())
    })
    .await
}
