//! The location of the artifacts under test: the output of `make build` and `make envoy`, unless the environment
//! overrides it.
//!
//! A missing artifact is a failure that names the command to build it, never a silent skip.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};

/// The Envoy binary: `TIDESHIFT_ENVOY`, else `.tools/bin/envoy` of this checkout.
pub fn envoy() -> anyhow::Result<PathBuf> {
    find("TIDESHIFT_ENVOY", ".tools/bin/envoy", "make envoy")
}

/// The `tideshift` binary: `TIDESHIFT_BIN`, else `target/release/tideshift` of this checkout.
pub fn tideshift() -> anyhow::Result<PathBuf> {
    find("TIDESHIFT_BIN", "target/release/tideshift", "make build")
}

/// The filter's module: `TIDESHIFT_WASM`, else `target/tideshift.wasm` of this checkout.
pub fn wasm() -> anyhow::Result<PathBuf> {
    find("TIDESHIFT_WASM", "target/tideshift.wasm", "make build")
}

/// Chromium: `TIDESHIFT_CHROMIUM`, else the one on the `PATH`.
pub fn chromium() -> anyhow::Result<PathBuf> {
    on_path("TIDESHIFT_CHROMIUM", "chromium", "make chromium")
}

/// Its WebDriver: `TIDESHIFT_CHROMEDRIVER`, else the one on the `PATH`.
pub fn chromedriver() -> anyhow::Result<PathBuf> {
    on_path("TIDESHIFT_CHROMEDRIVER", "chromedriver", "make chromium")
}

/// axe-core's script, which checks a page's accessibility: `TIDESHIFT_AXE`, else `.tools/axe.min.js` of this checkout.
pub fn axe() -> anyhow::Result<PathBuf> {
    find("TIDESHIFT_AXE", ".tools/axe.min.js", "make axe")
}

/// The folder with the schemas of Kubernetes' objects: `TIDESHIFT_SCHEMAS`, else `.tools/schemas` of this checkout.
pub fn schemas() -> anyhow::Result<PathBuf> {
    let path = env::var_os("TIDESHIFT_SCHEMAS").map_or_else(|| workspace().join(".tools/schemas"), PathBuf::from);
    ensure!(path.is_dir(), "{} is not there: run `make schemas`, or set TIDESHIFT_SCHEMAS", path.display());
    Ok(path)
}

/// Node: `TIDESHIFT_NODE`, else the one on the `PATH`.
pub fn node() -> anyhow::Result<PathBuf> {
    on_path("TIDESHIFT_NODE", "node", "make node")
}

/// The root of this checkout.
pub fn workspace() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests).to_owned()
}

fn on_path(variable: &str, name: &str, made_by: &str) -> anyhow::Result<PathBuf> {
    let folders = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&folders).map(|folder| folder.join(name)).find(|path| path.is_file());
    let path = env::var_os(variable).map(PathBuf::from).or(found);
    let path = path.with_context(|| format!("there is no {name} on the PATH: run `{made_by}`, or set {variable}"))?;
    ensure!(path.is_file(), "{} is not there, though {variable} names it", path.display());
    Ok(path)
}

fn find(variable: &str, default: &str, made_by: &str) -> anyhow::Result<PathBuf> {
    let path = env::var_os(variable).map_or_else(|| workspace().join(default), PathBuf::from);
    ensure!(path.is_file(), "{} is not there: run `{made_by}`, or set {variable}", path.display());
    path.canonicalize().with_context(|| format!("cannot resolve {}", path.display()))
}
