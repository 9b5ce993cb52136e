//! Rings whose process dies, at any step, and whose successor goes on from the log.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::model::{Driver, Guest, Random, readable, writable};
use super::*;
use crate::fault_point::{self, FaultStep};

mod hostile;

const RING: u64 = 0x1000;
const DATA: u64 = 0x10_0000;

thread_local! {
    /// Steps to go until this thread's device dies; 0: it lives.
    static STEPS: Cell<u32> = const { Cell::new(0) };
}

/// The panic of a device that dies.
struct Killed;

/// Between any two stores to the log, and before the guest is shown a batch, the device may die; between any two accesses to the
/// log, that may change.
fn at(step: FaultStep) {
    if matches!(step, FaultStep::Store | FaultStep::Show) {
        may_die_here();
    }
    if matches!(step, FaultStep::Load | FaultStep::Store) {
        hostile::may_change_here();
    }
}

fn may_die_here() {
    let steps = STEPS.get();
    if steps != 0 {
        STEPS.set(steps - 1);
        if steps == 1 {
            std::panic::resume_unwind(Box::new(Killed));
        }
    }
}

/// Lets the device die at this step of `work`, if it has so many. Returns whether it died.
fn killed_at(step: u32, work: impl FnOnce()) -> bool {
    fault_point::set(at);
    STEPS.set(step);
    let result = catch_unwind(AssertUnwindSafe(work));
    STEPS.set(0);
    match result {
        Ok(()) => false,
        Err(panic) if panic.is::<Killed>() => true,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// A device's process: what dies.
struct LoggedDevice {
    ring: Ring,
    view: GuestView,
    chain: Chain,
    /// What it has popped and not given back, with what each chain said.
    held: Vec<(Head, String)>,
    /// What it has popped last: only that can be put back.
    last: Option<Head>,
}

impl LoggedDevice {
    fn new(guest: &Guest, setup: &RingSetup, log: &InflightMemory) -> LoggedDevice {
        let mut ring = Ring::new(&guest.memory, setup).unwrap();
        ring.set_log(&log.queue(0).unwrap()).unwrap();
        let mut device = LoggedDevice {
            ring,
            view: GuestView::new(guest.memory.clone()),
            chain: Chain::new(),
            held: Vec::new(),
            last: None,
        };
        while let Some(head) = device.ring.pop_unfinished(&mut device.view, &mut device.chain).unwrap() {
            device.held.push((head, told(&device.chain)));
        }
        device
    }

    /// Takes simple chains, as long as it can and `most` at most.
    fn take_simple_chains(&mut self, most: u64) {
        match &mut self.ring {
            Ring::Split(ring) => take_simple_chains(ring, most, &mut self.view, &mut self.held, &mut self.last),
            Ring::Packed(ring) => take_simple_chains(ring, most, &mut self.view, &mut self.held, &mut self.last),
        }
    }

    /// Gives back one of those it has.
    fn give_back(&mut self, number: usize) {
        let (head, text) = self.held.remove(number);
        self.ring.push_used(head, text.len() as u32);
    }

    fn pop(&mut self) -> bool {
        let Some(head) = self.ring.pop(&mut self.view, &mut self.chain).unwrap() else { return false };
        self.held.push((head, told(&self.chain)));
        self.last = Some(head);
        true
    }
}

fn take_simple_chains(
    ring: &mut impl SimpleChainRing,
    most: u64,
    view: &mut GuestView,
    held: &mut Vec<(Head, String)>,
    last: &mut Option<Head>,
) {
    for _ in 0..most {
        let Some(simple) = ring.peek_simple_chain::<16, 1>(view) else { break };
        let mut chain = Chain::new();
        let Buffer { address, bytes } = simple.middle;
        let flags = if simple.middle_writable { WRITE } else { 0 };
        for (address, bytes, flags) in [(simple.first, 16, 0), (address, bytes, flags), (simple.last, 1, WRITE)] {
            chain.push(Descriptor { address, bytes, flags, link: 0 }, 0).unwrap();
        }
        let head = ring.accept(simple.head);
        held.push((head, told(&chain)));
        *last = Some(head);
    }
    ring.commit();
}

/// What a chain says.
fn told(chain: &Chain) -> String {
    format!("{:x?} {:x?}", chain.readable(), chain.writable())
}

/// The driver's side, and what it knows of its chains.
struct Front {
    guest: Guest,
    driver: Driver,
    log: InflightMemory,
    /// Chains in the order they were made available, which are not back yet: id and what they say.
    waiting: Vec<(u16, String)>,
    made: u64,
    /// What its chains are like.
    kind: ChainKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ChainKind {
    /// Of everything some.
    Any,
    /// Triples in the ring itself.
    Simple,
    /// Triples in indirect tables.
    Indirect,
}

impl Front {
    fn new(packed: bool, size: u16) -> Front {
        let guest = Guest::new(&[(0, 0x40_0000)], None);
        let driver = Driver::new(&guest, packed, size, RING, false);
        Front {
            guest,
            driver,
            log: InflightMemory::create(1, size).unwrap(),
            waiting: Vec::new(),
            made: 0,
            kind: ChainKind::Any,
        }
    }

    fn device(&self) -> LoggedDevice {
        // What a front-end says after a crash may be long out of date: the log knows better.
        LoggedDevice::new(&self.guest, &self.driver.setup, &self.log)
    }

    fn add(&mut self, random: &mut Random) -> bool {
        self.made += 1;
        let at = DATA + self.made % 0x1000 * 0x40;
        let pieces: Vec<_> = match if self.kind == ChainKind::Any { random.below(4) } else { 2 + random.below(2) } {
            0 => vec![writable(at, 16)],
            1 => vec![readable(at, 16), writable(at + 16, 512 + self.made as u32 % 100)],
            2 => vec![readable(at, 16), writable(at + 16, 8), writable(at + 24, 1)],
            _ => vec![readable(at, 16), readable(at + 16, 8), writable(at + 24, 1)],
        };
        let indirect = match self.kind {
            ChainKind::Any => random.one_in(2),
            kind => kind == ChainKind::Indirect,
        };
        let table = indirect.then_some(0x20_0000 + self.made % 0x1000 * 0x40);
        let Some(id) = self.driver.add(&self.guest, &pieces, table) else { return false };
        let texts: Vec<String> = [false, true]
            .map(|w| {
                let of = |p: &&super::model::Piece| p.writable == w;
                let side: Vec<Buffer> =
                    pieces.iter().filter(of).map(|p| Buffer { address: p.address, bytes: p.bytes }).collect();
                format!("{side:x?}")
            })
            .to_vec();
        self.waiting.push((id, texts.join(" ")));
        true
    }

    /// Takes what the device shows; panics in the model if that is anything not in flight.
    fn collect(&mut self) {
        while let Some((id, length)) = self.driver.used(&self.guest) {
            let at = self.waiting.iter().position(|(waiting, _)| *waiting == id).expect("it is in flight");
            let (_, text) = self.waiting.remove(at);
            assert_eq!(length as usize, text.len(), "each chain is given back with its own length");
        }
    }
}

/// A log as another implementation would read it: from the bytes, by the specification's words.
struct Letter {
    bytes: Vec<u8>,
    /// Where the entries begin, and how long they are.
    entries: (usize, usize),
}

impl Letter {
    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.bytes[at..at + 2].try_into().unwrap())
    }

    fn entry(&self, number: u16) -> usize {
        self.entries.0 + self.entries.1 * usize::from(number)
    }

    fn clear(&mut self, number: u16) {
        let at = self.entry(number);
        self.bytes[at] = 0;
    }

    /// The entries in flight, by the order of their counters.
    fn in_flight(&self, size: u16) -> Vec<u16> {
        let counter = |number: &u16| {
            let at = self.entry(*number) + 8;
            u64::from_le_bytes(self.bytes[at..at + 8].try_into().unwrap())
        };
        let mut found: Vec<u16> = (0..size).filter(|number| self.bytes[self.entry(*number)] == 1).collect();
        found.sort_by_key(counter);
        assert!(found.windows(2).all(|two| counter(&two[0]) < counter(&two[1])), "no counter is there twice");
        found
    }
}

/// What a log says is in flight, in order: heads (split) or buffer ids (packed). Every entry has to be in its place.
fn by_the_letter(front: &Front) -> Vec<u16> {
    use std::os::unix::fs::FileExt;
    let RingSetup { packed, size, descriptors, device, .. } = front.driver.setup;
    let mut bytes = vec![0; front.log.bytes() as usize];
    front.log.file().read_exact_at(&mut bytes, 0).unwrap();
    let mut log = Letter { bytes, entries: if packed { (32, 32) } else { (16, 16) } };
    assert_eq!((log.u16(8), log.u16(10)), (1, size), "version and desc_num");
    if !packed {
        let (mut head, used) = (log.u16(12), front.guest.read_u16(device + 2));
        for _ in 0..used.wrapping_sub(log.u16(14)) {
            log.clear(head);
            head = log.u16(log.entry(head) + 6);
        }
        return log.in_flight(size);
    }
    let (new, old) = ((log.u16(16), log.bytes[20]), (log.u16(18), log.bytes[21]));
    let flags = front.guest.read_u16(descriptors + 16 * u64::from(old.0) + 14) & (1 << 7 | 1 << 15);
    let available = if old.1 == 1 { 1 << 7 } else { 1 << 15 };
    let mut next = if new != old && flags != available { log.u16(12) } else { log.u16(14) };
    let mut seen = vec![false; size.into()];
    while next < size {
        assert!(!std::mem::replace(&mut seen[usize::from(next)], true), "the list of free entries is no circle");
        log.clear(next);
        next = log.u16(log.entry(next) + 2);
    }
    let mut ids = Vec::new();
    for head in log.in_flight(size) {
        let (mut at, mut last) = (head, head);
        for _ in 0..log.u16(log.entry(head) + 6) {
            assert!(!std::mem::replace(&mut seen[usize::from(at)], true), "no entry is there twice");
            last = at;
            at = log.u16(log.entry(at) + 2);
        }
        assert_eq!(last, log.u16(log.entry(head) + 4), "last");
        ids.push(log.u16(log.entry(last) + 16));
    }
    assert!(seen.iter().all(|seen| *seen), "no entry is lost");
    ids
}

/// The next process has exactly what the driver still waits for, each as it was sent: first, in their order, those that were
/// taken, then those that were not.
fn check_successor(front: &mut Front) -> LoggedDevice {
    let in_flight = by_the_letter(front);
    let mut device = front.device();
    let resumed = device.held.len();
    assert_eq!(device.held.iter().map(|(head, _)| head.id()).collect::<Vec<_>>(), in_flight);
    while device.pop() {}
    let found: Vec<&String> = device.held.iter().map(|(_, text)| text).collect();
    let expected: Vec<&String> = front.waiting.iter().map(|(_, text)| text).collect();
    assert_eq!(found, expected, "{resumed} of them resumed");
    device
}

fn any_step(packed: bool, kind: ChainKind, seed: u64) {
    println!("packed {packed}, {kind:?}, seed {seed}");
    let mut random = Random::new(seed);
    let mut deaths = 0;
    // Packed rings need not be a power of two.
    let mut front = Front { kind, ..Front::new(packed, if packed { 11 } else { 16 }) };
    let mut device = front.device();
    for _ in 0..4000 {
        for _ in 0..random.below(8) {
            front.add(&mut random);
        }
        let (simple_chains, pops, pushes) = (random.below(8), random.below(8), random.below(8));
        let step = random.below(120) as u32;
        let order: Vec<u64> = (0..pushes).map(|_| random.next()).collect();
        let unpop = random.one_in(4);
        let died = killed_at(step, || {
            device.take_simple_chains(simple_chains);
            for _ in 0..pops {
                device.pop();
            }
            // What found no room is put back, to be taken again.
            let is_last = device.held.last().is_some_and(|(head, _)| Some(*head) == device.last);
            if unpop && is_last {
                let (head, _) = device.held.pop().unwrap();
                device.last = None;
                device.ring.unpop(head);
            }
            for pick in &order {
                if device.held.is_empty() {
                    break;
                }
                device.give_back((pick % device.held.len() as u64) as usize);
                // Before it shows them, it may take more.
                if pick % 7 == 0 {
                    device.take_simple_chains(1);
                }
            }
            device.ring.publish();
        });
        deaths += u32::from(died);
        // What was published before the death counts, nothing else.
        front.collect();
        if died {
            drop(device);
            // The driver does not wait for a successor to use what is free again.
            for _ in 0..random.below(12) {
                front.add(&mut random);
            }
            device = check_successor(&mut front);
        }
    }
    // Nothing is lost and nothing is stuck in the log.
    while device.pop() {}
    for (head, text) in std::mem::take(&mut device.held) {
        device.ring.push_used(head, text.len() as u32);
    }
    device.ring.publish();
    front.collect();
    assert!(front.waiting.is_empty(), "{:?}", front.waiting);
    drop(device);
    assert_eq!(check_successor(&mut front).held.len(), 0);
    assert!(front.made > u64::from(u16::MAX) / 16, "the packed ring has wrapped often");
    assert!(deaths > 300, "{deaths}");
}

#[test]
fn a_split_ring_survives_death_at_any_step() {
    any_step(false, ChainKind::Any, 0x5b11);
}

#[test]
fn a_split_ring_of_simple_chains_survives_death_at_any_step() {
    any_step(false, ChainKind::Simple, 0x5b12);
}

#[test]
fn a_split_ring_of_indirect_descriptors_survives_death_at_any_step() {
    any_step(false, ChainKind::Indirect, 0x5b13);
}

#[test]
fn a_packed_ring_survives_death_at_any_step() {
    any_step(true, ChainKind::Any, 0xbac6);
}

#[test]
fn a_packed_ring_of_simple_chains_survives_death_at_any_step() {
    any_step(true, ChainKind::Simple, 0xbac7);
}

#[test]
fn a_packed_ring_of_indirect_descriptors_survives_death_at_any_step() {
    any_step(true, ChainKind::Indirect, 0xbac8);
}

fn formats() -> [(bool, u16); 2] {
    [(false, 8), (true, 8)]
}

#[test]
fn request_zero_alone_in_flight_is_found() {
    for (packed, size) in formats() {
        let mut front = Front::new(packed, size);
        assert!(front.add(&mut Random::new(1)));
        let mut device = front.device();
        assert!(device.pop());
        drop(device);
        let device = front.device();
        assert_eq!(device.held.len(), 1, "packed {packed}");
        assert!(device.ring.resumed());
    }
}

#[test]
fn an_empty_history_has_nothing_to_do_again() {
    for (packed, size) in formats() {
        let mut front = Front::new(packed, size);
        let device = front.device();
        assert!(!device.ring.resumed() && device.held.is_empty(), "a fresh log");
        drop(device);
        let mut device = front.device();
        assert!(device.held.is_empty());
        assert!(front.add(&mut Random::new(2)));
        assert!(device.pop(), "it goes on from the beginning");
    }
}

#[test]
fn indexes_that_have_wrapped_are_resumed() {
    for (packed, size) in formats() {
        let mut front = Front::new(packed, size);
        let mut random = Random::new(3);
        let mut device = front.device();
        for _ in 0..u32::from(u16::MAX) + 5 {
            assert!(front.add(&mut random));
            assert!(device.pop());
            let (head, text) = device.held.pop().unwrap();
            device.ring.push_used(head, text.len() as u32);
            device.ring.publish();
            front.collect();
        }
        assert!(front.add(&mut random) && front.add(&mut random));
        assert!(device.pop());
        drop(device);
        assert_eq!(check_successor(&mut front).held.len(), 2, "packed {packed}");
    }
}

#[test]
fn indirect_descriptors_are_resumed() {
    for (packed, size) in formats() {
        let mut front = Front { kind: ChainKind::Indirect, ..Front::new(packed, size) };
        let mut random = Random::new(7);
        for _ in 0..5 {
            assert!(front.add(&mut random));
        }
        let mut device = front.device();
        device.take_simple_chains(2);
        assert!(device.pop());
        drop(device);
        assert_eq!(front.device().held.len(), 3, "packed {packed}");
        // The tables are read again, and those that were not taken are still there.
        assert_eq!(check_successor(&mut front).held.len(), 5, "packed {packed}");
    }
}

/// Direct chains: in a packed ring, what is given back first is written over the first of those still in flight.
#[test]
fn what_completed_out_of_order_is_not_done_again() {
    for (packed, size) in [(false, 16), (true, 16)] {
        let mut front = Front { kind: ChainKind::Simple, ..Front::new(packed, size) };
        let mut random = Random::new(8);
        for _ in 0..5 {
            assert!(front.add(&mut random));
        }
        let mut device = front.device();
        device.take_simple_chains(3);
        assert!(device.pop() && device.pop());
        // The fourth, the last, the second.
        for number in [3, 3, 1] {
            device.give_back(number);
        }
        device.ring.publish();
        drop(device);
        front.collect();
        assert_eq!(front.waiting.len(), 2);
        assert_eq!(front.device().held.len(), 2, "packed {packed}");
        assert_eq!(check_successor(&mut front).held.len(), 2, "packed {packed}");
    }
}

#[test]
fn a_device_that_was_reset_begins_anew() {
    for (packed, size) in formats() {
        let mut front = Front::new(packed, size);
        assert!(front.add(&mut Random::new(4)) && front.add(&mut Random::new(5)));
        let mut device = front.device();
        assert!(device.pop());
        drop(device);
        front.log.clear();
        front.driver = Driver::new(&front.guest, packed, size, RING, false);
        let device = front.device();
        assert!(device.held.is_empty() && !device.ring.resumed());
    }
}

/// A guest that makes available what the device still has: the chain has no place in the log, and takes nobody's.
#[test]
fn a_chain_in_no_log_frees_no_other_chain() {
    let mut front = Front { kind: ChainKind::Indirect, ..Front::new(true, 4) };
    for _ in 0..4 {
        assert!(front.add(&mut Random::new(9)));
    }
    let mut device = front.device();
    device.take_simple_chains(4);
    let in_flight = by_the_letter(&front);
    assert_eq!((device.held.len(), in_flight.len()), (4, 4));
    // The first descriptor once more, as it would be available in the ring's second round.
    front.guest.write(RING + 14, &(INDIRECT | 1 << 15).to_le_bytes());
    for long in [true, false] {
        if long {
            assert!(device.pop());
        } else {
            device.take_simple_chains(1);
        }
        let (head, text) = device.held.pop().unwrap();
        assert_eq!(device.held.len(), 4, "it was taken");
        if long {
            device.ring.unpop(head);
        } else {
            device.ring.push_used(head, text.len() as u32);
            device.ring.publish();
        }
        assert_eq!(by_the_letter(&front), in_flight);
    }
    drop(device);
    assert_eq!(front.device().held.len(), 4);
}

/// A guest that began anew while nobody was there to hear of its reset: its ring is not the one in the log.
#[test]
fn a_log_of_an_earlier_ring_is_not_believed() {
    for (packed, size) in formats() {
        let mut front = Front::new(packed, size);
        let mut random = Random::new(6);
        let mut device = front.device();
        for _ in 0..3 {
            assert!(front.add(&mut random) && device.pop());
        }
        drop(device);
        front.driver = Driver::new(&front.guest, packed, size, RING, false);
        front.waiting.clear();
        assert!(front.device().held.is_empty(), "packed {packed}");
    }
}

#[test]
fn logs_that_do_not_fit_are_refused() {
    for (packed, size) in formats() {
        let mut front = Front::new(packed, size);
        assert!(front.add(&mut Random::new(10)) && front.device().pop());
        let open = |log: &InflightMemory, size| {
            let setup = RingSetup { size, ..front.driver.setup };
            // Used, so that it is not taken for a new ring.
            front.guest.write(setup.descriptors, &[1]);
            Ring::new(&front.guest.memory, &setup).unwrap().set_log(&log.queue(0).unwrap())
        };
        assert!(matches!(open(&front.log, size / 2), Err(InflightError::Foreign { .. })), "a request is in flight");
        let small = InflightMemory::create(1, size / 4).unwrap();
        assert!(matches!(open(&small, 32), Err(InflightError::TooSmall { .. })), "packed {packed}");
        assert!(front.log.queue(1).is_none());
    }
}

/// A guest that was stopped with nothing in flight may come back with a ring of another size: after its firmware, or a reboot.
#[test]
fn an_empty_log_takes_a_ring_of_any_size() {
    for packed in [false, true] {
        let mut log = InflightMemory::create(1, 64).unwrap();
        for size in [16, 64, 8, 32, 4] {
            let mut front = Front { log, ..Front::new(packed, size) };
            let mut random = Random::new(11);
            // In a ring that is not new: what is in the log counts.
            front.guest.write(RING, &[1]);
            let mut device = front.device();
            assert!(device.held.is_empty() && !device.ring.resumed(), "packed {packed}, {size} entries");
            assert!(front.add(&mut random) && device.pop());
            drop(device);
            let mut device = check_successor(&mut front);
            assert_eq!(device.held.len(), 1, "packed {packed}, {size} entries");
            device.give_back(0);
            device.ring.publish();
            log = front.log;
        }
    }
}
