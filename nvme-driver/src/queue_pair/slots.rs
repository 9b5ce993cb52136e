//! Command slots: what is known about each command the controller has.

/// The identifier of a command: the slot in the low bits, a sequence in the rest.
///
/// The sequence makes the answer to an earlier command of the same slot recognisable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommandId(pub u16);

/// A command belongs to no request of several commands.
pub(crate) const NO_REQUEST: u16 = u16::MAX;

/// Set in `Slot::expected` while the slot is free; a completion has no such bit.
const FREE: u64 = 1 << 32;

/// One slot; 32 bytes, so that two share a cache line and none crosses one.
#[derive(Clone, Copy)]
struct Slot {
    /// The caller's token.
    token: u64,
    /// Bits 63:32 and 31:16 of a completion's second word that answer this command: command identifier and queue identifier.
    expected: u64,
    /// The check during which the command was first seen; 0: not yet.
    seen: u32,
    /// The command identifier in use, or to be used next.
    id: u16,
    /// The request the command is part of, or [`NO_REQUEST`].
    request: u16,
    /// The command has been reported as too old.
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
    /// Free slots; the one used last comes first, as its list page is likeliest in the cache.
    free: Vec<u16>,
    /// Bits of the slot in a command identifier.
    mask: u16,
    queue: u16,
}

impl Slots {
    /// Most slots a queue pair can have: at least four bits of sequence remain.
    pub const MAX: u16 = 4095;

    /// `count` free slots (1 to [`Slots::MAX`]) of submission queue `queue`.
    pub fn new(count: u16, queue: u16) -> Slots {
        let count = count.clamp(1, Slots::MAX);
        // One more than needed where it matters: the identifier FFFFh, which the error log uses for "no command", is never made.
        let bits = u16::BITS - count.leading_zeros();
        let free_slot = |id| Slot { token: 0, expected: FREE, seen: 0, id, request: NO_REQUEST, reported: false };
        Slots {
            slots: (0..count).map(free_slot).collect(),
            free: (0..count).rev().collect(),
            mask: (1 << bits) - 1,
            queue,
        }
    }

    /// Number of slots.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Free slots.
    #[inline]
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// The slot that [`Slots::take`] will take.
    #[inline]
    pub fn next(&self) -> Option<u16> {
        self.free.last().copied()
    }

    /// Takes a slot for a command; `None` if there is none.
    #[inline]
    pub fn take(&mut self, token: u64, request: u16) -> Option<CommandId> {
        let at = self.free.pop()?;
        let slot = self.slots.get_mut(usize::from(at))?;
        slot.token = token;
        slot.expected = u64::from(slot.id) << 16 | u64::from(self.queue);
        slot.seen = 0;
        slot.request = request;
        Some(CommandId(slot.id))
    }

    /// Frees the slot of the command that a completion answers, given bits 47:16 of its second word (command identifier and
    /// submission queue identifier). `None`: no such command is out, the completion answers nothing.
    #[inline]
    pub fn release(&mut self, answered: u32) -> Option<Released> {
        let at = (answered >> 16) as u16 & self.mask;
        let slot = self.slots.get_mut(usize::from(at))?;
        if slot.expected != u64::from(answered) {
            return None;
        }
        slot.expected = FREE;
        // The next user of the slot has another sequence; it wraps by itself in the high bits.
        slot.id = slot.id.wrapping_add(self.mask + 1);
        let released = Released { token: slot.token, request: slot.request };
        self.free.push(at);
        Some(released)
    }

    /// Looks at every command: those older than `limit` are reported, once each. `now` counts in the unit of `limit` and is
    /// not 0. A command's age counts from the first look at it: it is reported at most one interval late, never early.
    pub fn look(&mut self, now: u32, limit: u32, mut old: impl FnMut(Released)) {
        for slot in self.slots.iter_mut().filter(|slot| slot.expected != FREE) {
            if slot.seen == 0 {
                slot.seen = now;
                slot.reported = false;
            } else if !slot.reported && now.wrapping_sub(slot.seen) >= limit {
                slot.reported = true;
                old(Released { token: slot.token, request: slot.request });
            }
        }
    }

    /// When the command that has been out longest was first looked at, if any has been.
    pub fn oldest(&self, now: u32) -> Option<u32> {
        let out = self.slots.iter().filter(|slot| slot.expected != FREE && slot.seen != 0);
        out.map(|slot| now.wrapping_sub(slot.seen)).max()
    }

    /// Frees every slot, telling what each command was. Their memory must be out of the controller's reach.
    pub fn release_all(&mut self, mut each: impl FnMut(Released)) {
        for at in 0..self.slots.len() {
            let slot = &self.slots[at];
            if slot.expected != FREE {
                let answered = slot.expected as u32;
                if let Some(released) = self.release(answered) {
                    each(released);
                }
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

    #[test]
    fn identifiers_are_unique_and_never_ffff() {
        for count in [1, 2, 3, 127, 128, 255, 256, 1023, 4095] {
            let mut slots = Slots::new(count, 3);
            assert_eq!(slots.len(), usize::from(count));
            // Long enough for every sequence to wrap.
            for _ in 0..(1 << 16) / usize::from(count) + 2 {
                let mut ids: Vec<CommandId> = std::iter::from_fn(|| slots.take(0, NO_REQUEST)).collect();
                assert_eq!(ids.len(), usize::from(count));
                assert_eq!(slots.free(), 0);
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
        let first = slots.take(11, NO_REQUEST).unwrap();
        assert_eq!(slots.release(answer(first, 4)), None, "another queue");
        assert_eq!(slots.release(answer(CommandId(first.0 + 1), 3)), None, "a free slot");
        assert_eq!(slots.release(answer(CommandId(first.0 | 7), 3)), None, "no such slot");
        assert_eq!(slots.release(answer(first, 3)), Some(Released { token: 11, request: NO_REQUEST }));
        assert_eq!(slots.release(answer(first, 3)), None, "the same again");
        let second = slots.take(12, 5).unwrap();
        assert_eq!(second.0 & 7, first.0 & 7, "the slot used last comes first");
        assert_eq!(slots.release(answer(first, 3)), None, "an old answer for a slot in use again");
        assert_eq!(slots.release(answer(second, 3)), Some(Released { token: 12, request: 5 }));
        assert_eq!(slots.free(), 7);
    }

    #[test]
    fn every_other_identifier_is_refused() {
        let mut slots = Slots::new(3, 1);
        let id = slots.take(1, NO_REQUEST).unwrap();
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
        let id = slots.take(1, NO_REQUEST).unwrap();
        let look = |slots: &mut Slots, now| {
            let mut old: Vec<u64> = Vec::new();
            slots.look(now, 10, |command| old.push(command.token));
            old
        };
        assert_eq!(look(&mut slots, 100), none, "first seen");
        slots.take(2, NO_REQUEST).unwrap();
        assert_eq!(look(&mut slots, 109), none);
        assert_eq!(slots.oldest(109), Some(9));
        assert_eq!(look(&mut slots, 110), [1]);
        assert_eq!(look(&mut slots, 111), none, "once");
        assert_eq!(look(&mut slots, 119), [2]);
        assert_eq!(slots.free(), 1, "reported, not freed");
        slots.release(answer(id, 1)).unwrap();
        slots.take(3, NO_REQUEST).unwrap();
        assert_eq!(look(&mut slots, 500), none, "the slot's new command is young");
        assert_eq!(look(&mut slots, 510), [3]);
        let mut all = Vec::new();
        slots.release_all(|command| all.push(command.token));
        all.sort();
        assert_eq!(all, [2, 3]);
        assert_eq!(slots.free(), 3);
        assert_eq!(slots.oldest(510), None);
    }
}
