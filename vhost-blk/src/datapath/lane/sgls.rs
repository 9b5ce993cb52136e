//! Drives that announce SGLs (scatter gather lists) and refuse them: what they refused is described in another way, or copied, and
//! they are not given any more of them.
//!
//! Most say what they do not like. One that says no more than that a field is invalid may mean any other; only if it takes the same
//! request without an SGL, it was that.

use nvme_driver::{QueuePair, Status};

use super::Lane;
use super::again::MOST_RETRIES;
use super::kept::{NO_SGL, RETRY};
use super::slots::Slot;
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
    /// The drive has refused the request in a slot. Was it for its SGL, as far as that can be known? Then it is to be tried without.
    pub(super) fn tries_without_sgl(&mut self, number: u16, status: Status) -> bool {
        let again = match status.concerns_sgl() {
            true => {
                let again = self.slots.kept_mut(number).is_some_and(|kept| kept.count(RETRY, MOST_RETRIES));
                if again {
                    self.again.refuse_sgls(status);
                }
                again
            }
            false => status.kind() == Status::INVALID_FIELD && self.doubt_sgl(number, status),
        };
        if again {
            self.again.push(number, 0);
            self.end_waiting();
        }
        again
    }

    /// The request in a slot is to be tried once more, without an SGL; false if it has been, or has no data.
    fn doubt_sgl(&mut self, number: u16, status: Status) -> bool {
        let Some((request, _)) = self.kept_request(number) else { return false };
        let Some(slot) = self.slots.get_mut(number) else { return false };
        if slot.kept.has(NO_SGL) || !matches!(request.operation, Operation::Read | Operation::Write) {
            return false;
        }
        // Its success is to be noticed, and that of plain requests is not.
        if slot.kept.bytes() != 0 {
            let buffer = Buffer { address: slot.kept.data, bytes: slot.kept.bytes() };
            let long = self.longs.keep(request, std::iter::once(buffer), &[]);
            self.longs.put(number, long);
            slot.written |= Slot::LONG;
            slot.kept.stands_elsewhere();
        }
        slot.kept.acquit();
        slot.kept.set(NO_SGL);
        self.again.sgls.doubted = status;
        true
    }

    /// The drive has done the request in a slot. Was it the SGL that it did not take before?
    pub(super) fn succeeds_without_sgl(&mut self, number: u16) {
        if self.slots.kept_mut(number).is_some_and(|kept| kept.has(NO_SGL)) {
            self.again.refuse_sgls(self.again.sgls.doubted);
        }
    }

    /// Has the drive be given no more SGLs.
    pub(super) fn refuse_sgls(&mut self, pair: &mut QueuePair, status: Status) {
        if pair.refuse_sgls()
            && let Some(more) = self.log.admit(Kind::Drive)
        {
            log::warn!(
                "{}: the drive announces SGLs and refuses them ({status}): it is not given any more of them; what needs them is \
                 copied{more}",
                self.name
            );
        }
    }
}
