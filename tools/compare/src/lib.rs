//! This target beside virtio-blk-data-plane: the same load on both, in one report.
//!
//! There are two ways to compare, and they show different things.
//!
//! - [`guest`] (`--guest`): what a user runs on a host with KVM. The same guest is booted twice over the same kind of storage, with
//!   `vhost-user-blk-pci` on this target and with `virtio-blk-pci` on an IOThread, and runs fio. It shows what an application
//!   in a guest gets. On an emulated CPU the guest itself is the limit: the figures then show that everything works, not how fast.
//! - [`frontend`] (`--frontend`): the same load generator (crate `blk-perf`), as a vhost-user front-end without any guest, against this
//!   target and against `qemu-storage-daemon`, which is data-plane's block layer and IOThread behind the same socket protocol.
//!   It shows the cost and the speed of the back end alone, on any machine; not what leaving and entering a guest costs.
//!
//! Both make a [`Comparison`], from which [`report`] makes a table, JSON and a page with a chart. [`Job`] says what is
//! measured, [`process`] starts the programs, holds those that are not being measured, and reads the CPU time they are charged.
#![forbid(unsafe_code)]

pub mod comparison;
pub mod environment;
mod error;
pub mod frontend;
pub mod guest;
pub mod job;
pub mod options;
pub mod process;
pub mod progress;
pub mod report;

pub use comparison::{
    Accelerator, Comparison, Environment, Outcome, Results, Row, Sample, Settings, Side, SideInfo, Spread, Way,
};
pub use error::Error;
pub use job::{Figure, Job, Pattern};
pub use options::Plan;
