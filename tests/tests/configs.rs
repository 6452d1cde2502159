//! What users copy from `envoy-configs/` works as it stands.

use anyhow::{Context as _, ensure};
use std::{fs, path::PathBuf};
use tideshift_tests::{artifacts, controller, envoy::Envoy};

fn configs() -> PathBuf {
    artifacts::workspace().join("envoy-configs")
}

/// A bootstrap, with the module at its absolute path.
fn bootstrap(name: &str) -> anyhow::Result<String> {
    let text = fs::read_to_string(configs().join(name)).with_context(|| name.to_owned())?;
    ensure!(text.contains("filename: target/tideshift.wasm"), "{name} does not load the module");
    Ok(text.replace("target/tideshift.wasm", &artifacts::wasm()?.to_string_lossy()))
}

#[test]
fn envoy_takes_every_bootstrap() -> anyhow::Result<()> {
    for name in ["static.yaml", "envoy.yaml"] {
        Envoy::validate(&bootstrap(name)?).with_context(|| name.to_owned())?;
    }
    Ok(())
}

#[test]
fn the_document_is_valid_and_its_bootstrap_is_what_render_prints() -> anyhow::Result<()> {
    let document = configs().join("checkout.yaml");
    let valid = controller::cli(["validate".as_ref(), "-f".as_ref(), document.as_os_str()])?;
    ensure!(valid.code == Some(0), "{}", valid.stderr);
    let rendered = controller::cli(["render".as_ref(), "envoy".as_ref(), "-f".as_ref(), document.as_os_str()])?;
    let committed = fs::read_to_string(configs().join("envoy.yaml"))?;
    ensure!(rendered.stdout == committed, "envoy-configs/envoy.yaml is not what `tideshift render envoy` prints now");
    Ok(())
}

#[test]
fn the_readme_shows_the_document_of_its_tutorial() -> anyhow::Result<()> {
    let readme = fs::read_to_string(artifacts::workspace().join("README.md"))?;
    let document = fs::read_to_string(configs().join("quick-start/shift.yaml"))?;
    ensure!(readme.contains(&format!("```yaml\n{document}```")), "README.md does not show quick-start/shift.yaml");
    let path = configs().join("quick-start/shift.yaml").display().to_string();
    let rendered =
        controller::cli(["render", "envoy", "-f", &path, "--module", &artifacts::wasm()?.to_string_lossy()])?;
    ensure!(rendered.code == Some(0), "{}", rendered.stderr);
    Envoy::validate(&rendered.stdout)
}

/// The examples for Kubernetes, and how `tideshift render` comes to print them.
const RENDERED: [(&str, &[&str]); 5] = [
    ("istio-gateway.yaml", &["istio"]),
    ("istio-sidecar.yaml", &["istio", "--for", "sidecar"]),
    ("istio-waypoint.yaml", &["istio", "--for", "waypoint"]),
    ("envoy-gateway.yaml", &["envoy-gateway"]),
    ("httproute.yaml", &["httproute"]),
];

#[test]
fn the_examples_for_kubernetes_are_what_render_prints() -> anyhow::Result<()> {
    let folder = configs().join("kubernetes");
    let document = folder.join("payment.yaml").display().to_string();
    for (name, target) in RENDERED {
        let rendered = controller::cli(["render"].iter().chain(target).chain(&["-f", document.as_str()]))?;
        ensure!(rendered.code == Some(0), "{name}: {}", rendered.stderr);
        let committed = fs::read_to_string(folder.join(name))?;
        let how = target.join(" ");
        ensure!(rendered.stdout == committed, "{name} is not what `tideshift render {how} -f payment.yaml` prints now");
    }
    Ok(())
}
