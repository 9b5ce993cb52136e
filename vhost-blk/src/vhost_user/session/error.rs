//! What a front-end is refused ([`SessionError`]), and why its connection ends ([`ConnectionError`]).

use std::io;

use rustix::io::Errno;
use thiserror::Error;

use crate::datapath::worker::WorkerError;
use crate::drive;
use crate::vhost_user::export::FlushError;
use crate::virtio::memory::{MemoryError, RegionDescription};
use crate::virtio::ring::{InflightError, RingError};

/// A message of the front-end is refused, or a ring that it wants cannot run. Whoever reads the message knows the disk.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SessionError {
    /// SET_FEATURES with features that are not offered.
    #[error("feature bits {0:#x} are not offered")]
    Features(u64),
    /// SET_PROTOCOL_FEATURES with features that are not offered.
    #[error("protocol feature bits {0:#x} are not offered")]
    ProtocolFeatures(u64),
    /// SET_FEATURES would change how the entries of a running ring are read.
    #[error("rings run; stop them before their format changes")]
    FormatOfRunningRings,
    /// The message is about a ring that the disk does not have.
    #[error("there is no ring {ring}; {offered} are offered")]
    NoSuchRing {
        /// The ring's index.
        ring: u32,
        /// Rings that the disk has.
        offered: usize,
    },
    /// The message cannot take effect while the ring runs.
    #[error("ring {ring} runs; stop it with GET_VRING_BASE first")]
    RingRuns {
        /// The ring's index.
        ring: usize,
    },
    /// SET_VRING_NUM with a size that is not accepted.
    #[error("ring {ring} with {entries} entries: 1 to {most} are accepted (--queue-size sets the limit)")]
    RingSize {
        /// The ring's index.
        ring: usize,
        /// Entries asked for.
        entries: u32,
        /// Most entries accepted.
        most: u16,
    },
    /// SET_VRING_ADDR asks for dirty logging.
    #[error("dirty logging is not offered")]
    DirtyLogging,
    /// A descriptor for notifications is something else than an eventfd.
    #[error("the {purpose} descriptor is not an eventfd")]
    NotAnEventfd {
        /// What it is to be for: kick, call or error.
        purpose: &'static str,
    },
    /// A memory region cannot be used.
    #[error("memory: {0}")]
    Memory(#[source] MemoryError),
    /// SET_CONFIG on a disk that has no write cache, or is read-only.
    #[error("the write cache mode of this disk cannot be changed")]
    FixedMode,
    /// SET_CONFIG changes what cannot be changed, or to what it cannot be.
    #[error("{0}")]
    Config(&'static str),
    /// GET_CONFIG beyond the configuration space.
    #[error("{bytes} bytes at {offset} lie outside the configuration space")]
    OutsideConfig {
        /// First byte asked for.
        offset: u32,
        /// Bytes asked for.
        bytes: u32,
    },
    /// The driver chose write-through, and what is in the drive's cache cannot be made durable.
    #[error("the drive's cache cannot be flushed, so it stays in use: {0}")]
    WriteThrough(#[source] FlushError),
    /// GET_INFLIGHT_FD for more rings than there are.
    #[error("a log for {asked} rings was asked for; {offered} are offered")]
    LogRings {
        /// Rings asked for.
        asked: u16,
        /// Rings that the disk has.
        offered: usize,
    },
    /// GET_INFLIGHT_FD for larger rings than are accepted.
    #[error("a log for rings of {asked} entries was asked for; {most} are accepted")]
    LogEntries {
        /// Entries asked for.
        asked: u16,
        /// Most entries accepted.
        most: u16,
    },
    /// The log of requests in flight cannot be used.
    #[error(transparent)]
    Inflight(#[from] InflightError),
    /// SET_INFLIGHT_FD would take away the log of running rings.
    #[error("rings run; stop them before their log changes")]
    LogOfRunningRings,
    /// The process has no descriptor left.
    #[error("cannot duplicate the descriptor: {0}")]
    Duplicate(#[source] io::Error),
    /// The ring's memory is not as it has to be.
    #[error("ring {ring} cannot run: {source}")]
    Ring {
        /// The ring's index.
        ring: usize,
        /// What is wrong with it.
        source: RingError,
    },
    /// The ring's part of the log of requests in flight cannot be used.
    #[error("ring {ring} cannot run: {source}")]
    RingLog {
        /// The ring's index.
        ring: usize,
        /// What is wrong with it.
        source: InflightError,
    },
    /// The process has no descriptor left for a ring that is started.
    #[error("ring {ring}: cannot duplicate its {purpose} descriptor: {source}")]
    RingDescriptor {
        /// The ring's index.
        ring: usize,
        /// What it is for: kick, call or error.
        purpose: &'static str,
        /// What the system says.
        source: io::Error,
    },
    /// The drive has no queue pair for the ring.
    #[error(transparent)]
    Lease(Box<drive::Error>),
    /// A worker does not take the new memory of its rings.
    #[error(transparent)]
    Worker(#[from] WorkerError),
}

impl From<drive::Error> for SessionError {
    fn from(error: drive::Error) -> SessionError {
        SessionError::Lease(Box::new(error))
    }
}

/// The front-end cannot be told that the configuration space has changed.
#[derive(Debug, Error)]
pub(super) enum ChannelError {
    /// BACKEND_REQ or CONFIG is not negotiated.
    #[error("it has not negotiated that")]
    NotNegotiated,
    /// SET_BACKEND_REQ_FD has not come.
    #[error("it has opened no channel for that")]
    NotOpened,
    /// The rest of the message could only be sent by waiting for the front-end.
    #[error("the channel took a part of the message")]
    Partial,
    /// The channel does not work.
    #[error("{0}")]
    Send(Errno),
}

/// Memory of the front-end cannot be used any more: its session has to end.
#[derive(Debug, Error)]
pub enum MemoryLoss {
    /// The drive is back, and does not take all of it.
    #[error("the drive is back, and not all of the guest's memory can be mapped for it: {0}")]
    Unreachable(String),
    /// Pages of a region are gone.
    #[error("{WHY}: the {0} has lost pages. {HELP}", WHY = WHY_LOST, HELP = WHAT_HELPS)]
    Region(RegionDescription),
    /// Pages of the log of requests in flight are gone.
    #[error("{WHY}: the log of requests in flight has lost pages. {HELP}", WHY = WHY_LOST, HELP = WHAT_HELPS)]
    Log,
}

const WHY_LOST: &str = "the file of its memory was shortened while it was in use, or its file system is full";
const WHAT_HELPS: &str = "Allocate all of a guest's memory in advance (prealloc=on), on a file system with room for it";

/// A connection cannot go on.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ConnectionError {
    /// The socket cannot be used.
    #[error("cannot {what}: {source}")]
    Socket {
        /// What was attempted.
        what: &'static str,
        /// What the system says.
        source: io::Error,
    },
    /// What comes is no vhost-user message; where the next one begins is not known.
    #[error("message {request} with flags {flags:#x} and {bytes} bytes is not a vhost-user message")]
    NoMessage {
        /// What should be the kind of the message.
        request: u32,
        /// What should be its flags.
        flags: u32,
        /// What should be the length of its body.
        bytes: u32,
    },
    /// The rest of a message does not come in time.
    #[error("{0} did not arrive completely in time")]
    Incomplete(String),
    /// The `vhost` crate cannot go on.
    #[error(transparent)]
    Protocol(#[from] vhost::vhost_user::Error),
    /// A message that is refused needs an answer of its own, for which there is no "no".
    #[error("{request} cannot be answered: {why}")]
    Unanswerable {
        /// Kind of the message.
        request: String,
        /// Why it is refused.
        why: Box<MessageRefusal>,
    },
    /// A message is refused, and the front-end has not asked to be told so: it would believe that all is well.
    #[error("{request} refused: {why}")]
    Refused {
        /// Kind of the message.
        request: String,
        /// Why it is refused.
        why: Box<MessageRefusal>,
    },
    /// Memory of the front-end was found without pages.
    #[error(transparent)]
    Memory(#[from] MemoryLoss),
}

/// Why a message is refused.
#[derive(Debug, Error)]
pub enum MessageRefusal {
    /// Its kind is not offered.
    #[error("it is not offered")]
    NotOffered,
    /// Descriptors come with it.
    #[error("no descriptor belongs to it")]
    Descriptors,
    /// The session does not accept what it says.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The `vhost` crate finds it wrong.
    #[error(transparent)]
    Protocol(#[from] vhost::vhost_user::Error),
}
