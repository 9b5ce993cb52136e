//! Tables of regions and views of them, without a device.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use super::*;
use crate::virtio::ring::model::{Guest, IOVA_OFFSET, Random, USER_OFFSET};
use nvme_driver::Segment;

fn region(guest_address: u64, bytes: u64) -> RegionDescription {
    RegionDescription { guest_address, bytes, user_address: guest_address + USER_OFFSET, file_offset: 0 }
}

fn file(bytes: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(bytes).unwrap();
    file
}

fn add(table: &GuestMemory, region: RegionDescription, file_bytes: u64) -> Result<GuestMemory, MemoryError> {
    table.with_region_without_device(region, file(file_bytes), IOVA_OFFSET)
}

#[test]
fn regions_that_make_no_sense_are_refused() {
    let empty = GuestMemory::new();
    let one = add(&empty, region(0x10_0000, 0x10_0000), 0x10_0000).unwrap();
    assert!(matches!(add(&empty, region(0, 0), 0x1000), Err(MemoryError::Empty(_))));
    for (guest, user, bytes) in [(u64::MAX - 0xfff, 0, 0x1000), (0, u64::MAX - 0xfff, 0x1000), (0, 0, 1 << 63)] {
        let bad = RegionDescription { guest_address: guest, bytes, user_address: user, file_offset: 0 };
        assert!(matches!(add(&empty, bad, 0x1000), Err(MemoryError::Overflow(_))), "{bad}");
    }
    for bad in [region(0x800, 0x1000), RegionDescription { file_offset: 8, ..region(0, 0x1000) }] {
        assert!(matches!(add(&empty, bad, 0x10000), Err(MemoryError::Unaligned(_))), "{bad}");
    }
    for (guest, bytes) in [(0x10_0000, 0x1000), (0xf_f000, 0x2000), (0x1f_f000, 0x2000), (0, 0x100_0000)] {
        let apart_for_the_user = RegionDescription { user_address: 0x1000, ..region(guest, bytes) };
        assert!(matches!(add(&one, apart_for_the_user, bytes), Err(MemoryError::Overlap { .. })));
        let apart_for_the_guest = RegionDescription { guest_address: 0x1000_0000, ..region(guest, bytes) };
        assert!(matches!(add(&one, apart_for_the_guest, bytes), Err(MemoryError::Overlap { .. })));
    }
    // Neighbours do not overlap.
    let two = add(&one, region(0x20_0000, 0x1000), 0x1000).unwrap();
    let three = add(&two, region(0xf_f000, 0x1000), 0x1000).unwrap();
    let sorted: Vec<u64> = three.regions().map(|r| r.guest_address).collect();
    assert_eq!(sorted, [0xf_f000, 0x10_0000, 0x20_0000]);
    assert_eq!((one.region_count(), two.region_count()), (1, 2), "a table does not change");
}

#[test]
fn a_region_may_end_within_a_page() {
    let table = add(&GuestMemory::new(), region(0x1000, 0x1d90), 0x1d90).unwrap();
    assert!(table.find(0x1000 + 0x1d8f).is_some());
    assert!(table.find(0x1000 + 0x1d90).is_none());
}

#[test]
fn a_file_has_to_be_as_long_as_its_region() {
    let empty = GuestMemory::new();
    for (offset, length) in [(0, 0x1fff), (0, 0), (0x1000, 0x2fff), (0x7fff_ffff_ffff_f000, 0x10000)] {
        let bad = RegionDescription { file_offset: offset, ..region(0, 0x2000) };
        match add(&empty, bad, length) {
            Err(MemoryError::FileTooShort { file_bytes, .. }) => assert_eq!(file_bytes, length),
            other => panic!("{offset:#x} {length:#x}: {other:?}"),
        }
    }
    add(&empty, RegionDescription { file_offset: 0x1000, ..region(0, 0x2000) }, 0x3000).unwrap();
}

#[test]
fn an_offset_into_the_file_is_honoured() {
    use std::os::unix::fs::FileExt;
    let file = file(0x4000);
    file.write_all_at(b"found", 0x3010).unwrap();
    let region = RegionDescription { file_offset: 0x3000, ..region(0x5000, 0x1000) };
    let table = GuestMemory::new().with_region_without_device(region, file, IOVA_OFFSET).unwrap();
    let mut found = [0; 5];
    GuestView::new(Arc::new(table)).read(0x5010, &mut found).unwrap();
    assert_eq!(&found, b"found");
}

#[test]
fn regions_are_removed_by_their_addresses() {
    let table = add(&GuestMemory::new(), region(0, 0x1000), 0x1000).unwrap();
    let table = add(&table, region(0x1000, 0x1000), 0x1000).unwrap();
    for wrong in [region(0x2000, 0x1000), region(0, 0x2000), RegionDescription { user_address: 1, ..region(0, 0x1000) }]
    {
        assert!(matches!(table.without_region(&wrong), Err(MemoryError::NoSuchRegion(_))));
    }
    let other_offset = RegionDescription { file_offset: 0x5000, ..region(0, 0x1000) };
    let rest = table.without_region(&other_offset).unwrap();
    assert_eq!(rest.regions().copied().collect::<Vec<_>>(), [region(0x1000, 0x1000)]);
    assert!(table.is_superset_of(&rest) && !rest.is_superset_of(&table));
    assert!(rest.without_region(&region(0x1000, 0x1000)).unwrap().region_count() == 0);
}

#[test]
fn a_superset_has_the_same_mappings_not_just_the_same_addresses() {
    let table = add(&GuestMemory::new(), region(0, 0x1000), 0x1000).unwrap();
    let alike = add(&GuestMemory::new(), region(0, 0x1000), 0x1000).unwrap();
    assert!(!alike.is_superset_of(&table));
    let more = add(&table, region(0x8000, 0x1000), 0x1000).unwrap();
    assert!(more.is_superset_of(&table) && table.is_superset_of(&GuestMemory::new()));
    let mut view = GuestView::new(Arc::new(table));
    assert!(view.write_byte(0x8000, 1).is_err());
    assert!(!view.extend(Arc::new(alike)));
    assert!(view.extend(Arc::new(more)));
    view.write_byte(0x8000, 1).unwrap();
}

#[test]
fn user_addresses_are_translated() {
    let table = add(&GuestMemory::new(), RegionDescription { user_address: 0x7000, ..region(0x1000, 0x1000) }, 0x1000);
    let table =
        add(&table.unwrap(), RegionDescription { user_address: 0x3000, ..region(0x9000, 0x2000) }, 0x2000).unwrap();
    for (user, guest) in [
        (0x7000, Some(0x1000)),
        (0x7fff, Some(0x1fff)),
        (0x8000, None),
        (0x2fff, None),
        (0x4001, Some(0xa001)),
        (u64::MAX, None),
    ] {
        assert_eq!(table.user_to_guest(user), guest, "{user:#x}");
    }
}

#[test]
fn hundreds_of_regions_resolve_to_what_they_are() {
    let seed = 0x0dd;
    println!("seed {seed:#x}");
    let mut random = Random::new(seed);
    // Holes of one page between some of them.
    let layout: Vec<(u64, u64)> = (0..509).map(|k| (k * 0x4000, if k % 3 == 0 { 0x3000 } else { 0x4000 })).collect();
    let guest = Guest::new(&layout, None);
    assert_eq!(guest.memory.region_count(), 509);
    let inside =
        |address: u64| address < 509 * 0x4000 && (!(address / 0x4000).is_multiple_of(3) || address % 0x4000 < 0x3000);
    let mut view = GuestView::new(guest.memory.clone());
    let mut crossings = 0;
    for _ in 0..20_000 {
        let (address, bytes) = (random.below(510 * 0x4000), 1 + random.below(0x9000) as u32);
        let mut pieces: Vec<Segment> = Vec::new();
        let result = view.segments(address, bytes, |segment| pieces.push(segment));
        let pages = (address / PAGE..=(address + u64::from(bytes) - 1) / PAGE).map(|page| page * PAGE);
        assert_eq!(result.is_ok(), pages.into_iter().all(inside), "{address:#x} {bytes:#x}");
        if result.is_ok() {
            // Without a device, addresses of all regions are congruent: the pieces have to be seamless, cut at regions.
            let mut next = address + IOVA_OFFSET;
            for piece in &pieces {
                assert_eq!(piece.iova, next);
                next += u64::from(piece.bytes);
                assert!(guest.iova_inside(piece.iova, piece.bytes.into()));
            }
            assert_eq!(next, address + IOVA_OFFSET + u64::from(bytes));
            crossings += pieces.len() - 1;
        }
    }
    assert!(crossings > 1000);
}

#[test]
fn the_end_of_a_region_is_exact_at_the_first_look_and_at_the_next() {
    let guest = Guest::new(&[(0x1000, 0x1000), (0x8000, 0x1000)], None);
    for known in [false, true] {
        let view = || {
            let mut view = GuestView::new(guest.memory.clone());
            // What is found first is remembered, and then looked at first.
            assert!(!known || view.contains(0x1000));
            view
        };
        let end = |bytes: u32| Segment { iova: 0x2000 - u64::from(bytes) + IOVA_OFFSET, bytes };
        assert_eq!(view().segment(0x1ff8, 8), Some(end(8)));
        assert_eq!(view().segment(0x1ff8, 9), None);
        assert_eq!(view().segment(0x1000, 0x1001), None);
        assert!(view().segments(0x1ff8, 9, |_| {}).is_err());
        assert!(view().read_words::<1>(0x1ff8).is_ok() && view().read_words::<2>(0x1ff8).is_err());
        assert!(view().contains(0x1fff) && !view().contains(0x2000) && !view().contains(0xfff));
        assert!(view().write_byte(0x2000, 1).is_err());
    }
}

#[test]
fn copies_and_words_agree_with_what_the_guest_sees() {
    let guest = Guest::new(&[(0x1000, 0x1000), (0x2000, 0x1000), (0x8000, 0x1000)], None);
    let mut view = GuestView::new(guest.memory.clone());
    let data: Vec<u8> = (0..0x2000).map(|k| (k * 7 % 251) as u8).collect();
    guest.write(0x1000, &data);
    for address in [0x1000, 0x1008, 0x1ff0, 0x1ff8, 0x1ffd, 0x1003, 0x2ff0] {
        let bytes = guest.read(address, 16);
        let pair = view.read_words::<2>(address).unwrap();
        assert_eq!([pair[0].to_le_bytes(), pair[1].to_le_bytes()].concat(), bytes, "{address:#x}");
    }
    for address in [0x2ff1, 0x2ff8, 0xfff, 0x8ff8, u64::MAX - 15, u64::MAX - 7, u64::MAX] {
        assert!(view.read_words::<2>(address).is_err(), "{address:#x}");
    }
    view.write(0x1ffe, b"across").unwrap();
    assert_eq!(guest.read(0x1ffe, 6), b"across");
    view.write_byte(0x2fff, 9).unwrap();
    assert_eq!(guest.read(0x2fff, 1), [9]);
    assert_eq!(view.write_byte(0x3000, 9), Err(OutsideMemory { address: 0x3000, bytes: 1 }));
    let mut long = vec![0; 0x2001];
    assert!(view.read(0x1000, &mut long).is_err());
    view.read(0x1000, &mut long[..0x2000]).unwrap();
    assert_eq!(&long[..0xffe], &data[..0xffe]);
}

#[test]
fn slices_are_aligned_and_within_one_region() {
    let guest = Guest::new(&[(0x1000, 0x1000), (0x2000, 0x1000)], None);
    let memory = &guest.memory;
    assert!(GuestSlice::<AtomicU64>::new(memory, 0x1004, 1).is_none());
    assert!(GuestSlice::<AtomicU16>::new(memory, 0x1001, 1).is_none());
    assert!(GuestSlice::<AtomicU32>::new(memory, 0x1ffc, 2).is_none());
    assert!(GuestSlice::<AtomicU64>::new(memory, 0x1000, usize::MAX / 4).is_none());
    let slice = GuestSlice::<AtomicU32>::new(memory, 0x1ff8, 2).unwrap();
    slice[1].store(7, Ordering::Relaxed);
    assert_eq!(guest.read_u32(0x1ffc), 7);
    // It keeps the region when the table is gone.
    drop(guest);
    assert_eq!(slice[1].load(Ordering::Relaxed), 7);
}

#[test]
fn a_new_table_shares_the_regions_it_has_in_common_with_the_old_one() {
    let machine = crate::datapath::lane::testing::Machine::new(nvme_sim::Config::default());
    let scope = &DmaScope::new(machine.device.dma().clone());
    let (one, two, three) = (region(0, 0x20_0000), region(0x20_0000, 0x1000), region(0x40_0000, 0x3000));
    let (first, second) = (file(0x20_0000), file(0x1000));
    let again = |file: &File| file.try_clone().unwrap();
    let old = GuestMemory::new().replaced(scope, vec![(one, again(&first)), (two, again(&second))]).unwrap();
    let all = vec![(three, file(0x3000)), (two, again(&second)), (one, again(&first))];
    let new = old.replaced(scope, all).unwrap();
    assert!(new.is_superset_of(&old) && !old.is_superset_of(&new));
    let iova = |table: &GuestMemory, address| table.find(address).map(|region| region.iova());
    assert_eq!(iova(&new, 0x1000), iova(&old, 0x1000));
    // Regions do not share I/O virtual addresses, and keep their place in large pages.
    let starts: Vec<u64> = new.regions.iter().map(|region| region.iova()).collect();
    assert!(starts.iter().all(|iova| iova.is_multiple_of(0x20_0000)), "{starts:x?}");
    // The same addresses, but another file: other memory.
    let other = old.replaced(scope, vec![(one, file(0x20_0000)), (two, again(&second))]).unwrap();
    assert!(!other.is_superset_of(&old));
    assert_ne!(iova(&other, 0), iova(&old, 0), "both are mapped at the same time");
    // One bad region, and the old table is what it was.
    assert!(matches!(
        old.replaced(scope, vec![(one, again(&first)), (one, again(&first))]),
        Err(MemoryError::Overlap { .. })
    ));
    // The last user unmaps: the addresses are there for the next one.
    let was = iova(&old, 0).unwrap();
    let region_of_old = Arc::downgrade(old.find(0).unwrap());
    drop(old);
    assert!(region_of_old.upgrade().is_some(), "the new table still has it");
    drop(new);
    assert!(region_of_old.upgrade().is_none());
    let next = GuestMemory::new().with_region(scope, one, file(0x20_0000)).unwrap();
    assert_eq!(iova(&next, 0), Some(was));
}

#[test]
fn a_device_that_leaves_and_comes_back_finds_the_same_memory() {
    let machine = crate::datapath::lane::testing::Machine::new(nvme_sim::Config::default());
    let dma = machine.device.dma();
    let scope = DmaScope::new(dma.clone());
    let table = GuestMemory::new().with_region(&scope, region(0, 0x20_0000), file(0x20_0000)).unwrap();
    let dropped = GuestMemory::new().with_region(&scope, region(0, 0x1000), file(0x1000)).unwrap();
    drop(dropped);
    let table = Arc::new(table);
    let mut view = GuestView::new(table.clone());
    let before = view.segment(0x1000, 8).unwrap().iova;
    scope.detach();
    // Its addresses are free again. Something else is there now, so that the region will have to lie elsewhere.
    let elsewhere = DmaScope::new(dma.clone());
    let other = Arc::new(GuestMemory::new().with_region(&elsewhere, region(0, 0x20_0000), file(0x20_0000)).unwrap());
    assert_eq!(GuestView::new(other.clone()).segment(0x1000, 8).unwrap().iova, before);
    // Memory that comes while the device is away is good for this process, and mapped for the device later.
    let table = Arc::new(table.with_region(&scope, region(0x40_0000, 0x1000), file(0x1000)).unwrap());
    view.write_byte(0x1000, 7).unwrap();
    assert!(view.extend(table));
    view.write_byte(0x40_0000, 8).unwrap();
    assert!(scope.attach(dma.clone()).unwrap().is_empty());
    view.forget_device();
    let iovas = [0x1000, 0x40_0000].map(|address| view.segment(address, 8).unwrap().iova);
    assert!(iovas.iter().all(|iova| *iova != 0 && *iova != before), "{iovas:x?}, before {before:x}");
    assert_ne!(iovas[0] & !0x1f_ffff, iovas[1] & !0x1f_ffff, "each has addresses of its own");
    let mut data = [0];
    view.read(0x1000, &mut data).unwrap();
    assert_eq!(data, [7], "the same memory as before");
    drop(other);
}
