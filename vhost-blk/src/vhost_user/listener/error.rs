//! Why the socket of a disk cannot be bound or used. Each message names the path and says what to do.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// A disk's socket cannot be bound, or is of no use.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ListenError {
    /// The directory of the socket does not exist.
    #[error("cannot listen on {path}: its directory does not exist; create it first")]
    NoDirectory {
        /// Where the socket was to be.
        path: PathBuf,
    },
    /// This user may not make files in the directory of the socket, or not lock it.
    #[error("cannot listen on {path}: no permission to read and write its directory")]
    Permission {
        /// Where the socket was to be.
        path: PathBuf,
    },
    /// The directory of the socket can only be read.
    #[error("cannot listen on {path}: {source}; a systemd unit has to name its directory in ReadWritePaths=")]
    ReadOnly {
        /// Where the socket was to be.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A socket address has no room for the path: at most 107 bytes.
    #[error("cannot listen on {path}: {source}; use a shorter path")]
    PathTooLong {
        /// Where the socket was to be.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Another process keeps the directory of the socket locked.
    #[error("cannot listen on {path}: another process keeps its directory locked; try again, or use another one")]
    DirectoryLocked {
        /// Where the socket was to be.
        path: PathBuf,
    },
    /// The socket cannot be made, for another reason.
    #[error("cannot listen on {path}: {source}")]
    Bind {
        /// Where the socket was to be.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// What is at the path cannot be examined.
    #[error("cannot look at {path}: {source}")]
    Look {
        /// Where the socket was to be.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file that is no socket is at the path; it is left alone.
    #[error("cannot listen on {path}: a file that is no socket is there; choose another path")]
    NotASocket {
        /// Where the socket was to be.
        path: PathBuf,
    },
    /// Another process listens on the path; it may be about to end.
    #[error("cannot listen on {path}: another process does already; stop it or choose another path")]
    InUse {
        /// Where the socket was to be.
        path: PathBuf,
    },
    /// A socket is at the path, and whether a process listens on it is not known.
    #[error(
        "cannot listen on {path}: cannot find out whether another process listens there: {source}; choose another path"
    )]
    Unknown {
        /// Where the socket was to be.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Nobody listens on the socket at the path any more, and its file cannot be removed.
    #[error("cannot remove the stale socket {path}: {source}")]
    Stale {
        /// Where the socket was to be.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The file descriptor given by `--fd` cannot be used.
    #[error("--fd {number} cannot be used: {source}; pass the number of an open UNIX stream socket")]
    Inherited {
        /// The descriptor's number.
        number: i32,
        /// What the system says.
        source: io::Error,
    },
    /// A socket that the service manager hands over cannot be used.
    #[error("cannot use the service manager's socket {path}: {source}")]
    HandedOver {
        /// Where it listens.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

impl ListenError {
    /// The error for what the system says about making a socket at `path`.
    pub(super) fn bind(path: PathBuf, source: io::Error) -> ListenError {
        match source.kind() {
            io::ErrorKind::NotFound => ListenError::NoDirectory { path },
            io::ErrorKind::PermissionDenied => ListenError::Permission { path },
            io::ErrorKind::ReadOnlyFilesystem => ListenError::ReadOnly { path, source },
            io::ErrorKind::InvalidInput => ListenError::PathTooLong { path, source },
            _ => ListenError::Bind { path, source },
        }
    }
}
