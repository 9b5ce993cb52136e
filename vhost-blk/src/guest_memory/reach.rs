//! The part of guests' memory that a drive reaches: all of it while the drive is there, none while it is away.
//!
//! A drive that goes takes its DMA mappings with it, and one that comes back needs new ones, at other addresses perhaps. The
//! tables stay as they are meanwhile: only where the device sees a region changes, and only while no lane has a queue pair
//! of that device.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use vfio::DmaSpace;

use super::{Error, Region};

/// The memory of all guests that use a drive.
#[derive(Default)]
pub struct Reach {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// `None`: the drive is away.
    dma: Option<DmaSpace>,
    regions: Vec<Weak<Region>>,
}

impl Reach {
    /// For a drive that is there, and no memory yet.
    pub fn new(dma: DmaSpace) -> Reach {
        Reach { inner: Mutex::new(Inner { dma: Some(dma), regions: Vec::new() }) }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Is the memory mapped for a device?
    pub fn is_attached(&self) -> bool {
        self.inner().dma.is_some()
    }

    /// Takes the device's access to all memory away; what is added from now on waits for [`Reach::attach`].
    ///
    /// The device must not be at work in it any more, or its addresses mean nothing from here on.
    pub fn detach(&self) {
        let mut inner = self.inner();
        inner.dma = None;
        inner.live().for_each(|region| region.detach());
    }

    /// The drive is back: everything is mapped for it.
    ///
    /// # Errors
    /// A region cannot be mapped; then none is.
    pub fn attach(&self, dma: DmaSpace) -> Result<(), Error> {
        let mut inner = self.inner();
        inner.regions.retain(|region| region.strong_count() > 0);
        if let Some(error) = inner.live().find_map(|region| region.attach(&dma).err()) {
            inner.live().for_each(|region| region.detach());
            return Err(error);
        }
        inner.dma = Some(dma);
        Ok(())
    }

    /// One region more, mapped if the drive is there.
    pub(super) fn add(&self, region: &Arc<Region>) -> Result<(), Error> {
        let mut inner = self.inner();
        if let Some(dma) = &inner.dma {
            region.attach(dma)?;
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
