//! The TrafficShift document, as a user would write and change it.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

/// The name of the service.
pub(crate) const SERVICE: &str = "checkout";
/// The hostname that clients call.
pub(crate) const HOST: &str = "checkout.example.com";

/// The file of the document, and its constant parts.
pub(crate) struct Document {
    path: PathBuf,
    versions: String,
}

impl Document {
    /// A document in this directory; nothing is written yet.
    pub(crate) fn new(folder: &Path, versions: &[(&str, Vec<SocketAddr>)]) -> Self {
        let version = |(name, endpoints): &(&str, Vec<SocketAddr>)| {
            let endpoints: Vec<_> = endpoints.iter().map(|endpoint| format!("\"{endpoint}\"")).collect();
            format!(
                "  - name: {name}\n    endpoints: [{}]\n    readinessProbe: {{httpGet: {{path: /health}}, periodMillis: 250}}\n",
                endpoints.join(", ")
            )
        };
        Self { path: folder.join("shift.yaml"), versions: versions.iter().map(version).collect() }
    }

    /// Writes it with these steps, atomically like an editor.
    pub(crate) fn write(&self, stable: &str, target: Option<&str>) -> anyhow::Result<()> {
        let target = target.map(|target| format!("  target: {target}\n")).unwrap_or_default();
        let text = format!(
            r#"# What is wanted of {SERVICE}'s traffic. Change it while the demo runs: tideshift follows.
apiVersion: tideshift.dev/v1alpha1
kind: TrafficShift
metadata: {{name: {SERVICE}}}
spec:
  hostnames: [{HOST}]
  versions:
{versions}  stable: {stable}
{target}  strategy:
    steps: [{{weight: 10, holdSeconds: 3}}, {{weight: 100, holdSeconds: 2}}]
  analysis: {{maxErrorRate: 0.02}}
"#,
            versions = self.versions,
        );
        let new = self.path.with_extension("new");
        fs::write(&new, text).with_context(|| format!("cannot write {}", new.display()))?;
        fs::rename(&new, &self.path).with_context(|| format!("cannot write {}", self.path.display()))
    }

    /// Its path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}
