//! The page with the charts: one file that needs nothing else, light or dark as its reader likes it.

use super::escape::escape;
use super::figures::{BASE, Measure, digits, remarks, short, times};
use super::{chart, heading, settings_words};
use crate::comparison::{Comparison, Results, Row, Side, Spread};

const STYLE: &str = include_str!("style.css");

/// The comparison as one self-contained page.
pub fn html(comparison: &Comparison) -> String {
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" \
         content=\"width=device-width, initial-scale=1\">\n<meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>vhost-blk beside virtio-blk-data-plane</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n"
    );
    let (title, subtitle) =
        heading(comparison).split_once(": ").map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap_or_default();
    page += &format!("<h1>{}</h1>\n<p class=\"sub\">{}</p>\n", escape(&title), escape(&subtitle));
    page += &sides(comparison);
    page += &format!("<p class=\"sub\">{}</p>\n", escape(&settings_words(comparison)));
    page += &list("What to know before reading the figures", &comparison.notes);
    page += &format!(
        "<p class=\"legend\">Bars are medians, normalised to {BASE} = 1 (the upright line); the thin line is the smallest to \
         the largest round.</p>\n"
    );
    for panel in chart::panels(comparison) {
        page += &format!(
            "<section>\n<h2>{} <small>{}</small></h2>\n<div class=\"chart\">{}</div>\n</section>\n",
            escape(panel.title),
            escape(panel.hint),
            panel.svg()
        );
    }
    page += &table(comparison);
    page += &list("Remarks on these rounds", &remarks(comparison));
    page += "</main>\n</body>\n</html>\n";
    page
}

/// The legend, with what each side is.
fn sides(comparison: &Comparison) -> String {
    let mut text = String::from("<ul class=\"sides\">\n");
    for info in &comparison.environment.sides {
        let class = match info.side {
            Side::VhostBlk => "ours",
            Side::DataPlane => "base",
            Side::DataPlaneNull => "null",
        };
        text += &format!(
            "<li><span class=\"key {class}\"></span><b>{}</b> {}<br><small>{}</small></li>\n",
            info.side,
            escape(&info.program),
            escape(&info.storage)
        );
    }
    text + "</ul>\n"
}

fn list(title: &str, items: &[String]) -> String {
    if items.is_empty() {
        return String::new();
    }
    let items: String = items.iter().map(|item| format!("<li>{}</li>\n", escape(item))).collect();
    format!("<section class=\"notes\">\n<h2>{title}</h2>\n<ul>\n{items}</ul>\n</section>\n")
}

fn table(comparison: &Comparison) -> String {
    let mut text = String::from(
        "<section>\n<h2>All figures <small>medians; below them the smallest and the largest round</small></h2>\n\
         <div class=\"scroll\"><table>\n<thead><tr><th>Job</th><th>Side</th><th>Rate</th><th>× base</th><th>IOPS per core</th>\
         <th>× base</th><th>CPUs</th><th>p50 µs</th><th>p99 µs</th><th>p99.9 µs</th></tr></thead>\n",
    );
    for row in &comparison.rows {
        text += "<tbody>\n";
        for (at, results) in row.results.iter().enumerate() {
            let job = match at {
                0 => format!("<th rowspan=\"{}\">{}</th>", row.results.len(), escape(&row.job.title())),
                _ => String::new(),
            };
            text += &format!("<tr>{job}<td>{}</td>{}</tr>\n", results.side, cells(row, results));
        }
        text += "</tbody>\n";
    }
    text + "</table></div>\n</section>\n"
}

fn cells(row: &Row, results: &Results) -> String {
    if results.samples().next().is_none() {
        let why = results.failures().next().unwrap_or("not measured");
        return format!("<td colspan=\"8\" class=\"failed\">failed: {}</td>", escape(why));
    }
    let main = Measure::of(&row.job);
    let per_core = Measure::PerCore;
    let mut text = cell(main.spread(results), |value| main.words(value), None);
    text += &relative(row, main, main.spread(results), None);
    let with_drive = per_core.spread_with_drive(results);
    let words = with_drive.map(|spread| format!("{} with drive", short(spread.median)));
    text += &cell(per_core.spread(results), short, words);
    text += &relative(row, per_core, per_core.spread(results), with_drive);
    let drive = results.spread_of_known(|s| s.drive_cpu_seconds.map(|drive| drive / s.seconds.max(f64::MIN_POSITIVE)));
    let words = drive.map(|spread| format!("+ {} drive", digits(spread.median)));
    text += &cell(Measure::Cores.spread(results), digits, words);
    for measure in [Measure::P50, Measure::P99, Measure::P999] {
        text += &cell(measure.spread(results), digits, None);
    }
    text
}

/// A median, and below it its spread or something else.
fn cell(spread: Option<Spread>, words: impl Fn(f64) -> String, below: Option<String>) -> String {
    let Some(spread) = spread else {
        return "<td>–</td>".into();
    };
    let range = (spread.min < spread.max).then(|| format!("{}–{}", short(spread.min), short(spread.max)));
    let below: Vec<String> = range.into_iter().chain(below).collect();
    format!(
        "<td>{}<br><small>{}</small></td>",
        escape(&words(spread.median)),
        below.iter().map(|text| escape(text)).collect::<Vec<_>>().join("<br>")
    )
}

fn relative(row: &Row, measure: Measure, spread: Option<Spread>, with_drive: Option<Spread>) -> String {
    let Some((spread, base)) = spread.zip(measure.base(row)) else {
        return "<td>–</td>".into();
    };
    let with_drive = with_drive.map_or_else(String::new, |other| format!("{} with drive", times(other.median / base)));
    format!("<td><b>{}</b><br><small>{with_drive}</small></td>", times(spread.median / base))
}
