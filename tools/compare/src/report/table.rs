//! The table in the terminal.

use crate::Comparison;

/// The comparison as text.
pub fn table(comparison: &Comparison) -> String {
    let mut text = String::new();
    for row in &comparison.rows {
        for results in &row.results {
            let iops = results.spread(|sample| sample.iops).map_or("failed".into(), |s| format!("{:.0}", s.median));
            text += &format!("{:44} {:16} {iops}\n", row.job.title(), results.side.name());
        }
    }
    text
}
