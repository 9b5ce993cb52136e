//! Three places where others decide what this project reads, each as a function of bytes that may say anything:
//!
//! - [`rings`]: a guest's virtqueue, the requests in it, and the log of what is in flight;
//! - [`session`]: a front-end's messages and file descriptors;
//! - [`completions`]: a drive's registers, data structures and completions.
//!
//! Bytes become steps one after the other; when they are used up a run ends. Any bytes are a valid run, so a fuzzer can change
//! them as it likes. A run fails by a panic: of the code under test (with its debug assertions and overflow checks on) or of
//! the rules checked here.
#![forbid(unsafe_code)]

mod drive;
mod input;
mod memory;

pub mod completions;
pub mod rings;
pub mod seeds;
pub mod session;

pub use input::Input;

/// A fuzz target.
#[derive(Clone, Copy)]
pub struct Target {
    /// The name of the target: of its program (after `fuzz-`) and of its folder in `corpus`.
    pub name: &'static str,
    /// Does what the bytes say.
    pub run: fn(&[u8]),
    /// The inputs to begin with, by name.
    pub seeds: fn() -> Vec<(&'static str, Vec<u8>)>,
}

/// All of them.
pub const TARGETS: [Target; 3] = [
    Target { name: "rings", run: rings::run, seeds: seeds::rings },
    Target { name: "session", run: session::run, seeds: seeds::session },
    Target { name: "completions", run: completions::run, seeds: seeds::completions },
];
