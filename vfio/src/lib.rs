//! Reaching a PCI device from user space: kernel VFIO and vfio-user behind one type.

mod address;
mod backend;
mod bar;
mod config_space;
mod device;
mod dma;
mod error;

pub use address::{Address, PciAddress};
pub use bar::{Bar, Doorbell};
pub use config_space::{CAPABILITY_MSIX, COMMAND, COMMAND_BUS_MASTER, COMMAND_MEMORY_SPACE, ConfigSpace};
pub use device::{Device, OpenOptions};
pub use dma::{DmaBuffer, DmaElement, DmaMapping, DmaSlice, DmaSpace, IovaRange, SharedMemory};
pub use error::Error;
pub use vmm_sys_util::eventfd::EventFd;
