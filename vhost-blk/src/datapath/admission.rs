//! The one place that decides whether a lane may take the next chain off its ring. A limit for a guest belongs here.
//!
//! A chain that is not admitted stays in the guest's ring, and the lane asks again in its next turn. Meanwhile the worker stays awake,
//! for the ring is not empty. Every loop that takes chains asks here before each of them: the fast path, the slow path, and the loop
//! that does an earlier process's requests or answers requests with an error when the drive's hold has expired. A request
//! that was taken already, and is tried again, is not admitted a second time.

use std::time::Instant;

/// Chains that a lane takes in one turn, so that the lanes of a worker take turns.
pub(crate) const BATCH: usize = 64;

/// What one lane may take. Today that is [`BATCH`] chains in each turn, at any time.
#[derive(Debug, Default)]
pub(crate) struct Admission {}

impl Admission {
    /// Tells the time: every few milliseconds while the lane's worker is awake (`TICK` in `worker/thread.rs`), with a reading of
    /// the clock that the worker has made anyway. No turn makes one for this.
    #[inline(always)]
    pub(crate) fn tick(&mut self, _now: Instant) {}

    /// May the lane take one more chain, having taken `taken` in this turn?
    #[inline(always)]
    pub(crate) fn admits(&mut self, taken: usize) -> bool {
        taken < BATCH
    }
}
