//! Where the things under test are: what `make build` and `make envoy` leave, unless the environment says otherwise.
//!
//! A missing one is a failure that says which command makes it, never a silent skip.

use std::{
    env,
    path::{Path, PathBuf},
};

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

/// The root of this checkout.
pub fn workspace() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests).to_owned()
}

fn find(variable: &str, default: &str, made_by: &str) -> anyhow::Result<PathBuf> {
    let path = env::var_os(variable).map_or_else(|| workspace().join(default), PathBuf::from);
    ensure!(path.is_file(), "{} is not there: run `{made_by}`, or set {variable}", path.display());
    path.canonicalize().with_context(|| format!("cannot resolve {}", path.display()))
}
