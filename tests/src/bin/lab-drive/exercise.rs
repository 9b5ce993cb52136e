//! What the crate `vfio` offers, on drives: registers, memory, interrupts, reset; one drive, then all at once.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use e2e::Layout;
use nvme_driver::spec::registers::offset;
use nvme_driver::{Completions, Controller, Namespace, Options, QueuePairOptions, Segment, Work};
use serde_json::{Value, json};
use vfio::{Address, Device, DmaBuffer, EventFd, SharedMemory};

use crate::engine::{self, Doing, Lane, Wait};
use crate::{Result, lane};

/// How long silence is listened to where no interrupt may come.
const SILENCE: Duration = Duration::from_millis(100);

pub(crate) fn exercise(addresses: &[Address]) -> Result<Option<Value>> {
    let mut drives = Vec::new();
    for address in addresses {
        drives.push(alone(address).map_err(|error| format!("{address}: {error}"))?);
    }
    let apart = if addresses.len() > 1 { Some(together(addresses)?) } else { None };
    Ok(Some(json!({ "drives": drives, "together": addresses.len(), "apart": apart })))
}

fn alone(address: &Address) -> Result<Value> {
    // Opened twice: the first time leaves nothing behind.
    drop(Device::open(address)?);
    let device = Device::open(address)?;
    let busy = match Device::open(address) {
        Ok(_) => return Err("it can be opened although it is open".into()),
        Err(error) => error.to_string(),
    };
    configuration_space(address, &device)?;
    registers(&device)?;
    vectors(&device)?;
    let options = Options { io_timeout: engine::DEADLINE, ..Default::default() };
    let controller = Controller::open(&device, &options)?;
    let namespace = controller.namespace(1)?;
    memory(&controller, &namespace)?;
    interrupts(&controller, &namespace)?;
    reset(&controller, &namespace)?;
    let ranges: Vec<_> = device.dma().ranges().iter().map(|range| [range.start, range.last]).collect();
    Ok(json!({ "address": address.to_string(), "busy": busy, "ranges": ranges }))
}

/// It is the device that sysfs shows, and it was switched on as promised.
fn configuration_space(address: &Address, device: &Device) -> Result<()> {
    let space = device.config_space();
    let shown = |name: &str| -> Result<u32> {
        let text = fs::read_to_string(format!("/sys/bus/pci/devices/{address}/{name}"))?;
        Ok(u32::from_str_radix(text.trim().trim_start_matches("0x"), 16)?)
    };
    let read = [u32::from(space.read_u16(0)?), u32::from(space.read_u16(2)?), space.read_u32(8)? >> 8];
    let expected = [shown("vendor")?, shown("device")?, shown("class")?];
    if read != expected {
        return Err(format!("configuration space says {read:x?}, sysfs {expected:x?}").into());
    }
    let wanted = vfio::COMMAND_MEMORY_SPACE | vfio::COMMAND_BUS_MASTER | vfio::COMMAND_INTERRUPT_DISABLE;
    let command = space.read_u16(vfio::COMMAND)?;
    if command & wanted != wanted {
        return Err(format!("the command register is {command:#x}").into());
    }
    Ok(())
}

fn registers(device: &Device) -> Result<()> {
    let bar = device.bar(0)?;
    if !bar.is_mapped(offset::CAP, 0x40) || !bar.doorbell(offset::DOORBELLS)?.is_mapped() {
        return Err("the registers of BAR 0 are reached by system calls".into());
    }
    if bar.read_u64(offset::CAP)? == u64::MAX || bar.read_u32(bar.size()).is_ok() || device.bar(6).is_ok() {
        return Err("BAR 0 makes no sense, or there is no end to it".into());
    }
    for range in device.dma().ranges() {
        // Where x86 machines have their message interrupts.
        if range.start <= 0xfee0_0000 && range.last >= 0xfee0_0000 {
            return Err(format!("DMA addresses {range:x?} hold the interrupts'").into());
        }
    }
    Ok(())
}

/// Vectors are switched on and off, all of them and few; one too many is refused.
fn vectors(device: &Device) -> Result<()> {
    let count = device.interrupt_vectors() as usize;
    let events = (0..=count).map(|_| EventFd::new(0)).collect::<std::io::Result<Vec<_>>>()?;
    let events: Vec<_> = events.iter().collect();
    match device.enable_interrupts(&events) {
        Err(vfio::Error::Interrupts { asked, available, .. }) if asked == available as usize + 1 => {}
        other => return Err(format!("{} vectors of {count}: {other:?}", events.len()).into()),
    }
    device.enable_interrupts(&events[..count])?;
    device.enable_interrupts(&events[..1])?;
    device.disable_interrupts()?;
    device.disable_interrupts()?;
    Ok(device.enable_interrupts(&events[..2.min(count)])?)
}

/// The drive reaches all kinds of memory, from the first byte to the last.
fn memory(controller: &Controller, namespace: &Namespace) -> Result<()> {
    let dma = controller.device().dma();
    let mut lane = lane(controller)?;
    let block_bytes = namespace.block_bytes() as usize;
    let layout = Layout::new(77, block_bytes);
    let whole = Arc::new(SharedMemory::create(5 << 20)?);
    let part = SharedMemory::from_file(whole.file().try_clone()?, 3 << 12, 1 << 20)?;
    let mapped = [dma.map(whole.clone())?, dma.map(Arc::new(part))?];
    let allocated = dma.allocate(3 << 20)?;
    let places = [(mapped[0].iova(), 5 << 20), (mapped[1].iova(), 1 << 20), (allocated.iova(), allocated.len())];
    let mut lba = 0;
    for (iova, bytes) in places {
        for at in [0, bytes / 2, bytes - block_bytes] {
            let source = dma.allocate(block_bytes)?;
            let mut block = vec![0; block_bytes];
            layout.fill(lba, &mut block);
            source.write(0, &block).ok_or("the buffer is too small")?;
            let segment = |iova| [Segment { iova, bytes: block_bytes as u32 }];
            lane.execute(namespace, Work::Write { lba, segments: &segment(source.iova()), fua: false })?;
            lane.execute(namespace, Work::Read { lba, segments: &segment(iova + at as u64) })?;
            lba += 1;
        }
    }
    // The part lies within the whole, at page 3: the drive wrote to the same memory by both.
    let expect = [(0, 0), (5 << 19, 1), ((5 << 20) - block_bytes, 2), (3 << 12, 3), ((3 << 12) + (1 << 19), 4)];
    for (at, lba) in expect {
        let mut block = vec![0; block_bytes];
        whole.read(at, &mut block).ok_or("outside of the memory")?;
        layout.check(lba, &block).map_err(|error| format!("memory at {at:#x}: {error}"))?;
    }
    for (at, lba) in [(0, 6), (3 << 19, 7), ((3 << 20) - block_bytes, 8)] {
        let mut block = vec![0; block_bytes];
        allocated.read(at, &mut block).ok_or("outside of the memory")?;
        layout.check(lba, &block).map_err(|error| format!("the buffer at {at:#x}: {error}"))?;
    }
    Ok(controller.delete_queue_pair(lane.pair)?)
}

/// Each of two queue pairs is told of its own completions, by its own vector.
fn interrupts(controller: &Controller, namespace: &Namespace) -> Result<()> {
    let mut lanes = [lane(controller)?, lane(controller)?];
    let buffer = controller.device().dma().allocate(4096)?;
    let segments = [Segment { iova: buffer.iova(), bytes: namespace.block_bytes() }];
    for lane in &mut lanes {
        lane.learn_by(Completions::Interrupt);
    }
    for round in 0..8 {
        let [one, other] = &mut lanes;
        let (active, silent) = if round % 2 == 0 { (one, other) } else { (other, one) };
        active.pair.submit(namespace, Work::Read { lba: round, segments: &segments }, round)?;
        active.pair.ring();
        if !active.interrupted(engine::DEADLINE)? {
            return Err(format!("round {round}: no interrupt came").into());
        }
        let mut seen = 0;
        active.reap(|completed| seen += u32::from(completed.status.is_success()))?;
        // Once is enough to listen for long.
        let silence = if round < 2 { SILENCE } else { Duration::ZERO };
        if seen != 1 || silent.interrupted(silence)? {
            return Err(format!("round {round}: {seen} completions, or an interrupt at the wrong place").into());
        }
    }
    for lane in lanes {
        controller.delete_queue_pair(lane.pair)?;
    }
    Ok(())
}

/// A reset of the function stops the controller under its requests; mappings outlast it, and all else is made again.
fn reset(controller: &Controller, namespace: &Namespace) -> Result<()> {
    let device = controller.device();
    let mut lane = lane(controller)?;
    let memory = Arc::new(SharedMemory::create(1 << 20)?);
    let mapping = device.dma().map(memory.clone())?;
    let segments = [Segment { iova: mapping.iova(), bytes: namespace.block_bytes() }];
    for round in 0..3u64 {
        for token in 0..32 {
            lane.pair.submit(namespace, Work::Read { lba: token, segments: &segments }, token)?;
        }
        lane.pair.ring();
        device.reset()?;
        if device.bar(0)?.read_u32(offset::CSTS)? & 1 != 0 || controller.health().is_ok() {
            return Err("the controller is still ready after a reset".into());
        }
        // Stopped for good: what it has not done by now it will not do.
        let before = read(&memory)?;
        controller.reset()?;
        let mut abandoned = 0;
        lane.pair.drain_after_reset(|_| abandoned += 1);
        if read(&memory)? != before || abandoned != 32 {
            return Err(format!("memory has changed after the reset, or {abandoned} requests were abandoned").into());
        }
        controller.recreate_queue_pair(&mut lane.pair)?;
        lane.learn_by(Completions::Interrupt);
        let layout = Layout::new(round, namespace.block_bytes() as usize);
        let dma = device.dma();
        engine::run(&mut lane, dma, namespace, 0..64, Doing::Write(&layout), Wait::Interrupts)?;
        lane.execute(namespace, Work::Read { lba: round, segments: &segments })?;
        let mut block = vec![0; namespace.block_bytes() as usize];
        memory.read(0, &mut block).ok_or("outside of the memory")?;
        layout.check(round, &block)?;
    }
    Ok(controller.delete_queue_pair(lane.pair)?)
}

fn read(memory: &SharedMemory) -> Result<Vec<u8>> {
    let mut all = vec![0; memory.len()];
    memory.read(0, &mut all).ok_or("outside of the memory")?;
    Ok(all)
}

/// All drives at once, each under a seed of its own, each on a thread; one of them is reset and closed meanwhile. Returns
/// whether each has an address space of its own; those of one IOMMU group share one.
fn together(addresses: &[Address]) -> Result<bool> {
    struct Busy {
        controller: Controller,
        namespace: Namespace,
        lane: Lane,
    }
    let open = |address: &Address| -> Result<Busy> {
        let controller = Controller::open(&Device::open(address)?, &Options::default())?;
        let namespace = controller.namespace(1)?;
        let pair = controller.create_queue_pair(QueuePairOptions { entries: Some(64), interrupt: true })?;
        Ok(Busy { controller, namespace, lane: Lane::new(pair)? })
    };
    let mut drives = addresses.iter().map(open).collect::<Result<Vec<_>>>()?;

    // In spaces of their own the first addresses are the same ones, and other memory for each drive.
    let buffers = drives.iter().map(|drive| drive.controller.device().dma().allocate(4096));
    let buffers = buffers.collect::<std::result::Result<Vec<_>, _>>()?;
    let addresses: BTreeSet<_> = buffers.iter().map(DmaBuffer::iova).collect();
    let apart = addresses.len() == 1;
    if !apart && addresses.len() < buffers.len() {
        return Err(format!("of {buffers:?} some are the same and some are not").into());
    }
    for (round, drive) in drives.iter_mut().enumerate() {
        let layout = Layout::new(1000 + round as u64, drive.namespace.block_bytes() as usize);
        let dma = drive.controller.device().dma().clone();
        engine::run(&mut drive.lane, &dma, &drive.namespace, 0..8, Doing::Write(&layout), Wait::Interrupts)?;
        let segments = [Segment { iova: buffers[round].iova(), bytes: drive.namespace.block_bytes() }];
        drive.lane.execute(&drive.namespace, Work::Read { lba: 3, segments: &segments })?;
    }
    for (round, (drive, buffer)) in drives.iter().zip(&buffers).enumerate() {
        let mut block = vec![0; drive.namespace.block_bytes() as usize];
        buffer.read(0, &mut block).ok_or("outside of the buffer")?;
        Layout::new(1000 + round as u64, block.len()).check(3, &block)?;
    }
    let last = drives.pop().ok_or("no drive")?;
    std::thread::scope(|scope| {
        let threads: Vec<_> = drives
            .iter_mut()
            .zip(2000u64..)
            .map(|(drive, seed)| {
                scope.spawn(move || -> std::result::Result<(), String> {
                    let layout = Layout::new(seed, drive.namespace.block_bytes() as usize);
                    let dma = drive.controller.device().dma().clone();
                    let end = drive.namespace.blocks.min(8192);
                    for doing in [Doing::Write(&layout), Doing::Read(&layout)] {
                        engine::run(&mut drive.lane, &dma, &drive.namespace, 0..end, doing, Wait::Switching)
                            .map_err(|error| error.to_string())?;
                    }
                    Ok(())
                })
            })
            .collect();
        // Meanwhile the last drive comes and goes.
        for _ in 0..3 {
            last.controller.device().reset()?;
            last.controller.reset()?;
        }
        let Busy { controller, lane, .. } = last;
        drop(lane);
        drop(controller);
        for thread in threads {
            thread.join().map_err(|_| "a thread has panicked")??;
        }
        Ok(apart)
    })
}
