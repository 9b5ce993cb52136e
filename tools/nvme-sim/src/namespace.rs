//! A namespace: its blocks, its format, and what a power cut would take from it.

use fastrand::Rng;

use crate::backing::Backing;
use crate::config::{Config, NamespaceConfig};
use crate::error::Error;
use crate::write_cache::WriteCache;

/// An LBA format (NVM Command Set 1.0, figure 98): bytes of data and of metadata per block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Format {
    pub block_shift: u8,
    pub metadata: u16,
}

/// The LBA formats, by index; those with metadata only if [`Config::metadata_formats`].
pub(crate) const FORMATS: [Format; 4] = [
    Format { block_shift: 9, metadata: 0 },
    Format { block_shift: 12, metadata: 0 },
    Format { block_shift: 9, metadata: 8 },
    Format { block_shift: 12, metadata: 8 },
];

/// How many of [`FORMATS`] the controller offers.
pub(crate) fn formats(config: &Config) -> &'static [Format] {
    &FORMATS[..if config.metadata_formats { 4 } else { 2 }]
}

/// A namespace of the controller.
pub(crate) struct Namespace {
    pub id: u32,
    pub backing: Backing,
    pub cache: Option<WriteCache>,
    pub format: Format,
    /// Size in logical blocks.
    pub blocks: u64,
    bytes: u64,
    pub read_only: bool,
    /// DEAC in Write Zeroes is offered.
    pub write_zeroes_deallocates: bool,
    cache_bytes: u64,
}

impl Namespace {
    pub(crate) fn new(id: u32, config: &NamespaceConfig, controller: &Config) -> Result<Namespace, Error> {
        config.check(controller)?;
        let shift = config.block_bytes.ilog2() as u8;
        let bytes = config.bytes >> shift << shift;
        let mut namespace = Namespace {
            id,
            backing: Backing::open(config, bytes)?,
            cache: None,
            format: Format { block_shift: shift, metadata: config.metadata_bytes },
            blocks: bytes >> shift,
            bytes,
            read_only: config.read_only,
            write_zeroes_deallocates: true,
            cache_bytes: controller.write_cache_bytes,
        };
        namespace.set_write_cache(controller.volatile_write_cache)?;
        Ok(namespace)
    }

    /// Byte offset and length of a block range, if it lies inside.
    #[inline]
    pub(crate) fn range(&self, lba: u64, blocks: u64) -> Option<(usize, usize)> {
        let end = lba.checked_add(blocks)?;
        let shift = self.format.block_shift;
        (end <= self.blocks).then_some(((lba << shift) as usize, (blocks << shift) as usize))
    }

    /// Must be called before blocks are written; `durable`: the change survives a power cut (FUA).
    #[inline]
    pub(crate) fn before_write(&mut self, lba: u64, blocks: u64, durable: bool) {
        if self.cache.is_some() && !durable {
            // The cache reads what is there first. Reading a page that was never written maps the system's page of
            // zeroes, and replacing that one afterwards interrupts every other processor: it must be writable at once.
            let shift = self.format.block_shift;
            self.backing.make_writable((lba << shift) as usize, (blocks << shift) as usize);
        }
        self.before_change(lba, blocks, durable);
    }

    /// Must be called before blocks are deallocated; `durable` as for writes.
    #[inline]
    pub(crate) fn before_deallocate(&mut self, lba: u64, blocks: u64, durable: bool) {
        self.before_change(lba, blocks, durable);
    }

    #[inline]
    fn before_change(&mut self, lba: u64, blocks: u64, durable: bool) {
        if let Some(cache) = &mut self.cache {
            cache.before_write(&self.backing, lba, blocks, durable);
        }
    }

    /// Makes everything written so far survive a power cut.
    pub(crate) fn flush(&mut self) {
        if let Some(cache) = &mut self.cache {
            cache.flush();
        }
    }

    /// Switches the volatile write cache on or off; off writes it back first.
    pub(crate) fn set_write_cache(&mut self, on: bool) -> Result<(), Error> {
        if !on {
            self.cache = None;
        } else if self.cache.is_none() {
            self.cache = Some(WriteCache::new(self.format.block_shift, self.cache_bytes)?);
        }
        Ok(())
    }

    /// Takes unflushed blocks back to what they were when last durable: all of them, or a random subset.
    pub(crate) fn power_cut(&mut self, random: Option<&mut Rng>) -> usize {
        self.cache.as_mut().map_or(0, |cache| cache.power_cut(&self.backing, random))
    }

    /// Formats: all blocks read zero after it.
    pub(crate) fn reformat(&mut self, format: Format) -> Result<(), Error> {
        let failed = |status| crate::error::invalid(format!("the blocks cannot be formatted: {status:?}"));
        self.backing.deallocate(0, self.bytes as usize).map_err(failed)?;
        self.format = format;
        self.blocks = self.bytes >> format.block_shift;
        let cached = self.cache.take().is_some();
        self.set_write_cache(cached)
    }

    /// Changes the size, in bytes (rounded down to whole blocks).
    pub(crate) fn resize(&mut self, bytes: u64) -> Result<(), Error> {
        let shift = self.format.block_shift;
        let bytes = bytes >> shift << shift;
        if bytes == 0 || bytes > 1 << 46 {
            return Err(crate::error::invalid(format!(
                "the namespace size is {bytes} bytes: give one block to 64 TiB"
            )));
        }
        self.flush();
        self.backing.resize(bytes)?;
        self.bytes = bytes;
        self.blocks = bytes >> shift;
        Ok(())
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}
