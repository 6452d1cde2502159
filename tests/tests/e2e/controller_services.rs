//! One rollout for several services, as when everything moves from one cluster to another: all forward together, all
//! back together, and what one loses in the middle is its own affair.

use anyhow::ensure;
use serde_json::{Value, json};
use tideshift_tests::backend::Errors;
use tideshift_tests::client::get;
use tideshift_tests::controller::Controller;
use tideshift_tests::load::{Load, Plan};
use tideshift_tests::test_bed::{CONNECTIONS, DEADLINE, FOR_EVER, TestBed, next_answers};
use tideshift_tests::wait::eventually;

const SERVICES: [&str; 2] = ["checkout", "search"];

/// Two services, each with one endpoint in the old cluster and one in the new.
fn document(rig: &TestBed, fields: Value) -> Value {
    let usual = rig.document(json!({ "stable": "old" }));
    let versions = usual["spec"]["versions"].as_array().cloned().unwrap_or_default();
    let services: Vec<Value> = SERVICES
        .iter()
        .enumerate()
        .map(|(i, name)| {
            let mut versions = versions.clone();
            versions.iter_mut().for_each(|version| version["endpoints"] = json!([version["endpoints"][i]]));
            json!({ "name": name, "hostnames": [format!("{name}.example.com")], "versions": versions })
        })
        .collect();
    let mut spec = json!({ "services": services, "stable": "old", "target": "new" });
    if let (Some(spec), Value::Object(fields)) = (spec.as_object_mut(), fields) {
        spec.extend(fields);
    }
    json!({
        "apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift", "metadata": { "name": "new-cluster" }, "spec": spec,
    })
}

async fn until_shares(controller: &Controller, what: &str, shares: [[f64; 2]; 2]) -> anyhow::Result<Value> {
    eventually(what, DEADLINE, async || {
        let status = controller.status().await?;
        let share = |i: usize, j: usize| status["services"][i]["versions"][j]["weight"].as_f64();
        let seen = [[share(0, 1), share(0, 0)], [share(1, 1), share(1, 0)]];
        ensure!(seen == shares.map(|shares| shares.map(Some)), "old and new have {seen:?}: {}", status["services"]);
        let proxies = status["proxies"].as_array().cloned().unwrap_or_default();
        let in_force = proxies.iter().all(|proxy| proxy["revision"] == status["revision"]);
        ensure!(in_force && !proxies.is_empty(), "not in force yet");
        Ok(status)
    })
    .await
}

fn load(rig: &TestBed, service: &str) -> Load {
    Plan::new(rig.address(), &format!("{service}.example.com")).connections(CONNECTIONS).rate(200.0).start()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn services_of_one_shift_go_forward_and_back_together() -> anyhow::Result<()> {
    let mut rig = TestBed::new(&[("old", 2), ("new", 2)]).await?;
    let steps = json!({ "strategy": { "steps": [{ "weight": 20, "holdSeconds": FOR_EVER }] } });
    let document = document(&rig, steps);
    rig.write(&document)?;
    rig.version("new")[1].set_ready(false);
    let controller = rig.start_controller().await?;
    let _envoy = rig.start_envoy(2).await?;
    let loads = SERVICES.map(|service| load(&rig, service));

    let status = until_shares(&controller, "no service moves before all can", [[100.0, 0.0]; 2]).await?;
    let service = &status["services"][1];
    assert_eq!((&service["name"], &service["rollout"]), (&json!("search"), &json!("new-cluster")));
    let waits = "step 1: new of search has 0 of 1 endpoints ready that 20 % of the load need";
    assert_eq!(service["message"], waits);
    rig.version("new")[1].set_ready(true);
    until_shares(&controller, "both at 20 %", [[80.0, 20.0]; 2]).await?;
    for load in &loads {
        let tally = next_answers(load, 200).await?;
        assert!((25..=60).contains(&tally.of("new")), "{tally:?}");
    }

    // The new cluster is bad for one of them.
    rig.version("new")[0].set(|behaviour| behaviour.errors = Errors { bad: 1, of: 1 });
    let status = until_shares(&controller, "both back", [[100.0, 0.0]; 2]).await?;
    assert_eq!(status["services"][1]["phase"], "Failed");
    let [checkout, search] = loads;
    let (checkout, search) = (checkout.stop().await?, search.stop().await?);
    assert!(checkout.bad() > 0 && search.bad() == 0, "{checkout:?} {search:?}");
    let answer = get(rig.address(), "/").host("search.example.com").send().await?;
    assert_eq!(answer.status, 200);
    Ok(())
}
