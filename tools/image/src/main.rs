//! `make image`: writes the module's image and the controller's, and says by which digests to ask for them.
//!
//!     image MODULE BINARY FOLDER

use anyhow::{Context as _, bail};
use std::path::{Path, PathBuf};
use std::{env, fs};
use tideshift_image::{Digest, Image};

fn main() -> anyhow::Result<()> {
    let arguments: Vec<PathBuf> = env::args_os().skip(1).map(PathBuf::from).collect();
    let [module, binary, folder] = &arguments[..] else { bail!("usage: image MODULE BINARY FOLDER") };
    let read = |path: &Path| fs::read(path).with_context(|| path.display().to_string());
    let module = read(module)?;
    let of_file = Digest::of(&module);
    let filter = Image::module(module).write(folder)?;
    let controller = Image::controller(read(binary)?).write(folder)?;
    let folder = folder.display();
    println!(
        "\
{folder}/tideshift-filter, {folder}/tideshift-filter.tar
    {filter}
    sha256 for oci:// modules    {}
    sha256 for http:// modules   {}   (the file target/tideshift.wasm)
{folder}/tideshift, {folder}/tideshift.tar
    {controller}

To a registry:    skopeo copy oci:{folder}/tideshift-filter docker://REGISTRY/tideshift-filter:{version}
             or   crane push {folder}/tideshift-filter REGISTRY/tideshift-filter:{version}
To one node:      ctr -n k8s.io image import --base-name REGISTRY/tideshift {folder}/tideshift.tar",
        filter.hex(),
        of_file.hex(),
        version = env!("CARGO_PKG_VERSION"),
    );
    Ok(())
}
