//! The reports: a [`table`] for a terminal, [`json`] for programs, and an [`html`] page with a chart.

mod html;
mod table;

pub use html::html;
pub use table::table;

use crate::Comparison;

/// The whole comparison as JSON; `serde` reads it back into the same value.
pub fn json(comparison: &Comparison) -> String {
    serde_json::to_string_pretty(comparison).expect("a comparison has only strings as keys")
}
