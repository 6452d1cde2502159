//! The last valid version of each document in the given files: an error in one document does not affect the others.

use super::{
    Document, DocumentError, DocumentErrors, ReadOne, is_static, needs_no_cluster, read_file, read_files, shown_name,
};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tideshift_core::decode::Errors;
use tideshift_core::shift::TrafficShift;

/// The parsed document, and the document as written.
type AsWritten = (TrafficShift, Value);

/// The files and the documents of each.
#[derive(Debug, Clone)]
pub struct LastGood {
    files: Vec<LastGoodFile>,
}

#[derive(Debug, Clone)]
struct LastGoodFile {
    path: PathBuf,
    /// Standard input or a pipe, which can be read only once.
    is_static: bool,
    documents: Vec<AsWritten>,
    /// The errors of the last read.
    errors: Vec<DocumentError>,
}

impl LastGood {
    /// Reads the files for the first time; every file and document must be valid.
    ///
    /// # Errors
    ///
    /// As [`load`](super::load), and if a document has a field that needs a cluster.
    pub fn open(files: &[PathBuf]) -> Result<Self, DocumentErrors> {
        let documents = read_files(files, read)?.into_iter().map(shifts);
        let with = |(path, documents): (&PathBuf, _)| {
            let is_static = is_static(path);
            if is_static {
                tracing::info!("{}: read once; changes need a restart", shown_name(path));
            }
            LastGoodFile { path: path.clone(), is_static, documents, errors: Vec::new() }
        };
        Ok(Self { files: files.iter().zip(documents).map(with).collect() })
    }

    /// All documents, in the order of the files.
    pub fn documents(&self) -> Vec<AsWritten> {
        self.files.iter().flat_map(|file| file.documents.iter().cloned()).collect()
    }

    /// The source file of each document.
    pub fn origins(&self) -> BTreeMap<String, String> {
        let of = |file: &LastGoodFile| {
            let origin = format!("file {}", shown_name(&file.path));
            file.documents.iter().map(move |(shift, _)| (shift.name.clone(), origin.clone())).collect::<Vec<_>>()
        };
        self.files.iter().flat_map(of).collect()
    }

    /// Reads a file again. An invalid document stays as it was. While a file has errors, none of its documents is
    /// removed: the one that is missing may be the one that is invalid.
    pub fn read_again(&mut self, path: &Path) {
        for file in self.files.iter_mut().filter(|file| !file.is_static && file.path == path) {
            let (documents, errors) = read_file(path, read);
            let documents = shifts(documents);
            let is_there = |name: &str| documents.iter().any(|(shift, _)| shift.name == name);
            file.documents.retain(|(shift, _)| !errors.is_empty() && !is_there(&shift.name));
            file.documents.splice(0..0, documents);
            file.errors = errors;
        }
    }

    /// The errors of each file's last read.
    pub fn errors(&self) -> impl Iterator<Item = &DocumentError> {
        self.files.iter().flat_map(|file| &file.errors)
    }
}

fn read(value: &Value) -> Result<Document, Errors> {
    let shift = TrafficShift::read(value)?;
    needs_no_cluster(&shift).map_err(Errors::of_document)?;
    Ok(Document::Shift(shift))
}

fn shifts(documents: Vec<ReadOne>) -> Vec<AsWritten> {
    documents.into_iter().filter_map(ReadOne::shift).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(name: &str, rest: &str) -> String {
        format!(
            "apiVersion: tideshift.dev/v1alpha1\nkind: TrafficShift\nmetadata: {{name: {name}}}\n\
             spec: {{hostnames: [{name}.example.com], versions: [{{name: v1}}], stable: v1{rest}}}\n"
        )
    }

    #[test]
    fn what_is_wrong_with_one_document_changes_nothing_for_the_others() {
        let folder = tempfile::tempdir().unwrap();
        let files = ["a.yaml", "b.yaml"].map(|name| folder.path().join(name));
        let write = |n: usize, text: &str| std::fs::write(&files[n], text).unwrap();
        write(0, &format!("{}---\n{}", document("one", ""), document("two", "")));
        write(1, &document("three", ""));
        let mut good = LastGood::open(&files).unwrap();
        let read_again = |good: &mut LastGood| -> Vec<String> {
            files.iter().for_each(|file| good.read_again(file));
            good.errors().map(ToString::to_string).collect()
        };
        let drains = |good: &LastGood| {
            let of = |(shift, _): AsWritten| format!("{} {}", shift.name, shift.drain_timeout.as_secs());
            good.documents().into_iter().map(of).collect::<Vec<_>>()
        };
        assert_eq!(drains(&good), ["one 300", "two 300", "three 300"]);
        let (long, wrong) = (", drain: {timeoutSeconds: 400}", ", drain: {timeoutSeconds: -1}");
        write(0, &format!("{}---\n{}", document("one", long), document("two", wrong)));
        write(1, &document("three", long));
        let errors = read_again(&mut good);
        assert!(errors.len() == 1 && errors[0].contains("a.yaml (document 2): spec.drain"), "{errors:?}");
        assert_eq!(drains(&good), ["one 400", "two 300", "three 400"]);
        std::fs::remove_file(&files[0]).unwrap();
        write(1, "[");
        assert_eq!(read_again(&mut good).len(), 2);
        assert_eq!(drains(&good), ["one 400", "two 300", "three 400"]);
        write(0, &document("two", ""));
        write(1, &document("three", ""));
        assert_eq!(
            (read_again(&mut good), drains(&good)),
            (Vec::new(), vec!["two 300".to_owned(), "three 300".to_owned()])
        );
    }

    /// As `serve -f <(helm template …)` passes it.
    #[cfg(unix)]
    #[test]
    fn a_pipe_is_read_once() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let writer = std::thread::spawn({
            let pipe = pipe.clone();
            move || std::fs::write(pipe, document("one", ""))
        });
        let mut good = LastGood::open(std::slice::from_ref(&pipe)).unwrap();
        writer.join().unwrap().unwrap();
        good.read_again(&pipe);
        assert_eq!((good.errors().count(), good.documents().len()), (0, 1));
    }
}
