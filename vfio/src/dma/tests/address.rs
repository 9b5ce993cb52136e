//! Which addresses are given, by what the IOMMU's pages are and by what was given before.

use std::sync::Arc;

use super::{DmaSpace, memory};
use crate::Error;
use crate::backend::fake::FakeBackend;

fn space(backend: FakeBackend) -> (Arc<FakeBackend>, DmaSpace) {
    let backend = Arc::new(backend);
    (backend.clone(), DmaSpace::new(backend, "fake".into()))
}

#[test]
fn the_pages_of_the_iommu_are_kept_to() {
    const PAGE: u64 = 64 << 10;
    let (backend, space) = space(FakeBackend::with_pages(PAGE));
    assert_eq!(space.ranges()[0].start, PAGE, "the first page is left out, and whole");
    // Refused here, by name, and not by whoever maps.
    let guest = memory(1 << 20);
    for (offset, host, bytes) in [(4096, 0, 1 << 16), (0, 4096, 1 << 16), (0, 0, 4096), (0, 0, (1 << 16) + 4096)] {
        let host = guest.as_ptr().wrapping_add(host);
        // SAFETY: it is refused, so that nothing is mapped.
        let error = unsafe { space.map_raw(guest.file(), offset, host, bytes) }.unwrap_err();
        assert!(matches!(&error, Error::BadMemory { reason } if reason.contains("0x10000")), "{error}");
    }
    assert_eq!(backend.mapped(), []);
    // What is made of such pages is mapped at such addresses.
    let host = guest.as_ptr().wrapping_add(guest.as_ptr().align_offset(PAGE as usize));
    for offset in [0, PAGE, 7 * PAGE] {
        // SAFETY: the device is none that reaches memory, and `guest` lives longer than the mapping.
        let mapping = unsafe { space.map_raw(guest.file(), offset, host, 3 * PAGE as usize) }.unwrap();
        assert_eq!(backend.mapped(), [(mapping.iova(), 3 * PAGE)]);
    }
}

#[test]
fn what_was_handed_out_before_is_left_alone() {
    let (_, before) = space(FakeBackend::default());
    let old: Vec<_> = (0..5).map(|_| before.map(memory(3 << 20)).unwrap()).collect();
    let old: Vec<_> = old.iter().map(|mapping| (mapping.iova(), mapping.iova() + mapping.len() as u64)).collect();
    let handed_out = before.handed_out();
    drop(before);

    // The device is opened anew: without a word it is given the same addresses, which shows that the test means something.
    let (_, careless) = space(FakeBackend::default());
    assert_eq!(careless.map(memory(3 << 20)).unwrap().iova(), old[0].0);

    let (_, after) = space(FakeBackend::default());
    after.keep_clear_of(handed_out);
    let new: Vec<_> = (0..5).map(|_| after.map(memory(3 << 20)).unwrap()).collect();
    let buffer = after.allocate(4096).unwrap();
    let starts = new.iter().map(|mapping| mapping.iova()).chain([buffer.iova()]);
    for start in starts {
        assert!(old.iter().all(|(_, end)| start >= *end), "{start:#x} was handed out before: {old:x?}");
    }

    // Beyond the middle of the addresses the first ones have their turn again.
    let far = after.map(memory(1 << 30)).and_then(|first| Ok((first, after.map(memory(1 << 30))?))).unwrap();
    let handed_out = after.handed_out();
    drop((far, new, buffer));
    let (_, again) = space(FakeBackend::default());
    again.keep_clear_of(handed_out);
    assert_eq!(again.map(memory(3 << 20)).unwrap().iova(), old[0].0);
}
