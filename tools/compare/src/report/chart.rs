//! Bar charts as SVG: one group of bars per job, one bar per side, normalised to data-plane = 1.

use std::fmt::Write as _;

use super::escape::escape;
use super::figures::{BASE, Measure, times};
use crate::comparison::{Comparison, Results, Row, Side, Spread};
use crate::job::Figure;

/// Sizes, in units of the drawing.
const WIDTH: f64 = 960.0;
const LABELS: f64 = 316.0;
/// Bars may be this long; the rest of the width is for what is written beside them.
const BARS: f64 = 344.0;
const BAR: f64 = 15.0;
const BAR_GAP: f64 = 3.0;
const GROUP_GAP: f64 = 16.0;
const AXIS: f64 = 22.0;
/// Vertical lines of the scale, about.
const LINES: f64 = 5.0;

/// A bar of a group.
struct Bar {
    side: Side,
    /// Normalised; `None` if there is nothing to draw.
    value: Option<Spread>,
    /// The normalised median with the CPU time of the drive in software charged.
    with_drive: Option<f64>,
    /// Written beside it.
    label: String,
}

/// The bars of a job.
struct JobBars {
    title: String,
    bars: Vec<Bar>,
}

/// A chart with its heading.
pub(super) struct Panel {
    /// What is shown.
    pub title: &'static str,
    /// How to read the chart.
    pub hint: &'static str,
    groups: Vec<JobBars>,
}

/// The charts of a comparison; those without a single bar are left out.
pub(super) fn panels(comparison: &Comparison) -> Vec<Panel> {
    let free = |row: &&Row| row.job.rate.is_none();
    let groups = |measure: fn(&Row) -> Measure| {
        comparison.rows.iter().filter(free).map(|row| JobBars::new(row, measure(row), row.job.title())).collect()
    };
    let latencies = comparison.rows.iter().filter(|row| row.job.figure() == Figure::Latency).flat_map(|row| {
        let parts = [(Measure::P50, "median"), (Measure::P99, "99 %"), (Measure::P999, "99.9 %")];
        parts.map(|(measure, name)| JobBars::new(row, measure, format!("{}: {name}", row.job.title())))
    });
    let at_a_rate = comparison.rows.iter().filter(|row| row.job.rate.is_some());
    let panels = vec![
        Panel {
            title: "Requests per second, or throughput",
            hint: "longer is better",
            groups: groups(|row| Measure::of(&row.job)),
        },
        Panel {
            title: "Requests per second and host CPU charged",
            hint: "longer is better; the solid part is what is left when a drive in software is charged too",
            groups: groups(|_| Measure::PerCore),
        },
        Panel { title: "Latency", hint: "shorter is better", groups: latencies.collect() },
        Panel {
            title: "Host CPUs kept busy at a fixed rate",
            hint: "shorter is better; the pale part is a drive in software",
            groups: at_a_rate.map(|row| JobBars::new(row, Measure::Cores, row.job.title())).collect(),
        },
    ];
    panels.into_iter().filter(|panel| !panel.groups.is_empty()).collect()
}

impl JobBars {
    fn new(row: &Row, measure: Measure, title: String) -> JobBars {
        let base = measure.base(row);
        JobBars { title, bars: row.results.iter().map(|results| Bar::new(results, measure, base)).collect() }
    }
}

impl Bar {
    fn new(results: &Results, measure: Measure, base: Option<f64>) -> Bar {
        let side = results.side;
        let nothing = |label: String| Bar { side, value: None, with_drive: None, label };
        if results.samples().next().is_none() {
            return nothing(format!("{side}: failed"));
        }
        let Some(spread) = measure.spread(results) else {
            return nothing(format!("{side}: too little CPU time to be known"));
        };
        let Some(base) = base else {
            return nothing(format!("{side}: {}; {BASE} was not measured", measure.words(spread.median)));
        };
        let with_drive = measure.spread_with_drive(results).map(|spread| spread.median / base);
        let value = Spread { median: spread.median / base, min: spread.min / base, max: spread.max / base };
        let mut label = times(value.median);
        if let Some(with_drive) = with_drive {
            label += &format!(" ({} with drive)", times(with_drive));
        }
        label += &format!("  {}", measure.words(spread.median));
        if results.failures().next().is_some() {
            label += &format!(", {} of {} rounds failed", results.failures().count(), results.rounds.len());
        }
        Bar { side, value: Some(value), with_drive, label }
    }

    /// How far the bar and its whisker reach.
    fn reach(&self) -> f64 {
        let value = self.value.map_or(0.0, |value| value.max);
        value.max(self.with_drive.unwrap_or(0.0))
    }

    /// True for what the scale has to have room for: not for a bound that does no work.
    fn sets_scale(&self) -> bool {
        self.side != Side::DataPlaneNull
    }
}

impl Panel {
    /// The drawing.
    pub(super) fn svg(&self) -> String {
        let bars = self.groups.iter().flat_map(|group| &group.bars).filter(|bar| bar.sets_scale());
        let reach = bars.map(Bar::reach).fold(1.0, f64::max) * 1.02;
        let scale = BARS / reach;
        let height_of = |group: &JobBars| group.bars.len() as f64 * (BAR + BAR_GAP) + GROUP_GAP;
        let bottom: f64 = self.groups.iter().map(height_of).sum();
        let mut svg = format!(
            "<svg viewBox=\"0 0 {WIDTH} {}\" role=\"img\" aria-label=\"{}, normalised to {BASE} = 1\">\n",
            bottom + AXIS,
            escape(self.title)
        );
        let mut add = |text: String| writeln!(svg, "{text}").expect("writing to a string does not fail");
        let step = step(reach);
        for line in 0..=(reach / step) as u32 {
            let value = f64::from(line) * step;
            let x = LABELS + value * scale;
            add(format!("<line class=\"grid\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"0\" y2=\"{bottom:.1}\"/>"));
            let text = format!("{value:.3}");
            let text = text.trim_end_matches('0').trim_end_matches('.');
            add(format!("<text class=\"tick\" x=\"{x:.1}\" y=\"{:.1}\">{text}</text>", bottom + 15.0));
        }
        let mut top = GROUP_GAP / 2.0;
        for group in &self.groups {
            let middle = top + (height_of(group) - GROUP_GAP) / 2.0;
            let title = escape(&group.title);
            add(format!("<text class=\"job\" x=\"{:.1}\" y=\"{middle:.1}\">{title}</text>", LABELS - 12.0));
            for (at, bar) in group.bars.iter().enumerate() {
                add(bar.svg(top + at as f64 * (BAR + BAR_GAP), scale));
            }
            top += height_of(group);
        }
        let one = LABELS + scale;
        add(format!("<line class=\"one\" x1=\"{one:.1}\" x2=\"{one:.1}\" y1=\"0\" y2=\"{bottom:.1}\"/>"));
        svg += "</svg>";
        svg
    }
}

impl Bar {
    fn svg(&self, y: f64, scale: f64) -> String {
        let class = match self.side {
            Side::VhostBlk => "ours",
            Side::DataPlane => "base",
            Side::DataPlaneNull => "null",
        };
        let middle = y + BAR / 2.0;
        let label = escape(&self.label);
        let Some(value) = self.value else {
            return format!("<text class=\"value missing\" x=\"{:.1}\" y=\"{middle:.1}\">{label}</text>", LABELS + 6.0);
        };
        let rect = |class: &str, length: f64| {
            format!(
                "<rect class=\"{class}\" x=\"{LABELS}\" y=\"{y:.1}\" width=\"{length:.1}\" height=\"{BAR}\" rx=\"2\"/>"
            )
        };
        // What is too long for the scale is cut, and shown to be.
        let length = |value: f64| (value * scale).min(BARS);
        let median = length(value.median);
        let mut svg = String::from("<g>");
        svg += &format!("<title>{}: {label}</title>", self.side);
        match self.with_drive.map(length) {
            None => svg += &rect(class, median),
            Some(with_drive) => {
                svg += &rect(&format!("{class} pale"), median.max(with_drive));
                svg += &rect(class, median.min(with_drive));
            }
        }
        let (min, max) = (LABELS + length(value.min), LABELS + length(value.max));
        if max - min >= 1.0 {
            svg += &format!(
                "<line class=\"spread\" x1=\"{min:.1}\" x2=\"{max:.1}\" y1=\"{middle:.1}\" y2=\"{middle:.1}\"/>"
            );
        }
        let cut = value.median * scale > BARS;
        if cut {
            let x = LABELS + BARS - 12.0;
            svg += &format!("<path class=\"cut\" d=\"M{x:.1} {y:.1}l5 {BAR}h4l-5 -{BAR}z\"/>");
        }
        let x = LABELS + length(self.reach()) + 8.0;
        svg += &format!("<text class=\"value\" x=\"{x:.1}\" y=\"{middle:.1}\">{label}</text></g>");
        svg
    }
}

/// The distance of the scale's lines: 1, 2 or 5 times a power of ten.
fn step(reach: f64) -> f64 {
    let wanted = reach / LINES;
    let power = 10f64.powf(wanted.log10().floor());
    let factor = [1.0, 2.0, 5.0].into_iter().find(|factor| factor * power >= wanted);
    factor.unwrap_or(10.0) * power
}
