//! The reports: a [`table`] for a terminal, [`json`] for programs, and an [`html`] page with a chart.

mod chart;
mod escape;
mod figures;
mod html;
mod table;
#[cfg(test)]
mod tests;

pub use html::html;
pub use table::table;

use crate::comparison::{Accelerator, Comparison, Way};

/// The whole comparison as JSON; `serde` reads it back into the same value.
pub fn json(comparison: &Comparison) -> String {
    serde_json::to_string_pretty(comparison).expect("a comparison has only strings as keys")
}

/// What was compared, when and how.
fn heading(comparison: &Comparison) -> String {
    format!("vhost-blk beside virtio-blk-data-plane: {}, {} UTC", way_words(comparison), comparison.date)
}

/// How the comparison was made.
fn way_words(comparison: &Comparison) -> &'static str {
    match (comparison.way, comparison.environment.accelerator) {
        (Way::Frontend, _) => "a front-end without a guest",
        (Way::Guest, Accelerator::Kvm) => "fio in a guest on KVM",
        (Way::Guest, Accelerator::Emulation) => "fio in an emulated guest (functional figures, not performance)",
        (Way::Guest, Accelerator::NoGuest) => "fio in a guest",
    }
}

/// The machine, the rounds.
fn settings_words(comparison: &Comparison) -> String {
    let (environment, settings) = (&comparison.environment, &comparison.settings);
    let plural = |count: u32, one: &str| if count == 1 { format!("1 {one}") } else { format!("{count} {one}s") };
    format!(
        "{}, {} CPUs, {}; {}; {} of {} s per job and side, interleaved; {} per disk",
        environment.cpu,
        environment.cpus,
        environment.kernel,
        environment.placement,
        plural(settings.repeat, "round"),
        settings.seconds,
        plural(settings.queues, "queue"),
    )
}
