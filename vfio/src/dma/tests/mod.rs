//! Mapping and giving back, on a device that notes what is asked of it.

mod address;

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use super::*;
use crate::backend::fake::FakeBackend;

const MIB: u64 = 1 << 20;

fn space() -> (Arc<FakeBackend>, DmaSpace) {
    let backend = Arc::new(FakeBackend::default());
    (backend.clone(), DmaSpace::new(backend, "fake".into()))
}

fn memory(bytes: usize) -> Arc<SharedMemory> {
    Arc::new(SharedMemory::create(bytes).unwrap())
}

#[test]
fn what_leaves_this_crate_may_be_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    fn sent<T: Send>() {}
    shared::<DmaSpace>();
    shared::<DmaMapping>();
    shared::<DmaBuffer>();
    shared::<DmaSlice<AtomicU64>>();
    shared::<SharedMemory>();
    shared::<crate::Device>();
    shared::<crate::Bar>();
    sent::<crate::Doorbell>();
}

#[test]
fn address_0_is_never_given_out() {
    let (_, space) = space();
    assert_eq!(space.ranges()[0].start, 4096);
    assert!(space.map(memory(4096)).unwrap().iova() > 0);
}

#[test]
fn a_mapping_ends_when_it_is_dropped_and_its_addresses_are_used_again() {
    let (backend, space) = space();
    let first = space.map(memory(8192)).unwrap();
    let iova = first.iova();
    assert_eq!(backend.mapped(), [(iova, 8192)]);
    drop(first);
    assert_eq!(backend.mapped(), []);
    assert_eq!(space.map(memory(8192)).unwrap().iova(), iova);
}

#[test]
fn addresses_are_congruent_to_the_offset_in_the_file() {
    let (_, space) = space();
    let file = SharedMemory::create(8 * MIB as usize).unwrap();
    for offset in [0, 4096, MIB, 2 * MIB, 5 * MIB - 4096] {
        let part = SharedMemory::from_file(file.file().try_clone().unwrap(), offset, 3 << 20).unwrap();
        let mapping = space.map(Arc::new(part)).unwrap();
        assert_eq!(mapping.iova() % (2 * MIB), offset % (2 * MIB));
    }
}

#[test]
fn long_memory_is_laid_out_for_the_largest_pages_while_it_can_be() {
    let (_, space) = space();
    let small = space.map(memory(4096)).unwrap();
    // Nothing touches the memory: it takes no room.
    let first = space.map(memory(0x6000_0000)).unwrap();
    assert_eq!(first.iova(), 1 << 30);
    // FakeBackend has 4 GiB of addresses: of what is left, this fits only where it is not a multiple of 1 GiB.
    let second = space.map(memory(0x5000_0000)).unwrap();
    assert_eq!(second.iova(), 0xa000_0000);
    drop((small, first, second));
}

#[test]
fn memory_is_laid_out_for_the_largest_page_it_has_room_for() {
    let (_, space) = space();
    // Nothing touches the memory: it takes no room. Something small comes first each time, so that nothing fits by chance.
    for (bytes, page) in [(512, 512), (600, 512), (32, 32), (500, 32), (31, 2), (2, 2), (1, 2)] {
        let small = space.map(memory(4096)).unwrap();
        let file = SharedMemory::create((bytes + 6) << 20).unwrap();
        let part = SharedMemory::from_file(file.file().try_clone().unwrap(), 6 << 20, bytes << 20).unwrap();
        let mapping = space.map(Arc::new(part)).unwrap();
        assert_eq!(mapping.iova() % (page * MIB), 6 * MIB % (page * MIB), "{bytes} MiB at {:#x}", mapping.iova());
        drop((small, mapping));
    }
}

#[test]
fn a_refused_mapping_takes_no_addresses() {
    let (backend, space) = space();
    backend.refuse_map(true);
    assert!(space.map(memory(3 << 30)).is_err());
    assert!(space.allocate(4096).is_err());
    backend.refuse_map(false);
    assert!(space.map(memory(3 << 30)).is_ok());
}

#[test]
fn addresses_the_device_may_still_use_are_not_used_again() {
    let (backend, space) = space();
    let first = space.map(memory(4096)).unwrap();
    let iova = first.iova();
    backend.refuse_unmap(true);
    drop(first);
    backend.refuse_unmap(false);
    assert_ne!(space.map(memory(4096)).unwrap().iova(), iova);
}

#[test]
fn no_addresses_left_is_an_error() {
    let (_, space) = space();
    let _most = space.map(memory(3 << 30)).unwrap();
    let error = space.map(memory(2 << 30)).unwrap_err();
    assert!(matches!(error, Error::NoDmaAddresses { .. }), "{error}");
}

#[test]
fn memory_of_others_leaves_addresses_for_the_driver() {
    let (_, space) = space();
    // FakeBackend has 4 GiB of addresses. Nothing touches the memory: it takes no room.
    let guest = memory(1 << 30);
    let mut mappings = Vec::new();
    let error = loop {
        // SAFETY: `guest` is a shared mapping of its file, and lives longer than the mappings.
        match unsafe { space.map_raw(guest.file(), 0, guest.as_ptr(), guest.len()) } {
            Ok(mapping) => mappings.push(mapping),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, Error::NoDmaAddresses { .. }), "{error}");
    assert!(mappings.len() >= 2, "{}", mappings.len());
    let queues: Vec<_> = (0..100).map(|_| space.allocate(2 << 20).unwrap()).collect();
    drop((queues, mappings));
}

#[test]
fn limits_say_what_could_be_mapped() {
    let (_, space) = space();
    let limits = space.limits();
    // FakeBackend has 4 GiB of addresses, of which page 0 and the last eighth are not for others.
    let most = (4u64 << 30) - 4096 - ((4 << 30) - 4096) / 8;
    let check =
        |offset, host: usize, bytes: u64| limits.check(offset, std::ptr::without_provenance(host), bytes as usize);
    assert!(check(4096, 8192, most & !0xfff).is_ok());
    for (offset, host, bytes) in [(1, 0, 4096), (0, 1, 4096), (0, 0, 4095), (0, 0, 0), (0, 0, (most & !0xfff) + 4096)] {
        assert!(matches!(check(offset, host, bytes), Err(Error::BadMemory { .. })), "{offset} {host} {bytes:#x}");
    }
}

#[test]
fn memory_that_is_not_made_of_pages_is_refused() {
    let (_, space) = space();
    let memory = memory(8192);
    for (offset, host, bytes) in [(1, 0, 4096), (0, 1, 4096), (0, 0, 4095), (0, 0, 0)] {
        let host = memory.as_ptr().wrapping_add(host);
        // SAFETY: it is refused, so that nothing is mapped.
        let result = unsafe { space.map_raw(memory.file(), offset, host, bytes) };
        assert!(matches!(result, Err(Error::BadMemory { .. })), "{offset} {bytes}");
    }
}

#[test]
fn small_buffers_share_one_mapping() {
    let (backend, space) = space();
    let buffers: Vec<_> = (0..100).map(|_| space.allocate(100).unwrap()).collect();
    assert_eq!(backend.mapped().len(), 1);
    let mut addresses: Vec<_> = buffers.iter().map(DmaBuffer::iova).collect();
    addresses.sort();
    assert!(addresses.windows(2).all(|pair| pair[0] + 4096 <= pair[1]), "{addresses:x?}");
    assert!(addresses.iter().all(|address| address % 4096 == 0));
    drop(buffers);
    assert_eq!(backend.mapped(), [], "memory without buffers is given back");
}

#[test]
fn large_buffers_are_contiguous() {
    let (backend, space) = space();
    let small = space.allocate(4096).unwrap();
    let large = space.allocate(5 << 20).unwrap();
    assert_eq!(backend.mapped().len(), 2);
    let (start, bytes) = backend.mapped().into_iter().find(|(start, _)| *start == large.iova()).unwrap();
    assert_eq!((start, bytes), (large.iova(), 6 << 20));
    assert!(large.slice::<AtomicU8>(0, 5 << 20).is_some());
    drop(small);
}

#[test]
fn many_buffers_take_few_mappings() {
    let (backend, space) = space();
    // As of 64 queue pairs with their lists, and of the copies of requests: 198 MiB.
    let buffers: Vec<_> =
        (0..64).flat_map(|_| [1 << 20, (2 << 20) + 4096].map(|b| space.allocate(b).unwrap())).collect();
    assert!(backend.mapped().len() <= 10, "{}", backend.mapped().len());
    let (taken, used) = (backend.mapped().iter().map(|(_, bytes)| bytes).sum::<u64>(), 198 * MIB);
    assert!(taken <= 2 * used, "{taken} bytes for {used}");
    drop(buffers);
    assert_eq!(backend.mapped(), []);
}

#[test]
fn memory_that_is_not_on_the_devices_node_is_told_once() {
    let (backend, space) = space();
    backend.set_numa_node(Some(1000));
    let buffers: Vec<_> = (0..2).map(|_| space.allocate(2 << 20).unwrap()).collect();
    assert!(space.inner.pool.is_told());
    drop(buffers);
    let (_, space) = self::space();
    let _buffer = space.allocate(4096).unwrap();
    assert!(!space.inner.pool.is_told(), "a device whose node is not known");
}

#[test]
fn a_device_that_takes_only_small_pieces_gets_them() {
    let (backend, space) = space();
    backend.refuse_more_than(2 * MIB);
    let buffers: Vec<_> = (0..5).map(|_| space.allocate(2 << 20).unwrap()).collect();
    assert_eq!(backend.mapped().len(), 5);
    assert!(space.allocate(3 << 20).is_err());
    drop(buffers);
}

#[test]
fn a_buffer_is_zero_even_where_another_one_was() {
    let (_, space) = space();
    let _keeps_the_chunk = space.allocate(4096).unwrap();
    let first = space.allocate(8192).unwrap();
    let iova = first.iova();
    let words = first.slice::<AtomicU64>(0, 1024).unwrap();
    words.iter().for_each(|word| word.store(u64::MAX, Ordering::Relaxed));
    drop(first);
    let other = space.allocate(8192).unwrap();
    assert_ne!(other.iova(), iova, "a slice keeps its buffer");
    drop(words);
    let again = space.allocate(8192).unwrap();
    assert_eq!(again.iova(), iova);
    assert!(again.slice::<AtomicU64>(0, 1024).unwrap().iter().all(|word| word.load(Ordering::Relaxed) == 0));
}

#[test]
fn an_abandoned_buffer_is_not_used_again_and_goes_with_its_mapping() {
    let (backend, space) = space();
    let keeps_the_chunk = space.allocate(4096).unwrap();
    let first = space.allocate(8192).unwrap();
    let iova = first.iova();
    let slice = first.slice::<AtomicU64>(0, 1).unwrap();
    first.abandon();
    drop((first, slice));
    let other = space.allocate(8192).unwrap();
    assert!(other.iova() >= iova + 8192, "{:#x}, abandoned was {iova:#x}", other.iova());
    assert_eq!(backend.mapped().len(), 1);
    drop((other, keeps_the_chunk));
    assert_eq!(backend.mapped(), []);
}

#[test]
fn slices_of_a_buffer_stay_inside_it() {
    let (_, space) = space();
    let buffer = space.allocate(4096).unwrap();
    let _neighbour = space.allocate(4096).unwrap();
    assert_eq!(buffer.slice::<AtomicU64>(8, 511).unwrap().len(), 511);
    assert_eq!(buffer.slice::<AtomicU64>(8, 511).unwrap().iova(), buffer.iova() + 8);
    assert!(buffer.slice::<AtomicU64>(8, 512).is_none());
    assert!(buffer.slice::<AtomicU64>(4, 1).is_none());
    assert!(buffer.slice::<AtomicU64>(usize::MAX - 7, 1).is_none());
    assert!(buffer.slice::<[AtomicU64; 8]>(0, 64).is_some());
    assert!(buffer.write(4090, &[1; 6]).is_some() && buffer.write(4090, &[1; 7]).is_none());
    let mut end = [0; 6];
    assert!(buffer.read(4090, &mut end).is_some() && end == [1; 6]);
    assert!(buffer.read(usize::MAX, &mut end).is_none());
}

#[test]
fn buffers_can_be_had_from_several_threads() {
    let (_, space) = space();
    std::thread::scope(|scope| {
        for mark in 1..=4u64 {
            let space = space.clone();
            scope.spawn(move || {
                for round in 0..200 {
                    let buffer = space.allocate(4096 * (1 + round % 3)).unwrap();
                    let words = buffer.slice::<AtomicU64>(0, buffer.len() / 8).unwrap();
                    words.iter().for_each(|word| word.store(mark, Ordering::Relaxed));
                    assert!(words.iter().all(|word| word.load(Ordering::Relaxed) == mark));
                }
            });
        }
    });
}

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config::with_cases(32))]

    /// Whatever is taken and given back: buffers do not overlap, are zero when new, and keep what was written.
    #[test]
    fn buffers_keep_to_themselves(steps in proptest::collection::vec((1usize..300_000, 0usize..8, 0u8..3), 1..60)) {
        let (backend, space) = space();
        let mut buffers: Vec<(DmaBuffer, u64)> = Vec::new();
        for (mark, (bytes, which, kind)) in (1u64..).zip(steps) {
            if kind == 0 && !buffers.is_empty() {
                buffers.swap_remove(which % buffers.len());
                continue;
            }
            let buffer = space.allocate(bytes).unwrap();
            let words = buffer.slice::<AtomicU64>(0, buffer.len() / 8).unwrap();
            proptest::prop_assert!(buffer.len() >= bytes && buffer.iova() % 4096 == 0);
            proptest::prop_assert!(words.iter().all(|word| word.load(Ordering::Relaxed) == 0));
            words.iter().for_each(|word| word.store(mark, Ordering::Relaxed));
            for (other, _) in &buffers {
                let apart = other.iova() + other.len() as u64 <= buffer.iova()
                    || buffer.iova() + buffer.len() as u64 <= other.iova();
                proptest::prop_assert!(apart);
            }
            buffers.push((buffer, mark));
        }
        for (buffer, mark) in &buffers {
            let words = buffer.slice::<AtomicU64>(0, buffer.len() / 8).unwrap();
            proptest::prop_assert!(words.iter().all(|word| word.load(Ordering::Relaxed) == *mark));
        }
        buffers.clear();
        proptest::prop_assert_eq!(backend.mapped(), []);
    }
}
