//! What can go wrong: each error names what was attempted, on what, why it failed and what to do.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A text that names no device.
    #[error(
        "'{text}' is not a device address: {reason}; write a PCI address such as 0000:01:00.0, \
         or vfio-user:/path/to.sock"
    )]
    Address {
        /// What was given.
        text: String,
        /// What is wrong with it.
        reason: &'static str,
    },

    /// No vfio-user server could be reached on the socket.
    #[error("cannot connect to the vfio-user server on {}: {reason}; is it running, and may you open its socket?", socket.display())]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// Why not.
        reason: String,
    },

    /// A vfio-user server did not answer in time. The connection is given up.
    #[error("the vfio-user server on {} did not answer '{request}' within {} ms; the connection is given up", socket.display(), after.as_millis())]
    Timeout {
        /// The socket.
        socket: PathBuf,
        /// What was asked.
        request: &'static str,
        /// How long the answer was waited for.
        after: Duration,
    },

    /// A vfio-user server has closed the connection: it has ended, or does not want this client.
    #[error("'{request}' cannot be sent to the vfio-user server on {}: {reason}; open the device again", socket.display())]
    Disconnected {
        /// The socket.
        socket: PathBuf,
        /// What was asked.
        request: &'static str,
        /// What ended the connection.
        reason: String,
    },

    /// The connection to a vfio-user server was given up here, some time before. The server may be as alive as ever.
    #[error(
        "'{request}' is not sent to the vfio-user server on {}: the connection was given up, as {reason}; open the device again",
        socket.display()
    )]
    GivenUp {
        /// The socket.
        socket: PathBuf,
        /// What was asked.
        request: &'static str,
        /// Why it was given up.
        reason: String,
    },

    /// A vfio-user server has refused something, or answered with something that cannot be used.
    #[error("'{request}' failed on the vfio-user server on {}: {reason}", socket.display())]
    Server {
        /// The socket.
        socket: PathBuf,
        /// What was asked.
        request: &'static str,
        /// What the server answered, or what is wrong with that.
        reason: String,
    },

    /// The kernel refused something about a PCI device.
    #[error("{attempt} failed for {device}: {source}{}", hint(advice))]
    Kernel {
        /// What was attempted.
        attempt: &'static str,
        /// The device.
        device: String,
        /// What the kernel said.
        source: io::Error,
        /// What to do about it; empty if there is nothing to advise.
        advice: String,
    },

    /// No PCI device has this address.
    #[error("{device} cannot be opened: there is no such PCI device; 'lspci -D' lists those there are")]
    NoDevice {
        /// The address.
        device: String,
    },

    /// A PCI device is not in a state in which it can be opened.
    #[error("{device} cannot be opened: {reason}; {advice}")]
    NotUsable {
        /// The device.
        device: String,
        /// Why not.
        reason: String,
        /// What to do about it.
        advice: String,
    },

    /// The device has no such region.
    #[error("{device} has no {region}")]
    NoRegion {
        /// The device.
        device: String,
        /// What was looked for, such as "BAR 0".
        region: String,
    },

    /// A register access outside its region, or not aligned to its own size.
    #[error("{bytes} bytes at offset {offset:#x} are outside the {size:#x} bytes of {region}, or not aligned")]
    OutOfRegion {
        /// The region.
        region: String,
        /// Offset of the access, bytes.
        offset: u64,
        /// Size of the access, bytes.
        bytes: usize,
        /// Size of the region, bytes.
        size: u64,
    },

    /// A device describes its regions in a way that makes no sense.
    #[error("{device} describes {region} in a way that cannot be used: {reason}")]
    BadRegion {
        /// The device.
        device: String,
        /// The region.
        region: String,
        /// What is wrong.
        reason: String,
    },

    /// More interrupt vectors were asked for than the device has, or none.
    #[error("{asked} interrupt vectors were asked for, {device} has {available}")]
    Interrupts {
        /// The device.
        device: String,
        /// Vectors asked for.
        asked: usize,
        /// Vectors there are.
        available: u32,
    },

    /// Memory that cannot be mapped for DMA as it lies.
    #[error("memory cannot be mapped for DMA: {reason}")]
    BadMemory {
        /// What is wrong with it.
        reason: String,
    },

    /// No free range of DMA addresses is large enough.
    #[error("no {bytes} bytes of DMA addresses are free in the ranges of {device}; unmap something first")]
    NoDmaAddresses {
        /// The device.
        device: String,
        /// What was asked for, bytes.
        bytes: u64,
    },

    /// Memory could not be had from the kernel.
    #[error("{attempt} of {bytes} bytes failed: {source}{}", hint(advice))]
    Memory {
        /// What was attempted.
        attempt: &'static str,
        /// The size of the memory, bytes.
        bytes: usize,
        /// What the kernel said.
        source: io::Error,
        /// What to do about it; empty if there is nothing to advise.
        advice: String,
    },
}

fn hint(advice: &str) -> String {
    if advice.is_empty() { String::new() } else { format!("; {advice}") }
}
