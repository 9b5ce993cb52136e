//! The page with the chart.

use crate::Comparison;

/// The comparison as one self-contained page.
pub fn html(comparison: &Comparison) -> String {
    format!("<!doctype html><title>compare</title><pre>{}</pre>", crate::report::table(comparison))
}
