//! How a drive comes back: its controller is reset where it is, or the device is opened again; it is compared with what was there, and
//! every place gets a queue pair on it. There are fewer places then, if it grants fewer queue pairs.

use std::sync::Arc;
use std::time::Instant;

use nvme_driver::{Controller, Error};

use super::away::Away;
use super::leases::NoWay;
use super::namespaces::Found;
use super::shares::Fold;
use super::{Condition, Drive, NotOpened, Present, SOON};
use crate::datapath::trial::Trial;

/// Why a drive is not there, or not back.
#[derive(Debug)]
pub enum NotBack {
    /// There is nothing at its address.
    Nothing(String),
    /// It may not be had as this machine is set up: another driver or program has it, a permission or memory is missing.
    Withheld(String),
    /// There is something, but it does not work, or is not what was there.
    Unfit(String),
}

impl NotBack {
    /// Words it in another way.
    pub(super) fn told(self, tell: impl FnOnce(String) -> String) -> NotBack {
        match self {
            NotBack::Nothing(why) => NotBack::Nothing(tell(why)),
            NotBack::Withheld(why) => NotBack::Withheld(tell(why)),
            NotBack::Unfit(why) => NotBack::Unfit(tell(why)),
        }
    }
}

impl From<NotOpened> for NotBack {
    fn from(error: NotOpened) -> NotBack {
        use vfio::Error::{Kernel, Memory, NotUsable};
        let is_withheld = |error: &vfio::Error| matches!(error, NotUsable { .. } | Kernel { .. } | Memory { .. });
        match error {
            NotOpened::Device(error) if is_withheld(&error) => NotBack::Withheld(error.to_string()),
            NotOpened::Device(error) => NotBack::Nothing(error.to_string()),
            NotOpened::Controller(error) if error.is_gone() => NotBack::Nothing(error.to_string()),
            // Memory for its queues may be withheld, too.
            NotOpened::Controller(error) => match &error {
                Error::Device { source, .. } if is_withheld(source) => NotBack::Withheld(error.to_string()),
                _ => NotBack::Unfit(error.to_string()),
            },
        }
    }
}

impl Drive {
    /// Tries to get the drive back: its controller is brought up where it is, if the device was kept, else it is opened again.
    pub(super) fn come_back(&self) -> Result<(), NotBack> {
        let (earlier, kept) = match &mut self.state().condition {
            Condition::Away(away) => (Some(away.addresses), away.kept.take()),
            _ => return Ok(()),
        };
        let Some(kept) = kept else { return self.go_on(Present::open(&self.device_address, &self.options, earlier)?) };
        // In place: the guests' memory is mapped where it was.
        let result = match kept.controller.reset() {
            Ok(()) => self.go_on(Present::of(kept.device.clone(), kept.controller.clone())),
            Err(error) => Err(NotBack::from(NotOpened::Controller(error))),
        };
        if result.is_err() {
            self.close(kept);
        }
        result
    }

    /// Is it away, with its device still open?
    pub(super) fn is_kept(&self) -> bool {
        matches!(&self.state().condition, Condition::Away(Away { kept: Some(_), .. }))
    }

    /// The controller works. Everything that may take long is done before anybody is kept waiting.
    fn go_on(&self, mut present: Present) -> Result<(), NotBack> {
        let expected = self.state().namespaces.clone();
        self.is_same(&present.controller).map_err(NotBack::Unfit)?;
        let found = expected.iter().map(|namespace| self.look_at(&mut present, namespace.id));
        let found = found.collect::<Result<Vec<_>, _>>()?;
        let mut state = self.state();
        let Condition::Away(away) = &state.condition else { return Ok(()) };
        // That it cannot be asked says nothing: it is asked again (`settle_losses`).
        present.unsure = away.unsafe_shutdowns.is_some() && present.unsafe_shutdowns.is_none();
        present.unsafe_shutdowns = present.unsafe_shutdowns.or(away.unsafe_shutdowns);
        let lost_power = away.unsafe_shutdowns.is_some() && away.unsafe_shutdowns != present.unsafe_shutdowns;
        let lived_on = away.server.lived_on_as(&present.device.server());
        let cache_lost = away.cache_lost || lost_power || !lived_on;
        self.fold(&present.controller);
        // The drive's own memory first: however much guests have, it can be had.
        let places = self.shares().places().to_vec();
        let wanted = places.len();
        let ways = places.iter().map(|place| self.make_way(&present.device, &present.controller, place.entries));
        let ways = match ways.collect::<Result<Vec<_>, _>>() {
            Ok(ways) => ways,
            Err(error) => {
                let granted = present.controller.max_queue_pairs();
                return Err(NotBack::Unfit(match error {
                    NoWay::NoneLeft => format!("it grants {granted} queue pairs, and {wanted} are in use"),
                    NoWay::Error(why) => why,
                }));
            }
        };
        if !self.memory.is_attached() {
            let refused = self.memory.attach(present.device.dma().clone());
            let refused = refused.map_err(|error| NotBack::Unfit(error.to_string()))?;
            for error in &refused {
                log::error!("{}: {error}; the session that has it ends, all others go on", self.name);
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
            state.namespaces.iter().for_each(|namespace| namespace.lose_cache(&self.name, present.losses()));
        }
        // From here on what is reported concerns this life.
        present.since = Instant::now();
        state.trial = state.last_tries.then(Arc::default);
        // Before any place goes on: what lanes hold is for the namespaces as they are now.
        let known: Arc<[_]> = state.namespaces.iter().map(|namespace| namespace.known().usable()).collect();
        places.iter().for_each(|place| self.pool.learn(place.id, known.clone()));
        let seats: Vec<_> = places.iter().map(|_| state.trial.as_ref().map(Trial::seat)).collect();
        for ((place, way), seat) in places.iter().zip(ways).zip(seats) {
            match seat {
                Some(seat) => self.pool.restore_on_trial(place.id, way, seat),
                None => self.pool.restore_queue_pair(place.id, way),
            }
        }
        state.granted = present.controller.max_queue_pairs();
        state.condition = Condition::Present(present);
        log::warn!("{}: the drive is back; its disks work again", self.name);
        // It may grant more than before.
        self.chores.notify();
        Ok(())
    }

    /// If the controller grants fewer queue pairs than there are places, rings share them until there are more (`deal`).
    fn fold(&self, controller: &Controller) {
        let granted = controller.max_queue_pairs();
        // Who starts a lane at a place has told the worker so before this, or finds another place afterwards.
        let (wanted, folds) = {
            let mut shares = self.shares();
            (shares.places().len(), shares.fold(granted))
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
                log::error!("{}: {error}", self.name);
            }
            self.pairs().remove(&from);
        }
    }

    /// What has become of a namespace. `None`: the controller answers with an error, or not soon. That says nothing of the namespace,
    /// of which is kept what is known, until it can be asked.
    fn look_at(&self, present: &mut Present, id: u32) -> Result<Option<Found>, NotBack> {
        // One that does not answer now would keep guests waiting for each question.
        if present.silent {
            return Ok(None);
        }
        match Found::look(&present.controller.monitor(SOON), id) {
            Ok(found) => Ok(Some(found)),
            Err(error @ (Error::Command { .. } | Error::Untrustworthy(_) | Error::Unanswered { .. })) => {
                present.silent = matches!(error, Error::Unanswered { .. });
                log::warn!("{}: namespace {id} is taken to be as it was, and asked for again: {error}", self.name);
                Ok(None)
            }
            Err(error) => Err(NotBack::from(NotOpened::Controller(error))),
        }
    }

    /// Is it the drive whose namespaces are exported? The error says what is there instead.
    fn is_same(&self, controller: &Controller) -> Result<(), String> {
        let identity = controller.identity();
        if (&identity.serial, &identity.model) == (&self.serial, &self.model) {
            return Ok(());
        }
        Err(format!(
            "another drive is in its place: {} {}, it was {} {}",
            identity.model, identity.serial, self.model, self.serial
        ))
    }
}
