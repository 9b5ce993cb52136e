//! What is served, and how that changes.
//!
//! This room reads the command line and the configuration file, checks both, opens drives and sockets, and ends it all. It owns the
//! list of what is served ([`target`]). It runs on threads that may block, and never touches a ring or a queue pair.

pub mod check;
pub mod cli;
pub mod config;
#[cfg(feature = "demo")]
pub mod demo;
pub mod journal;
pub mod service_manager;
pub mod target;
