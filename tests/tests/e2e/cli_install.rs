//! What is put into containers: the module's image, and the program that copies itself for a preStop hook.

use anyhow::Context as _;
use flate2::read::GzDecoder;
use serde_json::Value;
use std::io::Read as _;
use std::path::Path;
use std::process::Command;
use std::{fs, slice};
use tideshift_image::{Digest, Image};
use tideshift_tests::artifacts;
use tideshift_tests::controller::cli;

/// The JSON document of a digest.
fn document(layout: &Path, descriptor: &Value) -> anyhow::Result<Value> {
    Ok(serde_json::from_slice(&blob(layout, descriptor)?)?)
}

fn blob(layout: &Path, descriptor: &Value) -> anyhow::Result<Vec<u8>> {
    let digest = descriptor["digest"].as_str().context("no digest")?.replace(':', "/");
    Ok(fs::read(layout.join("blobs").join(digest))?)
}

/// As those do it who fetch modules from registries: the manifest of the digest, its last layer, the file `plugin.wasm`.
#[test]
fn the_modules_image_holds_the_module_and_is_the_same_each_time() -> anyhow::Result<()> {
    let module = fs::read(artifacts::wasm()?)?;
    let (folder, again) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let digest = Image::module(module.clone()).write(folder.path())?;
    assert_eq!(digest, Image::module(module.clone()).write(again.path())?);
    let [archive, same] = [&folder, &again].map(|folder| fs::read(folder.path().join("tideshift-filter.tar")));
    assert!(archive? == same?, "the archives differ");

    let layout = folder.path().join("tideshift-filter");
    let manifest = fs::read(layout.join("blobs/sha256").join(digest.hex()))?;
    assert_eq!(Digest::of(&manifest), digest);
    let manifest: Value = serde_json::from_slice(&manifest)?;
    let layers = manifest["layers"].as_array().context("no layers")?;
    let mut layer = Vec::new();
    GzDecoder::new(&blob(&layout, layers.last().context("no layer")?)?[..]).read_to_end(&mut layer)?;
    let config = document(&layout, &manifest["config"])?;
    assert_eq!(config["rootfs"]["diff_ids"][0], Digest::of(&layer).to_string());
    let mut plugin = Vec::new();
    for entry in tar::Archive::new(&layer[..]).entries()? {
        let mut entry = entry?;
        if entry.path()?.file_name().is_some_and(|name| name == "plugin.wasm") {
            entry.read_to_end(&mut plugin)?;
        }
    }
    assert!(plugin == module, "plugin.wasm is not target/tideshift.wasm");
    Ok(())
}

#[test]
fn the_program_copies_itself_and_the_copy_runs() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let arguments = ["install".as_ref(), folder.path().as_os_str()];
    for _ in 0..2 {
        let output = cli(arguments)?;
        assert_eq!((output.code, output.stderr.as_str()), (Some(0), ""));
    }
    let copy = folder.path().join("tideshift");
    assert!(fs::read(&copy)? == fs::read(artifacts::tideshift()?)?, "another program");
    let names: Result<Vec<_>, _> = fs::read_dir(folder.path())?.map(|entry| entry.map(|entry| entry.path())).collect();
    assert_eq!(names?, slice::from_ref(&copy));

    // In a container that has no certificates, as it has nothing else, it can still ask a controller without TLS.
    let mut hook = Command::new(&copy);
    hook.args(["wait-drained", "payment.shop", "v1", "--timeout", "0s", "--server", "http://127.0.0.1:9"]);
    let hook = hook.env("SSL_CERT_FILE", "/nowhere").env("SSL_CERT_DIR", "/nowhere").output()?;
    let said = String::from_utf8_lossy(&hook.stderr);
    assert!(hook.status.code() == Some(1) && said.contains("connection refused"), "{said}");

    let absent = folder.path().join("absent");
    let refused = cli(["install".as_ref(), absent.as_os_str()])?;
    let expected =
        format!("error: {} cannot be written: no such file or directory\n", absent.join("tideshift").display());
    assert_eq!((refused.code, refused.stderr), (Some(1), expected));
    Ok(())
}
