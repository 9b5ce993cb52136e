//! What to serve: from the command line or from a TOML file, checked before anything is opened.
//!
//! This module owns the rules for every value, and what a configuration means. It opens nothing but the file itself.

mod bounds;
mod cpu_list;
mod drives;
mod error;
mod file;
#[cfg(test)]
mod tests;
mod values;

use std::path::PathBuf;
use std::time::Duration;

pub use crate::blk::Serial;
pub use crate::vhost_user::export::ExportSettings;
pub use crate::vhost_user::listener::Listen;
use crate::virtio::memory::Limits;

pub use bounds::{DEFAULT_QUEUE_SIZE, DEFAULT_QUEUES, MAX_QUEUE_SIZE, MAX_QUEUES};
pub use cpu_list::{CpuList, CpuListError, CpuListFault};
pub use drives::DriveSettings;
pub use error::{ConfigError, FileFault, HOW_TO_SERVE, Mistake, ValueError};
pub use file::load;
pub use values::{guest_memory, guest_regions, hold, io_timeout, namespace, queue_pairs, queue_size, queues};

/// What a run of the program is told to do: what makes sense of it, and what does not.
#[derive(Clone, Debug, PartialEq)]
pub struct Configuration {
    /// What can be served.
    pub settings: Settings,
    /// Exports that are written wrongly.
    pub refused: Vec<RefusedExport>,
}

impl Configuration {
    /// What is wrong with the exports that are refused.
    pub fn mistakes(&self) -> impl Iterator<Item = &Mistake> {
        self.refused.iter().flat_map(|refused| &refused.mistakes)
    }
}

/// An export that makes no sense. It is not served; others are.
#[derive(Clone, Debug, PartialEq)]
pub struct RefusedExport {
    /// The export's socket, if the section names one.
    pub socket: Option<PathBuf>,
    /// What is wrong with it; at least one thing.
    pub mistakes: Vec<Mistake>,
}

/// Everything one run of the program serves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// CPUs with one polled worker each; empty: one worker that is not pinned.
    pub cpus: Vec<usize>,
    /// How drives that do not answer are dealt with.
    pub timeouts: DriveTimeouts,
    /// What one front-end may have mapped.
    pub memory: Limits,
    /// At least one; no two with the same socket.
    pub exports: Vec<ExportSettings>,
    /// Where the control socket is; `None`: there is none.
    pub rpc_socket: Option<PathBuf>,
    /// Drives with settings of their own; no two of the same drive.
    pub drives: Vec<DriveSettings>,
}

/// How long a drive may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DriveTimeouts {
    /// For one command; then the controller is reset and its unfinished commands are issued again.
    pub io_timeout: Duration,
    /// For a drive that fails or disappears to be back. Requests wait so long, then they fail.
    pub hold: Duration,
}

impl Default for DriveTimeouts {
    fn default() -> DriveTimeouts {
        DriveTimeouts { io_timeout: Duration::from_secs(30), hold: Duration::from_secs(30) }
    }
}

impl DriveTimeouts {
    /// The default, but for what is given.
    pub fn with(io_timeout: Option<Duration>, hold: Option<Duration>) -> DriveTimeouts {
        let default = DriveTimeouts::default();
        DriveTimeouts { io_timeout: io_timeout.unwrap_or(default.io_timeout), hold: hold.unwrap_or(default.hold) }
    }
}

impl Settings {
    /// What makes sense and is hardly meant: exports of one namespace, of which at least one can write to it.
    pub fn warnings(&self) -> Vec<String> {
        let earlier = |index: usize, export: &ExportSettings| {
            self.exports[..index].iter().find(|earlier| earlier.may_spoil(export))
        };
        let pairs =
            self.exports.iter().enumerate().filter_map(|(index, export)| Some((earlier(index, export)?, export)));
        let unused = self.drives.iter().filter(|drive| self.exports.iter().all(|export| export.device != drive.device));
        let unused = unused.map(|drive| {
            format!(
                "the [[drive]] section of {} has no effect: no export uses that drive; check its address",
                drive.device
            )
        });
        pairs
            .map(|(one, two)| {
                format!(
                    "{} and {} serve the same namespace of {}: two guests that do not know of each other destroy what is on it; \
                     make both read-only, or give each a namespace of its own",
                    one.listen, two.listen, one.device
                )
            })
            .chain(unused)
            .collect()
    }
}
