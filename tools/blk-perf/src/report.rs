//! What a run measured.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::plan::{Kind, Mismatch, Request};

/// Latencies are kept up to this many nanoseconds (ten minutes); longer ones count as this.
const LONGEST_NS: u64 = 600_000_000_000;
/// Wrong blocks and failed requests that are described one by one; all are counted.
const DESCRIBED: usize = 16;

/// How often a client thread looked at its rings, and how often in vain.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Polls {
    pub(crate) all: u64,
    pub(crate) empty: u64,
}

/// Sums over all kinds of request.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Totals {
    pub(crate) operations: u64,
    pub(crate) bytes: u64,
}

/// What one queue counted.
pub(crate) struct QueueStats {
    pub(crate) totals: Totals,
    by_kind: [u64; 5],
    latency: Histogram<u64>,
    pub(crate) mismatches: Vec<Mismatch>,
    wrong_blocks: u64,
    errors: u64,
    failures: Vec<String>,
    pub(crate) kicks: u64,
    pub(crate) calls: u64,
    pub(crate) missed_calls: u64,
    pub(crate) unsent: u64,
}

impl QueueStats {
    pub(crate) fn new() -> Self {
        QueueStats {
            totals: Totals::default(),
            by_kind: [0; 5],
            latency: Histogram::new_with_bounds(1, LONGEST_NS, 3)
                .expect("the bounds are constants that the library accepts"),
            mismatches: Vec::new(),
            wrong_blocks: 0,
            errors: 0,
            failures: Vec::new(),
            kicks: 0,
            calls: 0,
            missed_calls: 0,
            unsent: 0,
        }
    }

    /// Counts a completed request that moved `bytes`.
    #[inline]
    pub(crate) fn record(&mut self, request: &Request, success: bool, latency: Duration, bytes: usize) {
        self.totals.operations += 1;
        self.by_kind[request.kind as usize] += 1;
        let nanoseconds = u64::try_from(latency.as_nanos()).unwrap_or(LONGEST_NS);
        self.latency.saturating_record(nanoseconds);
        if success {
            self.totals.bytes += bytes as u64;
        } else {
            self.record_failure(request);
        }
    }

    #[cold]
    fn record_failure(&mut self, request: &Request) {
        self.errors += 1;
        if self.failures.len() < DESCRIBED {
            self.failures.push(format!(
                "the device failed a {} of {} blocks at block {}",
                request.kind, request.blocks, request.lba
            ));
        }
    }

    /// Takes account of the mismatches that were added after the first `before`.
    #[inline]
    pub(crate) fn count_mismatches(&mut self, before: usize) {
        self.wrong_blocks += (self.mismatches.len() - before) as u64;
        self.mismatches.truncate(DESCRIBED);
    }
}

/// The result of a run. `serde` writes the object that `--json` prints.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Completed requests of the load; the final read-back is not among them.
    pub operations: u64,
    /// Reads among them.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Discards.
    pub discards: u64,
    /// Write zeroes.
    pub write_zeroes: u64,
    /// Bytes read and written by the completed requests.
    pub bytes: u64,
    /// Length of the load, in seconds.
    pub seconds: f64,
    /// Requests per second.
    pub iops: f64,
    /// Mebibytes per second, read and written.
    pub mib_per_s: f64,
    /// Latency of requests in microseconds, from sending (or, with a rate, from when they were due) to noticing: the mean.
    pub mean_us: f64,
    /// The median latency of requests, in microseconds.
    pub p50_us: f64,
    /// Latency in microseconds: 90 % of the requests took no longer.
    pub p90_us: f64,
    /// Latency in microseconds: 99 % of the requests took no longer.
    pub p99_us: f64,
    /// Latency in microseconds: 99.9 % of the requests took no longer.
    #[serde(rename = "p99_9_us")]
    pub p999_us: f64,
    /// The longest latency, in microseconds.
    pub max_us: f64,
    /// With a rate: requests that were due and could not be sent before the end, because too many were in flight.
    pub unsent: u64,
    /// Requests the device reported as failed, read-back included.
    pub io_errors: u64,
    /// Failed requests ([`Report::io_errors`]) of the final read-back: what they should have read was not compared.
    pub read_back_errors: u64,
    /// Blocks that did not hold what they should, read-back included.
    pub verify_errors: u64,
    /// Blocks compared by the final read-back.
    pub blocks_read_back: u64,
    /// Times the client notified the target of requests during the load.
    pub client_kicks: u64,
    /// Times the target notified the client of completions during the load.
    pub client_calls: u64,
    /// Times completions were there and no notification followed although the client had asked for it: a guest would
    /// have slept on. Read-back included.
    pub client_missed_calls: u64,
    /// Share of the client's looks at its rings that found nothing (0 to 1). Near 0, the client is the limit, if it had
    /// a CPU of its own; a look that gives the CPU to others for milliseconds counts as one.
    pub client_empty_polls: f64,
    /// The run was stopped from outside before its end.
    pub interrupted: bool,
    /// What went wrong, the first cases of it.
    pub failures: Vec<String>,
}

impl Report {
    pub(crate) fn new(load: Vec<QueueStats>, polls: Polls, elapsed: Duration) -> Report {
        let seconds = elapsed.as_secs_f64();
        let mut latency = QueueStats::new().latency;
        for stats in &load {
            latency.add(&stats.latency).expect("all histograms have the same bounds");
        }
        let microseconds = |quantile| latency.value_at_quantile(quantile) as f64 / 1000.0;
        let kind = |kind: Kind| load.iter().map(|stats| stats.by_kind[kind as usize]).sum();
        let sum = |value: fn(&QueueStats) -> u64| load.iter().map(value).sum::<u64>();
        let operations = sum(|stats| stats.totals.operations);
        let bytes = sum(|stats| stats.totals.bytes);
        let per_second = |amount: f64| if seconds > 0.0 { amount / seconds } else { 0.0 };
        let mut report = Report {
            operations,
            reads: kind(Kind::Read),
            writes: kind(Kind::Write),
            flushes: kind(Kind::Flush),
            discards: kind(Kind::Discard),
            write_zeroes: kind(Kind::WriteZeroes),
            bytes,
            seconds,
            iops: per_second(operations as f64),
            mib_per_s: per_second(bytes as f64 / f64::from(1 << 20)),
            mean_us: latency.mean() / 1000.0,
            p50_us: microseconds(0.5),
            p90_us: microseconds(0.9),
            p99_us: microseconds(0.99),
            p999_us: microseconds(0.999),
            max_us: latency.max() as f64 / 1000.0,
            unsent: sum(|stats| stats.unsent),
            io_errors: 0,
            read_back_errors: 0,
            verify_errors: 0,
            blocks_read_back: 0,
            client_kicks: sum(|stats| stats.kicks),
            client_calls: sum(|stats| stats.calls),
            client_missed_calls: 0,
            client_empty_polls: polls.empty as f64 / polls.all.max(1) as f64,
            interrupted: false,
            failures: Vec::new(),
        };
        report.add_failures(&load);
        report
    }

    /// Adds the failures and wrong blocks of the read-back.
    pub(crate) fn add_read_back(&mut self, stats: &[QueueStats]) {
        self.read_back_errors += stats.iter().map(|stats| stats.errors).sum::<u64>();
        self.add_failures(stats);
    }

    /// Adds the failures and wrong blocks of `stats`, and nothing else of them.
    fn add_failures(&mut self, stats: &[QueueStats]) {
        for stats in stats {
            self.io_errors += stats.errors;
            self.verify_errors += stats.wrong_blocks;
            self.client_missed_calls += stats.missed_calls;
            let wrong = stats.mismatches.iter().map(ToString::to_string);
            self.failures.extend(stats.failures.iter().cloned().chain(wrong));
        }
        self.failures.truncate(DESCRIBED);
        if self.client_missed_calls > 0 && self.failures.is_empty() {
            self.failures.push(format!("{} notifications of completions never came", self.client_missed_calls));
        }
    }

    /// True if something was done and all of it was right.
    pub fn is_success(&self) -> bool {
        self.is_right_where_it_worked() && self.io_errors == 0
    }

    /// True if something was done, nothing but requests that the device reported as failed was wrong, and everything could be
    /// read back in the end. For a disk that is expected to fail requests.
    pub fn is_right_where_it_worked(&self) -> bool {
        self.operations > 0 && self.read_back_errors == 0 && self.verify_errors == 0 && self.client_missed_calls == 0
    }
}

/// How far a run is.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// What is going on.
    pub phase: Phase,
    /// Completed requests of this phase.
    pub operations: u64,
    /// Bytes read and written in this phase.
    pub bytes: u64,
    /// Time since the phase began.
    pub elapsed: Duration,
    /// How much of the phase is done, 0 to 1; `None` if it has no end of its own.
    pub fraction: Option<f64>,
}

/// The phases of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The load itself.
    Load,
    /// Reading back what is known.
    ReadBack,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Expected, Found};

    fn request(kind: Kind) -> Request {
        Request { kind, lba: 8, blocks: 8, version: 0, index: 0, unmap: false, shift: 0 }
    }

    #[test]
    fn queues_are_added_up() {
        let (mut one, mut two) = (QueueStats::new(), QueueStats::new());
        for microseconds in 1..=1000 {
            let stats = if microseconds % 4 == 0 { &mut one } else { &mut two };
            let kind = if microseconds <= 600 { Kind::Read } else { Kind::Write };
            stats.record(&request(kind), true, Duration::from_micros(microseconds), 4096);
        }
        let report = Report::new(vec![one, two], Polls { all: 4, empty: 3 }, Duration::from_secs(2));
        assert_eq!((report.operations, report.reads, report.writes), (1000, 600, 400));
        assert_eq!((report.bytes, report.iops), (4_096_000, 500.0));
        assert!((report.mib_per_s - 1.953_125).abs() < 1e-9, "{}", report.mib_per_s);
        assert_eq!(report.client_empty_polls, 0.75);
        for (value, expected) in [
            (report.mean_us, 500.5),
            (report.p50_us, 500.0),
            (report.p90_us, 900.0),
            (report.p99_us, 990.0),
            (report.max_us, 1000.0),
        ] {
            assert!((value / expected - 1.0).abs() < 0.002, "{value} instead of {expected}");
        }
        assert!(report.is_success());
    }

    #[test]
    fn everything_wrong_is_counted_and_the_first_of_it_described() {
        let mut stats = QueueStats::new();
        for lba in 0..100 {
            stats.record(&request(Kind::Write), false, Duration::ZERO, 4096);
            let before = stats.mismatches.len();
            stats.mismatches.push(Mismatch { lba, expected: Expected::Zeroes, found: Found::Foreign });
            stats.count_mismatches(before);
        }
        assert_eq!(stats.totals.bytes, 0, "failed requests moved nothing");
        let report = Report::new(vec![stats], Polls::default(), Duration::from_secs(1));
        assert_eq!((report.io_errors, report.verify_errors), (100, 100));
        assert_eq!(report.failures.len(), DESCRIBED);
        assert!(report.failures[0].contains("failed a write of 8 blocks at block 8"), "{}", report.failures[0]);
        assert!(!report.is_success());
    }

    #[test]
    fn nothing_done_is_no_success() {
        assert!(!Report::new(Vec::new(), Polls::default(), Duration::ZERO).is_success());
    }
}
