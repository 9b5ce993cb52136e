//! Command slots: what is known about each command the controller has.

/// The identifier of a command: the slot in the low bits, a sequence in the rest.
///
/// The sequence makes the answer to an earlier command of the same slot recognisable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommandId(pub u16);

/// A command belongs to no request of several commands.
pub(crate) const NO_REQUEST: u16 = u16::MAX;

/// The difference between the key of a slot that is taken and of one that is free.
const FREE: u32 = 1 << 16;

/// In `Slot::next_free` of a slot that is taken: the command has been looked at. No slot has this number.
const LOOKED_AT: u16 = u16::MAX;

/// One slot: what the hot path touches. 16 bytes, so that four share a cache line.
#[derive(Clone, Copy)]
#[repr(align(16))]
struct Slot {
    /// The caller's token.
    token: u64,
    /// What bits 47:16 of a completion's second word have to be to answer the command: command identifier (31:16 here) and
    /// queue identifier (15:0). While the slot is free: the same of its next command with [`FREE`] flipped. That is the lowest
    /// bit of the slot's number, so no completion that is looked up in this slot can have it.
    key: u32,
    /// The free slot after this one, while it is free itself.
    next_free: u16,
    /// The request the command is part of; [`NO_REQUEST`] if it is none's, and while the slot is free.
    request: u16,
}

const _: () = assert!(size_of::<Slot>() == 16);

impl Slot {
    fn is_taken(&self, at: usize, mask: u16) -> bool {
        (self.key >> 16) as u16 & mask == at as u16
    }
}

/// How old a command is; touched by looks only.
#[derive(Clone, Copy, Default)]
struct Age {
    /// When the command was first looked at.
    seen: u64,
    /// It has been reported as too old.
    reported: bool,
}

/// What was kept about a command that has completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Released {
    pub token: u64,
    pub request: u16,
}

/// All slots of a queue pair.
pub(crate) struct Slots {
    slots: Box<[Slot]>,
    /// The first free slot; `slots.len()` when there is none. The one used last comes first, as its list page is likeliest in
    /// the cache.
    first_free: u16,
    /// Bits of the slot in a command identifier.
    mask: u16,
    /// One step of the sequence, as a key has it.
    step: u32,
    ages: Box<[Age]>,
}

impl Slots {
    /// Most slots a queue pair can have: at least four bits of sequence remain.
    pub(super) const MAX: u16 = 4095;

    /// `count` free slots (1 to [`Slots::MAX`]) of submission queue `queue`.
    pub(super) fn new(count: u16, queue: u16) -> Slots {
        let count = count.clamp(1, Slots::MAX);
        // One bit more than needed where it matters: the identifier FFFFh, "no command" in the error log, is never made.
        let bits = u16::BITS - count.leading_zeros();
        let slot = |at: u16| Slot {
            token: 0,
            key: (u32::from(at) << 16 | u32::from(queue)) ^ FREE,
            next_free: at + 1,
            request: NO_REQUEST,
        };
        Slots {
            slots: (0..count).map(slot).collect(),
            first_free: 0,
            mask: (1 << bits) - 1,
            step: 1 << (16 + bits),
            ages: vec![Age::default(); count.into()].into_boxed_slice(),
        }
    }

    /// Number of slots.
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    /// The slot that [`Slots::take`] will take; `None` if all are taken.
    #[inline]
    pub(super) fn next(&self) -> Option<u16> {
        Some(self.first_free).filter(|&at| usize::from(at) < self.slots.len())
    }

    /// Takes a slot for a command that belongs to no request; `None` if there is none.
    #[inline(always)]
    pub(super) fn take(&mut self, token: u64) -> Option<CommandId> {
        let slot = self.slots.get_mut(usize::from(self.first_free))?;
        self.first_free = slot.next_free;
        slot.token = token;
        slot.key ^= FREE;
        Some(CommandId((slot.key >> 16) as u16))
    }

    /// Makes a command that was just taken part of a request.
    pub(super) fn assign(&mut self, id: CommandId, request: u16) {
        if let Some(slot) = self.slots.get_mut(usize::from(id.0 & self.mask)) {
            slot.request = request;
        }
    }

    /// Frees the slot of the command that a completion answers, given bits 47:16 of its second word (command identifier and
    /// submission queue identifier). `None`: no such command is out, the completion answers nothing.
    #[inline(always)]
    pub(super) fn release(&mut self, answered: u32) -> Option<Released> {
        let at = (answered >> 16) as u16 & self.mask;
        let slot = self.slots.get_mut(usize::from(at))?;
        if slot.key != answered {
            return None;
        }
        // The slot's next command has another sequence; it wraps by itself in the high bits.
        slot.key = answered.wrapping_add(self.step) ^ FREE;
        slot.next_free = self.first_free;
        self.first_free = at;
        let released = Released { token: slot.token, request: slot.request };
        if released.request != NO_REQUEST {
            slot.request = NO_REQUEST;
        }
        Some(released)
    }

    /// Looks at every command: those older than `limit` are reported, once each. `now` counts in the unit of `limit`. A
    /// command's age counts from the first look at it: it is reported at most one interval late, never early.
    pub(super) fn look(&mut self, now: u64, limit: u64, mut old: impl FnMut(Released)) {
        for (at, (slot, age)) in self.slots.iter_mut().zip(&mut self.ages).enumerate() {
            if !slot.is_taken(at, self.mask) {
                continue;
            }
            // A slot's link is free for this mark while the slot is taken; taking the next command's slot needs no store so.
            if slot.next_free != LOOKED_AT {
                slot.next_free = LOOKED_AT;
                *age = Age { seen: now, reported: false };
            } else if !age.reported && now.saturating_sub(age.seen) >= limit {
                age.reported = true;
                old(Released { token: slot.token, request: slot.request });
            }
        }
    }

    /// How long the command that has been out longest has been so since the first look at it, if any was looked at.
    pub(super) fn oldest(&self, now: u64) -> Option<u64> {
        let all = self.slots.iter().zip(&self.ages).enumerate();
        let looked_at = all.filter(|(at, (slot, _))| slot.is_taken(*at, self.mask) && slot.next_free == LOOKED_AT);
        looked_at.map(|(_, (_, age))| now.saturating_sub(age.seen)).max()
    }

    /// Frees every slot, telling what each command was. Their memory must be out of the controller's reach.
    pub(super) fn release_all(&mut self, mut each: impl FnMut(Released)) {
        for at in 0..self.slots.len() {
            let slot = &self.slots[at];
            if slot.is_taken(at, self.mask)
                && let Some(released) = self.release(slot.key)
            {
                each(released);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(id: CommandId, queue: u16) -> u32 {
        u32::from(id.0) << 16 | u32::from(queue)
    }

    /// Takes all that are free.
    fn free(slots: &mut Slots) -> usize {
        std::iter::from_fn(|| slots.take(0)).count()
    }

    #[test]
    fn identifiers_are_unique_and_never_ffff() {
        for count in [1, 2, 3, 127, 128, 255, 256, 1023, 4095] {
            let mut slots = Slots::new(count, 3);
            assert_eq!(slots.len(), usize::from(count));
            // Long enough for every sequence to wrap.
            for _ in 0..(1 << 16) / usize::from(count) + 2 {
                let mut ids: Vec<CommandId> = std::iter::from_fn(|| slots.take(0)).collect();
                assert_eq!(ids.len(), usize::from(count));
                assert_eq!(slots.next(), None);
                ids.iter().for_each(|&id| assert!(slots.release(answer(id, 3)).is_some()));
                ids.sort_by_key(|id| id.0);
                ids.dedup();
                assert_eq!(ids.len(), usize::from(count));
                assert!(ids.iter().all(|id| id.0 != 0xffff));
            }
        }
    }

    #[test]
    fn a_completion_frees_only_the_command_it_answers() {
        let mut slots = Slots::new(7, 3);
        let first = slots.take(11).unwrap();
        assert_eq!(slots.release(answer(first, 4)), None, "another queue");
        assert_eq!(slots.release(answer(CommandId(first.0 + 1), 3)), None, "a free slot");
        assert_eq!(slots.release(answer(CommandId(first.0 | 7), 3)), None, "no such slot");
        assert_eq!(slots.release(answer(first, 3)), Some(Released { token: 11, request: NO_REQUEST }));
        assert_eq!(slots.release(answer(first, 3)), None, "the same again");
        let second = slots.take(12).unwrap();
        slots.assign(second, 5);
        assert_eq!(second.0 & 7, first.0 & 7, "the slot used last comes first");
        assert_eq!(slots.release(answer(first, 3)), None, "an old answer for a slot in use again");
        assert_eq!(slots.release(answer(second, 3)), Some(Released { token: 12, request: 5 }));
        let third = slots.take(13).unwrap();
        let plain = Released { token: 13, request: NO_REQUEST };
        assert_eq!(slots.release(answer(third, 3)), Some(plain), "the next command is not part of that request");
        assert_eq!(free(&mut slots), 7);
    }

    #[test]
    fn every_other_identifier_is_refused() {
        let mut slots = Slots::new(3, 1);
        let id = slots.take(1).unwrap();
        for other in 0..=u16::MAX {
            if other != id.0 {
                assert_eq!(slots.release(answer(CommandId(other), 1)), None);
            }
        }
        for other in (0..=u16::MAX).filter(|&other| other != 1) {
            assert_eq!(slots.release(answer(id, other)), None);
        }
        assert!(slots.release(answer(id, 1)).is_some());
    }

    #[test]
    fn old_commands_are_reported_once_and_never_early() {
        let none: [u64; 0] = [];
        let mut slots = Slots::new(3, 1);
        let id = slots.take(1).unwrap();
        let look = |slots: &mut Slots, now| {
            let mut old: Vec<u64> = Vec::new();
            slots.look(now, 10, |command| old.push(command.token));
            old
        };
        assert_eq!(look(&mut slots, 100), none, "first seen");
        slots.take(2).unwrap();
        assert_eq!(look(&mut slots, 109), none);
        assert_eq!(slots.oldest(109), Some(9));
        assert_eq!(look(&mut slots, 110), [1]);
        assert_eq!(look(&mut slots, 111), none, "once");
        assert_eq!(look(&mut slots, 119), [2]);
        let third = slots.take(9).unwrap();
        assert_eq!(slots.next(), None, "reported, not freed");
        slots.release(answer(third, 1)).unwrap();
        slots.release(answer(id, 1)).unwrap();
        slots.take(3).unwrap();
        assert_eq!(look(&mut slots, 500), none, "the slot's new command is young");
        assert_eq!(look(&mut slots, 510), [3]);
        let mut all = Vec::new();
        slots.release_all(|command| all.push(command.token));
        all.sort();
        assert_eq!(all, [2, 3]);
        assert_eq!(slots.oldest(510), None);
        assert_eq!(free(&mut slots), 3);
    }
}
