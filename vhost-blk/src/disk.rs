//! What the data path has to know of an exported disk; shared by its lanes.

use std::sync::atomic::{AtomicBool, Ordering};

use nvme_driver::{LbaRange, Namespace};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;

use crate::request::SECTOR_SHIFT;

/// An export as one front-end has negotiated it.
#[derive(Debug)]
pub struct Disk {
    /// The drive's namespace.
    pub namespace: Namespace,
    /// Writes, discards and write zeroes fail: the export or the namespace is read-only.
    pub read_only: bool,
    /// The answer to GET_ID: ASCII, padded with zero bytes (virtio 1.2, 5.2.6).
    pub serial: [u8; 20],
    /// The features the driver accepted, as bits.
    pub features: u64,
    /// The `writeback` field of the configuration space (5.2.4): the driver may change it when CONFIG_WCE was negotiated.
    /// True: writes may stay in the drive's cache until a flush.
    pub writeback: AtomicBool,
}

impl Disk {
    /// Does a write have to be on the media before it completes (5.2.6.2)? So it is when the driver chose writethrough or
    /// cannot flush, and the drive has a cache that loses data.
    #[inline]
    pub fn force_unit_access(&self) -> bool {
        let can_flush = self.features & (1 << VIRTIO_BLK_F_FLUSH) != 0;
        // Relaxed: a write is under the new mode when the driver submits it after the change was acknowledged; the
        // acknowledgement itself orders that.
        self.namespace.volatile_write_cache && !(can_flush && self.writeback.load(Ordering::Relaxed))
    }

    /// The logical block of a transfer of `bytes` at `sector`; `None` if it is not in whole blocks or beyond the end.
    #[inline(always)]
    pub(crate) fn block(&self, sector: u64, bytes: u32) -> Option<u64> {
        let shift = u32::from(self.namespace.block_shift);
        // What is shifted out on the left is no part of a block.
        if (sector << SECTOR_SHIFT | u64::from(bytes)) & ((1 << shift) - 1) != 0 {
            return None;
        }
        let lba = sector >> (shift - u32::from(SECTOR_SHIFT));
        // Compared this way nothing overflows.
        let last = self.namespace.blocks.checked_sub(u64::from(bytes >> shift))?;
        (lba <= last).then_some(lba)
    }

    /// The logical blocks of `sectors` sectors from `sector` on; `None` as for [`Disk::block`].
    pub(crate) fn range(&self, sector: u64, sectors: u32) -> Option<LbaRange> {
        let shift = self.namespace.block_shift - SECTOR_SHIFT;
        let lba = sector >> shift;
        let blocks = sectors >> shift;
        let whole = lba << shift == sector && blocks << shift == sectors;
        let inside = u64::from(blocks) <= self.namespace.blocks && lba <= self.namespace.blocks - u64::from(blocks);
        (whole && inside).then_some(LbaRange { lba, blocks })
    }
}

#[cfg(test)]
pub(crate) mod tests;
