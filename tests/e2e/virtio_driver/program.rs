//! The program's own command line, and its demonstration.

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use e2e::build_dir;
use serde_json::Value;

use super::alone;

fn vhost_blk(arguments: &[&str]) -> Output {
    let program = match std::env::var_os("VHOST_BLK") {
        Some(path) => PathBuf::from(path),
        None => build_dir().join("release/vhost-blk"),
    };
    // None of these has to wait for anything.
    let mut command = Command::new("timeout");
    let output = command.args(["--signal=KILL", "60"]).arg(&program).args(arguments).stdin(Stdio::null()).output();
    output.unwrap_or_else(|error| panic!("{}: {error}; build it with `cargo build --release`", program.display()))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs the demonstration, which must succeed, and returns its JSON object.
fn demo(arguments: &[&str]) -> Value {
    let output = vhost_blk(&[&["demo", "--seconds", "2", "--json"], arguments].concat());
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{}\n{out}\n{err}", output.status);
    assert_eq!(out.lines().count(), 1, "one object on one line: {out}");
    serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}"))
}

/// Checks every field the demonstration promises.
fn check_demo(result: &Value) {
    let number = |name: &str| match result.get(name).and_then(Value::as_f64) {
        Some(number) => number,
        None => panic!("no number {name} in {result:#}"),
    };
    let seconds = number("seconds");
    assert!((1.9..10.0).contains(&seconds), "{result:#}");
    // Enough for every kind to be among them, even on a machine that is busy with something else.
    assert!(number("operations") > 200.0, "{result:#}");
    let iops = number("operations") / seconds;
    assert!((number("iops") / iops - 1.0).abs() < 0.01, "{result:#}");
    let mib = number("bytes") / seconds / 1048576.0;
    assert!((number("mib_per_s") / mib - 1.0).abs() < 0.01, "{result:#}");
    assert!(0.0 < number("p50_us") && number("p50_us") <= number("p99_us"), "{result:#}");
    assert!(number("p99_us") <= number("max_us"), "{result:#}");
    assert_eq!(number("verify_errors"), 0.0, "{result:#}");
    assert_eq!(number("io_errors"), 0.0, "{result:#}");
    assert_eq!(number("copies"), 0.0, "{result:#}");
    assert!((0.0..0.5).contains(&number("notifications_per_request")), "{result:#}");
    for kind in ["reads", "writes", "flushes", "discards", "write_zeroes"] {
        assert!(number(kind) > 0.0, "{kind}: {result:#}");
    }
    assert!(number("blocks_read_back") > 0.0, "{result:#}");
}

#[test]
fn the_demo_counts_what_it_did() {
    let _alone = alone();
    check_demo(&demo(&[]));
}

#[test]
fn the_demo_runs_packed_rings_and_several_queues() {
    let _alone = alone();
    check_demo(&demo(&["--packed"]));
    check_demo(&demo(&["--queues", "4", "--depth", "8"]));
    check_demo(&demo(&["--queues", "3", "--depth", "64", "--packed"]));
}

#[test]
fn the_demo_counts_notifications_in_both_directions() {
    let _alone = alone();
    let result = demo(&["--interrupts"]);
    check_demo(&result);
    let number = |name: &str| result[name].as_u64().unwrap_or_else(|| panic!("no number {name} in {result:#}"));
    // What the worker says it sent, the front-end has received: the load's part of it.
    assert!(number("calls") > 0 && number("client_calls") > 0, "{result:#}");
    assert!(number("client_calls") <= number("calls"), "{result:#}");
    // It is told, but may be none: a worker that is awake is not kicked.
    number("kicks");
}

#[test]
fn the_demo_prints_a_table() {
    let _alone = alone();
    let output = vhost_blk(&["demo", "--seconds", "1"]);
    let out = text(&output.stdout);
    assert!(output.status.success(), "{out}{}", text(&output.stderr));
    let value = |name: &str| {
        let line = out.lines().find(|line| line.trim_start().starts_with(name));
        let line = line.unwrap_or_else(|| panic!("no row {name}:\n{out}"));
        line.trim_start()[name.len()..].trim().to_owned()
    };
    assert_eq!(value("verification errors"), "0");
    assert_eq!(value("copies made"), "0");
    assert_eq!(value("I/O errors"), "0");
    for name in ["operations", "IOPS", "MiB/s"] {
        let number: f64 = value(name).parse().unwrap_or_else(|_| panic!("{name} is no number:\n{out}"));
        assert!(number > 0.0, "{out}");
    }
    for name in ["latency p50", "latency p90", "latency p99", "latency p99.9", "latency max"] {
        assert!(value(name).ends_with(" µs"), "{out}");
    }
    assert!(value("notifications per request").parse::<f64>().is_ok(), "{out}");
    assert!(!text(&output.stderr).contains('\u{1b}'), "no progress bar where there is no terminal");
}

#[test]
fn the_demo_ends_early_when_interrupted() {
    let _alone = alone();
    // A shell with job control gives the program the default reaction to SIGINT, as a terminal would.
    let program = std::env::var_os("VHOST_BLK").map_or_else(|| build_dir().join("release/vhost-blk"), PathBuf::from);
    let script = "set -m; \"$1\" demo --seconds 600 --json & sleep 1.5; kill -INT $!; wait $!";
    let output = Command::new("bash").args(["-c", script, "bash"]).arg(program).output().expect("bash runs");
    let out = text(&output.stdout);
    assert!(output.status.success(), "{}: {out}{}", output.status, text(&output.stderr));
    let result: Value = serde_json::from_str(out.trim()).unwrap_or_else(|error| panic!("{error}: {out}"));
    assert_eq!(result["interrupted"], Value::Bool(true), "{result:#}");
    assert_eq!(result["verify_errors"], 0, "{result:#}");
}

#[test]
fn bad_command_lines_are_answered_in_one_line() {
    let folder = super::folder();
    let config = folder.path().join("bad.toml");
    std::fs::write(&config, "[[export]]\ndevice = \"sim:64M\"\nsocket-path = \"/x\"\ncolour = 1\n").expect("writable");
    let config = config.display().to_string();
    let nowhere = folder.path().join("no/such/folder/s.sock").display().to_string();
    let socket = folder.path().join("s.sock").display().to_string();
    let lines: [(&[&str], &str); 12] = [
        (&[], "--device"),
        (&["--no-such-option"], "--no-such-option"),
        (&["--device", "sim:64M"], "--socket-path"),
        (&["--device", "sim:nonsense", "--socket-path", &socket], "sim:nonsense"),
        (&["--device", "sim:64M,lba=1000", "--socket-path", &socket], "lba"),
        (&["--device", "sim:64M", "--socket-path", &nowhere], &nowhere),
        (&["--device", "nonsense", "--socket-path", &socket], "nonsense"),
        (&["--device", "sim:64M", "--socket-path", &socket, "--namespace", "9"], "9"),
        (&["--device", "sim:64M", "--socket-path", &socket, "--cpus", "0-"], "0-"),
        (&["--config", &config], "line 4"),
        (&["demo", "--queues", "0"], "--queues"),
        (&["demo", "--depth", "100000"], "depth"),
    ];
    for (arguments, named) in lines {
        let output = vhost_blk(arguments);
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(!output.status.success(), "{arguments:?} was accepted: {out}");
        assert_eq!(out, "", "{arguments:?}");
        // What went before the end may be in the log; the answer is the last line.
        let answer: Vec<&str> = err.lines().filter(|line| line.starts_with("vhost-blk: ")).collect();
        assert_eq!(answer.len(), 1, "{arguments:?}: {err}");
        assert!(answer[0].contains(named), "{arguments:?} does not name {named:?}: {err}");
        assert!(!err.contains("panicked"), "{arguments:?}: {err}");
    }
}
