//! `make manifests`: regenerates the plain manifests and the chart's table of values.

use std::fs;

use tideshift_tests::artifacts;
use tideshift_tests::kubernetes::chart::{Chart, readme};

fn main() -> anyhow::Result<()> {
    let chart = Chart::load()?;
    fs::write(artifacts::workspace().join("envoy-configs/kubernetes/tideshift.yaml"), chart.plain()?)?;
    fs::write(chart.folder().join("README.md"), readme(&chart)?)?;
    Ok(())
}
