//! A vhost-user-blk target that joins a guest's virtqueue to an NVMe queue pair.
//!
//! Two halves. The *data path* owns rings, requests and queue pairs on polled workers and never blocks; the
//! *control side* (configuration, vhost-user sessions, controllers, exports) runs on threads that may block and hands
//! lanes to the workers by value.
#![deny(unsafe_code)]

pub mod address;
pub mod bell;
pub mod blk_config;
pub mod check;
pub mod cli;
pub mod config;
#[cfg(feature = "demo")]
pub mod demo;
pub mod drive;
pub mod eventfd;
pub mod export;
pub mod journal;
pub mod listener;
pub mod log_limit;
pub mod service_manager;
pub mod session;
pub mod target;

pub mod counters;
pub mod disk;
#[allow(unsafe_code)] // shared memory, see its documentation
pub mod guest_memory;
pub mod lane;
pub mod request;
pub mod ring;
pub mod worker;
