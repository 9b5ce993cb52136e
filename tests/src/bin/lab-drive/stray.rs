//! A drive that reaches for memory it may not reach.

use std::sync::Arc;

use nvme_driver::{Segment, Work};
use serde_json::{Value, json};
use vfio::SharedMemory;

use crate::{Disk, Result};

const BYTES: usize = 2 << 20;
/// Where in the memory the drive reaches.
const AT: usize = 0x1_3000;
const MARK: u8 = 0xa5;

/// Maps memory, has the drive use it, takes it away, and has the drive reach for it again: it must not get there, neither
/// to write nor when the address means other memory by then.
pub fn stray(disk: &Disk) -> Result<Option<Value>> {
    let (controller, namespace, mut lane) = disk.open()?;
    let dma = controller.device().dma();
    let memory = Arc::new(SharedMemory::create(BYTES)?);
    let mapping = dma.map(memory.clone())?;
    let iova = mapping.iova() + AT as u64;
    let segments = [Segment { iova, bytes: 8192 }];
    let read = Work::Read { lba: 0, segments: &segments };

    mark(&memory)?;
    lane.execute(&namespace, read)?;
    if changed(&memory)? != Some((AT, 8192)) {
        return Err(format!("a read to mapped memory changed {:?}", changed(&memory)?).into());
    }

    mark(&memory)?;
    drop(mapping);
    let reading = lane.status_of(&namespace, read)?;
    unchanged(&memory, "a read to an address that is not mapped")?;

    // The same addresses, other memory.
    let other = Arc::new(SharedMemory::create(BYTES)?);
    mark(&other)?;
    let mapping = dma.map(other.clone())?;
    if mapping.iova() + AT as u64 != iova {
        return Err(format!("the next mapping is at {:#x}, not where the last one was", mapping.iova()).into());
    }
    lane.execute(&namespace, read)?;
    unchanged(&memory, "a read to an address that is mapped to other memory by now")?;
    if changed(&other)? != Some((AT, 8192)) {
        return Err(format!("a read to memory mapped anew changed {:?}", changed(&other)?).into());
    }
    drop(mapping);

    // The drive reads here, which would show its memory's content to whoever reads the block.
    let writing = lane.status_of(&namespace, Work::Write { lba: 64, segments: &segments, fua: false })?;
    let buffer = dma.allocate(8192)?;
    let mapped = [Segment { iova: buffer.iova(), bytes: 8192 }];
    lane.execute(&namespace, Work::Read { lba: 64, segments: &mapped })?;
    let mut written = vec![0; 8192];
    buffer.read(0, &mut written).ok_or("the buffer is too small")?;
    let mut there = vec![0; 8192];
    for memory in [&memory, &other] {
        memory.read(AT, &mut there).ok_or("the memory is too small")?;
        if there == written {
            return Err("the drive has read memory that is not mapped".into());
        }
    }
    Ok(Some(json!({
        "iova": format!("{iova:#x}"),
        "reading": reading.to_string(),
        "writing": writing.to_string(),
    })))
}

fn mark(memory: &SharedMemory) -> Result<()> {
    Ok(memory.write(0, &[MARK; BYTES]).ok_or("the memory is too small")?)
}

/// Where the first byte lies that is not as marked, and how many bytes from there on to the last one.
fn changed(memory: &SharedMemory) -> Result<Option<(usize, usize)>> {
    let mut all = vec![0; BYTES];
    memory.read(0, &mut all).ok_or("the memory is too small")?;
    let first = all.iter().position(|&byte| byte != MARK);
    let last = all.iter().rposition(|&byte| byte != MARK);
    Ok(first.zip(last).map(|(first, last)| (first, last + 1 - first)))
}

fn unchanged(memory: &SharedMemory, after: &str) -> Result<()> {
    match changed(memory)? {
        None => Ok(()),
        Some((at, bytes)) => Err(format!("{after} has changed {bytes} bytes at {at:#x}").into()),
    }
}
