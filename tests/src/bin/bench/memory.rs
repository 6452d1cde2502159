//! Measures the memory of each additional VM, and thus of each additional worker.

use std::fs;
use std::net::SocketAddr;

use anyhow::{Context as _, anyhow};

use crate::client::{CONNECTIONS, Client, request};
use crate::progress;
use crate::proxy::Proxy;
use crate::statistics::Summary;
use crate::variants::Variant;

/// Workers of the Envoys that are compared with one that has a single worker.
pub(crate) const WORKERS: usize = 33;
/// Requests to each worker before memory is read.
pub(crate) const REQUESTS: usize = 100;

/// An Envoy's resident memory in KB: with one worker, and what each further one adds.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) variant: Variant,
    pub(crate) one: f64,
    pub(crate) further: f64,
}

/// Measures each variant in an Envoy of its own, so many times.
pub(crate) async fn measure(variants: &[Variant], backends: &[SocketAddr], runs: usize) -> anyhow::Result<Vec<Memory>> {
    let mut measured = Vec::new();
    for variant in variants {
        let mut of = [Vec::new(), Vec::new()];
        for run in 1..=runs {
            progress(&format!("memory, {}: run {run} of {runs}", variant.name));
            for (workers, of) in [1, WORKERS].into_iter().zip(&mut of) {
                of.push(resident(variant, backends, workers).await?);
            }
        }
        let [one, many] = of.map(|of| Summary::of(of).map_or(f64::NAN, |summary| summary.median));
        measured.push(Memory { variant: variant.clone(), one, further: (many - one) / (WORKERS - 1) as f64 });
    }
    Ok(measured)
}

/// The resident memory in KB of an Envoy with so many workers that has served.
async fn resident(variant: &Variant, backends: &[SocketAddr], workers: usize) -> anyhow::Result<f64> {
    let proxy = Proxy::new(std::slice::from_ref(variant), backends)?;
    let envoy = proxy.options(workers).start().await?;
    let address = proxy.addresses().next().context("no listener")?;
    let load = move || {
        // Until each worker has a connection, as the listener balances them exactly.
        let clients = (0..workers.div_ceil(CONNECTIONS))
            .map(|_| Client::connect(address, vec![request(None, &[])], false))
            .collect::<anyhow::Result<Vec<_>>>()?;
        clients.into_iter().try_for_each(|mut client| client.batch(REQUESTS * CONNECTIONS))
    };
    tokio::task::spawn_blocking(load).await?.map_err(|error| anyhow!("{error:#}\n{}", envoy.tail()))?;
    let status = fs::read_to_string(format!("/proc/{}/status", envoy.id()))?;
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
    Ok(resident.context("no VmRSS")?.parse()?)
}
