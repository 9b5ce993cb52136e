//! The mode of a disk's write cache: what its lanes obey, what the guest has chosen, and what is left for sessions to come.
//!
//! With write-back, a write may be answered out of the drive's cache, and the guest's next flush makes it durable; with
//! write-through it is durable when it is answered (virtio 1.2, 5.2.6.2). A guest that believes in write-through does not flush.
//! So where two sources disagree, write-through counts; and whoever changes to write-through flushes what was answered before.
//!
//! This module owns the mode and its rules, for a session (`WriteCache`) and beyond it ([`KnownMode`], and the note in the log of
//! requests in flight, which outlives this process). It never touches the drive: it tells the session when to flush.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::virtio::ring::Note;

/// How writes are answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteCacheMode {
    /// Perhaps out of the drive's cache; a flush makes them durable.
    WriteBack,
    /// When they are durable.
    WriteThrough,
}

impl WriteCacheMode {
    /// The mode that the `writeback` field of the configuration space means (virtio 1.2, 5.2.4).
    pub fn from_writeback(writeback: bool) -> WriteCacheMode {
        if writeback { WriteCacheMode::WriteBack } else { WriteCacheMode::WriteThrough }
    }

    /// The `writeback` field of the configuration space.
    pub fn is_writeback(self) -> bool {
        self == WriteCacheMode::WriteBack
    }
}

/// The mode as the front-ends of a disk know it. The disk keeps it, for it outlives sessions: a front-end that comes again shows its
/// guest the mode that was set, and does not set it again.
#[derive(Debug, Default)]
pub struct KnownMode(Mutex<Option<WriteCacheMode>>);

impl KnownMode {
    /// The mode; `None`: this process has not served a front-end of the disk yet.
    pub fn get(&self) -> Option<WriteCacheMode> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, mode: WriteCacheMode) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(mode);
    }
}

/// What one session knows and wants of the mode.
pub(super) struct WriteCache {
    /// True: write-back. Shared with the disk in all the forms that lanes have of it, which look at it for each write.
    in_force: Arc<AtomicBool>,
    /// The guest has chosen the mode in force, and it is not the session's turn yet.
    choice_waits: bool,
    /// What the disk's front-ends know.
    known: Arc<KnownMode>,
    /// Where the front-end keeps what the next process has to know, if it does.
    note: Option<Arc<Note>>,
}

impl WriteCache {
    /// The mode that is known, else that of the drive: one without a cache writes through, and the driver may ask for the same.
    pub(super) fn new(known: Arc<KnownMode>, drive_has_cache: bool) -> WriteCache {
        let mode = known.get().unwrap_or(WriteCacheMode::from_writeback(drive_has_cache));
        let in_force = Arc::new(AtomicBool::new(mode.is_writeback()));
        WriteCache { in_force, choice_waits: false, known, note: None }
    }

    /// The mode in force, for [`Disk::writeback`](crate::blk::disk::Disk::writeback).
    pub(super) fn for_lanes(&self) -> Arc<AtomicBool> {
        self.in_force.clone()
    }

    /// The mode in force.
    pub(super) fn mode(&self) -> WriteCacheMode {
        // Relaxed, here and below: it guards nothing; a write is under the new mode when the driver submits it after the change was
        // answered, and the answer itself orders that.
        WriteCacheMode::from_writeback(self.in_force.load(Ordering::Relaxed))
    }

    /// Puts another mode in force; what it was before.
    fn replace(&self, mode: WriteCacheMode) -> WriteCacheMode {
        WriteCacheMode::from_writeback(self.in_force.swap(mode.is_writeback(), Ordering::Relaxed))
    }

    /// The stricter one of two modes is in force.
    fn restrict(&self, other: WriteCacheMode) {
        self.in_force.fetch_and(other.is_writeback(), Ordering::Relaxed);
    }

    /// Where the next process finds the mode from now on.
    pub(super) fn set_note(&mut self, note: Option<Arc<Note>>) {
        self.note = note;
    }

    /// Whether a session of this process has come to know the mode.
    pub(super) fn is_known(&self) -> bool {
        self.known.get().is_some()
    }

    /// Keeps the mode in force for sessions to come, of this process and of others.
    pub(super) fn keep(&self) {
        let mode = self.mode();
        self.known.set(mode);
        if let Some(note) = &self.note {
            note.set_mode(mode.is_writeback());
        }
    }

    /// The guest chooses, in its turn. True: what was answered before has to be flushed, as this guest flushes no more. After that the
    /// mode has to be [kept](WriteCache::keep).
    pub(super) fn choose(&self, mode: WriteCacheMode) -> bool {
        self.replace(mode) == WriteCacheMode::WriteBack && mode == WriteCacheMode::WriteThrough
    }

    /// The guest chooses before its turn: the choice is accepted, and takes effect then.
    pub(super) fn choose_for_turn(&mut self, mode: WriteCacheMode) {
        self.replace(mode);
        self.choice_waits = true;
    }

    /// A guest that has chosen write-through counts on it, even if this process dies before its turn. To be called only if the log of
    /// requests in flight is not in use: it may be another session's until then.
    pub(super) fn note_waiting_choice(&self) {
        if let Some(note) = &self.note
            && self.choice_waits
            && self.mode() == WriteCacheMode::WriteThrough
        {
            note.set_mode(false);
        }
    }

    /// Whether a choice waits for the turn, which has to outlive the session.
    pub(super) fn has_waiting_choice(&self) -> bool {
        self.choice_waits
    }

    /// The front-end begins anew: what it has chosen is for nothing.
    pub(super) fn forget_choice(&mut self) {
        self.choice_waits = false;
    }

    /// The session's turn comes: its mode meets the one that others have left. True: the guest has chosen write-through and others
    /// have left write-back; what they wrote has to be flushed, and then [`WriteCache::insist`] is to be called.
    pub(super) fn begin_turn(&mut self) -> bool {
        let left = self.known.get();
        if std::mem::take(&mut self.choice_waits) {
            if self.mode() == WriteCacheMode::WriteThrough && left != Some(WriteCacheMode::WriteThrough) {
                return true;
            }
            self.keep();
        } else if let Some(left) = left {
            // A guest that was shown write-through does not flush.
            self.restrict(left);
            self.keep();
        }
        false
    }

    /// The choice of write-through was accepted: whatever becomes of earlier writes, those from here on are written through.
    pub(super) fn insist(&self) {
        self.replace(WriteCacheMode::WriteThrough);
        self.keep();
    }

    /// Write-through was refused, as what was answered before cannot be flushed.
    pub(super) fn stay_writeback(&self) {
        self.replace(WriteCacheMode::WriteBack);
    }

    /// What the note says, if there is one that says something.
    pub(super) fn noted(&self) -> Option<WriteCacheMode> {
        self.note.as_ref().and_then(|note| note.mode()).map(WriteCacheMode::from_writeback)
    }

    /// Takes over what the note said.
    pub(super) fn adopt(&self, noted: WriteCacheMode) {
        self.restrict(noted);
        self.keep();
    }

    /// Nobody knows what the guest has chosen: one that believes in write-through does not flush; one that believes in write-back
    /// loses some speed. True: the mode has changed.
    pub(super) fn distrust(&self) -> bool {
        self.replace(WriteCacheMode::WriteThrough) == WriteCacheMode::WriteBack
    }
}

#[cfg(test)]
mod tests {
    use super::WriteCacheMode::{WriteBack, WriteThrough};
    use super::*;

    fn session(known: &Arc<KnownMode>) -> WriteCache {
        WriteCache::new(known.clone(), true)
    }

    #[test]
    fn the_stricter_mode_counts_when_nobody_has_chosen() {
        for (left, shown, expected) in [
            (WriteBack, WriteBack, WriteBack),
            (WriteBack, WriteThrough, WriteThrough),
            (WriteThrough, WriteBack, WriteThrough),
        ] {
            let known = Arc::<KnownMode>::default();
            let mut cache = session(&known);
            cache.replace(shown);
            known.set(left);
            assert!(!cache.begin_turn());
            assert_eq!((cache.mode(), known.get()), (expected, Some(expected)), "{left:?}, {shown:?}");
        }
    }

    #[test]
    fn a_turn_says_nothing_of_what_nobody_knows() {
        let known = Arc::<KnownMode>::default();
        let mut cache = session(&known);
        assert_eq!(cache.mode(), WriteBack, "the drive has a cache");
        assert!(!cache.begin_turn() && !cache.is_known());
        assert_eq!(WriteCache::new(known, false).mode(), WriteThrough, "the drive has none");
    }

    #[test]
    fn a_choice_of_before_the_turn_takes_effect_then() {
        for (left, chosen, flushes) in [
            (Some(WriteBack), WriteThrough, true),
            (None, WriteThrough, true),
            (Some(WriteThrough), WriteThrough, false),
            (Some(WriteThrough), WriteBack, false),
        ] {
            let known = Arc::<KnownMode>::default();
            let mut cache = session(&known);
            left.into_iter().for_each(|left| known.set(left));
            cache.choose_for_turn(chosen);
            assert_eq!(known.get(), left, "others go on as they were");
            assert_eq!(cache.begin_turn(), flushes, "{left:?}, {chosen:?}");
            if flushes {
                // The flush may fail.
                cache.stay_writeback();
                cache.insist();
            }
            assert!(!cache.has_waiting_choice());
            assert_eq!((cache.mode(), known.get()), (chosen, Some(chosen)), "{left:?}, {chosen:?}");
        }
    }

    #[test]
    fn only_a_change_to_write_through_flushes() {
        let cache = session(&Arc::default());
        assert!(!cache.choose(WriteBack));
        assert!(cache.choose(WriteThrough));
        assert!(!cache.choose(WriteThrough));
        assert!(!cache.choose(WriteBack));
        assert!(cache.distrust() && !cache.distrust());
        assert_eq!(cache.mode(), WriteThrough);
    }
}
