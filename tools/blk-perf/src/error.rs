//! What can go wrong before and while the load runs.

use std::io;
use std::path::PathBuf;

/// Why a run could not be set up or finished. Errors that the device reports for single requests are
/// not among them: those are counted in the [`Report`](crate::Report).
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The options contradict each other or the disk.
    #[error("{0}")]
    Options(String),
    /// No vhost-user-blk back-end answered.
    #[error(
        "cannot connect to the vhost-user-blk socket {path}: {source}; is the target running, and does it export this path?"
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the transport said.
        source: io::Error,
    },
    /// The back-end does not offer what was asked for.
    #[error("{path} does not offer {feature}; {advice}")]
    Feature {
        /// The socket.
        path: PathBuf,
        /// The missing feature.
        feature: &'static str,
        /// What to do.
        advice: &'static str,
    },
    /// A vhost-user message was refused or not answered.
    #[error("{path}: {what} failed: {source}; the target's log says why")]
    Setup {
        /// The socket.
        path: PathBuf,
        /// What was attempted.
        what: String,
        /// What the transport said.
        source: io::Error,
    },
    /// Memory to share with the target could not be had.
    #[error("cannot allocate {bytes} bytes of shared memory for the request buffers: {source}")]
    Memory {
        /// The size of the memory, bytes.
        bytes: usize,
        /// Why it cannot be had.
        source: vfio::Error,
    },
    /// A request could not be put on its ring.
    #[error("queue {queue}: cannot put a {kind} on the ring: {source}")]
    Submit {
        /// The queue.
        queue: usize,
        /// The kind of request.
        kind: crate::Kind,
        /// What the ring said.
        source: io::Error,
    },
    /// An event could not be sent or awaited.
    #[error("queue {queue}: {what} failed: {source}")]
    Event {
        /// The queue.
        queue: usize,
        /// What was attempted.
        what: &'static str,
        /// The system's error.
        source: io::Error,
    },
    /// Requests are out, and nothing came back for a long time.
    #[error(
        "queue {queue}: {outstanding} requests are out and none completed for {seconds} s; the target or its disk is stuck or gone"
    )]
    Stalled {
        /// The queue.
        queue: usize,
        /// Requests without an answer.
        outstanding: usize,
        /// How long no request completed, seconds.
        seconds: u64,
    },
    /// The back-end broke the rules of the ring, and the client library gave up.
    #[error("a client thread panicked: {0}; the target returned something the ring's rules do not allow")]
    Panicked(String),
}
