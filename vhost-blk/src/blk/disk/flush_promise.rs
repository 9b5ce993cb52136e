//! What a flush promises, kept over a drive that loses its cache.
//!
//! A drive that loses its power loses what was written and not flushed. That is allowed; a later flush that succeeds is not,
//! for it promises that everything answered before is safe. So the first flush after such a loss fails, and the guest knows.
//!
//! Lanes come and go, and several serve a disk at a time; what was promised outlives them. So it is kept here, and looked at
//! once when the drive is back, before any lane goes on.
//!
//! It outlives the process as well, where the front-end keeps a [`Note`] for the next one: that compares how often the drive says
//! that it has lost its power without notice.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::virtio::ring::Note;

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
    /// The last flush that has not made safe what was answered before it: that was lost.
    lost: AtomicU64,
    /// What was answered before is lost, and no flush has said so.
    broken: AtomicBool,
    /// Written when a session begins or ends and when the drive comes back; so lanes, which read it, never wait.
    after: RwLock<After>,
}

/// For the process after this one.
#[derive(Default)]
struct After {
    /// Where it is written, if the front-end has a place for it.
    note: Option<Arc<Note>>,
    /// How often the drive has lost its cache, if it counts that.
    losses: Option<u64>,
}

impl std::fmt::Debug for After {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("After").field("losses", &self.losses).finish_non_exhaustive()
    }
}

impl FlushPromise {
    /// The number of a flush that is given to the drive from now on; `None`: it has to fail, and the guest knows then.
    pub fn begin(&self) -> Option<u64> {
        let told = self.broken.swap(false, Ordering::AcqRel);
        if told {
            self.write(|note| note.set_broken(false));
        }
        (!told).then(|| self.next())
    }

    /// The new number of a flush that had this one and that the drive has not answered, for giving it to the drive once more; `None`:
    /// the flush has to fail. Each flush fails that was under way when the drive lost its cache: they may be for different parts of
    /// the guest.
    pub fn begin_again(&self, number: u64) -> Option<u64> {
        if number > self.lost.load(Ordering::Acquire) {
            return self.begin();
        }
        self.broken.store(false, Ordering::Release);
        self.write(|note| note.set_broken(false));
        None
    }

    /// The number of a flush that is not the guest's; `None`: it has to fail, and one of the guest's still has to.
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
        self.write(|note| note.set_succeeded(number));
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
        self.write(|note| note.set_needed(now + 1));
    }

    /// Another process has served the guest until now: nobody knows what it has answered, unless there was a flush since.
    pub fn taken_over(&self) {
        if self.now() == 0 {
            self.changed(0);
        }
    }

    fn after(&self) -> RwLockReadGuard<'_, After> {
        self.after.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn after_mut(&self) -> RwLockWriteGuard<'_, After> {
        self.after.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, write: impl FnOnce(&Note)) {
        if let Some(note) = &self.after().note {
            write(note);
        }
    }

    /// The drive is there; so often it has lost its cache, if it counts that.
    pub fn set_losses(&self, losses: Option<u64>) {
        self.after_mut().losses = losses;
    }

    /// Writes for the next process to `note` from now on, and takes over what the last one has left there. True: changes are
    /// lost. No lane runs.
    pub fn attach(&self, note: &Arc<Note>) -> bool {
        let mut after = self.after_mut();
        let unsafe_changes = note.unsafe_changes();
        let lost_since = note.losses().zip(after.losses).is_some_and(|(then, now)| then != now);
        let lost = note.broken() || unsafe_changes && lost_since;
        if lost {
            self.broken.store(true, Ordering::Release);
        } else if unsafe_changes {
            self.needed.fetch_max(self.now() + 1, Ordering::AcqRel);
        }
        // Whenever this process dies, nothing is forgotten.
        let broken = self.broken.load(Ordering::Acquire);
        if broken {
            note.set_broken(true);
        }
        note.restart(self.needed.load(Ordering::Acquire), self.succeeded.load(Ordering::Acquire));
        note.set_losses(after.losses);
        note.set_broken(broken);
        after.note = Some(note.clone());
        lost
    }

    /// The session that had the note is over.
    pub fn detach(&self) {
        self.after_mut().note = None;
    }

    /// The front-end's guest begins anew, and has seen nothing of what was lost before.
    pub fn forget_loss(&self) {
        self.broken.store(false, Ordering::Release);
        self.write(|note| note.set_broken(false));
    }

    /// The drive has lost its cache, so often by now, and no lane has it yet. True: changes are lost.
    pub fn lose_cache(&self, losses: Option<u64>) -> bool {
        let mut after = self.after_mut();
        after.losses = losses;
        // Nothing is left that could be lost once more. The number is for lanes, which tell once for each.
        let now = self.next();
        let lost = self.needed.swap(0, Ordering::AcqRel) > self.succeeded.load(Ordering::Acquire);
        if lost {
            self.lost.store(now, Ordering::Release);
            self.broken.store(true, Ordering::Release);
        }
        if let Some(note) = &after.note {
            if lost {
                note.set_broken(true);
            }
            note.restart(0, self.succeeded.load(Ordering::Acquire));
            note.set_losses(losses);
        }
        lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::ring::InflightMemory;

    #[test]
    fn only_what_was_not_flushed_breaks_the_promise() {
        let promise = FlushPromise::default();
        assert!(!promise.lose_cache(None), "nothing was written");
        promise.changed(promise.now());
        assert!(promise.lose_cache(None), "nothing was ever flushed");
        assert_eq!(promise.begin(), None, "the next flush says so");
        assert!(promise.begin().is_some(), "and only that one");
        assert!(!promise.lose_cache(None), "it can be lost once");
        promise.changed(promise.now());
        assert!(promise.begin().is_some());
        assert!(promise.lose_cache(None), "it has not succeeded yet");
        assert_eq!(promise.begin(), None);
        promise.changed(promise.now());
        let flush = promise.begin().unwrap();
        assert!(promise.succeed(flush));
        assert!(!promise.lose_cache(None));
        // Answered while a flush was under way: that one says nothing about it.
        let flush = promise.begin().unwrap();
        promise.changed(promise.now());
        assert!(promise.succeed(flush));
        assert!(promise.lose_cache(None));
    }

    #[test]
    fn every_flush_that_the_loss_has_met_fails() {
        let promise = FlushPromise::default();
        promise.changed(promise.now());
        let met = [promise.begin().unwrap(), promise.begin().unwrap()];
        assert!(promise.lose_cache(None));
        assert_eq!(met.map(|number| promise.begin_again(number)), [None, None]);
        assert!(!promise.succeed(met[0]));
        let next = promise.begin().expect("the guest knows");
        assert!(promise.begin_again(next).is_some(), "asked once more for another reason");
        // Without a loss they go on.
        assert!(!promise.lose_cache(None));
        assert!(promise.begin_again(next).is_some());
    }

    #[test]
    fn a_flush_of_our_own_tells_the_guest_nothing() {
        let promise = FlushPromise::default();
        promise.changed(promise.now());
        assert!(promise.lose_cache(None));
        assert_eq!((promise.begin_own(), promise.begin_own()), (None, None));
        assert_eq!(promise.begin(), None);
        promise.changed(promise.now());
        let own = promise.begin_own().unwrap();
        assert!(promise.lose_cache(None));
        assert!(!promise.succeed(own), "what it was for is lost");
    }

    /// A process, as far as this file goes: with what it finds in the memory, and a drive that has lost its power so often.
    fn process(memory: &InflightMemory, losses: Option<u64>) -> (FlushPromise, bool) {
        let promise = FlushPromise::default();
        promise.set_losses(losses);
        let lost = promise.attach(memory.note().unwrap());
        (promise, lost)
    }

    #[test]
    fn the_next_process_knows_what_this_one_has_promised() {
        let memory = InflightMemory::create(2, 16).unwrap();
        let (promise, lost) = process(&memory, Some(3));
        assert!(!lost, "nothing was promised");
        for _ in 0..5 {
            promise.changed(promise.now());
            let flush = promise.begin().unwrap();
            promise.succeed(flush);
        }
        assert!(!process(&memory, Some(4)).1, "everything was safe");
        assert!(!process(&memory, Some(4)).1);
        let (promise, _) = process(&memory, Some(4));
        promise.changed(promise.now());
        assert!(!process(&memory, Some(4)).1, "the drive has kept its power");
        assert!(!process(&memory, None).1, "and here nobody knows");
        assert!(!process(&memory, Some(4)).1);
        let (promise, lost) = process(&memory, Some(5));
        assert!(lost);
        drop(promise);
        // Not told yet; told; known to be told.
        let (promise, lost) = process(&memory, Some(5));
        assert!(lost);
        assert_eq!(promise.begin(), None);
        let (promise, lost) = process(&memory, Some(6));
        assert!(!lost && promise.begin().is_some());
        // What was lost while the process lived, and was not told.
        promise.changed(promise.now());
        assert!(promise.lose_cache(Some(7)));
        let (promise, lost) = process(&memory, Some(7));
        assert!(lost);
        promise.forget_loss();
        assert!(!process(&memory, Some(8)).1, "there is another guest");
        // What the next process takes over can still be lost.
        let (promise, _) = process(&memory, Some(8));
        promise.changed(promise.now());
        let (promise, lost) = process(&memory, Some(8));
        assert!(!lost && promise.lose_cache(Some(9)));
        promise.detach();
        assert_eq!(promise.begin(), None);
        assert!(memory.note().unwrap().broken(), "it is not ours any more");
    }

    #[test]
    fn what_another_process_has_answered_is_unknown_until_a_flush() {
        let promise = FlushPromise::default();
        promise.taken_over();
        assert!(promise.lose_cache(None));
        assert_eq!(promise.begin(), None);
        let promise = FlushPromise::default();
        let flush = promise.begin().unwrap();
        promise.succeed(flush);
        promise.taken_over();
        assert!(!promise.lose_cache(None));
    }
}
