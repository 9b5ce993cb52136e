//! An NVMe driver in user space, usable as a library of its own.
//!
//! It drives controllers that follow the NVMe Base Specification 2.0 (and older ones back to 1.0) with the NVM Command Set, over
//! PCI Express: a drive through the kernel's VFIO, or a software controller behind a vfio-user socket. The crate `vfio`
//! reaches either one. Nothing here is unsafe.
//!
//! # What it owns
//!
//! A [`Controller`] owns the registers, the admin queue, and the list of queue pairs that the drive has granted. A [`QueuePair`] owns
//! its submission and completion queue, the memory for data pointers, and the commands that are out. The memory that data comes from
//! and goes to is the caller's.
//!
//! # What it must never do
//!
//! - Believe what a drive says: Identify data, log pages and completions are checked before they are used.
//! - Wait without a deadline, or wait at all in a [`QueuePair`].
//! - Let memory go, or be used again, while the drive may still write to it.
//! - Use what a drive has not announced.
//!
//! # A block, the simple way
//!
//! ```
//! use std::time::Duration;
//! use nvme_driver::{Controller, Options};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! # let simulator = nvme_sim::Simulator::start(nvme_sim::Config::default(), &folder.path().join("nvme.sock"))?;
//! # let address = format!("vfio-user:{}", simulator.socket().display());
//! // The address is "0000:01:00.0", a drive that is bound to vfio-pci, or "vfio-user:/path/to.sock".
//! let device = vfio::Device::open(&address.parse()?)?;
//! let controller = Controller::open(&device, &Options::default())?;
//! println!("{} {}", controller.identity().model, controller.identity().serial);
//!
//! let mut disk = controller.blocking(1, Duration::from_secs(10))?;
//! let mut block = vec![0; disk.namespace().block_bytes() as usize];
//! disk.read(0, &mut block)?;
//! # Ok(())
//! # }
//! ```
//!
//! `examples/read_block.rs` is this as a program.
//!
//! # The fast way
//!
//! A [`QueuePair`] belongs to one thread. It takes requests on memory the device can reach, batches them behind one doorbell, and
//! hands out their completions. There is no lock, no system call and no allocation on that path.
//!
//! ```
//! use nvme_driver::{Controller, Options, QueuePairOptions, Segment, Work};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! # let simulator = nvme_sim::Simulator::start(nvme_sim::Config::default(), &folder.path().join("nvme.sock"))?;
//! # let device = vfio::Device::open(&format!("vfio-user:{}", simulator.socket().display()).parse()?)?;
//! let controller = Controller::open(&device, &Options::default())?;
//! let namespace = controller.namespace(1)?;
//! let mut pair = controller.create_queue_pair(QueuePairOptions::default())?;
//! let memory = device.dma().allocate(32 * 4096)?;
//!
//! for at in 0..32u64 {
//!     let segment = Segment { iova: memory.iova() + at * 4096, bytes: 4096 };
//!     let lba = at << (12 - namespace.block_shift);
//!     pair.submit(&namespace, Work::Read { lba, segments: &[segment] }, at)?; // `at` comes back with the completion
//! }
//! pair.ring(); // one doorbell for all of them
//!
//! let mut done = 0;
//! while done < 32 {
//!     pair.reap(|completed| {
//!         assert!(completed.status.is_success(), "request {}: {}", completed.token, completed.status);
//!         done += 1;
//!     });
//!     std::thread::yield_now();
//! }
//! controller.delete_queue_pair(pair)?;
//! # Ok(())
//! # }
//! ```
//!
//! # What is where
//!
//! | what | where |
//! |---|---|
//! | bring-up, reset, shutdown, health, namespaces, features, log pages, events, format | [`Controller`], for control threads: its functions may block, up to their deadlines |
//! | reads, writes and the rest, without blocking | [`QueuePair`] |
//! | geometry, limits and abilities of a namespace | [`Namespace`] |
//! | drives that do not behave as they say | [`quirks`] for models, [`Options`] for single drives |
//! | what an error means | [`Error`] on the control path, [`Status`] with the specification's names on the data path |
//! | memory for data | `vfio::DmaSpace`: allocate, or map a shared file |
//!
//! # Deadlines and recovery
//!
//! Every wait for the device has a deadline ([`Options`]; CAP.TO for becoming ready). Queue pairs do not read the clock:
//! their owner calls [`QueuePair::tick`] now and then, and learns which requests are overdue. Abort is only advice in NVMe, so the next
//! step is a reset:
//!
//! 1. [`Controller::reset`]. Until then, the memory of an overdue request still belongs to the drive.
//! 2. The owner of each pair takes out what was outstanding ([`QueuePair::drain_after_reset`]).
//! 3. It has the pair created again ([`Controller::recreate_queue_pair`]), and submits anew.
//!
//! To read a drive's state only, use [`Controller::monitor`]: a command of it that is not answered has no other effect. A thread that
//! resets or stops the controller does not wait for admin commands that are under way.
//!
//! # What is not served
//!
//! Formats with metadata or protection information, block sizes other than 512 and 4096 bytes, other I/O command sets (zoned,
//! key value), and controllers whose smallest memory page is over 4096 bytes are refused with an error that says so.
#![forbid(unsafe_code)]

#[cfg(target_endian = "big")]
compile_error!("NVMe structures are little-endian and are used in place; a big-endian host is not supported");

mod blocking;
mod bounce;
pub mod controller;
mod data_pointer;
pub mod error;
pub mod namespace;
pub mod queue_pair;
pub mod quirks;
pub mod spec;
mod split;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod work;

pub use blocking::BlockingNamespace;
pub use bounce::{Bounce, BounceCounters, BouncePool};
pub use controller::{Controller, Erase, Event, FormatOptions, Options, QueuePairOptions};
pub use data_pointer::SglAlignment;
pub use error::Error;
pub use namespace::Namespace;
pub use queue_pair::{CommandId, Completed, Completions, Counters, Full, OWNER_SHIFT, QueuePair, SubmitError};
pub use quirks::{Quirk, Quirks};
pub use spec::command::{Command, Completion};
pub use spec::identify::ControllerIdentity;
pub use spec::status::{Retry, Status};
pub use work::{LbaRange, Segment, Work};
