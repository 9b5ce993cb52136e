//! Requests that may be the reason why the controller fails: see [`Trial`](crate::datapath::trial::Trial).

use nvme_driver::{BouncePool, QueuePair, Status};

use super::Lane;
use super::record::{ALONE, EXPIRED, FAILURE, LOST};
use crate::blk::request::Operation;
use crate::datapath::trial::Suspicion;

/// With how many failures of its controller a request may have had to do. It may well be their reason.
const MOST_FAILURES: u8 = 5;

impl Lane {
    /// The drive has not answered the request with this token in time.
    pub(crate) fn expired(&mut self, token: u64) {
        if let Some(kept) = self.slots.record_mut(token as u16) {
            kept.set(EXPIRED);
        }
    }

    /// The controller was stopped before it answered the request with this token. True: it had not done so in time.
    pub(crate) fn unanswered(&mut self, token: u64) -> bool {
        let number = token as u16;
        if self.slots.held_mut(number).is_some() {
            self.retries.push(number, 0);
        } else if self.slots.bounced(number).is_none() {
            let expired = self.slots.record_mut(number).is_some_and(|kept| kept.has(EXPIRED));
            self.complete_slow_path(number, Status::ABORTED_BY_HOST);
            return expired;
        }
        self.slots.record_mut(number).is_some_and(|kept| {
            kept.set(LOST);
            kept.has(EXPIRED)
        })
    }

    /// Judges the requests that were with the drive in the failure: those that were with it in too many are answered with an error.
    /// True: some are to be given to the drive alone, the next time.
    pub(crate) fn judge(&mut self, suspicion: Suspicion) -> bool {
        let waiting: Vec<u16> = self.retries.ready().chain(self.bounced.slots()).collect();
        let (mut guilty, mut alone) = (Vec::new(), false);
        for slot in waiting {
            let Some(kept) = self.slots.record_mut(slot) else { continue };
            let (lost, expired) = (kept.has(LOST), kept.has(EXPIRED));
            kept.clear(LOST | EXPIRED);
            let (suspected, certain) = match suspicion {
                Suspicion::Nobody => (false, false),
                Suspicion::Expired => (expired, true),
                Suspicion::Only => (true, true),
                Suspicion::Any => (true, false),
            };
            if lost && suspected {
                let last = !kept.count(FAILURE, MOST_FAILURES - 1);
                kept.clear(ALONE);
                match (last, certain) {
                    (true, true) => guilty.push(slot),
                    (_, false) if kept.failures() == MOST_FAILURES - 1 => kept.set(ALONE),
                    _ => {}
                }
            }
            alone |= self.slots.record_mut(slot).is_some_and(|kept| kept.has(ALONE));
        }
        guilty.into_iter().for_each(|slot| self.convict(slot));
        alone
    }

    /// Answers a request with an error that makes the controller fail.
    fn convict(&mut self, slot: u16) {
        let request = self.recorded_request(slot).map(|(request, _)| request).or_else(|| self.bounced_request(slot));
        let Some(request) = request else { return };
        let what = match request.operation {
            Operation::Read => "a read",
            Operation::Write => "a write",
            Operation::Flush => "a flush",
            Operation::Discard => "a discard",
            Operation::WriteZeroes | Operation::WriteZeroesUnmap => "a write of zeroes",
        };
        self.warn(&format_args!(
            "{what} (block {}, {} bytes) was with the drive in {MOST_FAILURES} of its failures: it is answered with an error",
            request.lba, request.bytes
        ));
        if !self.end_bounced_one(slot) {
            self.retries.forget(slot);
            self.fail_slot(slot);
        }
    }

    /// Gives the drive one request that has to be alone there; false: the lane has none. The drive must have nothing of the lane.
    pub(crate) fn submit_alone(&mut self, pair: &mut QueuePair, pool: &mut BouncePool, tag: u64) -> bool {
        let slots = &mut self.slots;
        let is_alone = |slot: u16| slots.record_mut(slot).is_some_and(|kept| kept.has(ALONE));
        match self.retries.take_one(is_alone) {
            Some(slot) => {
                if !self.retry(pair, tag, slot) {
                    self.retries.push(slot, 0);
                }
                true
            }
            None => self.copy_alone(pair, pool, tag),
        }
    }
}
