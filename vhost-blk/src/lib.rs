//! A vhost-user-blk target: it joins a guest's virtqueue to a queue pair of an NVMe drive.
//!
//! Two halves. The *data path* runs on workers, which are polled threads that never block; it owns rings, requests and queue
//! pairs. The *control side* runs on threads that may block; it owns configuration, vhost-user sessions and controllers, and moves
//! lanes to the workers and back by value.
//!
//! The rooms, each of which uses only those after it:
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
//! Two small modules belong to no room: [`event`] (eventfds) and [`log_limit`] (how many log lines others may cause).

pub mod blk;
pub mod control;
pub mod datapath;
pub mod drive;
pub mod event;
mod fault_point;
pub mod log_limit;
pub mod vhost_user;
pub mod virtio;
