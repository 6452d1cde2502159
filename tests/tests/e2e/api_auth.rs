//! Who may ask the controller: tokens and their files, TLS and its files, clients that are slow, large or a web page of
//! somebody else.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};
use serde_json::{Value, json};
use tempfile::TempDir;
use tideshift_tests::client::{Connection, Request, get};
use tideshift_tests::controller::{Controller, cli};
use tideshift_tests::ports::Port;
use tideshift_tests::process::Process;
use tideshift_tests::test_bed::{DEADLINE, TestBed};
use tideshift_tests::wait::eventually;
use tideshift_tests::{artifacts, envoy};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

const READ: &str = "read-token-of-the-test";
const OPERATE: &str = "operate-token-of-the-test";
const PROXY: &str = "proxy-token-of-the-test";

/// Files with a token each, and the arguments that name them.
struct Tokens {
    directory: TempDir,
}

impl Tokens {
    fn new() -> anyhow::Result<Self> {
        let tokens = Self { directory: tempfile::tempdir()? };
        for (name, token) in [("read", READ), ("operate", OPERATE), ("proxy", PROXY)] {
            tokens.write(name, token)?;
        }
        Ok(tokens)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> anyhow::Result<()> {
        fs::write(self.path(name), text).context("cannot write tokens")
    }

    fn arguments(&self) -> Vec<String> {
        let of = |name| [format!("--{name}-token-file"), self.path(name).display().to_string()];
        ["read", "operate", "proxy"].into_iter().flat_map(of).collect()
    }
}

fn strs(arguments: &[String]) -> Vec<&str> {
    arguments.iter().map(String::as_str).collect()
}

async fn rig() -> anyhow::Result<TestBed> {
    let rig = TestBed::new(&[("v1", 1)]).await?;
    rig.write(&rig.document(json!({})))?;
    Ok(rig)
}

fn with_token(request: Request, token: &str) -> Request {
    match token {
        "" => request,
        token => request.header("authorization", format!("Bearer {token}")),
    }
}

fn report(address: SocketAddr) -> Request {
    report_of(address, "p")
}

fn report_of(address: SocketAddr, proxy: &str) -> Request {
    let report = json!({ "proxy": proxy, "start": "1", "revision": 0, "services": [] });
    Request::new(address, "POST", "/v1/reports").header("content-type", "application/json").body(report.to_string())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_opens_what_it_is_for() -> anyhow::Result<()> {
    let (rig, tokens) = (rig().await?, Tokens::new()?);
    let controller = Controller::start_with(&[&rig.file()], &strs(&tokens.arguments())).await?;
    let address = controller.address();
    for (request, with_none, with_read, with_operate, with_proxy) in [
        (get(address, "/healthz"), 200, 200, 200, 200),
        (get(address, "/readyz"), 200, 200, 200, 200),
        (get(address, "/metrics"), 401, 200, 200, 403),
        (get(address, "/v1/status"), 401, 200, 200, 403),
        (get(address, "/v1/policy"), 401, 403, 200, 200),
        (report(address), 401, 403, 403, 204),
        (get(address, "/v1/nothing"), 404, 404, 404, 404),
    ] {
        for (token, status) in [
            ("", with_none),
            (READ, with_read),
            (OPERATE, with_operate),
            (PROXY, with_proxy),
            ("no-such-token-here", with_none),
        ] {
            let answer = with_token(request.clone(), token).send().await?;
            ensure!(answer.status == status, "{request:?} with {token:?}: {} {}", answer.status, answer.text());
            let challenged = answer.header("www-authenticate").is_some_and(|c| c.starts_with("Bearer "));
            ensure!(challenged == matches!(status, 401 | 403), "{answer:?}");
            let is_told = answer.json().is_ok_and(|json| json["error"].is_string());
            ensure!(is_told == (status >= 400), "{}", answer.text());
        }
    }
    // The body of an unauthorised request is not read: no need to wait for its end.
    let mut begun = Request::new(address, "POST", "/v1/reports").header("content-length", "1000000").begin().await?;
    assert_eq!(timeout(Duration::from_secs(5), begun.read(true)).await??.status, 401);
    let log = controller.log();
    assert!(![READ, OPERATE, PROXY].iter().any(|token| log.contains(token)), "a token is in the log:\n{log}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_are_changed_while_it_runs() -> anyhow::Result<()> {
    const NEW: &str = "a-new-token-for-reading";
    let (rig, tokens) = (rig().await?, Tokens::new()?);
    let controller = Controller::start_with(&[&rig.file()], &strs(&tokens.arguments())).await?;
    let status =
        async |token: &str| anyhow::Ok(with_token(get(controller.address(), "/v1/status"), token).send().await?.status);
    let until = async |what: &str, old: u16, new: u16| {
        eventually(what, DEADLINE, async || {
            let got = (status(READ).await?, status(NEW).await?);
            ensure!(got == (old, new), "{got:?}");
            Ok(())
        })
        .await
    };
    until("the old token only", 200, 401).await?;
    tokens.write("read", &format!("{READ}\n{NEW}\n"))?;
    until("both", 200, 200).await?;
    tokens.write("read", NEW)?;
    until("the new one only", 401, 200).await?;
    // A mistake in a token file neither locks users out nor lets others in.
    tokens.write("read", "hunter2")?;
    eventually("the mistake to be told", DEADLINE, async || {
        ensure!(
            controller.log().contains("line 1: a token is 16 to 512 visible ASCII characters; the tokens from before")
        );
        Ok(())
    })
    .await?;
    assert!(!controller.log().contains("hunter2"), "not what is in the file");
    assert_eq!((status(READ).await?, status(NEW).await?, status(OPERATE).await?), (401, 200, 200));
    let log = controller.log();
    assert_eq!(log.matches("tokens were read again").count(), 2, "{log}");
    assert!(log.lines().last().is_some_and(|last| last.contains("the tokens from before")), "{log}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_line_is_let_in_by_a_file_or_the_environment() -> anyhow::Result<()> {
    let (rig, tokens) = (rig().await?, Tokens::new()?);
    let controller = Controller::start_with(&[&rig.file()], &strs(&tokens.arguments())).await?;
    let server = format!("http://{}", controller.address());
    let run = |command: &str, file: Option<&str>, variable: Option<&str>| {
        let mut process = Command::new(artifacts::tideshift()?);
        process.args([command, "--server", &server]).env_remove("TIDESHIFT_TOKEN").env_remove("TIDESHIFT_TOKEN_FILE");
        file.map(|name| process.arg("--token-file").arg(tokens.path(name)));
        variable.map(|token| process.env("TIDESHIFT_TOKEN", token));
        let output = process.output()?;
        anyhow::Ok((output.status.code(), String::from_utf8(output.stderr)?))
    };
    assert_eq!(run("status", Some("read"), None)?, (Some(0), String::new()));
    assert_eq!(run("status", None, Some(OPERATE))?, (Some(0), String::new()));
    let none = "a token is needed here: `authorization: Bearer TOKEN`; see --token-file\n";
    assert_eq!(run("status", None, None)?, (Some(5), format!("error: {server}/v1/status: {none}")));
    let path = "/v1/policy?after=0&epoch=&delta=true";
    let wrong = "a token for proxy or operate is needed here; this one is for read; see --token-file\n";
    assert_eq!(run("explain", Some("read"), None)?, (Some(5), format!("error: {server}{path}: {wrong}")));
    assert_eq!(run("explain", Some("operate"), None)?.0, Some(0));
    let absent = run("status", Some("absent"), None)?;
    assert_eq!(absent.0, Some(2));
    assert!(absent.1.ends_with("absent: no such file or directory\n"), "{}", absent.1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_tokens_any_address_may_be_listened_on_and_mistakes_are_told_at_the_start() -> anyhow::Result<()> {
    let (rig, tokens) = (rig().await?, Tokens::new()?);
    let port = Port::reserve()?;
    let any = format!("0.0.0.0:{}", port.number());
    let file = rig.file();
    let file = file.to_string_lossy();
    let log = rig.path("log");
    let mut command = Command::new(artifacts::tideshift()?);
    command.args(["serve", "-f", &file, "--listen", &any]).args(tokens.arguments());
    let mut process = Process::start("the controller", command, &log)?;
    process
        .until_ready(DEADLINE, async || {
            ensure!(get(port.address(), "/readyz").send().await?.status == 200);
            Ok(())
        })
        .await?;
    assert_eq!(get(port.address(), "/v1/status").send().await?.status, 401);
    // By whatever name, as a token says more than a name.
    let answer = with_token(get(port.address(), "/v1/status").host("tideshift.example"), READ).send().await?;
    assert_eq!(answer.status, 200);
    assert!(process.log().contains("travel in clear text"), "{}", process.log());
    process.kill()?;

    tokens.write("short", "hunter2")?;
    let short = tokens.path("short").display().to_string();
    for (arguments, why) in [
        (vec!["--read-token-file", "/absent"], "--read-token-file /absent: cannot be read: no such file or directory"),
        (vec!["--proxy-token-file", &short], "line 1: a token is 16 to 512 visible ASCII characters"),
        (vec!["--tls-cert", &short], "--tls-key"),
        (vec!["--tls-cert", &short, "--tls-key", &short], "no certificate in it; expected PEM"),
        (vec!["--tls-cert", "/absent", "--tls-key", &short], "--tls-cert /absent: cannot be read: no such file"),
    ] {
        let output = cli(["serve", "-f", &file].iter().chain(&arguments))?;
        ensure!(output.code == Some(2) && output.stderr.contains(why), "{arguments:?}: {output:?}");
        ensure!(!output.stderr.contains("hunter2"), "{output:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_tokens_a_web_page_of_somebody_else_is_refused() -> anyhow::Result<()> {
    let rig = rig().await?;
    let controller = Controller::start(&[&rig.file()]).await?;
    let address = controller.address();
    let status = async |request: Request| anyhow::Ok(request.send().await?.status);
    let own = format!("http://{address}");
    for (what, request, expected) in [
        ("curl", get(address, "/v1/status"), 200),
        ("a page of ours", get(address, "/v1/status").header("origin", &own), 200),
        ("a proxy", get(address, "/v1/policy").host("tideshift-controller"), 200),
        ("a name that leads here", get(address, "/v1/status").host("evil.example"), 403),
        ("the same for what proxies ask", get(address, "/v1/policy").host("evil.example:7460"), 403),
        ("a page of another site", get(address, "/v1/status").header("origin", "http://evil.example"), 403),
        ("a report", report(address), 204),
        ("a report of a page", report(address).header("origin", "http://evil.example"), 403),
        ("a report by that name", report(address).host("evil.example"), 403),
        ("a form", Request::new(address, "POST", "/v1/reports").header("content-type", "text/plain").body("{}"), 415),
        (
            "a question of a browser",
            Request::new(address, "OPTIONS", "/v1/reports").header("origin", "http://x.example"),
            405,
        ),
    ] {
        assert_eq!(status(request).await?, expected, "{what}");
    }
    let answer = get(address, "/v1/status").send().await?;
    assert_eq!(answer.header("access-control-allow-origin"), None);
    assert_eq!(answer.header("cache-control").as_deref(), Some("no-store"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_is_too_large_or_too_slow_is_sent_away() -> anyhow::Result<()> {
    let (rig, tokens, authority) = (rig().await?, Tokens::new()?, Authority::new()?);
    let controller = Controller::start_with(&[&rig.file()], &strs(&tokens.arguments())).await?;
    let address = controller.address();
    let many: String = (0..200).map(|i| format!("x-{i}: 1\r\n")).collect();
    let mut connection = Connection::open(address).await?;
    connection.write(format!("GET /healthz HTTP/1.1\r\nhost: a\r\n{many}\r\n").as_bytes()).await?;
    assert_eq!(connection.read(true).await?.status, 431, "200 headers");
    let long = get(address, "/healthz").header("x-long", "a".repeat(20_000));
    assert_eq!(long.send().await?.status, 431, "a head of 20,000 bytes");
    let large = Request::new(address, "POST", "/v1/reports").header("content-type", "application/json");
    let large = with_token(large, PROXY).body(vec![b' '; (1 << 20) + 1]).send().await?;
    assert_eq!((large.status, large.json()?["error"].is_string()), (413, true));

    let tls = Tls::start(&rig, &authority, &[]).await?;
    let slow = async |address: SocketAddr, bytes: String, most: u64, answer: &str| {
        let begun = Instant::now();
        let mut connection = TcpStream::connect(address).await?;
        connection.write_all(bytes.as_bytes()).await?;
        let mut got = Vec::new();
        timeout(DEADLINE, connection.read_to_end(&mut got)).await.context("it is never closed")??;
        let (got, took) = (String::from_utf8_lossy(&got), begun.elapsed());
        ensure!(got.starts_with(answer) && got.is_empty() == answer.is_empty(), "{bytes:?}: {got:?}");
        ensure!(took < Duration::from_secs(most), "{bytes:?}: {took:?}");
        anyhow::Ok(took)
    };
    let half = format!(
        "POST /v1/reports HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {PROXY}\r\ncontent-type: application/json\r\n\
         content-length: 100\r\n\r\n{{"
    );
    let took = tokio::try_join!(
        slow(address, "GET /v1/status HTTP/1.1\r\nhost: a\r\nx".to_owned(), 12, ""),
        slow(address, String::new(), 12, ""),
        slow(address, half, 25, "HTTP/1.1 408 "),
        slow(tls.address(), String::new(), 12, ""),
        slow(tls.address(), "\u{16}\u{3}\u{1}\u{2}".to_owned(), 12, ""),
    )?;
    println!("closed after {took:?}");
    assert_eq!(get(address, "/healthz").send().await?.status, 200);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_with_a_certificate_that_is_changed_while_it_runs() -> anyhow::Result<()> {
    let (rig, tokens, authority) = (rig().await?, Tokens::new()?, Authority::new()?);
    let mut tls = Tls::start(&rig, &authority, &tokens.arguments()).await?;
    let mut open = tls.connect().await?;
    let first = certificate(&open)?;
    let status = with_token(get(tls.address(), "/v1/status"), READ);
    assert_eq!(open.send(&status).await?.status, 200);
    let plain = get(tls.address(), "/healthz").send().await;
    assert!(plain.is_err(), "it answers without TLS: {plain:?}");

    // A certificate without its key is left aside, until the key comes.
    let (certificate_pem, key_pem) = authority.issue()?;
    fs::write(&tls.cert, certificate_pem)?;
    eventually("the mistake to be told", DEADLINE, async || {
        ensure!(tls.process.log().contains("the certificate from before stays"), "{}", tls.process.tail());
        Ok(())
    })
    .await?;
    assert_eq!(certificate(&tls.connect().await?)?, first);
    fs::write(&tls.key, key_pem)?;
    eventually("the new certificate", DEADLINE, async || {
        ensure!(certificate(&tls.connect().await?)? != first, "the first one still");
        Ok(())
    })
    .await?;
    assert_eq!(open.send(&status).await?.status, 200, "the connection from before");

    let (server, ca, token) = (format!("https://{}", tls.address()), authority.file()?, tokens.path("read"));
    let arguments = ["status", "--server", &server, "--token-file", &token.to_string_lossy()].map(str::to_owned);
    let trusted = cli(arguments.iter().map(String::as_str).chain(["--ca-file", &ca.to_string_lossy()]))?;
    assert_eq!((trusted.code, trusted.stderr.as_str()), (Some(0), ""));
    let strange = cli(arguments.iter().map(String::as_str))?;
    assert!(strange.code == Some(1) && strange.stderr.contains("UnknownIssuer"), "{strange:?}");
    assert_eq!(tls.process.terminate(DEADLINE).await?.code(), Some(0));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_envoy_gets_its_policy_by_tls_and_with_a_token() -> anyhow::Result<()> {
    let (rig, tokens, authority) = (rig().await?, Tokens::new()?, Authority::new()?);
    let tls = Tls::start(&rig, &authority, &tokens.arguments()).await?;
    let (listen, admin) = (Port::reserve()?, Port::reserve()?);
    let render = |further: &[&str]| {
        let arguments = [
            "render",
            "envoy",
            "-f",
            &rig.file().to_string_lossy(),
            "--listen",
            &listen.address().to_string(),
            "--admin",
            &admin.address().to_string(),
            "--controller",
            &tls.address().to_string(),
            "--module",
            &artifacts::wasm()?.to_string_lossy(),
        ]
        .map(str::to_owned);
        let output = cli(arguments.iter().map(String::as_str).chain(further.iter().copied()))?;
        ensure!(output.code == Some(0), "{output:?}");
        anyhow::Ok(output.stdout)
    };
    let (token, ca) = (tokens.path("proxy").display().to_string(), authority.file()?.display().to_string());
    let bootstrap = render(&["--controller-token-file", &token, "--controller-ca-file", &ca])?;
    let envoy = envoy::Options::new(bootstrap, admin.number()).concurrency(1).start().await?;
    eventually("the proxy to run the policy", DEADLINE, async || {
        let mut connection = tls.connect().await?;
        let answer = connection.send(&with_token(get(tls.address(), "/v1/status"), READ)).await?;
        let status: Value = answer.json()?;
        ensure!(!status["proxies"].as_array().context("no proxies")?.is_empty(), "no proxy yet");
        ensure!(status["proxies"][0]["revision"] == status["revision"], "{}", status["proxies"]);
        Ok(())
    })
    .await
    .with_context(|| envoy.tail())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_is_known_by_its_certificate_and_speaks_for_itself() -> anyhow::Result<()> {
    let (rig, tokens, authority) = (rig().await?, Tokens::new()?, Authority::new()?);
    let (proxies, strangers) = (Authority::new()?, Authority::new()?);
    tokens.write("proxy", &format!("{PROXY}\nedge-2 - nothing-of-this\n"))?;
    let file = rig.path("clients.pem");
    fs::copy(proxies.file()?, &file)?;
    let further = [tokens.arguments(), vec!["--tls-client-ca".to_owned(), file.display().to_string()]].concat();
    let tls = Tls::start(&rig, &authority, &further).await?;
    let address = tls.address();
    let uri = "spiffe://example.com/edge-1";
    let edge = authority.client_with(&proxies, &["edge-1", "edge-1.example.com", uri])?;
    let other = authority.client_with(&proxies, &["edge-2"])?;
    let stranger = authority.client_with(&strangers, &["edge-1"])?;
    let ask = async |client: &Arc<ClientConfig>, request: Request| {
        anyhow::Ok(handshake(address, client).await?.send(&request).await?)
    };
    let policy = |proxy: &str| get(address, &format!("/v1/policy?proxy={proxy}"));
    for (client, request, status) in [
        (&edge, report_of(address, "edge-1"), 204),
        (&edge, report_of(address, "edge-1.example.com"), 204),
        (&edge, report_of(address, uri), 204),
        (&edge, report_of(address, "edge-2"), 403),
        (&edge, policy("edge-1"), 200),
        (&edge, policy("edge-2"), 403),
        // It opens nothing else, and a token goes before it.
        (&edge, get(address, "/v1/status"), 401),
        (&edge, get(address, "/metrics"), 401),
        (&edge, with_token(get(address, "/v1/status"), READ), 200),
        (&edge, with_token(report_of(address, "edge-1"), "no-such-token-here"), 401),
        // Who hands a request on is believed if that is a replica, by the controller's own certificate.
        (
            &edge,
            report_of(address, "edge-2")
                .header("x-tideshift-handed-on", "1")
                .header("x-tideshift-handed-on-name", "edge-2"),
            403,
        ),
        (&tls.client, report_of(address, "edge-1"), 401),
        (&tls.client, with_token(report_of(address, "edge-1"), PROXY), 204),
    ] {
        let answer = ask(client, request.clone()).await?;
        ensure!(answer.status == status, "{request:?}: {} {}", answer.status, answer.text());
    }
    let services = async |client: &Arc<ClientConfig>, proxy: &str| {
        let policy: Value = ask(client, policy(proxy)).await?.json()?;
        anyhow::Ok(policy["services"].as_array().map_or(0, Vec::len))
    };
    assert_eq!((services(&edge, "edge-1").await?, services(&other, "edge-2").await?), (1, 0), "a line limits edge-2");
    assert!(ask(&stranger, report_of(address, "edge-1")).await.is_err(), "of another authority");

    // The authority is changed while it runs.
    fs::copy(strangers.file()?, &file)?;
    eventually("the other authority to count", DEADLINE, async || {
        let answer = ask(&stranger, report_of(address, "edge-1")).await?;
        ensure!(answer.status == 204, "{}", answer.status);
        Ok(())
    })
    .await?;
    assert!(ask(&edge, report_of(address, "edge-1")).await.is_err());
    Ok(())
}

/// Who issues certificates for 127.0.0.1 and localhost.
struct Authority {
    directory: TempDir,
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
}

impl Authority {
    fn new() -> anyhow::Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?;
        let directory = tempfile::tempdir()?;
        fs::write(directory.path().join("ca.pem"), certificate.pem())?;
        Ok(Self { directory, certificate: certificate.der().clone(), issuer: Issuer::new(params, key) })
    }

    fn file(&self) -> anyhow::Result<PathBuf> {
        Ok(self.directory.path().join("ca.pem"))
    }

    /// A certificate and its key, in PEM.
    fn issue(&self) -> anyhow::Result<(String, String)> {
        let mut params = CertificateParams::new(["127.0.0.1".to_owned(), "localhost".to_owned()])?;
        // Not the issuer's, or it would look like a certificate that signs itself.
        params.distinguished_name.push(DnType::CommonName, "the controller");
        let key = KeyPair::generate()?;
        Ok((params.signed_by(&key, &self.issuer)?.pem(), key.serialize_pem()))
    }

    fn client(&self) -> anyhow::Result<Arc<ClientConfig>> {
        self.client_showing(None)
    }

    /// A client with a certificate of another authority: the common name first, then DNS names and URIs.
    fn client_with(&self, issuer: &Self, names: &[&str]) -> anyhow::Result<Arc<ClientConfig>> {
        let mut params = CertificateParams::new(Vec::new())?;
        let (common, others) = names.split_first().context("no name")?;
        params.distinguished_name.push(DnType::CommonName, *common);
        for name in others {
            let name = if name.contains("://") {
                SanType::URI((*name).try_into()?)
            } else {
                SanType::DnsName((*name).try_into()?)
            };
            params.subject_alt_names.push(name);
        }
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &issuer.issuer)?.der().clone();
        let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;
        self.client_showing(Some((certificate, key)))
    }

    fn client_showing(
        &self,
        own: Option<(CertificateDer<'static>, PrivateKeyDer<'static>)>,
    ) -> anyhow::Result<Arc<ClientConfig>> {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.clone())?;
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let config = config.with_safe_default_protocol_versions()?.with_root_certificates(roots);
        Ok(Arc::new(match own {
            Some((certificate, key)) => config.with_client_auth_cert(vec![certificate], key)?,
            None => config.with_no_client_auth(),
        }))
    }
}

/// A controller that speaks TLS.
struct Tls {
    process: Process,
    port: Port,
    client: Arc<ClientConfig>,
    cert: PathBuf,
    key: PathBuf,
}

impl Tls {
    async fn start(rig: &TestBed, authority: &Authority, further: &[String]) -> anyhow::Result<Self> {
        let port = Port::reserve()?;
        let (cert, key) = (rig.path("tls.crt"), rig.path("tls.key"));
        let (certificate_pem, key_pem) = authority.issue()?;
        fs::write(&cert, certificate_pem)?;
        fs::write(&key, key_pem)?;
        let mut command = Command::new(artifacts::tideshift()?);
        command.arg("serve").arg("-f").arg(rig.file()).arg("--listen").arg(port.address().to_string());
        command.arg("--state-dir").arg(rig.path("tls-state")).arg("--tls-cert").arg(&cert).arg("--tls-key").arg(&key);
        command.args(further);
        let process = Process::start("the controller", command, &rig.path("tls.log"))?;
        let mut tls = Self { process, port, client: authority.client()?, cert, key };
        let (address, client) = (tls.port.address(), tls.client.clone());
        let ready = tls.process.until_ready(DEADLINE, async || {
            let ready = handshake(address, &client).await?.send(&get(address, "/readyz")).await?;
            ensure!(ready.status == 200, "{}", ready.text());
            Ok(())
        });
        ready.await?;
        Ok(tls)
    }

    fn address(&self) -> SocketAddr {
        self.port.address()
    }

    async fn connect(&self) -> anyhow::Result<Connection<TlsStream<TcpStream>>> {
        handshake(self.address(), &self.client).await
    }
}

async fn handshake(
    address: SocketAddr,
    client: &Arc<ClientConfig>,
) -> anyhow::Result<Connection<TlsStream<TcpStream>>> {
    let stream = TcpStream::connect(address).await?;
    let connector = TlsConnector::from(client.clone());
    Ok(Connection::over(connector.connect(ServerName::from(address.ip()), stream).await?))
}

/// The certificate that the controller showed.
fn certificate(connection: &Connection<TlsStream<TcpStream>>) -> anyhow::Result<CertificateDer<'static>> {
    let shown = connection.stream().get_ref().1.peer_certificates().context("no certificate")?;
    Ok(shown.first().context("no certificate")?.clone())
}
