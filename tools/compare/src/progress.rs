//! What a person sees while it runs: on standard error, and only if that is a terminal.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::comparison::{Outcome, Sample, Side};
use crate::job::{Figure, Job};

/// A bar over all rounds of all jobs, with a line for each step of the way.
pub struct Progress {
    bar: ProgressBar,
}

impl Progress {
    /// A bar; nothing is drawn if `visible` is false.
    pub fn new(visible: bool) -> Progress {
        let target = if visible { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(1), target);
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} (left: {eta})  {msg}");
        bar.set_style(style.expect("the template is a constant that the library accepts"));
        Progress { bar }
    }

    /// Says how many rounds there will be.
    pub fn expect(&self, rounds: u64) {
        self.bar.set_length(rounds.max(1));
        self.bar.reset_eta();
    }

    /// Says what is going on outside of rounds, such as a guest that boots.
    pub fn step(&self, what: impl Into<String>) {
        self.bar.set_message(what.into());
        self.bar.tick();
    }

    /// A round begins.
    pub fn begin(&self, job: &Job, side: Side) {
        self.step(format!("{}: {}", side.name(), job.title()));
    }

    /// A round has ended: its figure stays on the screen.
    pub fn end(&self, job: &Job, side: Side, outcome: &Outcome) {
        self.bar.println(format!("{:16} {:44} {}", side.name(), job.title(), result(job, outcome)));
        self.bar.inc(1);
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

fn result(job: &Job, outcome: &Outcome) -> String {
    let Sample { iops, mib_per_s, p50_us, errors, .. } = match outcome {
        Outcome::Failed(reason) => return format!("failed: {reason}"),
        Outcome::Measured(sample) => sample,
    };
    let figure = match job.figure() {
        Figure::Iops => format!("{iops:.0} IOPS"),
        Figure::Throughput => format!("{mib_per_s:.0} MiB/s"),
        Figure::Latency => format!("median {p50_us:.1} µs"),
    };
    if *errors > 0 { format!("{figure}, {errors} errors") } else { figure }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::default_jobs;

    #[test]
    fn each_job_tells_its_own_figure() {
        let sample = Sample { iops: 1234.6, mib_per_s: 77.7, p50_us: 8.25, operations: 5, ..Sample::default() };
        let jobs = default_jobs(1);
        let text = |job: usize| result(&jobs[job], &Outcome::Measured(sample.clone()));
        assert_eq!([text(0), text(2), text(4)], ["1235 IOPS", "78 MiB/s", "median 8.2 µs"]);
        assert_eq!(result(&jobs[0], &Outcome::Failed("gone".into())), "failed: gone");
        assert_eq!(result(&jobs[0], &Outcome::Measured(Sample { errors: 2, ..sample })), "1235 IOPS, 2 errors");
    }
}
