//! The real module in the wasm host: vetoes when the VM that guards goes away, which no Envoy does on demand.

use anyhow::ensure;
use serde_json::{Value, json};
use std::time::Duration;
use tideshift_tests::wasm_host::{Ending, MAIN, WasmHost};

const WORKERS: usize = 2;

/// A controller that never answers. What configurations with the same one know, they share.
fn controller() -> Value {
    json!({"cluster": "tideshift_controller"})
}

/// A proxy whose v2, which has a tenth of the requests, fails them all and is taken out for a second.
fn host_with_veto() -> anyhow::Result<WasmHost> {
    let mut host = WasmHost::new(WORKERS)?;
    let policy = json!({"controller": controller(), "revision": 1, "services": [{
        "name": "checkout",
        "versions": [{"name": "v1", "weight": 90}, {"name": "v2", "weight": 10}],
        "guard": {"coolDownSeconds": 1},
    }]});
    ensure!(host.configure(&policy.to_string())?, "refused: {:?}", host.log());
    for _ in 0..30 {
        if tenth_to_v2(&mut host, 500)? == 0 {
            return Ok(host);
        }
        host.advance(Duration::from_millis(100))?;
    }
    anyhow::bail!("no veto: {:?}", host.log())
}

/// Thirty requests to each worker, of which v2 answers its own with that status; how many those were.
fn tenth_to_v2(host: &mut WasmHost, status: u16) -> anyhow::Result<usize> {
    let mut on_v2 = 0;
    for request in 0..30 * WORKERS {
        let exchange = host.request(1 + request % WORKERS, &[(":path", "/")])?;
        let is_v2 = exchange.version().as_deref() == Some("v2");
        on_v2 += usize::from(is_v2);
        host.end(exchange, &Ending::status(if is_v2 { status } else { 200 }))?;
    }
    Ok(on_v2)
}

fn until_v2_is_back(host: &mut WasmHost) -> anyhow::Result<Duration> {
    let begun = host.now();
    for _ in 0..100 {
        host.advance(Duration::from_millis(100))?;
        if tenth_to_v2(host, 200)? >= WORKERS {
            return Ok(host.now() - begun);
        }
    }
    anyhow::bail!("v2 is out for good: {:?}", host.log())
}

#[test]
fn a_veto_ends_when_its_time_is_up() -> anyhow::Result<()> {
    let mut host = host_with_veto()?;
    let out = until_v2_is_back(&mut host)?;
    ensure!(out <= Duration::from_millis(1_300), "{out:?}");
    Ok(())
}

/// Nothing waits for the guard's next look.
#[test]
fn a_veto_is_heeded_no_more_as_soon_as_nobody_else_is_in_service() -> anyhow::Result<()> {
    let mut host = host_with_veto()?;
    let alone = json!({"controller": controller(), "revision": 2, "services": [{
        "name": "checkout",
        "versions": [{"name": "v1", "weight": 0, "serving": false}, {"name": "v2", "weight": 10}],
        "guard": {"coolDownSeconds": 1},
    }]});
    ensure!(host.configure(&alone.to_string())?);
    ensure!(tenth_to_v2(&mut host, 500)? == 30 * WORKERS, "all of them");
    ensure!(!host.log().iter().any(|line| format!("{line:?}").contains("back in service")), "not looked yet");
    host.advance(Duration::from_millis(300))?;
    ensure!(host.log().iter().any(|line| format!("{line:?}").contains("v2 of checkout is back in service")));
    Ok(())
}

/// A veto that ends while no VM leads, because the leader is gone and its lease has not expired yet.
#[test]
fn a_veto_ends_although_the_vm_that_made_it_is_gone() -> anyhow::Result<()> {
    let mut host = host_with_veto()?;
    for thread in MAIN..=WORKERS {
        ensure!(host.reload(thread)?);
    }
    ensure!(tenth_to_v2(&mut host, 200)? == 0, "the new VMs know of the veto");
    let out = until_v2_is_back(&mut host)?;
    ensure!(out <= Duration::from_secs(4), "{out:?}");
    Ok(())
}
