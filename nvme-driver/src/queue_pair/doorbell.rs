//! Announcing a tail or head: by the doorbell register, or by its shadow in memory (Doorbell Buffer Config).

use std::sync::atomic::{AtomicU32, Ordering, fence};

use vfio::{DmaSlice, Doorbell};

/// The shadow of one doorbell in host memory, and where the controller says when it wants to be told (NVMe Base 2.0, 5.11 and
/// B.5).
///
/// Both slices have one element, at the doorbell's own offset in the shadow doorbell page and in the event index page.
pub(crate) struct ShadowDoorbell {
    pub value: DmaSlice<AtomicU32>,
    pub event: DmaSlice<AtomicU32>,
}

/// The shadows of a queue pair's two doorbells.
pub(crate) struct ShadowDoorbells {
    pub submission: ShadowDoorbell,
    pub completion: ShadowDoorbell,
}

/// One doorbell, with its shadow if the controller takes shadows.
pub(crate) struct QueueDoorbell {
    register: Doorbell,
    shadow: Option<ShadowDoorbell>,
}

impl QueueDoorbell {
    pub(super) fn new(register: Doorbell, shadow: Option<ShadowDoorbell>) -> QueueDoorbell {
        let doorbell = QueueDoorbell { register, shadow };
        doorbell.reset();
        doorbell
    }

    /// Announces `value`. Everything written to the queue before is visible to the controller first. True if the register
    /// was written.
    #[inline]
    pub(super) fn announce(&self, value: u16) -> bool {
        if let Some(shadow) = &self.shadow
            && let ([shadow], [event]) = (&*shadow.value, &*shadow.event)
            && !announce_in_memory(shadow, event, value)
        {
            return false;
        }
        self.register.ring(u32::from(value));
        true
    }

    /// The shadow of an empty queue.
    pub(super) fn reset(&self) {
        if let Some(shadow) = &self.shadow {
            for word in shadow.value.iter().chain(shadow.event.iter()) {
                // Relaxed: before the queue is created; the admin doorbell orders it.
                word.store(0, Ordering::Relaxed);
            }
        }
    }
}

/// Writes the shadow; true if the controller asked to be told by the register.
fn announce_in_memory(shadow: &AtomicU32, event: &AtomicU32, value: u16) -> bool {
    // Relaxed: only this thread writes it.
    let old = shadow.load(Ordering::Relaxed) as u16;
    // Release: pairs with the controller's Acquire of the shadow; it sees the entries written before. Shadows exist in software
    // controllers, so ordering between processors is what is needed.
    shadow.store(u32::from(value), Ordering::Release);
    // Pairs with the controller's fence between its write of the event index and its last look at the shadow: either we see
    // the new event index, or it sees the new value.
    fence(Ordering::SeqCst);
    passes(event.load(Ordering::Relaxed) as u16, old, value)
}

/// Does going from `old` to `new` pass the event index? (NVMe Base 2.0, B.5: the register is written when the event
/// index is in `old..new`, around the end of the queue.)
fn passes(event: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_register_is_written_exactly_when_the_event_index_is_passed() {
        for entries in [2u16, 3, 16, 31] {
            for old in 0..entries {
                for steps in 1..entries {
                    let new = (old + steps) % entries;
                    let passed: Vec<u16> = (0..steps).map(|step| (old + step) % entries).collect();
                    for event in 0..entries {
                        assert_eq!(passes(event, old, new), passed.contains(&event), "{entries} {old} {new} {event}");
                    }
                }
            }
        }
        assert!(!passes(7, 3, 3), "nothing new, nothing to tell");
    }

    /// Both sides write, then look: one of them has to see the other's. They do it at the same moment, again and again; without
    /// the fence neither sees the other in about one of a hundred times.
    #[test]
    fn one_of_the_two_sees_the_other() {
        use std::sync::atomic::{AtomicBool, AtomicUsize};
        use std::time::{Duration, Instant};
        const CELLS: usize = 64;
        /// In which both are there at once: where they share a processor, most are others.
        const ROUNDS: usize = 30_000;
        /// On a line of its own.
        #[repr(align(128))]
        #[derive(Default)]
        struct Alone<T>(T);
        #[derive(Default)]
        struct Cell {
            shadow: Alone<AtomicU32>,
            event: Alone<AtomicU32>,
            /// The controller has seen the new value.
            seen: Alone<AtomicBool>,
        }
        let cells: [Cell; CELLS] = std::array::from_fn(|_| Cell::default());
        let at = [const { Alone(AtomicU32::new(0)) }; 2];
        // The round that is none any more, once there is one.
        let over = AtomicUsize::new(0);
        // Rounds in which one had to wait for the other for long.
        let apart = AtomicUsize::new(0);
        // Waits until the other side is in this round, too.
        let meet = |me: usize, round: usize| {
            at[me].0.store(round as u32, Ordering::SeqCst);
            let mut looks = 0;
            while at[1 - me].0.load(Ordering::SeqCst) < round as u32 {
                looks += 1;
                if looks < 2000 { std::hint::spin_loop() } else { std::thread::yield_now() }
            }
            if looks >= 2000 {
                apart.fetch_add(1, Ordering::Relaxed);
            }
        };
        // Neither side is the first each time.
        let wait = |turns: usize| (0..turns).for_each(|_| std::hint::spin_loop());
        // The shadow goes from `new - 1` to `new`, which passes the event index that the controller writes, and not the one before.
        let new = |round: usize| (round / CELLS + 1) as u16;
        let (mut missed, mut rounds) = (0, 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 1.. {
                    meet(1, round);
                    if over.load(Ordering::SeqCst) == round {
                        return;
                    }
                    wait(round % 7 * 3);
                    let cell = &cells[round % CELLS];
                    cell.event.0.store(u32::from(new(round)) - 1, Ordering::Relaxed);
                    fence(Ordering::SeqCst);
                    let seen = cell.shadow.0.load(Ordering::Acquire) == u32::from(new(round));
                    cell.seen.0.store(seen, Ordering::Relaxed);
                }
            });
            let mut told = true;
            let begin = Instant::now();
            for round in 1.. {
                // A machine that is busy shows it in fewer rounds, or not at all.
                let end = round - apart.load(Ordering::Relaxed).min(round) > ROUNDS
                    || begin.elapsed() > Duration::from_secs(10);
                if end {
                    over.store(round, Ordering::SeqCst);
                }
                meet(0, round);
                missed += usize::from(!told && !cells[(round - 1) % CELLS].seen.0.load(Ordering::Relaxed));
                if end {
                    break;
                }
                wait(round % 5 * 3);
                let cell = &cells[round % CELLS];
                told = announce_in_memory(&cell.shadow.0, &cell.event.0, new(round));
                rounds = round;
            }
        });
        assert_eq!(missed, 0, "neither saw the other, so often in {rounds} rounds");
    }

    #[test]
    fn a_sleeping_controller_is_always_told() {
        // The controller's side: sleeps only after it has asked to be told and looked once more.
        use std::sync::Arc;
        use std::sync::atomic::AtomicU64;
        const ENTRIES: u16 = 8;
        const COUNT: u64 = 20_000;
        let words = Arc::new((AtomicU32::new(0), AtomicU32::new(0), AtomicU64::new(0), AtomicU64::new(0)));
        let other = words.clone();
        let (wake, sleeper) = std::sync::mpsc::channel::<()>();
        let controller = std::thread::spawn(move || {
            let (shadow, event, consumed, slept) = &*other;
            let (mut head, mut done) = (0, 0);
            while done < COUNT {
                while shadow.load(Ordering::Acquire) != head {
                    head = (head + 1) % u32::from(ENTRIES);
                    done += 1;
                    consumed.store(done, Ordering::Release);
                }
                event.store(head, Ordering::Relaxed);
                fence(Ordering::SeqCst);
                if shadow.load(Ordering::Acquire) == head && done < COUNT {
                    slept.fetch_add(1, Ordering::Relaxed);
                    sleeper.recv_timeout(std::time::Duration::from_secs(20)).expect("woken");
                }
            }
        });
        let (shadow, event, consumed, slept) = &*words;
        let (mut tail, mut written) = (0, 0u64);
        while written < COUNT {
            if written - consumed.load(Ordering::Acquire) < u64::from(ENTRIES) - 1 {
                tail = (tail + 1) % ENTRIES;
                written += 1;
                if announce_in_memory(shadow, event, tail) {
                    let _ = wake.send(());
                }
            } else {
                std::thread::yield_now();
            }
        }
        controller.join().expect("the controller was told each time");
        assert!(slept.load(Ordering::Relaxed) > 0);
    }
}
