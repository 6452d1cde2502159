//! Problems of one document do not affect other documents, whatever their cause.

use super::*;

fn document(name: &str, host: &str, target: &str) -> Value {
    let version = |version: &str| json!({"name": version, "endpoints": ["127.0.0.1:9001"]});
    json!({
        "apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift", "metadata": {"name": name},
        "spec": {
            "hostnames": [host], "versions": [version("v1"), version("v2")], "stable": "v1", "target": target,
            "strategy": {"steps": [{"weight": 100}]},
        },
    })
}

fn files(documents: &[Value]) -> Vec<(TrafficShift, Value)> {
    documents.iter().map(|document| (TrafficShift::read(document).unwrap(), document.clone())).collect()
}

fn ready(names: &[&str]) -> Arc<Readiness> {
    let one = readiness().services["shop"].clone();
    let services = names.iter().map(|name| ((*name).to_owned(), one.clone())).collect();
    Arc::new(Readiness { services, ..Readiness::default() })
}

fn start(documents: &[Value]) -> Reconciler {
    let mut reconciler =
        Reconciler::new(files(documents), PersistedState::fresh("e".to_owned()).unwrap(), CountState::default());
    reconciler.set_readiness(ready(&["a", "b", "c"]));
    reconciler
}

fn hosts(reconciler: &Reconciler) -> Vec<String> {
    reconciler.shifts.iter().map(|shift| format!("{} {}", shift.name, shift.services[0].hostnames.join(" "))).collect()
}

#[test]
fn a_later_file_does_not_take_the_host_of_an_applied_document() {
    let file = document("a", "a.example.com", "v1");
    let mut reconciler = start(std::slice::from_ref(&file));
    reconciler.put_shift("b", document("b", "b.example.com", "v1")).unwrap();
    let taking = document("c", "b.example.com", "v1");
    reconciler.set_documents(files(&[taking.clone(), file.clone()]));
    assert_eq!(hosts(&reconciler), ["a a.example.com", "b b.example.com"]);
    let why = "c: spec.hostnames[0]: \"b.example.com\" is already a hostname of the TrafficShift b in force";
    assert_eq!(reconciler.document_errors(), [why]);
    // Nor after a restart.
    let kept = reconciler.kept().clone();
    let mut reconciler = Reconciler::new(files(&[taking.clone(), file]), kept, CountState::default());
    assert_eq!((hosts(&reconciler).len(), reconciler.document_errors()), (2, vec![why.to_owned()]));
    // Once the document is deleted, the host is free.
    reconciler.delete_shift("b", None).unwrap();
    assert_eq!(hosts(&reconciler), ["c b.example.com", "a a.example.com"]);
    assert_eq!(reconciler.document_errors(), [""; 0]);
}

#[test]
fn an_applied_document_does_not_take_the_host_of_a_file() {
    let mut reconciler = start(&[document("a", "a.example.com", "v1")]);
    let refused = reconciler.put_shift("b", document("b", "a.example.com", "v1")).unwrap_err().to_string();
    assert_eq!(refused, "spec.hostnames[0]: \"a.example.com\" is already a hostname of the TrafficShift a in force");
    assert_eq!(hosts(&reconciler), ["a a.example.com"]);
}

#[test]
fn what_overtakes_an_applied_document_must_be_right_itself() {
    let (a, b) = (document("a", "a.example.com", "v1"), document("b", "b.example.com", "v1"));
    let mut reconciler = start(&[a.clone(), b.clone()]);
    reconciler.put_shift("a", document("a", "a2.example.com", "v1")).unwrap();
    reconciler.set_documents(files(&[document("a", "b.example.com", "v1"), b.clone()]));
    assert_eq!(hosts(&reconciler), ["a a2.example.com", "b b.example.com"]);
    assert!(reconciler.kept().applied.contains_key("a"));
    reconciler.set_documents(files(&[document("a", "a3.example.com", "v1"), b]));
    assert_eq!(hosts(&reconciler), ["a a3.example.com", "b b.example.com"]);
    assert!(reconciler.kept().applied.is_empty());
}

#[test]
fn deleting_brings_back_the_files_document_or_says_where_to_remove_it() {
    let mut reconciler = start(&[document("a", "a.example.com", "v1")]);
    reconciler.put_shift("a", document("a", "a2.example.com", "v1")).unwrap();
    reconciler.delete_shift("a", None).unwrap();
    assert_eq!(hosts(&reconciler), ["a a.example.com"]);
    assert!(matches!(reconciler.delete_shift("a", None), Err(CommandError::Conflict(why)) if why.contains("file")));
    assert!(matches!(reconciler.delete_shift("b", None), Err(CommandError::NotFound(_))));
}

#[test]
fn a_document_that_proxies_could_not_read_keeps_its_services_and_the_others_go_on() {
    let all = [document("a", "a.example.com", "v1"), document("b", "b.example.com", "v1")];
    let mut reconciler = start(&all);
    reconciler.evaluate(1_000_000);
    let revision = reconciler.kept().revision;
    let share = |reconciler: &Reconciler, service: usize| reconciler.in_force[service].versions[1].weight;
    // Simulates a bug of the compiler, which parsing the documents cannot cause.
    for (shift, _) in &mut reconciler.files {
        shift.target = Some("v2".to_owned());
    }
    reconciler.shifts = reconciler.files.iter().map(|(shift, _)| shift.clone()).collect();
    reconciler.shifts[0].services[0].versions[0].name = "V 1".to_owned();
    reconciler.evaluate(1_000_100);
    reconciler.evaluate(1_000_200);
    assert_eq!((share(&reconciler, 0), share(&reconciler, 1)), (0, 100));
    assert_eq!(reconciler.kept().revision, revision + 1);
    let why = reconciler.refusal("a").unwrap();
    assert!(why.starts_with("spec.versions[0].name: proxies would refuse what becomes of it: \"V 1\""), "{why}");
    let policy = serde_json::to_value(reconciler.policy.as_ref().unwrap()).unwrap();
    Policy::read(&policy).unwrap();
}

#[test]
fn an_edit_leaves_who_made_it_in_the_history() {
    let old = document("a", "a.example.com", "v1");
    let mut reconciler = start(std::slice::from_ref(&old));
    reconciler.edited_by("a", "file a.yaml");
    reconciler.evaluate(1_000);
    let by = |reconciler: &Reconciler| -> Vec<String> {
        let history = reconciler.history("a").unwrap();
        history.iter().map(|of| format!("{:?} {}", of.reason, of.by.as_deref().unwrap_or("-"))).collect()
    };
    let edit = |reconciler: &mut Reconciler, document: &Value, by: &str| {
        let documents = files(std::slice::from_ref(document));
        reconciler.edited(&documents, |_| Some(by.to_owned()));
        reconciler.set_documents(documents);
        reconciler.set_readiness(ready(&["a"]));
    };
    // The content is unchanged, so touching the file does not change the editor.
    edit(&mut reconciler, &old, "mallory");
    let mut new = document("a", "a.example.com", "v2");
    new["spec"]["strategy"] = json!({"steps": [{"weight": 1, "pause": true}, {"weight": 100}]});
    edit(&mut reconciler, &new, "kubectl-edit at 2026-12-01T03:02:00Z");
    for now in [2_000, 3_500, 5_000] {
        reconciler.evaluate(now);
    }
    let told = by(&reconciler);
    assert_eq!(told[0], "Started kubectl-edit at 2026-12-01T03:02:00Z", "{told:?}");
    assert!(told.len() > 1 && told[1..].iter().all(|line| line.ends_with(" -")), "what follows of itself: {told:?}");
    // An API document belongs to its user.
    reconciler.put_shift("a", document("a", "a.example.com", "v1")).unwrap();
    reconciler.edited_by("a", "alice from 10.0.0.1");
    reconciler.evaluate(6_000);
    assert_eq!(by(&reconciler).last().unwrap(), "TargetWithdrawn alice from 10.0.0.1");
}
