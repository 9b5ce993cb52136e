//! The values of options and keys, each with its rule. The command line and the TOML file share them.
//!
//! A rule is about one value alone; what several mean together is checked where they are put together.

use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;
use thiserror::Error;

use super::error::ValueError;
use crate::virtio::memory;

/// Virtqueues offered to a front-end unless told otherwise: QEMU asks for one per virtual CPU and refuses a back-end with
/// fewer. Queues that no guest starts cost nothing.
pub const DEFAULT_QUEUES: u16 = 64;
/// A vring's index is one byte in the messages that carry its file descriptors.
pub const MAX_QUEUES: u16 = 256;
/// Largest virtqueue accepted unless told otherwise.
pub const DEFAULT_QUEUE_SIZE: u16 = 1024;
/// virtio 1.2, section 2.6: a virtqueue has at most 32768 entries.
pub const MAX_QUEUE_SIZE: u16 = 32768;

/// A list of CPUs such as `2,4-7`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct CpuList(pub Vec<usize>);

/// Linux's own limit on CPU numbers (CONFIG_NR_CPUS on the biggest kernels).
const MAX_CPU: usize = 8191;

/// A text is no list of CPUs.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("CPU list \"{text}\": {fault}; use numbers and ranges such as 2,4-7")]
pub struct CpuListError {
    /// The text.
    pub text: String,
    /// What is wrong with it.
    #[source]
    pub fault: CpuListFault,
}

/// What can be wrong with a list of CPUs.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CpuListFault {
    /// A part of it is no number, or greater than any CPU's.
    #[error("\"{0}\" is not a CPU number")]
    NoNumber(String),
    /// A range ends before it begins.
    #[error("the range {0} runs backwards")]
    Backwards(String),
    /// A CPU would have two workers.
    #[error("CPU {0} is there twice")]
    Twice(usize),
}

impl FromStr for CpuList {
    type Err = CpuListError;

    fn from_str(text: &str) -> Result<Self, CpuListError> {
        let wrong = |fault| CpuListError { text: text.to_owned(), fault };
        let number = |part: &str| match part.parse::<usize>() {
            Ok(cpu) if cpu <= MAX_CPU && part.bytes().all(|byte| byte.is_ascii_digit()) => Ok(cpu),
            _ => Err(wrong(CpuListFault::NoNumber(part.to_owned()))),
        };
        let mut cpus = Vec::new();
        for part in text.split(',') {
            let (first, last) = match part.split_once('-') {
                Some((first, last)) => (number(first)?, number(last)?),
                None => (number(part)?, number(part)?),
            };
            if first > last {
                return Err(wrong(CpuListFault::Backwards(part.to_owned())));
            }
            for cpu in first..=last {
                if cpus.contains(&cpu) {
                    return Err(wrong(CpuListFault::Twice(cpu)));
                }
                cpus.push(cpu);
            }
        }
        Ok(CpuList(cpus))
    }
}

impl TryFrom<String> for CpuList {
    type Error = CpuListError;

    fn try_from(text: String) -> Result<Self, CpuListError> {
        text.parse()
    }
}

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

/// The shortest time for a command, in seconds.
pub(super) const LEAST_COMMAND_SECONDS: f64 = 0.01;
/// The shortest time that a drive may be given for something, in seconds.
pub(super) const LEAST_DRIVE_SECONDS: f64 = 0.1;
/// The longest time, in seconds: a day.
pub(super) const MOST_SECONDS: f64 = 86400.0;

fn duration(seconds: f64, least: f64) -> Option<Duration> {
    (least..=MOST_SECONDS).contains(&seconds).then(|| Duration::from_secs_f64(seconds))
}
