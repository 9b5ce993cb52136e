//! What a flush promises, kept over a drive that loses its cache.
//!
//! A drive that loses its power loses what was written and not flushed. That is allowed; a later flush that succeeds is not,
//! for it promises that everything answered before is safe. So the first flush after such a loss fails, and the guest knows.
//!
//! Lanes come and go, and several serve a disk at a time; what was promised outlives them. So it is kept here, and looked at
//! once when the drive is back, before any lane goes on.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The flushes of an exported namespace, by number. Shared by its lanes; written once for a flush, and once by each lane that
/// answers changes after it.
#[derive(Debug, Default)]
pub struct FlushPromise {
    /// How many were given to the drive.
    begun: AtomicU64,
    /// The last one of those that succeeded.
    succeeded: AtomicU64,
    /// The first one that makes safe every change answered from the cache so far; 0: there was none.
    needed: AtomicU64,
    /// Those up to this one have not made safe what was answered before: it was lost.
    lost: AtomicU64,
    /// What was answered before is lost, and no flush has said so.
    broken: AtomicBool,
}

impl FlushPromise {
    /// The number of a flush that is given to the drive from now on; `None`: it has to fail, and the guest knows then.
    pub fn begin(&self) -> Option<u64> {
        let told = self.broken.swap(false, Ordering::AcqRel);
        (!told).then(|| self.next())
    }

    /// The same for the flush with this number, which the drive has not answered. Each one that the loss has met fails: they may
    /// be for different parts of the guest.
    pub fn begin_again(&self, number: u64) -> Option<u64> {
        if number > self.lost.load(Ordering::Acquire) {
            return self.begin();
        }
        self.broken.store(false, Ordering::Release);
        None
    }

    /// The same for a flush that is not the guest's: if it has to fail, one of the guest's still has to.
    pub fn begin_own(&self) -> Option<u64> {
        let broken = self.broken.load(Ordering::Acquire);
        (!broken).then(|| self.next())
    }

    fn next(&self) -> u64 {
        // AcqRel: pairs with the load in `now`. A lane that sees a smaller number has had its answers before.
        self.begun.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// The flush with this number has succeeded. False: it means nothing, for something was lost meanwhile.
    pub fn succeed(&self, number: u64) -> bool {
        self.succeeded.fetch_max(number, Ordering::AcqRel);
        number > self.lost.load(Ordering::Acquire)
    }

    /// The last flush that was begun: what the drive has answered up to now is safe when a later one succeeds.
    #[inline]
    pub fn now(&self) -> u64 {
        self.begun.load(Ordering::Acquire)
    }

    /// Changes were answered from the cache when [`FlushPromise::now`] said this.
    pub fn changed(&self, now: u64) {
        self.needed.fetch_max(now + 1, Ordering::AcqRel);
    }

    /// Another process has served the guest until now: nobody knows what it has answered, unless there was a flush since.
    pub fn taken_over(&self) {
        if self.now() == 0 {
            self.changed(0);
        }
    }

    /// The drive has lost its cache, and no lane has it yet. True: changes are lost.
    pub fn lose_cache(&self) -> bool {
        // Nothing is left that could be lost once more. The number is for lanes, which tell once for each.
        let now = self.next();
        let lost = self.needed.swap(0, Ordering::AcqRel) > self.succeeded.load(Ordering::Acquire);
        if lost {
            self.lost.store(now, Ordering::Release);
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
        assert!(!promise.lose_cache(), "nothing was written");
        promise.changed(promise.now());
        assert!(promise.lose_cache(), "nothing was ever flushed");
        assert_eq!(promise.begin(), None, "the next flush says so");
        assert!(promise.begin().is_some(), "and only that one");
        assert!(!promise.lose_cache(), "it can be lost once");
        promise.changed(promise.now());
        assert!(promise.begin().is_some());
        assert!(promise.lose_cache(), "it has not succeeded yet");
        assert_eq!(promise.begin(), None);
        promise.changed(promise.now());
        let flush = promise.begin().unwrap();
        assert!(promise.succeed(flush));
        assert!(!promise.lose_cache());
        // Answered while a flush was under way: that one says nothing about it.
        let flush = promise.begin().unwrap();
        promise.changed(promise.now());
        assert!(promise.succeed(flush));
        assert!(promise.lose_cache());
    }

    #[test]
    fn every_flush_that_the_loss_has_met_fails() {
        let promise = FlushPromise::default();
        promise.changed(promise.now());
        let met = [promise.begin().unwrap(), promise.begin().unwrap()];
        assert!(promise.lose_cache());
        assert_eq!(met.map(|number| promise.begin_again(number)), [None, None]);
        assert!(!promise.succeed(met[0]));
        let next = promise.begin().expect("the guest knows");
        assert!(promise.begin_again(next).is_some(), "asked once more for another reason");
        // Without a loss they go on.
        assert!(!promise.lose_cache());
        assert!(promise.begin_again(next).is_some());
    }

    #[test]
    fn a_flush_of_our_own_tells_the_guest_nothing() {
        let promise = FlushPromise::default();
        promise.changed(promise.now());
        assert!(promise.lose_cache());
        assert_eq!((promise.begin_own(), promise.begin_own()), (None, None));
        assert_eq!(promise.begin(), None);
        promise.changed(promise.now());
        let own = promise.begin_own().unwrap();
        assert!(promise.lose_cache());
        assert!(!promise.succeed(own), "what it was for is lost");
    }

    #[test]
    fn what_another_process_has_answered_is_unknown_until_a_flush() {
        let promise = FlushPromise::default();
        promise.taken_over();
        assert!(promise.lose_cache());
        assert_eq!(promise.begin(), None);
        let promise = FlushPromise::default();
        let flush = promise.begin().unwrap();
        promise.succeed(flush);
        promise.taken_over();
        assert!(!promise.lose_cache());
    }
}
