//! The way `--guest`: fio in the same guest, once on this target and once on virtio-blk-data-plane.

use crate::progress::Progress;
use crate::{Comparison, Error, Plan};

/// Options of the way `--guest` alone.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "With --guest")]
pub struct GuestOptions {}

/// Makes the comparison.
///
/// # Errors
/// What keeps the whole comparison from being made; failures of single rounds are in its rows.
pub fn run(_plan: &Plan, _options: &GuestOptions, _progress: &Progress) -> Result<Comparison, Error> {
    Err(Error::Options("this build has no --guest; use --frontend".into()))
}
