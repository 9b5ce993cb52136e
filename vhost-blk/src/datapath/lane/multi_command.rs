//! Multi-command requests, which are too long for one command of the drive. The queue pair takes only so many of each lane, so that
//! one more has to wait for its turn; and they can be given up in the middle, so that nobody has to wait for them to end.

use nvme_driver::{OWNER_SHIFT, QueuePair, Status};

use super::{Lane, flush};
use crate::blk::request::Operation;
use crate::datapath::stop_policy::StopPolicy;
use crate::virtio::ring::Head;

/// A request that moves more bytes than this takes too long to be waited for.
const LONG_BYTES: u32 = 2 << 20;

/// How a lane stands with its multi-command requests.
#[derive(Default)]
pub(super) struct MultiCommand {
    /// The pending request is one multi-command request more than the queue pair takes of the lane.
    pub crowded: bool,
    /// No multi-command request goes on: when what the drive has of it is answered, it ends.
    pub over: bool,
}

impl Lane {
    /// Nobody waits for multi-command requests any longer: they end with an error as soon as the drive has answered what it
    /// has of them. The lane is stopping.
    pub(crate) fn end_multi_command(&mut self) {
        self.multi_command.over = true;
    }

    /// Hands the pending request to the queue pair; false if there is no room: it stays pending. As long as it has to wait it costs next
    /// to nothing, however long it is.
    #[cold]
    #[inline(never)]
    pub(super) fn submit_pending(&mut self, pair: &mut QueuePair, tag: u64, head: Head) -> bool {
        let entries = match self.parser.request.operation {
            Operation::Read | Operation::Write | Operation::Flush => self.parser.segments.len(),
            Operation::Discard | Operation::WriteZeroes | Operation::WriteZeroesUnmap => self.parser.ranges.len(),
        };
        if self.multi_command.crowded && !pair.admits(tag, entries) {
            self.pending = Some(head);
            return false;
        }
        self.multi_command.crowded = false;
        self.submit_parsed(pair, tag, head)
    }

    /// In a lane that stops: has the queue pair issue nothing more of the lane's multi-command requests, if they are over.
    pub(super) fn stop_multi_command(&mut self, pair: &mut QueuePair, tag: u64) {
        if !self.multi_command.over {
            return;
        }
        let owner = tag >> OWNER_SHIFT;
        let mut ended = Vec::new();
        let Lane { slots, mode, .. } = self;
        // Pieces of copied requests are small, and soon done.
        let mut long = |token: u64| mode.is_broken() || slots.held_mut(token as u16).is_some();
        pair.cancel_long(|token| token >> OWNER_SHIFT == owner && long(token), |done| ended.push(done));
        ended.iter().for_each(|done| self.complete(done.token, done.status));
    }

    /// Was this request given up by [`Lane::stop_multi_command`]? Then it ends here.
    pub(super) fn ends_given_up(&mut self, number: u16, status: Status) -> bool {
        if !self.multi_command.over || status.kind() != Status::ABORTED_BY_HOST {
            return false;
        }
        if self.mode.stop_policy() == StopPolicy::LeaveInLog {
            // In the ring, and in its log, it is as before.
            self.details.drop_slot(number);
            self.slots.free_held(number);
            return true;
        }
        if self.recorded_request(number).is_some_and(|(request, _)| flush::changes(request.operation)) {
            // A part of it may have been done.
            self.note_change();
        }
        self.warn(&"a request of many commands was given up: its ring had to stop");
        self.fail_slot(number);
        true
    }

    /// How a request of so many bytes ends whose data is copied, and of which the drive has nothing just now.
    /// [`StopPolicy::AnswerAll`]: it goes on.
    pub(super) fn bounce_policy(&self, bytes: u32) -> StopPolicy {
        match self.mode.stop_policy() {
            StopPolicy::AnswerAll if self.multi_command.over && bytes > LONG_BYTES => StopPolicy::FailWaiting,
            policy => policy,
        }
    }
}
