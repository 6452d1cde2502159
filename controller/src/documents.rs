//! Reads documents from files: YAML or JSON to types, with all errors of all files at once, each with its location.
//! `tideshift-core` defines the meaning of a document and validates it.

mod last_good;
#[cfg(test)]
mod reference;

pub use last_good::LastGood;

use crate::admission;
use crate::admission::{Admission, Size};
use crate::net::io_reason;
use serde_json::Value;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;
use std::{fmt, fs, io, thread};
use tideshift_core::decode::{Errors, FieldError, Problem};
use tideshift_core::protocol::policy::Policy;
use tideshift_core::shift::probe::{Check, Probe};
use tideshift_core::shift::{HookSecret, TrafficShift};

/// The maximum size of a file; documents are written by hand, and 4 MiB are some 100,000 lines.
const MAX_FILE_BYTES: u64 = 4 << 20;
/// The maximum size of the text of a file after its YAML aliases are expanded.
const MAX_EXPANDED_BYTES: usize = 4 * MAX_FILE_BYTES as usize;
/// How long a pipe may take to deliver all of its content.
const PIPE_PATIENCE: Duration = Duration::from_secs(10);
/// The file name that stands for standard input.
const STDIN: &str = "-";

/// A document of either kind.
#[allow(clippy::large_enum_variant, reason = "there are few, and none is moved often")]
#[derive(Debug, Clone, PartialEq)]
pub enum Document {
    /// The desired traffic of a service.
    Shift(TrafficShift),
    /// The configuration of the filter; recognised by `services` or `revision` instead of `apiVersion` and `kind`.
    Policy(Policy),
}

/// The source of a document; displayed as `FILE`, or `FILE (document 2)` if the file has several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    file: String,
    /// Counted from 1 without empty documents; `None` if it is the only one.
    number: Option<usize>,
}

/// One error in one document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DocumentError {
    /// The source of the document.
    pub source: Source,
    /// The error; its path is empty if it concerns the whole file.
    pub error: FieldError,
}

/// All errors in the documents, in their order; displayed one per line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DocumentErrors(pub Vec<DocumentError>);

/// Reads TrafficShift documents; `-` is standard input.
///
/// # Errors
///
/// All errors of all files: files that cannot be read or exceed 4 MiB, invalid YAML, invalid fields, a file given
/// twice, and documents that conflict (the same name or the same hostname).
pub fn load(files: &[PathBuf]) -> Result<Vec<TrafficShift>, DocumentErrors> {
    Ok(load_as_written(files)?.into_iter().map(|(shift, _)| shift).collect())
}

/// Like [`load`], with the value that each document was parsed from.
///
/// # Errors
///
/// As [`load`].
pub fn load_as_written(files: &[PathBuf]) -> Result<Vec<(TrafficShift, Value)>, DocumentErrors> {
    let documents = read_files(files, |value| TrafficShift::read(value).map(Document::Shift))?;
    Ok(documents.into_iter().flatten().filter_map(ReadOne::shift).collect())
}

/// Reads TrafficShift documents independently of each other, as written: they may belong to different namespaces.
///
/// # Errors
///
/// All errors of all files.
pub fn load_each(files: &[PathBuf]) -> Result<Vec<Value>, DocumentErrors> {
    let read = |value: &Value| TrafficShift::read(value).map(Document::Shift);
    let (good, bad): (Vec<_>, Vec<_>) = files.iter().map(|file| read_file(file, read)).unzip();
    let errors: Vec<DocumentError> = bad.into_iter().flatten().collect();
    if !errors.is_empty() {
        return Err(DocumentErrors(errors));
    }
    Ok(good.into_iter().flatten().map(|one| one.value).collect())
}

/// Reads a file with one document, of the kind that `read` parses; `-` is standard input.
///
/// # Errors
///
/// As [`load`], and if the file contains several documents.
pub fn load_one<T>(file: &Path, read: impl FnOnce(&Value) -> Result<T, Errors>) -> Result<T, DocumentErrors> {
    let source = Source { file: shown_name(file), number: None };
    let whole_file = |why: String| DocumentErrors(vec![source.error("", why)]);
    let values = read_text(file).and_then(|text| values(&text)).map_err(whole_file)?;
    let value = match values.as_slice() {
        [value] => value,
        [] => return Err(whole_file("no document in it".to_owned())),
        several => return Err(whole_file(format!("{} documents in it; expected one", several.len()))),
    };
    read(value).map_err(|errors| DocumentErrors(source.errors(errors).collect()))
}

/// Reads documents of either kind, each with its source; otherwise like [`load`].
pub fn load_any(files: &[PathBuf]) -> Result<Vec<(Source, Document)>, DocumentErrors> {
    let documents = read_files(files, |value| {
        let has = |name| value.get(name).is_some();
        let is_policy = (has("services") || has("revision")) && !has("apiVersion") && !has("kind");
        match is_policy {
            true => Policy::read(value).map(Document::Policy),
            false => TrafficShift::read(value).map(Document::Shift),
        }
    })?;
    Ok(documents.into_iter().flatten().map(|one| (one.source, one.document)).collect())
}

/// A document that is valid on its own.
struct ReadOne {
    source: Source,
    document: Document,
    size: Size,
    value: Value,
}

impl ReadOne {
    fn shift(self) -> Option<(TrafficShift, Value)> {
        match self.document {
            Document::Shift(shift) => Some((shift, self.value)),
            Document::Policy(_) => None,
        }
    }
}

/// The documents of each file.
fn read_files(
    files: &[PathBuf],
    read: impl Fn(&Value) -> Result<Document, Errors>,
) -> Result<Vec<Vec<ReadOne>>, DocumentErrors> {
    let mut documents = Vec::new();
    let mut errors = Vec::new();
    for (i, file) in files.iter().enumerate() {
        if let Some(earlier) = files.iter().take(i).find(|earlier| is_same_file(earlier, file)) {
            let source = Source { file: shown_name(file), number: None };
            errors.push(source.error("", format!("given twice (as {} before)", shown_name(earlier))));
            continue;
        }
        let (good, bad) = read_file(file, &read);
        documents.push(good);
        errors.extend(bad);
    }
    let mut admission = Admission::default();
    for ReadOne { source, document, size, .. } in documents.iter().flatten() {
        if let Document::Shift(shift) = document
            && let Err(found) = admission.take(shift, *size, &source.to_string())
        {
            errors.extend(source.errors(found));
        }
    }
    if errors.is_empty() { Ok(documents) } else { Err(DocumentErrors(errors)) }
}

/// The valid documents of one file, and the errors of the others.
fn read_file(file: &Path, read: impl Fn(&Value) -> Result<Document, Errors>) -> (Vec<ReadOne>, Vec<DocumentError>) {
    let name = shown_name(file);
    let whole_file = |why: String| Source { file: name.clone(), number: None }.error("", why);
    let values = match read_text(file).and_then(|text| values(&text)) {
        Err(why) => return (Vec::new(), vec![whole_file(why)]),
        Ok(values) => values.into_iter().flat_map(items).collect::<Vec<_>>(),
    };
    if values.is_empty() {
        return (Vec::new(), vec![whole_file("no document in it".to_owned())]);
    }
    let (mut documents, mut errors) = (Vec::new(), Vec::new());
    let several = values.len() > 1;
    for (n, value) in values.into_iter().enumerate() {
        let source = Source { file: name.clone(), number: several.then_some(n + 1) };
        let checked = read(&value).and_then(|document| match &document {
            Document::Shift(shift) => admission::check(shift, &value).map(|size| (document, size)),
            Document::Policy(_) => Ok((document, Size::default())),
        });
        match checked {
            Ok((document, size)) => documents.push(ReadOne { source, document, size, value }),
            Err(found) => errors.extend(source.errors(found)),
        }
    }
    (documents, errors)
}

/// The items of a `kind: List`, as `kubectl get -o yaml` prints them; otherwise the document itself.
fn items(mut value: Value) -> Vec<Value> {
    let is_list = value["kind"].as_str().is_some_and(|kind| kind == "List" || kind == "TrafficShiftList");
    match value.get_mut("items").filter(|_| is_list).map(Value::take) {
        Some(Value::Array(items)) => items,
        _ => vec![value],
    }
}

/// Checks that a document has no fields that need a cluster.
///
/// # Errors
///
/// The first such field.
pub fn needs_no_cluster(shift: &TrafficShift) -> Result<(), String> {
    for version in shift.services.iter().flat_map(|service| &service.versions) {
        let fields = [
            ("service, selector", version.discovery.is_some()),
            ("cluster", version.cluster.is_some()),
            ("workloadRef", version.workload.is_some()),
        ];
        if let Some((field, _)) = fields.iter().find(|(_, is_there)| *is_there) {
            return Err(format!(
                "{}: {field} of version {} need a cluster; expected endpoints here, or `tideshift serve --kubernetes`",
                shift.name, version.name
            ));
        }
    }
    Ok(())
}

/// Checks whether a document may come from another source than the files the controller was started with: it must not
/// make the controller run commands or read files of its machine.
///
/// # Errors
///
/// The first field that is not allowed.
pub fn comes_from_elsewhere(shift: &TrafficShift) -> Result<(), String> {
    let only = "only documents that the controller was given with --file may have it";
    let versions = shift.services.iter().flat_map(|service| &service.versions);
    let runs = |probe: &Probe| matches!(probe.check, Check::Exec { .. });
    if versions.filter_map(|version| version.readiness_probe.as_ref()).any(runs) {
        return Err(format!(
            "readinessProbe.exec: not allowed here, as it runs a command on the controller's machine; {only}"
        ));
    }
    if shift.webhooks.iter().any(|webhook| matches!(webhook.secret, Some(HookSecret::File(_)))) {
        return Err(format!(
            "webhooks.secretFile: not allowed here, as it names a file of the controller's machine; {only}"
        ));
    }
    Ok(())
}

/// The text of a file, if it is text and within the size limit.
fn read_text(file: &Path) -> Result<String, String> {
    let bytes = match file.as_os_str() == STDIN {
        true => read_bytes(io::stdin().lock()),
        false if is_static(file) => read_pipe(file.to_path_buf()),
        false => File::open(file).and_then(read_bytes),
    };
    let bytes = bytes.map_err(|error| format!("cannot be read: {}", io_reason(&error)))?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(format!("longer than {} MiB, the most that is read", MAX_FILE_BYTES >> 20));
    }
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        format!("not UTF-8 (at byte {at}); documents are YAML or JSON in UTF-8")
    })
}

/// The bytes of a file, one more than the limit if it exceeds it.
fn read_bytes(reader: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    reader.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map(|_| bytes)
}

/// The same for a pipe, which blocks until another process has written to it and closed it.
fn read_pipe(file: PathBuf) -> io::Result<Vec<u8>> {
    let (bytes, read) = mpsc::channel();
    // If it blocks forever, the thread ends with the process.
    thread::spawn(move || bytes.send(File::open(file).and_then(read_bytes)));
    read.recv_timeout(PIPE_PATIENCE).unwrap_or_else(|_| {
        let seconds = PIPE_PATIENCE.as_secs();
        let why = format!("the other end did not write and close this pipe within {seconds} s");
        Err(io::Error::new(io::ErrorKind::TimedOut, why))
    })
}

/// Whether a path is standard input, a pipe or a device, which can be read only once.
pub(crate) fn is_static(file: &Path) -> bool {
    file.as_os_str() == STDIN || fs::metadata(file).is_ok_and(|data| !data.is_file() && !data.is_dir())
}

/// The documents of a YAML text (JSON is YAML), without empty ones.
fn values(text: &str) -> Result<Vec<Value>, String> {
    let options = serde_saphyr::options! {
        // Booleans as in YAML 1.2: `on` and `yes` are texts.
        strict_booleans: true,
        // `007` and `1_000` are texts, as they look in the value of a header.
        leading_zero_numbers_as_strings: true,
        underscored_numbers_as_strings: true,
        duplicate_keys: serde_saphyr::DuplicateKeyPolicy::Error,
        with_snippet: false,
        // Nested aliases: a short file must not exhaust the memory.
        budget: serde_saphyr::budget! { max_total_scalar_bytes: MAX_EXPANDED_BYTES },
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: 100_000 },
    };
    serde_saphyr::from_multiple_with_options(text, options).map_err(|error| {
        let message = error.render_with_options(serde_saphyr::render_options! {
            formatter: &serde_saphyr::UserMessageFormatter,
            snippets: serde_saphyr::SnippetMode::Off,
        });
        let hint = match error.without_snippet() {
            serde_saphyr::Error::UnknownAnchor { .. } => "; a text that begins with * must be in quotes",
            _ if text.contains("{{") => "; {{ … }} looks like a template that was not rendered",
            _ => "",
        };
        format!("not YAML: {}{hint}", message.replace('\n', " "))
    })
}

fn is_same_file(a: &Path, b: &Path) -> bool {
    a == b || matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

fn shown_name(file: &Path) -> String {
    match file.as_os_str() == STDIN {
        true => "<stdin>".to_owned(),
        false => file.display().to_string(),
    }
}

impl Source {
    fn errors(&self, errors: Errors) -> impl Iterator<Item = DocumentError> {
        errors.0.into_iter().map(|error| DocumentError { source: self.clone(), error })
    }

    fn error(&self, path: &str, why: String) -> DocumentError {
        let error = FieldError { path: path.to_owned(), problem: Problem::Unreadable(why) };
        DocumentError { source: self.clone(), error }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        self.number.map_or(Ok(()), |number| write!(f, " (document {number})"))
    }
}

impl fmt::Display for DocumentError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.source, self.error)
    }
}

impl fmt::Display for DocumentErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<_> = self.0.iter().map(DocumentError::to_string).collect();
        f.write_str(&lines.join("\n"))
    }
}

impl std::error::Error for DocumentErrors {}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const CHECKOUT: &str = "\
apiVersion: tideshift.dev/v1alpha1
kind: TrafficShift
metadata: {name: checkout}
spec: {hostnames: [checkout.example.com], versions: [{name: v1}], stable: v1}
";

    /// Files with these names and texts, and the result of `load_any` without the name of the directory.
    fn load_texts(texts: &[(&str, &str)]) -> Result<Vec<(Source, Document)>, String> {
        let folder = tempfile::tempdir().unwrap();
        let mut files: Vec<PathBuf> = Vec::new();
        for (name, text) in texts {
            files.push(folder.path().join(name));
            std::fs::write(files.last().unwrap(), text).unwrap();
        }
        let folder = format!("{}/", folder.path().display());
        load_any(&files).map_err(|errors| errors.to_string().replace(&folder, ""))
    }

    fn error_of(text: &str) -> String {
        load_texts(&[("a.yaml", text)]).unwrap_err()
    }

    #[test]
    fn several_documents_of_several_kinds_are_read() {
        let policy =
            r#"{"revision": "18446744073709551615", "services": [{"name": "s", "versions": [{"name": "v1"}]}]}"#;
        let search = CHECKOUT.replace("checkout", "search");
        let two = format!("---\n# nothing here\n---\n{CHECKOUT}---\n{search}...\n");
        let documents = load_texts(&[("two.yaml", &two), ("policy.json", policy)]).unwrap();
        let [(_, Document::Shift(a)), (source, Document::Shift(b)), (_, Document::Policy(policy))] = &documents[..]
        else {
            panic!("{documents:?}")
        };
        assert_eq!((a.name.as_str(), b.name.as_str(), policy.revision), ("checkout", "search", u64::MAX));
        assert!(source.to_string().ends_with("two.yaml (document 2)"));
    }

    #[test]
    fn errors_of_all_documents_come_at_once_with_their_places() {
        let two = format!("{}---\n{CHECKOUT}", CHECKOUT.replace("stable: v1", "stable: v9"));
        let unknown = CHECKOUT.replace("checkout", "search").replace("stable: v1", "stabel: v1");
        let errors = load_texts(&[("two.yaml", &two), ("search.yaml", &unknown)]).unwrap_err();
        let errors: Vec<_> = errors.lines().map(|line| line.split(" (known here").next().unwrap()).collect();
        assert_eq!(
            errors,
            [
                "two.yaml (document 1): spec.stable: \"v9\" is not allowed; expected one of the versions v1",
                "search.yaml: spec.stable: missing; expected a version's name",
                "search.yaml: spec.stabel: unknown field; did you mean `stable`?",
            ]
        );
    }

    #[test]
    fn documents_must_not_contradict_each_other() {
        let same_name = CHECKOUT.replace("checkout.example.com", "other.example.com");
        let same_host = CHECKOUT.replace("checkout}", "till}");
        let every = CHECKOUT.replace("checkout}", "a}").replace("hostnames: [checkout.example.com], ", "");
        let every_too = every.replace("{name: a}", "{name: b}");
        let twice = CHECKOUT.replace("checkout", "x").replace("[x.example.com]", "[x.example.com, X.example.com]");
        let texts = [
            ("1.yaml", CHECKOUT),
            ("2.yaml", &same_name),
            ("3.yaml", &same_host),
            ("4.yaml", &every),
            ("5.yaml", &every_too),
            ("6.yaml", &twice),
        ];
        assert_eq!(
            load_texts(&texts).unwrap_err().lines().collect::<Vec<_>>(),
            [
                "6.yaml: spec.hostnames[1]: \"x.example.com\" is already a hostname of the TrafficShift x in the same \
                 document",
                "2.yaml: metadata.name: \"checkout\" is already the name of the TrafficShift in 1.yaml",
                "3.yaml: spec.hostnames[0]: \"checkout.example.com\" is already a hostname of the TrafficShift \
                 checkout in 1.yaml",
                "5.yaml: spec.hostnames: missing, which means every host; so does the TrafficShift a in 4.yaml",
            ]
        );
    }

    #[test]
    fn a_file_is_given_once() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.yaml");
        std::fs::write(&file, CHECKOUT).unwrap();
        let roundabout = folder.path().join(".").join("a.yaml");
        let error = load(&[file.clone(), roundabout.clone()]).unwrap_err().to_string();
        assert_eq!(error, format!("{}: given twice (as {} before)", roundabout.display(), file.display()));
    }

    #[test]
    fn files_that_cannot_be_read_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let files = [folder.path().join("absent.yaml"), folder.path().to_owned(), folder.path().join("latin1.yaml")];
        std::fs::write(&files[2], b"name: caf\xe9\n").unwrap();
        let errors = load(&files).unwrap_err().to_string();
        let errors: Vec<_> = errors.lines().map(|line| line.split_once(": ").unwrap().1).collect();
        assert_eq!(
            errors,
            [
                "cannot be read: no such file or directory",
                "cannot be read: is a directory",
                "not UTF-8 (at byte 9); documents are YAML or JSON in UTF-8",
            ]
        );
    }

    #[test]
    fn yaml_that_is_none_is_answered_with_line_and_column() {
        let error = error_of(&CHECKOUT.replace("versions: [{", "versions: [{{"));
        assert!(error.starts_with("a.yaml: not YAML: ") && error.contains("line 4"), "{error}");
        let error = error_of(&CHECKOUT.replace("[checkout", "[*"));
        let hint = "; a text that begins with * must be in quotes";
        assert!(error.contains("line 4") && error.ends_with(hint), "{error}");
        let error = error_of("a: 1\nb: 2\na: 3\n");
        assert!(error.contains("duplicate") && error.contains("line 3"), "{error}");
        for empty in ["", "---\n", "# nothing\n", "null\n"] {
            assert_eq!(error_of(empty), "a.yaml: no document in it");
        }
    }

    #[test]
    fn files_of_absurd_size_are_refused() {
        let error = error_of(&format!("a: {}\n", "x".repeat(MAX_FILE_BYTES as usize)));
        assert_eq!(error, "a.yaml: longer than 4 MiB, the most that is read");
    }

    #[test]
    fn aliases_do_not_fill_the_memory() {
        let mut laughs = String::from("a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]\n");
        for n in 1..12 {
            let alias = format!("*a{}, ", n - 1).repeat(10);
            laughs.push_str(&format!("a{n}: &a{n} [{alias}]\n"));
        }
        assert!(error_of(&laughs).starts_with("a.yaml: not YAML: "));
        let long = format!("a: &a {}\nb: [{}]\n", "x".repeat(1 << 20), "*a, ".repeat(90));
        assert!(error_of(&long).starts_with("a.yaml: not YAML: "));
        assert!(error_of(&"[".repeat(100_000)).starts_with("a.yaml: not YAML: "));
        assert!(error_of(&"- ".repeat(100_000)).starts_with("a.yaml: not YAML: "));
    }

    #[test]
    fn scalars_are_what_yaml_1_2_says() {
        let text = "{u: 18446744073709551615, i: -9223372036854775808, f: 0.5, yes: yes, on: on, t: true, no: NO, \
                    octal: 007, grouped: 1_000, s: \"1\", n: null, e: }";
        let expected = json!({"u": u64::MAX, "i": i64::MIN, "f": 0.5, "yes": "yes", "on": "on", "t": true, "no": "NO",
            "octal": "007", "grouped": "1_000", "s": "1", "n": null, "e": null});
        assert_eq!(values(text).unwrap(), [expected]);
        let merged = values("base: &b {x: 1}\nover: {<<: *b, y: 2}\n").unwrap();
        assert_eq!(merged, [json!({"base": {"x": 1}, "over": {"x": 1, "y": 2}})]);
    }

    #[test]
    fn a_list_is_its_items() {
        let item = |name: &str| {
            json!({"apiVersion": "tideshift.dev/v1alpha1", "kind": "TrafficShift", "metadata": {"name": name},
                "spec": {"hostnames": [format!("{name}.example")], "versions": [{"name": "v1"}], "stable": "v1"}})
        };
        let list = |items: Value| json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string();
        let loaded = load_texts(&[("all.yaml", &list(json!([item("a"), item("b")])))]).unwrap();
        assert_eq!(loaded.len(), 2);
        let empty = load_texts(&[("all.yaml", &list(json!([])))]).unwrap_err();
        assert!(empty.ends_with("all.yaml: no document in it"), "{empty}");
        let wrong = load_texts(&[("all.yaml", &list(json!([item("a"), {"kind": "Other"}])))]).unwrap_err();
        assert!(wrong.contains("all.yaml (document 2): "), "{wrong}");
        let template = load_texts(&[("a.yaml", "metadata: {name: {{ .Values.name }}}")]).unwrap_err();
        assert!(template.contains("template"), "{template}");
    }
}
