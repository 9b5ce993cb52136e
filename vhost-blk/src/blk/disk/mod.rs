//! A disk as the data path sees it: its namespace, its blocks, what its guest has negotiated. The lanes of a disk share it.

mod flush_promise;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nvme_driver::{LbaRange, Namespace};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;

use crate::blk::config::{Offer, SECTOR_SHIFT};
pub use flush_promise::FlushPromise;

/// The blocks of a disk, in the form in which transfers are checked.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// Bytes of a block, less 1.
    block_mask: u64,
    blocks: u64,
    /// From bytes to blocks.
    block_shift: u32,
    /// From sectors to blocks.
    sector_shift: u32,
}

impl Geometry {
    /// The first logical block of a transfer of `bytes` at `sector`, wherever the disk ends; `None` if it is not in whole
    /// blocks.
    #[inline(always)]
    pub fn first_block(&self, sector: u64, bytes: u32) -> Option<u64> {
        // What is shifted out on the left is no part of a block.
        let whole = (sector << SECTOR_SHIFT | u64::from(bytes)) & self.block_mask == 0;
        whole.then_some(sector >> self.sector_shift)
    }

    /// The first logical block of a transfer of `bytes` at `sector`; `None` if it is not in whole blocks or reaches beyond the disk's
    /// end.
    #[inline]
    pub fn block(&self, sector: u64, bytes: u32) -> Option<u64> {
        let lba = self.first_block(sector, bytes)?;
        // Compared this way nothing overflows.
        let last = self.blocks.checked_sub(u64::from(bytes >> self.block_shift))?;
        (lba <= last).then_some(lba)
    }
}

/// The features of an exported namespace that its drive announces, and refuses when they are used.
#[derive(Debug, Default)]
pub struct Refused(AtomicU64);

impl Refused {
    /// A request that needs this feature was refused. True: that is news.
    pub fn note(&self, feature: u64) -> bool {
        // Relaxed: it guards nothing.
        self.0.fetch_or(feature, Ordering::Relaxed) & feature == 0
    }

    /// The refused features, as bits of the feature word; front-ends to come are not offered these.
    pub fn features(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// An export as one front-end has negotiated it.
#[derive(Debug)]
pub struct Disk {
    /// The drive's namespace.
    pub namespace: Namespace,
    /// What the driver may have been told about requests of ranges.
    pub offer: Offer,
    /// Writes, discards and write zeroes fail: the export or the namespace is read-only.
    pub read_only: bool,
    /// The answer to GET_ID: ASCII, padded with zero bytes (virtio 1.2, 5.2.6).
    pub serial: [u8; 20],
    /// The features the driver accepted, as bits.
    pub features: u64,
    /// The `writeback` field of the configuration space (5.2.4): the driver may change it when CONFIG_WCE was negotiated.
    /// True: writes may stay in the drive's cache until a flush. One for all forms of the disk that lanes have.
    pub writeback: Arc<AtomicBool>,
    /// The exported namespace's: its flushes are counted over all front-ends.
    pub flushes: Arc<FlushPromise>,
    /// The exported namespace's.
    pub refused: Arc<Refused>,
}

impl Disk {
    /// A writable disk with a write cache, for a driver that has negotiated no features.
    pub fn new(namespace: Namespace) -> Disk {
        Disk {
            offer: Offer::new(&namespace),
            read_only: namespace.read_only,
            namespace,
            serial: [0; 20],
            features: 0,
            writeback: Arc::new(AtomicBool::new(true)),
            flushes: Arc::default(),
            refused: Arc::default(),
        }
    }

    /// This disk on `namespace`, which is its namespace as that is now.
    pub fn on(&self, namespace: Namespace) -> Disk {
        let Disk { offer, read_only, serial, features, writeback, flushes, refused, .. } = self;
        Disk {
            offer: offer.max(Offer::new(&namespace)),
            read_only: *read_only || namespace.read_only,
            namespace,
            serial: *serial,
            features: *features,
            writeback: writeback.clone(),
            flushes: flushes.clone(),
            refused: refused.clone(),
        }
    }

    /// Does a write have to be on the media before it completes (5.2.6.2)? So it is when the driver chose writethrough or
    /// cannot flush, and the drive has a cache that loses data.
    #[inline]
    pub fn force_unit_access(&self) -> bool {
        let can_flush = self.features & (1 << VIRTIO_BLK_F_FLUSH) != 0;
        // Relaxed: a write is under the new mode when the driver submits it after the change was acknowledged; the
        // acknowledgement itself orders that.
        self.namespace.volatile_write_cache && !(can_flush && self.writeback.load(Ordering::Relaxed))
    }

    /// The disk's blocks, in the form in which transfers are checked.
    pub fn geometry(&self) -> Geometry {
        let shift = self.namespace.block_shift;
        Geometry {
            block_mask: (1 << shift) - 1,
            blocks: self.namespace.blocks,
            block_shift: shift.into(),
            sector_shift: (shift - SECTOR_SHIFT).into(),
        }
    }

    /// The logical blocks of `sectors` sectors from `sector` on; `None` if they are not whole blocks or beyond the end.
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
mod tests;
