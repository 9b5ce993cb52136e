//! The figures of a report, before they are put into a form: which they are, how they relate, how they are written.

use crate::comparison::{Comparison, Results, Row, Sample, Side, Spread, Way};
use crate::job::{Figure, Job};

/// The side that everything is normalised to.
pub(super) const BASE: Side = Side::DataPlane;
/// Below this share of looks in vain, the load generator was busy all the time: it was the limit.
const BUSY: f64 = 0.1;
/// A rate is kept if at least this part of it was reached.
const KEPT: f64 = 0.98;

/// A figure of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Measure {
    /// Requests per second.
    Iops,
    /// Mebibytes per second.
    Throughput,
    /// Requests per second and host CPU.
    PerCore,
    /// Host CPUs kept busy.
    Cores,
    /// Latencies in microseconds.
    P50,
    /// 99 % are no longer.
    P99,
    /// 99.9 % are no longer.
    P999,
}

impl Measure {
    /// What a job is measured in first of all.
    pub(super) fn of(job: &Job) -> Measure {
        match job.figure() {
            Figure::Throughput => Measure::Throughput,
            Figure::Iops | Figure::Latency => Measure::Iops,
        }
    }

    /// The value of one round.
    pub(super) fn value(self, sample: &Sample) -> Option<f64> {
        match self {
            Measure::Iops => Some(sample.iops),
            Measure::Throughput => Some(sample.mib_per_s),
            Measure::PerCore => sample.iops_per_core(),
            Measure::Cores => Some(sample.cores()),
            Measure::P50 => Some(sample.p50_us),
            Measure::P99 => Some(sample.p99_us),
            Measure::P999 => Some(sample.p999_us),
        }
    }

    /// The value of one round with the software drive's CPU time charged as well, where that makes a difference.
    pub(super) fn value_with_drive(self, sample: &Sample) -> Option<f64> {
        let drive = sample.drive_cpu_seconds?;
        match self {
            // Of the same rounds as without it.
            Measure::PerCore => self.value(sample).and(sample.iops_per_core_with_drive()),
            Measure::Cores if sample.seconds > 0.0 => Some((sample.cpu_seconds + drive) / sample.seconds),
            _ => None,
        }
    }

    /// Median and spread over the rounds of one side.
    pub(super) fn spread(self, results: &Results) -> Option<Spread> {
        results.spread_of_known(|sample| self.value(sample))
    }

    /// Median and spread over the rounds of one side, with the CPU time of the drive in software charged.
    pub(super) fn spread_with_drive(self, results: &Results) -> Option<Spread> {
        results.spread_of_known(|sample| self.value_with_drive(sample))
    }

    /// The median of the side that everything is normalised to; `None` if it was not measured, or is zero.
    pub(super) fn base(self, row: &Row) -> Option<f64> {
        self.spread(row.side(BASE)?).map(|spread| spread.median).filter(|median| *median > 0.0)
    }

    /// A value with its unit.
    pub(super) fn words(self, value: f64) -> String {
        match self {
            Measure::Iops => format!("{} IOPS", short(value)),
            Measure::Throughput => format!("{} MiB/s", digits(value)),
            Measure::PerCore => format!("{} IOPS per core", short(value)),
            Measure::Cores => format!("{} CPUs", digits(value)),
            Measure::P50 | Measure::P99 | Measure::P999 => format!("{} µs", digits(value)),
        }
    }
}

/// A number with three digits that count and a letter for thousands, millions.
pub(super) fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 999_500.0 => format!("{} M", digits(value / 1e6)),
        size if size >= 999.5 => format!("{} k", digits(value / 1e3)),
        _ => digits(value),
    }
}

/// A number with three digits that count; all of them before the point.
pub(super) fn digits(value: f64) -> String {
    match value.abs() {
        size if size >= 99.95 => format!("{value:.0}"),
        size if size >= 9.995 => format!("{value:.1}"),
        size if size >= 0.0005 || size == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.1e}"),
    }
}

/// A ratio in words: how many times one is the other.
pub(super) fn times(ratio: f64) -> String {
    format!("{}×", digits(ratio))
}

/// What the data themselves say against taking figures for more than they are, one sentence each.
pub(super) fn remarks(comparison: &Comparison) -> Vec<String> {
    let mut remarks = Vec::new();
    for row in &comparison.rows {
        for results in &row.results {
            remarks.extend(remarks_on(comparison.way, &row.job, results));
        }
    }
    remarks.extend(remark_on_distance(comparison));
    remarks
}

fn remarks_on(way: Way, job: &Job, results: &Results) -> Vec<String> {
    let mut remarks = Vec::new();
    let of = format!("{}, {}", results.side, job.title());
    let failures = results.failures().count();
    if let Some(first) = results.failures().next() {
        remarks.push(format!("{of}: {failures} of {} rounds failed: {first}", results.rounds.len()));
    }
    let errors: u64 = results.samples().map(|sample| sample.errors).sum();
    if errors > 0 {
        remarks.push(format!("{of}: {errors} requests failed."));
    }
    if let Some(rate) = job.rate.map(f64::from)
        && let Some(reached) = results.spread(|sample| sample.iops)
        && reached.min < KEPT * rate
    {
        let since = match way {
            Way::Frontend => "when requests were due",
            Way::Guest => "when fio submitted a request, which was later than it was due",
        };
        remarks.push(format!(
            "{of}: the rate was not kept: {} to {} of {rate} requests per second. Latencies count from {since}.",
            digits(reached.min),
            digits(reached.max)
        ));
    }
    if results.spread_of_known(|sample| sample.empty_polls).is_some_and(|polls| polls.median < BUSY) {
        remarks.push(format!("{of}: the load generator was the limit; the side could do more."));
    }
    remarks
}

/// Where a machine is itself virtual, its CPUs are moved apart and together, which changes everything by a factor.
fn remark_on_distance(comparison: &Comparison) -> Option<String> {
    let hops = comparison.rows.iter().flat_map(|row| &row.results).flat_map(Results::samples).filter_map(|s| s.hop_ns);
    let spread = Spread::of(hops)?;
    let text = format!(
        "A word took {} ns from the load generator's CPU to the side's and back (median; {} to {}).",
        digits(spread.median),
        digits(spread.min),
        digits(spread.max)
    );
    Some(match spread.max > 2.0 * spread.min {
        true => {
            text + " It changed by more than a factor of 2 between rounds: compare medians only, and repeat more often."
        }
        false => text,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits() {
        for (value, text) in [
            (0.0, "0.00"),
            (0.123, "0.12"),
            (9.994, "9.99"),
            (9.999, "10.0"),
            (99.96, "100"),
            (999.4, "999"),
            (999.6, "1.00 k"),
            (12_345.0, "12.3 k"),
            (999_499.0, "999 k"),
            (999_600.0, "1.00 M"),
            (2_965_000.0, "2.96 M"),
        ] {
            assert_eq!(short(value), text, "{value}");
        }
        assert_eq!(digits(0.000_01), "1.0e-5");
        assert_eq!(times(2.345), "2.35×");
    }
}
