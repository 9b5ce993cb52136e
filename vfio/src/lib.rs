//! Reaching a PCI device from user space: kernel VFIO and vfio-user behind one type.
//!
//! A driver in user space needs four things of a device: its registers, memory that both can reach, interrupts, and a
//! reset. [`Device`] gives them in one way, whether the device is a PCI function of this machine or is served by
//! another program on a socket. A driver written on it runs on both.
//!
//! # What it owns
//!
//! The device's file or connection, its mapped registers, its IOVA space and every mapping in it, and the memory that
//! [`DmaSpace::allocate`] has given out. Everything that is `unsafe` about devices and their memory is here.
//!
//! # What it must never do
//!
//! - Know a protocol above PCI: no NVMe, no virtio.
//! - Give a device access to memory that was not mapped for it.
//! - Wait without a deadline for a server.
//! - Let the process end because somebody else has made a file shorter.
//!
//! # A device
//!
//! ```no_run
//! use std::sync::atomic::{AtomicU64, Ordering};
//! use vfio::Device;
//!
//! // "0000:01:00.0" is a PCI function, bound to vfio-pci; "vfio-user:/run/nvme.sock" is a server's socket.
//! let device = Device::open(&"0000:01:00.0".parse()?)?;
//!
//! // Registers: typed, at byte offsets of a base address register.
//! let registers = device.bar(0)?;
//! let capabilities = registers.read_u64(0)?;
//!
//! // Memory for both: the host sees atomics, the device sees it at `iova`.
//! let memory = device.dma().allocate(8192)?;
//! let words = memory.slice::<AtomicU64>(0, 1024).expect("1024 words are 8192 bytes");
//! words[0].store(capabilities, Ordering::Relaxed);
//! registers.write_u64(0x28, memory.iova())?;
//!
//! // A doorbell: one store, which the device sees after the stores to memory before it.
//! let doorbell = registers.doorbell(0x1000)?;
//! doorbell.ring(1);
//! # Ok::<(), vfio::Error>(())
//! ```
//!
//! `examples/inspect.rs` shows what a device offers.
//!
//! # Registers
//!
//! A [`Bar`] is mapped where the device allows that, honouring the areas it names; there an access is one load or store.
//! Elsewhere each access is a request, to the kernel or over the socket, and takes microseconds. A [`Doorbell`] is found
//! once and rung often. Registers that are mapped do not fail: a device that has gone reads as all ones.
//!
//! # Memory
//!
//! A device sees memory at DMA addresses (IOVAs). [`DmaSpace`] hands them out within the ranges that the IOMMU reports. They are
//! congruent to the memory's place in its file modulo 2 MiB (up to 1 GiB for long memory), so that the IOMMU's large pages can
//! be used. There are three ways to share memory:
//!
//! - [`DmaSpace::allocate`]: a driver's own queues and buffers. Small ones are cut from chunks of 2 MiB that are mapped
//!   once. Hugepages are used where any are free.
//! - [`DmaSpace::map`]: [`SharedMemory`], made here or of a file that came from elsewhere.
//! - [`DmaSpace::map_raw`]: memory that somebody else has mapped.
//!
//! Mappings end when they are dropped. Memory is seen as atomics ([`DmaElement`]), as the device may change it at any
//! time. A load with `Acquire` of what the device writes last (a phase bit, an index) orders the loads behind it;
//! [`Doorbell::ring`] and [`Bar::write_u32`] order all stores before them.
//!
//! # Interrupts
//!
//! [`Device::enable_interrupts`] joins each MSI-X vector with an [`EventFd`].
//!
//! # Removal
//!
//! A device may have to go: the kernel asks for it back when it is removed or unbound, a vfio-user server ends.
//! [`Device::notice`] tells, and [`Device::notices`] can be waited for. A removal by the kernel does not go on before
//! everything of the device is dropped: clones, BARs, doorbells, DMA mappings and buffers ([`Device::close`] tells whether it
//! was). Then the same address can be opened again, as soon as there is something behind it.
//!
//! # vfio-user
//!
//! Requests of several threads go over the connection one after the other, each with a deadline from when it is sent
//! ([`OpenOptions::request_timeout`]). Three errors tell what happened:
//!
//! - [`Error::Server`]: the server has refused something. It says what was asked for and what the server answered. The connection stays
//!   as good as before.
//! - [`Error::Timeout`] once, and [`Error::GivenUp`] from then on: the server does not answer in time. It may live on;
//!   [`Device::server`] tells whether it did.
//! - [`Error::Disconnected`]: the server has closed the connection. It has ended, and what it held in memory is lost.
//!
//! Nobody is held for longer. Mapped registers and memory stay valid meanwhile; the server just does not see them any more. Open the
//! device again to go on.
//!
//! # Kernel VFIO
//!
//! The device's own character device with iommufd is used where the kernel has both, else its IOMMU group and a type1v2
//! container. If a device cannot be opened (no IOMMU, another driver, no rights, a shared group, the limit on locked
//! memory), the error says why and what to do. One process can open several devices. Those of one IOMMU
//! group share one address space, so that each reaches the memory of all.
//!
//! # Safety
//!
//! [`DmaSpace::map_raw`] and [`Guard::new`] are the only unsafe functions, and [`PlainMemory`] is the one type whose rules the compiler
//! cannot check (it is for clients, not for drivers). A device is trusted with the memory that was mapped for it, and with nothing
//! else. The pages of a dropped buffer are given to the next one: drop a buffer after the commands that use it. Memory whose file
//! somebody else makes shorter does not end the process (SIGBUS): it is replaced by memory of this process, see [`Guard`]. Registers of a
//! vfio-user server then read all ones, as those of a device that has gone.
// The room for it: what the kernel maps, and what a device writes. Each block is justified.
#![allow(unsafe_code)]

mod address;
mod backend;
mod bar;
mod config_space;
mod device;
mod dma;
mod error;
mod guard;
mod iova;

pub use address::{Address, PciAddress};
pub use backend::{Notice, ServerIdentity};
pub use bar::{Bar, Doorbell};
pub use config_space::{
    CAPABILITY_MSIX, COMMAND, COMMAND_BUS_MASTER, COMMAND_INTERRUPT_DISABLE, COMMAND_MEMORY_SPACE, ConfigSpace,
};
pub use device::{Device, OpenOptions};
pub use dma::numa::numa_node_of_cpu;
pub use dma::{
    DmaAddresses, DmaBuffer, DmaElement, DmaLimits, DmaMapping, DmaSlice, DmaSpace, PlainMemory, SharedMemory,
};
pub use error::Error;
pub use guard::{Guard, LossListener};
pub use iova::IovaRange;
pub use vmm_sys_util::eventfd::EventFd;
