//! What devices of one IOMMU group have in common. Nothing keeps them from one another, so the kernel gives all of them
//! one address space: what is mapped for one of them is mapped for all, and no address can mean two things.
//!
//! `vfio-ioctls` tries to take a group out of its container with each of its devices that is closed, and logs an error where
//! that is too early. Nothing comes of it: with the last one it succeeds.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use vfio_ioctls::{VfioContainer, VfioIommufd, VfioOps};

use crate::iova::RangeAllocator;
use crate::{IovaRange, PciAddress};

/// By which of the kernel's interfaces memory is mapped for devices.
#[derive(Clone)]
pub(super) enum IommuInterface {
    Iommufd(Arc<VfioIommufd>),
    Group(Arc<VfioContainer>),
}

/// The address space of a group.
pub(super) struct Space {
    pub iommu: IommuInterface,
    pub ranges: Vec<IovaRange>,
    /// The smallest page, bytes.
    pub page: u64,
    /// What is free of it, for all devices that share it.
    pub addresses: OnceLock<Arc<Mutex<RangeAllocator>>>,
}

impl Space {
    pub(super) fn new(iommu: IommuInterface, ranges: Vec<IovaRange>, page: u64) -> Arc<Space> {
        Arc::new(Space { iommu, ranges, page, addresses: OnceLock::new() })
    }

    pub(super) fn dma(&self) -> &dyn VfioOps {
        match &self.iommu {
            IommuInterface::Iommufd(iommufd) => &**iommufd,
            IommuInterface::Group(container) => &**container,
        }
    }

    pub(super) fn is_iommufd(&self) -> bool {
        matches!(self.iommu, IommuInterface::Iommufd(_))
    }
}

/// A device that this process has open.
struct Entry {
    address: PciAddress,
    group: u32,
    space: Weak<Space>,
    /// Dead when it has been closed.
    open: Weak<()>,
}

static OPEN: Mutex<Vec<Entry>> = Mutex::new(Vec::new());

/// The devices that this process has open; no other one is opened meanwhile.
pub(super) struct OpenDevices(MutexGuard<'static, Vec<Entry>>);

impl OpenDevices {
    pub(super) fn lock() -> OpenDevices {
        let mut entries = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        entries.retain(|entry| entry.open.strong_count() > 0);
        OpenDevices(entries)
    }

    pub(super) fn has(&self, address: PciAddress) -> bool {
        self.0.iter().any(|entry| entry.address == address)
    }

    /// The address space of a group of which a device is open in this way.
    pub(super) fn space(&self, group: u32, iommufd: bool) -> Option<Arc<Space>> {
        let mut spaces = self.0.iter().filter(|entry| entry.group == group).filter_map(|entry| entry.space.upgrade());
        spaces.find(|space| space.is_iommufd() == iommufd)
    }

    /// Notes a device, which is open until the last clone of what is returned is dropped.
    pub(super) fn add(&mut self, address: PciAddress, group: u32, space: &Arc<Space>) -> Arc<()> {
        let open = Arc::new(());
        self.0.push(Entry { address, group, space: Arc::downgrade(space), open: Arc::downgrade(&open) });
        open
    }
}
