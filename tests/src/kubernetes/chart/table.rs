//! The table of values in the chart's README, generated from the comments in `values.yaml`.

use std::fs;

use anyhow::Context as _;

use super::Chart;

const BEGIN: &str = "<!-- values: made from values.yaml by `make manifests` -->\n";
const END: &str = "<!-- end -->\n";

/// One value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValueRow {
    /// Such as `image.tag`.
    pub path: String,
    /// Empty if there is no description.
    pub comment: String,
    /// As `values.yaml` has it.
    pub default: String,
}

impl ValueRow {
    /// All values of `values.yaml` with their comments; a missing comment is empty.
    pub fn all(text: &str) -> Vec<Self> {
        let mut rows: Vec<Self> = Vec::new();
        let mut comment = String::new();
        let mut path: Vec<&str> = Vec::new();
        let mut lines = text.lines().peekable();
        while let Some(line) = lines.next() {
            let content = line.trim_start();
            if content.is_empty() {
                comment.clear();
            } else if let Some(words) = content.strip_prefix("# ") {
                comment = format!("{comment} {words}").trim().to_owned();
            } else if let Some((key, default)) = content.split_once(':').filter(|_| !content.starts_with("- ")) {
                path.truncate((line.len() - content.len()) / 2);
                path.push(key);
                let mut default = default.trim().to_owned();
                let is_group = default.is_empty() && comment.is_empty();
                if default.is_empty() && !is_group {
                    // The lines below belong to the comment here.
                    let depth = line.len() - content.len();
                    let is_below = |next: &&str| next.len() - next.trim_start().len() > depth || next.starts_with("- ");
                    let mut below = Vec::new();
                    while let Some(next) = lines.next_if(|next| !next.is_empty() && is_below(next)) {
                        below.push(next.trim());
                    }
                    default = below.join("; ");
                }
                if !is_group {
                    rows.push(Self { path: path.join("."), comment: std::mem::take(&mut comment), default });
                }
            }
        }
        rows
    }
}

/// The chart's README, with the table as it should be.
pub fn readme(chart: &Chart) -> anyhow::Result<String> {
    let read = |name: &str| fs::read_to_string(chart.folder().join(name)).with_context(|| name.to_owned());
    let (readme, values) = (read("README.md")?, read("values.yaml")?);
    let (before, rest) = readme.split_once(BEGIN).context("README.md has no place for the values")?;
    let (_, after) = rest.split_once(END).context("README.md has no end of the values")?;
    let mut table = String::from("| value | default | what it is |\n| --- | --- | --- |\n");
    for ValueRow { path, comment, default } in ValueRow::all(&values) {
        table.push_str(&format!("| `{path}` | `{default}` | {} |\n", comment.replace('|', "\\|")));
    }
    Ok(format!("{before}{BEGIN}{table}{END}{after}"))
}
