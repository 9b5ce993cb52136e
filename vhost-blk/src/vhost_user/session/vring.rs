//! What a front-end has said about one ring, and when that is enough to run it (vhost-user, "Starting and stopping rings").
//!
//! Only words are kept here: whether the ring runs, the session knows.

use std::fs::File;

use crate::event;

/// Where the front-end waits to be woken, or wakes us.
#[derive(Debug, Default)]
pub(super) enum Notifier {
    /// Nothing was said yet.
    #[default]
    Unset,
    /// There is no descriptor: the other side polls.
    Polled,
    /// An eventfd.
    Event(File),
}

impl Notifier {
    /// A second handle on the eventfd, if there is one.
    pub(super) fn try_clone(&self) -> std::io::Result<Option<File>> {
        match self {
            Notifier::Event(file) => file.try_clone().map(Some),
            Notifier::Unset | Notifier::Polled => Ok(None),
        }
    }
}

impl From<Option<File>> for Notifier {
    fn from(file: Option<File>) -> Self {
        file.map_or(Notifier::Polled, Notifier::Event)
    }
}

/// Front-end virtual addresses of a ring's three parts (SET_VRING_ADDR).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Addresses {
    /// Descriptor table, or the packed descriptor ring.
    pub descriptors: u64,
    /// Available ring, or the packed driver area.
    pub driver: u64,
    /// Used ring, or the packed device area.
    pub device: u64,
}

/// One ring as its front-end has described it so far. Whether it runs is told elsewhere; what it waits for, here.
#[derive(Debug, Default)]
pub(super) struct RingState {
    /// Entries; 0: not told yet.
    pub size: u16,
    /// Where it lies.
    pub addresses: Option<Addresses>,
    /// Where to go on: SET_VRING_BASE, or where the ring stopped.
    pub base: u32,
    /// How the front-end says that there is work. A ring is started from the moment this is set until GET_VRING_BASE.
    pub kick: Notifier,
    /// How we say that work is done.
    pub call: Notifier,
    /// How we say that the ring is broken.
    pub error: Notifier,
    /// SET_VRING_ENABLE, or without protocol features from the start.
    pub enabled: bool,
    /// It was reported that the ring waits for memory.
    pub told_waiting: bool,
    /// The ring could not be started as described; nothing more happens until something about it changes.
    pub failed: bool,
    /// The guest broke the ring while it ran; nothing more happens until it is stopped or reset.
    pub broken: bool,
}

impl RingState {
    /// The front-end wants the ring processed and has told everything needed for it, in whatever order.
    pub(super) fn wanted(&self) -> Option<Addresses> {
        let started = !matches!(self.kick, Notifier::Unset);
        self.addresses.filter(|_| started && self.enabled && self.size != 0 && !self.failed && !self.broken)
    }

    /// The front-end has not started it, or it could not be.
    pub(super) fn rests(&self) -> bool {
        matches!(self.kick, Notifier::Unset) || self.failed
    }

    /// Something changed: another attempt to start it is worth while, and worth a word if it fails.
    pub(super) fn changed(&mut self) {
        self.failed = false;
        self.told_waiting = false;
    }

    /// Tells the front-end that the ring is broken, if it wants to know.
    pub(super) fn fail(&mut self) {
        self.failed = true;
        if let Notifier::Event(event) = &self.error {
            event::signal(event);
        }
    }

    /// The ring stops and keeps `base` (GET_VRING_BASE): it starts again with a new kick descriptor only.
    pub(super) fn stop(&mut self, base: u32) {
        self.base = base;
        self.kick = Notifier::Unset;
        self.broken = false;
    }

    /// Back to the beginning (RESET_DEVICE); the descriptors to signal on are the front-end's business and stay.
    pub(super) fn reset(&mut self, enabled: bool) {
        let (call, error) = (std::mem::take(&mut self.call), std::mem::take(&mut self.error));
        *self = RingState { call, error, enabled, ..RingState::default() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDRESSES: Addresses = Addresses { descriptors: 0x1000, driver: 0x2000, device: 0x3000 };

    fn steps() -> [fn(&mut RingState); 4] {
        [
            |ring| ring.size = 256,
            |ring| ring.addresses = Some(ADDRESSES),
            |ring| ring.kick = Notifier::Polled,
            |ring| ring.enabled = true,
        ]
    }

    #[test]
    fn any_order_will_do_and_every_step_is_needed() {
        // All 24 orders of the four steps.
        let mut orders = vec![vec![]];
        for _ in 0..4 {
            orders = orders
                .into_iter()
                .flat_map(|order: Vec<usize>| {
                    (0..4)
                        .filter(|next| !order.contains(next))
                        .map(|next| [&order[..], &[next]].concat())
                        .collect::<Vec<_>>()
                })
                .collect();
        }
        assert_eq!(orders.len(), 24);
        for order in orders {
            let mut ring = RingState::default();
            for step in &order {
                assert_eq!(ring.wanted(), None, "{order:?} before step {step}");
                steps()[*step](&mut ring);
            }
            assert_eq!(ring.wanted(), Some(ADDRESSES), "{order:?}");
        }
    }

    #[test]
    fn a_stopped_ring_needs_a_new_kick() {
        let mut ring = RingState::default();
        steps().iter().for_each(|step| step(&mut ring));
        ring.broken = true;
        assert_eq!(ring.wanted(), None);
        ring.changed();
        assert_eq!(ring.wanted(), None, "broken for good");
        ring.stop(77);
        assert_eq!((ring.base, ring.wanted()), (77, None));
        ring.kick = Notifier::Polled;
        assert_eq!(ring.wanted(), Some(ADDRESSES), "the rest is still known");
    }

    #[test]
    fn a_failed_ring_rests_until_something_changes() {
        let mut ring = RingState::default();
        steps().iter().for_each(|step| step(&mut ring));
        let event = File::from(rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap());
        ring.error = Notifier::Event(event.try_clone().unwrap());
        ring.fail();
        assert_eq!(ring.wanted(), None);
        let mut count = [0; 8];
        std::io::Read::read_exact(&mut &event, &mut count).expect("the front-end is told");
        assert_eq!(u64::from_ne_bytes(count), 1);
        ring.changed();
        assert_eq!(ring.wanted(), Some(ADDRESSES));
    }

    #[test]
    fn a_reset_forgets_all_but_the_signals() {
        let mut ring = RingState { call: Notifier::Polled, ..RingState::default() };
        steps().iter().for_each(|step| step(&mut ring));
        ring.base = 5;
        ring.reset(false);
        assert!(matches!(ring.call, Notifier::Polled) && matches!(ring.kick, Notifier::Unset));
        assert_eq!((ring.base, ring.size, ring.addresses, ring.enabled), (0, 0, None, false));
    }
}
