//! Every input of the corpus, one after the other: as quick and as repeatable as any other test.

use std::path::{Path, PathBuf};

use fuzz::{TARGETS, Target};

fn corpus(target: &Target) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name);
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

fn replay(name: &str) {
    let target = TARGETS.iter().find(|target| target.name == name).unwrap();
    let files = corpus(target);
    assert!(files.len() >= (target.seeds)().len(), "the corpus of {name} has {} inputs", files.len());
    for file in files {
        println!("{}", file.display());
        (target.run)(&std::fs::read(file).unwrap());
    }
}

#[test]
fn rings() {
    replay("rings");
}

#[test]
fn session() {
    replay("session");
}

#[test]
fn completions() {
    replay("completions");
}

#[test]
fn seeds_are_as_they_are_made() {
    for target in TARGETS {
        for (name, bytes) in (target.seeds)() {
            let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name).join(name);
            let found = std::fs::read(&file).unwrap();
            assert!(found == bytes, "{}: run `cargo run -p fuzz --bin seeds`", file.display());
        }
    }
}
