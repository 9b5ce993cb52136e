//! What a lane can tell the operator about the set-up of its guest: once per ring, when it has been seen.

use super::Lane;
use crate::blk::config::LONGEST_CHAIN;
use crate::blk::request;
use crate::log_limit::Kind;
use crate::virtio::memory::GuestView;
use crate::virtio::ring::{Chain, Head, Ring};

/// Kicks without anything in a ring that has been used before: some front-ends kick when they start one.
const KICKS: u32 = 8;
/// Failed requests of a ring that are looked at for a buffer outside of guest memory.
const LOOKS: u32 = 64;

/// What was seen of one ring, and has been told.
pub(super) struct Advice {
    /// More buffers than these and the guest is told how to set its ring up.
    long_chain: usize,
    /// Failed requests that are still looked at.
    looks: u32,
    /// Kicks while nothing was in the ring; `None`: something was, or it has been told.
    kicks: Option<u32>,
    /// The counter of batches when the ring started.
    batches: u64,
}

impl Advice {
    pub(super) fn new(ring: &Ring, batches: u64) -> Advice {
        let size = usize::from(ring.size());
        // Only an indirect table can hold more than the ring. With less than two such requests in it a ring is as good as full.
        let may_not_fit = !ring.indirect() && size < LONGEST_CHAIN as usize;
        let long_chain = if may_not_fit { size / 2 } else { usize::MAX };
        Advice { long_chain, looks: LOOKS, kicks: Some(0), batches }
    }

    /// A kick ended a sleep.
    pub(super) fn count_kick(&mut self) {
        self.kicks = self.kicks.map(|kicks| kicks.saturating_add(1));
    }
}

impl Lane {
    /// The slow path has taken a chain.
    #[inline(always)]
    pub(super) fn note_length(&mut self) {
        if self.chain.len() > self.advice.long_chain {
            self.advise_on_length();
        }
    }

    /// A driver that believes `seg_max` and finds its ring too small waits for ever, and we do not see it. Its requests that
    /// just fit are seen.
    #[cold]
    #[inline(never)]
    fn advise_on_length(&mut self) {
        self.advice.long_chain = usize::MAX;
        let (name, buffers, size) = (&self.name, self.chain.len(), self.ring.size());
        if let Some(more) = self.log.admit(Kind::Advice) {
            log::warn!(
                "{name}: a request took {buffers} of the ring's {size} entries, and without indirect descriptors longer ones \
                 never fit: the guest needs indirect_desc=on or queue-size={LONGEST_CHAIN}{more}"
            );
        }
    }

    /// The request in the parser is answered with this status, without the drive.
    #[cold]
    #[inline(never)]
    pub(super) fn note_refused(&mut self, code: u8) {
        if code == request::IOERR && self.advice.looks != 0 {
            self.advice.looks -= 1;
            self.advise_on_memory();
        }
    }

    /// Does the chain name memory that is not there?
    fn advise_on_memory(&mut self) {
        let Some(address) = first_outside(&self.chain, &self.view) else { return };
        self.advice.looks = 0;
        let name = &self.name;
        if let Some(more) = self.log.admit(Kind::Advice) {
            log::warn!(
                "{name}: a request fails: its buffer at guest address {address:#x} is in memory that the front-end has not \
                 shared (needs share=on, also memory that is plugged in later); others like it fail silently{more}"
            );
        }
    }

    /// There is nowhere to put an answer to this chain.
    #[cold]
    #[inline(never)]
    pub(super) fn break_down_without_status(&mut self, head: Head) {
        match first_outside(&self.chain, &self.view) {
            Some(address) => self.break_down(&StatusOutside { head: head.id(), address }),
            None => self.break_down(&NoStatus(head.id())),
        }
    }

    /// The ring is empty, and its lane goes to sleep.
    pub(super) fn note_empty(&mut self) {
        let advice = &mut self.advice;
        if self.tally.batches != advice.batches {
            advice.kicks = None;
        }
        // Nothing was ever in a ring whose position is the first.
        let most = if self.ring.is_at_its_beginning() { 1 } else { KICKS };
        if advice.kicks.is_none_or(|kicks| kicks < most) {
            return;
        }
        advice.kicks = None;
        let name = &self.name;
        if let Some(more) = self.log.admit(Kind::Advice) {
            log::warn!(
                "{name}: kicks come but the ring does not change: is the guest's memory shared (share=on)?{more}"
            );
        }
    }
}

/// The first guest address of a chain that lies in no region.
fn first_outside(chain: &Chain, view: &GuestView) -> Option<u64> {
    let buffers = chain.readable().iter().chain(chain.writable());
    buffers.filter_map(|buffer| view.first_outside(buffer.address, buffer.bytes.into())).next()
}

/// A chain without a place for its status.
#[derive(Debug, thiserror::Error)]
#[error("the request at descriptor {0} has no status byte")]
struct NoStatus(u16);

/// A chain whose place for its status is nowhere, or which we cannot know to have one.
#[derive(Debug, thiserror::Error)]
#[error(
    "the request at descriptor {head} has no status byte in guest memory: its buffer at guest address {address:#x} is in memory \
     that the front-end has not shared (share=on)"
)]
struct StatusOutside {
    head: u16,
    address: u64,
}
