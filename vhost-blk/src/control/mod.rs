//! What is served, and how that changes.
//!
//! This room reads the command line and the configuration file, checks both, opens drives and sockets, and ends it all. It owns the
//! list of what is served ([`target`]). It runs on threads that may block, and never touches a ring or a queue pair.
//!
//! In the order in which the program uses them: [`cli`] says what to do, [`config`] what to serve, [`check`] whether this machine can
//! serve it, and [`target`] serves it. [`service_manager`] and [`journal`] are for a program that systemd has started; `demo` is a
//! command of its own, behind a feature.

pub mod check;
pub mod cli;
pub mod config;
#[cfg(feature = "demo")]
pub mod demo;
pub mod journal;
pub mod logging;
pub mod rpc;
pub mod service_manager;
pub mod target;
