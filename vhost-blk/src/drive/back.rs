//! How a drive comes back: it is opened again, compared with what was there, and every place gets a queue pair on it.

use nvme_driver::{Controller, Namespace};

use super::{Condition, Drive, NoWay, NotOpened, Present};

/// Why a drive is not back.
#[derive(Debug)]
pub enum NotBack {
    /// There is nothing at its address.
    Nothing(String),
    /// There is something, but it does not work, or is not what was there.
    Unfit(String),
}

impl Drive {
    /// Tries to open the drive again. Everything that may take long is done before anybody is kept waiting.
    pub(super) fn come_back(&self) -> Result<(), NotBack> {
        let mut present = Present::open(&self.device_address, &self.options).map_err(|error| match error {
            NotOpened::Device(error) => NotBack::Nothing(error.to_string()),
            NotOpened::Controller(error) if error.is_gone() => NotBack::Nothing(error.to_string()),
            NotOpened::Controller(error) => NotBack::Unfit(error.to_string()),
        })?;
        let expected = self.state().namespaces.clone();
        self.compare(&present.controller, &expected).map_err(NotBack::Unfit)?;
        let mut state = self.state();
        if !matches!(state.condition, Condition::Away(_)) {
            return Ok(());
        }
        self.memory.attach(present.device.dma().clone()).map_err(|error| NotBack::Unfit(error.to_string()))?;
        let wanted = state.places.len();
        let ways = state.places.iter().map(|place| self.make_way(&present, place.entries));
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
        for (place, way) in state.places.iter().zip(ways) {
            self.pool.restore_queue_pair(place.id, way);
        }
        state.granted = present.controller.max_queue_pairs();
        present.since = std::time::Instant::now();
        state.condition = Condition::Present(present);
        log::warn!("{}: the drive is back; its disks work again", self.name);
        Ok(())
    }

    /// Is it the drive whose namespaces are exported? The error says what is different.
    fn compare(&self, controller: &Controller, expected: &[Namespace]) -> Result<(), String> {
        let identity = controller.identity();
        if (&identity.serial, &identity.model) != (&self.serial, &self.model) {
            return Err(format!(
                "another drive is in its place: {} {}, it was {} {}",
                identity.model, identity.serial, self.model, self.serial
            ));
        }
        for before in expected {
            let now = controller.namespace(before.id).map_err(|error| error.to_string())?;
            if let Some(what) = difference(before, &now) {
                return Err(format!("namespace {} {what}", before.id));
            }
        }
        Ok(())
    }
}

/// What makes a namespace another one than guests know. They were told its size, its block size and what it can do; what is
/// left is how the drive wants to be used, on which requests under way depend.
fn difference(before: &Namespace, now: &Namespace) -> Option<String> {
    let names = |namespace: &Namespace| (namespace.uuid, namespace.nguid, namespace.eui64);
    if names(before) != names(now) {
        return Some("is another one, by its unique identifiers".into());
    }
    if before.block_shift != now.block_shift {
        let (now, before) = (now.block_bytes(), before.block_bytes());
        return Some(format!("has blocks of {now} bytes, they had {before}"));
    }
    if before.blocks != now.blocks {
        return Some(format!("has {} blocks, it had {}", now.blocks, before.blocks));
    }
    (before != now).then(|| format!("has other limits or features: {now:?}, they were {before:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_the_same_only_if_nothing_guests_count_on_has_changed() {
        let before = crate::request::tests::disk(9, 1000).namespace;
        assert_eq!(difference(&before, &before.clone()), None);
        for (now, says) in [
            (Namespace { nguid: Some([7; 16]), ..before.clone() }, "unique identifiers"),
            (Namespace { eui64: Some([7; 8]), ..before.clone() }, "unique identifiers"),
            (Namespace { uuid: Some([7; 16]), ..before.clone() }, "unique identifiers"),
            (Namespace { block_shift: 12, ..before.clone() }, "blocks of 4096 bytes, they had 512"),
            (Namespace { blocks: 999, ..before.clone() }, "999 blocks, it had 1000"),
            // Nobody would flush it.
            (Namespace { volatile_write_cache: !before.volatile_write_cache, ..before.clone() }, "features"),
            (Namespace { read_only: !before.read_only, ..before.clone() }, "features"),
            (Namespace { max_write_zeroes_blocks: 1, ..before.clone() }, "limits"),
        ] {
            let text = difference(&before, &now).unwrap_or_default();
            assert!(text.contains(says), "{text:?} does not say {says:?}");
        }
    }
}
