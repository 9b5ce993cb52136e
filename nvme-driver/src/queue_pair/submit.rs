//! From a request to commands: the plain case in a few dozen instructions, every other case correctly.

use std::sync::atomic::AtomicU64;

use super::job::Job;
use super::staged::Next;
use super::{Completed, Full, QueuePair};
use crate::data_pointer::{LIST_WORDS, MAX_COMMAND_BYTES, PAGE_BYTES, Position, prp};
use crate::spec::command::{CDW0_PSDT_SGL, CDW12_FUA, io};
use crate::split::Limits;
use crate::{Command, LbaRange, Namespace, Segment, Status, Work};

/// A request of no more commands and bytes than these is issued whole: most large requests of operating systems are. What is
/// longer shares the queue pair with others of its kind.
const SHORT_COMMANDS: usize = 16;
const SHORT_BYTES: u64 = 2 << 20;

// What is one command is no long transfer.
const _: () = assert!(MAX_COMMAND_BYTES as u64 <= SHORT_BYTES);

/// Why a request was not taken. Nothing of it has been sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SubmitError {
    /// No slot is free: try again after [`QueuePair::reap`].
    #[error("the queue pair is full; try again after the next completions")]
    Full,
    /// The request takes many commands, and as many of that kind as there may be, or as its owner may have, are under way: try
    /// again when one of them has completed. Others can be submitted meanwhile. [`QueuePair::admits`] tells when it is worth
    /// it.
    #[error("as many long requests as there may be are under way; try again when one of them has completed")]
    Crowded,
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
    ///
    /// A *long* request (more than 16 commands or 2 MiB, or more commands than there are free slots) has only some of its
    /// commands out at once; the others follow with [`QueuePair::reap`]. All long requests of the pair together have at most
    /// half of its slots, at most 32 commands and about 16 MiB out. They share that by the bytes they move: first their owners,
    /// which bits 63:32 of `token` name ([`super::OWNER_SHIFT`]), then the requests of one owner. Other requests go on beside
    /// them.
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
            // Two pages need no list.
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
            return self.push_or_refuse(command, token);
        }
        self.transfer(namespace, opcode, flags, lba, segments, token)
    }

    /// Submits a request as [`QueuePair::submit`] does, with PRPs only: no command has an SGL, whatever the controller
    /// announces.
    pub fn submit_without_sgls(
        &mut self,
        namespace: &Namespace,
        work: Work<'_>,
        token: u64,
    ) -> Result<(), SubmitError> {
        let sgl = self.sgl.take();
        let submitted = self.submit(namespace, work, token);
        self.sgl = sgl;
        submitted
    }

    /// Would this be submitted with an SGL, in any of its commands, or would it have been before [`QueuePair::refuse_sgls`]?
    /// Takes time: for requests that have failed. Of a transfer of thousands of commands only these are looked at.
    pub fn describes_by_sgl(&self, namespace: &Namespace, work: &Work<'_>) -> bool {
        let (&Work::Read { lba, segments } | &Work::Write { lba, segments, .. } | &Work::Compare { lba, segments }) =
            work
        else {
            return false;
        };
        let bytes = segments.iter().map(|segment| u64::from(segment.bytes)).sum();
        let limits = Limits { sgl: self.sgl_before, ..self.limits(namespace) };
        limits.sgl.is_some() && limits.any_sgl(segments, lba, bytes)
    }

    fn limits(&self, namespace: &Namespace) -> Limits {
        Limits {
            max_bytes: self.max_bytes,
            block_shift: namespace.block_shift,
            boundary_blocks: namespace.boundary_blocks,
            sgl: self.sgl,
        }
    }

    #[inline(always)]
    fn push_or_refuse(&mut self, command: Command, token: u64) -> Result<(), SubmitError> {
        match self.push(command, token) {
            Ok(_) => Ok(()),
            Err(Full) => self.refuse(),
        }
    }

    /// There is no slot.
    #[cold]
    #[inline(never)]
    fn refuse(&mut self) -> Result<(), SubmitError> {
        self.staged.refused = true;
        Err(SubmitError::Full)
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
            Work::Flush => self.push_or_refuse(Command::flush(namespace.id), token),
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
        // First: whoever is told so comes again, each time.
        let Some(slot) = self.slots.next() else { return self.refuse() };
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
        // Known to be so before anything is counted.
        let long = bytes > SHORT_BYTES || bytes > SHORT_COMMANDS as u64 * u64::from(self.max_bytes);
        if long && !self.staged.admits(token, segments.len()) {
            return Err(SubmitError::Crowded);
        }
        if bytes <= u64::from(self.max_bytes) && !crosses_boundary(namespace, lba, blocks as u32) {
            let (list, list_iova) = self.list(slot);
            if let Some(prps) = prp::describe(segments, Position::default(), bytes, list, list_iova) {
                let command = Command::blocks(opcode, namespace.id, lba, blocks as u32, flags);
                return self.push_or_refuse(command.with_prps(prps.prp1, prps.prp2), token);
            }
        }
        let limits = self.limits(namespace);
        let pieces = match long {
            true => limits.expressible(segments, bytes).then_some(usize::MAX),
            false => limits.count_pieces(segments, lba, bytes),
        };
        let Some(pieces) = pieces else {
            self.counters.needs_bounce += 1;
            return Err(SubmitError::NeedsBounce);
        };
        let job = Job::transfer(namespace, limits, opcode, flags, lba, bytes);
        self.issue(job, segments, &[], pieces, long, token)
    }

    fn submit_ranges(
        &mut self,
        namespace: &Namespace,
        job: Job,
        ranges: &[LbaRange],
        token: u64,
    ) -> Result<(), SubmitError> {
        if self.is_full() {
            return self.refuse();
        }
        if ranges.is_empty() || ranges.iter().any(|range| range.blocks == 0) {
            return Err(SubmitError::Invalid("a range of no blocks"));
        }
        for range in ranges {
            check_range(namespace, range.lba, range.blocks.into())?;
        }
        let pieces = job.count(ranges, SHORT_COMMANDS + 1);
        let blocks: u64 = ranges.iter().map(|range| u64::from(range.blocks)).sum();
        // How long a drive takes to fill blocks, or to check them, goes by their number; a discard is a matter of its tables.
        let long = !job.discards() && blocks > SHORT_BYTES >> namespace.block_shift;
        self.issue(job, &[], ranges, pieces, long, token)
    }

    /// Issues a request that takes `pieces` commands, or more of them than a short one has. `long`: it is a long one even if
    /// they are few.
    fn issue(
        &mut self,
        job: Job,
        segments: &[Segment],
        ranges: &[LbaRange],
        pieces: usize,
        long: bool,
        token: u64,
    ) -> Result<(), SubmitError> {
        let free = self.slots.len().saturating_sub(self.outstanding());
        if !long && pieces <= free.min(SHORT_COMMANDS) {
            return self.issue_whole(job, segments, ranges, pieces, token);
        }
        if !self.staged.admits(token, segments.len() + ranges.len()) {
            return Err(SubmitError::Crowded);
        }
        let request = self.requests.begin(token).ok_or(SubmitError::Full)?;
        self.counters.staged += 1;
        self.staged.put(request, token, job, segments, ranges);
        self.issue_staged();
        Ok(())
    }

    /// Issues a request for whose commands there are slots.
    fn issue_whole(
        &mut self,
        mut job: Job,
        segments: &[Segment],
        ranges: &[LbaRange],
        pieces: usize,
        token: u64,
    ) -> Result<(), SubmitError> {
        let request = if pieces > 1 { Some(self.requests.begin(token).ok_or(SubmitError::Full)?) } else { None };
        self.counters.splits += u64::from(pieces > 1);
        while !job.is_done(ranges) {
            let slot = self.slots.next().ok_or(SubmitError::Full)?;
            let (list, list_iova) = self.list(slot);
            // Everything was found expressible before the first command, so a job that is not done has a next command.
            let (command, _) = job.next(segments, ranges, list, list_iova).ok_or(SubmitError::NeedsBounce)?;
            self.counters.sgls += u64::from(command.dword(0) & CDW0_PSDT_SGL != 0);
            // Such a command belongs to no long request: see `Staged::answered`.
            let id = self.push(command, if request.is_some() { 0 } else { token })?;
            if let Some(request) = request {
                self.slots.assign(id, request);
                self.requests.issued(request, !job.is_done(ranges));
            }
        }
        Ok(())
    }

    /// Issues commands of long requests, as many as there may be and as there are slots for.
    #[cold]
    #[inline(never)]
    pub(super) fn issue_staged(&mut self) {
        if self.held {
            return;
        }
        let QueuePair { staged, slots, lists, requests, submission, counters, .. } = self;
        // Where there is but one slot, whoever was refused it has every other turn. If they do not take it, `tick` goes on.
        if slots.len() == 1 && staged.yields() {
            return;
        }
        while staged.has_room()
            && let Some(slot) = slots.next()
            && let Some((at, Next { request, job, segments, ranges })) = staged.next()
        {
            let (list, list_iova) = (&lists[usize::from(slot)], lists.iova() + u64::from(slot) * PAGE_BYTES);
            // As in `issue_whole`.
            let Some((command, bytes)) = job.next(segments, ranges, list, list_iova) else { break };
            let more = !job.is_done(ranges);
            counters.sgls += u64::from(command.dword(0) & CDW0_PSDT_SGL != 0);
            let (weight, splits) = staged.issued(at, bytes);
            counters.splits += u64::from(splits);
            let Some(id) = slots.take(weight) else { break };
            submission.write(&command.with_id(id.0));
            slots.assign(id, request);
            requests.issued(request, more);
        }
    }

    /// Would a long request with this token be taken, if it has `entries` segments or ranges? Where it is not, there is no need
    /// to make one: [`SubmitError::Crowded`].
    pub fn admits(&self, token: u64, entries: usize) -> bool {
        self.staged.admits(token, entries)
    }

    /// Issues nothing more of the long requests whose token `which` picks. Each completes when its commands that are out have
    /// been answered, as [`Status::ABORTED_BY_HOST`] unless a command has failed before, with [`QueuePair::reap`] as usual; one
    /// that has none out at once: `done` gets it. Other requests with such a token are as before.
    ///
    /// What of such a request has been done, and what not, is unknown.
    pub fn cancel_long(&mut self, which: impl FnMut(u64) -> bool, mut done: impl FnMut(Completed)) {
        let QueuePair { staged, requests, .. } = self;
        staged.forget_all(which, |request| {
            if let Some((token, status)) = requests.end(request, Status::ABORTED_BY_HOST) {
                done(Completed { token, status, result: 0 });
            }
        });
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
