//! What can go wrong before, and beside, serving.

use std::io;
use std::path::PathBuf;

/// An error of the simulator's own interface. What a front-end does wrong is answered to it and logged instead.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A setting that cannot be; the text says which and what to give.
    #[error("{0}")]
    Invalid(String),
    /// The backing of a namespace.
    #[error("cannot use {path} as the blocks of a namespace: {source}")]
    Backing {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Memory for a namespace, or for the doorbells.
    #[error("cannot map {bytes} bytes of memory for {what}: {source}")]
    Memory {
        /// What the memory is for.
        what: &'static str,
        /// The size of the memory, bytes.
        bytes: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The socket cannot be listened on.
    #[error("cannot listen on {path}: {source}")]
    Socket {
        /// The path of the socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A thread could not be started.
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
    /// The controller's thread is gone or does not answer.
    #[error("the controller's thread does not answer ({0}); see its log")]
    NoAnswer(&'static str),
}

pub(crate) fn invalid(text: String) -> Error {
    Error::Invalid(text)
}
