//! The table in the terminal.

use std::fmt::Write as _;

use super::figures::{BASE, Measure, digits, remarks, short, times};
use super::{heading, settings_words};
use crate::comparison::{Comparison, Results, Row, Spread};

/// The columns after the side.
const COLUMNS: [&str; 8] =
    ["IOPS (min–max)", "× base", "IOPS/core (with drive)", "× base", "CPUs", "p50 µs", "p99 µs", "p99.9 µs"];
/// Written where there is nothing to write.
const NOTHING: &str = "–";
/// Longest line of the text below the table.
const LINE: usize = 118;

/// The comparison as text.
pub fn table(comparison: &Comparison) -> String {
    let mut text = String::new();
    let mut line = |line: &str| {
        text += line;
        text.push('\n');
    };
    line(&heading(comparison));
    for side in &comparison.environment.sides {
        line(&format!("  {:17} {}; {}", side.side.name(), side.program, side.storage));
    }
    line(&format!("  {}", settings_words(comparison)));
    line("");
    for text in rows(comparison) {
        line(&text);
    }
    line(&format!(
        "Medians; base: {BASE} = 1. IOPS/core: requests per second and host CPU charged; in brackets: a drive in"
    ));
    line("software charged as well. CPUs: host CPUs kept busy, + that drive's.");
    let notes = comparison.notes.iter().cloned().chain(remarks(comparison));
    for note in notes {
        line("");
        line(&wrap(&note));
    }
    text
}

/// All jobs' lines, their columns in line.
fn rows(comparison: &Comparison) -> Vec<String> {
    enum Line {
        Title(String),
        Cells(Vec<String>),
        Text(String),
    }
    let head = std::iter::once(String::new()).chain(COLUMNS.map(str::to_owned)).collect();
    let mut lines = vec![Line::Cells(head)];
    for row in &comparison.rows {
        lines.push(Line::Title(row.job.title()));
        for results in &row.results {
            let name = results.side.name();
            match results.samples().next() {
                Some(_) => lines.push(Line::Cells(cells(row, results))),
                None => {
                    let why = results.failures().next().unwrap_or("not measured");
                    lines.push(Line::Text(format!("  {name}  failed: {why}")));
                }
            }
        }
    }
    let mut widths = vec![0; COLUMNS.len() + 1];
    for line in &lines {
        if let Line::Cells(cells) = line {
            for (width, cell) in widths.iter_mut().zip(cells) {
                *width = (*width).max(cell.chars().count());
            }
        }
    }
    let layout = |line| match line {
        Line::Title(text) | Line::Text(text) => text,
        Line::Cells(cells) => {
            let mut text = String::new();
            for (at, (cell, width)) in cells.iter().zip(&widths).enumerate() {
                match at {
                    0 => write!(text, "{cell:width$}"),
                    _ => write!(text, "  {cell:>width$}"),
                }
                .expect("writing to a string does not fail");
            }
            text
        }
    };
    lines.into_iter().map(layout).collect()
}

fn cells(row: &Row, results: &Results) -> Vec<String> {
    let measure = Measure::of(&row.job);
    let rate = measure.spread(results).map_or_else(|| NOTHING.into(), |spread| spread_words(measure, spread));
    let relative = |measure: Measure, spread: Option<Spread>| {
        spread.zip(measure.base(row)).map(|(s, base)| times(s.median / base))
    };
    let (per_core, with_drive) = (Measure::PerCore.spread(results), Measure::PerCore.spread_with_drive(results));
    let mut per_core_words = per_core.map_or_else(|| NOTHING.into(), |spread| short(spread.median));
    let mut per_core_relative = relative(Measure::PerCore, per_core).unwrap_or_else(|| NOTHING.into());
    if let Some(with_drive) = with_drive {
        per_core_words += &format!(" ({})", short(with_drive.median));
        if let Some(words) = relative(Measure::PerCore, Some(with_drive)) {
            per_core_relative += &format!(" ({words})");
        }
    }
    let mut cores = Measure::Cores.spread(results).map_or_else(|| NOTHING.into(), |spread| digits(spread.median));
    if let Some(drive) =
        results.spread_of_known(|s| s.drive_cpu_seconds.map(|drive| drive / s.seconds.max(f64::MIN_POSITIVE)))
    {
        cores += &format!(" + {}", digits(drive.median));
    }
    let latency =
        |measure: Measure| measure.spread(results).map_or_else(|| NOTHING.into(), |spread| digits(spread.median));
    vec![
        format!("  {}", results.side.name()),
        rate,
        relative(measure, measure.spread(results)).unwrap_or_else(|| NOTHING.into()),
        per_core_words,
        per_core_relative,
        cores,
        latency(Measure::P50),
        latency(Measure::P99),
        latency(Measure::P999),
    ]
}

/// A median with its spread, if there is more than one value.
fn spread_words(measure: Measure, spread: Spread) -> String {
    let (words, unit): (fn(f64) -> String, _) = match measure {
        Measure::Throughput => (digits, " MiB/s"),
        _ => (short, ""),
    };
    match spread.min < spread.max {
        true => format!("{} ({}–{}){unit}", words(spread.median), words(spread.min), words(spread.max)),
        false => words(spread.median) + unit,
    }
}

/// Breaks a paragraph into lines, set in from the second one on.
fn wrap(text: &str) -> String {
    let mut lines = vec![String::from("-")];
    for word in text.split_whitespace() {
        let last = lines.last_mut().expect("begins with one");
        if last.chars().count() + 1 + word.chars().count() > LINE {
            lines.push(format!("  {word}"));
        } else {
            last.push(' ');
            last.push_str(word);
        }
    }
    lines.join("\n")
}
