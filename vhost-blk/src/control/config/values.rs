//! The values of options and keys, each with its rule. The command line and the TOML file share them.
//!
//! A rule is about one value alone; what several mean together is checked where they are put together.

use std::time::Duration;

use super::bounds::{LEAST_COMMAND_SECONDS, LEAST_DRIVE_SECONDS, MAX_QUEUE_SIZE, MAX_QUEUES, MOST_SECONDS};
use super::error::ValueError;
use crate::virtio::memory;

/// Checks the number of virtqueues.
pub fn queues(count: u64) -> Result<u16, ValueError> {
    u16::try_from(count).ok().filter(|count| (1..=MAX_QUEUES).contains(count)).ok_or(ValueError::Queues(count))
}

/// Checks the size of the largest virtqueue.
pub fn queue_size(entries: u64) -> Result<u16, ValueError> {
    u16::try_from(entries)
        .ok()
        .filter(|entries| (2..=MAX_QUEUE_SIZE).contains(entries) && entries.is_power_of_two())
        .ok_or(ValueError::QueueSize(entries))
}

/// Checks a disk's share of queue pairs (NVMe Base 2.0, 5.27.1.5: at most 65534 are granted).
pub fn queue_pairs(count: u64) -> Result<u16, ValueError> {
    u16::try_from(count).ok().filter(|count| (1..u16::MAX).contains(count)).ok_or(ValueError::QueuePairs(count))
}

/// Checks a namespace identifier (NVMe Base 2.0, section 3.2.1: 0 is none, all ones is all).
pub fn namespace(id: u64) -> Result<u32, ValueError> {
    u32::try_from(id).ok().filter(|id| (1..u32::MAX).contains(id)).ok_or(ValueError::Namespace(id))
}

/// Checks the time for a command, in seconds.
pub fn io_timeout(seconds: f64) -> Result<Duration, ValueError> {
    duration(seconds, LEAST_COMMAND_SECONDS).ok_or(ValueError::IoTimeout(seconds))
}

/// Checks how long requests wait for a drive, in seconds.
pub fn hold(seconds: f64) -> Result<Duration, ValueError> {
    duration(seconds, 0.0).ok_or(ValueError::Hold(seconds))
}

/// Checks the time that a drive has for something, in seconds.
pub(super) fn drive_timeout(seconds: f64) -> Result<Duration, ValueError> {
    duration(seconds, LEAST_DRIVE_SECONDS).ok_or(ValueError::DriveTimeout(seconds))
}

/// Checks how much memory a front-end may have mapped; the text is a size such as 64G.
pub fn guest_memory(text: &str) -> Result<u64, ValueError> {
    memory::parse_bytes(text).map_err(ValueError::GuestMemory)
}

/// Checks how many memory regions a front-end may have.
pub fn guest_regions(count: u64) -> Result<usize, ValueError> {
    memory::parse_regions(count).map_err(ValueError::GuestMemory)
}

fn duration(seconds: f64, least: f64) -> Option<Duration> {
    (least..=MOST_SECONDS).contains(&seconds).then(|| Duration::from_secs_f64(seconds))
}
