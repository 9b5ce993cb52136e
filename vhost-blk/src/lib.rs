//! A vhost-user-blk target: it joins a guest's virtqueue to a queue pair of an NVMe drive.
//!
//! The program `vhost-blk` is a thin shell around this crate. `README.md` beside its manifest is the design: the threads, the path of
//! a request through the files, where an addition goes.
//!
//! # What it owns
//!
//! The crate has two halves:
//!
//! - The *data path* runs on workers, which are polled threads. It owns rings, requests and queue pairs while they are in use.
//! - The *control side* runs on threads that may block. It owns the configuration, the vhost-user sessions and the controllers. It
//!   moves lanes to the workers and back by value.
//!
//! It leaves registers, DMA memory and IOVAs to the crate `vfio`, and commands and their data pointers to `nvme-driver`.
//!
//! # What it must never do
//!
//! - Believe what a guest, a front-end or a drive has written. It is read once, checked, then used.
//! - Let a worker wait for anybody.
//! - Let one guest's request fail or wait because of another guest.
//! - Acknowledge a flush that the drive has not carried out.
//!
//! # The rooms
//!
//! Each uses only those after it:
//!
//! | room | what lives there |
//! |---|---|
//! | [`control`] | what is served, and how that changes |
//! | [`vhost_user`] | the vhost-user protocol, back-end side |
//! | [`drive`] | a controller that may fail and come back |
//! | [`datapath`] | what a request runs: workers, poll groups, lanes |
//! | [`blk`] | the virtio block device: configuration, requests, flushes |
//! | [`virtio`] | rings and guest memory |
//!
//! Three small modules belong to no room: [`event`] (eventfds), [`log_limit`] (how many log lines others may cause) and `fault_point`
//! (places where a unit test may have something go wrong; nothing in the program).
//!
//! # A disk on an embedded controller
//!
//! ```
//! use vhost_blk::control::config::{ExportSettings, Listen, Settings};
//! use vhost_blk::control::target::Target;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let folder = tempfile::tempdir()?;
//! let socket = folder.path().join("disk.sock");
//! let export = ExportSettings {
//!     device: "sim:64M".parse()?, // or "0000:01:00.0", or "vfio-user:/run/nvme.sock"
//!     listen: Listen::Path(socket.clone()),
//!     namespace: None, // the only one there is
//!     queues: 4,
//!     queue_size: 256,
//!     queue_pairs: None,
//!     read_only: false,
//!     serial: Some("DISK0".parse()?),
//! };
//! let target = Target::start(&Settings { exports: vec![export], ..Settings::default() })?;
//! assert!(socket.exists()); // a front-end can connect
//! target.stop()?; // requests in flight end, the controller is shut down, the socket is removed
//! assert!(!socket.exists());
//! # Ok(())
//! # }
//! ```

pub mod blk;
pub mod control;
pub mod datapath;
pub mod drive;
pub mod event;
mod fault_point;
pub mod log_limit;
pub mod vhost_user;
pub mod virtio;
