//! Replicas that speak TLS hand requests on to the one that leads, by a certificate that names a Service and no address.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use serde_json::json;
use tideshift_tests::artifacts;
use tideshift_tests::client::{Connection, Request};
use tideshift_tests::controller::{Output, cli};
use tideshift_tests::envoy_fixture::DEADLINE;
use tideshift_tests::kubernetes::apiserver::ApiServer;
use tideshift_tests::ports::Port;
use tideshift_tests::process::Process;
use tideshift_tests::wait::eventually;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

const TOKEN: &str = "0123456789abcdef";

/// `tideshift status` of one replica, called by the name in its certificate.
async fn status(folder: &Path, port: &Port) -> anyhow::Result<Output> {
    let (server, path) =
        (format!("https://localhost:{}", port.number()), |name: &str| folder.join(name).display().to_string());
    let arguments = ["status".to_owned(), "--server".to_owned(), server, "--ca-file".to_owned(), path("ca.pem")];
    let arguments = arguments.into_iter().chain(["--token-file".to_owned(), path("token")]).collect::<Vec<_>>();
    tokio::task::spawn_blocking(move || cli(&arguments)).await?
}

/// The status that a report of a proxy has, by a client with the certificate of that name.
async fn report(folder: &Path, port: &Port, certificate: &str, proxy: &str) -> anyhow::Result<u16> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(folder.join("ca.pem"))?)?;
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let config = config.with_safe_default_protocol_versions()?.with_root_certificates(roots);
    let own = CertificateDer::from_pem_file(folder.join(format!("{certificate}.pem")))?;
    let key = PrivateKeyDer::from_pem_file(folder.join(format!("{certificate}.key")))?;
    let connector = TlsConnector::from(Arc::new(config.with_client_auth_cert(vec![own], key)?));
    let stream =
        connector.connect(ServerName::try_from("localhost")?, TcpStream::connect(port.address()).await?).await?;
    let report = json!({ "proxy": proxy, "start": "1", "revision": 0, "services": [] }).to_string();
    let request = Request::new(port.address(), "POST", "/v1/reports").header("content-type", "application/json");
    Ok(Connection::over(stream).send(&request.body(report)).await?.status)
}

/// A replica with the certificate of that name.
fn replica(server: &ApiServer, folder: &Path, name: &str, port: &Port, certificate: &str) -> anyhow::Result<Process> {
    let mut command = Command::new(artifacts::tideshift()?);
    command.args(["serve", "--kubernetes", "--pod-namespace", "tideshift-system", "--pod-name", name]);
    command.arg("--listen").arg(port.address().to_string()).arg("--operate-token-file").arg(folder.join("token"));
    command.arg("--tls-cert").arg(folder.join(format!("{certificate}.pem")));
    command.arg("--tls-client-ca").arg(folder.join("ca.pem"));
    command.arg("--tls-key").arg(folder.join(format!("{certificate}.key"))).env("KUBECONFIG", server.kubeconfig()?);
    Process::start(name, command, &folder.join(format!("{name}.log")))
}

#[tokio::test]
async fn replicas_know_each_other_by_having_the_same_certificate() -> anyhow::Result<()> {
    let (server, folder) = (ApiServer::start().await?, tempfile::tempdir()?);
    let path = folder.path();
    let crd = fs::read_to_string(artifacts::workspace().join("envoy-configs/kubernetes/crd.yaml"))?;
    server.create(serde_saphyr::from_str(&crd)?)?;
    server.create(json!({
        "apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift", "metadata": {"name": "payment", "namespace": "shop"},
        "spec": {"versions": [{"name": "v1", "service": "payment"}], "stable": "v1"},
    }))?;
    let mut authority = CertificateParams::new(Vec::new())?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate()?;
    fs::write(path.join("ca.pem"), authority.self_signed(&key)?.pem())?;
    fs::write(path.join("token"), TOKEN)?;
    let issuer = Issuer::new(authority, key);
    for name in ["own", "other"] {
        let mut params = CertificateParams::new(["tideshift.tideshift-system.svc".to_owned(), "localhost".to_owned()])?;
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate()?;
        fs::write(path.join(format!("{name}.pem")), params.signed_by(&key, &issuer)?.pem())?;
        fs::write(path.join(format!("{name}.key")), key.serialize_pem())?;
    }

    let (first, second, third) = (Port::reserve()?, Port::reserve()?, Port::reserve()?);
    let _leader = replica(&server, path, "leader", &first, "own")?;
    let says_payment = async |port: &Port| {
        let said = status(path, port).await?;
        ensure!(said.code == Some(0) && said.stdout.contains("payment.shop"), "{said:?}");
        Ok(())
    };
    eventually("the first one to lead", DEADLINE, async || says_payment(&first).await).await?;
    let _follower = replica(&server, path, "follower", &second, "own")?;
    eventually("the second one to hand on", DEADLINE, async || says_payment(&second).await).await?;
    let lease = server.get("leases", "tideshift-system", "tideshift")?;
    assert_eq!(lease["spec"]["holderIdentity"], "leader");
    // A proxy's certificate counts at every replica, and for itself alone.
    for port in [&first, &second] {
        assert_eq!(report(path, port, "other", "other").await?, 204);
        assert_eq!(report(path, port, "other", "another").await?, 403);
        assert_eq!(report(path, port, "own", "other").await?, 401, "a replica is no proxy");
    }

    // Of the same issuer, and with the same names.
    let _stranger = replica(&server, path, "stranger", &third, "other")?;
    eventually("the third one to refuse", DEADLINE, async || {
        let said = status(path, &third).await?;
        ensure!(said.code == Some(1) && said.stderr.contains("its certificate is not the one in"), "{said:?}");
        Ok(())
    })
    .await
    .context("a leader with another certificate")
}
