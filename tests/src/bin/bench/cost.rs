//! What each variant costs in CPU time of Envoy's worker: batches to all listeners in random order, round after round,
//! and the median over the rounds of what a variant costs against native in the same round.

use std::{net::SocketAddr, time::Instant};

use anyhow::{Context as _, ensure};
use fastrand::Rng;

use crate::{
    client::{Client, request},
    machine::{Cores, Thread, pin},
    proxy::Proxy,
    settings::Settings,
    statistics::Summary,
    variants::{Expected, Requests, Variant, WEIGHTS},
};

/// What came out for one variant.
#[derive(Debug)]
pub(crate) struct Cost {
    pub(crate) name: String,
    /// CPU time for each request, in microseconds, of each round.
    pub(crate) rounds: Vec<f64>,
}

impl Cost {
    /// In each round, against another one.
    pub(crate) fn against(&self, other: &Self) -> Option<Summary> {
        Summary::of(self.rounds.iter().zip(&other.rounds).map(|(own, other)| own / other))
    }
}

/// Measures all of `variants`.
pub(crate) async fn measure(
    variants: &[Variant],
    backends: &[SocketAddr],
    cores: Cores,
    settings: &Settings,
) -> anyhow::Result<Vec<Cost>> {
    let proxy = Proxy::new(variants, backends)?;
    let envoy = proxy.start().await?;
    pin(envoy.id(), &[cores.proxy])?;
    let worker = Thread::worker(envoy.id())?;
    let addresses: Vec<SocketAddr> = proxy.addresses().collect();
    let (variants, settings) = (variants.to_vec(), settings.clone());
    // When this future is dropped, Envoy is, and the thread ends by losing its connections.
    let measured = tokio::task::spawn_blocking(move || rounds(&variants, &addresses, &worker, &settings)).await?;
    measured.with_context(|| envoy.tail())
}

fn rounds(
    variants: &[Variant],
    addresses: &[SocketAddr],
    worker: &Thread,
    settings: &Settings,
) -> anyhow::Result<Vec<Cost>> {
    let mut clients = Vec::new();
    for (variant, &address) in variants.iter().zip(addresses) {
        clients.push(client(variant, address).with_context(|| variant.name.clone())?);
    }
    let mut costs: Vec<Cost> =
        variants.iter().map(|variant| Cost { name: variant.name.clone(), rounds: Vec::new() }).collect();
    let mut order: Vec<usize> = (0..variants.len()).collect();
    let mut random = Rng::new();
    let begun = Instant::now();
    for round in 0..settings.warm_up + settings.rounds {
        random.shuffle(&mut order);
        for &index in &order {
            let before = worker.cpu()?;
            clients[index].batch(settings.batch).with_context(|| variants[index].name.clone())?;
            let used = worker.cpu()? - before;
            if round >= settings.warm_up {
                costs[index].rounds.push(used as f64 / 1e3 / settings.batch as f64);
            }
        }
        if round % 10 == 9 {
            let done = round + 1;
            let all = settings.warm_up + settings.rounds;
            let left = begun.elapsed().as_secs_f64() / done as f64 * (all - done) as f64;
            eprint!("\r{done} of {all} rounds, {left:.0} s left   ");
        }
    }
    eprintln!();
    for (variant, client) in variants.iter().zip(&clients) {
        check(variant, client).with_context(|| variant.name.clone())?;
    }
    Ok(costs)
}

fn client(variant: &Variant, address: SocketAddr) -> anyhow::Result<Client> {
    let requests = match &variant.requests {
        Requests::Plain => vec![request(None, &[])],
        Requests::With(headers) => headers.iter().map(|headers| request(None, headers)).collect(),
    };
    Client::connect(address, requests, variant.expected == Expected::Sticky)
}

/// A variant that does not do its job is not worth measuring.
fn check(variant: &Variant, client: &Client) -> anyhow::Result<()> {
    let answers = |version: &str| client.answers.get(version).copied().unwrap_or_default();
    let all: u64 = client.answers.values().sum();
    match variant.expected {
        Expected::All(version) => ensure!(answers(version) == all, "not all to {version}: {:?}", client.answers),
        Expected::Shares => {
            let sum: u32 = WEIGHTS.iter().map(|(_, weight)| weight).sum();
            for (version, weight) in WEIGHTS {
                let (share, due) = (answers(version) as f64 / all as f64, f64::from(weight) / f64::from(sum));
                // Envoy's own choice is a coin toss: 5 standard deviations.
                let tolerance = 5.0 * (due * (1.0 - due) / all as f64).sqrt();
                ensure!((share - due).abs() <= tolerance, "{version} got {share:.3} of all instead of {due:.3}");
            }
        }
        // Seen with each answer.
        Expected::Sticky => {}
    }
    Ok(())
}
