//! Reaching a PCI device from user space: kernel VFIO and vfio-user behind one type.
