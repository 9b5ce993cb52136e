//! An NVMe driver in user space, usable as a library of its own.
#![forbid(unsafe_code)]

#[cfg(target_endian = "big")]
compile_error!("NVMe structures are little-endian and are used in place; a big-endian host is not supported");

mod bounce;
pub mod command;
pub mod controller;
mod data_pointer;
pub mod error;
pub mod features;
pub mod identify;
pub mod log_page;
pub mod namespace;
pub mod queue_pair;
pub mod registers;
mod split;
pub mod status;
#[cfg(test)]
mod testing;
pub mod work;

pub use bounce::{Bounce, BounceCounters, BouncePool};
pub use command::{Command, Completion};
pub use controller::{Controller, Erase, Event, FormatOptions, Options, QueuePairOptions};
pub use data_pointer::SglAlignment;
pub use error::Error;
pub use identify::ControllerIdentity;
pub use namespace::Namespace;
pub use queue_pair::{CommandId, Completed, Completions, Counters, Full, QueuePair, SubmitError};
pub use status::Status;
pub use work::{LbaRange, Segment, Work};
