//! The corpus without a fuzzer: hand-made inputs, and what fuzzing found worth keeping, of every kind that once failed.

use std::path::Path;

fn all_of(target: &str, holds_for: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    let mut inputs: Vec<_> = folder.read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
    inputs.sort();
    assert!(!inputs.is_empty(), "{} holds nothing", folder.display());
    for input in inputs {
        println!("{}", input.display());
        holds_for(&std::fs::read(input).unwrap());
    }
}

#[test]
fn policies() {
    all_of("policy", tideshift_fuzz::policy::holds_for);
}

#[test]
fn choices() {
    all_of("choice", tideshift_fuzz::choice::holds_for);
}

#[test]
fn reports() {
    all_of("report", tideshift_fuzz::report::holds_for);
}

#[test]
fn shifts() {
    all_of("shift", tideshift_fuzz::shift::holds_for);
}
