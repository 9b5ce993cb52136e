//! One front-end's session: what it negotiated, its memory and its rings (the vhost-user protocol, back-end side).
//!
//! A ring *is wanted* when the front-end has said all there is to say about it (`vring`); it *runs* when, besides,
//! its addresses lie in memory that has arrived. Every message only changes what is wanted, and `Session::settle`
//! starts what can run, so the order of the messages does not matter. Nothing runs before it is the front-end's turn
//! (`turn`).
//!
//! A session owns what one front-end has said, and the lanes of its rings, which it moves to workers and back. It knows its disk by
//! the [`Export`] only, and never looks at a request.

pub mod connection;
mod error;
mod handler;
mod resize;
mod turn;
mod vring;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Instant;

use crate::blk::config::{self, BlockConfig};
use crate::blk::disk::Disk;
use crate::datapath::lane::{Lane, LaneSetup};
use crate::datapath::stop_policy::StopPolicy;
use crate::datapath::worker::LaneHandle;
use crate::drive::{Known, Lease};
use crate::log_limit::Kind;
use crate::vhost_user::export::Export;
use crate::vhost_user::write_cache::WriteCache;
use crate::virtio::memory::GuestMemory;
use crate::virtio::ring::{InflightError, InflightMemory, Ring, RingSetup};
pub use error::{ConnectionError, MemoryLoss, MessageRefusal, SessionError};
use resize::BackChannel;
use turn::{MemoryBefore, Standing};
use vring::{Addresses, RingState};

/// A ring in operation.
struct RunningRing {
    handle: LaneHandle,
    /// The place on a queue pair; given back when dropped.
    lease: Lease,
    addresses: Addresses,
}

/// The state of one front-end's connection; dropping it stops its rings and forgets its memory.
pub struct Session {
    export: Arc<Export>,
    memory: Arc<GuestMemory>,
    disk: Arc<Disk>,
    /// The mode of the write cache, which the disk and its lanes share.
    write_cache: WriteCache,
    /// The namespace, as lanes and front-end were told.
    known: Known,
    /// SET_FEATURES; 0 before.
    features: u64,
    /// SET_PROTOCOL_FEATURES; 0 before.
    protocol_features: u64,
    rings: Vec<RingState>,
    /// By ring index.
    running: HashMap<usize, RunningRing>,
    /// How many these are, for whoever must not wait for the session.
    rings_running: Arc<AtomicU16>,
    /// A ring has run.
    served: bool,
    /// A ring was started, if only in words.
    used: bool,
    standing: Standing,
    /// SET_OWNER has come again, and no ring has run since.
    memory_before: Option<MemoryBefore>,
    /// Where rings note what is in flight (SET_INFLIGHT_FD).
    inflight: Option<InflightMemory>,
    /// The channel to the front-end (SET_BACKEND_REQ_FD).
    back_channel: BackChannel,
    /// Why the last message was refused, until the connection asks for it.
    refusal: Option<SessionError>,
}

/// Features that change how a running ring is read; all others concern single requests.
const RING_FEATURES: u64 = config::F_RING_PACKED | config::F_EVENT_IDX | config::F_INDIRECT_DESC;

impl Session {
    /// A session that has not heard anything yet, and whose turn it is not.
    pub fn new(export: Arc<Export>) -> Session {
        let known = export.known();
        let write_cache = WriteCache::new(export.write_cache.clone(), known.namespace.volatile_write_cache);
        Session {
            disk: Arc::new(export.disk(&known, 0, write_cache.for_lanes())),
            write_cache,
            memory: Arc::new(GuestMemory::of(export.account.clone())),
            features: 0,
            protocol_features: 0,
            rings: (0..export.queues).map(|_| RingState { enabled: true, ..RingState::default() }).collect(),
            running: HashMap::new(),
            rings_running: Arc::default(),
            served: false,
            used: false,
            standing: Standing::default(),
            memory_before: None,
            inflight: None,
            back_channel: BackChannel::default(),
            known,
            refusal: None,
            export,
        }
    }

    /// The number of rings that run, at any moment; reading it waits for nobody.
    pub fn rings_running(&self) -> Arc<AtomicU16> {
        self.rings_running.clone()
    }

    fn count_rings(&self) {
        // Relaxed: a number, ordered with nothing. There are as many rings as an index of one byte can name.
        self.rings_running.store(self.running.len() as u16, Ordering::Relaxed);
    }

    /// Without protocol features there is no message to enable a ring: all of them are from the start.
    fn enabled_from_start(&self) -> bool {
        self.features & config::F_PROTOCOL_FEATURES == 0
    }

    /// The configuration space as the driver sees it now.
    fn config(&self) -> BlockConfig {
        self.export.config(&self.known, self.features, self.write_cache.mode())
    }

    /// A new disk for new features; running lanes keep theirs.
    fn negotiate(&mut self, features: u64) {
        self.disk = Arc::new(self.export.disk(&self.known, features, self.write_cache.for_lanes()));
        self.features = features;
    }

    /// Another process has served the guest until now, and left no word of what this one has to know.
    fn take_over(&mut self) {
        self.export.flushes().taken_over();
        // Which mode it has chosen is unknown, too.
        if self.export.can_choose_mode()
            && self.write_cache.distrust()
            && let Some(more) = self.export.log.admit(Kind::Ring)
        {
            log::info!(
                "{}: the write cache mode that the guest has chosen is not known; every write is written through until it \
                 chooses again{more}",
                self.export.name
            );
        }
        self.write_cache.keep();
    }

    /// Starts, in its turn, every ring that is wanted, lies in known memory and does not run yet; stops those no longer wanted.
    fn settle(&mut self) -> Result<(), SessionError> {
        if !self.standing.serves {
            return Ok(());
        }
        let mut result = Ok(());
        for index in 0..self.rings.len() {
            let outcome = match (self.rings[index].wanted(), self.running.contains_key(&index)) {
                (Some(addresses), false) => self.try_start(index, addresses, None),
                (None, true) => {
                    self.pause(index);
                    Ok(())
                }
                _ => Ok(()),
            };
            result = result.and(outcome);
        }
        result
    }

    /// Starts a ring; if that fails, the ring rests until something about it changes.
    fn try_start(&mut self, index: usize, addresses: Addresses, lease: Option<Lease>) -> Result<(), SessionError> {
        let result = self.start(index, addresses, lease);
        if result.is_err() {
            self.rings[index].fail();
        }
        result
    }

    /// Starts a ring, on the given place or a new one. A ring whose memory is not there yet waits: that is no error.
    fn start(&mut self, index: usize, addresses: Addresses, lease: Option<Lease>) -> Result<(), SessionError> {
        let guest = |address| self.memory.user_to_guest(address);
        let (Some(descriptors), Some(driver), Some(device)) =
            (guest(addresses.descriptors), guest(addresses.driver), guest(addresses.device))
        else {
            if !std::mem::replace(&mut self.rings[index].told_waiting, true)
                && let Some(more) = self.export.log.admit(Kind::Ring)
            {
                log::info!(
                    "{}: ring {index} waits until the front-end shares the memory that it lies in{more}",
                    self.export.name
                );
            }
            return Ok(());
        };
        let state = &self.rings[index];
        let has = |feature: u64| self.features & feature != 0;
        let setup = RingSetup {
            packed: has(config::F_RING_PACKED),
            size: state.size,
            event_idx: has(config::F_EVENT_IDX),
            indirect: has(config::F_INDIRECT_DESC),
            descriptors,
            driver,
            device,
            base: state.base,
        };
        let mut ring = Ring::new(&self.memory, &setup).map_err(|source| SessionError::Ring { ring: index, source })?;
        self.set_log(index, &mut ring).map_err(|source| SessionError::RingLog { ring: index, source })?;
        let duplicate = |purpose, file: std::io::Result<_>| {
            file.map_err(|source| SessionError::RingDescriptor { ring: index, purpose, source })
        };
        if !self.write_cache.is_known() {
            match setup.begins_anew() {
                true => self.write_cache.keep(),
                false => self.take_over(),
            }
        }
        let state = &self.rings[index];
        let lane = Lane::new(LaneSetup {
            name: format!("{} ring {index}", self.export.name),
            ring,
            memory: self.memory.clone(),
            disk: self.disk.clone(),
            kick: duplicate("kick", state.kick.try_clone())?,
            call: duplicate("call", state.call.try_clone())?,
            error: duplicate("error", state.error.try_clone())?,
            counters: self.export.counters(index),
            log: self.export.log.clone(),
            hold: self.export.hold(),
        });
        let lease = match lease {
            Some(lease) => lease,
            None => self.export.lease(index, state.size)?,
        };
        let handle = lease.start(lane);
        log::debug!("{}: ring {index} runs: {setup:?}", self.export.name);
        self.rings[index].told_waiting = false;
        self.served = true;
        self.memory_before = None;
        self.running.insert(index, RunningRing { handle, lease, addresses });
        self.count_rings();
        Ok(())
    }

    /// Gives a ring its log, if the front-end keeps one that has room for it.
    fn set_log(&self, index: usize, ring: &mut Ring) -> Result<(), InflightError> {
        let Some(inflight) = &self.inflight else { return Ok(()) };
        let Some(queue) = inflight.queue(index) else { return Ok(()) };
        match ring.set_log(&queue) {
            // QEMU asks for a log of queue-size entries, and its guest may choose larger rings (virtio-mmio does).
            Err(error @ InflightError::TooSmall { .. }) => {
                if let Some(more) = self.export.log.admit(Kind::Advice) {
                    log::warn!(
                        "{}: ring {index} has {size} entries and runs without a log of its requests in flight: {error}. Should \
                         this program die, what is in flight then may stay unanswered. Set queue-size={size} for this device{more}",
                        self.export.name,
                        size = ring.size()
                    );
                }
                inflight.note().inspect(|note| note.set_unlogged(true));
                Ok(())
            }
            result => result,
        }
    }

    /// Stops a ring if it runs, and keeps where it stopped. Its place stays with the caller.
    fn pause(&mut self, index: usize) -> Option<Lease> {
        self.pause_these(&[index], StopPolicy::AnswerAll).pop().map(|(_, lease)| lease)
    }

    /// Stops every ring; what comes back is where each ran.
    fn pause_all(&mut self) -> Vec<(usize, Lease)> {
        let mut running: Vec<usize> = self.running.keys().copied().collect();
        running.sort_unstable();
        self.pause_these(&running, StopPolicy::AnswerAll)
    }

    /// Stops rings: all at once, so that a drive that does not answer is waited for once.
    pub(super) fn pause_these(&mut self, rings: &[usize], policy: StopPolicy) -> Vec<(usize, Lease)> {
        let running = rings.iter().filter_map(|index| Some((*index, self.running.remove(index)?)));
        let stopping: Vec<_> = running
            .map(|(index, RunningRing { handle, lease, .. })| (index, lease.begin_stop(handle, policy), lease))
            .collect();
        self.count_rings();
        let deadline = stopping.first().map_or_else(Instant::now, |(_, _, lease)| lease.stop_deadline());
        let mut paused = Vec::new();
        for (index, lane, lease) in stopping {
            if let Some(stopped) = lease.finish_stop(lane, deadline) {
                self.rings[index].base = stopped.base;
                self.rings[index].broken |= stopped.broken;
            }
            paused.push((index, lease));
        }
        paused
    }

    /// Puts a new memory table in force. Rings go on where the new table holds all of the old one, and are stopped and
    /// started again where it does not: no request may be under way in memory that is taken away.
    fn set_memory(&mut self, memory: GuestMemory) -> Result<(), SessionError> {
        let memory = Arc::new(memory);
        if memory.is_superset_of(&self.memory) {
            let mut result = Ok(());
            for running in self.running.values() {
                result = result.and(running.handle.set_memory(memory.clone()).map_err(SessionError::Worker));
            }
            self.memory = memory;
            self.rings.iter_mut().for_each(|ring| ring.failed = false);
            return result.and(self.settle());
        }
        let paused = self.pause_all();
        // From here on nothing holds the old table: what it had alone is unmapped.
        self.memory = memory;
        self.rings.iter_mut().for_each(RingState::changed);
        self.resume(paused).and(self.settle())
    }

    /// Starts rings again where they ran before.
    fn resume(&mut self, paused: Vec<(usize, Lease)>) -> Result<(), SessionError> {
        let mut result = Ok(());
        for (index, lease) in paused {
            if let Some(addresses) = self.rings[index].wanted() {
                result = result.and(self.try_start(index, addresses, Some(lease)));
            }
        }
        result
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let running: Vec<usize> = self.running.keys().copied().collect();
        self.pause_these(&running, StopPolicy::LeaveInLog);
        if self.standing.serves {
            self.export.flushes().detach();
        }
    }
}
