//! What other tests use, and the write mode.

use super::*;

/// A namespace that can do everything.
pub(crate) fn namespace(block_shift: u8, blocks: u64) -> Namespace {
    let block = 1u32 << block_shift;
    Namespace {
        id: 1,
        blocks,
        block_shift,
        boundary_blocks: 0,
        physical_block_bytes: block,
        write_alignment_bytes: block,
        optimal_io_bytes: 0,
        discard_granularity_bytes: block,
        discard_alignment_bytes: block,
        max_discard_ranges: 256,
        max_discard_range_blocks: u32::MAX,
        max_discard_blocks: u64::MAX,
        max_write_zeroes_blocks: 65536,
        max_verify_blocks: 65536,
        volatile_write_cache: true,
        discard: true,
        write_zeroes: true,
        write_zeroes_deallocates: true,
        discard_reads_zeroes: true,
        compare: true,
        verify: true,
        read_only: false,
        eui64: None,
        nguid: None,
        uuid: None,
    }
}

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
        let mut disk = crate::request::tests::disk(9, 100);
        disk.features = if flush { 1 << VIRTIO_BLK_F_FLUSH } else { 0 };
        disk.writeback = AtomicBool::new(writeback);
        disk.namespace.volatile_write_cache = cache;
        assert_eq!(disk.force_unit_access(), forced, "flush {flush}, writeback {writeback}, cache {cache}");
    }
}
