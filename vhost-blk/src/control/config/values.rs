//! The values of options, each with its rule.

use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;

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

impl FromStr for CpuList {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| format!("CPU list \"{text}\": {why}; use numbers and ranges such as 2,4-7");
        let number = |part: &str| match part.parse::<usize>() {
            Ok(cpu) if cpu <= MAX_CPU && part.bytes().all(|byte| byte.is_ascii_digit()) => Ok(cpu),
            _ => Err(wrong(&format!("\"{part}\" is not a CPU number"))),
        };
        let mut cpus = Vec::new();
        for part in text.split(',') {
            let (first, last) = match part.split_once('-') {
                Some((first, last)) => (number(first)?, number(last)?),
                None => (number(part)?, number(part)?),
            };
            if first > last {
                return Err(wrong(&format!("the range {part} runs backwards")));
            }
            for cpu in first..=last {
                if cpus.contains(&cpu) {
                    return Err(wrong(&format!("CPU {cpu} is there twice")));
                }
                cpus.push(cpu);
            }
        }
        Ok(CpuList(cpus))
    }
}

impl TryFrom<String> for CpuList {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// Checks the number of virtqueues.
pub fn queues(count: u64) -> Result<u16, String> {
    u16::try_from(count)
        .ok()
        .filter(|count| (1..=MAX_QUEUES).contains(count))
        .ok_or_else(|| format!("{count} queues: use 1 to {MAX_QUEUES}"))
}

/// Checks the size of the largest virtqueue.
pub fn queue_size(entries: u64) -> Result<u16, String> {
    u16::try_from(entries)
        .ok()
        .filter(|entries| (2..=MAX_QUEUE_SIZE).contains(entries) && entries.is_power_of_two())
        .ok_or_else(|| format!("queue size {entries}: use a power of two from 2 to {MAX_QUEUE_SIZE}"))
}

/// Checks a disk's share of queue pairs (NVMe Base 2.0, 5.27.1.5: at most 65534 are granted).
pub fn queue_pairs(count: u64) -> Result<u16, String> {
    u16::try_from(count)
        .ok()
        .filter(|count| (1..u16::MAX).contains(count))
        .ok_or_else(|| format!("{count} queue pairs: use 1 to {}", u16::MAX - 1))
}

/// Checks a namespace identifier (NVMe Base 2.0, section 3.2.1: 0 is none, all ones is all).
pub fn namespace(id: u64) -> Result<u32, String> {
    u32::try_from(id)
        .ok()
        .filter(|id| (1..u32::MAX).contains(id))
        .ok_or_else(|| format!("namespace {id}: use 1 to {}", u32::MAX - 1))
}

/// Checks the time for a command, in seconds.
pub fn io_timeout(seconds: f64) -> Result<Duration, String> {
    duration(seconds, 0.01).ok_or_else(|| format!("{seconds} seconds for a command: use 0.01 to {MOST_SECONDS}"))
}

/// Checks how long requests wait for a drive, in seconds.
pub fn hold(seconds: f64) -> Result<Duration, String> {
    duration(seconds, 0.0).ok_or_else(|| format!("{seconds} seconds to wait for a drive: use 0 to {MOST_SECONDS}"))
}

/// Checks the time that a drive has for something, in seconds.
pub(super) fn drive_timeout(seconds: f64) -> Result<Duration, String> {
    duration(seconds, 0.1).ok_or_else(|| format!("{seconds} seconds for a drive: use 0.1 to {MOST_SECONDS}"))
}

const MOST_SECONDS: f64 = 86400.0;

fn duration(seconds: f64, least: f64) -> Option<Duration> {
    (least..=MOST_SECONDS).contains(&seconds).then(|| Duration::from_secs_f64(seconds))
}
