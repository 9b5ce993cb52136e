//! The write mode.

use super::*;

#[test]
fn writes_are_forced_through_unless_a_flush_can_follow() {
    for (flush, writeback, cache, forced) in [
        (true, true, true, false),
        (true, false, true, true),
        (false, true, true, true),
        (false, false, true, true),
        (false, false, false, false),
        (true, false, false, false),
    ] {
        let mut disk = crate::blk::request::tests::disk(9, 100);
        disk.features = if flush { 1 << VIRTIO_BLK_F_FLUSH } else { 0 };
        disk.writeback = Arc::new(AtomicBool::new(writeback));
        disk.namespace.volatile_write_cache = cache;
        assert_eq!(disk.force_unit_access(), forced, "flush {flush}, writeback {writeback}, cache {cache}");
    }
}
