//! Validates objects as an API server would, by the schemas of Kubernetes and of the CRDs of Istio, Gateway API and
//! Envoy Gateway. `tools/schemas` documents their origin; unknown fields are errors, too.

use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use crate::artifacts;

/// The validation errors of these objects, one line each.
pub fn check(objects: &[Value]) -> anyhow::Result<Vec<String>> {
    let checker = artifacts::workspace().join("tools/schemas/check.mjs");
    let mut command = Command::new(artifacts::node()?);
    command.arg(checker).arg(artifacts::schemas()?).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    child.stdin.take().context("no standard input")?.write_all(serde_json::to_string(objects)?.as_bytes())?;
    let output = child.wait_with_output()?;
    let (said, failed) = (String::from_utf8(output.stdout)?, String::from_utf8_lossy(&output.stderr));
    let mut lines: Vec<String> = said.lines().map(str::to_owned).collect();
    let end = format!("{} checked", objects.len());
    ensure!(output.status.success() && lines.pop() == Some(end), "the checker failed: {said}{failed}");
    Ok(lines)
}
