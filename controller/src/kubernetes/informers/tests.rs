use super::*;
use crate::kubernetes::cache::{Labels, Slice, SliceEndpoint};
use kube::client::Body;
use serde_json::json;

/// A cluster that never answers; tests write the observed state directly.
fn watches() -> WatchManager {
    let mute = |_: axum::http::Request<Body>| {
        std::future::pending::<Result<axum::http::Response<Body>, std::convert::Infallible>>()
    };
    let client = Client::new(tower::service_fn(mute), "default");
    WatchManager::new(
        Clusters::new(client, "tideshift-system"),
        SharedState::default(),
        watch::channel(Arc::default()).1,
    )
}

fn place(namespace: &str) -> NamespaceRef {
    NamespaceRef { cluster: None, namespace: namespace.to_owned() }
}

fn slices(namespace: &str) -> InView<Slice> {
    InView { place: place(namespace), table: |view| &mut view.slices, note: Changes::slice }
}

fn pods(namespace: &str) -> InView<Labels> {
    InView { place: place(namespace), table: |view| &mut view.pods, note: Changes::pod }
}

fn slice(service: &str, ready: usize, listed: usize) -> Slice {
    let endpoint = |n: usize| SliceEndpoint {
        address: format!("10.0.0.{n}"),
        pod: Some(format!("{service}-{n}")),
        ready: n < ready,
        serving: n < ready,
        terminating: false,
    };
    Slice {
        service: Some(service.to_owned()),
        ports: vec![("http".to_owned(), 8080)],
        endpoints: (0..listed).map(endpoint).collect(),
        ..Slice::default()
    }
}

fn written(name: &str, host: &str, created: i64, versions: &Value) -> TrafficShiftObject {
    let metadata = json!({"name": name, "namespace": "shop"});
    let document = json!({
        "apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift", "metadata": metadata,
        "spec": {"hostnames": [host], "versions": versions, "stable": "v1"},
    });
    let object = json!({
        "apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift", "spec": document["spec"],
        "metadata": {"name": name, "namespace": "shop", "uid": name, "generation": 1},
    });
    TrafficShiftObject { created, ..convert::from_traffic_shift(&serde_json::from_value(object).unwrap()).unwrap() }
}

/// `number` TrafficShifts `s0`, `s1`, ... with Services for v1 and v2; another one requests the hostname of the first.
fn many(number: usize) -> Objects<TrafficShiftObject> {
    let one = |n: usize| {
        let name = format!("s{n}");
        let versions = json!([
            {"name": "v1", "service": format!("{name}-v1")}, {"name": "v2", "service": format!("{name}-v2")},
        ]);
        (format!("shop/{name}"), written(&name, &format!("{name}.example.com"), n as i64, &versions))
    };
    let versions = json!([{"name": "v1", "service": "culprit"}]);
    let culprit = written("culprit", "s0.example.com", 1_000_000, &versions);
    (0..number).map(one).chain([("shop/culprit".to_owned(), culprit)]).collect()
}

/// The snapshot of them: each version has two endpoints.
fn seen(watches: &mut WatchManager, number: usize) -> Snapshot {
    watches.notes.write(|sight| Shifts(None).put_all(sight, many(number)));
    // The first call starts the watches.
    watches.look(BTreeSet::new()).unwrap();
    let names = (0..number).flat_map(|n| [format!("s{n}-v1"), format!("s{n}-v2")]);
    let all = names.map(|name| (slice_key(Some(&name), &format!("{name}-a")), slice(&name, 2, 2)));
    watches.notes.write(|sight| slices("shop").put_all(sight, all.collect()));
    watches.notes.lock().picture.lost.clear();
    watches.notes.lock().news.clusters.insert(None);
    watches.look(BTreeSet::new()).unwrap()
}

fn put(watches: &WatchManager, service: &str, ready: usize) {
    let key = slice_key(Some(service), &format!("{service}-a"));
    watches.notes.write(|sight| slices("shop").put(sight, key, Some(slice(service, ready, 2))));
}

/// Whether the state has changed since the last call.
async fn is_woken(watches: &WatchManager) -> bool {
    tokio::time::timeout(Duration::ZERO, watches.notes.changed.notified()).await.is_ok()
}

#[tokio::test]
async fn only_what_a_change_concerns_is_put_together_again() {
    const NUMBER: usize = 500;
    let mut watches = watches();
    let before = seen(&mut watches, NUMBER);
    assert_eq!(before.documents.len(), NUMBER);
    assert!(before.objects["culprit.shop"].error.as_ref().unwrap().contains("s0.example.com"));
    assert_eq!(before.errors.len(), 1, "{:?}", before.errors);

    let mut took = Vec::new();
    for n in 0..100 {
        let (name, ready) = (format!("s{}-v2", 100 + n % 2), 1 - n / 2 % 2);
        put(&watches, &name, ready);
        let began = std::time::Instant::now();
        let after = watches.look(BTreeSet::new()).unwrap();
        took.push(began.elapsed());
        let same = |(before, after): (&Arc<Document>, &Arc<Document>)| Arc::ptr_eq(before, after);
        let same = before.documents.iter().zip(&*after.documents).filter(|pair| same(*pair)).count();
        assert!(same >= NUMBER - 2, "{} others were put together again", NUMBER - same);
        let document = &after.documents[100 + n % 2].0;
        assert_eq!(document.services[0].versions[1].endpoints.len(), ready);
        let object = |snapshot: &Snapshot, name: &str| Arc::as_ptr(&snapshot.objects[name]);
        assert_eq!(object(&before, "s7.shop"), object(&after, "s7.shop"));
        assert_ne!(object(&before, &document.name), object(&after, &document.name));
    }
    took.sort_unstable();
    println!("LOOK after a slice change, {NUMBER} TrafficShifts: median {:?}, most {:?}", took[50], took[99]);
}

#[tokio::test]
async fn what_changes_nothing_wakes_nobody() {
    const NUMBER: usize = 10_000;
    let mut watches = watches();
    seen(&mut watches, 3);
    let labels = |n: usize| Labels::from([("app".to_owned(), format!("a{}", n % 50)), ("n".to_owned(), n.to_string())]);
    let all = (0..NUMBER).map(|n| (format!("pod-{n}"), labels(n))).collect();
    watches.notes.write(|sight| pods("shop").put_all(sight, all));
    assert!(is_woken(&watches).await);
    watches.look(BTreeSet::new()).unwrap();

    let began = std::time::Instant::now();
    for n in 0..1_000 {
        watches.notes.write(|sight| pods("shop").put(sight, format!("pod-{n}"), Some(labels(n))));
    }
    println!("POD event that changes nothing, {NUMBER} pods: {:?}", began.elapsed() / 1_000);
    put(&watches, "s0-v1", 2);
    watches.notes.write(|sight| Shifts(None).put_all(sight, many(3)));
    assert!(!is_woken(&watches).await);
    assert!(watches.look(BTreeSet::new()).is_none());

    let before = watches.snapshot.clone();
    watches.notes.write(|sight| pods("shop").put(sight, "pod-1".to_owned(), Some(labels(2))));
    assert!(is_woken(&watches).await);
    let after = watches.look(BTreeSet::new()).unwrap();
    assert!(Arc::ptr_eq(&before.documents, &after.documents), "no document selects it");
    assert_eq!(after.picture.views[&place("shop")].pods.objects["pod-1"], labels(2));
    assert_eq!(before.picture.views[&place("shop")].pods.objects["pod-1"], labels(1), "a picture stays as it was");
}

#[tokio::test]
async fn what_is_lost_is_said_and_is_in_sight_again() {
    let mut watches = watches();
    seen(&mut watches, 3);
    watches.notes.write(|sight| slices("shop").lose(sight, "forbidden".to_owned()));
    let lost = watches.look(BTreeSet::new()).unwrap();
    assert!(lost.outlook.unseen["s1.shop"].contains("forbidden"), "{:?}", lost.outlook.unseen);
    let all = watches.notes.lock().picture.views[&place("shop")].slices.objects.clone();
    watches.notes.write(|sight| slices("shop").put_all(sight, all));
    assert!(watches.look(BTreeSet::new()).unwrap().outlook.unseen.is_empty());

    watches.notes.write(|sight| Shifts(None).lose(sight, "gone".to_owned()));
    let hidden = watches.look(BTreeSet::new()).unwrap();
    assert!(hidden.errors[0].contains("cannot be seen: gone") && hidden.hidden.is_empty(), "{:?}", hidden.errors);
    assert_eq!(hidden.documents.len(), 3);
}

#[tokio::test]
async fn what_a_culprit_gives_up_another_one_gets_at_once() {
    let mut watches = watches();
    seen(&mut watches, 3);
    let versions = json!([{"name": "v1", "service": "culprit"}]);
    let other = written("culprit", "other.example.com", 1_000_000, &versions);
    watches.notes.write(|sight| Shifts(None).put(sight, "shop/culprit".to_owned(), Some(other)));
    let after = watches.look(BTreeSet::new()).unwrap();
    assert_eq!(
        (after.documents.len(), after.errors.len(), after.objects["culprit.shop"].error.is_none()),
        (4, 0, true)
    );
}
