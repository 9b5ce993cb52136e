//! From a request to commands: the plain case in a few dozen instructions, every other case correctly.

use std::sync::atomic::AtomicU64;

use super::job::Job;
use super::{Full, QueuePair};
use crate::command::{CDW0_PSDT_SGL, CDW12_FUA, io};
use crate::data_pointer::{LIST_WORDS, PAGE_BYTES, Position, prp};
use crate::split::Limits;
use crate::{Command, LbaRange, Namespace, Segment, Work};

/// Why a request was not taken. Nothing of it has been sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SubmitError {
    /// No slot is free, or an earlier request is waiting for slots: try again after [`QueuePair::reap`].
    #[error("the queue pair is full; try again after the next completions")]
    Full,
    /// No data pointer of this controller can say where the data lies: copy it (see [`crate::BouncePool`]).
    #[error("the controller's data pointers cannot describe the buffers; the data has to be copied")]
    NeedsBounce,
    /// Blocks outside the namespace.
    #[error("blocks {lba} and the {blocks} from there on are not within the namespace's {size} blocks")]
    OutOfRange {
        /// First logical block.
        lba: u64,
        /// Number of logical blocks.
        blocks: u64,
        /// The namespace's size in logical blocks.
        size: u64,
    },
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(&'static str),
}

impl From<Full> for SubmitError {
    #[inline]
    fn from(_: Full) -> SubmitError {
        SubmitError::Full
    }
}

impl QueuePair {
    /// Turns one request into commands and writes them; the controller does not know of them until [`QueuePair::ring`].
    /// There will be one [`super::Completed`] with `token`, however many commands it takes.
    ///
    /// A request that is refused has had no effect. `work`'s lists are not needed after the call; the memory the segments name
    /// has to stay mapped until the request has completed.
    #[inline(always)]
    pub fn submit(&mut self, namespace: &Namespace, work: Work<'_>, token: u64) -> Result<(), SubmitError> {
        let (opcode, flags, lba, segments) = match work {
            Work::Read { lba, segments } => (io::READ, 0, lba, segments),
            Work::Write { lba, segments, fua } => (io::WRITE, if fua { CDW12_FUA } else { 0 }, lba, segments),
            _ => return self.submit_other(namespace, work, token),
        };
        // One segment in at most two pages is nearly every small request, and done here.
        if let &[Segment { iova, bytes }] = segments
            && let offset = iova % PAGE_BYTES
            // Two pages need no list. Nothing is plain while a request waits for slots.
            && offset + u64::from(bytes) <= u64::from(self.plain_bytes)
            // Anything else cannot be a PRP.
            && iova.is_multiple_of(4)
            // The number of blocks, zero-based as the command has it. Turning instead of shifting brings what is less than a
            // block to the top, where it makes a number beyond any namespace; so does no block at all, by the subtraction.
            && let last = u64::from(bytes).rotate_right(namespace.block_shift.into()).wrapping_sub(1)
            && let Some(room) = namespace.blocks.checked_sub(lba)
            && last < room
            && (namespace.boundary_blocks == 0 || !crosses_boundary(namespace, lba, last as u32 + 1))
        {
            let spills = offset + u64::from(bytes) > PAGE_BYTES;
            let prp2 = if spills { (iova | (PAGE_BYTES - 1)).wrapping_add(1) } else { 0 };
            let command = Command::blocks(opcode, namespace.id, lba, last as u32 + 1, flags).with_prps(iova, prp2);
            self.push(command, token)?;
            return Ok(());
        }
        self.transfer(namespace, opcode, flags, lba, segments, token)
    }

    #[inline(never)]
    fn submit_other(&mut self, namespace: &Namespace, work: Work<'_>, token: u64) -> Result<(), SubmitError> {
        match work {
            Work::Read { lba, segments } => self.transfer(namespace, io::READ, 0, lba, segments, token),
            Work::Write { lba, segments, fua } => {
                self.transfer(namespace, io::WRITE, if fua { CDW12_FUA } else { 0 }, lba, segments, token)
            }
            Work::Compare { lba, segments } => {
                supported(namespace.compare, "the drive does not support Compare")?;
                self.transfer(namespace, io::COMPARE, 0, lba, segments, token)
            }
            Work::Flush => {
                if !self.staged.is_empty() {
                    return Err(SubmitError::Full);
                }
                self.push(Command::flush(namespace.id), token)?;
                Ok(())
            }
            Work::Verify(range) => {
                supported(namespace.verify, "the drive does not support Verify")?;
                self.submit_ranges(namespace, Job::verify(namespace), &[range], token)
            }
            Work::WriteZeroes { ranges, deallocate, fua } => {
                supported(namespace.write_zeroes, "the drive does not support Write Zeroes")?;
                self.submit_ranges(namespace, Job::write_zeroes(namespace, deallocate, fua), ranges, token)
            }
            Work::Discard { ranges } => {
                supported(namespace.discard, "the drive does not support Dataset Management")?;
                self.submit_ranges(namespace, Job::discard(namespace), ranges, token)
            }
        }
    }

    /// Read, Write, Compare, of any shape.
    #[inline(never)]
    fn transfer(
        &mut self,
        namespace: &Namespace,
        opcode: u8,
        flags: u32,
        lba: u64,
        segments: &[Segment],
        token: u64,
    ) -> Result<(), SubmitError> {
        // 32-bit lengths: the sum of as many as fit into memory does not overflow.
        let bytes: u64 = segments.iter().map(|segment| u64::from(segment.bytes)).sum();
        if bytes == 0 {
            return Err(SubmitError::Invalid("a transfer of no bytes"));
        }
        let blocks = bytes >> namespace.block_shift;
        if blocks << namespace.block_shift != bytes {
            return Err(SubmitError::Invalid("a transfer's length is not a multiple of the block size"));
        }
        check_range(namespace, lba, blocks)?;
        let Some(slot) = self.slots.next().filter(|_| self.staged.is_empty()) else { return Err(SubmitError::Full) };
        if bytes <= u64::from(self.max_bytes) && !crosses_boundary(namespace, lba, blocks as u32) {
            let (list, list_iova) = self.list(slot);
            if let Some(prps) = prp::describe(segments, Position::default(), bytes, list, list_iova) {
                let command = Command::blocks(opcode, namespace.id, lba, blocks as u32, flags);
                self.push(command.with_prps(prps.prp1, prps.prp2), token)?;
                return Ok(());
            }
        }
        let limits = Limits {
            max_bytes: self.max_bytes,
            block_shift: namespace.block_shift,
            boundary_blocks: namespace.boundary_blocks,
            sgl: self.sgl,
        };
        let Some(pieces) = limits.count_pieces(segments, lba, bytes) else {
            self.counters.needs_bounce += 1;
            return Err(SubmitError::NeedsBounce);
        };
        let job = Job::transfer(namespace, limits, opcode, flags, lba, bytes);
        self.issue(job, segments, &[], pieces == 1, token)
    }

    fn submit_ranges(
        &mut self,
        namespace: &Namespace,
        job: Job,
        ranges: &[LbaRange],
        token: u64,
    ) -> Result<(), SubmitError> {
        if ranges.is_empty() || ranges.iter().any(|range| range.blocks == 0) {
            return Err(SubmitError::Invalid("a range of no blocks"));
        }
        for range in ranges {
            check_range(namespace, range.lba, range.blocks.into())?;
        }
        if self.slots.next().is_none() || !self.staged.is_empty() {
            return Err(SubmitError::Full);
        }
        self.issue(job, &[], ranges, false, token)
    }

    /// Issues as much of a request as there are slots for (at least one) and stages the rest. `single`: it is known to be one
    /// command.
    fn issue(
        &mut self,
        mut job: Job,
        segments: &[Segment],
        ranges: &[LbaRange],
        single: bool,
        token: u64,
    ) -> Result<(), SubmitError> {
        if single {
            let slot = self.slots.next().ok_or(SubmitError::Full)?;
            let command = self.next_command(&mut job, slot, segments, ranges)?;
            self.push(command, token)?;
            return Ok(());
        }
        let request = self.requests.begin(token).ok_or(SubmitError::Full)?;
        let issued = self.issue_some(request, &mut job, segments, ranges);
        if issued > 1 || !job.is_done(ranges) {
            self.counters.splits += 1;
        }
        if !job.is_done(ranges) {
            self.counters.staged += 1;
            self.staged.put(request, job, segments, ranges);
            self.plain_bytes = 0;
        }
        Ok(())
    }

    /// Writes commands of a request until it is done or no slot is free; returns how many.
    fn issue_some(&mut self, request: u16, job: &mut Job, segments: &[Segment], ranges: &[LbaRange]) -> usize {
        let mut issued = 0;
        while !job.is_done(ranges)
            && let Some(slot) = self.slots.next()
            && let Ok(command) = self.next_command(job, slot, segments, ranges)
            && let Ok(id) = self.push(command, 0)
        {
            self.slots.assign(id, request);
            self.requests.issued(request, !job.is_done(ranges));
            issued += 1;
        }
        issued
    }

    /// The next command of a job, its data pointer written into the page of the slot it will take.
    fn next_command(
        &mut self,
        job: &mut Job,
        slot: u16,
        segments: &[Segment],
        ranges: &[LbaRange],
    ) -> Result<Command, SubmitError> {
        let (list, list_iova) = self.list(slot);
        // Everything was found expressible before the first command, so a job that is not done has a next command.
        let command = job.next(segments, ranges, list, list_iova).ok_or(SubmitError::NeedsBounce)?;
        self.counters.sgls += u64::from(command.dword(0) & CDW0_PSDT_SGL != 0);
        Ok(command)
    }

    /// Goes on with the request that waits for slots.
    #[cold]
    #[inline(never)]
    pub(super) fn issue_staged(&mut self) {
        let mut staged = std::mem::take(&mut self.staged);
        if let Some((request, job, segments, ranges)) = staged.parts() {
            self.issue_some(request, job, segments, ranges);
            if job.is_done(ranges) {
                staged.clear();
            }
        }
        self.staged = staged;
        self.set_plain_bytes();
    }

    /// See the field: what the short way of `submit` may take now.
    pub(super) fn set_plain_bytes(&mut self) {
        let two_pages = 2 * PAGE_BYTES as u32;
        let plain = self.staged.is_empty() && self.max_bytes >= two_pages;
        self.plain_bytes = if plain { two_pages } else { 0 };
    }

    /// The page of a slot, and where the controller finds it.
    fn list(&self, slot: u16) -> (&[AtomicU64; LIST_WORDS], u64) {
        (&self.lists[usize::from(slot)], self.lists.iova() + u64::from(slot) * PAGE_BYTES)
    }
}

fn supported(supported: bool, otherwise: &'static str) -> Result<(), SubmitError> {
    if supported { Ok(()) } else { Err(SubmitError::Invalid(otherwise)) }
}

/// Are the blocks within the namespace? Written so that no sum can overflow.
fn check_range(namespace: &Namespace, lba: u64, blocks: u64) -> Result<(), SubmitError> {
    if lba >= namespace.blocks || blocks > namespace.blocks - lba {
        return Err(SubmitError::OutOfRange { lba, blocks, size: namespace.blocks });
    }
    Ok(())
}

/// Would one command cross a boundary of the namespace (NOIOB)?
#[inline(never)]
fn crosses_boundary(namespace: &Namespace, lba: u64, blocks: u32) -> bool {
    let boundary = u64::from(namespace.boundary_blocks);
    if boundary == 0 {
        return false;
    }
    // Nearly every boundary is a power of two; a division costs as much as the rest of the submission.
    let into = if boundary.is_power_of_two() { lba & (boundary - 1) } else { lba % boundary };
    into + u64::from(blocks) > boundary
}
