//! What users copy from `envoy-configs/` works as it stands.

use anyhow::{Context as _, ensure};
use std::fs;
use std::path::PathBuf;
use tideshift_tests::envoy::Envoy;
use tideshift_tests::{artifacts, controller};

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

#[test]
fn the_systemd_unit_starts_the_controller_with_flags_that_it_knows() -> anyhow::Result<()> {
    let unit = fs::read_to_string(configs().join("systemd/tideshift.service"))?.replace("\\\n", " ");
    let start = unit.lines().find_map(|line| line.strip_prefix("ExecStart=/usr/local/bin/tideshift "));
    let help = controller::cli(start.context("no ExecStart")?.split_whitespace().chain(["--help"]))?;
    ensure!(help.code == Some(0), "{}", help.stderr);
    Ok(())
}

/// Documents may name commands and options that are gone; `--help` is refused after what a command does not know.
#[test]
fn the_documents_name_commands_and_options_that_the_binary_knows() -> anyhow::Result<()> {
    let root = artifacts::workspace();
    let mut pages = vec![root.join("README.md")];
    for entry in fs::read_dir(root.join("docs"))? {
        pages.extend(Some(entry?.path()).filter(|path| path.extension().is_some_and(|extension| extension == "md")));
    }
    let mut checked = 0;
    for page in pages {
        let text = fs::read_to_string(&page)?.replace("\\\n", " ").replace("SHA256", &"0".repeat(64));
        let blocks = text.split("```").skip(1).step_by(2).filter_map(|block| block.strip_prefix("sh\n"));
        for command in blocks.flat_map(str::lines).filter_map(|line| line.strip_prefix("tideshift ")) {
            let help = controller::cli(shell_words(command).into_iter().chain(["--help".to_owned()]))?;
            ensure!(help.code == Some(0), "{}: tideshift {command}: {}", page.display(), help.stderr);
            checked += 1;
        }
    }
    ensure!(checked > 20, "only {checked} commands were found");
    Ok(())
}

/// The words of one command, up to a comment, a pipe or a redirection.
fn shell_words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), String::new(), None);
    for c in line.chars() {
        match quote {
            Some(end) if c == end => quote = None,
            None if c == '\'' || c == '"' => quote = Some(c),
            None if "#|>&;".contains(c) => break,
            None if c.is_whitespace() => words.push(std::mem::take(&mut word)),
            _ => word.push(c),
        }
    }
    // What is left of `2> FILE` is the number.
    words.extend(Some(word).filter(|word| word != "2"));
    words.retain(|word| !word.is_empty());
    words
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
