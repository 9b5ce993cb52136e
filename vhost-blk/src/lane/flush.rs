//! What a lane does for the promise that a flush is: see [`FlushPromise`](crate::disk::FlushPromise).

use super::Lane;

/// Since when a lane's changes to the disk may be unsafe.
#[derive(Default)]
pub(super) struct Changes {
    /// How many were known to have been answered, when nothing was in flight.
    settled: u64,
    /// The last flush that had begun when there were more.
    last: u64,
    any: bool,
}

impl Lane {
    /// Answers have been shown to the driver: those of changes are promised from now on, by the next flush.
    #[inline]
    pub(super) fn note_changes(&mut self) {
        let tally = &self.tally;
        let all = tally.writes + tally.discards + tally.write_zeroes;
        if all != self.changes.settled {
            self.changes.last = self.disk.flushes.now();
            self.changes.any = true;
            // With requests in flight nobody knows which of them were answered: they are counted again.
            if self.in_flight() == 0 {
                self.changes.settled = all;
            }
        }
    }

    /// A flush is given to the drive; its number. `None`: it has to fail, for the drive has lost what it would have made safe.
    pub(super) fn begin_flush(&mut self) -> Option<u64> {
        let number = self.disk.flushes.begin();
        if number.is_none() {
            log::error!("{}: a flush fails: the drive has lost writes that were not flushed before", self.name);
        }
        number
    }

    /// The flush in this slot has succeeded.
    pub(super) fn flush_succeeded(&mut self, number: u16) {
        if let Some(slot) = self.slots.get_mut(number) {
            self.disk.flushes.succeed(slot.kept.lba);
        }
    }

    /// The drive is back without what was in its volatile cache.
    pub(super) fn lose_cache(&mut self) {
        // Under write-through nothing was answered from the cache.
        let cached = self.disk.namespace.volatile_write_cache && !self.disk.force_unit_access();
        if cached && self.changes.any && self.disk.flushes.lose_cache(self.changes.last) {
            log::error!("{}: writes that were not flushed are lost; the next flush fails, to say so", self.name);
        }
    }
}
