//! What a lane keeps of each request the drive works on: a slot for each, and what state it is in.

use super::record::Record;
use crate::virtio::ring::Head;

/// What is needed to answer a request.
#[derive(Clone, Copy, Default)]
pub(super) struct Slot {
    /// Guest address of the status byte.
    pub status: u64,
    /// The chain.
    pub head: Head,
    /// Whether the slot holds a request, and which way it is answered.
    pub used: UsedLength,
    /// Of a free slot: the next free one. Of a bounced request's: its index among those.
    link: u16,
    /// What the slot is if it holds no request. It says free while the slot holds one: so the fast path need not write it.
    unheld: Unheld,
    /// What to ask the drive again, should it not answer.
    pub record: Record,
}

/// The state of a slot. The data path keeps it in [`UsedLength`] alone, a word that it needs in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SlotState {
    /// The slot has no request.
    Free,
    /// The slot holds a request that the fast path answers.
    Simple,
    /// The slot holds a request whose answer takes more than that: most often because there are
    /// [`Details`](super::record::Details) of it.
    Detailed,
    /// The slot's request is copied: it is at this index of the bounced ones.
    Bounced(u16),
    /// The slot's request gets no answer, for its guest broke its ring. The slot is taken until the drive is done with it.
    Orphaned,
}

impl Slot {
    fn state(&self) -> SlotState {
        match self.used {
            used if used.is_simple() => SlotState::Simple,
            used if used.is_held() => SlotState::Detailed,
            _ => match self.unheld {
                Unheld::Free => SlotState::Free,
                Unheld::Bounced => SlotState::Bounced(self.link),
                Unheld::Orphaned => SlotState::Orphaned,
            },
        }
    }
}

/// The length for the used element, at least 1 ([`Request::written`](crate::blk::request::Request::written)), of a request that
/// its slot holds. In the same word: whether the fast path may answer it.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
#[repr(transparent)]
pub(super) struct UsedLength(u32);

impl UsedLength {
    /// The slot holds no request.
    pub(super) const NONE: UsedLength = UsedLength(0);

    /// Not for the fast path. A length of 2 GiB or more has this bit, too, and is answered as correctly, but more slowly.
    const DETAILED: u32 = 1 << 31;

    /// The length of a request that the fast path answers.
    #[inline(always)]
    pub(super) fn simple(bytes: u32) -> UsedLength {
        UsedLength(bytes)
    }

    /// Stands for the length of a request that has details, where its length is.
    pub(super) fn detailed() -> UsedLength {
        UsedLength(UsedLength::DETAILED)
    }

    /// May the fast path answer the request?
    #[inline(always)]
    fn is_simple(self) -> bool {
        // Neither 0 nor with the highest bit: one comparison.
        self.0 as i32 > 0
    }

    /// Does the slot hold a request?
    #[inline(always)]
    fn is_held(self) -> bool {
        self.0 != 0
    }

    /// The length, in bytes. Not of a request that has details.
    #[inline(always)]
    pub(super) fn bytes(self) -> u32 {
        self.0
    }
}

/// What a slot is that holds no request.
#[derive(Clone, Copy, Default)]
enum Unheld {
    #[default]
    Free,
    Bounced,
    Orphaned,
}

/// What is needed to answer a request that the fast path answers: see [`Slot`].
pub(super) struct Answer {
    pub status: u64,
    pub head: Head,
    pub written: u32,
}

/// A slot that is free until [`Reserved::take`].
pub(super) struct Reserved<'a> {
    slot: &'a mut Slot,
    free: &'a mut u16,
    taken: &'a mut u32,
}

impl Reserved<'_> {
    /// The slot's number.
    #[inline(always)]
    pub(super) fn number(&self) -> u16 {
        *self.free
    }

    /// Puts everything into the slot but the chain.
    #[inline(always)]
    pub(super) fn fill(&mut self, status: u64, used: UsedLength, record: Record) {
        self.slot.status = status;
        self.slot.used = used;
        self.slot.record = record;
    }

    /// The slot stays free.
    pub(super) fn release(self) {
        self.slot.used = UsedLength::NONE;
    }

    /// The slot is taken by the request with this chain.
    #[inline(always)]
    pub(super) fn take(self, head: Head) {
        *self.free = self.slot.link;
        *self.taken += 1;
        self.slot.head = head;
    }
}

/// No slot: the end of the list of free ones.
const NO_SLOT: u16 = u16::MAX;

/// All slots of a lane: one per entry of its ring.
pub(super) struct Slots {
    slots: Vec<Slot>,
    /// The first free slot, from which the others are linked.
    free: u16,
    /// The first free slot at the last [`Slots::mark`].
    marked: u16,
    /// Slots that are not free.
    taken: u32,
}

impl Slots {
    /// `size` free slots.
    pub(super) fn new(size: u16) -> Slots {
        // A ring has 32768 entries at most: NO_SLOT names none.
        let next = |next| if next == size { NO_SLOT } else { next };
        let slots = (1..=size).map(|number| Slot { link: next(number), ..Slot::default() }).collect();
        Slots { slots, free: 0, marked: 0, taken: 0 }
    }

    /// Slots that are not free.
    #[inline]
    pub(super) fn taken(&self) -> usize {
        self.taken as usize
    }

    #[inline(always)]
    pub(super) fn all_taken(&self) -> bool {
        self.free == NO_SLOT
    }

    /// The first free slot, to be filled before it is known whether it is needed; `None`: there is none.
    #[inline(always)]
    pub(super) fn reserve(&mut self) -> Option<Reserved<'_>> {
        let Slots { slots, free, taken, .. } = self;
        Some(Reserved { slot: slots.get_mut(usize::from(*free))?, free, taken })
    }

    /// Frees a slot in the state [`SlotState::Simple`] and gives what was in it. `None`: there is no such slot, or it is in another
    /// state and stays so.
    #[inline(always)]
    pub(super) fn answer(&mut self, number: u16) -> Option<Answer> {
        self.free_if(number, UsedLength::is_simple)
    }

    /// Frees a slot that holds a request, in the state [`SlotState::Simple`] or [`SlotState::Detailed`].
    pub(super) fn free_held(&mut self, number: u16) {
        self.free_if(number, UsedLength::is_held);
    }

    #[inline(always)]
    fn free_if(&mut self, number: u16, right: impl Fn(UsedLength) -> bool) -> Option<Answer> {
        let slot = self.slots.get_mut(usize::from(number))?;
        let Slot { status, head, used, .. } = *slot;
        if !right(used) {
            return None;
        }
        slot.used = UsedLength::NONE;
        slot.link = self.free;
        self.free = number;
        self.taken -= 1;
        Some(Answer { status, head, written: used.bytes() })
    }

    /// Frees a slot in the state [`SlotState::Bounced`] or [`SlotState::Orphaned`].
    pub(super) fn free_empty(&mut self, number: u16) {
        if let Some(slot) = self.slots.get_mut(usize::from(number)) {
            *slot = Slot { link: self.free, ..Slot::default() };
            self.free = number;
            self.taken -= 1;
        }
    }

    /// [`Slots::freed`] counts from now on.
    #[inline(always)]
    pub(super) fn mark(&mut self) {
        self.marked = self.free;
    }

    /// The slots that were freed since [`Slots::mark`], as they were, if none was taken since.
    pub(super) fn freed(&self) -> impl Iterator<Item = (u16, &Slot)> {
        let at = |number: u16| Some((number, self.slots.get(usize::from(number))?));
        let free = std::iter::successors(at(self.free), move |(_, slot)| at(slot.link));
        // Had any been taken, the mark might not be met.
        free.take_while(|(number, _)| *number != self.marked).take(self.slots.len())
    }

    /// The slots that hold a request, from this number on, and of `most` slots at most; and the number after the last one looked at.
    pub(super) fn held(&self, from: u16, most: usize) -> (impl Iterator<Item = (u16, &Slot)>, usize) {
        let slots = self.slots.get(usize::from(from)..).unwrap_or_default();
        let slots = &slots[..slots.len().min(most)];
        let end = usize::from(from) + slots.len();
        ((from..).zip(slots).filter(|(_, slot)| slot.used.is_held()), end)
    }

    /// Is this the number after the last slot?
    pub(super) fn is_end(&self, number: usize) -> bool {
        number >= self.slots.len()
    }

    /// A slot that holds a request.
    pub(super) fn held_mut(&mut self, number: u16) -> Option<&mut Slot> {
        self.slots.get_mut(usize::from(number)).filter(|slot| slot.used.is_held())
    }

    /// The record of a request whose slot is in any state but [`SlotState::Free`].
    pub(super) fn record_mut(&mut self, number: u16) -> Option<&mut Record> {
        self.slots.get_mut(usize::from(number)).map(|slot| &mut slot.record)
    }

    /// The state of the slot with this number; `None`: there is no such slot.
    pub(super) fn state(&self, number: u16) -> Option<SlotState> {
        self.slots.get(usize::from(number)).map(Slot::state)
    }

    /// The index among the bounced requests of the one with this slot. `None`: it is not copied.
    pub(super) fn bounced(&self, number: u16) -> Option<u16> {
        match self.state(number)? {
            SlotState::Bounced(index) => Some(index),
            _ => None,
        }
    }

    /// The request with this slot is copied, and is at this index of the bounced ones.
    pub(super) fn set_bounced(&mut self, number: u16, index: u16) {
        if let Some(slot) = self.slots.get_mut(usize::from(number)) {
            (slot.used, slot.unheld, slot.link) = (UsedLength::NONE, Unheld::Bounced, index);
        }
    }

    /// No request that has a slot to itself is to be answered.
    pub(super) fn orphan_all(&mut self) {
        for slot in self.slots.iter_mut().filter(|slot| slot.used.is_held()) {
            (slot.used, slot.unheld) = (UsedLength::NONE, Unheld::Orphaned);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes a slot for a request; its number.
    fn take(slots: &mut Slots, used: UsedLength) -> u16 {
        let mut slot = slots.reserve().expect("a free slot");
        let number = slot.number();
        slot.fill(0, used, Record::default());
        slot.take(Head::default());
        number
    }

    #[test]
    fn a_slot_says_what_state_it_is_in() {
        // The largest numbers there are, which its words have to tell from all else.
        let mut slots = Slots::new(1 << 15);
        let (simple, detailed) = (take(&mut slots, UsedLength::simple(1)), take(&mut slots, UsedLength::detailed()));
        let bounced = take(&mut slots, UsedLength::NONE);
        slots.set_bounced(bounced, (1 << 15) - 1);
        assert_eq!(slots.state(simple), Some(SlotState::Simple));
        assert_eq!(slots.state(detailed), Some(SlotState::Detailed));
        assert_eq!(slots.state(bounced), Some(SlotState::Bounced((1 << 15) - 1)));
        assert_eq!(slots.state((1 << 15) - 1), Some(SlotState::Free), "the last of the list");
        assert_eq!((slots.state(3), slots.state(1 << 15)), (Some(SlotState::Free), None));
        // The fast path answers its own only.
        assert!(slots.answer(detailed).is_none() && slots.answer(bounced).is_none() && slots.answer(3).is_none());
        assert_eq!(slots.answer(simple).map(|answer| answer.written), Some(1));
        assert_eq!((slots.state(simple), slots.taken()), (Some(SlotState::Free), 2));
        slots.orphan_all();
        assert_eq!((slots.state(detailed), slots.bounced(detailed)), (Some(SlotState::Orphaned), None));
        assert_eq!(slots.bounced(bounced), Some((1 << 15) - 1), "it ends when the drive has answered its piece");
        // What is answered slowly may be simple, too: one that has waited to be issued again.
        let again = take(&mut slots, UsedLength::simple(5));
        slots.free_held(again);
        slots.free_empty(bounced);
        slots.free_empty(detailed);
        assert_eq!(slots.taken(), 0);
        let all: Vec<u16> = (0..1 << 15).map(|_| take(&mut slots, UsedLength::simple(1))).collect();
        assert!(slots.all_taken() && all.iter().all(|slot| slots.state(*slot) == Some(SlotState::Simple)));
    }
}
