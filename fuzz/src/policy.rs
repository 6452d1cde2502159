//! A policy as text, from the plugin configuration or from the controller: it is read or refused, and one that is read
//! is written so that it reads the same, and can be run.

use tideshift_core::choice::plan::{Plan, Turns};
use tideshift_core::protocol::delivery::{Before, Delivery, Refusal};
use tideshift_core::protocol::policy::{Policy, Version};

/// Reads `json`, and runs what comes of it: as a whole, and as what a controller sends to a proxy that runs something.
pub fn holds_for(json: &[u8]) {
    deliver(json);
    let policy = match Policy::from_json(json) {
        Ok(policy) => policy,
        Err(errors) => {
            assert!(!errors.0.is_empty() && !errors.to_string().is_empty(), "refused without a reason");
            return;
        }
    };
    let written = serde_json::to_vec(&policy).expect("a policy can be written");
    assert_eq!(Policy::from_json(&written).as_ref(), Ok(&policy), "written as {}", String::from_utf8_lossy(&written));
    run(&policy, json);
}

/// What is taken of it in place of what runs is always a policy that could have been configured.
fn deliver(json: &[u8]) {
    let runs = br#"{"revision": 1, "services": [{"name": "a", "hostnames": ["a.x"], "versions": [{"name": "v1"}]},
        {"name": "b", "versions": [{"name": "v1"}]}]}"#;
    let runs = Policy::from_json(runs).expect("it is a policy");
    for revision in [None, Some(1)] {
        match Delivery::read(json, Before { policy: &runs, revision, refused: &[] }) {
            Ok(delivery) => {
                let written = serde_json::to_vec(&delivery.policy).expect("a policy can be written");
                assert_eq!(Policy::from_json(&written).as_ref(), Ok(&delivery.policy));
                assert!(delivery.refused.iter().all(|refused| !refused.errors.is_empty()));
                assert!(delivery.base.is_none() || delivery.base == revision);
                run(&delivery.policy, json);
            }
            Err(Refusal::Wrong { errors, .. }) => assert!(!errors.0.is_empty(), "refused without a reason"),
            Err(Refusal::OtherBase(base)) => assert_ne!(Some(base), revision),
        }
    }
}

/// Decides on a few requests that are made of the document's own bytes, so that some of its matches hold.
fn run(policy: &Policy, bytes: &[u8]) {
    let plan = Plan::new(policy, |_, version| version == "vetoed");
    assert_eq!((plan.revision, plan.services.len()), (policy.revision, policy.services.len()));
    let mut turns = Turns::for_plan(&plan, 7, None);
    let hostnames = policy.services.iter().flat_map(|service| &service.hostnames).map(String::as_bytes);
    for host in hostnames.chain([&b""[..], bytes]).take(8) {
        let request =
            [(":authority", host), (":path", bytes), (":method", bytes), ("cookie", bytes), ("x-a", bytes), ("a", b"")];
        for request in [&request[..], &[]] {
            let decision = plan.decide(request, &mut turns, || 7);
            assert!(is_visible(&plan.explain(decision.as_ref())));
            let Some(decision) = decision else { continue };
            let service = &plan.services[decision.service];
            let versions = &policy.services[decision.service].versions;
            let may_serve = |version: &Version| version.serving && version.name != "vetoed";
            assert!(decision.version.is_none_or(|version| may_serve(&versions[version])));
            assert!(decision.rule.is_none_or(|rule| service.rule(rule).is_some()));
            assert!(decision.cookie.is_none_or(|cookie| is_visible(&cookie)));
            assert!(decision.mirror.is_none_or(is_visible));
        }
    }
    let _ = Turns::for_plan(&Plan::new(policy, |_, _| true), 8, Some((&plan, &turns)));
}

/// Whether a text can be a header's value as it stands.
fn is_visible(text: &str) -> bool {
    text.bytes().all(|b| b == b' ' || b.is_ascii_graphic())
}
