//! The torture test, short: see `tests/torture.sh`, which runs it for as long as one likes.

use std::fs::File;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde_json::Value;

/// How long a run may take, on a machine that does much else.
const LIMIT: Duration = Duration::from_secs(120);

fn torture(faults: u64, fault: &str, ring: &str) -> Value {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    // A run that failed while it held the lock says nothing about the next one.
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().unwrap();
    let (output, errors) = (folder.path().join("output"), folder.path().join("errors"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_torture"));
    command.args(["--json", "--kills", &faults.to_string(), "--fault", fault, "--ring", ring]);
    // Other tests and builds may have the machine meanwhile.
    command.args(["--pause-limit", "15000"]);
    if let Ok(seed) = std::env::var("E2E_SEED") {
        command.args(["--seed", &seed]);
    }
    command.stdout(File::create(&output).unwrap()).stderr(File::create(&errors).unwrap()).stdin(Stdio::null());
    let mut child = command.spawn().unwrap();
    let ended = e2e::poll(LIMIT, "the torture to end", || Ok(child.try_wait().unwrap()));
    if ended.is_err() {
        child.kill().and_then(|()| child.wait()).unwrap();
    }
    let said = std::fs::read_to_string(&errors).unwrap();
    let report = std::fs::read_to_string(&output).unwrap();
    // The seed is in what it said.
    println!("{said}{report}");
    assert!(ended.unwrap().success(), "{said}{report}");
    let report: Value = serde_json::from_str(&report).unwrap();
    let number = |name: &str| report[name].as_u64().unwrap_or_else(|| panic!("{name} in {report}"));
    assert_eq!([number("errors"), number("lost"), number("duplicates")], [0; 3]);
    assert_eq!(number("kills"), faults);
    // A queue that is nearly empty proves little.
    assert!(number("in_flight_at_faults") > 10 * faults && number("requests") > 100 * faults, "{report}");
    report
}

/// Beside front-ends of random habits, which have to have got far enough to do harm.
fn beside_hostile_ones(rounds: u64, ring: &str) {
    let report = torture(rounds, "neighbour", ring);
    let number = |name: &str| report["hostile"][name].as_u64().unwrap_or_else(|| panic!("{name} in {report}"));
    assert!(number("sessions") > rounds / 2 && number("requests") > 10 * rounds, "{report}");
    assert!(number("answers") > rounds && number("refusals") > 0, "{report}");
    assert!(report["hostile"]["habits"].as_object().is_some_and(|habits| habits.len() > 8), "{report}");
}

#[test]
fn kills_split() {
    torture(60, "kill", "split");
}

#[test]
fn kills_packed() {
    torture(60, "kill", "packed");
}

#[test]
fn controller_failures_split() {
    torture(10, "reset", "split");
}

#[test]
fn lost_completions_packed() {
    torture(10, "lost", "packed");
}

#[test]
fn removals_split() {
    torture(10, "removal", "split");
}

#[test]
fn hostile_front_ends_split() {
    beside_hostile_ones(50, "split");
}

#[test]
fn hostile_front_ends_packed() {
    beside_hostile_ones(50, "packed");
}

#[test]
fn failures_of_another_namespace_split() {
    let report = torture(30, "namespace", "split");
    let number = |name: &str| report["other"][name].as_u64().unwrap_or_else(|| panic!("{name} in {report}"));
    assert!(number("requests") > 1000 && number("failures") > 30, "{report}");
}

#[test]
fn power_cuts_packed() {
    torture(10, "power", "packed");
}
