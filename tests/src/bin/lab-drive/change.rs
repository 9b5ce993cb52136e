//! Each kind of request, once, and what is read afterwards.

use e2e::{Content, Exception, Layout};
use nvme_driver::spec::command::io;
use nvme_driver::{Command, LbaRange, Namespace, Segment, Status, SubmitError, Work};
use serde_json::{Value, json};
use vfio::DmaBuffer;

use crate::engine::{self, Doing, Lane, Wait};
use crate::{Disk, Result};

/// Changes parts of a disk that was filled under `seed`, and lists them.
pub(crate) fn change(disk: &Disk, seed: u64) -> Result<Option<Value>> {
    let (controller, namespace, mut lane) = disk.open()?;
    let device = controller.device();
    let block_bytes = namespace.block_bytes() as usize;
    let filled = Layout::new(seed, block_bytes);
    // Every change begins at another 64th of the disk.
    let unit = namespace.blocks / 64;
    let mut changes = Vec::new();
    let buffer = device.dma().allocate(64 << 10)?;
    let segment = |blocks: u64| [Segment { iova: buffer.iova(), bytes: (blocks << namespace.block_shift) as u32 }];
    let zeroes =
        |range: &LbaRange| Exception { first: range.lba, blocks: range.blocks.into(), content: Content::Zeroes };

    let ranges = [LbaRange { lba: unit * 2, blocks: 37 }, LbaRange { lba: unit * 3 + 1, blocks: unit as u32 }];
    lane.execute(&namespace, Work::WriteZeroes { ranges: &ranges, deallocate: false, fua: false })?;
    changes.extend(ranges.iter().map(zeroes));
    let ranges = [LbaRange { lba: unit * 6, blocks: 64 }];
    lane.execute(&namespace, Work::WriteZeroes { ranges: &ranges, deallocate: true, fua: true })?;
    changes.extend(ranges.iter().map(zeroes));

    if !namespace.discard || !namespace.discard_reads_zeroes {
        return Err("the drive does not discard, or says nothing of what is read then".into());
    }
    let ranges: Vec<_> = (0..5).map(|at| LbaRange { lba: unit * 8 + at * 128, blocks: 64 }).collect();
    lane.execute(&namespace, Work::Discard { ranges: &ranges })?;
    changes.extend(ranges.iter().map(zeroes));

    for (first, blocks, fua) in [(0, 1, false), (unit * 16 + 5, 9, true), (namespace.blocks - 3, 3, false)] {
        let other = seed + 1;
        write_pattern(&Layout::new(other, block_bytes), first, blocks, &buffer)?;
        lane.execute(&namespace, Work::Write { lba: first, segments: &segment(blocks), fua })?;
        changes.push(Exception { first, blocks, content: Content::Seed(other) });
    }
    lane.execute(&namespace, Work::Flush)?;

    // The buffer holds the disk's last blocks.
    let last = namespace.blocks - 3;
    lane.execute(&namespace, Work::Compare { lba: last, segments: &segment(3) })?;
    let different = lane.status_of(&namespace, Work::Compare { lba: last - 1, segments: &segment(3) })?;
    expect(different, Status::COMPARE_FAILURE)?;
    let all = Work::Verify(LbaRange { lba: 0, blocks: namespace.blocks.min(65_536) as u32 });
    match namespace.verify {
        true => lane.execute(&namespace, all)?,
        // QEMU does not offer it: then it is not sent.
        false
            if lane.pair.submit(&namespace, all, 0)
                == Err(SubmitError::Invalid("the drive does not support Verify")) => {}
        false => return Err("Verify was sent to a drive that does not offer it".into()),
    }

    let beyond = lane.pair.submit(&namespace, Work::Read { lba: last, segments: &segment(4) }, 0);
    if !matches!(beyond, Err(SubmitError::OutOfRange { .. })) {
        return Err(format!("a read beyond the end was not refused: {beyond:?}").into());
    }
    // What the driver would refuse, the drive refuses too.
    expect(read_beyond(&mut lane, &namespace, &buffer)?, Status::LBA_OUT_OF_RANGE)?;

    let layout = filled.except(&changes);
    engine::run(&mut lane, device.dma(), &namespace, 0..namespace.blocks, Doing::Read(&layout), Wait::Polling)?;
    controller.delete_queue_pair(lane.pair)?;
    controller.shutdown()?;
    let changes: Vec<_> = changes.iter().map(Exception::to_string).collect();
    Ok(Some(json!({ "changes": changes, "compare": different.to_string() })))
}

fn write_pattern(layout: &Layout, first: u64, blocks: u64, buffer: &DmaBuffer) -> Result<()> {
    let mut data = vec![0; blocks as usize * layout.block_bytes()];
    layout.fill(first, &mut data);
    Ok(buffer.write(0, &data).ok_or("the buffer is too small")?)
}

fn read_beyond(lane: &mut Lane, namespace: &Namespace, buffer: &DmaBuffer) -> Result<Status> {
    let command = Command::blocks(io::READ, namespace.id, namespace.blocks, 1, 0).with_prps(buffer.iova(), 0);
    lane.pair.push(command, 0)?;
    lane.pair.ring();
    let mut status = None;
    lane.reap(|completed| status = Some(completed.status))?;
    Ok(status.ok_or("no status")?)
}

fn expect(status: Status, expected: Status) -> Result<()> {
    if status.kind() == expected { Ok(()) } else { Err(format!("{status}, and not {expected}").into()) }
}
