//! The actors themselves against a real Envoy, without the filter: what the end-to-end tests rely on.

use std::time::Duration;

use anyhow::ensure;
use tideshift_tests::backend::{Backend, Mode};
use tideshift_tests::bootstrap::{AccessLog, Bootstrap, VERSION_HEADER};
use tideshift_tests::client::get;
use tideshift_tests::envoy::Envoy;
use tideshift_tests::load::{NOBODY, Plan};
use tideshift_tests::wait::eventually;

const SOON: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread")]
async fn routes_by_the_version_header_and_logs_what_happened() -> anyhow::Result<()> {
    let (v1, v2) = (Backend::start("v1").await?, Backend::start("v2").await?);
    let directory = tempfile::tempdir()?;
    let log = directory.path().join("access.log");
    let bootstrap = Bootstrap::without_filter()?
        .version("v1", &[v1.address()])
        .version("v2", &[v2.address()])
        .timeout(Duration::from_millis(300))
        .access_log(&log);
    let envoy = bootstrap.envoy()?.start().await?;
    let call = get(bootstrap.address(), "/");

    // The version, the status and Envoy's flags of each exchange, in order.
    let mut expected = Vec::new();
    let mut expect = |version: &str, status: u16, flags: &str| {
        expected.push((version.to_owned(), status, flags.to_owned()));
    };

    assert_eq!(call.send().await?.text(), "ok");
    expect("v1", 200, "-");
    let to_v2 = call.clone().header(VERSION_HEADER, "v2");
    for (mode, status, flags) in [(Mode::Answer, 200, "-"), (Mode::Reset, 503, "UC"), (Mode::Hang, 504, "UT")] {
        v2.set(|behaviour| behaviour.mode = mode);
        assert_eq!(to_v2.send().await?.status, status, "{mode:?}");
        expect("v2", status, flags);
    }
    v2.set(|behaviour| behaviour.mode = Mode::ResetInBody);
    assert!(to_v2.send().await.is_err());
    expect("v2", 200, "UPE");
    v2.stop().await;
    assert_eq!(to_v2.send().await?.status, 503);
    expect("v2", 503, "UF");
    v1.set(|behaviour| behaviour.mode = Mode::Hang);
    let before = v1.counts().requests;
    let gone = call.begin().await?;
    eventually("the request to reach v1", SOON, async || {
        ensure!(v1.counts().requests == before + 1);
        Ok(())
    })
    .await?;
    gone.reset()?;
    expect("v1", 0, "DC");

    eventually("the access log", SOON, async || {
        let lines = AccessLog::read(&log)?;
        let seen: Vec<_> = lines.into_iter().map(|line| (line.cluster, line.status, line.flags)).collect();
        ensure!(seen == expected, "{seen:?}");
        Ok(())
    })
    .await?;
    assert_eq!(envoy.stat("cluster.v2.upstream_rq_timeout").await?, 1);
    let requests = [("envoy_http_conn_manager_prefix", "tests")];
    assert_eq!(envoy.prometheus().await?.sum("envoy_http_downstream_rq_total", &requests), Some(7.0));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn load_and_backends_agree_on_every_request() -> anyhow::Result<()> {
    let v1 = Backend::start("v1").await?;
    let bootstrap = Bootstrap::without_filter()?.version("v1", &[v1.address()]);
    let _envoy = bootstrap.envoy()?.start().await?;
    let tally = Plan::new(bootstrap.address(), "any").connections(8).run(4_000).await?;
    assert_eq!((tally.sent, tally.of_class("v1", 2), tally.bad()), (4_000, 4_000, 0), "{:?}", tally.failures);
    assert_eq!(v1.counts().requests, 4_000);
    v1.stop().await;
    let tally = Plan::new(bootstrap.address(), "any").run(50).await?;
    assert_eq!((tally.of_class(NOBODY, 5), tally.failed), (50, 0));
    Ok(())
}

#[tokio::test]
async fn a_bad_bootstrap_is_refused_in_envoys_own_words() -> anyhow::Result<()> {
    Envoy::validate(&Bootstrap::without_filter()?.version("v1", &[]).to_json()?.to_string())?;
    let error = Envoy::validate("{static_resources: {listners: []}}").unwrap_err().to_string();
    assert!(error.contains("listners"), "{error}");
    Ok(())
}
