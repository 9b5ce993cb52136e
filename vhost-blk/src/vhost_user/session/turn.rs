//! The turn of a front-end: while it waits behind another one of its disk, it gets answers at once, and everything else in its turn.
//!
//! Another front-end's rings may run when this one comes. What it says is taken and kept in its session; nothing of it
//! reaches what all front-ends of a disk share (rings on workers, the mode of the write cache, what flushes have promised, and
//! the log of requests in flight, which may be the same memory) before the other one is gone and drained.

use std::sync::Arc;

use super::vring::RingState;
use super::{Session, SessionError};
use crate::log_limit::Kind;
use crate::virtio::memory::GuestMemory;
use crate::virtio::ring::InflightMemory;

/// Whether what is said takes effect.
#[derive(Default)]
pub(super) struct Standing {
    /// It is this session's turn.
    pub serves: bool,
    /// RESET_DEVICE has come since the log did, and waits for the turn.
    pub log_to_clear: bool,
}

/// What was said about memory before a front-end began anew.
pub(super) struct MemoryBefore {
    /// What the new one says again is shared with it.
    pub memory: Arc<GuestMemory>,
    /// The new one has begun a table of its own.
    pub replaced: bool,
}

impl Session {
    /// The session's turn on the disk has come: all that its front-end has said takes effect. The error says what cannot run.
    pub fn take_turn(&mut self) -> Result<(), SessionError> {
        self.standing.serves = true;
        let mode = self.settle_mode();
        if std::mem::take(&mut self.standing.log_to_clear) {
            self.inflight.iter().for_each(InflightMemory::clear);
        }
        if self.inflight.is_some() {
            self.adopt_log();
        }
        mode.and(self.settle())
    }

    /// Whether something waits for the turn that has to outlive the session.
    pub fn leaves_a_choice(&self) -> bool {
        self.write_cache.has_waiting_choice()
    }

    /// The turn has come when the front-end was gone: what it chose is kept for those to come.
    pub fn keep_choice(&mut self) -> Result<(), SessionError> {
        self.standing.serves = true;
        self.settle_mode()
    }

    /// Notes a choice that waits for the turn where the next process finds it. A log that is in use may be another session's.
    pub(super) fn note_choice(&self) {
        if self.inflight.as_ref().is_some_and(|memory| !memory.in_use()) {
            self.write_cache.note_waiting_choice();
        }
    }

    /// The mode of the write cache that this session has come to believe in meets the one that was left behind.
    fn settle_mode(&mut self) -> Result<(), SessionError> {
        if !self.write_cache.begin_turn() {
            return Ok(());
        }
        let done = self.write_through();
        self.write_cache.insist();
        done
    }

    /// Takes over what the log says of earlier sessions, and has it say more from now on.
    pub(super) fn adopt_log(&mut self) {
        let Some(memory) = &self.inflight else { return };
        let in_use = memory.in_use();
        let noted = self.write_cache.noted();
        let flushes = self.export.flushes();
        match memory.note() {
            Some(note) if flushes.attach(note) => {
                if let Some(more) = self.export.log.admit(Kind::Drive) {
                    log::error!(
                        "{}: writes that were not flushed before the last process ended are lost; the next flush fails, so \
                         that the guest knows{more}",
                        self.export.name
                    );
                }
            }
            Some(_) => {}
            None => flushes.detach(),
        }
        if !in_use && !self.served {
            flushes.forget_loss();
        }
        match noted {
            Some(mode) => self.write_cache.adopt(mode),
            None if self.write_cache.is_known() => self.write_cache.keep(),
            None if in_use => self.take_over(),
            None => {}
        }
    }

    /// SET_OWNER says that a front-end begins. On a connection that has had one before, whose rings are stopped, it is another
    /// one (QEMU keeps the connection when a device is taken away and another one put in its place). Until a ring was started
    /// it is still the same that begins, however often it says so: nothing is lost then that it would not say again.
    ///
    /// What comes before SET_OWNER in a front-end's life stays: protocol features, the channel for what we have to say, and
    /// the descriptors to signal on. So does the memory until the new one says a word about memory.
    pub(super) fn begin_anew(&mut self) {
        if !self.used || !self.running.is_empty() || !self.rings.iter().all(RingState::rests) {
            return;
        }
        if let Some(more) = self.export.log.admit(Kind::Connection) {
            log::info!("{}: the front-end sets up a new device on the same connection{more}", self.export.name);
        }
        (self.used, self.served) = (false, false);
        self.negotiate(0);
        let enabled = self.enabled_from_start();
        self.rings.iter_mut().for_each(|ring| ring.reset(enabled));
        self.standing = Standing { serves: self.standing.serves, ..Standing::default() };
        self.write_cache.forget_choice();
        self.write_cache.set_note(None);
        if self.inflight.take().is_some() && self.standing.serves {
            self.export.flushes().detach();
        }
        self.memory_before = Some(MemoryBefore { memory: self.memory.clone(), replaced: false });
    }
}
