//! Buffers of our own for data that no data pointer can describe where it lies: the last resort, and counted.
//!
//! The pool only lends DMA memory. Whoever holds the caller's memory copies: into the buffer before a write is submitted
//! with [`Bounce::segments`], out of it after a read has completed.

use std::collections::VecDeque;
use std::sync::atomic::AtomicU8;

use vfio::{DmaBuffer, DmaSlice, DmaSpace};

use crate::Segment;
use crate::data_pointer::PAGE_BYTES;

/// What a pool has lent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BounceCounters {
    /// Loans.
    pub loans: u64,
    /// Bytes asked for in these loans: copied once each.
    pub bytes: u64,
    /// Requests for a loan that had to be put off: the pool had not enough left.
    pub exhausted: u64,
}

/// A fixed amount of DMA memory, lent in whole pages. One thread's, like the queue pair beside it.
pub struct BouncePool {
    memory: DmaBuffer,
    /// Free pages, by number.
    free: Vec<u32>,
    pages: u32,
    /// Who waits for a loan, in their order.
    line: VecDeque<u64>,
    counters: BounceCounters,
}

/// Lent memory; hand it back with [`BouncePool::give_back`]. Dropping it instead shrinks the pool.
pub struct Bounce {
    memory: DmaBuffer,
    segments: Vec<Segment>,
}

impl BouncePool {
    /// Allocates a pool of `bytes` bytes, rounded up to whole pages.
    ///
    /// # Errors
    /// What [`DmaSpace::allocate`] says.
    pub fn new(dma: &DmaSpace, bytes: usize) -> Result<BouncePool, vfio::Error> {
        let memory = dma.allocate(bytes.max(1).next_multiple_of(PAGE_BYTES as usize))?;
        let pages = u32::try_from(memory.len() / PAGE_BYTES as usize).unwrap_or(u32::MAX);
        let free = (0..pages).rev().collect();
        Ok(BouncePool { memory, free, pages, line: VecDeque::new(), counters: BounceCounters::default() })
    }

    /// Lends `bytes` bytes. `None`: not now, something has to be given back first; or never, if it is more than
    /// [`BouncePool::capacity`].
    ///
    /// The segments begin at pages and fill them (but for the last), so any data pointer can describe them.
    pub fn take(&mut self, bytes: u64) -> Option<Bounce> {
        let count = usize::try_from(bytes.div_ceil(PAGE_BYTES)).ok().filter(|&count| count > 0)?;
        let Some(rest) = self.free.len().checked_sub(count) else {
            self.counters.exhausted += 1;
            return None;
        };
        let mut left = bytes;
        // The last free page first: the order in which they were given back.
        let segments = self.free.drain(rest..).rev().map(|page| {
            let bytes = left.min(PAGE_BYTES) as u32;
            left -= u64::from(bytes);
            Segment { iova: self.memory.iova() + u64::from(page) * PAGE_BYTES, bytes }
        });
        let segments = segments.collect();
        self.counters.loans += 1;
        self.counters.bytes += bytes;
        Some(Bounce { memory: self.memory.clone(), segments })
    }

    /// Takes lent memory back. The controller must be done with it: give it back after the request has completed.
    ///
    /// # Panics
    /// If it was lent by another pool.
    pub fn give_back(&mut self, bounce: Bounce) {
        assert_eq!(bounce.memory.iova(), self.memory.iova(), "a bounce buffer goes back to the pool that lent it");
        let pages =
            bounce.segments.iter().rev().map(|segment| ((segment.iova - self.memory.iova()) / PAGE_BYTES) as u32);
        self.free.extend(pages);
    }

    /// Has `who` wait for a loan, behind those that wait already. Where several share the pool, each takes one only when it is
    /// [`BouncePool::first`], and leaves then: so they take turns. The pool itself does not insist on it.
    pub fn wait(&mut self, who: u64) {
        self.line.push_back(who);
    }

    /// Who is to have the next loan; `None`: nobody waits.
    pub fn first(&self) -> Option<u64> {
        self.line.front().copied()
    }

    /// `who` waits no longer. Cheap for the first; nothing happens if it does not wait.
    pub fn stop_waiting(&mut self, who: u64) {
        if let Some(at) = self.line.iter().position(|waiting| *waiting == who) {
            self.line.remove(at);
        }
    }

    /// Bytes in the pool, lent or not.
    pub fn capacity(&self) -> u64 {
        u64::from(self.pages) * PAGE_BYTES
    }

    /// What was lent so far.
    pub fn counters(&self) -> &BounceCounters {
        &self.counters
    }
}

impl Bounce {
    /// Where the lent memory lies for the controller, in order.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The lent memory in order, in pieces of a page or less. Access it with Relaxed loads and stores: before a write the
    /// doorbell orders them, after a read the completion does.
    pub fn pieces(&self) -> impl Iterator<Item = DmaSlice<AtomicU8>> + '_ {
        self.segments.iter().filter_map(|segment| {
            self.memory.slice((segment.iova - self.memory.iova()) as usize, segment.bytes as usize)
        })
    }

    /// Copies `data` into the lent memory, `at` bytes from its start. `None` if it does not fit; nothing is copied then.
    pub fn write(&self, at: u64, data: &[u8]) -> Option<()> {
        let mut rest = data;
        self.each(at, data.len(), |offset, bytes| {
            let (piece, after) = rest.split_at_checked(bytes)?;
            rest = after;
            self.memory.write(offset, piece)
        })
    }

    /// Copies out of the lent memory, from `at` bytes after its start. `None` if there is less; nothing is copied then.
    pub fn read(&self, at: u64, data: &mut [u8]) -> Option<()> {
        let mut rest = &mut data[..];
        let length = rest.len();
        self.each(at, length, |offset, bytes| {
            let (piece, after) = std::mem::take(&mut rest).split_at_mut_checked(bytes)?;
            rest = after;
            self.memory.read(offset, piece)
        })
    }

    /// Calls `piece` with the place in the pool's memory and the length of each contiguous piece of a stretch.
    fn each(&self, at: u64, length: usize, mut piece: impl FnMut(usize, usize) -> Option<()>) -> Option<()> {
        let total: u64 = self.segments.iter().map(|segment| u64::from(segment.bytes)).sum();
        if at.checked_add(length as u64)? > total {
            return None;
        }
        let (mut at, mut left) = (at, length);
        while left > 0 {
            // Every segment but the last is a whole page.
            let segment = self.segments.get((at / PAGE_BYTES) as usize)?;
            let within = at % PAGE_BYTES;
            let bytes = left.min((u64::from(segment.bytes) - within) as usize);
            piece((segment.iova - self.memory.iova() + within) as usize, bytes)?;
            at += bytes as u64;
            left -= bytes;
        }
        Some(())
    }
}
