//! What is wrong with a configuration: as a whole ([`ConfigError`]), in a line of its file ([`Mistake`]), with a value
//! ([`ValueError`]). Each message says what to write instead.

use std::fmt;
use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::bounds::{LEAST_COMMAND_SECONDS, LEAST_DRIVE_SECONDS, MAX_QUEUE_SIZE, MAX_QUEUES, MOST_SECONDS};
use super::cpu_list::CpuListError;
use crate::drive::{DeviceAddress, SocketPathError};
use crate::vhost_user::export::ExportMistake;
use crate::virtio::memory::LimitError;

/// A configuration of which nothing can be served.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// No drive is named on the command line.
    #[error("no device to serve: {help}", help = HOW_TO_SERVE)]
    NoDevice,
    /// No socket is named on the command line.
    #[error("no socket to serve on: {help}", help = HOW_TO_SERVE)]
    NoSocket,
    /// The socket's path on the command line cannot be one.
    #[error(transparent)]
    SocketPath(#[from] SocketPathError),
    /// The options for the disk contradict the drive's address.
    #[error(transparent)]
    Export(#[from] ExportMistake),
    /// The configuration file cannot be read.
    #[error("cannot read the configuration file {path}: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The configuration file makes no sense; at least one mistake.
    #[error("{lines}", lines = self.lines().join("; "))]
    File(Vec<Mistake>),
}

/// How to say what to serve.
pub const HOW_TO_SERVE: &str =
    "use --device ADDRESS with --socket-path PATH, or --config FILE (vhost-blk --help tells more)";

impl ConfigError {
    /// Everything that is wrong, in one line each.
    pub fn lines(&self) -> Vec<String> {
        match self {
            ConfigError::File(mistakes) => mistakes.iter().map(Mistake::to_string).collect(),
            error => vec![error.to_string()],
        }
    }
}

/// One thing that is wrong in a configuration file. As text it is one line.
#[derive(Clone, Debug, PartialEq, Error)]
pub struct Mistake {
    /// What the file is called.
    pub file: String,
    /// The line, counted from 1; `None`: the mistake is in no line.
    pub line: Option<usize>,
    /// What is wrong there.
    #[source]
    pub fault: FileFault,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        if let Some(line) = self.line {
            write!(f, ", line {line}")?;
        }
        // The parser's message may go over several lines.
        write!(f, ": {}", self.fault.to_string().split_whitespace().collect::<Vec<_>>().join(" "))
    }
}

/// What can be wrong in a configuration file.
#[derive(Clone, Debug, PartialEq, Error)]
#[non_exhaustive]
pub enum FileFault {
    /// The file has no `[[export]]` section.
    #[error("no export: add an [[export]] section with device and socket-path")]
    NoExport,
    /// It is no TOML; what the parser says.
    #[error("{0}")]
    Syntax(String),
    /// A value has the wrong type, or cannot be read; what the parser says.
    #[error("{0}")]
    Type(String),
    /// A value breaks its rule.
    #[error(transparent)]
    Value(#[from] ValueError),
    /// The socket's path cannot be one.
    #[error(transparent)]
    SocketPath(#[from] SocketPathError),
    /// The section contradicts the address of its drive.
    #[error(transparent)]
    Export(#[from] ExportMistake),
    /// A key that has to be there is not.
    #[error("missing field `{0}`")]
    Missing(&'static str),
    /// A key is not known.
    #[error("unknown field `{key}`, expected one of {expected}")]
    Unknown {
        /// The key.
        key: String,
        /// The keys that are known.
        expected: String,
    },
    /// A key that begins sections has a value instead.
    #[error("{0} is no section: write [[{0}]]")]
    NoSection(&'static str),
    /// Two `[[drive]]` sections are about one drive.
    #[error("the drive {drive} has two sections (see line {earlier}): write one")]
    TwoDriveSections {
        /// The drive.
        drive: DeviceAddress,
        /// The line of the earlier section.
        earlier: usize,
    },
    /// The export's drive has a `[[drive]]` section with mistakes.
    #[error("the [[drive]] section of its drive has mistakes (see line {line})")]
    DriveSection {
        /// The line of that section.
        line: usize,
    },
    /// Nobody can tell which of the exports on one socket is meant: a guest must not find another one's disk.
    #[error("two exports use the socket {socket} (see line {others}), so neither is served: give each its own")]
    SharedSocket {
        /// The socket.
        socket: PathBuf,
        /// The lines of the others.
        others: String,
    },
    /// A file can hold the data of one embedded controller only.
    #[error("{drive} uses the file {file}, and so does {other}: use one address for both, or two files")]
    SharedFile {
        /// The drive.
        drive: DeviceAddress,
        /// The drive that uses the file, too.
        other: DeviceAddress,
        /// The file.
        file: PathBuf,
    },
}

/// The value of an option, or of a key in the configuration file, breaks its rule.
#[derive(Clone, Debug, PartialEq, Error)]
#[non_exhaustive]
pub enum ValueError {
    /// An option needs a whole number.
    #[error("not a whole number")]
    NotANumber,
    /// An option needs a time.
    #[error("not a number of seconds")]
    NotSeconds,
    /// Number of virtqueues.
    #[error("{0} queues: use 1 to {most}", most = MAX_QUEUES)]
    Queues(u64),
    /// Size of the largest virtqueue.
    #[error("queue size {0}: use a power of two from 2 to {most}", most = MAX_QUEUE_SIZE)]
    QueueSize(u64),
    /// A disk's share of queue pairs, or those to ask a drive for.
    #[error("{0} queue pairs: use 1 to {most}", most = u16::MAX - 1)]
    QueuePairs(u64),
    /// Namespace identifier.
    #[error("namespace {0}: use 1 to {most}", most = u32::MAX - 1)]
    Namespace(u64),
    /// Time for one command, in seconds.
    #[error("{0} seconds for a command: use {least} to {most}", least = LEAST_COMMAND_SECONDS, most = MOST_SECONDS)]
    IoTimeout(f64),
    /// How long requests wait for a drive, in seconds.
    #[error("{0} seconds to wait for a drive: use 0 to {most}", most = MOST_SECONDS)]
    Hold(f64),
    /// Time that a drive has for something, in seconds.
    #[error("{0} seconds for a drive: use {least} to {most}", least = LEAST_DRIVE_SECONDS, most = MOST_SECONDS)]
    DriveTimeout(f64),
    /// What a front-end may have mapped.
    #[error(transparent)]
    GuestMemory(LimitError),
    /// CPUs of the workers.
    #[error(transparent)]
    Cpus(#[from] CpuListError),
}
