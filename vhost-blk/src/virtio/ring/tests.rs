//! Both rings against a driver's side written from the specification.

use super::model::{Driver, Guest, Random, descriptor, readable, writable};
use super::*;

const RING: u64 = 0x1000;
const DATA: u64 = 0x40_0000;

fn guest() -> Guest {
    // Two regions that touch, and one apart.
    Guest::new(&[(0, 0x40_0000), (0x40_0000, 0x10_0000), (0x1_0000_0000, 0x1_0000)], None)
}

struct RingDevice {
    ring: Ring,
    view: GuestView,
    chain: Chain,
}

impl RingDevice {
    fn new(guest: &Guest, setup: &RingSetup) -> RingDevice {
        let ring = Ring::new(&guest.memory, setup).unwrap();
        RingDevice { ring, view: GuestView::new(guest.memory.clone()), chain: Chain::new() }
    }

    fn pop(&mut self) -> Result<Option<Head>, RingError> {
        self.ring.pop(&mut self.view, &mut self.chain)
    }
}

/// Front-ends may send base 0 for a new packed ring, and its driver may have begun before it is served.
#[test]
fn a_new_packed_ring_may_have_waited() {
    for waited in [false, true] {
        let guest = guest();
        let mut driver = Driver::new(&guest, true, 16, RING, false);
        let setup = RingSetup { base: 0, ..driver.setup };
        let mut early = waited.then(|| driver.add(&guest, &[writable(DATA, 1)], None).unwrap());
        let mut device = RingDevice::new(&guest, &setup);
        if early.is_none() {
            early = Some(driver.add(&guest, &[writable(DATA, 1)], None).unwrap());
        }
        assert!(early.is_some() && device.pop().unwrap().is_some(), "waited {waited}");
    }
}

fn formats() -> impl Iterator<Item = (bool, bool)> {
    [(false, false), (false, true), (true, false), (true, true)].into_iter()
}

#[test]
fn chains_arrive_as_sent_and_go_back_in_any_order() {
    for (packed, event_idx) in formats() {
        let seed = 0x5eed + u64::from(packed);
        println!("packed {packed}, event_idx {event_idx}, seed {seed}");
        let mut random = Random::new(seed);
        let guest = guest();
        // Packed rings need not be a power of two.
        let size = if packed { 19 } else { 16 };
        let mut driver = Driver::new(&guest, packed, size, RING, event_idx);
        let mut device = RingDevice::new(&guest, &driver.setup);
        let mut sent = std::collections::HashMap::new();
        let mut held: Vec<Head> = Vec::new();
        let mut returned = Vec::new();
        let (mut popped, mut total) = (0, 0);
        // Enough for the 16-bit indexes to wrap.
        while total < 70_000 {
            let pieces: Vec<_> = {
                let (reads, writes) = (random.below(4), 1 + random.below(4));
                let mut piece = |w| super::model::Piece {
                    address: DATA + random.below(0x1000),
                    bytes: random.below(3) as u32 * 512,
                    writable: w,
                };
                (0..reads + writes).map(|k| piece(k >= reads)).collect()
            };
            let indirect = random.one_in(2).then_some(0x20_0000 + 0x1000 * (total % 64));
            if let Some(id) = driver.add(&guest, &pieces, indirect) {
                assert!(sent.insert(id, pieces).is_none());
                total += 1;
            } else {
                assert!(!sent.is_empty(), "a full ring has something in flight");
            }
            if random.one_in(2) {
                while let Some(head) = device.pop().unwrap() {
                    let expected = &sent[&head.id()];
                    let of = |w| -> Vec<Buffer> {
                        let some = expected.iter().filter(|p| p.writable == w && p.bytes != 0);
                        some.map(|p| Buffer { address: p.address, bytes: p.bytes }).collect()
                    };
                    assert_eq!(device.chain.readable(), of(false));
                    assert_eq!(device.chain.writable(), of(true));
                    held.push(head);
                    popped += 1;
                }
            }
            while !held.is_empty() && random.one_in(2) {
                let head = held.swap_remove(random.below(held.len() as u64) as usize);
                device.ring.push_used(head, u32::from(head.id()) * 3);
                returned.push(head.id());
            }
            if !device.ring.unpublished() {
                assert!(driver.used(&guest).is_none());
            } else if random.one_in(3) {
                device.ring.publish();
            }
            while let Some((id, length)) = driver.used(&guest) {
                assert_eq!(length, u32::from(id) * 3);
                assert_eq!(returned.remove(0), id, "used chains come in the order in which they were given back");
                sent.remove(&id);
            }
        }
        assert!(popped > 60_000);
    }
}

#[test]
fn nothing_is_seen_before_publication() {
    for (packed, event_idx) in formats() {
        let guest = guest();
        let mut driver = Driver::new(&guest, packed, 8, RING, event_idx);
        let mut device = RingDevice::new(&guest, &driver.setup);
        for _ in 0..3 {
            driver.add(&guest, &[writable(DATA, 1)], None).unwrap();
        }
        for _ in 0..3 {
            let head = device.pop().unwrap().unwrap();
            device.ring.push_used(head, 1);
            assert_eq!(driver.used(&guest), None);
        }
        device.ring.publish();
        assert_eq!(std::iter::from_fn(|| driver.used(&guest)).count(), 3);
        assert!(!device.ring.publish(), "nothing new, nobody to notify");
    }
}

#[test]
fn the_driver_is_called_only_when_it_asked() {
    for (packed, event_idx) in formats() {
        println!("packed {packed}, event_idx {event_idx}");
        let guest = guest();
        let mut driver = Driver::new(&guest, packed, 8, RING, event_idx);
        let mut device = RingDevice::new(&guest, &driver.setup);
        let mut random = Random::new(7);
        for round in 0..1000 {
            let asked = random.one_in(2);
            let batch = 1 + random.below(8) as usize;
            driver.ask_for_calls(&guest, asked);
            for _ in 0..batch {
                driver.add(&guest, &[writable(DATA, 1)], None).unwrap();
            }
            for _ in 0..batch {
                let head = device.pop().unwrap().unwrap();
                device.ring.push_used(head, 1);
            }
            assert_eq!(device.ring.publish(), asked, "round {round}, batch {batch}");
            assert_eq!(std::iter::from_fn(|| driver.used(&guest)).count(), batch);
        }
    }
}

#[test]
fn an_event_further_on_waits_for_its_chain() {
    for packed in [false, true] {
        let guest = guest();
        let mut driver = Driver::new(&guest, packed, 4, RING, true);
        let mut device = RingDevice::new(&guest, &driver.setup);
        // After each chain: the driver wants to hear of the third one from here, which wraps in the ring of four.
        for _ in 0..50 {
            let at = driver.position_ahead(2);
            if packed {
                guest.write_u16(driver.setup.driver, at);
                guest.write_u16(driver.setup.driver + 2, 2);
            } else {
                guest.write_u16(driver.setup.driver + 4 + 8, at);
            }
            for expected in [false, false, true] {
                driver.add(&guest, &[writable(DATA, 1)], None).unwrap();
                let head = device.pop().unwrap().unwrap();
                device.ring.push_used(head, 1);
                assert_eq!(device.ring.publish(), expected);
                driver.used(&guest).unwrap();
            }
        }
    }
}

#[test]
fn the_device_is_kicked_only_when_it_asked() {
    for (packed, event_idx) in formats() {
        println!("packed {packed}, event_idx {event_idx}");
        let guest = guest();
        let mut driver = Driver::new(&guest, packed, 8, RING, event_idx);
        let mut device = RingDevice::new(&guest, &driver.setup);
        for _ in 0..100 {
            device.ring.disable_notifications();
            driver.add(&guest, &[writable(DATA, 1)], None).unwrap();
            assert!(!driver.kick_wanted(&guest));
            assert!(device.ring.enable_notifications(), "a chain is there already: no sleep");
            let head = device.pop().unwrap().unwrap();
            assert!(!device.ring.enable_notifications(), "nothing more is there");
            driver.add(&guest, &[writable(DATA, 1)], None).unwrap();
            assert!(driver.kick_wanted(&guest));
            let second = device.pop().unwrap().unwrap();
            device.ring.push_used(head, 1);
            device.ring.push_used(second, 1);
            device.ring.publish();
            while driver.used(&guest).is_some() {}
        }
    }
}

#[test]
fn a_ring_goes_on_from_its_base() {
    for (packed, event_idx) in formats() {
        let guest = guest();
        let mut driver = Driver::new(&guest, packed, 8, RING, event_idx);
        let mut setup = driver.setup;
        for _ in 0..40 {
            let mut device = RingDevice::new(&guest, &setup);
            for _ in 0..3 {
                driver.add(&guest, &[writable(DATA, 1), writable(DATA, 1)], None).unwrap();
            }
            for _ in 0..2 {
                let head = device.pop().unwrap().unwrap();
                device.ring.push_used(head, 1);
            }
            // The third is popped and put back: the next device finds it.
            let third = device.pop().unwrap().unwrap();
            device.ring.unpop(third);
            device.ring.publish();
            setup.base = device.ring.base();
            device = RingDevice::new(&guest, &setup);
            assert_eq!(device.pop().unwrap(), Some(third));
            device.ring.push_used(third, 1);
            device.ring.publish();
            assert_eq!(device.pop().unwrap(), None);
            setup.base = device.ring.base();
            assert_eq!(std::iter::from_fn(|| driver.used(&guest)).count(), 3);
        }
        // The format of SET_VRING_BASE: both positions are equal when nothing is in flight.
        if packed {
            assert_eq!(setup.base >> 16, setup.base & 0xffff);
        } else {
            assert_eq!(setup.base, 120);
        }
    }
}

#[test]
fn a_new_packed_ring_may_be_given_base_0() {
    let guest = guest();
    let mut driver = Driver::new(&guest, true, 8, RING, false);
    let mut setup = driver.setup;
    setup.base = 0;
    let mut device = RingDevice::new(&guest, &setup);
    assert_eq!(device.ring.base(), 0x8000_8000);
    driver.add(&guest, &[writable(DATA, 1)], None).unwrap();
    let head = device.pop().unwrap().unwrap();
    device.ring.push_used(head, 1);
    device.ring.publish();
    // One that was used means what it says.
    assert_eq!(RingDevice::new(&guest, &setup).ring.base(), 0);
}

#[test]
fn bad_setups_are_refused() {
    let guest = guest();
    let good = Driver::new(&guest, false, 8, RING, true).setup;
    let refused = |change: &dyn Fn(&mut RingSetup)| {
        let mut setup = good;
        change(&mut setup);
        Ring::new(&guest.memory, &setup).map(|_| ()).unwrap_err()
    };
    for size in [0, 3, 24, 32769, 65535] {
        assert_eq!(refused(&|s| s.size = size), RingError::Size { packed: false, size });
    }
    for size in [0, 32769] {
        assert_eq!(refused(&|s| (s.packed, s.size) = (true, size)), RingError::Size { packed: true, size });
    }
    let address = |part, address| RingError::Address { part, address };
    for packed in [false, true] {
        assert_eq!(refused(&|s| (s.packed, s.descriptors) = (packed, RING + 8)), address(Part::Descriptors, RING + 8));
        // The table would leave its region for the one that touches it, or for nothing at all.
        for outside in [0x3f_fff0, 0x4f_fff0, 0x1_0000_fff0, 0x80_0000_0000, u64::MAX - 15] {
            let error = refused(&|s| (s.packed, s.descriptors) = (packed, outside));
            assert_eq!(error, address(Part::Descriptors, outside));
        }
    }
    assert_eq!(refused(&|s| s.driver += 1), address(Part::Driver, good.driver + 1));
    assert_eq!(refused(&|s| s.device += 2), address(Part::Device, good.device + 2));
    assert_eq!(refused(&|s| s.device = u64::MAX - 3), address(Part::Device, u64::MAX - 3));
    // The last byte of each part counts.
    assert_eq!(refused(&|s| s.driver = 0x1_0001_0000 - 20), address(Part::Driver, 0x1_0001_0000 - 20));
    assert_eq!(refused(&|s| s.device = 0x1_0001_0000 - 68), address(Part::Device, 0x1_0001_0000 - 68));
    assert_eq!(refused(&|s| s.base = 0x1_0000), RingError::Base { base: 0x1_0000, size: 8 });
    assert_eq!(refused(&|s| (s.packed, s.base) = (true, 8)), RingError::Base { base: 8, size: 8 });
    assert_eq!(refused(&|s| (s.packed, s.base) = (true, 8 << 16)), RingError::Base { base: 8 << 16, size: 8 });
    assert!(Ring::new(&guest.memory, &good).is_ok());
}

#[test]
fn the_largest_rings_work() {
    for packed in [false, true] {
        let guest = guest();
        let mut driver = Driver::new(&guest, packed, 32768, RING, true);
        let mut device = RingDevice::new(&guest, &driver.setup);
        for round in 0..3 {
            for _ in 0..32768 {
                driver.add(&guest, &[writable(DATA, 1)], None).expect("room for as many chains as descriptors");
            }
            assert_eq!(driver.add(&guest, &[writable(DATA, 1)], None), None);
            let mut heads: Vec<Head> = std::iter::from_fn(|| device.pop().unwrap()).collect();
            assert_eq!(heads.len(), 32768, "round {round}");
            heads.reverse();
            heads.into_iter().for_each(|head| device.ring.push_used(head, 1));
            device.ring.publish();
            assert_eq!(std::iter::from_fn(|| driver.used(&guest)).count(), 32768);
        }
    }
}

/// A ring with one chain made by hand: descriptors from index 0 on, offered as head 0.
fn handmade(packed: bool, descriptors: &[(u64, u32, u16)], indirect: bool) -> Result<(Chain, Option<Head>), RingError> {
    let guest = guest();
    let mut driver = Driver::new(&guest, packed, 8, RING, false);
    driver.setup.indirect = indirect;
    for (index, &(address, bytes, flags)) in descriptors.iter().enumerate() {
        let raw = match packed {
            // Wrap counter 1: AVAIL set, USED clear.
            true => descriptor(address, bytes, 5, flags | 1 << 7),
            false => descriptor(address, bytes, flags, index as u16 + 1),
        };
        guest.write(RING + 16 * index as u64, &raw);
    }
    if !packed {
        driver.offer(&guest, 0);
    }
    // A table at DATA: header, data, status.
    for (index, (bytes, write)) in [(16, 0), (512, 2), (1, 2)].into_iter().enumerate() {
        let (next, id) = if index < 2 { (1, index as u16 + 1) } else { (0, 0) };
        let raw = match packed {
            true => descriptor(DATA + 0x1000, bytes, 0, write),
            false => descriptor(DATA + 0x1000, bytes, write | next, id),
        };
        guest.write(DATA + 16 * index as u64, &raw);
    }
    let mut device = RingDevice::new(&guest, &driver.setup);
    let head = device.pop()?;
    Ok((device.chain, head))
}

#[test]
fn rules_for_chains() {
    const N: u16 = 1;
    const W: u16 = 2;
    const I: u16 = 4;
    for packed in [false, true] {
        println!("packed {packed}");
        let chain = |descriptors: &[_]| handmade(packed, descriptors, true);
        let error = |descriptors: &[_]| chain(descriptors).unwrap_err();
        // An indirect table, with the flag WRITE, which is ignored, and after direct descriptors.
        for before in 0..2 {
            let direct = [(DATA + 0x2000, 8, N)];
            let mut all = direct[..before].to_vec();
            all.push((DATA, 48, I | W));
            let (chain, head) = chain(&all).unwrap();
            assert_eq!((chain.readable().len(), chain.writable().len()), (1 + before, 2));
            let (id, entries) = if packed { (5, 1 + before as u16) } else { (0, 1) };
            assert_eq!(head.map(|head| (head.id(), head.entries())), Some((id, entries)));
        }
        assert_eq!(error(&[(DATA, 48, I | N), (DATA, 1, W)]), RingError::Indirect { head: 0 });
        assert_eq!(handmade(packed, &[(DATA, 48, I)], false).unwrap_err(), RingError::Indirect { head: 0 });
        for bytes in [0, 8, 47, 49] {
            assert_eq!(error(&[(DATA, bytes, I)]), RingError::IndirectTable { head: 0, address: DATA, bytes });
        }
        // The first lies with its first entry in memory: in a split ring, where that entry ends the chain, all is well.
        for address in [0x50_0000 - 16, 0x80_0000, u64::MAX - 16, u64::MAX - 47].into_iter().skip(usize::from(!packed))
        {
            let got = error(&[(address, 48, I)]);
            assert_eq!(got, RingError::IndirectTable { head: 0, address, bytes: 48 });
        }
        assert_eq!(error(&[(DATA, 1, W | N), (DATA, 1, 0)]), RingError::Order { head: 0 });
        // Empty descriptors say nothing, even in the wrong place.
        let (empty, _) = chain(&[(DATA, 0, W | N), (DATA, 16, N), (DATA, 0, N), (DATA, 1, W)]).unwrap();
        assert_eq!((empty.readable().len(), empty.writable().len()), (1, 1));
    }
}

#[test]
fn tables_at_odd_places_and_across_regions_are_read() {
    for packed in [false, true] {
        let guest = guest();
        let mut driver = Driver::new(&guest, packed, 8, RING, false);
        let mut device = RingDevice::new(&guest, &driver.setup);
        for table in [0x3f_fff8, 0x3f_fff1, 0x30_0001, 0x30_0008] {
            let chain = [readable(DATA, 16), writable(DATA + 512, 512), writable(DATA + 5, 1)];
            driver.add(&guest, &chain, Some(table)).unwrap();
            device.pop().unwrap().unwrap();
            assert_eq!(device.chain.readable(), [Buffer { address: DATA, bytes: 16 }]);
            assert_eq!(device.chain.writable()[1], Buffer { address: DATA + 5, bytes: 1 });
        }
    }
}

#[test]
fn loops_and_wild_indexes_are_found() {
    // Split: 0 -> 1 -> 0, and a link outside of the table.
    for (link, expected) in [(0, RingError::Loop { head: 0 }), (8, RingError::DescriptorIndex { index: 8, size: 8 })] {
        let guest = guest();
        let mut driver = Driver::new(&guest, false, 8, RING, false);
        guest.write(RING, &descriptor(DATA, 1, 1, 1));
        guest.write(RING + 16, &descriptor(DATA, 1, 1, link));
        driver.offer(&guest, 0);
        let mut device = RingDevice::new(&guest, &driver.setup);
        assert_eq!(device.pop(), Err(expected));
        assert_eq!(device.pop(), Err(expected), "and it stays so");
    }
    // The same in an indirect table.
    for (link, expected) in [(0, RingError::Loop { head: 0 }), (3, RingError::DescriptorIndex { index: 3, size: 3 })] {
        let guest = guest();
        let mut driver = Driver::new(&guest, false, 8, RING, false);
        guest.write(RING, &descriptor(DATA, 48, 4, 0));
        guest.write(DATA, &descriptor(DATA, 1, 1, 1));
        guest.write(DATA + 16, &descriptor(DATA, 0, 1, link));
        driver.offer(&guest, 0);
        assert_eq!(RingDevice::new(&guest, &driver.setup).pop(), Err(expected));
    }
    // A head outside of the table.
    let guest = guest();
    let mut driver = Driver::new(&guest, false, 8, RING, false);
    driver.offer(&guest, 8);
    let mut device = RingDevice::new(&guest, &driver.setup);
    assert_eq!(device.pop(), Err(RingError::DescriptorIndex { index: 8, size: 8 }));
    // An available index that has jumped.
    let driver = Driver::new(&guest, false, 8, RING, false);
    guest.write_u16(driver.setup.driver + 2, 9);
    let mut device = RingDevice::new(&guest, &driver.setup);
    assert_eq!(device.pop(), Err(RingError::AvailableIndex { from: 0, to: 9, size: 8 }));
    // Packed: NEXT all around the ring.
    let driver = Driver::new(&guest, true, 8, RING, false);
    for index in 0..8 {
        guest.write(RING + 16 * index, &descriptor(DATA, 1, 0, 1 | 1 << 7));
    }
    assert_eq!(RingDevice::new(&guest, &driver.setup).pop(), Err(RingError::Loop { head: 0 }));
}

/// Empty descriptors say nothing, and yet take their time: a ring may be large, and each of its chains all of it.
#[test]
fn chains_of_empty_descriptors_have_a_limit() {
    const SIZE: u16 = 4096;
    for packed in [false, true] {
        let guest = Guest::new(&[(0, 0x40_0000)], None);
        let mut driver = Driver::new(&guest, packed, SIZE, 0x1_0000, false);
        for index in 0..SIZE {
            let raw = match packed {
                false => descriptor(DATA, 0, 1, (index + 1) % SIZE),
                true => descriptor(DATA, 0, 0, 1 | 1 << 7),
            };
            guest.write(driver.setup.descriptors + 16 * u64::from(index), &raw);
        }
        if !packed {
            driver.offer(&guest, 0);
        }
        assert_eq!(
            RingDevice::new(&guest, &driver.setup).pop(),
            Err(RingError::TooLong { head: 0 }),
            "packed {packed}"
        );
    }
}

#[test]
fn long_chains_are_taken_up_to_the_limit() {
    for packed in [false, true] {
        let guest = guest();
        let mut driver = Driver::new(&guest, packed, 8, RING, false);
        let mut device = RingDevice::new(&guest, &driver.setup);
        let chain = vec![writable(DATA, 512); MAX_CHAIN];
        driver.add(&guest, &chain, Some(0x10_0000)).unwrap();
        device.pop().unwrap().unwrap();
        assert_eq!(device.chain.writable().len(), MAX_CHAIN);
        driver.add(&guest, &vec![writable(DATA, 512); MAX_CHAIN + 1], Some(0x20_0000)).unwrap();
        let head = if packed { 1 } else { device_head(&guest, &driver) };
        assert_eq!(device.pop(), Err(RingError::TooLong { head }));
        // A chain may use the whole ring, and an indirect chain its whole table.
        for table in [None, Some(0x30_0000)] {
            let mut driver = Driver::new(&guest, packed, 8, RING, false);
            let mut device = RingDevice::new(&guest, &driver.setup);
            driver.add(&guest, &[writable(DATA, 512); 8], table).unwrap();
            assert!(device.pop().unwrap().is_some(), "table {table:?}");
            assert_eq!(device.chain.writable().len(), 8);
        }
        // Empty descriptors do not hide a long walk.
        let mut driver = Driver::new(&guest, packed, 8, RING, false);
        let mut device = RingDevice::new(&guest, &driver.setup);
        driver.add(&guest, &vec![writable(DATA, 0); MAX_CHAIN + 2], Some(0x20_0000)).unwrap();
        device.pop().unwrap_err();
    }
}

/// The head the split driver offered last.
fn device_head(guest: &Guest, driver: &Driver) -> u16 {
    let index = guest.read_u16(driver.setup.driver + 2).wrapping_sub(1) % driver.setup.size;
    guest.read_u16(driver.setup.driver + 4 + 2 * u64::from(index))
}

/// Our split ring against the model in virtio-queue, which others wrote.
#[test]
fn the_split_ring_agrees_with_virtio_queue() {
    use virtio_queue::mock::MockSplitQueue;
    use virtio_queue::{Queue, QueueOwnedT, desc::RawDescriptor, desc::split::Descriptor as SplitDescriptor};
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    let seed = 0xfeed;
    println!("seed {seed:#x}");
    let mut random = Random::new(seed);
    for _ in 0..200 {
        let theirs: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x40_0000)]).unwrap();
        let mock = MockSplitQueue::create(&theirs, GuestAddress(RING), 16);
        let mut descriptors = Vec::new();
        for _ in 0..1 + random.below(5) {
            // A chain of some readable, then some writable pieces.
            let (reads, writes) = (random.below(3), 1 + random.below(3));
            if descriptors.len() + (reads + writes) as usize > 16 {
                break;
            }
            for k in 0..reads + writes {
                let flags = if k >= reads { 2 } else { 0 } | if k + 1 < reads + writes { 1 } else { 0 };
                let next = descriptors.len() as u16 + 1;
                let at = 0x10_0000 + 0x1000 * random.below(64);
                descriptors.push(RawDescriptor::from(SplitDescriptor::new(
                    at,
                    1 + random.below(9000) as u32,
                    flags,
                    next,
                )));
            }
        }
        mock.build_multiple_desc_chains(&descriptors).unwrap();
        let mut queue: Queue = mock.create_queue().unwrap();
        let guest = Guest::new(&[(0, 0x40_0000)], None);
        let mut raw = vec![0; 0x1_0000];
        theirs.read_slice(&mut raw, GuestAddress(0)).unwrap();
        guest.write(0, &raw);
        let setup = RingSetup {
            packed: false,
            size: 16,
            event_idx: false,
            indirect: false,
            descriptors: mock.desc_table_addr().0,
            driver: mock.avail_addr().0,
            device: mock.used_addr().0,
            base: 0,
        };
        let mut device = RingDevice::new(&guest, &setup);
        for expected in queue.iter(&theirs).unwrap() {
            let head = device.pop().unwrap().expect("as many chains as theirs");
            assert_eq!(head.id(), expected.head_index());
            let side = |write: bool| -> Vec<Buffer> {
                let some = expected.clone().filter(|d| d.is_write_only() == write);
                some.map(|d| Buffer { address: d.addr().0, bytes: d.len() }).collect()
            };
            assert_eq!(device.chain.readable(), side(false));
            assert_eq!(device.chain.writable(), side(true));
        }
        assert_eq!(device.pop().unwrap(), None);
    }
}
