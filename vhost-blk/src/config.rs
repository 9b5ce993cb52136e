//! What to serve: from the command line or from a TOML file, checked before anything is opened.

mod drives;
mod file;
#[cfg(test)]
mod tests;
mod values;

use std::path::PathBuf;
use std::time::Duration;

use crate::address::DeviceAddress;
use crate::guest_memory::Limits;

pub use drives::DriveSettings;
pub use file::load;
pub use values::{
    CpuList, DEFAULT_QUEUE_SIZE, DEFAULT_QUEUES, MAX_QUEUE_SIZE, MAX_QUEUES, SERIAL_BYTES, Serial, hold, io_timeout,
    namespace, queue_pairs, queue_size, queues, socket_path,
};

/// What a run of the program is told to do: what makes sense of it, and what does not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Configuration {
    /// What can be served.
    pub settings: Settings,
    /// Exports that are written wrongly.
    pub refused: Vec<RefusedExport>,
}

impl Configuration {
    /// What is wrong with the exports that are refused, in one line each.
    pub fn mistakes(&self) -> impl Iterator<Item = &str> {
        self.refused.iter().flat_map(|refused| &refused.mistakes).map(String::as_str)
    }
}

/// An export that makes no sense. It is not served; others are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedExport {
    /// Its socket, if it says one.
    pub socket: Option<PathBuf>,
    /// What is wrong with it; at least one thing, each in one line.
    pub mistakes: Vec<String>,
}

/// Everything one run of the program serves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// CPUs with one polled worker each; empty: one worker that is not pinned.
    pub cpus: Vec<usize>,
    /// How drives that do not answer are dealt with.
    pub patience: Patience,
    /// What one front-end may have mapped.
    pub memory: Limits,
    /// At least one; no two with the same socket.
    pub exports: Vec<ExportSettings>,
    /// Drives with settings of their own; no two of the same drive.
    pub drives: Vec<DriveSettings>,
}

/// How long a drive may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// For one command; then the controller is reset and its unfinished commands are issued again.
    pub io_timeout: Duration,
    /// For a drive that fails or disappears to be back. Requests wait so long, then they fail.
    pub hold: Duration,
}

impl Default for Patience {
    fn default() -> Patience {
        Patience { io_timeout: Duration::from_secs(30), hold: Duration::from_secs(30) }
    }
}

impl Patience {
    /// The default, but for what is given.
    pub fn with(io_timeout: Option<Duration>, hold: Option<Duration>) -> Patience {
        let default = Patience::default();
        Patience { io_timeout: io_timeout.unwrap_or(default.io_timeout), hold: hold.unwrap_or(default.hold) }
    }
}

/// One disk on one vhost-user socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportSettings {
    /// The controller.
    pub device: DeviceAddress,
    /// Where front-ends connect.
    pub listen: Listen,
    /// Namespace identifier; `None`: the only one the controller has.
    pub namespace: Option<u32>,
    /// Virtqueues offered: 1 to 256.
    pub queues: u16,
    /// Largest virtqueue accepted, in entries: a power of two, 2 to 32768.
    pub queue_size: u16,
    /// Queue pairs of the controller that the disk may count on; `None`: an even part of what it grants.
    pub queue_pairs: Option<u16>,
    /// Refuse every command that changes data.
    pub read_only: bool,
    /// What GET_ID tells the guest; `None`: the drive's serial number.
    pub serial: Option<Serial>,
}

impl std::fmt::Display for ExportSettings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: ", self.listen)?;
        match self.namespace {
            Some(id) => write!(f, "namespace {id}")?,
            None => f.write_str("the only namespace")?,
        }
        write!(f, " of {}, {} queues of up to {} entries", self.device, self.queues, self.queue_size)?;
        if self.read_only {
            f.write_str(", read-only")?;
        }
        match &self.serial {
            Some(serial) => write!(f, ", serial number {serial}"),
            None => Ok(()),
        }
    }
}

impl ExportSettings {
    /// What is wrong with it as it is written, whatever the drive is like. Its values have been checked one by one before.
    pub fn mistake(&self) -> Option<String> {
        let there = self.device.namespaces()?;
        match self.namespace {
            Some(id) if u64::from(id) > there => Some(format!(
                "{} has no namespace {id}: use 1 to {there}, or namespaces={id} in its address",
                self.device
            )),
            None if there > 1 => Some(format!("{} has {there} namespaces: say which one, by its number", self.device)),
            _ => None,
        }
    }

    /// Whether both may be used at the same time only by guests that know of each other.
    fn may_spoil(&self, other: &ExportSettings) -> bool {
        let same = match (self.namespace, other.namespace) {
            (Some(one), Some(two)) => one == two,
            // The only one there is, or the start will fail.
            _ => true,
        };
        same && self.device == other.device && !(self.read_only && other.read_only)
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
                "the settings of the drive {} are for nothing: no disk is on it; look whether its address is right",
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

/// Where an export's front-ends come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// A UNIX socket that we bind.
    Path(PathBuf),
    /// A socket inherited from the parent process: listening, or already connected.
    Fd(i32),
}

impl std::fmt::Display for Listen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Listen::Path(path) => path.display().fmt(f),
            Listen::Fd(number) => write!(f, "file descriptor {number}"),
        }
    }
}
