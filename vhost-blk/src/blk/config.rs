//! Feature bits and configuration space of the virtio block device (virtio 1.2, section 5.2), from the drive's geometry.
//!
//! Only what the drive can do is offered.

use nvme_driver::Namespace;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

/// VIRTIO_BLK_F_SEG_MAX (5.2.3): `seg_max` says how many segments a request may have.
pub const F_SEG_MAX: u64 = 1 << 2;
/// VIRTIO_BLK_F_RO (5.2.3): the disk cannot be written.
pub const F_RO: u64 = 1 << 5;
/// VIRTIO_BLK_F_BLK_SIZE (5.2.3): `blk_size` says the logical block size.
pub const F_BLK_SIZE: u64 = 1 << 6;
/// VIRTIO_BLK_F_FLUSH (5.2.3): the flush command is there, so a write may sit in a cache.
pub const F_FLUSH: u64 = 1 << 9;
/// VIRTIO_BLK_F_TOPOLOGY (5.2.3): `topology` says the physical block and the best transfer size.
pub const F_TOPOLOGY: u64 = 1 << 10;
/// VIRTIO_BLK_F_CONFIG_WCE (5.2.3): the driver may switch between writeback and writethrough.
pub const F_CONFIG_WCE: u64 = 1 << 11;
/// VIRTIO_BLK_F_MQ (5.2.3): `num_queues` says how many virtqueues there are.
pub const F_MQ: u64 = 1 << 12;
/// VIRTIO_BLK_F_DISCARD (5.2.3).
pub const F_DISCARD: u64 = 1 << 13;
/// VIRTIO_BLK_F_WRITE_ZEROES (5.2.3).
pub const F_WRITE_ZEROES: u64 = 1 << 14;
/// VIRTIO_F_INDIRECT_DESC (6).
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX (6).
pub const F_EVENT_IDX: u64 = 1 << 29;
/// VHOST_USER_F_PROTOCOL_FEATURES (vhost-user, "Starting and stopping rings"): never seen by the guest.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// VIRTIO_F_VERSION_1 (6).
pub const F_VERSION_1: u64 = 1 << 32;
/// VIRTIO_F_RING_PACKED (6).
pub const F_RING_PACKED: u64 = 1 << 34;

/// Data segments in one request: Windows sends up to 515. More than a ring has entries is possible through an indirect
/// table only, and it is offered; a front-end that takes that offer away has to give its rings [`LONGEST_CHAIN`] entries, for
/// Linux believes `seg_max` and waits for ever for entries that the ring does not have.
pub const SEG_MAX: u32 = 1022;
/// Descriptors of a request with that many segments: header and status besides.
pub const LONGEST_CHAIN: u32 = SEG_MAX + 2;
/// Ranges in one discard or write-zeroes request, whatever the drive takes: the limit of one Dataset Management command (NVM
/// Command Set 1.0, section 3.2.3).
pub const MAX_RANGES: u32 = 256;

/// Bytes in a virtio sector, whatever the disk's block size is (5.2.4).
pub const SECTOR_BYTES: u32 = 512;
/// [`SECTOR_BYTES`] as a power of two.
pub const SECTOR_SHIFT: u8 = 9;
const _: () = assert!(1 << SECTOR_SHIFT == SECTOR_BYTES);
/// Offset of the `writeback` byte, the only one a driver may write (5.2.5).
pub const WRITEBACK_OFFSET: usize = 32;
/// A front-end may ask for as many bytes as its idea of the structure has; what we do not know reads as zero.
pub const MAX_CONFIG_BYTES: usize = 256;

/// `struct virtio_blk_config` (virtio 1.2, section 5.2.4) up to the last field we can fill; little-endian.
#[repr(C)]
#[derive(Clone, Debug, PartialEq, Eq, IntoBytes, Immutable)]
pub struct BlockConfig {
    /// Size of the disk in 512-byte sectors.
    pub capacity: U64,
    /// Not offered: a segment may have any size.
    pub size_max: U32,
    /// Data segments in one request.
    pub seg_max: U32,
    /// Not offered: cylinders, heads, sectors.
    pub geometry: U32,
    /// Logical block size in bytes.
    pub blk_size: U32,
    /// Logical blocks in a physical block, which is never written in part, as a power of two.
    pub physical_block_exp: u8,
    /// Logical blocks before the first aligned physical block: none, NVMe counts from the start of the namespace.
    pub alignment_offset: u8,
    /// Smallest transfer that performs well, in logical blocks; 65535 stands for more, too.
    pub min_io_size: U16,
    /// Best transfer size, in logical blocks; 0: not known.
    pub opt_io_size: U32,
    /// 1: writeback, 0: writethrough.
    pub writeback: u8,
    /// Unused.
    pub unused0: u8,
    /// Virtqueues.
    pub num_queues: U16,
    /// 512-byte sectors in one range of a discard.
    pub max_discard_sectors: U32,
    /// Ranges in one discard.
    pub max_discard_seg: U32,
    /// Alignment of a discard in 512-byte sectors.
    pub discard_sector_alignment: U32,
    /// 512-byte sectors in one range of write zeroes.
    pub max_write_zeroes_sectors: U32,
    /// Ranges in one write-zeroes request.
    pub max_write_zeroes_seg: U32,
    /// 1: write zeroes with the unmap flag may deallocate.
    pub write_zeroes_may_unmap: u8,
    /// Unused.
    pub unused1: [u8; 3],
}

// What is offered has to be what a lane takes: header, data and status in one chain, and all ranges of a request.
const _: () = assert!(LONGEST_CHAIN as usize <= crate::virtio::ring::MAX_CHAIN);

const _: () = assert!(size_of::<BlockConfig>() == 60);
const _: () = assert!(std::mem::offset_of!(BlockConfig, writeback) == WRITEBACK_OFFSET);
const _: () = assert!(std::mem::offset_of!(BlockConfig, num_queues) == 34);
const _: () = assert!(std::mem::offset_of!(BlockConfig, max_write_zeroes_sectors) == 48);

/// The feature bits offered for a namespace. `read_only`: the export's own choice; the drive's is added.
pub fn features(namespace: &Namespace, read_only: bool) -> u64 {
    let read_only = read_only || namespace.read_only;
    let mut features = F_SEG_MAX
        | F_BLK_SIZE
        | F_TOPOLOGY
        | F_MQ
        | F_INDIRECT_DESC
        | F_EVENT_IDX
        | F_VERSION_1
        | F_RING_PACKED
        | F_PROTOCOL_FEATURES;
    if namespace.volatile_write_cache {
        features |= F_FLUSH;
    }
    if read_only {
        return features | F_RO;
    }
    if namespace.volatile_write_cache {
        features |= F_CONFIG_WCE;
    }
    if namespace.discard {
        features |= F_DISCARD;
    }
    if namespace.write_zeroes {
        features |= F_WRITE_ZEROES;
    }
    features
}

/// What a driver may ask for in one discard or write-zeroes request (5.2.6.1). The configuration space offers it, and a request
/// beyond it fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeLimits {
    /// 512-byte sectors in one range; whole blocks.
    pub sectors: u32,
    /// Ranges in one request.
    pub ranges: u32,
}

impl RangeLimits {
    /// The larger ones of two.
    pub fn max(self, other: RangeLimits) -> RangeLimits {
        RangeLimits { sectors: self.sectors.max(other.sectors), ranges: self.ranges.max(other.ranges) }
    }

    /// For discards: what one Dataset Management command takes. So a range is cut at most where a command is full, and a request
    /// becomes hardly more commands than it has ranges.
    pub fn discard(namespace: &Namespace) -> RangeLimits {
        let blocks = u64::from(namespace.max_discard_range_blocks).min(namespace.max_discard_blocks);
        Self::new(namespace, blocks, namespace.max_discard_ranges.into())
    }

    /// For write zeroes. A drive may take long for them: one command for each range keeps its deadline honest.
    pub fn write_zeroes(namespace: &Namespace) -> RangeLimits {
        Self::new(namespace, namespace.max_write_zeroes_blocks.into(), MAX_RANGES)
    }

    fn new(namespace: &Namespace, blocks: u64, ranges: u32) -> RangeLimits {
        let sectors_per_block = namespace.block_bytes() / SECTOR_BYTES;
        // Whole blocks, and no more than the field holds.
        let blocks = blocks.min(namespace.blocks).min(u64::from(u32::MAX / sectors_per_block)) as u32;
        RangeLimits { sectors: blocks * sectors_per_block, ranges: ranges.min(MAX_RANGES) }
    }
}

/// What drivers may ask for of a namespace in one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// The limits of a discard request.
    pub discard: RangeLimits,
    /// The limits of a write zeroes request.
    pub write_zeroes: RangeLimits,
}

impl Offer {
    /// The offer that fits the namespace as it is now.
    pub fn new(namespace: &Namespace) -> Offer {
        Offer { discard: RangeLimits::discard(namespace), write_zeroes: RangeLimits::write_zeroes(namespace) }
    }

    /// A drive that is back with smaller limits still serves drivers that have read the larger ones.
    pub fn max(self, other: Offer) -> Offer {
        Offer { discard: self.discard.max(other.discard), write_zeroes: self.write_zeroes.max(other.write_zeroes) }
    }
}

/// The configuration space that goes with `features`; fields whose feature is not offered are zero.
pub fn config(namespace: &Namespace, features: u64, queues: u16, writeback: bool) -> BlockConfig {
    let block = namespace.block_bytes();
    let blocks = |bytes: u32| bytes / block;
    // What is written with less is read first, or torn.
    let smallest = namespace.write_granularity_bytes.max(namespace.physical_block_bytes);
    let mut config = BlockConfig {
        // `Namespace` promises that the size in bytes fits into 63 bits.
        capacity: U64::new(namespace.bytes() / u64::from(SECTOR_BYTES)),
        size_max: U32::ZERO,
        seg_max: U32::new(SEG_MAX),
        geometry: U32::ZERO,
        blk_size: U32::new(block),
        physical_block_exp: blocks(namespace.physical_block_bytes).max(1).ilog2() as u8,
        alignment_offset: 0,
        min_io_size: U16::new(u16::try_from(blocks(smallest)).unwrap_or(u16::MAX).max(1)),
        opt_io_size: U32::new(blocks(namespace.optimal_io_bytes)),
        writeback: u8::from(writeback),
        unused0: 0,
        num_queues: U16::new(queues),
        max_discard_sectors: U32::ZERO,
        max_discard_seg: U32::ZERO,
        discard_sector_alignment: U32::ZERO,
        max_write_zeroes_sectors: U32::ZERO,
        max_write_zeroes_seg: U32::ZERO,
        write_zeroes_may_unmap: 0,
        unused1: [0; 3],
    };
    if features & F_DISCARD != 0 {
        let limits = RangeLimits::discard(namespace);
        config.max_discard_sectors = U32::new(limits.sectors);
        config.max_discard_seg = U32::new(limits.ranges);
        config.discard_sector_alignment = U32::new(namespace.discard_granularity_bytes.max(block) / SECTOR_BYTES);
    }
    if features & F_WRITE_ZEROES != 0 {
        let limits = RangeLimits::write_zeroes(namespace);
        config.max_write_zeroes_sectors = U32::new(limits.sectors);
        config.max_write_zeroes_seg = U32::new(limits.ranges);
        config.write_zeroes_may_unmap = u8::from(namespace.write_zeroes_deallocates);
    }
    config
}

/// Where the device's own part begins in the configuration space of a virtio-mmio device (4.2.2). Some front-ends count from
/// there, Cloud Hypervisor before 2026 among them. It is as far as a configuration space reaches, so the two cannot be mixed up.
pub const MMIO_OFFSET: u32 = 0x100;
const _: () = assert!(MMIO_OFFSET as usize == MAX_CONFIG_BYTES);

/// Where something begins in [`BlockConfig`], whichever way the front-end counts.
fn start(offset: u32) -> usize {
    offset.checked_sub(MMIO_OFFSET).unwrap_or(offset) as usize
}

/// The bytes a front-end sees from `offset` on; `None`: beyond what a configuration space can be. Offsets from
/// [`MMIO_OFFSET`] on count from there.
pub fn read(config: &BlockConfig, offset: u32, bytes: u32) -> Option<Vec<u8>> {
    let start = start(offset);
    let end = start.checked_add(usize::try_from(bytes).ok()?).filter(|end| *end <= MAX_CONFIG_BYTES)?;
    let known = config.as_bytes();
    Some((start..end).map(|at| known.get(at).copied().unwrap_or(0)).collect())
}

/// What a write to the configuration space asks for: the new writeback mode. The driver may write that byte only, but a
/// front-end may send it among others that it leaves as they are.
pub fn written_mode(config: &BlockConfig, offset: u32, data: &[u8]) -> Result<bool, &'static str> {
    let current = read(config, offset, data.len() as u32).ok_or("it lies outside the configuration space")?;
    let at = WRITEBACK_OFFSET
        .checked_sub(start(offset))
        .filter(|at| *at < data.len())
        .ok_or("only the writeback byte can be written")?;
    let mut rest = data.to_vec();
    rest[at] = current[at];
    if rest != current {
        return Err("only the writeback byte can be written");
    }
    match data[at] {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err("writeback is 0 or 1"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespace(block_shift: u8) -> Namespace {
        Namespace {
            physical_block_bytes: 4096,
            write_granularity_bytes: 4096,
            write_alignment_bytes: 4096,
            optimal_io_bytes: 128 << 10,
            discard_granularity_bytes: 4096,
            discard_alignment_bytes: 4096,
            ..nvme_driver::testing::namespace(block_shift, 1 << 20)
        }
    }

    fn has(features: u64, bits: u64) -> bool {
        features & bits == bits
    }

    #[test]
    fn blocks_of_512_bytes() {
        let namespace = namespace(9);
        let config = config(&namespace, features(&namespace, false), 4, true);
        let bytes = config.as_bytes();
        // Offsets written out from the specification, not taken from the structure.
        assert_eq!(bytes[0..8], (1u64 << 20).to_le_bytes());
        assert_eq!(bytes[8..12], [0; 4], "size_max");
        assert_eq!(bytes[12..16], SEG_MAX.to_le_bytes());
        assert_eq!(bytes[20..24], 512u32.to_le_bytes());
        assert_eq!(bytes[24], 3, "4096-byte physical blocks: 2^3 logical blocks");
        assert_eq!(bytes[25], 0);
        assert_eq!(bytes[26..28], 8u16.to_le_bytes());
        assert_eq!(bytes[28..32], 256u32.to_le_bytes());
        assert_eq!(bytes[32], 1);
        assert_eq!(bytes[34..36], 4u16.to_le_bytes());
        assert_eq!(bytes[36..40], (1u32 << 20).to_le_bytes(), "never more than the disk");
        assert_eq!(bytes[40..44], 256u32.to_le_bytes());
        assert_eq!(bytes[44..48], 8u32.to_le_bytes());
        assert_eq!(bytes[48..52], 65536u32.to_le_bytes());
        assert_eq!(bytes[52..56], 256u32.to_le_bytes());
        assert_eq!(bytes[56], 1);
        const { assert!(SEG_MAX >= 512) };
    }

    #[test]
    fn blocks_of_4096_bytes() {
        let mut namespace = namespace(12);
        namespace.blocks = 1 << 40;
        let config = config(&namespace, features(&namespace, false), 1, false);
        assert_eq!(config.capacity.get(), 8 << 40);
        assert_eq!(config.blk_size.get(), 4096);
        assert_eq!(config.physical_block_exp, 0);
        assert_eq!(config.min_io_size.get(), 1);
        assert_eq!(config.opt_io_size.get(), 32);
        assert_eq!(config.writeback, 0);
        assert_eq!(config.max_discard_sectors.get(), !7, "whole blocks");
        assert_eq!(config.discard_sector_alignment.get(), 8);
        assert_eq!(config.max_write_zeroes_sectors.get(), 65536 * 8);
    }

    /// What is written without tearing is one thing, what is written well another.
    #[test]
    fn a_physical_block_is_what_is_not_torn() {
        let seen = |physical, granularity| {
            let mut namespace = namespace(9);
            (namespace.physical_block_bytes, namespace.write_granularity_bytes) = (physical, granularity);
            let config = config(&namespace, features(&namespace, false), 1, false);
            (config.physical_block_exp, config.min_io_size.get())
        };
        assert_eq!(seen(512, 16 << 10), (0, 32));
        assert_eq!(seen(4096, 512), (3, 8), "never less than a physical block");
        assert_eq!(seen(4096, 6144), (3, 12));
        assert_eq!(seen(512, 32 << 20), (0, u16::MAX), "65536 blocks: as many as the field holds");
    }

    #[test]
    fn everything_the_ring_can_do_is_offered() {
        let features = features(&namespace(9), false);
        assert!(has(
            features,
            F_MQ | F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1 | F_RING_PACKED | F_BLK_SIZE | F_TOPOLOGY | F_SEG_MAX
        ));
        assert!(has(features, F_FLUSH | F_CONFIG_WCE | F_DISCARD | F_WRITE_ZEROES | F_PROTOCOL_FEATURES));
        assert!(!has(features, F_RO));
    }

    #[test]
    fn without_a_write_cache_there_is_nothing_to_flush() {
        let mut namespace = namespace(9);
        namespace.volatile_write_cache = false;
        assert_eq!(features(&namespace, false) & (F_FLUSH | F_CONFIG_WCE), 0);
    }

    #[test]
    fn a_read_only_disk_offers_no_command_that_writes() {
        let mut namespace = namespace(9);
        let exported = features(&namespace, true);
        assert!(has(exported, F_RO | F_FLUSH));
        assert_eq!(exported & (F_CONFIG_WCE | F_DISCARD | F_WRITE_ZEROES), 0);
        namespace.read_only = true;
        assert_eq!(features(&namespace, false), exported, "the drive's own write protection counts as well");
        let config = config(&namespace, exported, 1, true);
        assert_eq!(config.max_discard_sectors.get(), 0);
        assert_eq!(config.max_write_zeroes_sectors.get(), 0);
    }

    #[test]
    fn what_the_drive_cannot_do_is_not_offered() {
        let mut namespace = namespace(9);
        namespace.discard = false;
        let without_discard = features(&namespace, false);
        assert_eq!(without_discard & F_DISCARD, 0);
        assert!(has(without_discard, F_WRITE_ZEROES));
        let space = config(&namespace, without_discard, 1, true);
        assert_eq!((space.max_discard_sectors.get(), space.max_discard_seg.get()), (0, 0));
        namespace.write_zeroes = false;
        assert_eq!(features(&namespace, false) & F_WRITE_ZEROES, 0);
        namespace.write_zeroes = true;
        namespace.write_zeroes_deallocates = false;
        assert_eq!(config(&namespace, features(&namespace, false), 1, true).write_zeroes_may_unmap, 0);
    }

    #[test]
    fn a_request_is_no_more_than_the_drive_takes_at_once() {
        let mut namespace = namespace(12);
        (namespace.max_discard_ranges, namespace.max_discard_range_blocks) = (16, 1000);
        namespace.max_write_zeroes_blocks = 256;
        assert_eq!(RangeLimits::discard(&namespace), RangeLimits { sectors: 8000, ranges: 16 });
        assert_eq!(RangeLimits::write_zeroes(&namespace), RangeLimits { sectors: 2048, ranges: 256 });
        namespace.max_discard_blocks = 999;
        assert_eq!(RangeLimits::discard(&namespace).sectors, 999 * 8);
        let config = config(&namespace, features(&namespace, false), 1, true);
        assert_eq!((config.max_discard_sectors.get(), config.max_discard_seg.get()), (999 * 8, 16));
        assert_eq!((config.max_write_zeroes_sectors.get(), config.max_write_zeroes_seg.get()), (2048, 256));
    }

    #[test]
    fn reads_of_any_length_up_to_the_limit() {
        let namespace = namespace(9);
        let config = config(&namespace, features(&namespace, false), 1, true);
        assert_eq!(read(&config, 0, 8).unwrap(), (1u64 << 20).to_le_bytes());
        let long = read(&config, 0, 256).unwrap();
        assert_eq!(&long[..60], config.as_bytes());
        assert!(long[60..].iter().all(|byte| *byte == 0));
        assert_eq!(read(&config, 60, 4).unwrap(), [0; 4]);
        assert_eq!(read(&config, 0, 257), None);
        assert_eq!(read(&config, u32::MAX, u32::MAX), None);
        // Counted from where virtio-mmio has it.
        assert_eq!(read(&config, 0x100, 60).unwrap(), config.as_bytes());
        assert_eq!(read(&config, 0x100 + 20, 4).unwrap(), 512u32.to_le_bytes());
        assert_eq!(read(&config, 0x100, 256).unwrap(), long);
        assert_eq!(read(&config, 0xff, 2), None, "neither the one nor the other");
        assert_eq!((read(&config, 0x100, 257), read(&config, 0x200, 1)), (None, None));
    }

    #[test]
    fn only_the_writeback_byte_can_be_written() {
        let namespace = namespace(9);
        let config = config(&namespace, features(&namespace, false), 1, true);
        assert_eq!(written_mode(&config, 32, &[0]), Ok(false));
        assert_eq!(written_mode(&config, 32, &[1]), Ok(true));
        assert_eq!(written_mode(&config, 0x100 + 32, &[0]), Ok(false));
        assert!(written_mode(&config, 32, &[2]).is_err());
        let mut whole = config.as_bytes().to_vec();
        whole[32] = 0;
        assert_eq!(written_mode(&config, 0, &whole), Ok(false));
        whole[0] ^= 1;
        assert!(written_mode(&config, 0, &whole).is_err());
        assert!(written_mode(&config, 33, &[0]).is_err());
        assert!(written_mode(&config, 0, &[0; 8]).is_err());
        assert!(written_mode(&config, 250, &[0; 8]).is_err());
        assert!(written_mode(&config, 32, &[]).is_err());
    }
}
