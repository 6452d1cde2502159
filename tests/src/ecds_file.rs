//! The filter's configuration in a file of its own, which Envoy watches (ECDS) and the test changes while Envoy runs.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

/// The file. Envoy reads a file that is *renamed* to it.
#[derive(Debug)]
pub struct EcdsFile {
    directory: TempDir,
    /// The original content of this place in the bootstrap.
    filter: Value,
}

impl EcdsFile {
    /// A place for the file, which is not there yet.
    pub fn new() -> anyhow::Result<Self> {
        Ok(Self { directory: tempfile::tempdir()?, filter: Value::Null })
    }

    /// Moves the filter's configuration out of the bootstrap into the file.
    pub fn take_from(&mut self, bootstrap: &mut Value) {
        // Without, Envoy takes no configuration from anywhere else.
        bootstrap["node"] = json!({ "id": "tests", "cluster": "tests" });
        let listener = &mut bootstrap["static_resources"]["listeners"][0];
        let filter = &mut listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"][0];
        let discovery = json!({
            "name": "tideshift",
            "config_discovery": {
                "config_source": { "path_config_source": { "path": self.file() }, "resource_api_version": "V3" },
                "type_urls": [filter["typed_config"]["@type"]],
            },
        });
        self.filter = std::mem::replace(filter, discovery);
        // Envoy wants the file to be there at its start.
        let write = self.write(&self.filter["typed_config"]["config"]["configuration"]["value"]);
        write.expect("a temporary folder can be written to");
    }

    /// Puts another policy in its place.
    pub fn set(&self, policy: &Value) -> anyhow::Result<()> {
        self.write(&Value::String(policy.to_string()))
    }

    fn file(&self) -> PathBuf {
        self.directory.path().join("filter.json")
    }

    fn write(&self, configuration: &Value) -> anyhow::Result<()> {
        let mut config = self.filter["typed_config"].clone();
        config["config"]["configuration"]["value"] = configuration.clone();
        let resource = json!({
            "@type": "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig",
            "name": "tideshift",
            "typed_config": config,
        });
        let next: &Path = &self.directory.path().join("next.json");
        fs::write(next, json!({ "resources": [resource] }).to_string())?;
        fs::rename(next, self.file())?;
        Ok(())
    }
}
