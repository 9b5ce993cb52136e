//! The part of guests' memory that a drive reaches: all of it while the device is open, none otherwise.
//!
//! A drive that goes takes its DMA mappings with it, and one that comes back needs new ones, at other addresses perhaps. The
//! tables stay as they are meanwhile: only where the device sees a region changes, and only while no lane has a queue pair
//! of that device.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use vfio::{DmaLimits, DmaSpace};

use super::{MemoryError, Region};

/// The memory of all guests that use a drive. The default is for a device that is not open, and of which nothing is known.
#[derive(Default)]
pub struct DmaScope {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// `None`: the device is not open.
    dma: Option<DmaSpace>,
    /// What is known of a device that is not open; `None`: nothing.
    limits: Option<DmaLimits>,
    regions: Vec<Weak<Region>>,
}

impl DmaScope {
    /// For a drive that is there, and no memory yet.
    pub fn new(dma: DmaSpace) -> DmaScope {
        let limits = Some(dma.limits());
        DmaScope { inner: Mutex::new(Inner { dma: Some(dma), limits, regions: Vec::new() }) }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Is the memory mapped for a device?
    pub fn is_attached(&self) -> bool {
        self.inner().dma.is_some()
    }

    /// Takes the device's access to all memory away; what is added from now on waits for [`DmaScope::attach`].
    ///
    /// The device must not be at work in it any more, or its addresses mean nothing from here on.
    pub fn detach(&self) {
        let mut inner = self.inner();
        inner.dma = None;
        inner.live().for_each(|region| region.detach());
    }

    /// The drive is back: everything is mapped for it that can be. Returns what cannot: that is its session's matter, which ends
    /// ([`GuestMemory::unreachable`](super::GuestMemory::unreachable)), and nobody else's.
    ///
    /// # Errors
    /// The drive does not answer; then nothing is mapped.
    pub fn attach(&self, dma: DmaSpace) -> Result<Vec<MemoryError>, MemoryError> {
        let mut inner = self.inner();
        inner.regions.retain(|region| region.strong_count() > 0);
        let mut refused = Vec::new();
        for region in inner.live().filter(|region| region.refusal.get().is_none()) {
            let Err(error) = region.attach(&dma) else { continue };
            if error.is_the_drives() {
                inner.live().for_each(|region| region.detach());
                return Err(error);
            }
            // It is the first to say so: the others are left out above.
            let _ = region.refusal.set(error.to_string());
            refused.push(error);
        }
        inner.limits = Some(dma.limits());
        inner.dma = Some(dma);
        Ok(refused)
    }

    /// One region more, mapped if the drive is there. If it is not, what is known of it has to allow for the region.
    pub(super) fn add(&self, region: &Arc<Region>) -> Result<(), MemoryError> {
        let mut inner = self.inner();
        match &inner.dma {
            Some(dma) => region.attach(dma)?,
            None => inner.limits.iter().try_for_each(|limits| region.check(limits))?,
        }
        inner.regions.retain(|region| region.strong_count() > 0);
        inner.regions.push(Arc::downgrade(region));
        Ok(())
    }
}

impl Inner {
    fn live(&self) -> impl Iterator<Item = Arc<Region>> {
        self.regions.iter().filter_map(Weak::upgrade)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{GuestMemory, RegionDescription};
    use super::*;

    #[test]
    fn memory_that_comes_while_the_drive_is_away_is_checked_against_what_is_known_of_it() {
        let take = |scope: &DmaScope, bytes| {
            let region = RegionDescription { guest_address: 0, bytes, user_address: 0, file_offset: 0 };
            let file = tempfile::tempfile().unwrap();
            file.set_len(bytes).unwrap();
            GuestMemory::new().with_region(scope, region, file).map(drop)
        };
        let away = |limits| DmaScope { inner: Mutex::new(Inner { limits, ..Inner::default() }) };
        let knows = |alignment, longest| away(Some(DmaLimits::new(alignment, longest)));
        take(&knows(4096, 0x8000), 0x8000).unwrap();
        for (scope, bytes) in [(knows(4096, 0x8000), 0x9000), (knows(0x1000_0000, 1 << 40), 0x9000)] {
            let error = take(&scope, bytes).unwrap_err();
            assert!(matches!(error, MemoryError::Dma { source: vfio::Error::BadMemory { .. }, .. }), "{error}");
            assert!(scope.inner().regions.is_empty(), "it would be mapped when the drive is back");
        }
        take(&away(None), 0x9000).unwrap();
    }

    #[test]
    fn what_a_drive_takes_is_known_when_it_has_gone() {
        let machine = crate::datapath::lane::testing::Machine::new(nvme_sim::Config::default());
        let known = machine.device.dma().limits();
        let scope = DmaScope::new(machine.device.dma().clone());
        for _ in 0..2 {
            scope.detach();
            assert_eq!(scope.inner().limits, Some(known));
            scope.attach(machine.device.dma().clone()).unwrap();
        }
    }
}
