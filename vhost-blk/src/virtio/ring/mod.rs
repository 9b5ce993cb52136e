//! The virtqueue from the device's side: split (virtio 1.2, section 2.7) and packed (2.8).
//!
//! A ring resolves and checks the addresses of its parts once, when it is made. From then on [`Ring::pop`] takes one
//! descriptor chain the driver made available, [`Ring::push_used`] gives one back, and [`Ring::publish`] makes all that were
//! given back visible at once. Everything read from the ring is read once and kept.
//!
//! A ring may have a log ([`InflightQueue`]) that outlives this process. If an earlier process has used the ring, the ring begins where
//! that process stopped: [`Ring::pop_unfinished`] gives the chains that it had taken and not given back, in their order.
//!
//! A driver that breaks the rules of the ring itself gets a [`RingError`]: where the next chain begins is then unknown and
//! the queue cannot go on. What is *in* a chain is not judged here, see [`crate::blk::request`].

#[allow(unsafe_code)] // the layout of the log, see its documentation
mod inflight;
#[cfg(test)]
mod inflight_tests;
mod packed;
mod split;

#[cfg(test)]
pub(crate) mod model;
#[cfg(test)]
mod tests;

pub use inflight::{InflightError, InflightMemory, InflightQueue, Note};
pub use packed::PackedRing;
pub use split::SplitRing;

use std::sync::Arc;

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use crate::virtio::memory::{GuestMemory, GuestView};

/// The largest queue (virtio 1.2, 2.7 and 2.8).
pub const MAX_QUEUE_SIZE: u16 = 32768;

/// Descriptors a chain may have, indirect ones included. More than twice the segments a driver is told it may use; the limit
/// bounds the time one chain can take from the other lanes of its worker.
pub const MAX_CHAIN: usize = 2304;

/// Bytes of a descriptor (virtio 1.2, 2.7.5 and 2.8.13).
const DESCRIPTOR_BYTES: u64 = 16;

/// Bytes of an indirect table of three descriptors.
const SIMPLE_TABLE: u32 = 3 * DESCRIPTOR_BYTES as u32;

const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// Where a ring is and how it is used: what a front-end says before it starts one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingSetup {
    /// VIRTIO_F_RING_PACKED was negotiated.
    pub packed: bool,
    /// Descriptors in the ring. Split: a power of two up to 32768; packed: 1 to 32768.
    pub size: u16,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// VIRTIO_F_INDIRECT_DESC was negotiated.
    pub indirect: bool,
    /// Guest address of the descriptor table (split) or descriptor ring (packed).
    pub descriptors: u64,
    /// Guest address of the available ring (split) or the driver's event suppression area (packed).
    pub driver: u64,
    /// Guest address of the used ring (split) or the device's event suppression area (packed).
    pub device: u64,
    /// Where to begin, as in SET_VRING_BASE. Split: the next index in the available ring. Packed: bits 14:0 the next
    /// available descriptor and bit 15 its wrap counter, 30:16 and 31 the same for the next used descriptor.
    pub base: u32,
}

impl RingSetup {
    /// Whether it begins where a ring does that nobody has served: at index 0; packed: with both wrap counters 1 (virtio 1.2,
    /// 2.8.1), of which some front-ends send none, or the available one alone.
    pub fn begins_anew(&self) -> bool {
        match self.packed {
            false => self.base == 0,
            true => [0, 0x8000, 0x8000_8000].contains(&self.base),
        }
    }
}

/// A part of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The descriptor table or ring.
    Descriptors,
    /// What the driver writes.
    Driver,
    /// What the device writes.
    Device,
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Part::Descriptors => "descriptor area",
            Part::Driver => "driver area (available ring)",
            Part::Device => "device area (used ring)",
        })
    }
}

/// A ring that cannot be used, or cannot be used any longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RingError {
    /// Not a size the format can have.
    #[error("a {} ring cannot have {size} descriptors", if *packed { "packed" } else { "split" })]
    Size {
        /// The format.
        packed: bool,
        /// The refused size.
        size: u16,
    },
    /// A part of the ring is not, or not in one piece, in guest memory, or not aligned as section 2.7 or 2.8.10 asks.
    #[error("the {part} at guest address {address:#x} is misaligned or not within one region of guest memory")]
    Address {
        /// Which part.
        part: Part,
        /// Guest-physical address of the part.
        address: u64,
    },
    /// The base to start from is outside of the ring.
    #[error("ring base {base:#x} is outside of a ring of {size} descriptors")]
    Base {
        /// The refused base.
        base: u32,
        /// Descriptors in the ring.
        size: u16,
    },
    /// The driver claims to have made more chains available than the ring can hold.
    #[error("the available index jumped from {from} to {to} in a ring of {size}")]
    AvailableIndex {
        /// The next index this side expects.
        from: u16,
        /// The index the driver wrote.
        to: u16,
        /// Descriptors in the ring.
        size: u16,
    },
    /// A chain names a descriptor that does not exist.
    #[error("descriptor {index} is outside of a table of {size}")]
    DescriptorIndex {
        /// The index.
        index: u16,
        /// Descriptors in the table.
        size: u32,
    },
    /// A chain has more descriptors than its table: it comes back to itself.
    #[error("the chain at descriptor {head} is a loop or longer than its table")]
    Loop {
        /// Where the chain begins.
        head: u16,
    },
    /// A chain has more descriptors than [`MAX_CHAIN`].
    #[error(
        "the chain at descriptor {head} has more than {MAX_CHAIN} descriptors; seg_max tells drivers how many they may use"
    )]
    TooLong {
        /// Where the chain begins.
        head: u16,
    },
    /// A device-readable descriptor after a device-writable one (virtio 1.2, 2.7.4.2 and 2.8.17).
    #[error("the chain at descriptor {head} has a readable descriptor after a writable one")]
    Order {
        /// Where the chain begins.
        head: u16,
    },
    /// An indirect descriptor that may not be there: not negotiated, with NEXT, or within an indirect table.
    #[error("the chain at descriptor {head} has an indirect descriptor where none is allowed")]
    Indirect {
        /// Where the chain begins.
        head: u16,
    },
    /// An indirect table whose length is 0 or not a multiple of 16, or which is not in guest memory.
    #[error(
        "the chain at descriptor {head} has an indirect table of {bytes} bytes at guest address {address:#x}, which is not a table in guest memory"
    )]
    IndirectTable {
        /// Where the chain begins.
        head: u16,
        /// The table's guest-physical address.
        address: u64,
        /// Length of the table in bytes.
        bytes: u32,
    },
}

/// One piece of a chain as the driver describes it: nothing is checked yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest-physical address.
    pub address: u64,
    /// Length in bytes, not 0.
    pub bytes: u32,
}

/// The buffers of one descriptor chain: the device-readable ones first, then the device-writable ones.
///
/// Descriptors of length 0 say nothing and are left out. Storage is made once and used for chain after chain.
#[derive(Debug)]
pub struct Chain {
    buffers: Vec<Buffer>,
    readable: usize,
}

impl Default for Chain {
    fn default() -> Self {
        Chain { buffers: Vec::with_capacity(MAX_CHAIN), readable: 0 }
    }
}

impl Chain {
    /// An empty chain with room for [`MAX_CHAIN`] buffers.
    pub fn new() -> Self {
        Self::default()
    }

    /// What the device may read.
    #[inline]
    pub fn readable(&self) -> &[Buffer] {
        &self.buffers[..self.readable]
    }

    /// What the device may write.
    #[inline]
    pub fn writable(&self) -> &[Buffer] {
        &self.buffers[self.readable..]
    }

    /// Its buffers.
    #[inline(always)]
    #[allow(clippy::len_without_is_empty)] // no chain is
    pub fn len(&self) -> usize {
        self.buffers.len()
    }

    #[inline(always)]
    fn clear(&mut self) {
        self.buffers.clear();
        self.readable = 0;
    }

    #[inline(always)]
    fn push(&mut self, descriptor: Descriptor, head: u16) -> Result<(), RingError> {
        if descriptor.bytes == 0 {
            return Ok(());
        }
        if self.buffers.len() == MAX_CHAIN {
            return Err(RingError::TooLong { head });
        }
        if descriptor.flags & WRITE == 0 {
            if self.readable != self.buffers.len() {
                return Err(RingError::Order { head });
            }
            self.readable += 1;
        }
        self.buffers.push(Buffer { address: descriptor.address, bytes: descriptor.bytes });
        Ok(())
    }
}

/// A descriptor, read from guest memory once. In both formats: address, length, then two 16-bit fields whose order differs.
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    bytes: u32,
    flags: u16,
    /// Split: the next descriptor. Packed: the buffer id.
    link: u16,
}

impl Descriptor {
    /// Split (virtio 1.2, 2.7.5): le64 addr, le32 len, le16 flags, le16 next.
    #[inline(always)]
    fn split(words: [u64; 2]) -> Self {
        Descriptor {
            address: words[0],
            bytes: words[1] as u32,
            flags: (words[1] >> 32) as u16,
            link: (words[1] >> 48) as u16,
        }
    }

    /// Has it just this length and these flags?
    #[inline(always)]
    fn is(&self, bytes: u32, flags: u16) -> bool {
        // Of one 64-bit word both: one comparison instead of two.
        u64::from(self.bytes) | u64::from(self.flags) << 32 == u64::from(bytes) | u64::from(flags) << 32
    }

    /// Packed (virtio 1.2, 2.8.13): le64 addr, le32 len, le16 id, le16 flags.
    #[inline(always)]
    fn packed(words: [u64; 2]) -> Self {
        Descriptor {
            address: words[0],
            bytes: words[1] as u32,
            link: (words[1] >> 32) as u16,
            flags: (words[1] >> 48) as u16,
        }
    }
}

/// What has to be kept of a chain in order to give it back: four fields of 16 bits in one word, to be moved as such.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Head(u64);

impl Head {
    /// The head of a chain that is not in a log.
    #[inline(always)]
    fn new(id: u16, entries: u16) -> Head {
        Head::logged(id, entries, 0, u16::MAX)
    }

    #[inline(always)]
    fn logged(id: u16, entries: u16, log: u16, last: u16) -> Head {
        // One more than `last`: of a chain that is not in a log the upper half is 0.
        let end = last.wrapping_add(1);
        Head(u64::from(id) | u64::from(entries) << 16 | u64::from(end) << 32 | u64::from(log) << 48)
    }

    #[inline(always)]
    fn without_id(self) -> Head {
        Head(self.0 & !0xffff)
    }

    /// With this id; had id 0.
    #[inline(always)]
    fn with_id(self, id: u16) -> Head {
        Head(self.0 | u64::from(id))
    }

    /// Split: index of the first descriptor. Packed: the buffer id.
    #[inline(always)]
    pub fn id(self) -> u16 {
        self.0 as u16
    }

    /// Packed: ring entries the chain takes. Split: 1, an entry of the available ring.
    #[inline(always)]
    fn entries(self) -> u16 {
        (self.0 >> 16) as u16
    }

    /// Packed: its first entry in the log, if the ring has one.
    #[inline(always)]
    fn log(self) -> u16 {
        (self.0 >> 48) as u16
    }

    /// Packed: its last entry in the log, if they follow each other there; else 65535, which is none.
    #[inline(always)]
    fn last(self) -> u16 {
        ((self.0 >> 32) as u16).wrapping_sub(1)
    }
}

impl std::fmt::Debug for Head {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Head {{ id: {}, entries: {}, log: {}..={} }}", self.id(), self.entries(), self.log(), self.last())
    }
}

/// The chain nearly every small request is: three descriptors, the first readable, the last writable, both of a length that
/// is known beforehand.
///
/// What a driver says in it is not checked yet, as with any [`Chain`]. The middle one may be empty.
#[derive(Clone, Copy, Debug)]
pub struct SimpleChain {
    /// What is kept of the chain in order to give it back.
    pub head: Head,
    /// Guest address of the first buffer, which is readable.
    pub first: u64,
    /// The buffer between the first and the last one.
    pub middle: Buffer,
    /// The device may write the middle one.
    pub middle_writable: bool,
    /// Guest address of the last buffer, which is writable.
    pub last: u64,
}

impl SimpleChain {
    /// Everything but WRITE of the middle one has been checked.
    #[inline(always)]
    fn new(head: Head, [first, middle, last]: [Descriptor; 3]) -> SimpleChain {
        SimpleChain {
            head,
            first: first.address,
            middle: Buffer { address: middle.address, bytes: middle.bytes },
            middle_writable: middle.flags & WRITE != 0,
            last: last.address,
        }
    }
}

/// The fast path of a ring format, for code that is compiled once per format.
pub trait SimpleChainRing {
    /// The next available chain, if it is a [`SimpleChain`] with these lengths of its first and last buffer; it stays available.
    /// `None`: it is something else, or there is none, or the ring is corrupt; [`Ring::pop`] knows.
    fn peek_simple_chain<const FIRST: u32, const LAST: u32>(&mut self, view: &mut GuestView) -> Option<SimpleChain>;

    /// Is there no chain? False also if the ring is corrupt.
    fn is_empty(&mut self) -> bool;

    /// Takes the chain that was peeked at last, which has this head; gives the head to be kept. To be followed by
    /// [`SimpleChainRing::commit`] before anything else is done with the ring, and before the drive hears of the chain.
    fn accept(&mut self, head: Head) -> Head;

    /// The accepted chains are in the ring's log from here on, if it has one.
    fn commit(&mut self);
}

/// Number of descriptors in an indirect table; refuses lengths that are not those of a table.
fn indirect_entries(table: Descriptor, head: u16) -> Result<u32, RingError> {
    let entries = table.bytes / DESCRIPTOR_BYTES as u32;
    // The table has to end below 2^64 for the addresses in it to be sums without overflow.
    if entries == 0
        || !table.bytes.is_multiple_of(DESCRIPTOR_BYTES as u32)
        || table.address.checked_add(table.bytes.into()).is_none()
    {
        return Err(RingError::IndirectTable { head, address: table.address, bytes: table.bytes });
    }
    Ok(entries)
}

/// Descriptors that are looked at in a ring of this size for one chain. Empty ones do not count in [`Chain::push`].
fn longest(size: u16) -> u16 {
    size.min(MAX_CHAIN as u16)
}

/// What is wrong with a chain that goes on after [`longest`]: with `size` descriptors it uses the whole table or ring, and one more
/// has come back to one of them.
#[cold]
fn endless(size: u16, head: u16) -> RingError {
    if usize::from(size) <= MAX_CHAIN { RingError::Loop { head } } else { RingError::TooLong { head } }
}

/// The other side's event index says whether it wants to hear of the step from `old` to `new` (virtio 1.2, 2.7.10).
#[inline]
fn event_passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// A virtqueue of either format. Belongs to one thread; keeps the guest memory it lives in mapped.
pub enum Ring {
    /// Section 2.7.
    Split(SplitRing),
    /// Section 2.8.
    Packed(PackedRing),
}

macro_rules! either {
    ($self:ident, $ring:ident => $do:expr) => {
        match $self {
            Ring::Split($ring) => $do,
            Ring::Packed($ring) => $do,
        }
    };
}

impl Ring {
    /// Resolves and checks the ring's addresses. Nothing is written to guest memory yet.
    ///
    /// # Errors
    /// A size or base the format cannot have, or a part that is misaligned or not within one region.
    pub fn new(memory: &Arc<GuestMemory>, setup: &RingSetup) -> Result<Ring, RingError> {
        Ok(match setup.packed {
            false => Ring::Split(SplitRing::new(memory, setup)?),
            true => Ring::Packed(PackedRing::new(memory, setup)?),
        })
    }

    /// Notes from now on what is taken and given back, and takes up what a process before this one has noted: the ring then
    /// goes on where that one stopped, whatever [`RingSetup::base`] said. Nothing may have been popped yet.
    ///
    /// In a packed ring that goes on so, this writes to the guest's descriptors: those that the other process had marked as
    /// used, and not yet shown to the driver, are made available again.
    ///
    /// # Errors
    /// The log's memory is too small, or was written for another ring.
    pub fn set_log(&mut self, queue: &InflightQueue) -> Result<(), InflightError> {
        either!(self, r => r.set_log(queue))
    }

    /// Did a process before this one use the ring? Its driver may wait for a notification that was never sent.
    pub fn resumed(&self) -> bool {
        either!(self, r => r.resumed())
    }

    /// Takes the oldest chain that a process before this one has taken and not given back, its buffers into `chain`;
    /// `None`: there is none (any more). Before the first [`Ring::pop`].
    ///
    /// # Errors
    /// The chain makes no sense (any more).
    pub fn pop_unfinished(&mut self, view: &mut GuestView, chain: &mut Chain) -> Result<Option<Head>, RingError> {
        either!(self, r => r.pop_unfinished(view, chain))
    }

    /// Descriptors in the ring.
    pub fn size(&self) -> u16 {
        either!(self, r => r.size())
    }

    /// May its driver use indirect tables?
    pub fn indirect(&self) -> bool {
        either!(self, r => r.takes_indirect())
    }

    /// Is the next chain where that of a ring is which nobody has used? It is there again after each 65536 chains (split) or two
    /// rounds (packed).
    pub fn is_at_its_beginning(&self) -> bool {
        match self {
            Ring::Split(ring) => ring.base() == 0,
            // The first descriptor, with its wrap counter 1 (virtio 1.2, 2.8.1).
            Ring::Packed(ring) => ring.base() & 0xffff == 0x8000,
        }
    }

    /// Takes the next available chain, its buffers into `chain`; `None`: there is none now.
    ///
    /// # Errors
    /// The ring is corrupt; nothing was taken, and the same error would come again.
    #[inline]
    pub fn pop(&mut self, view: &mut GuestView, chain: &mut Chain) -> Result<Option<Head>, RingError> {
        either!(self, r => r.pop(view, chain))
    }

    /// Puts back the chain that was popped last, for whoever uses the ring next; nothing may have been popped since.
    pub fn unpop(&mut self, head: Head) {
        either!(self, r => r.unpop(head))
    }

    /// Gives a chain back, `written` bytes of its writable part filled. Seen by the driver after [`Ring::publish`].
    #[inline(always)]
    pub fn push_used(&mut self, head: Head, written: u32) {
        either!(self, r => r.push_used(head, written))
    }

    /// Was anything given back since the last publication?
    #[inline]
    pub fn unpublished(&self) -> bool {
        either!(self, r => r.unpublished())
    }

    /// Makes everything given back visible to the driver. Returns whether the driver wants to be notified of it.
    #[inline]
    pub fn publish(&mut self) -> bool {
        either!(self, r => r.publish())
    }

    /// Asks the driver to notify us of the next available chain, and looks once more: `true` if a chain (or a corrupt index)
    /// is there already, in which case no notification may come and the ring has to be popped.
    #[must_use]
    pub fn enable_notifications(&mut self) -> bool {
        either!(self, r => r.enable_notifications())
    }

    /// Tells the driver that the ring is being polled.
    pub fn disable_notifications(&mut self) {
        either!(self, r => r.disable_notifications())
    }

    /// Where the next user of this ring has to begin: for GET_VRING_BASE, in the format of [`RingSetup::base`]. Every
    /// popped chain has to have been given back and published.
    pub fn base(&self) -> u32 {
        either!(self, r => r.base())
    }
}
