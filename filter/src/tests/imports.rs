//! The files of this crate import each other in one direction only.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

#[test]
fn no_file_imports_itself_by_way_of_others() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src");
    let mut imports: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        if path.is_dir() || name == "lib" || name == "tests" {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        let used = text.lines().filter_map(|line| line.trim().strip_prefix("use crate::"));
        let of = |line: &str| line.split([':', ';']).next().unwrap_or_default().to_owned();
        imports.insert(name, used.filter(|line| !line.starts_with('{')).map(of).collect());
        assert!(!text.contains("use crate::{"), "{}: one line for each file", path.display());
    }
    assert!(imports["vm"].contains("root_context"), "{imports:?}");
    // Files that import none that is left can go, again and again; what stays is a circle.
    while let Some(leaf) = imports.iter().find(|(_, used)| used.iter().all(|file| !imports.contains_key(file))) {
        let leaf = leaf.0.clone();
        imports.remove(&leaf);
    }
    assert!(imports.is_empty(), "these import each other: {:?}", imports.keys());
}
