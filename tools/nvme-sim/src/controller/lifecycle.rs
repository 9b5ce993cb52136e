//! Being enabled, reset, shut down, and asked by the simulator's owner.

use std::sync::atomic::Ordering;
use std::time::Instant;

use super::{Controller, State};
use crate::error::{Error, invalid};
use crate::features::Features;
use crate::namespace::Namespace;
use crate::queue::{CompletionQueue, SubmissionQueue};
use crate::registers::{self, CSTS_READY, CSTS_SHUTDOWN_COMPLETE, CSTS_SHUTDOWN_OCCURRING};
use crate::shared::{Counters, PowerLoss, Request};

impl Controller {
    /// Carries out what was asked by registers and requests.
    pub(super) fn attend(&mut self) {
        self.view.refresh();
        while let Some((request, answer)) = self.shared.next_request() {
            // The asker may have given up: then nobody wants to know.
            let _ = answer.send(self.answer(request));
        }
        if self.shared.faults.removed() {
            return;
        }
        let (wanted, cc) = {
            let mut registers = self.shared.registers();
            (std::mem::take(&mut registers.wanted), registers.configuration)
        };
        if wanted.subsystem_reset {
            log::info!("NVM subsystem reset");
            self.clear();
            let mut registers = self.shared.registers();
            registers.power_on();
            registers.status = registers::CSTS_SUBSYSTEM_RESET;
            return;
        }
        self.set_paused();
        self.reset_waits |= wanted.reset;
        if self.reset_waits && !self.faults.plan.never_reset {
            self.clear();
            self.shared.registers().controller_reset();
            self.set_paused();
        }
        if registers::enabled(cc) && self.state == State::Disabled && !self.reset_waits {
            self.start(cc);
        }
        self.shut_down(cc);
        if self.faults.plan.fatal && self.state != State::Failed && registers::enabled(cc) {
            self.fail("a fatal status was injected");
        }
    }

    /// CSTS.PP (3.1.3.6).
    fn set_paused(&mut self) {
        let paused = if self.faults.plan.paused { registers::CSTS_PAUSED } else { 0 };
        let mut registers = self.shared.registers();
        registers.status = registers.status & !registers::CSTS_PAUSED | paused;
    }

    /// Leaves nothing of queues and commands behind: a controller level reset (NVMe Base 2.0, 3.7.2).
    fn clear(&mut self) {
        self.reset_waits = false;
        self.state = State::Disabled;
        self.count_after_shutdown();
        self.after_shutdown = None;
        self.let_stray();
        self.sqs.fill(None);
        self.cqs.fill(None);
        self.live.clear();
        self.shadow = None;
        self.held.clear();
        self.late.clear();
        self.events.reset();
        self.refusals = 0;
        let config = self.shared.config.clone();
        self.features = Features::new(&config);
        self.apply_write_cache();
        self.clear_doorbells();
    }

    fn reset_all(&mut self) {
        self.clear();
        self.shared.registers().power_on();
    }

    fn clear_doorbells(&mut self) {
        for id in 0..self.sqs.len() as u16 {
            self.shared.clear_doorbell(id, false);
            self.shared.clear_doorbell(id, true);
        }
    }

    /// Makes the namespaces cache as the volatile write cache feature says.
    pub(crate) fn apply_write_cache(&mut self) {
        let on = self.shared.config.volatile_write_cache && self.features.write_cache();
        for namespace in self.namespaces.iter_mut().flatten() {
            if let Err(error) = namespace.set_write_cache(on) {
                log::error!("namespace {}: {error}; it works without a write cache", namespace.id);
            }
        }
    }

    /// CC.EN was set (3.5.1).
    fn start(&mut self, cc: u32) {
        let (aqa, asq, acq) = {
            let registers = self.shared.registers();
            (registers.admin_attributes, registers.admin_sq, registers.admin_cq)
        };
        if !self.shared.bus_master.load(Ordering::Relaxed) {
            log::warn!(
                "enabled while PCI bus mastering is off (command register bit 2): nothing is fetched until it is on"
            );
        }
        let page = 4096 << registers::memory_page_size(cc);
        let refuse = if cc >> 4 & 7 != 0 {
            Some(format!("CC.CSS is {}: only the NVM command set (0) is supported", cc >> 4 & 7))
        } else if registers::memory_page_size(cc) > registers::MPS_MAX {
            Some(format!("CC.MPS is {}: at most {}", registers::memory_page_size(cc), registers::MPS_MAX))
        } else if cc >> 11 & 7 != 0 {
            Some(format!("CC.AMS is {}: only round robin (0) is supported", cc >> 11 & 7))
        } else if aqa & 0xfff == 0 || aqa >> 16 == 0 {
            Some(format!("AQA is {aqa:#x}: admin queues have at least 2 entries"))
        } else if asq % page != 0 || acq % page != 0 {
            Some(format!("ASQ {asq:#x} or ACQ {acq:#x} is not aligned to the page size {page}"))
        } else {
            None
        };
        if let Some(why) = refuse {
            self.fail(&why);
            return;
        }
        self.pointers.page = page;
        self.clear_doorbells();
        self.sqs[0] = Some(SubmissionQueue::new(asq, (aqa & 0xfff) + 1, 0));
        let mut cq = CompletionQueue::new(acq, (aqa >> 16) + 1, Some(0));
        cq.users = 1;
        self.cqs[0] = Some(cq);
        self.live.push(0);
        self.state = State::Starting(Instant::now() + self.faults.plan.ready_delay);
    }

    pub(super) fn poll_start(&mut self, ready: Instant) -> bool {
        if self.faults.plan.never_ready || Instant::now() < ready {
            return false;
        }
        log::info!("ready");
        self.state = State::Ready;
        self.shared.registers().status |= CSTS_READY;
        true
    }

    /// CC.SHN was set (3.6.1, 3.6.2).
    fn shut_down(&mut self, cc: u32) {
        let kind = registers::shutdown_notification(cc);
        if kind == 0 || kind == 3 || self.shared.registers().status & registers::CSTS_SHUTDOWN == CSTS_SHUTDOWN_COMPLETE
        {
            return;
        }
        if self.faults.plan.shutdown_hangs {
            self.shared.registers().status |= CSTS_SHUTDOWN_OCCURRING;
            return;
        }
        // Abrupt shutdown may lose what was not flushed; this controller keeps it.
        self.namespaces.iter_mut().flatten().for_each(Namespace::flush);
        if self.state != State::Failed {
            self.state = State::ShutDown;
        }
        log::info!("shut down ({})", if kind == 1 { "normal" } else { "abrupt" });
        let mut registers = self.shared.registers();
        registers.status = registers.status & !registers::CSTS_SHUTDOWN | CSTS_SHUTDOWN_COMPLETE;
    }

    fn answer(&mut self, request: Request) -> Result<u64, Error> {
        match request {
            Request::RefreshDma => self.view.refresh(),
            Request::Reset => self.reset_all(),
            Request::FunctionReset => {
                self.reset_all();
                self.strays.clear();
            }
            Request::ShutdownTold => self.note_shutdown(),
            Request::Identify(patches) => {
                self.patches = patches;
                self.refresh_offers();
            }
            Request::PowerCut(loss) => return Ok(self.power_cut(loss)),
            Request::AddNamespace(config) => {
                let free = self.namespaces.iter().position(Option::is_none).unwrap_or(self.namespaces.len());
                let id = free as u32 + 1;
                if id > crate::identify::namespace_limit(&self.shared.config) {
                    return Err(invalid(format!("{free} namespaces are the most this controller can have")));
                }
                let namespace = Namespace::new(id, &config, &self.shared.config)?;
                if free == self.namespaces.len() {
                    self.namespaces.push(None);
                }
                self.namespaces[free] = Some(namespace);
                self.apply_write_cache();
                self.refresh_offers();
                self.namespace_changed(id);
                return Ok(id.into());
            }
            Request::RemoveNamespace(id) => {
                let place = self.namespaces.get_mut((id as usize).wrapping_sub(1));
                place.and_then(Option::take).ok_or_else(|| invalid(format!("there is no namespace {id}")))?;
                self.namespace_changed(id);
            }
            Request::Resize(id, bytes) => {
                let namespace = self.namespaces.get_mut((id as usize).wrapping_sub(1)).and_then(Option::as_mut);
                namespace.ok_or_else(|| invalid(format!("there is no namespace {id}")))?.resize(bytes)?;
                self.namespace_changed(id);
            }
            Request::Protect(id, read_only) => {
                let namespace = self.namespaces.get_mut((id as usize).wrapping_sub(1)).and_then(Option::as_mut);
                namespace.ok_or_else(|| invalid(format!("there is no namespace {id}")))?.read_only = read_only;
                self.namespace_changed(id);
            }
        }
        Ok(0)
    }

    fn namespace_changed(&mut self, id: u32) {
        self.events.namespace_changed(id);
        self.deliver_events();
    }

    fn power_cut(&mut self, loss: PowerLoss) -> u64 {
        let mut lost = 0;
        for namespace in self.namespaces.iter_mut().flatten() {
            let random = (loss == PowerLoss::Some).then_some(&mut self.power_random);
            lost += namespace.power_cut(random) as u64;
        }
        log::info!("power cut: {lost} unflushed blocks lost");
        Counters::add(&self.shared.counters.power_cuts, 1);
        self.clear();
        self.shared.registers().power_on();
        lost
    }

    /// Before a nap: what is too slow to do at every look.
    pub(super) fn before_nap(&mut self) {
        if self.state != State::Ready || !self.reaches_memory() {
            return;
        }
        for id in 0..self.cqs.len() as u16 {
            if self.cqs[usize::from(id)].is_some() {
                self.update_head(id);
            }
        }
        self.refuse_unknown_doorbells();
        self.publish_event_idx();
    }

    /// Doorbells of queues that do not exist must not be rung.
    fn refuse_unknown_doorbells(&mut self) {
        for id in 0..self.sqs.len() as u16 {
            let missing = [self.sqs[usize::from(id)].is_none(), self.cqs[usize::from(id)].is_none()];
            for (missing, completion) in missing.into_iter().zip([false, true]) {
                if missing && self.shared.doorbell(id, completion) != 0 {
                    log::warn!("queue {id}: doorbell of a queue that does not exist was rung");
                    self.shared.clear_doorbell(id, completion);
                    self.events.unknown_doorbell(id);
                    self.deliver_events();
                }
            }
        }
    }

    /// Asks the host to ring the real doorbells at its next entry. While the controller is awake it leaves EventIdx behind,
    /// so that the host does not ring.
    fn publish_event_idx(&mut self) {
        let Some(shadow) = self.shadow else { return };
        for n in 0..self.live.len() {
            let id = self.live[n];
            let Some(sq) = self.sqs[usize::from(id)].filter(|_| id != 0) else { continue };
            let at = shadow.event_idx + self.shared.doorbell_offset(id, false) as u64;
            if let Err(fault) = self.view.store_u32(at, sq.tail) {
                self.fail_dma("writing an EventIdx", fault);
                return;
            }
        }
        // Pairs with the fence between the host's shadow doorbell and its look at EventIdx: one of the two sees the other.
        std::sync::atomic::fence(Ordering::SeqCst);
    }
}
