//! What can go wrong on the control path.

use std::time::Duration;

use crate::Status;

/// An operation on a controller that did not work out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The device could not be reached.
    #[error("cannot {doing}: {source}")]
    Device {
        /// What was attempted.
        doing: &'static str,
        /// Why it failed.
        #[source]
        source: vfio::Error,
    },
    /// A register holds a value with which no work is possible.
    #[error("{controller}: register {register} reads {value:#x}: {problem}")]
    Register {
        /// The device's address.
        controller: String,
        /// Name of the register in the specification.
        register: &'static str,
        /// The value read.
        value: u64,
        /// What that means, and what to do.
        problem: String,
    },
    /// A register reads as all ones: nothing is there any more.
    #[error(
        "{controller}: register {register} reads {value:#x}: all ones: the device does not answer; it was removed, has lost \
         power, or its memory space is off"
    )]
    Gone {
        /// The device's address.
        controller: String,
        /// Name of the register in the specification.
        register: &'static str,
        /// The value read: ones, as many as the register has bits.
        value: u64,
    },
    /// The controller answered a command with an error status.
    #[error("{command} failed: {status}")]
    Command {
        /// Name of the command, and what it was about.
        command: String,
        /// The controller's answer.
        status: Status,
    },
    /// The controller did not answer in time. Only a reset makes the queue usable again.
    #[error("{command} was not answered within {waited:?}; the controller has to be reset (CSTS reads {csts:#x})")]
    Timeout {
        /// Name of the command, and what it was about.
        command: String,
        /// How long the answer was waited for.
        waited: Duration,
        /// The value of CSTS at that moment.
        csts: u32,
    },
    /// The controller did not answer a question of [`crate::Controller::monitor`] in time. It goes on with others.
    #[error("{command} was not answered within {waited:?}; other commands go on (CSTS reads {csts:#x})")]
    Unanswered {
        /// Name of the command, and what it was about.
        command: String,
        /// How long the answer was waited for.
        waited: Duration,
        /// The value of CSTS at that moment.
        csts: u32,
    },
    /// An earlier command timed out, or the controller was shut down: nothing is sent until a reset.
    #[error("{controller}: not in operation ({why}); reset the controller first")]
    NotInOperation {
        /// The device's address.
        controller: String,
        /// Why the controller is not in operation.
        why: &'static str,
    },
    /// Something the drive reported contradicts the specification or itself.
    #[error("the controller reported an impossible value: {0}")]
    Untrustworthy(String),
    /// The namespace exists, but its format cannot be served.
    #[error("namespace {namespace} cannot be served: {reason}")]
    Format {
        /// Namespace identifier.
        namespace: u32,
        /// Which format it has, why that cannot be served, what to do.
        reason: String,
    },
    /// No namespace with this identifier is active on the controller.
    #[error(
        "namespace {namespace} is not active on this controller; active are {active:?}: take one of these, or attach it"
    )]
    NoSuchNamespace {
        /// Namespace identifier asked for.
        namespace: u32,
        /// The first few active ones.
        active: Vec<u32>,
    },
    /// The controller cannot do what was asked.
    #[error("the controller does not support {0}")]
    Unsupported(String),
    /// Every queue pair the controller granted is in use.
    #[error("all {granted} queue pairs the controller granted are in use; share one, or delete one first")]
    NoQueuePairsLeft {
        /// Queue pairs that the controller granted.
        granted: u16,
    },
    /// Every interrupt vector for queue pairs is in use.
    #[error(
        "all {vectors} interrupt vectors for queue pairs are in use; take a queue pair without one and poll it, or delete one \
         that has one"
    )]
    NoInterruptsLeft {
        /// Interrupt vectors for queue pairs.
        vectors: u16,
    },
    /// An argument makes no sense.
    #[error("{0}")]
    Invalid(String),
}

impl Error {
    /// Whether nothing is there any more: the device was removed, has lost power, or its server has ended. A server that does
    /// not answer in time may be as alive as ever.
    pub fn is_gone(&self) -> bool {
        matches!(self, Error::Gone { .. } | Error::Device { source: vfio::Error::Disconnected { .. }, .. })
    }

    /// The status the controller answered with, when it did answer.
    pub fn status(&self) -> Option<Status> {
        match self {
            Error::Command { status, .. } => Some(*status),
            _ => None,
        }
    }
}

/// Adds what was attempted to an error of the device.
pub(crate) trait Doing<T> {
    fn doing(self, doing: &'static str) -> Result<T, Error>;
}

impl<T> Doing<T> for Result<T, vfio::Error> {
    fn doing(self, doing: &'static str) -> Result<T, Error> {
        self.map_err(|source| Error::Device { doing, source })
    }
}
