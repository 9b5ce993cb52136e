//! What is done with a drive as an NVMe controller.

use std::time::Duration;

use e2e::{Exception, Layout};
use nvme_driver::{Completions, Counters, Error, FormatOptions, QueuePairOptions, Segment, Work};
use serde_json::{Value, json};

use crate::engine::{self, Doing, Lane};
use crate::{Disk, DriveArguments, Result};

pub(crate) fn identify(drive: &DriveArguments) -> Result<Option<Value>> {
    let controller = drive.open()?;
    let identity = controller.identity();
    let mut namespaces = Vec::new();
    for id in controller.namespaces()? {
        namespaces.push(match controller.namespace(id) {
            Ok(namespace) => json!({
                "id": id,
                "blocks": namespace.blocks,
                "block_bytes": namespace.block_bytes(),
                "write_cache": namespace.volatile_write_cache,
                "discard": namespace.discard,
                "discard_reads_zeroes": namespace.discard_reads_zeroes,
                "write_zeroes": namespace.write_zeroes,
            }),
            Err(error) => json!({ "id": id, "error": error.to_string() }),
        });
    }
    let missing = controller.namespace(identity.max_namespace_id).err().map(|error| error.to_string());
    Ok(Some(json!({
        "serial": identity.serial,
        "model": identity.model,
        "firmware": identity.firmware,
        "version": identity.version.to_string(),
        "max_transfer": identity.max_transfer,
        "queue_pairs": controller.max_queue_pairs(),
        "vectors": controller.device().interrupt_vectors(),
        "shadow_doorbells": controller.uses_shadow_doorbells(),
        "temperature": controller.health_log()?.temperature_kelvins,
        "namespaces": namespaces,
        "missing": missing,
    })))
}

fn counters(counters: &Counters) -> Value {
    json!({
        "commands": counters.commands,
        "splits": counters.splits,
        "batches": counters.batches,
        "submission_doorbells": counters.submission_doorbells,
    })
}

pub(crate) fn fill(disk: &Disk, seed: u64) -> Result<Option<Value>> {
    whole(disk, seed, None)
}

pub(crate) fn verify(disk: &Disk, seed: u64, except: &[Exception]) -> Result<Option<Value>> {
    whole(disk, seed, Some(except))
}

/// Writes all blocks, or reads them, if exceptions are given (even none).
fn whole(disk: &Disk, seed: u64, except: Option<&[Exception]>) -> Result<Option<Value>> {
    let (controller, namespace, mut lane) = disk.open()?;
    let write = except.is_none();
    let layout = Layout::new(seed, namespace.block_bytes() as usize).except(except.unwrap_or_default());
    let doing = if write { Doing::Write(&layout) } else { Doing::Read(&layout) };
    let dma = controller.device().dma();
    let done = engine::run(&mut lane, dma, &namespace, 0..namespace.blocks, doing, disk.wait)?;
    if write {
        lane.execute(&namespace, Work::Flush)?;
    }
    let interrupts = lane.interrupts;
    controller.delete_queue_pair(lane.pair)?;
    controller.shutdown()?;
    let mut report = counters(&done);
    report["blocks"] = namespace.blocks.into();
    report["interrupts"] = interrupts.into();
    Ok(Some(report))
}

/// Every pair reads while all others do, and each by an interrupt of its own, as far as there are vectors.
pub(crate) fn queues(drive: &DriveArguments) -> Result<Option<Value>> {
    let controller = drive.open()?;
    let namespace = controller.namespace(1)?;
    let granted = controller.max_queue_pairs();
    let vectors = controller.device().interrupt_vectors() - 1;
    let options = |interrupt| QueuePairOptions { entries: Some(16), interrupt };
    let refusal = |interrupt| match controller.create_queue_pair(options(interrupt)) {
        Ok(_) => Err("there was one more"),
        Err(error) => Ok(error.to_string()),
    };
    let mut lanes = Vec::new();
    let mut without_vector = None;
    for number in 0..granted {
        if u32::from(number) == vectors {
            without_vector = Some(refusal(true)?);
        }
        lanes.push(Lane::new(controller.create_queue_pair(options(u32::from(number) < vectors))?)?);
    }
    let refused = refusal(false)?;
    let buffer = controller.device().dma().allocate(4096 * lanes.len())?;
    for (lane, at) in lanes.iter_mut().zip(0u64..) {
        let segment = Segment { iova: buffer.iova() + at * 4096, bytes: namespace.block_bytes() };
        lane.pair.submit(&namespace, Work::Read { lba: at, segments: &[segment] }, at)?;
        lane.pair.ring();
        if lane.pair.interrupt().is_some() {
            lane.learn_by(Completions::Interrupt);
        }
    }
    for (lane, at) in lanes.iter_mut().zip(0u64..) {
        let mut answer = None;
        lane.reap(|completed| answer = Some(completed))?;
        if !answer.is_some_and(|completed| completed.status.is_success() && completed.token == at) {
            return Err(format!("queue pair {}: {answer:?}", lane.pair.id()).into());
        }
    }
    // One that was given back can be had again.
    let last = lanes.pop().ok_or("no queue pair was granted")?;
    let interrupt = last.pair.interrupt().is_some();
    controller.delete_queue_pair(last.pair)?;
    let mut again = Lane::new(controller.create_queue_pair(options(interrupt))?)?;
    // Announced one by one: whoever has shadow doorbells need not be told each time.
    let segment = Segment { iova: buffer.iova(), bytes: namespace.block_bytes() };
    for _ in 0..16 {
        for token in 0..again.pair.capacity() as u64 {
            again.pair.submit(&namespace, Work::Read { lba: 0, segments: &[segment] }, token)?;
            again.pair.ring();
        }
        while again.pair.outstanding() > 0 {
            let mut failed = None;
            again.reap(|completed| failed = failed.or(Some(completed.status).filter(|status| !status.is_success())))?;
            if let Some(status) = failed {
                return Err(status.to_string().into());
            }
        }
    }
    let mut report = counters(again.pair.counters());
    report["granted"] = granted.into();
    report["refused"] = refused.into();
    report["without_vector"] = without_vector.into();
    Ok(Some(report))
}

pub(crate) fn read_error(disk: &Disk, lba: u64) -> Result<Option<Value>> {
    let (controller, namespace, mut lane) = disk.open()?;
    let buffer = controller.device().dma().allocate(4096)?;
    let segment = Segment { iova: buffer.iova(), bytes: namespace.block_bytes() };
    let mut read = |lba| lane.status_of(&namespace, Work::Read { lba, segments: &[segment] });
    let (before, status, after) = (read(lba - 1)?, read(lba)?, read(lba + 1)?);
    if !before.is_success() || !after.is_success() {
        return Err(format!("the blocks beside {lba}: {before} and {after}").into());
    }
    // The simple way tells what was read, too.
    drop(lane);
    let mut simple = controller.blocking(namespace.id, engine::DEADLINE)?;
    let mut block = vec![0; namespace.block_bytes() as usize];
    let error = simple.read(lba, &mut block).err().map(|error| error.to_string());
    Ok(Some(json!({ "status": status.to_string(), "error": error })))
}

pub(crate) fn format(disk: &Disk, block_bytes: u32) -> Result<Option<Value>> {
    let controller = disk.drive.open()?;
    let before = controller.namespace(disk.namespace)?;
    let odd = FormatOptions { block_bytes: 1024, erase: Default::default(), timeout: Duration::from_secs(60) };
    match controller.format(disk.namespace, &odd) {
        Err(Error::Invalid(_)) => {}
        other => return Err(format!("a format of 1024 bytes per block: {other:?}").into()),
    }
    let after = controller.format(disk.namespace, &FormatOptions { block_bytes, ..odd })?;
    if after.block_bytes() != block_bytes || after.bytes() != before.bytes() {
        return Err(format!("{before:?} became {after:?}").into());
    }
    controller.shutdown()?;
    Ok(Some(json!({ "blocks": after.blocks, "block_bytes": after.block_bytes() })))
}
