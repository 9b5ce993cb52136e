//! Logs whose content somebody else writes, before the ring begins or while it runs.

use super::*;

thread_local! {
    /// What changes the log at any moment: memory, and numbers to be left until the next change.
    static HOSTILE: std::cell::RefCell<Option<(Arc<vfio::SharedMemory>, Random)>> = const { std::cell::RefCell::new(None) };
}

pub(super) fn may_change_here() {
    HOSTILE.with_borrow_mut(|hostile| {
        let Some((memory, random)) = hostile else { return };
        if !random.one_in(4) {
            return;
        }
        let words = memory.slice::<std::sync::atomic::AtomicU16>(0, memory.len() / 2).unwrap();
        for _ in 0..1 + random.below(3) {
            // Numbers that may be a place, a length or a mark, and any other.
            let value = match random.below(4) {
                0 => random.below(20) as u16,
                1 => 1,
                2 => 60_000,
                _ => random.next() as u16,
            };
            words[random.below(words.len() as u64) as usize].store(value, std::sync::atomic::Ordering::Relaxed);
        }
    });
}

/// A front-end that writes into the log while the ring runs, at any moment: nothing panics, nothing but the ring is written, and
/// no turn takes longer than the ring is.
#[test]
fn a_log_that_is_changed_while_the_ring_runs_does_no_harm() {
    let seed = 0x10c;
    println!("seed {seed}");
    let mut random = Random::new(seed);
    for round in 0..400 {
        let (packed, size) = (round % 2 == 0, [1, 4, 16][round % 3]);
        let kind = [ChainKind::Any, ChainKind::Simple, ChainKind::Indirect][round / 2 % 3];
        let mut front = Front { kind, ..Front::new(packed, size) };
        let mut device = front.device();
        for _ in 0..random.below(8) {
            if front.add(&mut random) {
                device.pop();
            }
        }
        drop(device);
        let end = RING + Driver::bytes_needed(size);
        let others = |front: &Front| (front.guest.read(0, RING as usize), front.guest.read(end, (DATA - end) as usize));
        let before = others(&front);
        fault_point::set(at);
        HOSTILE.set(Some((front.log.shared(), Random::new(random.next() | 1))));
        let mut ring = Ring::new(&front.guest.memory, &front.driver.setup).unwrap();
        if ring.set_log(&front.log.queue(0).unwrap()).is_ok() {
            let (mut view, mut chain) = (GuestView::new(front.guest.memory.clone()), Chain::new());
            let mut held = Vec::new();
            let unfinished = std::iter::from_fn(|| ring.pop_unfinished(&mut view, &mut chain).transpose())
                .take(1000)
                .inspect(|popped| {
                    held.extend(popped.as_ref().ok().copied());
                });
            assert!(unfinished.count() <= usize::from(size), "each descriptor is in one chain at most");
            for _ in 0..30 {
                for _ in 0..random.below(4) {
                    front.add(&mut random);
                }
                while held.len() < 64
                    && let Ok(Some(head)) = ring.pop(&mut view, &mut chain)
                {
                    held.push(head);
                    if random.one_in(8) {
                        ring.unpop(held.pop().unwrap());
                        break;
                    }
                }
                let (mut popped, mut last) = (Vec::new(), None);
                match &mut ring {
                    Ring::Split(ring) => take_simple_chains(ring, 2, &mut view, &mut popped, &mut last),
                    Ring::Packed(ring) => take_simple_chains(ring, 2, &mut view, &mut popped, &mut last),
                }
                held.extend(popped.into_iter().map(|(head, _)| head));
                while !held.is_empty() && !random.one_in(4) {
                    let head = held.swap_remove(random.below(held.len() as u64) as usize);
                    ring.push_used(head, 1);
                }
                ring.publish();
                let _ = ring.enable_notifications();
                ring.disable_notifications();
                // The guest has no better manners.
                let at = RING + random.below(end - RING - 2) / 2 * 2;
                front.guest.write_u16(at, random.next() as u16);
            }
        }
        HOSTILE.set(None);
        assert!(others(&front) == before, "round {round}");
    }
}

/// What was seen: `num` of a chain that an earlier process has left, made larger than the ring before it is given back.
#[test]
fn a_chain_of_the_log_is_as_long_as_it_was_when_it_was_checked() {
    use std::os::unix::fs::FileExt;
    let size = 256;
    let mut front = Front { kind: ChainKind::Indirect, ..Front::new(true, size) };
    let mut random = Random::new(12);
    let mut device = front.device();
    for _ in 0..200 {
        assert!(front.add(&mut random) && device.pop());
    }
    drop(device);
    let mut ring = Ring::new(&front.guest.memory, &front.driver.setup).unwrap();
    ring.set_log(&front.log.queue(0).unwrap()).unwrap();
    for entry in 0..u64::from(size) {
        front.log.file().write_all_at(&60_000u16.to_le_bytes(), 32 + 32 * entry + 6).unwrap();
    }
    let (mut view, mut chain) = (GuestView::new(front.guest.memory.clone()), Chain::new());
    for _ in 0..200 {
        let head = ring.pop_unfinished(&mut view, &mut chain).unwrap().expect("they are all there");
        ring.push_used(head, told(&chain).len() as u32);
    }
    ring.publish();
    front.collect();
    assert!(front.waiting.is_empty());
}

/// Whatever is in the memory, nothing but an error or an odd set of chains comes of it.
#[test]
fn garbage_in_the_log_does_no_harm() {
    let seed = 0x9a7;
    println!("seed {seed}");
    let mut random = Random::new(seed);
    for round in 0..3000 {
        let mut front = Front::new(round % 2 == 0, 16);
        let mut device = front.device();
        for _ in 0..3 {
            assert!(front.add(&mut random) && device.pop());
        }
        drop(device);
        let file = front.log.file();
        for _ in 0..1 + random.below(6) {
            use std::os::unix::fs::FileExt;
            file.write_all_at(&[random.next() as u8], random.below(front.log.bytes())).unwrap();
        }
        let mut ring = Ring::new(&front.guest.memory, &front.driver.setup).unwrap();
        if ring.set_log(&front.log.queue(0).unwrap()).is_err() {
            continue;
        }
        let (mut view, mut chain) = (GuestView::new(front.guest.memory.clone()), Chain::new());
        let mut held = Vec::new();
        for _ in 0..64 {
            match ring.pop_unfinished(&mut view, &mut chain) {
                Ok(Some(head)) => held.push(head),
                Ok(None) => break,
                Err(_) => {}
            }
        }
        while let Ok(Some(head)) = ring.pop(&mut view, &mut chain) {
            held.push(head);
            if held.len() > 64 {
                break;
            }
        }
        held.into_iter().for_each(|head| ring.push_used(head, 0));
        ring.publish();
    }
}
