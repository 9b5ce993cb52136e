//! The front-end's side: vfio-user messages on a socket, one front-end at a time.

mod session;
mod wire;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_TYPE_MASK, VFIO_IRQ_SET_DATA_BOOL, VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_IRQ_SET_DATA_NONE, VFIO_IRQ_SET_DATA_TYPE_MASK, VFIO_PCI_MSIX_IRQ_INDEX,
};

use crate::config_space::{BarLayout, ConfigSpace};
use crate::registers::{CSTS_FATAL, CSTS_READY, DOORBELLS, enabled, shutdown_notification};
use crate::shared::{Counters, Request, Shared};

const BAR0: u32 = 0;
const CONFIG: u32 = 7;

/// Serves one front-end after the other until `shared.stop` is set and the listener shut down.
pub(crate) fn serve(shared: Arc<Shared>, listener: OwnedFd, memory: File) {
    let listener = UnixListener::from(listener);
    loop {
        let result = listener.accept().and_then(|(stream, _)| {
            let mut front_end = FrontEnd { shared: shared.clone(), msix_table: vec![0; msix_bytes(&shared.layout)] };
            session::run(&stream, &mut front_end, &memory)
        });
        front_end_gone(&shared);
        match result {
            _ if shared.stop.load(Ordering::Acquire) => return,
            Ok(()) => log::info!("the front-end has gone"),
            Err(error) => {
                log::warn!("the front-end is dropped: {error}");
                // An accept that fails at once would fail again and again.
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

/// Leaves nothing of a front-end behind.
fn front_end_gone(shared: &Shared) {
    Counters::add(&shared.counters.front_ends_gone, 1);
    let reset = shared.ask(Request::Reset);
    *shared.config_space() = ConfigSpace::new(&shared.layout);
    shared.bus_master.store(false, Ordering::Relaxed);
    shared.interrupts.disable_all();
    shared.dma.clear();
    let refresh = shared.ask(Request::RefreshDma);
    if let Err(error) = reset.and(refresh)
        && !shared.stop.load(Ordering::Acquire)
    {
        log::error!("{error}");
    }
}

fn msix_bytes(layout: &BarLayout) -> usize {
    usize::from(layout.vectors) * 16
}

/// What one front-end sees.
struct FrontEnd {
    shared: Arc<Shared>,
    msix_table: Vec<u8>,
}

/// The part of an access `[offset, offset + len)` inside `[start, start + size)`: its place in the data, and in the area.
fn overlap(offset: u64, len: usize, start: u64, size: u64) -> Option<(std::ops::Range<usize>, u64)> {
    let from = offset.max(start);
    let to = offset.saturating_add(len as u64).min(start.saturating_add(size));
    (from < to).then(|| ((from - offset) as usize..(to - offset) as usize, from - start))
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

impl FrontEnd {
    fn gone(&self) -> bool {
        self.shared.faults.removed() || self.shared.stop.load(Ordering::Acquire)
    }

    /// Takes as long to answer a register access as the faults say.
    fn delay(&self) {
        std::thread::sleep(self.shared.faults.plan().answer_delay);
    }

    fn read_bar(&self, offset: u64, data: &mut [u8]) {
        let layout = &self.shared.layout;
        if let Some((part, at)) = overlap(offset, data.len(), 0, DOORBELLS) {
            self.shared.registers().read(at, &mut data[part]);
        }
        if let Some((part, at)) = overlap(offset, data.len(), DOORBELLS, layout.doorbell_bytes) {
            let _ = self.shared.doorbells.read(at as usize, &mut data[part]);
        }
        if let Some((part, at)) = overlap(offset, data.len(), layout.msix_table, self.msix_table.len() as u64) {
            let at = at as usize;
            let len = part.len();
            data[part].copy_from_slice(&self.msix_table[at..at + len]);
        }
    }

    fn write_bar(&mut self, offset: u64, data: &[u8]) {
        let layout = self.shared.layout;
        if let Some((part, at)) = overlap(offset, data.len(), 0, DOORBELLS) {
            let told = {
                let mut registers = self.shared.registers();
                let before = registers.configuration;
                let starting = enabled(before) && registers.status & (CSTS_READY | CSTS_FATAL) == 0;
                registers.write(at, &data[part]);
                if starting && !enabled(registers.configuration) {
                    // Only this thread writes it.
                    Counters::add(&self.shared.counters.early_disables, 1);
                    log::warn!("CC.EN was cleared before CSTS.RDY was set (NVMe Base 2.0, 3.1.3.5)");
                }
                shutdown_notification(before) == 0 && shutdown_notification(registers.configuration) != 0
            };
            if told {
                // Before the answer: what the host submits when it has it comes too late. Nobody answers after the end.
                let _ = self.shared.ask(Request::ShutdownTold);
            }
            self.shared.call_attention();
        }
        if let Some((part, at)) = overlap(offset, data.len(), DOORBELLS, layout.doorbell_bytes) {
            self.ring(at, &data[part]);
        }
        if let Some((part, at)) = overlap(offset, data.len(), layout.msix_table, self.msix_table.len() as u64) {
            let at = at as usize;
            self.msix_table[at..at + part.len()].copy_from_slice(&data[part]);
        }
    }

    /// A doorbell write by message.
    fn ring(&self, at: u64, data: &[u8]) {
        if !at.is_multiple_of(4) || !data.len().is_multiple_of(4) {
            log::warn!("doorbell write of {} bytes at {at:#x}: not a dword; ignored", data.len());
            return;
        }
        for (n, word) in data.chunks_exact(4).enumerate() {
            let value = u32::from_le_bytes(word.try_into().expect("chunks of four bytes"));
            // Release: pairs with the Acquire in `Shared::doorbell`; the front-end wrote its entries before it sent this.
            let _ = self.shared.doorbells.store_u32(at as usize + 4 * n, value, Ordering::Release);
        }
        self.shared.wake();
    }

    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) {
        self.delay();
        match region {
            _ if self.gone() => data.fill(0xff),
            BAR0 => self.read_bar(offset, data),
            CONFIG => self.shared.config_space().read(offset, data),
            _ => {
                log::warn!("read of {} bytes at {offset:#x} in region {region}, which is empty", data.len());
                data.fill(0xff);
            }
        }
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        self.delay();
        match region {
            _ if self.gone() => {}
            BAR0 => self.write_bar(offset, data),
            CONFIG => {
                let (reset, bus_master) = {
                    let mut space = self.shared.config_space();
                    (space.write(offset, data), space.bus_master())
                };
                // Relaxed: the request below, or the doorbell that comes later, orders it.
                if self.shared.bus_master.swap(bus_master, Ordering::Relaxed) && !bus_master {
                    // The answer promises that memory is not touched any more.
                    self.shared.ask(Request::RefreshDma).map_err(io::Error::other)?;
                }
                if reset {
                    self.reset()?;
                }
            }
            _ => log::warn!("write of {} bytes at {offset:#x} in region {region}, which is empty", data.len()),
        }
        Ok(())
    }

    fn dma_map(
        &mut self,
        (readable, writable): (bool, bool),
        offset: u64,
        address: u64,
        size: u64,
        file: Option<File>,
    ) -> io::Result<()> {
        let Some(file) = file else {
            let text = format!("DMA map of {size} bytes at {address:#x} without a file descriptor: not supported");
            log::error!("{text}");
            return Err(io::Error::new(io::ErrorKind::Unsupported, text));
        };
        log::debug!("DMA map of {size} bytes at {address:#x}, file offset {offset:#x}");
        let mapped = self.shared.dma.len();
        if self.shared.faults.plan().most_dma_regions.is_some_and(|most| mapped >= most) {
            return Err(io::Error::other(format!("DMA map refused by a fault: {mapped} regions are mapped")));
        }
        self.shared.dma.map(&file, offset, address, size, readable, writable).inspect_err(|error| {
            log::error!("cannot map {size} bytes at {address:#x} for DMA (file offset {offset:#x}): {error}");
        })
    }

    fn dma_unmap(&mut self, everything: bool, address: u64, size: u64) -> io::Result<()> {
        log::debug!("DMA unmap of {size} bytes at {address:#x}");
        Counters::add(&self.shared.counters.dma_unmaps, 1);
        if everything {
            self.shared.dma.clear();
        } else if self.shared.dma.unmap(address, size).inspect_err(|error| log::error!("{error}"))? == 0 {
            log::warn!("DMA unmap of {size} bytes at {address:#x}: nothing is mapped there");
        }
        // The answer promises that the memory is not touched any more.
        match self.shared.ask(Request::RefreshDma) {
            // A front-end that lets go of a controller which has ended is not to wait for an answer until its patience is over.
            Err(_) if self.shared.is_over() => Ok(()),
            refreshed => refreshed.map(drop).map_err(io::Error::other),
        }
    }

    fn reset(&mut self) -> io::Result<()> {
        if self.shared.faults.plan().reset_forgets_interrupts {
            self.shared.interrupts.disable_all();
        }
        self.shared.ask(Request::FunctionReset).map(drop).map_err(io::Error::other)
    }

    fn set_irqs(&mut self, index: u32, flags: u32, start: u32, count: u32, fds: Vec<File>) -> io::Result<()> {
        let (data, action) = (flags & VFIO_IRQ_SET_DATA_TYPE_MASK, flags & VFIO_IRQ_SET_ACTION_TYPE_MASK);
        if index != VFIO_PCI_MSIX_IRQ_INDEX || action != VFIO_IRQ_SET_ACTION_TRIGGER {
            // Front-ends switch all kinds off at start: nothing to do, and no error.
            if count == 0 || data == VFIO_IRQ_SET_DATA_NONE {
                return Ok(());
            }
            let text = format!("SET_IRQS of kind {index}, flags {flags:#x}: only MSI-X triggers are supported");
            log::error!("{text}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        match data {
            VFIO_IRQ_SET_DATA_BOOL => return Err(invalid("SET_IRQS with flags for each vector".into())),
            VFIO_IRQ_SET_DATA_NONE if count == 0 => self.shared.interrupts.disable_all(),
            VFIO_IRQ_SET_DATA_NONE => self.shared.interrupts.trigger(start, count),
            VFIO_IRQ_SET_DATA_EVENTFD if count == 0 => self.shared.interrupts.disable_all(),
            _ => {
                let result = self.shared.interrupts.assign(start, count, fds);
                result.inspect_err(|error| log::error!("{error}"))?;
            }
        }
        Ok(())
    }
}
