//! Why serving does not start ([`StartError`]), and why it ends by itself ([`Ended`]).

use std::io;

use thiserror::Error;

use crate::control::rpc::RpcSocketError;
use crate::datapath::worker::WorkerError;
use crate::drive::{self, DeviceAddress};
use crate::vhost_user::ServerError;
use crate::vhost_user::listener::ListenError;

/// Nothing can be served.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StartError {
    /// No disk has a socket. The error is that of the first one; the log has those of the others.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// No worker can be started.
    #[error("cannot start the workers: {0}")]
    Workers(#[source] WorkerError),
    /// The process has no eventfd left.
    #[error("cannot start: {0}")]
    Event(#[source] io::Error),
    /// The control socket cannot be had.
    #[error(transparent)]
    Rpc(#[from] RpcSocketError),
    /// The process has no thread left.
    #[error("cannot start the control loop: {0}")]
    ControlLoop(#[source] io::Error),
    /// No disk can be served before the configuration or the set-up of this machine is changed. What is wrong with the first
    /// drive; the log has what is wrong with the others.
    #[error("{0}")]
    NoDisk(String),
    /// Something failed that nothing can be served without.
    #[error(transparent)]
    Defect(#[from] Defect),
}

/// What serving cannot go on with.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Defect {
    /// A worker has panicked: its rings stand still.
    #[error("worker {worker} died: {message}")]
    Worker {
        /// Number of the worker.
        worker: usize,
        /// What its panic says.
        message: String,
    },
    /// The supervisor of a drive has panicked: nobody would get the drive back.
    #[error("the supervisor of {drive} died (see the panic above)")]
    Supervisor {
        /// The drive's address.
        drive: String,
    },
    /// The control loop has panicked.
    #[error("the control loop died: {message}")]
    ControlLoop {
        /// What its panic says.
        message: String,
    },
    /// The thread that answers the clients of the control socket has panicked, or cannot wait for them.
    #[error("the thread of the control socket died: {message}")]
    Rpc {
        /// What its panic says.
        message: String,
    },
    /// The thread that opens a pending drive has panicked.
    #[error("the thread that opens {drive} died (see the panic above)")]
    Open {
        /// The drive's address.
        drive: DeviceAddress,
    },
    /// A drive cannot be looked after.
    #[error(transparent)]
    Drive(Box<drive::Error>),
    /// A disk cannot be served any more.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// The front-end of a disk was handed over connected, so it cannot come again, and its drive does not come up.
    #[error("{0}")]
    ConnectedFrontEnd(String),
}

impl From<drive::Error> for Defect {
    fn from(error: drive::Error) -> Defect {
        Defect::Drive(Box::new(error))
    }
}

/// Serving has ended by itself. What is broken could not be mended by going on, and may stay unnoticed by those who are served; a
/// program that is started again goes on where this one was.
#[derive(Debug, Error)]
#[error("{0}; it is safe to start the program again: guests go on where they were")]
pub struct Ended(#[source] pub Defect);
