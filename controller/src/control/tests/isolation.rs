//! What one document does stops no other, whatever it comes from.

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

fn start(documents: &[Value]) -> Control {
    let mut control = Control::new(files(documents), Kept::fresh("e".to_owned()).unwrap(), Counted::default());
    control.set_readiness(ready(&["a", "b", "c"]));
    control
}

fn hosts(control: &Control) -> Vec<String> {
    control.shifts.iter().map(|shift| format!("{} {}", shift.name, shift.services[0].hostnames.join(" "))).collect()
}

#[test]
fn a_later_file_does_not_take_the_host_of_an_applied_document() {
    let file = document("a", "a.example.com", "v1");
    let mut control = start(std::slice::from_ref(&file));
    control.put_shift("b", document("b", "b.example.com", "v1")).unwrap();
    let taking = document("c", "b.example.com", "v1");
    control.set_documents(files(&[taking.clone(), file.clone()]));
    assert_eq!(hosts(&control), ["a a.example.com", "b b.example.com"]);
    let why = "c: spec.hostnames[0]: \"b.example.com\" is already a hostname of the TrafficShift b in force";
    assert_eq!(control.document_errors(), [why]);
    // Nor after a restart.
    let kept = control.kept().clone();
    let mut control = Control::new(files(&[taking.clone(), file]), kept, Counted::default());
    assert_eq!((hosts(&control).len(), control.document_errors()), (2, vec![why.to_owned()]));
    // Once the document is gone, the host is free.
    control.delete_shift("b", None).unwrap();
    assert_eq!(hosts(&control), ["c b.example.com", "a a.example.com"]);
    assert_eq!(control.document_errors(), [""; 0]);
}

#[test]
fn an_applied_document_does_not_take_the_host_of_a_file() {
    let mut control = start(&[document("a", "a.example.com", "v1")]);
    let refused = control.put_shift("b", document("b", "a.example.com", "v1")).unwrap_err().to_string();
    assert_eq!(refused, "spec.hostnames[0]: \"a.example.com\" is already a hostname of the TrafficShift a in force");
    assert_eq!(hosts(&control), ["a a.example.com"]);
}

#[test]
fn what_overtakes_an_applied_document_must_be_right_itself() {
    let (a, b) = (document("a", "a.example.com", "v1"), document("b", "b.example.com", "v1"));
    let mut control = start(&[a.clone(), b.clone()]);
    control.put_shift("a", document("a", "a2.example.com", "v1")).unwrap();
    control.set_documents(files(&[document("a", "b.example.com", "v1"), b.clone()]));
    assert_eq!(hosts(&control), ["a a2.example.com", "b b.example.com"]);
    assert!(control.kept().applied.contains_key("a"));
    control.set_documents(files(&[document("a", "a3.example.com", "v1"), b]));
    assert_eq!(hosts(&control), ["a a3.example.com", "b b.example.com"]);
    assert!(control.kept().applied.is_empty());
}

#[test]
fn deleting_brings_back_the_files_document_or_says_where_to_remove_it() {
    let mut control = start(&[document("a", "a.example.com", "v1")]);
    control.put_shift("a", document("a", "a2.example.com", "v1")).unwrap();
    control.delete_shift("a", None).unwrap();
    assert_eq!(hosts(&control), ["a a.example.com"]);
    assert!(matches!(control.delete_shift("a", None), Err(CommandError::Conflict(why)) if why.contains("file")));
    assert!(matches!(control.delete_shift("b", None), Err(CommandError::NotFound(_))));
}

#[test]
fn a_document_that_proxies_could_not_read_keeps_its_services_and_the_others_go_on() {
    let all = [document("a", "a.example.com", "v1"), document("b", "b.example.com", "v1")];
    let mut control = start(&all);
    control.evaluate(1_000_000);
    let revision = control.kept().revision;
    let share = |control: &Control, service: usize| control.in_force[service].versions[1].weight;
    // Not as documents are read: as a mistake of the compiler would be.
    for (shift, _) in &mut control.files {
        shift.target = Some("v2".to_owned());
    }
    control.shifts = control.files.iter().map(|(shift, _)| shift.clone()).collect();
    control.shifts[0].services[0].versions[0].name = "V 1".to_owned();
    control.evaluate(1_000_100);
    control.evaluate(1_000_200);
    assert_eq!((share(&control, 0), share(&control, 1)), (0, 100));
    assert_eq!(control.kept().revision, revision + 1);
    let why = control.refusal("a").unwrap();
    assert!(why.starts_with("spec.versions[0].name: proxies would refuse what becomes of it: \"V 1\""), "{why}");
    let policy = serde_json::to_value(control.policy.as_ref().unwrap()).unwrap();
    Policy::read(&policy).unwrap();
}

#[test]
fn an_edit_leaves_who_made_it_in_the_history() {
    let old = document("a", "a.example.com", "v1");
    let mut control = start(std::slice::from_ref(&old));
    control.edited_by("a", "file a.yaml");
    control.evaluate(1_000);
    let by = |control: &Control| -> Vec<String> {
        let history = control.history("a").unwrap();
        history.iter().map(|of| format!("{:?} {}", of.reason, of.by.as_deref().unwrap_or("-"))).collect()
    };
    let edit = |control: &mut Control, document: &Value, by: &str| {
        let documents = files(std::slice::from_ref(document));
        control.edited(&documents, |_| Some(by.to_owned()));
        control.set_documents(documents);
        control.set_readiness(ready(&["a"]));
    };
    // It says the same as before: whoever touched the file has changed nothing.
    edit(&mut control, &old, "mallory");
    let mut new = document("a", "a.example.com", "v2");
    new["spec"]["strategy"] = json!({"steps": [{"weight": 1, "pause": true}, {"weight": 100}]});
    edit(&mut control, &new, "kubectl-edit at 2026-12-01T03:02:00Z");
    for now in [2_000, 3_500, 5_000] {
        control.evaluate(now);
    }
    let told = by(&control);
    assert_eq!(told[0], "Started kubectl-edit at 2026-12-01T03:02:00Z", "{told:?}");
    assert!(told.len() > 1 && told[1..].iter().all(|line| line.ends_with(" -")), "what follows of itself: {told:?}");
    // A document of the API is its user's.
    control.put_shift("a", document("a", "a.example.com", "v1")).unwrap();
    control.edited_by("a", "alice from 10.0.0.1");
    control.evaluate(6_000);
    assert_eq!(by(&control).last().unwrap(), "TargetWithdrawn alice from 10.0.0.1");
}
