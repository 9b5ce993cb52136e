//! What a person sees: a progress bar while the load runs, and a table after it.

use std::fmt::Write as _;

use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::report::{Phase, Progress, Report};

/// Steps of the bar.
const STEPS: u64 = 1000;

/// A progress bar on standard error; invisible when that is not a terminal.
pub struct Bar {
    bar: ProgressBar,
    phase: Option<Phase>,
}

impl Bar {
    /// A bar, or nothing at all if `visible` is false.
    pub fn new(visible: bool) -> Bar {
        let target = match visible {
            true => ProgressDrawTarget::stderr(),
            false => ProgressDrawTarget::hidden(),
        };
        Bar { bar: ProgressBar::with_draw_target(Some(STEPS), target), phase: None }
    }

    /// Shows `progress`; to be given to [`run`](crate::run).
    pub fn show(&mut self, progress: &Progress) {
        if self.phase != Some(progress.phase) {
            self.phase = Some(progress.phase);
            let template = match progress.fraction {
                Some(_) => "{prefix:9} {bar:40} {msg}",
                None => "{prefix:9} {spinner} {msg}",
            };
            let style = ProgressStyle::with_template(template)
                .expect("the templates above are constants that the library accepts");
            self.bar.set_style(style);
            self.bar.set_prefix(match progress.phase {
                Phase::Load => "load",
                Phase::ReadBack => "read back",
            });
        }
        let rate = |amount: u64| amount as f64 / progress.elapsed.as_secs_f64().max(0.001);
        self.bar.set_message(format!(
            "{} requests, {:.0}/s, {}/s",
            progress.operations,
            rate(progress.operations),
            HumanBytes(rate(progress.bytes) as u64),
        ));
        match progress.fraction {
            Some(fraction) => self.bar.set_position((fraction * STEPS as f64) as u64),
            None => self.bar.tick(),
        }
    }

    /// Takes the bar away.
    pub fn finish(self) {
        self.bar.finish_and_clear();
    }
}

/// Two columns, the second to the right.
#[derive(Default)]
pub struct Table {
    rows: Vec<(String, String)>,
}

impl Table {
    /// Adds a row.
    pub fn row(&mut self, name: impl Into<String>, value: impl Into<String>) -> &mut Self {
        self.rows.push((name.into(), value.into()));
        self
    }

    /// Adds what every load measures.
    pub fn report(&mut self, report: &Report) -> &mut Self {
        let kinds = [
            ("reads", report.reads),
            ("writes", report.writes),
            ("flushes", report.flushes),
            ("discards", report.discards),
            ("write zeroes", report.write_zeroes),
        ];
        self.row("operations", report.operations.to_string());
        for (name, count) in kinds {
            if count > 0 {
                self.row(format!("  {name}"), count.to_string());
            }
        }
        self.row("IOPS", format!("{:.0}", report.iops)).row("MiB/s", format!("{:.1}", report.mib_per_s));
        let latencies = [
            ("mean", report.mean_us),
            ("p50", report.p50_us),
            ("p90", report.p90_us),
            ("p99", report.p99_us),
            ("p99.9", report.p999_us),
            ("max", report.max_us),
        ];
        for (name, value) in latencies {
            self.row(format!("latency {name}"), format!("{value:.1} µs"));
        }
        self.row("I/O errors", report.io_errors.to_string());
        self
    }

    /// The text, one line per row.
    pub fn render(&self) -> String {
        let width = |column: fn(&(String, String)) -> &String| {
            let widths = self.rows.iter().map(|row| column(row).chars().count());
            widths.max().unwrap_or(0)
        };
        let (names, values) = (width(|row| &row.0), width(|row| &row.1));
        let mut text = String::new();
        for (name, value) in &self.rows {
            writeln!(text, "{name:names$}  {value:>values$}").expect("writing to a string does not fail");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::default();
        table.row("a", "1").row("long name", "12.5 µs");
        assert_eq!(table.render(), "a                1\nlong name  12.5 µs\n");
    }
}
