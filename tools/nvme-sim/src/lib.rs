//! An NVMe controller in software, served on a vfio-user socket.
//!
//! It takes the place of a drive where there is none: for tests, for trying things out, and for everything that must go
//! wrong on demand. It follows the NVM Express Base Specification 2.0 and the NVM Command Set Specification 1.0, not any
//! driver. Commands that they forbid are refused with the status they name. So are commands that Identify does not offer,
//! even if a test changes what Identify says ([`IdentifyPatch`]). The log says so (`RUST_LOG=nvme_sim=warn`).
//!
//! ```
//! use nvme_sim::{Config, FaultAction, FaultMatch, FaultRule, Simulator};
//!
//! # let directory = tempfile::tempdir()?;
//! let simulator = Simulator::start(Config::default(), &directory.path().join("nvme.sock"))?;
//! // A driver connects to the socket; then its next command never completes.
//! let when = FaultMatch { limit: Some(1), ..Default::default() };
//! simulator.faults().add(FaultRule { action: FaultAction::LoseCompletion, when });
//! simulator.stop();
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What it owns
//!
//! The controller's registers and doorbells, its queues' state, the blocks of its namespaces, and the table of the memory that the
//! front-end has mapped for DMA. [`Simulator`] is the handle: dropping it stops the controller and removes the socket.
//!
//! # What it must never do
//!
//! - Use a crate of the driver or the target: a part of the specification that they misread would be misread here, too.
//! - Reach memory that the front-end has not mapped for it, or touch any after a reset; unless a test asks for that
//!   ([`FaultAction::Stray`]).
//! - Do something at random that cannot be repeated: everything random comes from [`FaultPlan::seed`].
//!
//! # How it works
//!
//! Two threads. One (`server`) answers the messages of the front-end: register and configuration space accesses, DMA maps,
//! interrupt eventfds. The other (`controller`) owns queues and namespaces, and polls the doorbells. These are in a memory
//! file that the front-end may map (BAR0 from 0x1000), so that the data path needs no message. Front-ends that do not map
//! it write doorbells by message. Data is copied once, between the memory that the front-end has mapped for DMA and the
//! blocks. Host addresses are looked up in the table of those mappings. An address outside of them is a Data Transfer
//! Error for data, a fatal status for queues.
//!
//! # Cost
//!
//! A 4 KiB read takes about 170 ns of processor time. An idle controller yields the processor for 2 ms, then sleeps in naps of at most
//! 1 ms. So the first command after a pause waits up to 1 ms, since doorbells in memory wake nobody.
//!
//! # Limits
//!
//! - One front-end at a time. The next is accepted when it has gone, and finds the controller as after power-on.
//! - One admin and up to 2047 I/O queue pairs. Interrupts are MSI-X only, delivered by eventfd; the masks in the MSI-X table are not
//!   looked at.
//! - No metadata or protection information, fused commands, namespace management, firmware update, controller memory buffer.
//!   Namespaces with a metadata format refuse I/O.
//! - DMA needs file descriptors: regions of memory without one are refused. A front-end that truncates a file it has mapped kills the
//!   simulator (SIGBUS), as would any process that shares memory with it.
//! - Flush concerns the simulated cache only ([`Config::volatile_write_cache`]): a file outlives the simulator, not a crash of the machine.

mod admin;
mod backing;
mod command;
mod config;
mod config_space;
mod controller;
mod data_pointer;
#[allow(unsafe_code)] // it maps the memory of others
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
mod offers;
mod patch;
mod prp;
mod queue;
mod registers;
mod server;
mod sgl;
mod shared;
mod simulator;
mod status;
mod write_cache;

pub use config::{Config, NamespaceConfig, SimAddress, parse_max_transfer, parse_size, replicate};
pub use dma::{MappingGuard, set_mapping_guard};
pub use error::Error;
pub use faults::{FaultAction, FaultControl, FaultMatch, FaultPlan, FaultRule};
pub use patch::{IdentifyPatch, RegisterPatch};
pub use shared::{Counters, PowerLoss};
pub use simulator::Simulator;
pub use status::Status;
