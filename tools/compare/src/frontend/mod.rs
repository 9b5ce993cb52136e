//! The way `--frontend`: the same load generator, as a vhost-user front-end without a guest, against this target and
//! against `qemu-storage-daemon`.

use crate::progress::Progress;
use crate::{Comparison, Error, Plan};

/// Options of the way `--frontend` alone.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "With --frontend")]
pub struct FrontendOptions {}

/// Makes the comparison.
///
/// # Errors
/// What keeps the whole comparison from being made; failures of single rounds are in its rows.
pub fn run(_plan: &Plan, _options: &FrontendOptions, _progress: &Progress) -> Result<Comparison, Error> {
    Err(Error::Options("this build has no --frontend".into()))
}
