//! `kubectl tideshift`: the binary by another name reaches the controller through the API server, with its caller's rights.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Command, Output};

use anyhow::{Context as _, ensure};
use serde_json::json;
use tempfile::TempDir;
use tideshift_tests::artifacts;
use tideshift_tests::client::get;
use tideshift_tests::envoy_fixture::DEADLINE;
use tideshift_tests::kubernetes::apiserver::ApiServer;
use tideshift_tests::ports::Port;
use tideshift_tests::process::Process;

const TOKEN: &str = "token-to-operate";

/// The plugin, installed as a user would.
struct Plugin {
    folder: TempDir,
    kubeconfig: PathBuf,
}

impl Plugin {
    fn install(kubeconfig: PathBuf) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        symlink(artifacts::tideshift()?.canonicalize()?, folder.path().join("kubectl-tideshift"))?;
        Ok(Self { folder, kubeconfig })
    }

    async fn run(&self, arguments: &str) -> anyhow::Result<Output> {
        let mut command = Command::new(self.folder.path().join("kubectl-tideshift"));
        command.args(arguments.split(' ')).env("KUBECONFIG", &self.kubeconfig);
        for variable in ["TIDESHIFT_SERVER", "TIDESHIFT_TOKEN", "TIDESHIFT_TOKEN_FILE"] {
            command.env_remove(variable);
        }
        Ok(tokio::task::spawn_blocking(move || command.output()).await??)
    }

    /// What it prints when all is well.
    async fn says(&self, arguments: &str) -> anyhow::Result<String> {
        let output = self.run(arguments).await?;
        ensure!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Its exit code and what it complains of.
    async fn complains(&self, arguments: &str) -> anyhow::Result<(i32, String)> {
        let output = self.run(arguments).await?;
        let code = output.status.code().context("no exit code")?;
        ensure!(code != 0, "{arguments} went well");
        Ok((code, String::from_utf8(output.stderr)?))
    }
}

/// A controller with the rollouts payment.shop and payment.store, and its pod as the cluster has it.
struct Cluster {
    server: ApiServer,
    _controller: Process,
    _folder: TempDir,
}

impl Cluster {
    async fn start() -> anyhow::Result<Self> {
        let (server, port, folder) = (ApiServer::start().await?, Port::reserve()?, tempfile::tempdir()?);
        let crd = fs::read_to_string(artifacts::workspace().join("envoy-configs/kubernetes/crd.yaml"))?;
        server.create(serde_saphyr::from_str(&crd)?)?;
        for namespace in ["shop", "store"] {
            server.create(json!({
                "apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift",
                "metadata": {"name": "payment", "namespace": namespace},
                "spec": {
                    "hostnames": [format!("payment.{namespace}")],
                    "versions": [{"name": "v1", "service": "payment-v1"}, {"name": "v2", "service": "payment-v2"}],
                    "stable": "v1", "target": "v2", "strategy": {"steps": [{"pause": true}, {"weight": 100}]},
                },
            }))?;
        }
        server.create(json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "its-tokens", "namespace": "tideshift-system"},
            "stringData": {"operate": format!("{TOKEN}\n")},
        }))?;
        server.create(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": "tideshift-0", "namespace": "tideshift-system",
                "labels": {"app.kubernetes.io/name": "tideshift", "app.kubernetes.io/instance": "tideshift"},
                "annotations": {"tideshift.dev/test-port": port.number().to_string()},
            },
            "spec": {
                "containers": [{"name": "tideshift", "image": "tideshift", "args": ["serve", "--kubernetes"]}],
                "volumes": [{"name": "tokens", "secret": {"secretName": "its-tokens"}}],
            },
        }))?;
        server.patch_status(
            "pods",
            "tideshift-system",
            "tideshift-0",
            json!({"status": {
                "podIP": "127.0.0.1", "phase": "Running", "conditions": [{"type": "Ready", "status": "True"}],
            }}),
        )?;
        let token = folder.path().join("operate");
        fs::write(&token, TOKEN)?;
        let mut command = Command::new(artifacts::tideshift()?);
        command.args(["serve", "--kubernetes", "--pod-namespace", "tideshift-system", "--pod-name", "tideshift-0"]);
        command.arg("--listen").arg(port.address().to_string()).arg("--operate-token-file").arg(token);
        command.env("KUBECONFIG", server.kubeconfig()?);
        let mut controller = Process::start("the controller", command, &folder.path().join("log"))?;
        let ready = controller.until_ready(DEADLINE, async || {
            let status =
                get(port.address(), "/v1/status").header("authorization", format!("Bearer {TOKEN}")).send().await?;
            ensure!(status.text().contains("payment.store"), "{}", status.text());
            Ok(())
        });
        ready.await?;
        Ok(Self { server, _controller: controller, _folder: folder })
    }
}

#[tokio::test]
async fn it_calls_itself_what_users_call_it() -> anyhow::Result<()> {
    let plugin = Plugin::install(PathBuf::new())?;
    let help = plugin.says("--help").await?;
    ensure!(help.contains("Usage: kubectl tideshift <COMMAND>") && help.contains("kubectl tideshift status"), "{help}");
    let help = plugin.says("rollback --help").await?;
    ensure!(help.contains("Usage: kubectl tideshift rollback"), "{help}");
    ensure!(
        help.contains("\n  kubectl tideshift rollback --to v1") && help.contains("--controller-namespace"),
        "{help}"
    );
    let (code, complaint) = plugin.complains("rollback").await?;
    ensure!(code == 2 && complaint.contains("kubectl tideshift rollback --to"), "{complaint}");

    let own = tideshift_tests::controller::cli(["rollback", "--help"])?.stdout;
    ensure!(!own.contains("kubectl tideshift") && !own.contains("--namespace"), "{own}");
    Ok(())
}

#[tokio::test]
async fn rollouts_are_named_as_their_resources_are() -> anyhow::Result<()> {
    let cluster = Cluster::start().await?;
    let plugin = Plugin::install(cluster.server.kubeconfig()?)?;
    let all = plugin.says("status -A").await?;
    ensure!(all.contains("payment.shop:") && all.contains("payment.store:"), "{all}");
    let shop = plugin.says("status -n shop").await?;
    ensure!(shop.contains("payment.shop:") && !shop.contains("payment.store:"), "{shop}");
    for arguments in ["pause payment -n shop", "resume -n shop", "pause payment.shop", "resume payment.shop -n store"] {
        let said = plugin.says(arguments).await?;
        ensure!(said.starts_with("payment.shop: "), "{arguments}: {said}");
    }
    let answer = plugin.says("explain --service payment -n store").await?;
    ensure!(answer.contains("payment.store"), "{answer}");
    let (code, complaint) = plugin.complains("wait-drained payment v9 --namespace store").await?;
    ensure!(code == 2 && complaint.contains("payment.store"), "{complaint}");

    // The kubeconfig says `default` where it says nothing.
    let (code, complaint) = plugin.complains("promote").await?;
    ensure!(code == 2 && complaint.contains("no rollout in namespace default"), "{complaint}");
    let (_, complaint) = plugin.complains("promote payment").await?;
    ensure!(complaint.contains("payment.default"), "{complaint}");
    let mut kubeconfig: serde_json::Value = serde_json::from_str(&fs::read_to_string(cluster.server.kubeconfig()?)?)?;
    kubeconfig["contexts"][0]["context"]["namespace"] = "store".into();
    fs::write(&plugin.kubeconfig, kubeconfig.to_string())?;
    let said = plugin.says("pause payment").await?;
    ensure!(said.starts_with("payment.store: "), "{said}");
    Ok(())
}

#[tokio::test]
async fn it_has_its_callers_rights_and_says_which_are_missing() -> anyhow::Result<()> {
    let cluster = Cluster::start().await?;
    let plugin = Plugin::install(cluster.server.kubeconfig_of("alice")?)?;
    cluster.server.forbid(|attempt| attempt.user == "alice" && attempt.resource == "secrets");
    let (code, complaint) = plugin.complains("status").await?;
    ensure!(code == 5 && complaint.contains("--token-file"), "{code} {complaint}");
    let file = plugin.folder.path().join("token");
    fs::write(&file, TOKEN)?;
    ensure!(plugin.says(&format!("status -A --token-file {}", file.display())).await?.contains("payment.shop"));

    let (code, complaint) = plugin.complains("status --controller-namespace elsewhere").await?;
    ensure!(
        code == 1 && complaint.contains("elsewhere") && complaint.contains("--controller-namespace"),
        "{complaint}"
    );
    cluster.server.forbid(|attempt| attempt.user == "alice" && attempt.resource == "pods/portforward");
    let (code, complaint) = plugin.complains("status").await?;
    ensure!(code == 1 && complaint.contains("portforward"), "{complaint}");
    Ok(())
}
