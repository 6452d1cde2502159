//! The controller as a process: how it starts and ends, what it keeps, which clients it rejects, what it says of itself, and that
//! no client can bring it down.

use std::collections::BTreeSet;
use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tideshift_core::counts::MAX_COUNT;
use tideshift_tests::client::{Connection, Request, Response, get};
use tideshift_tests::controller::{Controller, Output, cli};
use tideshift_tests::metrics::Metrics;
use tideshift_tests::openmetrics;
use tideshift_tests::test_bed::{DEADLINE, FOR_EVER, SERVICE, Seen, TestBed, answers_polls, until};
use tideshift_tests::wait::eventually;

fn shifting() -> Value {
    json!({ "target": "v2", "strategy": { "steps": [{ "weight": 20, "holdSeconds": FOR_EVER }] } })
}

async fn start() -> anyhow::Result<(TestBed, Controller)> {
    let mut rig = TestBed::new(&[("v1", 1), ("v2", 1)]).await?;
    rig.write(&rig.document(shifting()))?;
    let controller = rig.start_controller().await?;
    Ok((rig, controller))
}

/// A `tideshift serve` that must end by itself.
fn serve(document: &Path, further: &[&str]) -> anyhow::Result<Output> {
    let document = document.to_string_lossy();
    cli(["serve", "-f", &document].iter().chain(further))
}

/// A report of `ok` requests of v1 and an error of v2.
fn report(proxy: &str, start: &str, ok: u64) -> Value {
    json!({ "proxy": proxy, "start": start, "epoch": "", "revision": 0, "workers": 3, "services": [{
        "name": SERVICE,
        "versions": [{ "name": "v1", "ok": ok, "error": 0, "clientError": 0, "cancelled": 0, "inFlight": 2 },
                     { "name": "v2", "ok": 0, "error": 1, "clientError": 0, "cancelled": 0, "inFlight": 0 }],
    }]})
}

fn post(controller: &Controller, body: impl Into<Vec<u8>>) -> Request {
    Request::new(controller.address(), "POST", "/v1/reports").header("content-type", "application/json").body(body)
}

/// A poll that waits for something newer than what there is.
async fn open_poll(controller: &Controller) -> anyhow::Result<Connection> {
    let seen = Seen::now(controller).await?;
    let epoch = seen.0["epoch"].as_str().context("no epoch")?;
    get(controller.address(), &format!("/v1/policy?proxy=p&epoch={epoch}&after={}", seen.revision())).begin().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_ends_it_within_seconds_with_polls_open_and_everything_kept() -> anyhow::Result<()> {
    let (rig, mut controller) = start().await?;
    let mut polls = Vec::new();
    for _ in 0..20 {
        polls.push(open_poll(&controller).await?);
    }
    for ok in [3, 7] {
        let answer = post(&controller, report("p", "1", ok).to_string()).send().await?;
        assert_eq!((answer.status, answer.text().as_str()), (204, ""));
    }
    let before = Seen::now(&controller).await?;
    let begun = Instant::now();
    let status = controller.terminate().await?;
    println!("ended {:.2} s after SIGTERM with {} polls open", begun.elapsed().as_secs_f64(), polls.len());
    assert_eq!(status.code(), Some(0), "{}", controller.tail());
    assert!(begun.elapsed() < Duration::from_secs(4), "less than the grace for requests that do not end");
    for mut poll in polls {
        let answer = poll.read(true).await?;
        assert_eq!((answer.status, answer.json()?), (503, json!({ "error": "shutting down" })));
    }

    controller.start_again().await?;
    let after = Seen::now(&controller).await?;
    assert_eq!((&after.0["epoch"], after.revision()), (&before.0["epoch"], before.revision()));
    assert_eq!((after.phase(), after.step(), after.weights()), ("Progressing", Some(1), vec![80.0, 20.0]));
    assert_eq!((after.count("v1", "ok"), after.count("v2", "error")), (7, 1));
    // The same proxy goes on where it was.
    post(&controller, report("p", "1", 9).to_string()).send().await?;
    assert_eq!(Seen::now(&controller).await?.count("v1", "ok"), 9);
    // A client that never completes its request does not delay it for long.
    let mut half = Connection::open(controller.address()).await?;
    half.write(b"POST /v1/reports HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{").await?;
    answers_polls(controller.address()).await?;
    assert_eq!(controller.terminate().await?.code(), Some(0), "{}", controller.tail());
    drop(rig);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reports_are_cumulative_for_each_run_of_a_proxy() -> anyhow::Result<()> {
    let (_rig, controller) = start().await?;
    for (proxy, start, ok, total) in
        [("a", "1", 5, 5), ("a", "1", 5, 5), ("a", "1", 8, 8), ("a", "2", 2, 10), ("b", "1", 1, 11), ("a", "1", 9, 12)]
    {
        post(&controller, report(proxy, start, ok).to_string()).send().await?;
        let seen = Seen::now(&controller).await?;
        assert_eq!(seen.count("v1", "ok"), total, "after {ok} of run {start} of {proxy}");
    }
    let seen = Seen::now(&controller).await?;
    assert_eq!(seen.0["proxies"].as_array().map(Vec::len), Some(3));
    // What no document names is not taken in.
    let mut stranger = report("a", "1", 9);
    stranger["services"][0]["versions"][0]["name"] = json!("v9");
    stranger["services"].as_array_mut().context("a list")?.push(json!({ "name": "nobody", "versions": [] }));
    assert_eq!(post(&controller, stranger.to_string()).send().await?.status, 204);
    assert_eq!(Seen::now(&controller).await?.counts(), seen.counts());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_one_on_the_same_state_is_refused_kindly() -> anyhow::Result<()> {
    let (rig, mut controller) = start().await?;
    let second = serve(&rig.file(), &["--listen", "127.0.0.1:0"])?;
    let expected = format!(
        "error: state in {}: in use by another tideshift serve; give this one a --state-dir of its own\n",
        rig.state_dir().display()
    );
    assert_eq!((second.code, second.stderr.as_str()), (Some(1), expected.as_str()));
    answers_polls(controller.address()).await?;
    // The port is taken too, which is said in as few words.
    let (address, own) = (controller.address().to_string(), rig.path("own-state"));
    let second = serve(&rig.file(), &["--listen", &address, "--state-dir", &own.to_string_lossy()])?;
    assert_eq!(second.code, Some(1), "{second:?}");
    let error = second.stderr.lines().last().unwrap_or_default();
    assert!(error.starts_with(&format!("error: --listen {address}: ")) && error.contains("in use"), "{error}");
    // A lock is no file that is left behind: after a kill the next one starts.
    controller.kill()?;
    controller.start_again().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn state_that_cannot_be_read_is_refused_and_left_alone() -> anyhow::Result<()> {
    let (rig, mut controller) = start().await?;
    post(&controller, report("p", "1", 5).to_string()).send().await?;
    assert_eq!(controller.terminate().await?.code(), Some(0));
    for name in ["rollouts.json", "counts.json"] {
        let file = rig.state_dir().join(name);
        let good = fs::read(&file)?;
        let refused = |why: &str| {
            let output = serve(&rig.file(), &["--listen", "127.0.0.1:0"])?;
            assert_eq!(output.code, Some(1), "{output:?}");
            let start = format!("error: state in {}: ", file.display());
            assert!(output.stderr.starts_with(&start) && output.stderr.contains(why), "{why}: {}", output.stderr);
            assert!(output.stderr.contains("it is left as it is. Move it away to start afresh"), "{}", output.stderr);
            anyhow::Ok(())
        };
        let newer = String::from_utf8(good.clone())?.replacen("\"format\":6", "\"format\":7", 1);
        let mut flipped = good.clone();
        *flipped.last_mut().context("nothing")? ^= 1;
        let mut elsewhere = good.clone();
        elsewhere[good.len() / 2] ^= 4;
        for (bytes, why) in [
            (&good[..good.len() / 2], "EOF while parsing"),
            (&[], "EOF while parsing"),
            (&[0; 64], "expected value"),
            (b"[]", "no format in it"),
            (b"{\"format\": 4}", "missing field"),
            (&elsewhere, ""),
            (&flipped, "expected"),
            (newer.as_bytes(), "format 7, of another version of tideshift"),
        ] {
            fs::write(&file, bytes)?;
            refused(why)?;
            assert_eq!(fs::read(&file)?, bytes, "{why}");
        }
        // What cannot be read at all may be a good state all the same.
        fs::remove_file(&file)?;
        fs::create_dir(&file)?;
        refused("cannot be read: ")?;
        fs::remove_dir(&file)?;
        fs::write(&file, good)?;
    }
    controller.start_again().await?;
    let seen = Seen::now(&controller).await?;
    assert_eq!((seen.step(), seen.count("v1", "ok")), (Some(1), 5));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn addresses_and_documents_that_are_wrong_end_it_with_2() -> anyhow::Result<()> {
    let rig = TestBed::new(&[("v1", 1)]).await?;
    rig.write(&rig.document(json!({})))?;
    for address in ["0.0.0.0:7460", "[::]:7460", "192.0.2.1:80"] {
        let output = serve(&rig.file(), &["--listen", address])?;
        let expected = format!("error: --listen {address}: not a loopback address, such as 127.0.0.1:7460; ");
        assert!(output.code == Some(2) && output.stderr.starts_with(&expected), "{output:?}");
        assert!(!rig.state_dir().exists(), "nothing is begun");
    }
    let output = serve(&rig.file(), &["--listen", "nonsense"])?;
    assert!(output.code == Some(2) && output.stderr.contains("'nonsense'"), "{output:?}");
    rig.write(&rig.document(json!({ "stable": "v9", "target": 7 })))?;
    let output = serve(&rig.file(), &[])?;
    let file = rig.file().display().to_string();
    let expected = format!(
        "{file}: spec.stable: \"v9\" is not allowed; expected one of the versions v1\n{file}: spec.target: 7 is not \
         allowed; expected one of the versions v1\n"
    );
    assert_eq!((output.code, output.stderr), (Some(2), expected));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_is_ready_once_it_knows_what_is_ready() -> anyhow::Result<()> {
    // An endpoint that takes connections and says nothing: its first probe lasts until its time-out.
    let silent = TcpListener::bind("127.0.0.1:0")?;
    let mut rig = TestBed::new(&[]).await?;
    let probe = json!({ "httpGet": {}, "timeoutSeconds": 2 });
    let endpoint = silent.local_addr()?.to_string();
    let versions = json!([{ "name": "v1", "endpoints": [endpoint], "readinessProbe": probe }]);
    rig.write(&rig.document(json!({ "versions": versions })))?;
    let address = rig.controller_address();
    let asking = async {
        let answer = eventually("an answer", DEADLINE, async || get(address, "/readyz").send().await).await?;
        anyhow::Ok((answer, get(address, "/healthz").send().await?))
    };
    let (controller, answers) = tokio::join!(rig.start_controller(), asking);
    let (controller, (ready, healthy)) = (controller?, answers?);
    assert_eq!((ready.status, ready.text().as_str()), (503, "waiting for the first probes\n"));
    assert_eq!((healthy.status, healthy.text().as_str()), (200, "ok\n"));
    let seen = Seen::now(&controller).await?;
    assert_eq!(seen.version("v1")["endpoints"]["notReady"][0]["reason"], "no result within 2 s");
    assert_eq!(controller.get("/readyz").await?, "ok\n");
    assert_eq!(get(address, "/v1/nothing").send().await?.status, 404);
    assert_eq!(Request::new(address, "DELETE", "/v1/policy").send().await?.status, 405);
    Ok(())
}

/// A scrape as Prometheus asks for it.
async fn in_openmetrics(controller: &Controller) -> anyhow::Result<Response> {
    let accept = "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,\
                  text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
    get(controller.address(), "/metrics").header("accept", accept).send().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn its_metrics_are_prometheus_older_text_for_whoever_does_not_ask_for_more() -> anyhow::Result<()> {
    let (_rig, controller) = start().await?;
    post(&controller, report("p", "1", 5).to_string()).send().await?;
    for accept in [None, Some("*/*"), Some("text/plain;version=0.0.4")] {
        let mut request = get(controller.address(), "/metrics");
        if let Some(accept) = accept {
            request = request.header("accept", accept);
        }
        let scrape = request.send().await?;
        assert_eq!(scrape.header("content-type").as_deref(), Some("text/plain; version=0.0.4; charset=utf-8"));
        let text = scrape.text();
        let mut family = "";
        for line in text.lines() {
            match line.split(' ').collect::<Vec<_>>()[..] {
                ["#", "HELP", name, ..] => family = name,
                ["#", "TYPE", name, kind] => ensure!(name == family && ["counter", "gauge"].contains(&kind), "{line}"),
                ["#", ..] => anyhow::bail!("{line}"),
                _ => ensure!(line.split(['{', ' ']).next() == Some(family), "{line} is not of {family}"),
            }
        }
        // Both say the same.
        let names = |text: &str| -> anyhow::Result<BTreeSet<String>> {
            Ok(Metrics::parse(text)?.0.into_keys().map(|series| series.name).collect())
        };
        assert_eq!(names(&text)?, names(&in_openmetrics(&controller).await?.text())?);
        assert_eq!(Metrics::parse(&text)?.sum("tideshift_controller_leader", &[]), Some(1.0));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn its_metrics_are_openmetrics_to_the_letter() -> anyhow::Result<()> {
    let (_rig, controller) = start().await?;
    post(&controller, report("p", "1", 5).to_string()).send().await?;
    let scrape = in_openmetrics(&controller).await?;
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    assert_eq!(scrape.header("content-type").as_deref(), Some(kind));
    let families = openmetrics::read(&scrape.text()).with_context(|| scrape.text())?;
    for (name, kind) in [
        ("tideshift_controller_build", "info"),
        ("tideshift_controller_requests", "counter"),
        ("tideshift_controller_unrouted_requests", "counter"),
        ("tideshift_controller_requests_in_flight", "gauge"),
        ("tideshift_controller_version_share_ratio", "gauge"),
        ("tideshift_controller_endpoints_ready", "gauge"),
        ("tideshift_controller_endpoints", "gauge"),
        ("tideshift_controller_rollout_phase", "gauge"),
        ("tideshift_controller_policy_revision", "gauge"),
        ("tideshift_controller_proxies", "gauge"),
        ("tideshift_controller_proxies_behind", "gauge"),
        ("tideshift_controller_document_errors", "gauge"),
        ("tideshift_controller_documents_kept", "gauge"),
        ("tideshift_controller_documents_left", "counter"),
        ("tideshift_controller_documents_returned", "counter"),
        ("tideshift_controller_http_requests", "counter"),
        ("tideshift_controller_state_write_errors", "counter"),
        ("process_resident_memory_bytes", "gauge"),
    ] {
        assert_eq!(families.get(name).map(String::as_str), Some(kind), "{name} in {families:?}");
    }
    let metrics = controller.metrics().await?;
    let v1_ok = [("service", SERVICE), ("version", "v1"), ("outcome", "ok")];
    assert_eq!(metrics.sum("tideshift_controller_requests_total", &v1_ok), Some(5.0));
    assert_eq!(metrics.sum("tideshift_controller_requests_in_flight", &[("version", "v1")]), Some(2.0));
    assert_eq!(metrics.sum("tideshift_controller_version_share_ratio", &[("version", "v2")]), Some(0.2));
    assert_eq!(metrics.sum("tideshift_controller_rollout_phase", &[("phase", "Progressing")]), Some(1.0));
    assert_eq!(metrics.sum("tideshift_controller_proxies_behind", &[]), Some(1.0));
    let started = [("rollout", SERVICE), ("phase", "Progressing"), ("reason", "Started")];
    assert_eq!(metrics.sum("tideshift_controller_rollout_transitions_total", &started), Some(1.0));
    assert_eq!(metrics.sum("tideshift_controller_policies_published_total", &[]), Some(1.0));
    assert_eq!(metrics.sum("tideshift_controller_state_write_errors_total", &[]), Some(0.0));
    // By route and status, whatever clients come up with.
    for (path, status) in [("/v1/nothing", 404), ("/v1/never", 404), ("/v1/policy?after=x", 400)] {
        assert_eq!(get(controller.address(), path).send().await?.status, status);
    }
    let metrics = controller.metrics().await?;
    let answers =
        |path, code| metrics.sum("tideshift_controller_http_requests_total", &[("path", path), ("code", code)]);
    assert_eq!(answers("/v1/reports", "204"), Some(1.0));
    assert_eq!((answers("none", "404"), answers("/v1/policy", "400")), (Some(2.0), Some(1.0)));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_clients_get_an_answer_and_everybody_else_still_does() -> anyhow::Result<()> {
    let (_rig, controller) = start().await?;
    let address = controller.address();
    let long = "a".repeat(60_000);
    let deep = "[".repeat(100_000);
    let mut huge = report("p", "1", 1);
    huge["services"][0]["versions"][0]["ok"] = json!(MAX_COUNT);
    let mut more = report("p", "1", 1);
    more["services"][0]["versions"][0]["ok"] = json!(MAX_COUNT + 1);
    let negative = report("p", "2", 1).to_string().replace("\"ok\":1", "\"ok\":-1");
    let nameless = report("", "1", 1).to_string();
    let named_at_length = report(&"p".repeat(600), "1", 1).to_string();

    for (what, request, status) in [
        ("a body beyond 1 MiB", post(&controller, vec![b' '; (1 << 20) + 1]), 413),
        ("no JSON", post(&controller, "garbage"), 400),
        ("an empty body", post(&controller, ""), 400),
        ("bytes", post(&controller, vec![0xff; 4096]), 400),
        ("JSON as deep as it is long", post(&controller, deep), 400),
        ("another document", post(&controller, "{}"), 400),
        ("a negative count", post(&controller, negative), 400),
        ("an impossible count", post(&controller, more.to_string()), 400),
        ("no proxy", post(&controller, nameless), 400),
        ("a proxy of 600 bytes", post(&controller, named_at_length), 400),
        ("a revision beyond 64 bits", get(address, "/v1/policy?after=99999999999999999999"), 400),
        ("a revision that is none", get(address, "/v1/policy?after=-1"), 400),
        ("a field twice", get(address, "/v1/policy?after=1&after=2"), 400),
        ("percent signs", get(address, "/v1/policy?epoch=%ff%zz%&proxy=%00"), 200),
        ("6,000 bytes of epoch", get(address, &format!("/v1/policy?epoch={}", &long[..6_000])), 200),
        ("6,000 bytes of path", get(address, &format!("/{}", &long[..6_000])), 404),
        ("60,000 bytes of epoch", get(address, &format!("/v1/policy?epoch={long}")), 431),
        ("60,000 bytes of path", get(address, &format!("/{long}")), 431),
        ("a path out of the house", get(address, "/v1/../../etc/passwd"), 404),
    ] {
        let answer = request.send().await.with_context(|| what.to_owned())?;
        assert_eq!(answer.status, status, "{what}: {}", answer.text());
        answers_polls(address).await.with_context(|| format!("after {what}"))?;
    }
    // The largest counts there are neither wrap round nor keep others from being counted.
    for (proxy, start) in [("p", "3"), ("q", "1")] {
        (huge["proxy"], huge["start"]) = (json!(proxy), json!(start));
        assert_eq!(post(&controller, huge.to_string()).send().await?.status, 204);
    }
    assert_eq!(Seen::now(&controller).await?.count("v1", "ok"), 2 * MAX_COUNT);
    openmetrics::read(&in_openmetrics(&controller).await?.text())?;

    // Requests that never end, and bytes that are none.
    let mut open = Vec::new();
    for bytes in [&b"G"[..], b"GET /v1/policy HTTP/1.1\r\nx: ", b"\x16\x03\x01\x02\x00\x01", b"\r\n\r\n\r\n", b""] {
        for _ in 0..60 {
            let mut connection = Connection::open(address).await?;
            connection.write(bytes).await?;
            open.push(connection);
        }
    }
    for _ in 0..100 {
        open.push(open_poll(&controller).await?);
        open.push(post(&controller, report("p", "4", 1).to_string()).begin().await?);
    }
    let took = answers_polls(address).await?;
    println!("a poll beside {} connections of all kinds took {} ms", open.len(), took.as_millis());
    until(&controller, "the status", |seen| {
        ensure!(seen.weights() == [80.0, 20.0]);
        Ok(())
    })
    .await?;
    // All of them at once.
    for connection in open {
        connection.reset()?;
    }
    answers_polls(address).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_state_folder_that_is_removed_is_made_again_and_stays_its_own() -> anyhow::Result<()> {
    let (rig, mut controller) = start().await?;
    post(&controller, report("p", "1", 5).to_string()).send().await?;
    let before = Seen::now(&controller).await?;
    fs::remove_dir_all(rig.state_dir())?;
    eventually("the state to be written again", DEADLINE, async || {
        for name in ["rollouts.json", "counts.json"] {
            let _: Value = serde_json::from_slice(&fs::read(rig.state_dir().join(name))?)?;
        }
        Ok(())
    })
    .await?;
    // It is locked as it was before.
    let second = serve(&rig.file(), &["--listen", "127.0.0.1:0"])?;
    assert!(second.code == Some(1) && second.stderr.contains("in use by another tideshift serve"), "{second:?}");
    answers_polls(controller.address()).await?;
    controller.kill()?;
    controller.start_again().await?;
    let after = Seen::now(&controller).await?;
    assert_eq!(
        (&after.0["epoch"], after.revision(), after.step()),
        (&before.0["epoch"], before.revision(), before.step())
    );
    assert_eq!(after.count("v1", "ok"), 5);
    Ok(())
}
