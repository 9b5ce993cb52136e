//! Reattaching a drive: its controller is reset in place, or its device is opened again. The drive is compared with what it was, then
//! every queue slot gets a queue pair; if the controller grants fewer than before, there are fewer slots.

use std::sync::Arc;
use std::time::Instant;

use nvme_driver::{Controller, Error};

use super::detach::Detached;
use super::error::{Failure, OpenError};
use super::namespaces::NamespaceStatus;
use super::shares::Fold;
use super::{Attached, Condition, Drive, SOON};
use crate::datapath::trial::Trial;

impl Drive {
    /// Reattaches the drive: resets its controller in place if the device was kept open, else opens the device again.
    pub(super) fn reattach(&self) -> Result<(), OpenError> {
        let (earlier, kept) = match &mut self.state().condition {
            Condition::Detached(detached) => (Some(detached.addresses), detached.kept.take()),
            _ => return Ok(()),
        };
        let Some(kept) = kept else {
            return self.resume(Attached::open(&self.device_address, &self.name, &self.options, earlier)?);
        };
        // In place: the guests' memory is mapped where it was.
        let result = match kept.controller.reset() {
            Ok(()) => self.resume(Attached::of(kept.device.clone(), kept.controller.clone())),
            Err(error) => Err(OpenError::controller(&self.name, error)),
        };
        if result.is_err() {
            self.close(kept);
        }
        result
    }

    /// Whether the drive is detached and its device still open.
    pub(super) fn device_is_open(&self) -> bool {
        matches!(&self.state().condition, Condition::Detached(Detached { kept: Some(_), .. }))
    }

    /// Puts a controller that works into use. What may take long is done before the state is locked.
    fn resume(&self, mut attached: Attached) -> Result<(), OpenError> {
        let expected = self.state().namespaces.clone();
        self.is_same(&attached.controller)?;
        let found = expected.iter().map(|namespace| self.look_at(&mut attached, namespace.id));
        let found = found.collect::<Result<Vec<_>, _>>()?;
        let mut state = self.state();
        let Condition::Detached(detached) = &state.condition else { return Ok(()) };
        // That it cannot be asked says nothing: it is asked again (`settle_losses`).
        attached.unsure = detached.unsafe_shutdowns.is_some() && attached.unsafe_shutdowns.is_none();
        attached.unsafe_shutdowns = attached.unsafe_shutdowns.or(detached.unsafe_shutdowns);
        let lost_power = detached.unsafe_shutdowns.is_some() && detached.unsafe_shutdowns != attached.unsafe_shutdowns;
        let lived_on = detached.server.lived_on_as(&attached.device.server());
        let cache_lost = detached.cache_lost || lost_power || !lived_on;
        self.fold(&attached.controller);
        // The drive's own memory first: however much guests have, it can be had.
        let slots = self.shares().slots().to_vec();
        let queues = slots.iter().map(|slot| self.make_queue(&attached.device, &attached.controller, slot.entries));
        let queues = match queues.collect::<Result<Vec<_>, _>>() {
            Ok(queues) => queues,
            Err(error) => {
                return Err(OpenError::Unusable(Failure::Queue(error).into()));
            }
        };
        if !self.memory.is_attached() {
            let refused = self.memory.attach(attached.device.dma().clone());
            let refused = refused.map_err(|error| OpenError::Unusable(Failure::Memory(error).into()))?;
            for error in &refused {
                log::error!("{}: {error}; the session with this memory ends, all others go on", self.name);
            }
            if !refused.is_empty() {
                state.namespaces.iter().for_each(|namespace| namespace.tell_listeners());
            }
        }
        for (namespace, found) in expected.iter().zip(found) {
            found.into_iter().for_each(|found| namespace.learn(&self.name, found));
        }
        if cache_lost {
            // Before any lane goes on: a flush of one is for the changes of all.
            state.namespaces.iter().for_each(|namespace| namespace.lose_cache(&self.name, attached.losses()));
        }
        // From here on what is reported concerns this life.
        attached.since = Instant::now();
        state.trial = state.last_tries.then(Arc::default);
        // Before any slot goes on: what lanes hold is for the namespaces as they are now.
        let known: Arc<[_]> = state.namespaces.iter().map(|namespace| namespace.known().usable()).collect();
        slots.iter().for_each(|slot| self.pool.update_namespaces(slot.id, known.clone()));
        let seats: Vec<_> = slots.iter().map(|_| state.trial.as_ref().map(Trial::seat)).collect();
        for ((slot, queue), seat) in slots.iter().zip(queues).zip(seats) {
            match seat {
                Some(seat) => self.pool.reattach_on_trial(slot.id, queue, seat),
                None => self.pool.reattach_drive(slot.id, queue),
            }
        }
        state.granted = attached.controller.max_queue_pairs();
        state.condition = Condition::Attached(attached);
        log::warn!("{}: the drive is back; its disks work again", self.name);
        // It may grant more than before.
        self.monitor_event.notify();
        Ok(())
    }

    /// If the controller grants fewer queue pairs than there are slots, rings share them until there are more (`deal`).
    fn fold(&self, controller: &Controller) {
        let granted = controller.max_queue_pairs();
        // Who starts a lane at a slot has told the worker so before this, or finds another slot afterwards.
        let (wanted, folds) = {
            let mut shares = self.shares();
            (shares.slots().len(), shares.fold(granted))
        };
        if folds.is_empty() {
            return;
        }
        log::warn!(
            "{}: it grants {granted} queue pairs, and {wanted} were in use: rings share them from now on",
            self.name
        );
        for Fold { from, into } in folds {
            let folded = self.pool.fold(from, into).and_then(|()| self.pool.take_queue_pair(from));
            if let Err(error) = folded {
                log::error!("{}: cannot move rings to another queue pair: {error}", self.name);
            }
            self.slot_ids().remove(&from);
        }
    }

    /// Reads what has become of a namespace. `None`: the controller answers with an error, or not soon. That says nothing about the
    /// namespace; what is known of it is kept until the controller answers.
    fn look_at(&self, attached: &mut Attached, id: u32) -> Result<Option<NamespaceStatus>, OpenError> {
        // One that does not answer now would keep guests waiting for each question.
        if attached.silent {
            return Ok(None);
        }
        match NamespaceStatus::read(&attached.controller.monitor(SOON), id) {
            Ok(found) => Ok(Some(found)),
            Err(error @ (Error::Command { .. } | Error::Untrustworthy(_) | Error::Unanswered { .. })) => {
                attached.silent = matches!(error, Error::Unanswered { .. });
                log::warn!(
                    "{}: namespace {id} cannot be read, and is assumed to be unchanged; retrying: {error}",
                    self.name
                );
                Ok(None)
            }
            Err(error) => Err(OpenError::controller(&self.name, error)),
        }
    }

    /// Checks that this is the drive whose namespaces are exported, by model and serial number.
    fn is_same(&self, controller: &Controller) -> Result<(), OpenError> {
        let identity = controller.identity();
        if (&identity.serial, &identity.model) == (&self.serial, &self.model) {
            return Ok(());
        }
        Err(OpenError::Unusable(
            Failure::OtherDrive {
                found: format!("{} {}", identity.model, identity.serial),
                expected: format!("{} {}", self.model, self.serial),
            }
            .into(),
        ))
    }
}
