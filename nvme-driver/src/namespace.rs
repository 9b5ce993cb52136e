//! A namespace as the data path needs it: geometry and limits, checked once.

/// A namespace whose format can be served: 512 or 4096 bytes per block, no metadata, no protection.
///
/// Made by `Controller::namespace`, which has checked every value the drive supplied. A copy does not follow
/// later changes (resize, format): watch the controller's events and ask again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Namespace identifier (NSID): 1 to NN.
    pub id: u32,
    /// Size in logical blocks (NSZE), not 0; `blocks << block_shift` fits into 63 bits.
    pub blocks: u64,
    /// Block size as a power of two: 9 (512 bytes) or 12 (4096 bytes).
    pub block_shift: u8,
    /// No read or write should cross a multiple of this many logical blocks (NOIOB, or [`crate::Quirk::Striped`]); 0: no such
    /// boundary.
    pub boundary_blocks: u32,
    /// What the drive writes without tearing over a power failure, in bytes: a power of two, at least the block size (AWUPF or
    /// NAWUPF, within NABSPF); no more than 4096 unless the drive writes in larger units.
    pub physical_block_bytes: u32,
    /// The unit the drive writes without reading first, in bytes: a number of blocks, at least one (NPWG).
    pub write_granularity_bytes: u32,
    /// Writes should start at a multiple of this many bytes (NPWA); at least the block size.
    pub write_alignment_bytes: u32,
    /// The transfer size at which the drive works best, in bytes (NOWS); 0: not said.
    pub optimal_io_bytes: u32,
    /// The drive deallocates in multiples of this many bytes (NPDG); at least the block size.
    pub discard_granularity_bytes: u32,
    /// Alignment of a deallocation in bytes (NPDA); at least the block size.
    pub discard_alignment_bytes: u32,
    /// Ranges per Dataset Management command: 1 to 256 (DMRL).
    pub max_discard_ranges: u16,
    /// Logical blocks per range of a Dataset Management command: at least 1 (DMRSL).
    pub max_discard_range_blocks: u32,
    /// Logical blocks per Dataset Management command over all ranges: at least 1, at most as many as there are (DMSL).
    pub max_discard_blocks: u64,
    /// Logical blocks per Write Zeroes command: 1 to 65536 (WZSL). MDTS does not bound it.
    pub max_write_zeroes_blocks: u32,
    /// Logical blocks per Verify command: 1 to 65536 (VSL). MDTS does not bound it.
    pub max_verify_blocks: u32,
    /// The controller has a volatile write cache that is enabled: Flush is needed for durability.
    pub volatile_write_cache: bool,
    /// Dataset Management is supported.
    pub discard: bool,
    /// Write Zeroes is supported.
    pub write_zeroes: bool,
    /// Write Zeroes with the deallocate bit really deallocates, and the blocks read as zeroes then (DLFEAT).
    pub write_zeroes_deallocates: bool,
    /// Deallocated blocks read as zeroes (DLFEAT bits 2:0 = 1).
    pub discard_reads_zeroes: bool,
    /// Compare is supported.
    pub compare: bool,
    /// Verify is supported.
    pub verify: bool,
    /// The namespace is write protected (NSATTR bit 0): writes fail with Namespace is Write Protected.
    pub read_only: bool,
    /// IEEE extended unique identifier, big-endian as the drive gives it; `None` when the drive gives none.
    pub eui64: Option<[u8; 8]>,
    /// Namespace globally unique identifier, big-endian as the drive gives it.
    pub nguid: Option<[u8; 16]>,
    /// UUID (RFC 4122 byte order), from the namespace identification descriptors.
    pub uuid: Option<[u8; 16]>,
}

impl Namespace {
    /// Bytes per logical block.
    #[inline]
    pub fn block_bytes(&self) -> u32 {
        1 << self.block_shift
    }

    /// Size in bytes.
    #[inline]
    pub fn bytes(&self) -> u64 {
        self.blocks << self.block_shift
    }
}
