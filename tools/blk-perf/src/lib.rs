//! A vhost-user-blk load generator: the front-end of a virtual machine without the machine.
//!
//! The rings, requests and vhost-user messages are those of the crate `virtio-driver`, not this project's:
//! the target is tested against somebody else's reading of the specification. This crate adds a
//! workload whose every block is recognisable, a model of what the disk must hold, and measurement.
//!
//! ```no_run
//! use std::sync::atomic::AtomicBool;
//! use std::time::Duration;
//!
//! let options = blk_perf::ClientOptions::new("/run/vhost-blk.sock");
//! let workload = blk_perf::Workload::verified(1).for_duration(Duration::from_secs(5));
//! let report = blk_perf::run(&options, &workload, &AtomicBool::new(false), |_| {})?;
//! assert!(report.is_success(), "{:?}", report.failures);
//! # Ok::<(), blk_perf::Error>(())
//! ```
#![forbid(unsafe_code)]

mod client;
pub mod console;
mod error;
mod load;
mod model;
mod options;
mod pace;
mod pattern;
mod plan;
mod random;
mod report;
mod run;

pub use client::DiskInfo;
pub use error::Error;
pub use model::Mix;
pub use options::{ClientOptions, Load, Workload, parse_size};
pub use pattern::{Found, Pattern, is_zero};
pub use plan::{Expected, Kind, Mismatch, Request};
pub use random::Random;
pub use report::{Phase, Progress, Report};
pub use run::{run, run_disks};
