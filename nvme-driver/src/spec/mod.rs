//! The NVMe specification as types: commands, statuses, registers, Identify data, log pages and features, each with its section.
//!
//! Layouts have their size asserted at compile time. Nothing here talks to a controller.

pub mod command;
pub mod features;
pub mod identify;
pub mod log_page;
pub mod registers;
pub mod status;
