//! What a lane keeps of each request the drive works on.

use super::again::Kept;
use crate::ring::Head;

/// What is needed to answer a request.
#[derive(Clone, Copy, Default)]
pub(super) struct Slot {
    /// Guest address of the status byte; of a free slot, the next free one.
    pub status: u64,
    /// The chain.
    pub head: Head,
    /// Length for the used element, see [`crate::request::Request::written`]; at least 1. With [`Slot::LONG`] it is not as usual
    /// and stands elsewhere. 0: the slot is free, or its request is among the bounced ones or the orphans.
    pub written: u32,
    /// What to ask the drive again, should it not answer.
    pub kept: Kept,
}

impl Slot {
    /// A bit of `written`: the answer takes more than usual.
    pub const LONG: u32 = 1 << 31;
}

/// No slot: the end of the list of free ones.
const NO_SLOT: u16 = u16::MAX;

/// All slots of a lane: one per entry of its ring.
pub(super) struct Slots {
    slots: Vec<Slot>,
    /// The first free slot, from which the others are linked.
    free: u16,
    /// Slots that are not free.
    taken: u32,
}

impl Slots {
    /// `size` free slots.
    pub fn new(size: u16) -> Slots {
        // A ring has 32768 entries at most: NO_SLOT names none.
        let next = |next| if next == size { NO_SLOT } else { next };
        let slots = (1..=size).map(|number| Slot { status: next(number).into(), ..Slot::default() }).collect();
        Slots { slots, free: 0, taken: 0 }
    }

    /// Slots that are not free.
    #[inline]
    pub fn taken(&self) -> usize {
        self.taken as usize
    }

    #[inline(always)]
    pub fn all_taken(&self) -> bool {
        self.free == NO_SLOT
    }

    /// The number of the slot that [`Slots::take`] takes.
    #[inline(always)]
    pub fn next(&self) -> u16 {
        self.free
    }

    /// Puts something into the first free slot; there has to be one. Returns its number.
    #[inline(always)]
    pub fn take(&mut self, slot: Slot) -> u16 {
        let number = self.free;
        if let Some(entry) = self.slots.get_mut(usize::from(number)) {
            self.free = entry.status as u16;
            self.taken += 1;
            *entry = slot;
        }
        number
    }

    /// Frees a slot that is taken and gives what was in it. `None`: there is no such slot, or its `written` is 0 or has
    /// [`Slot::LONG`], and the slot stays as it is.
    #[inline(always)]
    pub fn answer(&mut self, number: u16) -> Option<Slot> {
        self.answer_if(number, |written| written as i32 > 0)
    }

    /// The same; `None` only if `written` is 0, or there is no such slot.
    pub fn answer_any(&mut self, number: u16) -> Option<Slot> {
        self.answer_if(number, |written| written != 0)
    }

    #[inline(always)]
    fn answer_if(&mut self, number: u16, right: impl Fn(u32) -> bool) -> Option<Slot> {
        let entry = self.slots.get_mut(usize::from(number))?;
        let slot = *entry;
        if !right(slot.written) {
            return None;
        }
        entry.written = 0;
        entry.status = self.free.into();
        self.free = number;
        self.taken -= 1;
        Some(slot)
    }

    /// Frees a slot whose `written` is 0 but which is taken.
    pub fn free(&mut self, number: u16) {
        if let Some(entry) = self.slots.get_mut(usize::from(number)) {
            *entry = Slot { status: self.free.into(), ..Slot::default() };
            self.free = number;
            self.taken -= 1;
        }
    }

    /// A slot that [`Slots::answer_any`] would free.
    pub fn get_mut(&mut self, number: u16) -> Option<&mut Slot> {
        self.slots.get_mut(usize::from(number)).filter(|slot| slot.written != 0)
    }

    /// Sets `written` to 0 where it is not; gives these slots' numbers.
    pub fn orphan_all(&mut self) -> impl Iterator<Item = u16> + '_ {
        (0..)
            .zip(&mut self.slots)
            .filter_map(|(number, slot)| (std::mem::take(&mut slot.written) != 0).then_some(number))
    }
}
