//! What a comparison found: the one value that both ways produce and every report is made of.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::job::Job;

/// Version of the JSON form of a [`Comparison`].
pub const FORMAT: u32 = 1;

/// How a comparison is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// A load generator as vhost-user front-end, without a guest.
    Frontend,
    /// fio in a guest.
    Guest,
}

/// What runs a guest's CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Accelerator {
    /// None: no guest runs.
    NoGuest,
    /// The processor's virtualisation.
    Kvm,
    /// Emulation: the guest's own CPU is the limit, figures are functional, not performance.
    Emulation,
}

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// This project's target, vhost-blk.
    VhostBlk,
    /// QEMU's block layer in an IOThread; what everything is normalised to.
    DataPlane,
    /// QEMU's block layer in an IOThread, on a device that stores nothing: data-plane's upper bound. Front-end way only.
    DataPlaneNull,
}

impl Side {
    /// The name in tables and charts.
    pub fn name(self) -> &'static str {
        match self {
            Side::VhostBlk => "vhost-blk",
            Side::DataPlane => "data-plane",
            Side::DataPlaneNull => "data-plane, null",
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One round of one job on one side.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Length of the load in seconds; the CPU times are of the same stretch.
    pub seconds: f64,
    /// Completed requests.
    pub operations: u64,
    /// Failed requests among the completed ones.
    pub errors: u64,
    /// Completed requests per second.
    pub iops: f64,
    /// Mebibytes per second, read or written.
    pub mib_per_s: f64,
    /// Mean latency, in microseconds.
    pub mean_us: f64,
    /// Median latency.
    pub p50_us: f64,
    /// 99 % of the requests took no longer.
    pub p99_us: f64,
    /// 99.9 %.
    pub p999_us: f64,
    /// Host CPU seconds charged to the side: the target, or the IOThread's process with the kernel's work for it.
    pub cpu_seconds: f64,
    /// CPU seconds of a drive in software that is a process of its own: not charged, a real drive takes none.
    pub drive_cpu_seconds: Option<f64>,
    /// CPU seconds of whoever made the load: not charged, the same on all sides.
    pub load_cpu_seconds: Option<f64>,
    /// How often the load generator looked for completions in vain, 0 to 1; near 0 the generator is the limit.
    pub empty_polls: Option<f64>,
    /// Requests of a job with a rate that were due and could not be sent before the end.
    pub unsent: Option<u64>,
    /// A message between two of the CPUs used, there and back, in nanoseconds: the worse of before and after the round.
    /// Tells apart where a virtual machine's CPUs were placed meanwhile.
    pub hop_ns: Option<f64>,
}

impl Sample {
    /// Host CPUs that the side kept busy.
    pub fn cores(&self) -> f64 {
        if self.seconds > 0.0 { self.cpu_seconds / self.seconds } else { 0.0 }
    }

    /// Requests per second and host CPU; `None` if the CPU time is too short to be known (the system counts in
    /// hundredths of a second).
    pub fn iops_per_core(&self) -> Option<f64> {
        (self.cpu_seconds >= 0.01).then(|| self.operations as f64 / self.cpu_seconds)
    }

    /// Requests per second and host CPU, with the CPU time of the drive in software charged as well; `None` if the time is too
    /// short to be known.
    pub fn iops_per_core_with_drive(&self) -> Option<f64> {
        let all = self.cpu_seconds + self.drive_cpu_seconds.unwrap_or(0.0);
        (all >= 0.01).then(|| self.operations as f64 / all)
    }
}

/// How a round ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The round was measured.
    Measured(Sample),
    /// The round was not measured, for this reason. It never counts as zero.
    Failed(String),
}

/// The rounds of one job on one side.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// Where.
    pub side: Side,
    /// In the order in which they ran.
    pub rounds: Vec<Outcome>,
}

/// One job on all sides.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// What was done.
    pub job: Job,
    /// One entry per side that took part.
    pub results: Vec<Results>,
}

impl Row {
    /// What `side` did, if it took part.
    pub fn side(&self, side: Side) -> Option<&Results> {
        self.results.iter().find(|results| results.side == side)
    }
}

/// A median with its spread.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The value in the middle; of an even number of values, the mean of the two.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// Median and spread of `values`; `None` if there are none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Spread> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let median = match values.len() {
            0 => return None,
            count if count % 2 == 0 => (values[middle - 1] + values[middle]) / 2.0,
            _ => values[middle],
        };
        Some(Spread { median, min: values[0], max: values[values.len() - 1] })
    }
}

impl Results {
    /// The rounds that were measured.
    pub fn samples(&self) -> impl Iterator<Item = &Sample> {
        self.rounds.iter().filter_map(|round| match round {
            Outcome::Measured(sample) => Some(sample),
            Outcome::Failed(_) => None,
        })
    }

    /// Why rounds failed.
    pub fn failures(&self) -> impl Iterator<Item = &str> {
        self.rounds.iter().filter_map(|round| match round {
            Outcome::Measured(_) => None,
            Outcome::Failed(reason) => Some(reason.as_str()),
        })
    }

    /// Median and spread of a figure over the rounds that were measured.
    pub fn spread(&self, figure: impl Fn(&Sample) -> f64) -> Option<Spread> {
        Spread::of(self.samples().map(figure))
    }

    /// Median and spread of a figure over the measured rounds that have it.
    pub fn spread_of_known(&self, figure: impl Fn(&Sample) -> Option<f64>) -> Option<Spread> {
        Spread::of(self.samples().filter_map(figure))
    }
}

/// What one side ran on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SideInfo {
    /// Which.
    pub side: Side,
    /// The program with its version.
    pub program: String,
    /// The storage below it.
    pub storage: String,
}

/// Where and with what the comparison was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Environment {
    /// What ran the guest's CPUs.
    pub accelerator: Accelerator,
    /// What each side was and stood on.
    pub sides: Vec<SideInfo>,
    /// Processor model.
    pub cpu: String,
    /// CPUs of the host.
    pub cpus: usize,
    /// The host's kernel.
    pub kernel: String,
    /// Which CPUs had which part.
    pub placement: String,
}

/// How long and how often was measured, and on what disks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Rounds of each job on each side.
    pub repeat: u32,
    /// Length of a round's load in seconds.
    pub seconds: f64,
    /// Virtqueues per disk.
    pub queues: u32,
    /// Size of a disk in bytes.
    pub disk_bytes: u64,
}

/// Everything that was found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// Version of this form.
    pub format: u32,
    /// How the comparison was made.
    pub way: Way,
    /// When, in UTC, such as `2026-01-31 12:00`.
    pub date: String,
    /// Where and with what.
    pub environment: Environment,
    /// How long and how often was measured, and on what disks.
    pub settings: Settings,
    /// What a reader has to know to read the figures: what they can show, and what they cannot.
    pub notes: Vec<String>,
    /// The results, in the order of the jobs.
    pub rows: Vec<Row>,
}

impl Comparison {
    /// Adds the outcome of a round of `job` on `side`.
    pub fn add(&mut self, job: &Job, side: Side, outcome: Outcome) {
        let at = self.rows.iter().position(|row| row.job == *job).unwrap_or_else(|| {
            self.rows.push(Row { job: job.clone(), results: Vec::new() });
            self.rows.len() - 1
        });
        let results = &mut self.rows[at].results;
        match results.iter_mut().find(|results| results.side == side) {
            Some(results) => results.rounds.push(outcome),
            None => {
                results.push(Results { side, rounds: vec![outcome] });
                results.sort_by_key(|results| results.side);
            }
        }
    }

    /// Joins a comparison that was made of other sides or other jobs, on the same machine.
    ///
    /// # Errors
    /// When the two do not belong together: the reason.
    pub fn join(mut self, other: Comparison) -> Result<Comparison, String> {
        let (one, two) = (&self.environment, &other.environment);
        if (self.format, self.way, one.accelerator) != (other.format, other.way, other.environment.accelerator) {
            return Err("they were not made in the same way".into());
        }
        if (&one.cpu, one.cpus, &one.kernel) != (&two.cpu, two.cpus, &two.kernel) {
            return Err("they were made on different machines or kernels".into());
        }
        if self.settings != other.settings {
            return Err("their rounds, queues or disks are not the same".into());
        }
        for row in other.rows {
            for results in row.results {
                let taken = self.rows.iter().find(|mine| mine.job == row.job).and_then(|mine| mine.side(results.side));
                if taken.is_some() {
                    return Err(format!("both have {} on {}", row.job.name, results.side));
                }
                for outcome in results.rounds {
                    self.add(&row.job, results.side, outcome);
                }
            }
        }
        for info in other.environment.sides {
            if !self.environment.sides.contains(&info) {
                self.environment.sides.push(info);
            }
        }
        self.environment.sides.sort_by_key(|info| info.side);
        for note in other.notes {
            if !self.notes.contains(&note) {
                self.notes.push(note);
            }
        }
        Ok(self)
    }

    /// True if there are results and no round of any job failed.
    pub fn is_success(&self) -> bool {
        let mut results = self.rows.iter().flat_map(|row| &row.results).peekable();
        results.peek().is_some() && results.all(|results| results.failures().next().is_none())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(Spread::of([]), None);
        assert_eq!(Spread::of([3.0]), Some(Spread { median: 3.0, min: 3.0, max: 3.0 }));
        assert_eq!(Spread::of([9.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 9.0 }));
        assert_eq!(Spread::of([4.0, 1.0, 2.0, 100.0]), Some(Spread { median: 3.0, min: 1.0, max: 100.0 }));
    }

    #[test]
    fn cores_and_requests_per_core() {
        let mut sample = Sample { seconds: 2.0, operations: 3000, cpu_seconds: 1.0, ..Sample::default() };
        assert_eq!((sample.cores(), sample.iops_per_core()), (0.5, Some(3000.0)));
        assert_eq!(sample.iops_per_core_with_drive(), Some(3000.0));
        sample.drive_cpu_seconds = Some(2.0);
        assert_eq!(sample.iops_per_core_with_drive(), Some(1000.0));
        sample.cpu_seconds = 0.0;
        assert_eq!((sample.cores(), sample.iops_per_core()), (0.0, None), "no CPU time is not an infinite rate");
        assert_eq!(Sample::default().cores(), 0.0);
    }
}
