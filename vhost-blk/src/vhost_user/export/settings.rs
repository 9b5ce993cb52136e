//! The settings of an export, as the command line or the configuration file says them; nothing is opened for them.

use thiserror::Error;

use crate::blk::Serial;
use crate::drive::DeviceAddress;
use crate::vhost_user::listener::Listen;

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

/// An export contradicts the address of its drive, which says what namespaces there are.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ExportMistake {
    /// The drive has fewer namespaces.
    #[error("{device} has no namespace {id}: use 1 to {there}, or namespaces={id} in its address")]
    NoSuchNamespace {
        /// The drive.
        device: DeviceAddress,
        /// The namespace identifier of the export.
        id: u32,
        /// Namespaces that the drive has.
        there: u64,
    },
    /// The drive has several namespaces, and the export names none.
    #[error("{device} has {there} namespaces: say which one, by its number")]
    WhichNamespace {
        /// The drive.
        device: DeviceAddress,
        /// Namespaces that the drive has.
        there: u64,
    },
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
    pub fn mistake(&self) -> Option<ExportMistake> {
        let there = self.device.namespaces()?;
        let device = || self.device.clone();
        match self.namespace {
            Some(id) if u64::from(id) > there => Some(ExportMistake::NoSuchNamespace { device: device(), id, there }),
            None if there > 1 => Some(ExportMistake::WhichNamespace { device: device(), there }),
            _ => None,
        }
    }

    /// Whether both may be used at the same time only by guests that know of each other.
    pub fn may_spoil(&self, other: &ExportSettings) -> bool {
        let same = match (self.namespace, other.namespace) {
            (Some(one), Some(two)) => one == two,
            // The only one there is, or the start will fail.
            _ => true,
        };
        same && self.device == other.device && !(self.read_only && other.read_only)
    }
}
