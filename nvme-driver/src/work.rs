//! What a queue pair is asked to do, in logical blocks and I/O virtual addresses.

/// A piece of memory the controller can reach: contiguous in I/O virtual addresses.
///
/// Whoever makes one vouches that `iova..iova + bytes` is mapped for the device until the request has completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// I/O virtual address of the first byte.
    pub iova: u64,
    /// Length in bytes.
    pub bytes: u32,
}

/// A run of logical blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LbaRange {
    /// First logical block.
    pub lba: u64,
    /// Number of logical blocks (not zero-based).
    pub blocks: u32,
}

/// One request to a namespace. It has one completion, however many commands it takes.
///
/// The length of a transfer is the sum of its segments and has to be a multiple of the block size.
#[derive(Clone, Copy, Debug)]
pub enum Work<'a> {
    /// Blocks from `lba` on into the segments.
    Read {
        /// First logical block.
        lba: u64,
        /// Where the data goes, in order.
        segments: &'a [Segment],
    },
    /// The segments onto the blocks from `lba` on.
    Write {
        /// First logical block.
        lba: u64,
        /// Where the data comes from, in order.
        segments: &'a [Segment],
        /// Force unit access: completed only when the data is on non-volatile media.
        fua: bool,
    },
    /// Compares the segments with the blocks from `lba` on; a difference is the status Compare Failure.
    Compare {
        /// First logical block.
        lba: u64,
        /// What to compare with, in order.
        segments: &'a [Segment],
    },
    /// Reads and checks the blocks inside the drive; no data is moved.
    Verify(LbaRange),
    /// Everything that completed before is on non-volatile media when this completes.
    Flush,
    /// The ranges read as zeroes afterwards.
    WriteZeroes {
        /// The blocks, in any order.
        ranges: &'a [LbaRange],
        /// The drive may deallocate the blocks; it is told so only if they read as zeroes then
        /// ([`crate::Namespace::write_zeroes_deallocates`]).
        deallocate: bool,
        /// Force unit access.
        fua: bool,
    },
    /// The content of the ranges is no longer needed (Dataset Management, deallocate): a hint, and what is read afterwards is
    /// up to the drive.
    Discard {
        /// The blocks, in any order.
        ranges: &'a [LbaRange],
    },
}
