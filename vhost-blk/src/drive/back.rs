//! How a drive comes back: it is opened again, compared with what was there, and every place gets a queue pair on it.

use std::sync::Arc;
use std::time::Instant;

use nvme_driver::{Controller, Error};

use super::leases::NoWay;
use super::namespaces::{Difference, ExportedNamespace, Found, difference};
use super::{Condition, Drive, NotOpened, Present};
use crate::worker::Trial;

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
    /// Tries to open the drive again. Everything that may take long is done before anybody is kept waiting.
    pub(super) fn come_back(&self) -> Result<(), NotBack> {
        let earlier = match &self.state().condition {
            Condition::Away(away) => Some(away.addresses),
            _ => return Ok(()),
        };
        let mut present = Present::open(&self.device_address, &self.options, earlier)?;
        let expected = self.state().namespaces.clone();
        let found = self.compare(&present.controller, &expected).map_err(NotBack::Unfit)?;
        let mut state = self.state();
        let Condition::Away(away) = &state.condition else { return Ok(()) };
        let cache_lost = away.cache_lost || away.unsafe_shutdowns != present.unsafe_shutdowns;
        self.memory.attach(present.device.dma().clone()).map_err(|error| NotBack::Unfit(error.to_string()))?;
        let places = self.shares().places().to_vec();
        let wanted = places.len();
        let ways = places.iter().map(|place| self.make_way(&present, place.entries));
        let ways = match ways.collect::<Result<Vec<_>, _>>() {
            Ok(ways) => ways,
            Err(error) => {
                self.memory.detach();
                let granted = present.controller.max_queue_pairs();
                return Err(NotBack::Unfit(match error {
                    NoWay::NoneLeft => format!("it grants {granted} queue pairs, and {wanted} are in use"),
                    NoWay::Error(why) => why,
                }));
            }
        };
        for (namespace, found) in expected.iter().zip(found) {
            namespace.learn(&self.name, found);
        }
        if cache_lost {
            // Before any lane goes on: a flush of one is for the changes of all.
            state.namespaces.iter().for_each(|namespace| namespace.lose_cache(&self.name, present.losses()));
        }
        // From here on what is reported concerns this life.
        present.since = Instant::now();
        state.trial = state.last_tries.then(Arc::default);
        // Before any place goes on.
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
        Ok(())
    }

    /// Is it the drive whose namespaces are exported? Says what became of them; one may be missing, or have another size: the drive
    /// refuses by itself what does not fit. The error says what is different.
    fn compare(&self, controller: &Controller, expected: &[Arc<ExportedNamespace>]) -> Result<Vec<Found>, String> {
        let identity = controller.identity();
        if (&identity.serial, &identity.model) != (&self.serial, &self.model) {
            return Err(format!(
                "another drive is in its place: {} {}, it was {} {}",
                identity.model, identity.serial, self.model, self.serial
            ));
        }
        let look = |exported: &Arc<ExportedNamespace>| {
            let found = Found::look(controller, exported.id).map_err(|error| error.to_string())?;
            // Lanes would send what they hold to it before anybody could tell them.
            let another = match &found {
                Found::Gone => None,
                Found::Unusable(why) => Some(why.clone()),
                Found::There(now) => match difference(&exported.known().namespace, now) {
                    Difference::Another(why) => Some(why),
                    Difference::None | Difference::Resized => None,
                },
            };
            another.map_or(Ok(found), |why| Err(format!("namespace {} {why}", exported.id)))
        };
        expected.iter().map(look).collect()
    }
}
