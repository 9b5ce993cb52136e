//! Drives that announce SGLs (scatter gather lists) and refuse them: what they refused is described in another way, or copied, and
//! they are not given any more of them.
//!
//! Most say that it was the SGL. A drive that says only that a field is invalid may mean another field: if it takes the same request
//! without an SGL, it was the SGL.

use nvme_driver::{QueuePair, Status};

use super::Lane;
use super::record::{MOST_RETRIES, NO_SGL, RETRY};
use super::slots::UsedLength;
use crate::blk::request::Operation;
use crate::log_limit::Kind;
use crate::virtio::ring::Buffer;

/// What a lane has heard of the drive's SGLs.
pub(super) struct Sgls {
    /// The answer that says that the drive is not to get any more.
    pub refused: Option<Status>,
    /// The last answer that may say so: Invalid Field in Command.
    pub doubted: Status,
}

impl Default for Sgls {
    fn default() -> Sgls {
        Sgls { refused: None, doubted: Status::INVALID_FIELD }
    }
}

impl Lane {
    /// The drive has refused the request in a slot. If that may have been for its SGL, the request is tried without; true then.
    pub(super) fn tries_without_sgl(&mut self, number: u16, status: Status) -> bool {
        let is_retried = match status.concerns_sgl() {
            true => {
                let is_retried = self.slots.record_mut(number).is_some_and(|record| record.count(RETRY, MOST_RETRIES));
                if is_retried {
                    self.retries.refuse_sgls(status);
                }
                is_retried
            }
            false => status.kind() == Status::INVALID_FIELD && self.doubt_sgl(number, status),
        };
        if is_retried {
            self.retries.push(number, 0);
            self.end_waiting();
        }
        is_retried
    }

    /// The request in a slot is to be tried once more, without an SGL; false if it has been, or has no data.
    fn doubt_sgl(&mut self, number: u16, status: Status) -> bool {
        let Some((request, _)) = self.recorded_request(number) else { return false };
        let Some(slot) = self.slots.held_mut(number) else { return false };
        if slot.record.has(NO_SGL) || !matches!(request.operation, Operation::Read | Operation::Write) {
            return false;
        }
        // Its success is to be noticed, and that of simple requests is not.
        if slot.record.bytes() != 0 {
            let buffer = Buffer { address: slot.record.data, bytes: slot.record.bytes() };
            let lists = self.details.keep(request, std::iter::once(buffer), &[]);
            self.details.put(number, lists);
            slot.used = UsedLength::detailed();
            slot.record.move_to_details();
        }
        slot.record.acquit();
        slot.record.set(NO_SGL);
        self.retries.sgls.doubted = status;
        true
    }

    /// The drive has done the request in a slot. If it had refused it before and takes it without an SGL, it is given no more SGLs.
    pub(super) fn succeeds_without_sgl(&mut self, number: u16) {
        if self.slots.record_mut(number).is_some_and(|kept| kept.has(NO_SGL)) {
            self.retries.refuse_sgls(self.retries.sgls.doubted);
        }
    }

    /// Sees to it that the drive is given no more SGLs.
    pub(super) fn refuse_sgls(&mut self, pair: &mut QueuePair, status: Status) {
        if pair.refuse_sgls()
            && let Some(more) = self.log.admit(Kind::Drive)
        {
            log::warn!(
                "{}: the drive announces SGLs and refuses them ({status}): they are not used any more; data that needs them is \
                 copied{more}",
                self.name
            );
        }
    }
}
