//! The messages of the vhost-user protocol, each as a change to the session.
//!
//! This module owns what each message means. Nothing that a message says is believed before it was checked, and no message waits
//! for the front-end. The error of one that is refused says why.

use std::fs::File;
use std::os::fd::OwnedFd;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Backend, Error, GpuBackend, Result as Reply, VhostUserBackendReqHandlerMut};

use super::connection::ConnectionHandler;
use super::error::{MemoryLoss, SessionError};
use super::vring::{Addresses, Notifier, RingState};
use super::{RING_FEATURES, Session};
use crate::blk::config;
use crate::datapath::stop_policy::StopPolicy;
use crate::event::is_eventfd;
use crate::vhost_user::write_cache::WriteCacheMode;
use crate::virtio::memory::RegionDescription;
use crate::virtio::ring::InflightMemory;

/// What we offer. Dirty logging is not there yet, so it is not offered.
pub(super) const PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::INFLIGHT_SHMFD);

impl ConnectionHandler for Session {
    fn take_refusal(&mut self) -> Option<SessionError> {
        self.refusal.take()
    }

    fn offer_back_channel(&mut self, descriptor: Option<OwnedFd>) {
        self.back_channel.offer(descriptor);
    }

    fn look_at_namespace(&mut self) {
        self.take_news();
    }

    fn take_turn(&mut self) -> Result<(), SessionError> {
        Session::take_turn(self)
    }

    fn lost_memory(&self) -> Option<MemoryLoss> {
        if let Some(why) = self.memory.unreachable() {
            return Some(MemoryLoss::Unreachable(why.to_owned()));
        }
        let log_is_lost = || self.inflight.as_ref().is_some_and(InflightMemory::is_lost);
        self.memory
            .lost()
            .map(|region| MemoryLoss::Region(*region))
            .or_else(|| log_is_lost().then_some(MemoryLoss::Log))
    }

    fn reply_ack(&self) -> bool {
        self.protocol_features & VhostUserProtocolFeatures::REPLY_ACK.bits() != 0
    }
}

impl Session {
    /// Keeps the reason for the log and gives the crate an error that makes it send the error reply.
    fn answer<T>(&mut self, result: Result<T, SessionError>) -> Reply<T> {
        result.map_err(|why| {
            self.refusal = Some(why);
            Error::InvalidParam
        })
    }

    fn ring_index(&self, index: u32) -> Result<usize, SessionError> {
        let offered = self.rings.len();
        let known = usize::try_from(index).ok().filter(|index| *index < offered);
        known.ok_or(SessionError::NoSuchRing { ring: index, offered })
    }

    /// The ring at `index`, for settings that cannot change under a running ring.
    fn resting(&self, index: u32) -> Result<usize, SessionError> {
        let index = self.ring_index(index)?;
        if self.running.contains_key(&index) {
            return Err(SessionError::RingRuns { ring: index });
        }
        Ok(index)
    }

    fn try_set_features(&mut self, features: u64) -> Result<(), SessionError> {
        let unknown = features & !self.export.features;
        if unknown != 0 {
            return Err(SessionError::Features(unknown));
        }
        let before = self.enabled_from_start();
        if !self.running.is_empty() && (features ^ self.features) & RING_FEATURES != 0 {
            return Err(SessionError::FormatOfRunningRings);
        }
        if features != self.features {
            let paused = self.pause_all();
            self.negotiate(features);
            let after = self.enabled_from_start();
            if before != after {
                self.rings.iter_mut().for_each(|ring| ring.enabled = after);
            }
            self.rings.iter_mut().for_each(RingState::changed);
            self.resume(paused)?;
        }
        self.settle()
    }

    fn try_set_vring_num(&mut self, index: u32, entries: u32) -> Result<(), SessionError> {
        let index = self.resting(index)?;
        let most = self.export.queue_size;
        let size = u16::try_from(entries).ok().filter(|size| (1..=most).contains(size));
        self.rings[index].size = size.ok_or(SessionError::RingSize { ring: index, entries, most })?;
        self.rings[index].changed();
        self.settle()
    }

    fn try_set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        addresses: Addresses,
    ) -> Result<(), SessionError> {
        let index = self.ring_index(index)?;
        if flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG) {
            return Err(SessionError::DirtyLogging);
        }
        // Front-ends repeat the addresses of a running ring when they switch logging; that changes nothing.
        if self.running.get(&index).is_some_and(|running| running.addresses == addresses) {
            return Ok(());
        }
        self.resting(index as u32)?;
        self.rings[index].addresses = Some(addresses);
        self.rings[index].changed();
        self.settle()
    }

    fn notifier(purpose: &'static str, file: Option<File>) -> Result<Notifier, SessionError> {
        match file {
            Some(file) if !is_eventfd(&file) => Err(SessionError::NotAnEventfd { purpose }),
            file => Ok(file.into()),
        }
    }

    fn try_set_kick(&mut self, index: u8, file: Option<File>) -> Result<(), SessionError> {
        let index = self.ring_index(index.into())?;
        let kick = Self::notifier("kick", file)?;
        if let Some(running) = self.running.get(&index) {
            running.handle.set_kick(duplicate(&kick)?);
        }
        self.rings[index].kick = kick;
        self.rings[index].changed();
        self.used = true;
        self.settle()
    }

    fn try_set_call(&mut self, index: u8, file: Option<File>) -> Result<(), SessionError> {
        let index = self.ring_index(index.into())?;
        let call = Self::notifier("call", file)?;
        if let Some(running) = self.running.get(&index) {
            running.handle.set_call(duplicate(&call)?);
        }
        self.rings[index].call = call;
        Ok(())
    }

    fn try_set_error(&mut self, index: u8, file: Option<File>) -> Result<(), SessionError> {
        let index = self.ring_index(index.into())?;
        let error = Self::notifier("error", file)?;
        if let Some(running) = self.running.get(&index) {
            running.handle.set_error(duplicate(&error)?);
        }
        self.rings[index].error = error;
        Ok(())
    }

    fn try_get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState, SessionError> {
        let ring = self.ring_index(index)?;
        self.pause(ring);
        let base = self.rings[ring].base;
        self.rings[ring].stop(base);
        Ok(VhostUserVringState::new(index, base))
    }

    fn try_set_mem_table(&mut self, regions: &[VhostUserMemoryRegion], files: Vec<File>) -> Result<(), SessionError> {
        let regions = regions.iter().map(description).zip(files).collect();
        let memory = self.memory.replaced(self.export.dma_scope(), regions).map_err(SessionError::Memory)?;
        self.memory_before = None;
        self.set_memory(memory)
    }

    fn try_add_region(&mut self, region: &VhostUserMemoryRegion, file: File) -> Result<(), SessionError> {
        let empty = self.memory.emptied();
        let (table, earlier) = match &self.memory_before {
            Some(before) if !before.replaced => (&empty, &*before.memory),
            Some(before) => (&*self.memory, &*before.memory),
            None => (&*self.memory, &*self.memory),
        };
        let memory = table
            .with_region_like(earlier, self.export.dma_scope(), description(region), file)
            .map_err(SessionError::Memory)?;
        self.memory_before.iter_mut().for_each(|before| before.replaced = true);
        self.set_memory(memory)
    }

    fn try_remove_region(&mut self, region: &VhostUserMemoryRegion) -> Result<(), SessionError> {
        let memory = self.memory.without_region(&description(region)).map_err(SessionError::Memory)?;
        self.memory_before = None;
        self.set_memory(memory)
    }

    fn try_set_config(&mut self, offset: u32, data: &[u8]) -> Result<(), SessionError> {
        if !self.export.can_choose_mode() {
            return Err(SessionError::FixedMode);
        }
        let writeback = config::written_mode(&self.config(), offset, data).map_err(SessionError::Config)?;
        let mode = WriteCacheMode::from_writeback(writeback);
        if !self.standing.serves {
            self.write_cache.choose_for_turn(mode);
            self.note_choice();
            return Ok(());
        }
        let done = if self.write_cache.choose(mode) { self.write_through() } else { Ok(()) };
        self.write_cache.keep();
        done
    }

    /// Writes that were answered under writeback must not stay volatile when the driver, which now counts on writethrough,
    /// flushes no more (virtio 1.2, 5.2.6.2).
    pub(super) fn write_through(&mut self) -> Result<(), SessionError> {
        let export = self.export.clone();
        // The queue pair of a ring will do if the controller has no other left.
        let Err(first) = export.flush() else { return Ok(()) };
        let paused = self.pause_all();
        let places: Vec<usize> = paused.into_iter().map(|(index, _lease)| index).collect();
        let flushed = export.flush();
        self.rings.iter_mut().for_each(RingState::changed);
        let started = self.settle();
        log::debug!("{}: rings {places:?} were stopped for a flush: {first}", export.name);
        if flushed.is_err() {
            self.write_cache.stay_writeback();
        }
        flushed.map_err(SessionError::WriteThrough).and(started)
    }

    /// Memory for the log of as many rings as the front-end uses. The front-end gives it back to us, and after us to the next
    /// process, with SET_INFLIGHT_FD.
    fn try_get_inflight(&mut self, asked: &VhostUserInflight) -> Result<(VhostUserInflight, File), SessionError> {
        let rings = self.rings.len();
        if usize::from(asked.num_queues) > rings {
            return Err(SessionError::LogRings { asked: asked.num_queues, offered: rings });
        }
        let most = self.export.queue_size;
        if asked.queue_size > most {
            return Err(SessionError::LogEntries { asked: asked.queue_size, most });
        }
        let memory = InflightMemory::create(asked.num_queues, asked.queue_size)?;
        let file = memory.file().try_clone().map_err(SessionError::Duplicate)?;
        Ok((VhostUserInflight { mmap_size: memory.bytes(), mmap_offset: 0, ..*asked }, file))
    }

    fn try_set_inflight(&mut self, told: &VhostUserInflight, file: File) -> Result<(), SessionError> {
        if !self.running.is_empty() {
            return Err(SessionError::LogOfRunningRings);
        }
        let memory = InflightMemory::from_file(file, told.mmap_offset, told.mmap_size, told.num_queues)?;
        self.write_cache.set_note(memory.note().cloned());
        self.inflight = Some(memory);
        self.standing.log_to_clear = false;
        match self.standing.serves {
            true => self.adopt_log(),
            false => self.note_choice(),
        }
        self.rings.iter_mut().for_each(RingState::changed);
        self.settle()
    }

    /// RESET_DEVICE: everything but the connection itself and the memory, which the front-end tells once only. Nobody needs answers
    /// that the drive has not given yet.
    fn try_reset(&mut self) -> Result<(), SessionError> {
        let running: Vec<usize> = self.running.keys().copied().collect();
        self.pause_these(&running, StopPolicy::LeaveInLog);
        let enabled = self.enabled_from_start();
        self.rings.iter_mut().for_each(|ring| ring.reset(enabled));
        if self.standing.serves {
            self.inflight.iter().for_each(InflightMemory::clear);
        } else {
            self.standing.log_to_clear = self.inflight.is_some();
        }
        // The mode of the write cache stays, as it may (virtio 1.2, 5.2.5: it can be either after a reset, and the driver has to
        // read it). Front-ends go on showing the guest what it chose before, QEMU among them, and tell us of changes only.
        Ok(())
    }
}

fn duplicate(notifier: &Notifier) -> Result<Option<File>, SessionError> {
    notifier.try_clone().map_err(SessionError::Duplicate)
}

fn description(region: &VhostUserMemoryRegion) -> RegionDescription {
    RegionDescription {
        guest_address: region.guest_phys_addr,
        bytes: region.memory_size,
        user_address: region.user_addr,
        file_offset: region.mmap_offset,
    }
}

/// For messages whose features are not offered; the connection keeps them away, so this is never reached.
fn not_offered<T>() -> Reply<T> {
    Err(Error::InvalidOperation("not offered"))
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Reply<()> {
        self.begin_anew();
        Ok(())
    }

    fn reset_owner(&mut self) -> Reply<()> {
        // The specification deprecates it and allows two readings: ignore it, or disable all rings.
        self.pause_all();
        let enabled = self.enabled_from_start();
        self.rings.iter_mut().for_each(|ring| {
            ring.enabled = enabled;
            let base = ring.base;
            ring.stop(base);
        });
        Ok(())
    }

    fn reset_device(&mut self) -> Reply<()> {
        let result = self.try_reset();
        self.answer(result)
    }

    fn get_features(&mut self) -> Reply<u64> {
        Ok(self.export.offered())
    }

    fn set_features(&mut self, features: u64) -> Reply<()> {
        let result = self.try_set_features(features);
        self.answer(result)
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Reply<Option<Vec<VhostUserMemoryRegionBase>>> {
        let result = self.try_set_mem_table(regions, files).map(|()| None);
        self.answer(result)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Reply<()> {
        let result = self.try_set_vring_num(index, num);
        self.answer(result)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Reply<()> {
        let addresses = Addresses { descriptors: descriptor, driver: available, device: used };
        let result = self.try_set_vring_addr(index, flags, addresses);
        self.answer(result)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Reply<()> {
        let result = self.resting(index).and_then(|index| {
            self.rings[index].base = base;
            self.rings[index].changed();
            self.settle()
        });
        self.answer(result)
    }

    fn get_vring_base(&mut self, index: u32) -> Reply<VhostUserVringState> {
        let result = self.try_get_vring_base(index);
        self.answer(result)
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Reply<()> {
        let result = self.try_set_kick(index, fd);
        self.answer(result)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Reply<()> {
        let result = self.try_set_call(index, fd);
        self.answer(result)
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Reply<()> {
        let result = self.try_set_error(index, fd);
        self.answer(result)
    }

    fn get_protocol_features(&mut self) -> Reply<VhostUserProtocolFeatures> {
        Ok(PROTOCOL_FEATURES)
    }

    fn set_protocol_features(&mut self, features: u64) -> Reply<()> {
        let unknown = features & !PROTOCOL_FEATURES.bits();
        let result = if unknown == 0 {
            self.protocol_features = features;
            Ok(())
        } else {
            Err(SessionError::ProtocolFeatures(unknown))
        };
        self.answer(result)
    }

    fn get_queue_num(&mut self) -> Reply<u64> {
        Ok(self.rings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Reply<()> {
        let result = self.ring_index(index).and_then(|index| {
            self.rings[index].enabled = enable;
            self.rings[index].changed();
            self.settle()
        });
        self.answer(result)
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Reply<Vec<u8>> {
        let result = config::read(&self.config(), offset, size);
        let result = result.ok_or(SessionError::OutsideConfig { offset, bytes: size });
        self.answer(result)
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Reply<()> {
        let result = self.try_set_config(offset, buf);
        self.answer(result)
    }

    fn set_backend_req_fd(&mut self, _backend: Backend) {
        // The crate has found it in order; what can be sent on it is ours to say.
        self.back_channel.accept();
    }

    fn get_max_mem_slots(&mut self) -> Reply<u64> {
        Ok(self.export.account.regions() as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        fd: File,
        _postcopy_listening: Option<bool>,
    ) -> Reply<Option<VhostUserMemoryRegionBase>> {
        let result = self.try_add_region(region, fd).map(|()| None);
        self.answer(result)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Reply<()> {
        let result = self.try_remove_region(region);
        self.answer(result)
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Reply<()> {
        not_offered()
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Reply<File> {
        not_offered()
    }

    fn get_inflight_fd(&mut self, inflight: &VhostUserInflight) -> Reply<(VhostUserInflight, File)> {
        let result = self.try_get_inflight(inflight);
        self.answer(result)
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Reply<()> {
        let result = self.try_set_inflight(inflight, file);
        self.answer(result)
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Reply<Option<File>> {
        not_offered()
    }

    fn check_device_state(&mut self) -> Reply<()> {
        not_offered()
    }

    fn get_shmem_config(&mut self) -> Reply<VhostUserShMemConfig> {
        not_offered()
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Reply<()> {
        not_offered()
    }
}
