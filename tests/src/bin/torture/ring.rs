//! The driver's side of a virtqueue (virtio 1.2, sections 2.7 and 2.8), which believes nothing that the device says.

use std::collections::VecDeque;

use crate::memory::Memory;
use crate::packed::PackedDriver;
use crate::split::SplitDriver;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// A piece of a chain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub address: u64,
    pub bytes: u32,
    pub writable: bool,
}

impl Piece {
    pub(crate) fn flags(&self) -> u16 {
        if self.writable { WRITE } else { 0 }
    }
}

/// What the device has given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Used {
    /// A chain that was in flight, and what was written to it.
    Chain { id: u16, bytes: u32 },
    /// Something that was not.
    Stranger { id: u32 },
}

/// Names of chains that are not in use. A name that is used again at once hides a stale answer, one that rests shows it;
/// a driver may do either.
pub(crate) struct Names {
    free: VecDeque<u16>,
    rest: bool,
}

impl Names {
    pub(crate) fn new(count: u16, rest: bool) -> Names {
        Names { free: (0..count).collect(), rest }
    }

    pub(crate) fn len(&self) -> usize {
        self.free.len()
    }

    pub(crate) fn take(&mut self) -> Option<u16> {
        if self.rest { self.free.pop_front() } else { self.free.pop_back() }
    }

    pub(crate) fn put(&mut self, name: u16) {
        self.free.push_back(name);
    }
}

/// Where the parts of a ring lie.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Parts {
    pub size: u16,
    pub descriptors: u64,
    /// Available ring, or driver event area.
    pub driver: u64,
    /// Used ring, or device event area.
    pub device: u64,
}

impl Parts {
    /// A ring of `size` entries at `at`, a multiple of 16.
    pub(crate) fn at(at: u64, size: u16) -> Parts {
        let driver = at + 16 * u64::from(size);
        Parts { size, descriptors: at, driver, device: (driver + 6 + 2 * u64::from(size)).next_multiple_of(4) }
    }

    /// Bytes that such a ring takes, whatever its format.
    pub(crate) fn bytes(size: u16) -> u64 {
        (26 * u64::from(size) + 32).next_multiple_of(4096)
    }
}

pub(crate) enum Driver {
    Split(SplitDriver),
    Packed(PackedDriver),
}

macro_rules! either {
    ($self:ident, $driver:ident => $call:expr) => {
        match $self {
            Driver::Split($driver) => $call,
            Driver::Packed($driver) => $call,
        }
    };
}

impl Driver {
    pub(crate) fn new(packed: bool, parts: Parts, rest: bool) -> Driver {
        match packed {
            false => Driver::Split(SplitDriver::new(parts, rest)),
            true => Driver::Packed(PackedDriver::new(parts, rest)),
        }
    }

    pub(crate) fn parts(&self) -> Parts {
        either!(self, driver => driver.parts)
    }

    /// Makes a chain available, through an indirect table at this address if there is one, and returns its name; `None`: the
    /// ring has no room.
    pub(crate) fn add(&mut self, memory: &Memory, chain: &[Piece], table: Option<u64>) -> Option<u16> {
        either!(self, driver => driver.add(memory, chain, table))
    }

    /// The next thing the device has given back.
    pub(crate) fn used(&mut self, memory: &Memory) -> Option<Used> {
        either!(self, driver => driver.used(memory))
    }

    pub(crate) fn has_used(&self, memory: &Memory) -> bool {
        either!(self, driver => driver.has_used(memory))
    }

    /// Has the device asked to be told of what was added since the last call?
    pub(crate) fn kick_wanted(&mut self, memory: &Memory) -> bool {
        either!(self, driver => driver.kick_wanted(memory))
    }

    /// Asks for a notification of the next used chain, or for none.
    pub(crate) fn ask_for_calls(&self, memory: &Memory, on: bool) {
        either!(self, driver => driver.ask_for_calls(memory, on));
    }

    /// What a front-end says of the ring to a new back-end when the old one cannot be asked any more (as QEMU does it): split
    /// rings go on from the used index in memory; for packed rings, which have none there, it repeats what it said at first.
    pub(crate) fn base(&self, memory: &Memory) -> u32 {
        either!(self, driver => driver.base(memory))
    }
}
