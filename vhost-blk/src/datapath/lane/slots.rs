//! What a lane keeps of each request the drive works on.

use super::record::Record;
use crate::virtio::ring::Head;

/// What is needed to answer a request.
#[derive(Clone, Copy, Default)]
pub(super) struct Slot {
    /// Guest address of the status byte.
    pub status: u64,
    /// The chain.
    pub head: Head,
    /// Length for the used element, see [`crate::blk::request::Request::written`]; at least 1. With [`Slot::LONG`] it is not as usual
    /// and stands elsewhere. 0: the slot is free, or its request is among the bounced ones or the orphans.
    pub written: u32,
    /// Of a free slot: the next free one. Of a slot that is taken while its `written` is 0: see [`Slots::elsewhere`].
    next: u16,
    /// What to ask the drive again, should it not answer.
    pub record: Record,
}

impl Slot {
    /// A bit of `written`: the answer takes more than usual.
    pub(super) const LONG: u32 = 1 << 31;

    /// See [`Slots::elsewhere`]. A ring has 32768 entries at most: no slot's number, nor a place among as many.
    pub(super) const ORPHAN: u16 = u16::MAX - 1;
}

/// What is needed to answer a request: see [`Slot`].
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
    /// Its number.
    #[inline(always)]
    pub(super) fn number(&self) -> u16 {
        *self.free
    }

    /// Puts everything there but the chain.
    #[inline(always)]
    pub(super) fn fill(&mut self, status: u64, written: u32, kept: Record) {
        self.slot.status = status;
        self.slot.written = written;
        self.slot.record = kept;
    }

    /// It stays free.
    pub(super) fn release(self) {
        self.slot.written = 0;
    }

    /// It is taken by the request with this chain.
    #[inline(always)]
    pub(super) fn take(self, head: Head) {
        *self.free = self.slot.next;
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
        let slots = (1..=size).map(|number| Slot { next: next(number), ..Slot::default() }).collect();
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

    /// Frees a slot that is taken and gives what was in it. `None`: there is no such slot, or its `written` is 0 or has
    /// [`Slot::LONG`], and the slot stays as it is.
    #[inline(always)]
    pub(super) fn answer(&mut self, number: u16) -> Option<Answer> {
        self.answer_if(number, |written| written as i32 > 0)
    }

    /// The same; `None` only if `written` is 0, or there is no such slot.
    pub(super) fn answer_any(&mut self, number: u16) -> Option<Answer> {
        self.answer_if(number, |written| written != 0)
    }

    #[inline(always)]
    fn answer_if(&mut self, number: u16, right: impl Fn(u32) -> bool) -> Option<Answer> {
        let slot = self.slots.get_mut(usize::from(number))?;
        let Slot { status, head, written, .. } = *slot;
        if !right(written) {
            return None;
        }
        slot.written = 0;
        slot.next = self.free;
        self.free = number;
        self.taken -= 1;
        Some(Answer { status, head, written })
    }

    /// Frees a slot whose `written` is 0 but which is taken.
    pub(super) fn free(&mut self, number: u16) {
        if let Some(slot) = self.slots.get_mut(usize::from(number)) {
            *slot = Slot { next: self.free, ..Slot::default() };
            self.free = number;
            self.taken -= 1;
        }
    }

    /// From now on [`Slots::freed`] is asked.
    #[inline(always)]
    pub(super) fn mark(&mut self) {
        self.marked = self.free;
    }

    /// The slots that were freed since [`Slots::mark`], as they were, if none was taken since.
    pub(super) fn freed(&self) -> impl Iterator<Item = (u16, &Slot)> {
        let at = |number: u16| Some((number, self.slots.get(usize::from(number))?));
        let free = std::iter::successors(at(self.free), move |(_, slot)| at(slot.next));
        // Had any been taken, the mark might not be met.
        free.take_while(|(number, _)| *number != self.marked).take(self.slots.len())
    }

    /// The slots that [`Slots::answer_any`] would free, from this number on, and `most` slots at most: those that are, and the
    /// number after the last one looked at.
    pub(super) fn waiting(&self, from: u16, most: usize) -> (impl Iterator<Item = (u16, &Slot)>, usize) {
        let slots = self.slots.get(usize::from(from)..).unwrap_or_default();
        let slots = &slots[..slots.len().min(most)];
        let end = usize::from(from) + slots.len();
        ((from..).zip(slots).filter(|(_, slot)| slot.written != 0), end)
    }

    /// Is it the number after the last slot?
    pub(super) fn is_end(&self, number: usize) -> bool {
        number >= self.slots.len()
    }

    /// A slot that [`Slots::answer_any`] would free.
    pub(super) fn get_mut(&mut self, number: u16) -> Option<&mut Slot> {
        self.slots.get_mut(usize::from(number)).filter(|slot| slot.written != 0)
    }

    /// What is kept of the request in a slot that is taken, whatever its `written`.
    pub(super) fn record_mut(&mut self, number: u16) -> Option<&mut Record> {
        self.slots.get_mut(usize::from(number)).map(|slot| &mut slot.record)
    }

    /// Where else the request is whose slot is taken and has a `written` of 0: its place among the bounced ones, or
    /// [`Slot::ORPHAN`]. `None`: the slot is not like that.
    pub(super) fn elsewhere(&self, number: u16) -> Option<u16> {
        self.slots.get(usize::from(number)).filter(|slot| slot.written == 0).map(|slot| slot.next)
    }

    /// Says where the request is whose slot has a `written` of 0.
    pub(super) fn set_elsewhere(&mut self, number: u16, place: u16) {
        if let Some(slot) = self.slots.get_mut(usize::from(number)) {
            slot.next = place;
        }
    }

    /// Nobody is to be given an answer in any slot that has a `written`.
    pub(super) fn orphan_all(&mut self) {
        for slot in self.slots.iter_mut().filter(|slot| slot.written != 0) {
            (slot.written, slot.next) = (0, Slot::ORPHAN);
        }
    }
}
