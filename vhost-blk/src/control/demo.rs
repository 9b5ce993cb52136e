//! The command `vhost-blk demo`: the whole path on an embedded controller, with verified data.
//!
//! A controller in software, served on a vfio-user socket; the export of it, by the very code that serves drives; and
//! a front-end that is not this project's (the crate `virtio-driver`), which writes blocks that can be recognised and
//! compares what it reads with what it wrote.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use blk_perf::console::{Bar, Table};
use blk_perf::{ClientOptions, Report, Workload};
use serde::Serialize;
use signal_hook::consts::{SIGINT, SIGTERM};
use thiserror::Error;

use crate::control::config::{DEFAULT_QUEUE_SIZE, DEFAULT_QUEUES, ExportSettings, Listen, Settings};
use crate::control::target::{Ended, StartError, Target};
use crate::datapath::counters::Tally;
use crate::drive::AddressError;

/// The embedded controller: its disk is memory that is taken only where it is written; its write cache makes flushes
/// worth their name.
const DEVICE: &str = "sim:1G,write-cache=on";
/// Most requests in flight per queue: what a virtqueue of [`DEFAULT_QUEUE_SIZE`] holds of three descriptors each.
const MAX_DEPTH: u16 = DEFAULT_QUEUE_SIZE / 3;

/// Options of `vhost-blk demo`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// How long the load runs
    #[arg(long, value_name = "S", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=86400))]
    seconds: u64,
    /// Virtqueues
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=i64::from(DEFAULT_QUEUES)))]
    queues: u16,
    /// Requests in flight per virtqueue
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_DEPTH)))]
    depth: u16,
    /// Use packed virtqueues instead of split ones
    #[arg(long)]
    packed: bool,
    /// The front-end sleeps until it is notified, as a guest's kernel does, instead of polling
    #[arg(long)]
    interrupts: bool,
    /// Seed of the random requests
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
}

/// What the demo measured: the front-end's report and what the worker counted of itself.
#[derive(Debug, Serialize)]
struct Outcome<'r> {
    #[serde(flatten)]
    report: &'r Report,
    /// Requests whose data the target had to copy.
    copies: u64,
    /// Notifications that the worker received and sent, per request that it served.
    notifications_per_request: f64,
    /// Of those: received from the front-end.
    kicks: u64,
    /// Of those: sent to the front-end.
    calls: u64,
    /// The front-end waited for notifications; otherwise it polled, and asked for none.
    interrupts: bool,
}

impl<'r> Outcome<'r> {
    fn new(report: &'r Report, tally: &Tally, interrupts: bool) -> Self {
        let drive = [tally.reads, tally.writes, tally.flushes, tally.discards, tally.write_zeroes];
        let requests: u64 = drive.iter().sum::<u64>() + tally.answered;
        Outcome {
            report,
            copies: tally.copies,
            notifications_per_request: (tally.kicks + tally.calls) as f64 / requests.max(1) as f64,
            kicks: tally.kicks,
            calls: tally.calls,
            interrupts,
        }
    }

    fn table(&self) -> String {
        let mut table = Table::default();
        table
            .report(self.report)
            .row("verification errors", self.report.verify_errors.to_string())
            .row("blocks read back", self.report.blocks_read_back.to_string())
            .row("copies made", self.copies.to_string())
            .row("notifications per request", format!("{:.4}", self.notifications_per_request))
            .row("  received by the worker", self.kicks.to_string())
            .row("  sent by the worker", self.calls.to_string())
            .row("the front-end", if self.interrupts { "waits for notifications" } else { "polls" });
        table.render()
    }

    /// Why the demo failed, if it did: the first reason.
    fn failure(&self) -> Option<DemoError> {
        let report = self.report;
        if let Some(first) = report.failures.first() {
            let (errors, wrong) = (report.io_errors, report.verify_errors);
            return Some(DemoError::Failed { errors, wrong, first: first.clone() });
        }
        (!report.is_success()).then_some(DemoError::Nothing)
    }
}

/// The demo could not be run, or has found something wrong.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DemoError {
    /// Signals cannot be handled.
    #[error("cannot watch for signal {signal}: {source}")]
    Signal {
        /// Number of the signal.
        signal: i32,
        /// What the system says.
        source: io::Error,
    },
    /// There is no place for the socket.
    #[error("cannot make a folder for the demo's socket: {0}; set TMPDIR to one that can be written")]
    Folder(#[source] io::Error),
    /// The embedded controller has no such address.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// Serving did not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// Serving has ended by itself.
    #[error(transparent)]
    Ended(#[from] Ended),
    /// The front-end could not run its load.
    #[error(transparent)]
    Load(#[from] blk_perf::Error),
    /// The result cannot be written.
    #[error("cannot write JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// Requests failed, or blocks were not as they had been written.
    #[error("{errors} requests failed and {wrong} blocks were wrong, the first: {first}")]
    Failed {
        /// Requests that failed.
        errors: u64,
        /// Blocks that were not as they had been written.
        wrong: u64,
        /// The first of both.
        first: String,
    },
    /// The load has ended before its first request was answered.
    #[error("not one request was completed")]
    Nothing,
}

/// Runs the demo.
///
/// # Errors
/// It could not be run, or a request failed, or a block was wrong.
pub fn run(args: Args) -> Result<(), DemoError> {
    if std::env::var_os("RUST_LOG").is_none() {
        // The progress bar has the terminal to itself, and what a drive would need (hugepages) this controller does not.
        log::set_max_level(log::LevelFilter::Error);
    }
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        let failed = |source| DemoError::Signal { signal, source };
        // The first one ends the load and prints what was measured until then; a second one ends the program.
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&stop)).map_err(failed)?;
        signal_hook::flag::register(signal, Arc::clone(&stop)).map_err(failed)?;
    }
    // A folder that only this user may enter, removed at the end.
    let folder = tempfile::Builder::new().prefix("vhost-blk-demo-").tempdir();
    let folder = folder.map_err(DemoError::Folder)?;
    let socket = folder.path().join("disk.sock");
    let target = Target::start(&settings(&args, &socket)?)?;

    let options = ClientOptions {
        queues: args.queues.into(),
        depth: args.depth.into(),
        packed: args.packed,
        interrupts: args.interrupts,
        ..ClientOptions::new(&socket)
    };
    let workload = Workload::verified(args.seed).for_duration(Duration::from_secs(args.seconds));
    let mut bar = Bar::new(!args.json);
    let report = blk_perf::run(&options, &workload, &stop, |progress| bar.show(progress));
    bar.finish();

    let tally = target.totals();
    let stopped = target.stop();
    let report = report?;
    let outcome = Outcome::new(&report, &tally, args.interrupts);
    if args.json {
        let object = serde_json::to_string(&outcome)?;
        println!("{object}");
    } else {
        print!("{}", outcome.table());
    }
    stopped?;
    outcome.failure().map_or(Ok(()), Err)
}

/// One export of an embedded controller, as `vhost-blk --device … --socket-path …` would serve it.
fn settings(args: &Args, socket: &Path) -> Result<Settings, AddressError> {
    let export = ExportSettings {
        device: DEVICE.parse()?,
        listen: Listen::Path(socket.to_owned()),
        namespace: None,
        queues: args.queues,
        queue_size: DEFAULT_QUEUE_SIZE,
        queue_pairs: None,
        read_only: false,
        serial: None,
    };
    Ok(Settings { exports: vec![export], ..Settings::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notifications_are_counted_in_both_directions_per_request() {
        let report = Report::default();
        let tally = Tally {
            reads: 50,
            writes: 40,
            flushes: 4,
            discards: 3,
            write_zeroes: 2,
            answered: 1,
            kicks: 4,
            calls: 6,
            ..Tally::default()
        };
        let outcome = Outcome::new(&report, &tally, false);
        assert_eq!(outcome.notifications_per_request, 0.1);
        assert_eq!(Outcome::new(&report, &Tally::default(), false).notifications_per_request, 0.0);
    }

    #[test]
    fn nothing_done_and_anything_wrong_are_failures() {
        let tally = Tally::default();
        let failure = |report: &Report| Outcome::new(report, &tally, false).failure().map(|error| error.to_string());
        let mut report = Report::default();
        assert_eq!(failure(&report).as_deref(), Some("not one request was completed"));
        report.operations = 1;
        assert_eq!(failure(&report), None);
        report.verify_errors = 2;
        report.failures.push("block 7 is stale".into());
        let line = failure(&report).unwrap();
        assert!(line.contains("2 blocks were wrong") && line.contains("block 7 is stale"), "{line}");
    }
}
