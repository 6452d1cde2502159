//! PodDisruptionBudgets: the number of healthy pods and of allowed disruptions.

use serde_json::{Value, json};

use super::super::apiserver::Objects;
use super::super::apiserver::selector::Labels;
use super::{ready, terminating, text};

pub(super) fn reconcile(objects: &Objects) {
    let budgets = objects.all("poddisruptionbudgets.policy");
    if budgets.is_empty() {
        return;
    }
    let pods = objects.all("pods");
    for budget in &budgets {
        let (namespace, name) = (text(budget, "/metadata/namespace"), text(budget, "/metadata/name"));
        let selector = Labels::of(&budget["spec"]["selector"]);
        let protected = pods.iter().filter(|pod| {
            text(pod, "/metadata/namespace") == namespace
                && !terminating(pod)
                && selector.select(&pod["metadata"]["labels"])
        });
        let (expected, healthy) =
            protected.fold((0, 0), |(all, healthy), pod| (all + 1, healthy + usize::from(ready(pod))));
        let desired = desired(&budget["spec"], expected);
        let status = json!({
            "observedGeneration": budget["metadata"]["generation"],
            "expectedPods": expected,
            "currentHealthy": healthy,
            "desiredHealthy": desired,
            "disruptionsAllowed": healthy.saturating_sub(desired),
        });
        let _ = objects.patch_status("poddisruptionbudgets.policy", namespace, name, json!({ "status": status }));
    }
}

/// How many must stay healthy; percentages are rounded up, as in Kubernetes.
fn desired(spec: &Value, expected: usize) -> usize {
    let resolve = |value: &Value| {
        let percent = value.as_str().and_then(|text| text.strip_suffix('%')?.parse::<usize>().ok());
        let number = value.as_u64().and_then(|number| usize::try_from(number).ok());
        number.or_else(|| percent.map(|percent| (expected * percent).div_ceil(100)))
    };
    match (resolve(&spec["minAvailable"]), resolve(&spec["maxUnavailable"])) {
        (Some(least), _) => least,
        (None, unavailable) => expected.saturating_sub(unavailable.unwrap_or(1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_percentages_are_resolved() {
        assert_eq!(desired(&json!({ "minAvailable": 2 }), 5), 2);
        assert_eq!(desired(&json!({ "minAvailable": "50%" }), 5), 3);
        assert_eq!(desired(&json!({ "maxUnavailable": "30%" }), 5), 3);
        assert_eq!(desired(&json!({ "maxUnavailable": 1 }), 0), 0);
    }
}
