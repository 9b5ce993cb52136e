//! The controller's view of host memory: what the front-end has mapped for DMA, and nothing else.
//!
//! The message thread changes the [`DmaTable`]; the data thread reads it through its [`DmaView`], which holds an immutable
//! snapshot and so needs no lock on the data path. A region stays mapped as long as a snapshot holds it, and the message
//! thread answers an unmap only after the data thread has let go of the old snapshot (it runs [`DmaView::refresh`] on
//! request), so memory is never touched after its unmap was answered.

mod shared;

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

pub(crate) use shared::SharedBytes;
pub use shared::{MappingGuard, set_mapping_guard};

/// Largest number of regions a front-end may map; far more than any machine's memory map has.
const MAX_REGIONS: usize = 65536;

/// One mapped range of DMA addresses.
struct Region {
    iova: u64,
    bytes: SharedBytes,
    /// The device may read (the host's data, queues and pointer lists).
    readable: bool,
    /// The device may write.
    writable: bool,
}

impl Region {
    /// The last address of the region; regions are never empty and never wrap.
    fn last(&self) -> u64 {
        self.iova + (self.bytes.len() as u64 - 1)
    }
}

/// Regions sorted by address, not overlapping.
type Regions = Arc<[Arc<Region>]>;

/// The regions the front-end has mapped.
pub(crate) struct DmaTable {
    current: Mutex<Regions>,
    generation: AtomicU64,
    /// Regions there may be at a time.
    most: usize,
}

/// An address range that the front-end has not mapped for this kind of access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DmaFault {
    pub iova: u64,
    pub len: u64,
    pub write: bool,
}

impl std::fmt::Display for DmaFault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = if self.write { "write" } else { "read" };
        write!(f, "DMA {kind} of {} bytes at {:#x}: not mapped", self.len, self.iova)
    }
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

impl DmaTable {
    /// A table of at most `most` regions; `None`: as many as anybody needs.
    pub(crate) fn new(most: Option<usize>) -> DmaTable {
        let most = most.unwrap_or(MAX_REGIONS);
        DmaTable { current: Mutex::new(Arc::from([])), generation: AtomicU64::new(0), most }
    }

    fn change<T>(&self, change: impl FnOnce(&mut Vec<Arc<Region>>) -> io::Result<T>) -> io::Result<T> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let mut regions = current.to_vec();
        let result = change(&mut regions)?;
        *current = Arc::from(regions);
        // Release: pairs with the Acquire in `DmaView::refresh`.
        self.generation.fetch_add(1, Ordering::Release);
        Ok(result)
    }

    /// How many regions are mapped.
    pub(crate) fn len(&self) -> usize {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Maps `len` bytes of `file` from `offset` at the address `iova`.
    pub(crate) fn map(
        &self,
        file: &File,
        offset: u64,
        iova: u64,
        len: u64,
        readable: bool,
        writable: bool,
    ) -> io::Result<()> {
        if len == 0 || iova.checked_add(len - 1).is_none() {
            return Err(invalid(format!("DMA map of {len} bytes at {iova:#x}: empty or past the end of the space")));
        }
        let bytes = usize::try_from(len).map_err(|_| invalid(format!("DMA map of {len} bytes: too large")))?;
        let bytes = SharedBytes::of_client(file, offset, bytes, writable)?;
        let region = Region { iova, bytes, readable, writable };
        self.change(|regions| {
            if regions.len() >= self.most {
                return Err(invalid(format!("DMA map: {} regions are mapped already", self.most)));
            }
            let at = regions.partition_point(|r| r.last() < iova);
            if regions.get(at).is_some_and(|next| next.iova <= region.last()) {
                return Err(invalid(format!("DMA map of {len} bytes at {iova:#x}: overlaps a mapped region")));
            }
            regions.insert(at, Arc::new(region));
            Ok(())
        })
    }

    /// Takes every region inside the range away; returns how many there were. A range that cuts a region is refused.
    pub(crate) fn unmap(&self, iova: u64, len: u64) -> io::Result<usize> {
        let last = iova.checked_add(len.wrapping_sub(1)).filter(|_| len != 0);
        let last = last.ok_or_else(|| invalid(format!("DMA unmap of {len} bytes at {iova:#x}: empty or wraps")))?;
        self.change(|regions| {
            if let Some(cut) =
                regions.iter().find(|r| r.iova <= last && r.last() >= iova && (r.iova < iova || r.last() > last))
            {
                return Err(invalid(format!(
                    "DMA unmap of {len} bytes at {iova:#x} cuts the region at {:#x}",
                    cut.iova
                )));
            }
            let before = regions.len();
            regions.retain(|r| r.iova > last || r.last() < iova);
            Ok(before - regions.len())
        })
    }

    /// Takes every region away.
    pub(crate) fn clear(&self) {
        let _ = self.change(|regions| {
            regions.clear();
            Ok(())
        });
    }
}

/// A snapshot of the table, for one thread.
pub(crate) struct DmaView {
    table: Arc<DmaTable>,
    generation: u64,
    regions: Regions,
    /// Which region the last access to a queue, or to data, hit.
    hints: [Cell<usize>; 2],
}

/// What an address is used for: each use remembers its last region.
#[derive(Clone, Copy)]
enum Use {
    Queue = 0,
    Data = 1,
}

impl DmaView {
    pub(crate) fn new(table: Arc<DmaTable>) -> DmaView {
        let mut view = DmaView { table, generation: u64::MAX, regions: Arc::from([]), hints: Default::default() };
        view.refresh();
        view
    }

    /// Takes the newest snapshot and lets go of the old one.
    #[inline]
    pub(crate) fn refresh(&mut self) {
        // Acquire: pairs with the Release in `DmaTable::change`.
        let generation = self.table.generation.load(Ordering::Acquire);
        if generation != self.generation {
            self.regions = self.table.current.lock().unwrap_or_else(PoisonError::into_inner).clone();
            self.generation = generation;
        }
    }

    /// The region that holds `iova`.
    #[inline]
    fn find(&self, iova: u64, kind: Use) -> Option<&Region> {
        let hint = &self.hints[kind as usize];
        if let Some(region) = self.regions.get(hint.get())
            && iova.wrapping_sub(region.iova) < region.bytes.len() as u64
        {
            return Some(region);
        }
        let at = self.regions.partition_point(|r| r.last() < iova);
        let region = self.regions.get(at).filter(|r| r.iova <= iova)?;
        hint.set(at);
        Some(region)
    }

    /// Calls `part(region bytes, offset in region, offset in the range, length)` for each mapped piece of the range.
    #[inline]
    fn walk(
        &self,
        iova: u64,
        len: usize,
        write: bool,
        kind: Use,
        mut part: impl FnMut(&SharedBytes, usize, usize, usize) -> Option<()>,
    ) -> Result<(), DmaFault> {
        let mut done = 0;
        while done < len {
            let fault = DmaFault { iova: iova.wrapping_add(done as u64), len: (len - done) as u64, write };
            let at = iova.checked_add(done as u64).ok_or(fault)?;
            let region = self.find(at, kind).ok_or(fault)?;
            if !(if write { region.writable } else { region.readable }) {
                return Err(fault);
            }
            let offset = (at - region.iova) as usize;
            let piece = (len - done).min(region.bytes.len() - offset);
            part(&region.bytes, offset, done, piece).ok_or(fault)?;
            done += piece;
        }
        Ok(())
    }

    /// Whether the whole range may be accessed so.
    pub(crate) fn check(&self, iova: u64, len: usize, write: bool) -> Result<(), DmaFault> {
        self.walk(iova, len, write, Use::Data, |_, _, _, _| Some(()))
    }

    /// Fetches a submission queue entry (64 bytes, aligned).
    #[inline]
    pub(crate) fn fetch(&self, iova: u64) -> Result<[u64; 8], DmaFault> {
        let fault = DmaFault { iova, len: 64, write: false };
        let region = self.find(iova, Use::Queue).filter(|r| r.readable).ok_or(fault)?;
        let offset = (iova - region.iova) as usize;
        let mut words = [0; 8];
        for (n, word) in words.iter_mut().enumerate() {
            // Relaxed: the Acquire load of the doorbell ordered the entry before it.
            *word = region.bytes.load_u64(offset + 8 * n, Ordering::Relaxed).ok_or(fault)?;
        }
        Ok(words)
    }

    /// Writes a completion queue entry (16 bytes, aligned): the half with the phase tag last.
    #[inline]
    pub(crate) fn post(&self, iova: u64, entry: [u64; 2]) -> Result<(), DmaFault> {
        let fault = DmaFault { iova, len: 16, write: true };
        let region = self.find(iova, Use::Queue).filter(|r| r.writable).ok_or(fault)?;
        let offset = (iova - region.iova) as usize;
        region.bytes.store_u64(offset, entry[0], Ordering::Relaxed).ok_or(fault)?;
        // Release: pairs with the driver's Acquire load of the phase tag; the data and the first half are before it.
        region.bytes.store_u64(offset + 8, entry[1], Ordering::Release).ok_or(fault)
    }

    /// Loads a doorbell-like word in host memory.
    pub(crate) fn load_u32(&self, iova: u64) -> Result<u32, DmaFault> {
        let fault = DmaFault { iova, len: 4, write: false };
        let region = self.find(iova, Use::Queue).filter(|r| r.readable).ok_or(fault)?;
        // Acquire: pairs with the driver's Release store of its shadow doorbell, after its entries.
        region.bytes.load_u32((iova - region.iova) as usize, Ordering::Acquire).ok_or(fault)
    }

    /// Stores a doorbell-like word in host memory.
    pub(crate) fn store_u32(&self, iova: u64, value: u32) -> Result<(), DmaFault> {
        let fault = DmaFault { iova, len: 4, write: true };
        let region = self.find(iova, Use::Queue).filter(|r| r.writable).ok_or(fault)?;
        // Release: an EventIdx is published after everything the controller did up to it.
        region.bytes.store_u32((iova - region.iova) as usize, value, Ordering::Release).ok_or(fault)
    }

    /// Reads host memory into a private buffer.
    pub(crate) fn read(&self, iova: u64, into: &mut [u8]) -> Result<(), DmaFault> {
        let len = into.len();
        self.walk(iova, len, false, Use::Data, |bytes, at, done, piece| bytes.read(at, &mut into[done..done + piece]))
    }

    /// Writes a private buffer to host memory.
    pub(crate) fn write(&self, iova: u64, from: &[u8]) -> Result<(), DmaFault> {
        self.walk(iova, from.len(), true, Use::Data, |bytes, at, done, piece| {
            bytes.write(at, &from[done..done + piece])
        })
    }

    /// Calls `part(region bytes, offset in region, offset in the range, length)` for each mapped piece of a data transfer.
    #[inline]
    pub(crate) fn data(
        &self,
        iova: u64,
        len: usize,
        write: bool,
        part: impl FnMut(&SharedBytes, usize, usize, usize) -> Option<()>,
    ) -> Result<(), DmaFault> {
        self.walk(iova, len, write, Use::Data, part)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> (Arc<DmaTable>, File) {
        let (file, _) = SharedBytes::memory_file(c"dma-test", 1 << 16).unwrap();
        (Arc::new(DmaTable::new(None)), file)
    }

    #[test]
    fn ranges_cross_regions_but_never_gaps() {
        let (table, file) = table();
        table.map(&file, 0, 0x10000, 0x1000, true, true).unwrap();
        table.map(&file, 0x8000, 0x11000, 0x1000, true, true).unwrap();
        table.map(&file, 0x3000, 0x13000, 0x1000, true, false).unwrap();
        let view = DmaView::new(table);
        view.write(0x10ffe, b"abcd").unwrap();
        let mut got = [0; 4];
        view.read(0x10ffe, &mut got).unwrap();
        assert_eq!(&got, b"abcd");
        assert_eq!(view.read(0x11ffe, &mut got).unwrap_err().iova, 0x12000);
        assert!(view.write(0x13000, b"x").is_err(), "mapped for reading only");
        assert!(view.read(0x13000, &mut got).is_ok());
        assert!(view.read(u64::MAX - 1, &mut got).is_err());
        assert!(view.check(0xffff, 1, false).is_err());
    }

    #[test]
    fn what_cannot_be_mapped_or_unmapped() {
        let (table, file) = table();
        table.map(&file, 0, 0x10000, 0x2000, true, true).unwrap();
        assert!(table.map(&file, 0, 0x11000, 0x2000, true, true).is_err(), "overlap");
        assert!(table.map(&file, 0, 0xf000, 0x4000, true, true).is_err(), "overlap from below");
        assert!(table.map(&file, 0, 0x20000, 0, true, true).is_err(), "empty");
        assert!(table.map(&file, 0, u64::MAX - 0xfff, 0x2000, true, true).is_err(), "wraps");
        assert!(table.map(&file, 0xf000, 0x20000, 0x2000, true, true).is_err(), "past the end of the file");
        assert!(table.unmap(0x10000, 0x1000).is_err(), "cuts a region");
        assert_eq!(table.unmap(0x20000, 0x1000).unwrap(), 0);
        assert_eq!(table.unmap(0, u64::MAX).unwrap(), 1);
        table.map(&file, 0, u64::MAX - 0xfff, 0x1000, true, true).unwrap();
        let mut view = DmaView::new(table.clone());
        assert!(view.read(u64::MAX, &mut [0]).is_ok());
        table.clear();
        view.refresh();
        assert!(view.read(u64::MAX, &mut [0]).is_err());
    }
}
