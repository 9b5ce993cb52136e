//! A drive that reaches for memory it may not reach.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nvme_driver::{Segment, Work};
use serde_json::{Value, json};
use vfio::SharedMemory;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::{Disk, Result, engine};

const BYTES: usize = 2 << 20;
/// Where in the memory the drive reaches.
const AT: usize = 0x1_3000;
/// How much it reads or writes there.
const BLOCK: usize = 4096;
const MARK: u8 = 0xa5;
/// How long a message of the kernel may take, unless it is one of too many.
const PATIENCE: Duration = Duration::from_secs(2);

/// Maps memory, has the drive use it, takes it away, and has the drive reach for it again: it must not get there, neither
/// to write nor when the address means other memory by then.
pub(crate) fn stray(disk: &Disk) -> Result<Option<Value>> {
    let (controller, namespace, mut lane) = disk.open()?;
    let dma = controller.device().dma();
    let memory = Arc::new(SharedMemory::create(BYTES)?);
    let mapping = dma.map(memory.clone())?;
    let iova = mapping.iova() + AT as u64;
    let segments = [Segment { iova, bytes: BLOCK as u32 }];
    let read = Work::Read { lba: 0, segments: &segments };

    mark(&memory)?;
    lane.execute(&namespace, read)?;
    if changed(&memory)? != Some((AT, BLOCK)) {
        return Err(format!("a read to mapped memory changed {:?}", changed(&memory)?).into());
    }

    mark(&memory)?;
    drop(mapping);
    let mut log = KernelLog::open()?;
    let (reading, fault) = log.fault(iova, || {
        let status = lane.status_of(&namespace, read)?;
        unchanged(&memory, "a read to an address that is not mapped")?;
        Ok(status)
    })?;
    let mut faults = vec![fault];

    // The same addresses, other memory.
    let other = Arc::new(SharedMemory::create(BYTES)?);
    mark(&other)?;
    let mapping = dma.map(other.clone())?;
    if mapping.iova() + AT as u64 != iova {
        return Err(format!("the next mapping is at {:#x}, not where the last one was", mapping.iova()).into());
    }
    lane.execute(&namespace, read)?;
    unchanged(&memory, "a read to an address that is mapped to other memory by now")?;
    if changed(&other)? != Some((AT, BLOCK)) {
        return Err(format!("a read to memory mapped anew changed {:?}", changed(&other)?).into());
    }
    drop(mapping);

    // The drive reads here, which would show its memory's content to whoever reads the block.
    let write = Work::Write { lba: 64, segments: &segments, fua: false };
    let (writing, fault) = log.fault(iova, || lane.status_of(&namespace, write))?;
    faults.push(fault);
    let buffer = dma.allocate(BLOCK)?;
    let mapped = [Segment { iova: buffer.iova(), bytes: BLOCK as u32 }];
    lane.execute(&namespace, Work::Read { lba: 64, segments: &mapped })?;
    let mut written = vec![0; BLOCK];
    buffer.read(0, &mut written).ok_or("the buffer is too small")?;
    let mut there = vec![0; BLOCK];
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
        "faults": faults,
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

/// What the kernel logs from now on.
struct KernelLog {
    file: File,
    epoll: Epoll,
}

impl KernelLog {
    fn open() -> Result<KernelLog> {
        let mut file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg")?;
        file.seek(SeekFrom::End(0))?;
        let epoll = Epoll::new()?;
        epoll.ctl(ControlOperation::Add, file.as_raw_fd(), EpollEvent::new(EventSet::IN, 0))?;
        Ok(KernelLog { file, epoll })
    }

    /// Has the device reach for `iova` until the kernel reports that it was kept from there; what it says. The kernel
    /// reports few faults of many, so that once may not be enough.
    fn fault<T>(&mut self, iova: u64, mut reach: impl FnMut() -> Result<T>) -> Result<(T, String)> {
        let start = Instant::now();
        while start.elapsed() < engine::DEADLINE {
            let result = reach()?;
            if let Some(text) = self.wait_for(&format!("fault addr {iova:#x}"), PATIENCE)? {
                return Ok((result, text));
            }
        }
        Err(format!("no fault at {iova:#x} was reported within {:?}", engine::DEADLINE).into())
    }

    /// The next message with this text; none if the log is silent for so long.
    fn wait_for(&mut self, text: &str, silence: Duration) -> Result<Option<String>> {
        let mut record = [0; 8192];
        loop {
            let record = match self.file.read(&mut record) {
                Ok(length) => String::from_utf8_lossy(&record[..length]).into_owned(),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if self.epoll.wait(silence.as_millis() as i32, &mut [EpollEvent::default()])? == 0 {
                        return Ok(None);
                    }
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            // "LEVEL,NUMBER,TIME,FLAGS;TEXT", then lines about the device.
            let message = record.split_once(';').map_or("", |(_, text)| text).lines().next().unwrap_or_default();
            if message.contains(text) {
                return Ok(Some(message.to_owned()));
            }
        }
    }
}
