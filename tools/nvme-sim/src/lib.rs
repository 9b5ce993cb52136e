//! An NVMe controller in software, served on a vfio-user socket.
#![warn(missing_docs)]

mod admin;
mod backing;
mod command;
mod config;
mod config_space;
mod controller;
mod data_pointer;
mod dma;
mod error;
mod events;
mod faults;
mod features;
mod identify;
mod interrupts;
mod io;
mod log_page;
mod namespace;
mod prp;
mod queue;
mod random;
mod registers;
mod server;
mod sgl;
mod shared;
mod simulator;
mod status;
mod write_cache;

pub use config::{Config, NamespaceConfig, SimAddress, parse_max_transfer, parse_size, replicate};
pub use error::Error;
pub use faults::{FaultAction, FaultControl, FaultMatch, FaultPlan, FaultRule};
pub use shared::{Counters, PowerLoss};
pub use simulator::Simulator;
pub use status::Status;
