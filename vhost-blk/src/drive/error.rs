//! What goes wrong with a drive.

use std::io;

use thiserror::Error;

use super::DetachCause;
use crate::virtio::memory;

/// Why a drive cannot be opened, or reattached. What kind of reason it is decides how soon it is tried again, and whether a set-up
/// of this machine is wrong.
#[derive(Debug, Error)]
pub enum OpenError {
    /// Nothing is at its address.
    #[error(transparent)]
    Absent(Box<Failure>),
    /// This machine is set up in such a way that the drive cannot be had: another driver or program has it, or a permission or memory
    /// is missing.
    #[error(transparent)]
    Denied(Box<Failure>),
    /// Something is at its address, but it does not work, or it is not the drive that was there.
    #[error(transparent)]
    Unusable(Box<Failure>),
}

/// The step that failed while a drive was opened or reattached.
#[derive(Debug, Error)]
pub enum Failure {
    /// The device cannot be reached.
    #[error("cannot open {address}: {source}")]
    Device {
        /// Where it should be.
        address: String,
        /// What the device layer says.
        source: vfio::Error,
    },
    /// The controller does not come up.
    #[error("cannot bring up the controller {address}: {source}")]
    Controller {
        /// Where it is.
        address: String,
        /// What the driver says.
        source: nvme_driver::Error,
    },
    /// The embedded controller does not start.
    #[error(transparent)]
    Embedded(EmbeddedError),
    /// Another drive is at the address.
    #[error("another drive is in its place: {found}, it was {expected}")]
    OtherDrive {
        /// Model and serial number of the drive that is there.
        found: String,
        /// Model and serial number of the drive that was there.
        expected: String,
    },
    /// A queue pair cannot be made.
    #[error(transparent)]
    Queue(Error),
    /// The guests' memory cannot be mapped.
    #[error(transparent)]
    Memory(memory::MemoryError),
    /// The process has no eventfd left.
    #[error("cannot make an eventfd: {0}")]
    EventFd(io::Error),
    /// The process has no thread left.
    #[error("cannot start a thread to open {address}: {source}")]
    Thread {
        /// Where the drive should be.
        address: super::DeviceAddress,
        /// What the system says.
        source: io::Error,
    },
}

impl OpenError {
    /// The device could not be opened.
    pub(super) fn device(address: &str, source: vfio::Error) -> OpenError {
        let is_denied = is_denied(&source);
        let failure = Box::new(Failure::Device { address: address.to_owned(), source });
        if is_denied { OpenError::Denied(failure) } else { OpenError::Absent(failure) }
    }

    /// The controller did not come up.
    pub(super) fn controller(address: &str, source: nvme_driver::Error) -> OpenError {
        use nvme_driver::Error::Device;
        let is_gone = source.is_gone();
        // Memory for its queues may be denied, too.
        let is_denied = matches!(&source, Device { source, .. } if is_denied(source));
        let failure = Box::new(Failure::Controller { address: address.to_owned(), source });
        match (is_gone, is_denied) {
            (true, _) => OpenError::Absent(failure),
            (false, true) => OpenError::Denied(failure),
            (false, false) => OpenError::Unusable(failure),
        }
    }
}

/// Whether the set-up of this machine is the reason for an error of the device layer.
fn is_denied(error: &vfio::Error) -> bool {
    use vfio::Error::{Kernel, Memory, NotUsable};
    matches!(error, NotUsable { .. } | Kernel { .. } | Memory { .. })
}

/// Why something cannot be done with a drive.
#[derive(Debug, Error)]
pub enum Error {
    /// The drive is detached.
    #[error("{drive} is not available: {cause}")]
    Detached {
        /// The drive's address.
        drive: String,
        /// Why.
        cause: DetachCause,
    },
    /// The program ends.
    #[error("{drive} is closed: the program is ending")]
    Closed {
        /// The drive's address.
        drive: String,
    },
    /// The controller cannot be asked, or has answered with an error.
    #[error("{drive}: {source}")]
    Controller {
        /// The drive's address.
        drive: String,
        /// What the driver says.
        source: Box<nvme_driver::Error>,
    },
    /// The controller has no namespace that could be exported.
    #[error("{drive} has no active namespace: create one and attach it to the controller first")]
    NoNamespace {
        /// The drive's address.
        drive: String,
    },
    /// The configuration names no namespace, and the controller has several.
    #[error("{drive} has namespaces {listed}: choose one by its number")]
    SeveralNamespaces {
        /// The drive's address.
        drive: String,
        /// Some of their numbers.
        listed: String,
    },
    /// All queue pairs that the controller grants are in use.
    #[error("{drive}: all {granted} queue pairs that the controller grants are in use")]
    NoQueuePairsLeft {
        /// The drive's address.
        drive: String,
        /// How many it grants.
        granted: u16,
    },
    /// There is no queue pair at all that a ring could share.
    #[error("{drive} has no queue pair that a ring could use or share")]
    NoQueuePair {
        /// The drive's address.
        drive: String,
    },
    /// The controller has not made a queue pair.
    #[error("{drive}: cannot create a queue pair: {source}")]
    CreateQueuePair {
        /// The drive's address.
        drive: String,
        /// What the driver says.
        source: Box<nvme_driver::Error>,
    },
    /// There is no memory for bounce buffers.
    #[error("{drive}: cannot allocate bounce buffers: {source}")]
    BounceBuffers {
        /// The drive's address.
        drive: String,
        /// What the device layer says.
        source: Box<vfio::Error>,
    },
    /// A thread that looks after the drive cannot be started.
    #[error("cannot start the {thread} of {drive}: {source}")]
    Thread {
        /// The drive's address.
        drive: String,
        /// Which thread.
        thread: &'static str,
        /// What the system says.
        source: io::Error,
    },
}

/// Why the embedded controller does not start.
#[derive(Debug, Error)]
pub enum EmbeddedError {
    /// This build has none.
    #[error("this program was built without its embedded controller (feature \"sim\"): use another device")]
    NotBuilt,
    /// There is no place for its socket.
    #[error("cannot create a directory for the embedded controller's socket: {0}")]
    Directory(io::Error),
    /// The simulator refuses.
    #[cfg(feature = "sim")]
    #[error("cannot start the embedded controller: {0}")]
    Simulator(nvme_sim::Error),
}

/// Why a text is not the address of a drive.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum AddressError {
    /// The text is empty.
    #[error("the device address is empty: {}", AddressError::FORMS)]
    Empty,
    /// The text has none of the forms of an address.
    #[error("device address \"{address}\" is not valid: {}", AddressError::FORMS)]
    Form {
        /// The address.
        address: String,
    },
    /// The path of the vfio-user socket cannot be one.
    #[error("device address \"{address}\": {source}")]
    Socket {
        /// The address.
        address: String,
        /// What is wrong with the path.
        source: SocketPathError,
    },
    /// The description after `sim:` is wrong.
    #[error("device address \"{address}\": {source}")]
    Sim {
        /// The address.
        address: String,
        /// What is wrong with it.
        source: SimError,
    },
}

impl AddressError {
    const FORMS: &str = "use a PCI function such as 0000:01:00.0, vfio-user:PATH, or sim:SIZE[,lba=4096][,file=PATH]";
}

/// Why a text does not describe an embedded controller.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum SimError {
    /// This build has none.
    #[error("this program was built without its embedded controller (feature \"sim\"); use another device")]
    NotBuilt,
    /// The simulator refuses the description, with this reason.
    #[error("{0}")]
    Description(String),
}

/// Why a path cannot be that of a socket.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum SocketPathError {
    /// The path is empty.
    #[error("the socket path is empty: give one, such as /run/vhost-blk/disk0.sock")]
    Empty,
    /// No file can be called so.
    #[error("the socket path contains a zero byte, which no file name may have")]
    ZeroByte,
    /// unix(7): a socket address has 108 bytes, and the last one of a path is zero.
    #[error("the socket path {path} has {bytes} bytes: use at most {}", SocketPathError::MOST_BYTES)]
    TooLong {
        /// The path.
        path: String,
        /// Length of the path in bytes.
        bytes: usize,
    },
}

impl SocketPathError {
    pub(super) const MOST_BYTES: usize = 107;
}
