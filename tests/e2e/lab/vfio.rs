//! The crate `vfio` on a kernel's VFIO.
