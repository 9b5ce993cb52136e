//! What tests share, this crate's and those of others (feature `testing`).

use crate::Namespace;

/// A namespace with every command and no limits but the specification's: `blocks` logical blocks of `1 << block_shift` bytes.
pub fn namespace(block_shift: u8, blocks: u64) -> Namespace {
    let block = 1u32 << block_shift;
    Namespace {
        id: 1,
        blocks,
        block_shift,
        boundary_blocks: 0,
        physical_block_bytes: block,
        write_granularity_bytes: block,
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
