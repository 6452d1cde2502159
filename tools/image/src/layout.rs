//! An image as files: the OCI image layout, as a folder and as an archive.

use crate::{File, Image};
use anyhow::Context as _;
use flate2::{Compression, GzBuilder};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::{fmt, fs};
use tar::{Builder, EntryType, Header};

/// The SHA-256 of something, in hexadecimal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Digest(String);

impl Digest {
    /// Of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        let mut hex = String::new();
        for byte in Sha256::digest(bytes) {
            let _ = write!(hex, "{byte:02x}");
        }
        Self(hex)
    }

    /// The hexadecimal digits alone, as Istio and Envoy Gateway want them in `sha256`.
    pub fn hex(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.0)
    }
}

impl Image {
    /// Writes the image into the folder `parent`, as a layout in a folder of its name and as an archive with `.tar` after
    /// its name; what was there is replaced. Returns the manifest's digest, by which registries know the image.
    pub fn write(&self, parent: &Path) -> anyhow::Result<Digest> {
        let (files, digest) = self.layout()?;
        let folder = parent.join(self.name);
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).with_context(|| shown(&folder))?,
            _ => {}
        }
        for (path, content) in &files {
            let path = folder.join(path);
            fs::create_dir_all(path.parent().unwrap_or(&folder)).with_context(|| shown(&path))?;
            fs::write(&path, content).with_context(|| shown(&path))?;
        }
        let archived = files.iter().map(|(path, content)| (path.as_str(), 0o644, content.as_slice()));
        let archive = parent.join(format!("{}.tar", self.name));
        fs::write(&archive, tar(archived)?).with_context(|| shown(&archive))?;
        Ok(digest)
    }

    /// The layout's files by their paths, and the manifest's digest.
    fn layout(&self) -> anyhow::Result<(BTreeMap<String, Vec<u8>>, Digest)> {
        let layer = tar(self.files.iter().map(|File { path, mode, content }| (*path, *mode, content.as_slice())))?;
        let mut gzip = GzBuilder::new().mtime(0).write(Vec::new(), Compression::best());
        gzip.write_all(&layer)?;
        let [architecture, os] = self.platform;
        let config = json!({
            "architecture": architecture,
            "os": os,
            "config": self.run,
            "rootfs": {"type": "layers", "diff_ids": [Digest::of(&layer).to_string()]},
            "history": [{"created_by": "make image"}],
        });
        let mut files = BTreeMap::new();
        let mut blob = |kind: &str, content: Vec<u8>| {
            let digest = Digest::of(&content);
            let media_type = format!("application/vnd.oci.image.{kind}");
            let of = json!({"mediaType": media_type, "digest": digest.to_string(), "size": content.len()});
            files.insert(format!("blobs/sha256/{}", digest.hex()), content);
            (of, digest)
        };
        let (layer, _) = blob("layer.v1.tar+gzip", gzip.finish()?);
        let (config, _) = blob("config.v1+json", config.to_string().into_bytes());
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config,
            "layers": [layer],
            "annotations": {
                "org.opencontainers.image.title": self.name,
                "org.opencontainers.image.description": self.description,
                "org.opencontainers.image.licenses": env!("CARGO_PKG_LICENSE"),
                "org.opencontainers.image.version": env!("CARGO_PKG_VERSION"),
            },
        });
        let (mut manifest, digest) = blob("manifest.v1+json", manifest.to_string().into_bytes());
        // How the tools that read layouts call it: the tag.
        manifest["annotations"] = json!({"org.opencontainers.image.ref.name": env!("CARGO_PKG_VERSION")});
        manifest["platform"] = json!({"architecture": architecture, "os": os});
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [manifest],
        });
        let text = |value: Value| value.to_string().into_bytes();
        files.insert("index.json".to_owned(), text(index));
        files.insert("oci-layout".to_owned(), text(json!({"imageLayoutVersion": "1.0.0"})));
        Ok((files, digest))
    }
}

/// An archive of files by path, mode and content, with the folders that they are in. All root's, of 1 January 1970.
fn tar<'f>(files: impl Iterator<Item = (&'f str, u32, &'f [u8])> + Clone) -> anyhow::Result<Vec<u8>> {
    let mut archive = Builder::new(Vec::new());
    let header = |kind: EntryType, mode: u32, size: usize| {
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(size as u64);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header
    };
    let is_parent = |path: &&Path| !path.as_os_str().is_empty();
    let parents = files.clone().flat_map(|(path, ..)| Path::new(path).ancestors().skip(1).filter(is_parent));
    for folder in parents.collect::<BTreeSet<_>>() {
        archive.append_data(&mut header(EntryType::Directory, 0o755, 0), slashed(folder), std::io::empty())?;
    }
    for (path, mode, content) in files {
        archive.append_data(&mut header(EntryType::Regular, mode, content.len()), path, content)?;
    }
    Ok(archive.into_inner()?)
}

/// A folder's path as archives have it.
fn slashed(folder: &Path) -> PathBuf {
    folder.join("")
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::read::GzDecoder;
    use std::io::Read as _;

    fn json_of(bytes: &[u8]) -> Value {
        serde_json::from_slice(bytes).unwrap()
    }

    /// What an archive holds: path, mode, uid, gid, time and content.
    fn entries(tar: &[u8]) -> Vec<(String, u32, [u64; 3], Vec<u8>)> {
        let mut archive = tar::Archive::new(tar);
        let entry = |entry: std::io::Result<tar::Entry<'_, &[u8]>>| {
            let mut entry = entry.unwrap();
            let (header, mut content) = (entry.header().clone(), Vec::new());
            entry.read_to_end(&mut content).unwrap();
            let path = entry.path().unwrap().display().to_string();
            let numbers = [header.uid().unwrap(), header.gid().unwrap(), header.mtime().unwrap()];
            (path, header.mode().unwrap(), numbers, content)
        };
        archive.entries().unwrap().map(entry).collect()
    }

    /// The blob that a descriptor speaks of, of the size and the digest that it says.
    fn blob(folder: &Path, of: &Value) -> Vec<u8> {
        let hex = of["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap();
        let content = fs::read(folder.join("blobs/sha256").join(hex)).unwrap();
        assert_eq!((Digest::of(&content).hex(), content.len() as u64), (hex, of["size"].as_u64().unwrap()));
        content
    }

    /// Writes an image and follows it from index to layer: its configuration and its layer, unpacked.
    fn written(image: &Image) -> (Value, Vec<u8>) {
        let parent = tempfile::tempdir().unwrap();
        let digest = image.write(parent.path()).unwrap();
        let folder = parent.path().join(image.name);
        let file = |name: &str| json_of(&fs::read(folder.join(name)).unwrap());
        assert_eq!(file("oci-layout"), json!({"imageLayoutVersion": "1.0.0"}));
        let index = file("index.json");
        assert_eq!(index["manifests"].as_array().unwrap().len(), 1);
        assert_eq!(index["manifests"][0]["digest"], digest.to_string());
        let manifest = json_of(&blob(&folder, &index["manifests"][0]));
        assert_eq!(manifest["mediaType"], index["manifests"][0]["mediaType"]);
        assert_eq!(manifest["layers"].as_array().unwrap().len(), 1);
        assert_eq!(manifest["layers"][0]["mediaType"], "application/vnd.oci.image.layer.v1.tar+gzip");
        let config = json_of(&blob(&folder, &manifest["config"]));
        let mut layer = Vec::new();
        GzDecoder::new(&blob(&folder, &manifest["layers"][0])[..]).read_to_end(&mut layer).unwrap();
        assert_eq!(config["rootfs"]["diff_ids"], json!([Digest::of(&layer).to_string()]));
        let archive = entries(&fs::read(parent.path().join(format!("{}.tar", image.name))).unwrap());
        for (path, ..) in &archive {
            assert!(folder.join(path).exists(), "{path}");
        }
        let same = |(path, _, _, content): &&(String, u32, [u64; 3], Vec<u8>)| {
            !path.ends_with('/') && fs::read(folder.join(path)).unwrap() == *content
        };
        assert_eq!(archive.iter().filter(same).count(), 5, "index, layout, manifest, configuration, layer");
        (config, layer)
    }

    #[test]
    fn the_module_is_alone_in_its_layer() {
        let wasm = b"\0asm\x01\0\0\0".repeat(1000);
        let (_, layer) = written(&Image::module(wasm.clone()));
        assert_eq!(entries(&layer), [("plugin.wasm".to_owned(), 0o644, [0; 3], wasm)]);
    }

    #[test]
    fn the_controller_runs_as_nobody_and_finds_certificates() {
        let (config, layer) = written(&Image::controller(b"binary".to_vec()));
        assert_eq!((&config["os"], &config["architecture"]), (&json!("linux"), &json!("amd64")));
        assert_eq!(config["config"]["Entrypoint"], json!(["/tideshift"]));
        assert_eq!(config["config"]["User"], "65532:65532");
        let entries = entries(&layer);
        let paths: Vec<_> = entries.iter().map(|(path, mode, numbers, _)| (path.as_str(), *mode, *numbers)).collect();
        let expected = [
            ("etc/", 0o755, [0; 3]),
            ("etc/ssl/", 0o755, [0; 3]),
            ("etc/ssl/certs/", 0o755, [0; 3]),
            ("etc/ssl/certs/ca-certificates.crt", 0o644, [0; 3]),
            ("tideshift", 0o755, [0; 3]),
        ];
        assert_eq!((&paths[..], &entries[4].3[..]), (&expected[..], &b"binary"[..]));
    }

    #[test]
    fn a_second_time_it_is_the_same_to_the_byte_and_what_was_there_is_gone() {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        Image::module(b"another".to_vec()).write(second.path()).unwrap();
        let images = [first.path(), second.path()].map(|folder| {
            let digest = Image::module(b"module".to_vec()).write(folder).unwrap();
            let blobs = fs::read_dir(folder.join("tideshift-filter/blobs/sha256")).unwrap().count();
            (digest, blobs, fs::read(folder.join("tideshift-filter.tar")).unwrap())
        });
        assert_eq!(images[0], images[1]);
        assert_eq!(images[0].1, 3);
        assert_ne!(images[0].0, Image::module(b"other".to_vec()).write(first.path()).unwrap());
    }
}
