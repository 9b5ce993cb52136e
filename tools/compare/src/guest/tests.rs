//! Options and choices of the way `--guest`; a whole comparison is in `tests/guest.rs`.

use super::*;
use crate::job::{Pattern, default_jobs};
use clap::Parser;
use std::sync::Arc;
use std::time::Duration;

#[derive(Parser)]
struct GuestArguments {
    #[command(flatten)]
    common: crate::options::CommonOptions,
    #[command(flatten)]
    guest: GuestOptions,
}

fn options(words: &[&str]) -> Result<(Plan, GuestOptions), String> {
    let words = ["compare"].iter().chain(words);
    let arguments = GuestArguments::try_parse_from(words).map_err(|error| error.to_string())?;
    Ok((Plan::new(arguments.common, Arc::default()).unwrap(), arguments.guest))
}

fn checked(words: &[&str]) -> Result<Vec<usize>, String> {
    let (plan, options) = options(words)?;
    check(&plan, &options).map_err(|error| error.to_string())
}

#[test]
fn a_guest_has_a_cpu_for_each_queue() {
    let vcpus = |words: &[&str]| {
        let (plan, options) = options(words).unwrap();
        options.vcpus(&plan)
    };
    assert_eq!(vcpus(&[]), 2);
    assert_eq!(vcpus(&["--queues", "4"]), 4);
    assert_eq!(vcpus(&["--queues", "2", "--vcpus", "8"]), 8);
    assert!(checked(&["--queues", "4", "--vcpus", "3"]).unwrap_err().contains("--vcpus 3 is too few"));
}

#[test]
fn workers_stay_within_the_cpus_of_both_sides() {
    let all = allowed_cpus().unwrap();
    assert_eq!(checked(&[]).unwrap(), all);
    let first = all[0].to_string();
    assert_eq!(checked(&["--cpus", &first, "--worker-cpus", &first]).unwrap(), [all[0]]);
    let error = checked(&["--cpus", &first, "--worker-cpus", "1000"]).unwrap_err();
    assert!(error.contains("--worker-cpus has CPU 1000"), "{error}");
    assert!(checked(&["--cpus", "1000"]).unwrap_err().contains("CPU 1000 is not there"));
}

#[test]
fn lists_of_cpus_are_what_our_target_takes() {
    let (plan, guest) = options(&["--cpus", "2,4-6", "--worker-cpus", "6,2"]).unwrap();
    assert_eq!((plan.cpus, guest.worker_cpus), (Some(vec![2, 4, 5, 6]), Some(CpuList(vec![6, 2]))));
    assert!(options(&["--cpus", "2,4-7,4"]).is_err_and(|error| error.contains("CPU 4 is listed twice")));
}

#[test]
fn options_that_need_others() {
    assert!(options(&["--rebind"]).is_err_and(|error| error.contains("--device")));
    assert!(options(&["--modules", "/lib/modules/x"]).is_err_and(|error| error.contains("--kernel")));
    assert_eq!(options(&["--aio", "native"]).unwrap().0.aio, Some(crate::options::Aio::Native));
    let (_, options) = options(&["--kernel", "/boot/a", "--modules", "/lib/modules/a"]).unwrap();
    let kernel = kernel(&options).unwrap();
    assert_eq!((kernel.image, kernel.modules), ("/boot/a".into(), Some("/lib/modules/a".into())));
}

#[test]
fn one_drive_leaves_out_jobs_on_several_disks() {
    let (mut plan, _) = options(&[]).unwrap();
    assert_eq!(jobs_that_fit(&plan).unwrap(), (default_jobs(7), vec![]));
    plan.device = Some("0000:01:00.0".into());
    let (jobs, left_out) = jobs_that_fit(&plan).unwrap();
    assert_eq!(jobs, default_jobs(1));
    assert_eq!(left_out, ["randwrite-4k-q32-x7", "randread-4k-q256-x7"]);
    plan.jobs = vec![Job::new(Pattern::RandomRead, 4096, 1, None, 2)];
    assert!(jobs_that_fit(&plan).is_err());
    plan.round = Duration::from_secs(1);
}

#[test]
fn rounds_are_interleaved_and_neither_side_is_always_first() {
    use Side::{DataPlane as B, VhostBlk as A};
    use Step::{Round, Stop};
    let expected = [(0, A), (0, B), (1, A), (1, B), (0, B), (0, A), (1, B), (1, A)];
    assert_eq!(steps(2, 2, false), expected.map(|(job, side)| Round(job, side)));
    let expected = [
        Round(0, A),
        Round(1, A),
        Stop(A),
        Round(0, B),
        Round(1, B),
        Stop(B),
        Round(0, B),
        Round(1, B),
        Stop(B),
        Round(0, A),
        Round(1, A),
        Stop(A),
    ];
    assert_eq!(steps(2, 2, true), expected);
}

#[test]
fn the_last_line_of_a_log() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    assert_eq!(last_line(&path), "");
    std::fs::write(&path, "one\ntwo\n\n").unwrap();
    assert_eq!(last_line(&path), "; its log ends with: two");
}
