//! The NVMe driver against QEMU's controller.
