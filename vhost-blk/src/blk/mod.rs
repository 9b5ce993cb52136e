//! The virtio block device (virtio 1.2, section 5.2): its configuration space and features, its requests, the disk behind them, and
//! what a flush has promised.
//!
//! It knows rings and guest memory, and the driver's `Namespace`. It knows nothing of controllers that fail, nor of front-ends.

pub mod config;
pub mod disk;
pub mod request;
mod serial;

pub use serial::{SERIAL_BYTES, Serial, SerialError};
