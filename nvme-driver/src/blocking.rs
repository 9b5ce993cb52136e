//! Blocks read and written one request at a time, for tools and tests: simple, and not the fast way.

use std::time::{Duration, Instant};

use vfio::DmaBuffer;

use crate::error::Doing;
use crate::{Controller, Error, Namespace, QueuePair, QueuePairOptions, Segment, Status, SubmitError, Work};

/// Bytes moved at once; larger reads and writes take several rounds.
const BUFFER_BYTES: usize = 128 << 10;
/// How often the controller's status is looked at while waiting.
const ALIVE_INTERVAL: Duration = Duration::from_millis(20);

/// A namespace for blocking reads and writes, with a queue pair of its own.
///
/// Data is copied through one buffer, and one request is out at a time. Whoever needs speed drives a [`QueuePair`].
pub struct BlockingNamespace {
    controller: Controller,
    namespace: Namespace,
    /// `None` only while being dropped.
    pair: Option<QueuePair>,
    buffer: DmaBuffer,
    timeout: Duration,
    /// A request was not answered: the controller may still use the buffer.
    stuck: bool,
}

impl Controller {
    /// Namespace `id` for blocking reads and writes, each with the deadline `timeout`.
    pub fn blocking(&self, id: u32, timeout: Duration) -> Result<BlockingNamespace, Error> {
        let namespace = self.namespace(id)?;
        let buffer =
            self.device().dma().allocate(BUFFER_BYTES).doing("allocate a buffer for blocking reads and writes")?;
        let pair = self.create_queue_pair(QueuePairOptions { entries: Some(64), ..Default::default() })?;
        Ok(BlockingNamespace { controller: self.clone(), namespace, pair: Some(pair), buffer, timeout, stuck: false })
    }
}

impl BlockingNamespace {
    /// The namespace as it was when this was made.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Reads the blocks from `lba` on into `data`, whose length has to be a multiple of the block size.
    pub fn read(&mut self, lba: u64, data: &mut [u8]) -> Result<(), Error> {
        self.check(lba, data.len())?;
        let mut lba = lba;
        for piece in data.chunks_mut(BUFFER_BYTES) {
            let segment = Segment { iova: self.buffer.iova(), bytes: piece.len() as u32 };
            self.run(Work::Read { lba, segments: &[segment] }, || {
                format!("Read of {} bytes from block {lba} on", piece.len())
            })?;
            self.buffer.read(0, piece).expect("a piece is not longer than the buffer");
            lba += (piece.len() >> self.namespace.block_shift) as u64;
        }
        Ok(())
    }

    /// Writes `data`, whose length has to be a multiple of the block size, to the blocks from `lba` on. It may be in the drive's
    /// volatile cache until [`BlockingNamespace::flush`].
    pub fn write(&mut self, lba: u64, data: &[u8]) -> Result<(), Error> {
        self.check(lba, data.len())?;
        let mut lba = lba;
        for piece in data.chunks(BUFFER_BYTES) {
            self.buffer.write(0, piece).expect("a piece is not longer than the buffer");
            let segment = Segment { iova: self.buffer.iova(), bytes: piece.len() as u32 };
            self.run(Work::Write { lba, segments: &[segment], fua: false }, || {
                format!("Write of {} bytes from block {lba} on", piece.len())
            })?;
            lba += (piece.len() >> self.namespace.block_shift) as u64;
        }
        Ok(())
    }

    /// Everything written before is on non-volatile media afterwards.
    pub fn flush(&mut self) -> Result<(), Error> {
        self.run(Work::Flush, || "Flush".into())
    }

    /// Does any one piece of work and waits for it. Its segments, if it has any, are the caller's own.
    pub fn execute(&mut self, work: Work<'_>) -> Result<(), Error> {
        self.run(work, || format!("{work:?}"))
    }

    fn check(&self, lba: u64, bytes: usize) -> Result<(), Error> {
        let block = self.namespace.block_bytes() as usize;
        if bytes == 0 || !bytes.is_multiple_of(block) {
            return Err(Error::Invalid(format!("{bytes} bytes are not a number of blocks of {block} bytes")));
        }
        let blocks = (bytes / block) as u64;
        if lba.checked_add(blocks).is_none_or(|end| end > self.namespace.blocks) {
            return Err(Error::Invalid(format!(
                "blocks {lba} and the {blocks} from there on are not within the namespace's {}",
                self.namespace.blocks
            )));
        }
        Ok(())
    }

    fn run(&mut self, work: Work<'_>, name: impl FnOnce() -> String) -> Result<(), Error> {
        if self.stuck {
            return Err(Error::NotInOperation {
                controller: self.controller.device().address().to_string(),
                why: "an earlier request was not answered in time",
            });
        }
        let pair = self.pair.as_mut().expect("it is taken only when dropped");
        pair.submit(&self.namespace, work, 0).map_err(|error| match error {
            SubmitError::NeedsBounce => Error::Unsupported(format!("these buffers as they lie: {error}")),
            error => Error::Invalid(error.to_string()),
        })?;
        pair.ring();
        let start = Instant::now();
        let mut next_look = ALIVE_INTERVAL;
        let mut answer: Option<Status> = None;
        loop {
            let waited = start.elapsed();
            pair.reap(|completed| answer = Some(completed.status));
            match answer {
                Some(status) if status.is_success() => return Ok(()),
                Some(status) => return Err(Error::Command { command: name(), status }),
                None => {}
            }
            if waited >= next_look {
                next_look = waited + ALIVE_INTERVAL;
                if let Err(error) = self.controller.health() {
                    self.stuck = true;
                    return Err(error);
                }
            }
            if waited >= self.timeout {
                self.stuck = true;
                return Err(Error::Timeout { command: name(), waited, csts: self.controller.csts() });
            }
            if waited < Duration::from_millis(1) {
                std::thread::yield_now();
            } else {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    }
}

impl Drop for BlockingNamespace {
    fn drop(&mut self) {
        let Some(pair) = self.pair.take() else { return };
        if let Err(error) = self.controller.delete_queue_pair(pair) {
            log::debug!("the queue pair of a blocking namespace was not deleted: {error}");
            if self.stuck {
                self.controller.quarantine(self.buffer.clone());
            }
        }
    }
}
