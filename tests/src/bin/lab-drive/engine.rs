//! Requests of many shapes, many at a time, on a queue pair: how drives are filled and read back.

use std::time::{Duration, Instant};

use e2e::Layout;
use nvme_driver::{Completions, Counters, Namespace, QueuePair, Segment, SubmitError, Work};
use vfio::{DmaBuffer, DmaSpace};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::Result;

/// Longer than anything takes on an emulated CPU that has to share its core.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// Requests that are out at once.
const DEPTH: usize = 8;
/// The longest transfer.
const LONGEST: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// How completions are learned of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Wait {
    Polling,
    Interrupts,
    /// Now the one, now the other, while requests are out.
    Switching,
}

/// A queue pair, with what is needed to wait for its interrupt.
pub(crate) struct Lane {
    pub pair: QueuePair,
    epoll: Option<Epoll>,
    /// There may be completions whose interrupt was cleared.
    cleared: bool,
    /// Interrupts that were waited for.
    pub interrupts: u64,
}

impl Lane {
    pub(crate) fn new(pair: QueuePair) -> Result<Lane> {
        let epoll = match pair.interrupt() {
            Some(event) => {
                let epoll = Epoll::new()?;
                let descriptor = std::os::fd::AsRawFd::as_raw_fd(event);
                epoll.ctl(ControlOperation::Add, descriptor, EpollEvent::new(EventSet::IN, 0))?;
                Some(epoll)
            }
            None => None,
        };
        Ok(Lane { pair, epoll, cleared: false, interrupts: 0 })
    }

    /// Whether the interrupt's eventfd is signalled now, or becomes so within `limit`.
    pub(crate) fn interrupted(&self, limit: Duration) -> Result<bool> {
        let epoll = self.epoll.as_ref().ok_or("the pair was made without an interrupt")?;
        Ok(epoll.wait(limit.as_millis() as i32, &mut [EpollEvent::default()])? == 1)
    }

    /// Changes how completions are learned of.
    pub(crate) fn learn_by(&mut self, completions: Completions) {
        if self.pair.completions() != completions {
            self.cleared = self.pair.set_completions(completions);
        }
    }

    /// Waits until there is something to reap, and reaps it. An error if nothing comes. With interrupts nothing is looked
    /// for before one has come.
    pub(crate) fn reap(&mut self, mut done: impl FnMut(nvme_driver::Completed)) -> Result<usize> {
        let start = Instant::now();
        loop {
            if self.pair.completions() == Completions::Interrupt && !std::mem::take(&mut self.cleared) {
                if !self.interrupted(DEADLINE)? {
                    return Err(format!("no interrupt came within {DEADLINE:?}").into());
                }
                self.interrupts += 1;
                self.pair.acknowledge_interrupt();
            }
            let taken = self.pair.reap(&mut done);
            if taken > 0 {
                return Ok(taken);
            }
            if start.elapsed() > DEADLINE {
                return Err(format!("nothing was completed within {DEADLINE:?}").into());
            }
            std::thread::yield_now();
        }
    }

    /// One request, waited for: an error unless it succeeds.
    pub(crate) fn execute(&mut self, namespace: &Namespace, work: Work<'_>) -> Result<()> {
        let status = self.status_of(namespace, work)?;
        if status.is_success() { Ok(()) } else { Err(format!("{work:?}: {status}").into()) }
    }

    /// One request, waited for: its status.
    pub(crate) fn status_of(&mut self, namespace: &Namespace, work: Work<'_>) -> Result<nvme_driver::Status> {
        self.pair.submit(namespace, work, 0)?;
        self.pair.ring();
        let mut status = None;
        while status.is_none() {
            self.reap(|completed| status = Some(completed.status))?;
        }
        status.ok_or_else(|| "no status".into())
    }
}

/// What is done with a range of blocks.
#[derive(Clone, Copy)]
pub(crate) enum Doing<'a> {
    /// Written, as the layout has it.
    Write(&'a Layout),
    /// Read, and compared with the layout.
    Read(&'a Layout),
}

/// A request's memory, and what it is about.
struct Transfer {
    buffer: DmaBuffer,
    lba: u64,
    bytes: usize,
    shape: Shape,
}

/// How the bytes of a request lie in its buffer.
#[derive(Clone, Copy)]
enum Shape {
    /// One after the other from the start of a page on.
    Aligned,
    /// One after the other from within a page on.
    Within,
    /// Page after page from the last page of the buffer to the first.
    Backwards,
}

/// Bytes into the first page, for [`Shape::Within`].
const WITHIN: u64 = 1536;

impl Shape {
    fn of(number: usize, bytes: usize) -> Shape {
        match number % 3 {
            1 => Shape::Within,
            2 if bytes > PAGE as usize => Shape::Backwards,
            _ => Shape::Aligned,
        }
    }

    /// Where the pieces of a transfer lie in the buffer: offset and bytes.
    fn pieces(self, bytes: usize) -> Vec<(usize, usize)> {
        match self {
            Shape::Aligned => vec![(0, bytes)],
            Shape::Within => vec![(WITHIN as usize, bytes)],
            Shape::Backwards => {
                let page = PAGE as usize;
                let pages = bytes.div_ceil(page);
                let length = |at: usize| page.min(bytes - at * page);
                (0..pages).map(|at| ((pages - 1 - at) * page, length(at))).collect()
            }
        }
    }
}

/// Transfers of these lengths follow one another, bytes; each is cut to whole blocks and the blocks that are left.
const LENGTHS: [u64; 7] = [4096, 512, 131_072, 12_288, LONGEST, 69_632, 8192];

/// Writes or reads the blocks `blocks` of a namespace: many requests at a time, of many lengths and shapes.
pub(crate) fn run(
    lane: &mut Lane,
    dma: &DmaSpace,
    namespace: &Namespace,
    blocks: std::ops::Range<u64>,
    doing: Doing<'_>,
    wait: Wait,
) -> Result<Counters> {
    let depth = DEPTH.min(lane.pair.capacity());
    let slots = (0..depth).map(|_| {
        let buffer = dma.allocate((LONGEST + PAGE) as usize)?;
        Ok(Transfer { buffer, lba: 0, bytes: 0, shape: Shape::Aligned })
    });
    let mut slots = slots.collect::<Result<Vec<_>>>()?;
    let mut free: Vec<usize> = (0..depth).collect();
    let mut data = vec![0; LONGEST as usize];
    let (mut next, mut number) = (blocks.start, 0);
    let before = *lane.pair.counters();
    choose(lane, wait, 0);
    while next < blocks.end || free.len() < depth {
        while next < blocks.end
            && let Some(&at) = free.last()
        {
            let count = (LENGTHS[number % LENGTHS.len()] >> namespace.block_shift).clamp(1, blocks.end - next);
            let slot = &mut slots[at];
            (slot.lba, slot.bytes) = (next, (count << namespace.block_shift) as usize);
            slot.shape = Shape::of(number / LENGTHS.len() + number, slot.bytes);
            let pieces = slot.shape.pieces(slot.bytes);
            if let Doing::Write(layout) = doing {
                layout.fill(next, &mut data[..slot.bytes]);
                copy(&pieces, &mut data, |offset, piece| slot.buffer.write(offset, piece))?;
            }
            let iova = slot.buffer.iova();
            let segments: Vec<_> = pieces
                .iter()
                .map(|&(offset, bytes)| Segment { iova: iova + offset as u64, bytes: bytes as u32 })
                .collect();
            let work = match doing {
                Doing::Write(_) => Work::Write { lba: next, segments: &segments, fua: false },
                Doing::Read(_) => Work::Read { lba: next, segments: &segments },
            };
            match lane.pair.submit(namespace, work, at as u64) {
                Ok(()) => {}
                Err(SubmitError::Full | SubmitError::Crowded) => break,
                Err(error) => return Err(error.into()),
            }
            free.pop();
            next += count;
            number += 1;
        }
        lane.pair.ring();
        choose(lane, wait, number);
        let mut answers = Vec::new();
        lane.reap(|completed| answers.push(completed))?;
        for completed in answers {
            let at = completed.token as usize;
            let slot = &slots[at];
            if !completed.status.is_success() {
                return Err(format!("{} bytes at block {}: {}", slot.bytes, slot.lba, completed.status).into());
            }
            if let Doing::Read(layout) = doing {
                copy(&slot.shape.pieces(slot.bytes), &mut data, |offset, piece| slot.buffer.read(offset, piece))?;
                layout.check(slot.lba, &data[..slot.bytes])?;
            }
            free.push(at);
        }
    }
    let after = lane.pair.counters();
    Ok(Counters {
        commands: after.commands - before.commands,
        completions: after.completions - before.completions,
        batches: after.batches - before.batches,
        submission_doorbells: after.submission_doorbells - before.submission_doorbells,
        completion_doorbells: after.completion_doorbells - before.completion_doorbells,
        splits: after.splits - before.splits,
        ..*after
    })
}

fn choose(lane: &mut Lane, wait: Wait, number: usize) {
    lane.learn_by(match wait {
        Wait::Polling => Completions::Polling,
        Wait::Switching if number % 2 == 1 => Completions::Polling,
        Wait::Interrupts | Wait::Switching => Completions::Interrupt,
    });
}

/// Copies between `data` and the pieces of a buffer, in order.
fn copy(
    pieces: &[(usize, usize)],
    data: &mut [u8],
    mut copy: impl FnMut(usize, &mut [u8]) -> Option<()>,
) -> Result<()> {
    let mut at = 0;
    for &(offset, bytes) in pieces {
        copy(offset, &mut data[at..at + bytes]).ok_or("a piece that is not inside its buffer")?;
        at += bytes;
    }
    Ok(())
}
