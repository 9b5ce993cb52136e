//! How to connect, and what to do then.

use std::path::PathBuf;
use std::time::Duration;

use crate::Error;
use crate::model::Mix;

/// Descriptors that one request takes: header, data, status.
const DESCRIPTORS_PER_REQUEST: usize = 3;
/// Longest split ring (virtio 1.2, 2.7).
const MAX_RING: usize = 32768;

/// How the client connects to a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientOptions {
    /// The target's socket.
    pub socket: PathBuf,
    /// Virtqueues to use, 1 or more.
    pub queues: usize,
    /// Requests in flight per queue, 1 or more.
    pub depth: usize,
    /// Use the packed ring format; otherwise split.
    pub packed: bool,
    /// Negotiate EVENT_IDX if the target offers it. `None`: for split rings only, because the packed ring
    /// of the library this client is built on miscounts after 65536 descriptors under EVENT_IDX.
    pub event_idx: Option<bool>,
    /// Wait for completions on the queue's eventfd instead of polling the ring.
    pub interrupts: bool,
    /// Never give up the CPU while polling. For machines with a CPU for each thread of client, target and disk.
    pub spin: bool,
    /// Client threads; 0: one per queue, but no more than CPUs. Each drives every n-th queue of all disks.
    pub threads: usize,
    /// Descriptors per ring; 0: the smallest power of two that holds `depth` requests.
    pub queue_size: u16,
    /// Pieces of shared memory the buffers are spread over, 1 or more.
    pub memory_regions: usize,
    /// Requests that are out for this long without any completion on their queue end the run.
    pub stall: Duration,
}

impl ClientOptions {
    /// One queue, depth 32, split ring, polling.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        ClientOptions {
            socket: socket.into(),
            queues: 1,
            depth: 32,
            packed: false,
            event_idx: None,
            interrupts: false,
            spin: false,
            threads: 0,
            queue_size: 0,
            memory_regions: 1,
            stall: Duration::from_secs(30),
        }
    }

    /// Whether to ask for EVENT_IDX.
    pub(crate) fn wants_event_idx(&self) -> bool {
        self.event_idx.unwrap_or(!self.packed)
    }

    /// Descriptors per ring.
    pub(crate) fn ring_size(&self) -> Result<u16, Error> {
        let least = self.depth.saturating_mul(DESCRIPTORS_PER_REQUEST);
        let size = match self.queue_size {
            0 => least.next_power_of_two().max(16),
            size => size.into(),
        };
        if self.depth == 0 || self.queues == 0 || self.memory_regions == 0 {
            return Err(Error::Options("queues, depth and memory regions must be at least 1".into()));
        }
        if size < least || size > MAX_RING || !size.is_power_of_two() {
            return Err(Error::Options(format!(
                "a ring of {size} descriptors cannot hold {} requests of {DESCRIPTORS_PER_REQUEST}: \
                 the queue size must be a power of two from {} to {MAX_RING}; choose another depth or queue size",
                self.depth,
                least.next_power_of_two(),
            )));
        }
        Ok(u16::try_from(size).expect("at most MAX_RING"))
    }

    /// Client threads to start for `disks` disks.
    pub(crate) fn thread_count(&self, disks: usize) -> usize {
        let cpus = || std::thread::available_parallelism().map_or(1, usize::from);
        let threads = match self.threads {
            0 => cpus(),
            threads => threads,
        };
        threads.clamp(1, (self.queues * disks).max(1))
    }
}

/// What the client does on the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// End the load after this time. With neither this nor `operations`, it runs until it is stopped.
    pub duration: Option<Duration>,
    /// End the load after this many requests, over all queues.
    pub operations: Option<u64>,
    /// Seed of everything drawn: with the same one each queue has the same requests (how queues interleave is up to the
    /// machine).
    pub seed: u64,
    /// Requests per second to start, over all queues and disks, whether earlier ones have completed or not; not 0, and only
    /// for a client that polls. Latency counts from when a request was due. `None`: a new one whenever one has completed.
    pub rate: Option<u64>,
    /// What the requests are.
    pub load: Load,
}

/// The kinds of load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Load {
    /// Random requests whose results are compared with a model, and a final pass that reads back
    /// everything that is known. **Overwrites the disk.**
    Verified {
        /// Shares of the kinds of request; what the disk does not offer is left out.
        mix: Mix,
        /// Longest ordinary read or write, in bytes.
        request_bytes: usize,
        /// Longest read or write of all, in bytes; two slots per queue send requests up to this.
        long_request_bytes: usize,
        /// Bytes of the disk that are worked on and remembered, spread over the whole disk.
        window_bytes: u64,
    },
    /// Reads and writes of one size, nothing verified.
    Plain {
        /// Bytes per request.
        request_bytes: usize,
        /// Share of reads; below 100, **overwrites the disk**.
        read_percent: u8,
        /// One after the other, each queue on a part of the disk of its own; otherwise all over the disk.
        sequential: bool,
    },
}

impl Workload {
    /// Verified load with the defaults: requests of up to 128 KiB, some of up to 1 MiB, on 256 MiB of the disk.
    pub fn verified(seed: u64) -> Self {
        Workload {
            duration: None,
            operations: None,
            seed,
            rate: None,
            load: Load::Verified {
                mix: Mix::default(),
                request_bytes: 128 << 10,
                long_request_bytes: 1 << 20,
                window_bytes: 256 << 20,
            },
        }
    }

    /// Pure load of `request_bytes` per request, `read_percent` of them reads.
    pub fn plain(seed: u64, request_bytes: usize, read_percent: u8) -> Self {
        let load = Load::Plain { request_bytes, read_percent, sequential: false };
        Workload { duration: None, operations: None, seed, rate: None, load }
    }

    /// Makes a plain load sequential: each queue's requests lie one after the other on the disk. Nothing changes for a verified
    /// one.
    pub fn in_order(mut self) -> Self {
        if let Load::Plain { sequential, .. } = &mut self.load {
            *sequential = true;
        }
        self
    }

    /// Sets the rate, in requests per second.
    pub fn at_rate(mut self, rate: u64) -> Self {
        self.rate = Some(rate);
        self
    }

    /// Ends the load after `duration`.
    pub fn for_duration(mut self, duration: Duration) -> Self {
        self.duration = Some(duration);
        self
    }

    /// Ends the load after `operations` requests, over all queues.
    pub fn for_operations(mut self, operations: u64) -> Self {
        self.operations = Some(operations);
        self
    }
}

/// Reads a number of bytes: digits and perhaps one of k, M, G, T (powers of 1024).
pub fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        Some((at, 'T' | 't')) => (&text[..at], 40),
        _ => (text, 0),
    };
    let number: u64 =
        digits.parse().map_err(|_| format!("{text:?} is not a size; write it like 4096, 4k, 64M or 1G"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text} is more than 2^64 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_holds_the_depth() {
        let mut options = ClientOptions::new("/nowhere");
        for (depth, size) in [(1, 16), (5, 16), (6, 32), (32, 128), (128, 512)] {
            options.depth = depth;
            assert_eq!(options.ring_size().unwrap(), size);
        }
        options.queue_size = 256;
        assert!(options.ring_size().is_err(), "128 requests in 256 descriptors");
        options.depth = 0;
        assert!(options.ring_size().is_err());
        options.depth = 1 << 20;
        options.queue_size = 0;
        assert!(options.ring_size().is_err());
    }

    #[test]
    fn threads_never_outnumber_queues() {
        let mut options = ClientOptions::new("/nowhere");
        options.threads = 8;
        options.queues = 3;
        assert_eq!(options.thread_count(1), 3);
        assert_eq!(options.thread_count(2), 6);
        options.threads = 0;
        assert!((1..=3).contains(&options.thread_count(1)));
    }

    #[test]
    fn sizes_have_suffixes() {
        assert_eq!(parse_size("512"), Ok(512));
        assert_eq!(parse_size("4k"), Ok(4096));
        assert_eq!(parse_size("2T"), Ok(2 << 40));
        for bad in ["", "k", "4 k", "-1", "4kB", "99999999999T", "µ"] {
            assert!(parse_size(bad).is_err(), "{bad:?}");
        }
    }
}
