//! What a flush promises, kept over a drive that loses its cache.
//!
//! A drive that loses its power loses what was written and not flushed. That is allowed; a later flush that succeeds is not,
//! for it promises that everything answered before is safe. So the first flush after such a loss fails, and the guest knows.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The flushes of a disk, by number. Shared by its lanes; written for flushes only.
#[derive(Debug, Default)]
pub struct FlushPromise {
    /// How many were given to the drive.
    begun: AtomicU64,
    /// The last one of those that succeeded.
    succeeded: AtomicU64,
    /// What was answered before is lost, and no flush has said so.
    broken: AtomicBool,
}

impl FlushPromise {
    /// The number of a flush that is given to the drive from now on; `None`: it has to fail.
    pub fn begin(&self) -> Option<u64> {
        if self.broken.swap(false, Ordering::AcqRel) {
            return None;
        }
        // AcqRel: pairs with the load in `now`. A lane that sees a smaller number has had its answers before.
        Some(self.begun.fetch_add(1, Ordering::AcqRel) + 1)
    }

    /// The flush with this number has succeeded.
    pub fn succeed(&self, number: u64) {
        self.succeeded.fetch_max(number, Ordering::Relaxed);
    }

    /// The last flush that was begun: what was answered up to now is safe when a later one succeeds.
    #[inline]
    pub fn now(&self) -> u64 {
        self.begun.load(Ordering::Acquire)
    }

    /// The drive has lost its cache. `last`: what [`FlushPromise::now`] said after the last change was answered. True: changes
    /// are lost.
    pub fn lose_cache(&self, last: u64) -> bool {
        let lost = last >= self.succeeded.load(Ordering::Relaxed);
        if lost {
            self.broken.store(true, Ordering::Release);
        }
        lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_not_flushed_breaks_the_promise() {
        let promise = FlushPromise::default();
        let written = promise.now();
        assert!(promise.lose_cache(written), "nothing was ever flushed");
        assert_eq!(promise.begin(), None, "the next flush says so");
        let flush = promise.begin().expect("and only that one");
        assert!(promise.lose_cache(written), "it has not succeeded yet");
        assert_eq!(promise.begin(), None);
        promise.succeed(flush);
        assert!(!promise.lose_cache(written));
        // Answered while a flush was under way: that one says nothing about it.
        let flush = promise.begin().unwrap();
        let written = promise.now();
        promise.succeed(flush);
        assert!(promise.lose_cache(written));
    }
}
