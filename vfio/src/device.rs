//! A device that was opened.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use crate::backend::Backend;
use crate::backend::kernel::KernelBackend;
use crate::backend::user::UserBackend;
use crate::config_space::{self, ConfigSpace};
use crate::{Address, Bar, DmaSpace, Error, Notice, ServerIdentity};

/// The BARs of a PCI function: 0 to 5.
const BARS: u8 = 6;

/// How a device is opened.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// How long a vfio-user server may take to answer one request, that for the connection included. After that the connection
    /// is given up: shorter than a server may be busy, and a device that is merely slow is lost. 30 s by default.
    pub request_timeout: Duration,
}

impl Default for OpenOptions {
    fn default() -> OpenOptions {
        OpenOptions { request_timeout: Duration::from_secs(30) }
    }
}

/// A PCI device that this process drives. Clones are the same device.
///
/// The device is given back when the last clone, [`Bar`], [`Doorbell`](crate::Doorbell) and DMA mapping is gone.
#[derive(Clone)]
pub struct Device {
    inner: Arc<DeviceInner>,
}

struct DeviceInner {
    address: Address,
    backend: Arc<dyn Backend>,
    dma: DmaSpace,
}

impl Device {
    /// Opens the device, lets it answer memory accesses and do DMA, and switches its interrupt pin (INTx) off. It is not reset
    /// here; the kernel does that by itself when it gives a PCI function out, if the function can be reset alone.
    pub fn open(address: &Address) -> Result<Device, Error> {
        Device::open_with(address, &OpenOptions::default())
    }

    /// Like [`Device::open`], with options.
    pub fn open_with(address: &Address, options: &OpenOptions) -> Result<Device, Error> {
        let backend: Arc<dyn Backend> = match address {
            Address::VfioUser(socket) => Arc::new(UserBackend::open(socket, options.request_timeout)?),
            Address::Pci(pci) => Arc::new(KernelBackend::open(*pci)?),
        };
        if config_space::exists(&*backend) {
            config_space::enable_device(&*backend)?;
        }
        let dma = DmaSpace::new(backend.clone(), address.to_string());
        Ok(Device { inner: Arc::new(DeviceInner { address: address.clone(), backend, dma }) })
    }

    /// The address it was opened with.
    pub fn address(&self) -> &Address {
        &self.inner.address
    }

    /// The memory the device can reach.
    pub fn dma(&self) -> &DmaSpace {
        &self.inner.dma
    }

    /// The PCI configuration space.
    pub fn config_space(&self) -> ConfigSpace {
        ConfigSpace::new(self.inner.backend.clone())
    }

    /// The region of BAR `index` (0 to 5).
    pub fn bar(&self, index: u8) -> Result<Bar, Error> {
        let region = if index < BARS { self.inner.backend.region(index.into()) } else { Default::default() };
        if region.size == 0 {
            return Err(Error::NoRegion { device: self.address().to_string(), region: format!("BAR {index}") });
        }
        Ok(Bar::new(index.into(), region, self.inner.backend.clone(), self.address().to_string()))
    }

    /// The number of MSI-X vectors; 0 if the device has no MSI-X.
    pub fn interrupt_vectors(&self) -> u32 {
        self.inner.backend.interrupt_vectors()
    }

    /// Has MSI-X vector `n` signal `events[n]`; replaces what was enabled before. The descriptors are duplicated.
    pub fn enable_interrupts(&self, events: &[&EventFd]) -> Result<(), Error> {
        let available = self.interrupt_vectors();
        if events.is_empty() || events.len() > available as usize {
            return Err(Error::Interrupts { device: self.address().to_string(), asked: events.len(), available });
        }
        self.inner.backend.enable_interrupts(events)
    }

    /// Disables all MSI-X vectors.
    pub fn disable_interrupts(&self) -> Result<(), Error> {
        self.inner.backend.disable_interrupts()
    }

    /// Resets the device's function, then lets it answer memory accesses and do DMA again. DMA mappings stay; interrupts
    /// have to be enabled again.
    pub fn reset(&self) -> Result<(), Error> {
        self.inner.backend.reset()?;
        if config_space::exists(&*self.inner.backend) {
            config_space::enable_device(&*self.inner.backend)?;
        }
        Ok(())
    }

    /// Why the device should be given back, if there is a reason; what was told once is told until it is closed. Does not
    /// wait: [`Device::notices`] does that.
    pub fn notice(&self) -> Option<Notice> {
        self.inner.backend.notices().look()
    }

    /// A descriptor for `poll`: readable as soon as [`Device::notice`] has something to tell. Nothing is to be read from it.
    pub fn notices(&self) -> BorrowedFd<'_> {
        self.inner.backend.notices().descriptor()
    }

    /// Gives this reference up; true if nothing else of the device is left in this process, so that it is closed on return.
    pub fn close(self) -> bool {
        let backend = Arc::downgrade(&self.inner.backend);
        drop(self);
        backend.strong_count() == 0
    }

    /// Who serves the device.
    pub fn server(&self) -> ServerIdentity {
        self.inner.backend.server()
    }

    /// The NUMA node the device is attached to, if the machine tells.
    pub fn numa_node(&self) -> Option<u32> {
        self.inner.backend.numa_node()
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("address", &self.inner.address).finish_non_exhaustive()
    }
}
