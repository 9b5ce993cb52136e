//! The namespaces that are exported, as the drive has them now: they may be resized, write-protected, taken away and returned
//! while front-ends use them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use nvme_driver::{Controller, Error, Namespace};

use super::Drive;
use crate::bell::Bell;
use crate::disk::FlushPromise;

/// What is known of an exported namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// As it was last seen.
    pub namespace: Namespace,
    /// Why it cannot be used just now: it is not attached, or became another one.
    pub absent: Option<String>,
}

impl Known {
    /// What lanes may work on: nothing of a namespace that is absent. Without blocks every request is beyond the end.
    pub fn usable(&self) -> Namespace {
        match self.absent {
            None => self.namespace.clone(),
            Some(_) => Namespace { blocks: 0, ..self.namespace.clone() },
        }
    }
}

/// An exported namespace. The keeper of its drive writes it, the sessions of the export's front-ends read it.
pub struct ExportedNamespace {
    /// Its identifier.
    pub id: u32,
    /// What its flushes have promised, to whatever front-end.
    pub flushes: Arc<FlushPromise>,
    known: Mutex<Known>,
    listeners: Mutex<Vec<Weak<Bell>>>,
}

impl ExportedNamespace {
    /// One that is there.
    pub fn new(namespace: Namespace) -> ExportedNamespace {
        let id = namespace.id;
        let known = Mutex::new(Known { namespace, absent: None });
        ExportedNamespace { id, flushes: Arc::default(), known, listeners: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of it now.
    pub fn known(&self) -> Known {
        self.lock().clone()
    }

    /// A bell that rings when something else is known of it, as long as the caller has it.
    ///
    /// # Errors
    /// No eventfd can be made.
    pub fn listen(&self) -> std::io::Result<Arc<Bell>> {
        let bell = Arc::new(Bell::new()?);
        let mut listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.retain(|listener| listener.strong_count() > 0);
        listeners.push(Arc::downgrade(&bell));
        Ok(bell)
    }

    /// The drive has lost its cache, so often by now, and no lane has it yet. `drive`: its name.
    pub(super) fn lose_cache(&self, drive: &str, losses: Option<u64>) {
        if self.flushes.lose_cache(losses) {
            let id = self.id;
            log::error!(
                "{drive}: namespace {id}: writes that were not flushed are lost; the next flush fails, to say so"
            );
        }
    }

    /// Takes what was found over, and logs it if it is news. `drive`: its name.
    pub(super) fn learn(&self, drive: &str, found: Found) {
        let mut known = self.lock();
        let before = known.clone();
        let id = self.id;
        match found {
            Found::There(namespace) => match difference(&known.namespace, &namespace) {
                Difference::Another(why) => known.absent = Some(why),
                Difference::None | Difference::Resized => *known = Known { namespace, absent: None },
            },
            Found::Gone => known.absent = Some("was deleted or detached from the controller".into()),
            Found::Unusable(why) => known.absent = Some(format!("has another format now: {why}")),
        }
        if *known == before {
            return;
        }
        let Known { namespace, absent } = &*known;
        match (&before.absent, absent) {
            (_, Some(why)) => {
                log::error!(
                    "{drive}: namespace {id} {why}; its disk answers with I/O errors until it is back as it was"
                );
            }
            (Some(_), None) => log::warn!("{drive}: namespace {id} is back; its disk works again"),
            (None, None) => {}
        }
        let (was, is) = (before.namespace.blocks, namespace.blocks);
        if was != is {
            log::warn!(
                "{drive}: namespace {id} was resized from {was} to {is} blocks of {} bytes",
                namespace.block_bytes()
            );
        }
        match (before.namespace.read_only, namespace.read_only) {
            (false, true) => log::error!("{drive}: namespace {id} is write-protected; writes fail, reads go on"),
            (true, false) => log::warn!("{drive}: namespace {id} is no longer write-protected"),
            _ => {}
        }
        drop(known);
        let listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.iter().filter_map(Weak::upgrade).for_each(|bell| bell.ring());
    }
}

/// What a look at a namespace has found.
pub(super) enum Found {
    There(Namespace),
    Gone,
    /// It is there, in a format that cannot be served, for this reason.
    Unusable(String),
}

impl Found {
    /// The error says nothing about the namespace, only that nothing could be found out.
    pub(super) fn look(controller: &Controller, id: u32) -> Result<Found, Error> {
        match controller.namespace(id) {
            Ok(namespace) => Ok(Found::There(namespace)),
            Err(Error::NoSuchNamespace { .. }) => Ok(Found::Gone),
            Err(Error::Format { reason, .. }) => Ok(Found::Unusable(reason)),
            Err(error) => Err(error),
        }
    }
}

/// What became of a namespace.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Difference {
    None,
    /// Its size or its write protection, which guests can live with.
    Resized,
    /// It is another one than guests know, in words that go on after "namespace 1".
    Another(String),
}

/// What makes a namespace another one than guests know. They were told its block size and what it can do; what is left is how
/// the drive wants to be used, on which requests under way depend.
pub(super) fn difference(before: &Namespace, now: &Namespace) -> Difference {
    let names = |namespace: &Namespace| (namespace.uuid, namespace.nguid, namespace.eui64);
    if names(before) != names(now) {
        return Difference::Another("is another one, by its unique identifiers".into());
    }
    if before.block_shift != now.block_shift {
        let (now, before) = (now.block_bytes(), before.block_bytes());
        return Difference::Another(format!("has blocks of {now} bytes, they had {before}"));
    }
    if before == now {
        return Difference::None;
    }
    if *before == (Namespace { blocks: before.blocks, read_only: before.read_only, ..now.clone() }) {
        return Difference::Resized;
    }
    Difference::Another(format!("has other limits or features: {now:?}, they were {before:?}"))
}

impl Drive {
    /// Looks what became of the exported namespaces. True: all of them are there.
    pub(super) fn look_at_namespaces(&self, controller: &Controller) -> Result<bool, Error> {
        let exported = self.state().namespaces.clone();
        for namespace in &exported {
            namespace.learn(&self.name, Found::look(controller, namespace.id)?);
        }
        Ok(exported.iter().all(|namespace| namespace.lock().absent.is_none()))
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;

    fn namespace() -> Namespace {
        crate::request::tests::disk(9, 1000).namespace
    }

    #[test]
    fn a_namespace_is_the_same_only_if_nothing_guests_count_on_has_changed() {
        let before = namespace();
        assert_eq!(difference(&before, &before.clone()), Difference::None);
        for now in [
            Namespace { blocks: 999, ..before.clone() },
            Namespace { blocks: u64::MAX >> 10, ..before.clone() },
            Namespace { read_only: !before.read_only, ..before.clone() },
        ] {
            assert_eq!(difference(&before, &now), Difference::Resized);
        }
        for (now, says) in [
            (Namespace { nguid: Some([7; 16]), ..before.clone() }, "unique identifiers"),
            (Namespace { eui64: Some([7; 8]), ..before.clone() }, "unique identifiers"),
            (Namespace { uuid: Some([7; 16]), blocks: 999, ..before.clone() }, "unique identifiers"),
            (Namespace { block_shift: 12, ..before.clone() }, "blocks of 4096 bytes, they had 512"),
            // Nobody would flush it.
            (Namespace { volatile_write_cache: !before.volatile_write_cache, ..before.clone() }, "features"),
            (Namespace { max_write_zeroes_blocks: 1, blocks: 999, ..before.clone() }, "limits"),
        ] {
            let Difference::Another(text) = difference(&before, &now) else { panic!("{says}") };
            assert!(text.contains(says), "{text:?} does not say {says:?}");
        }
    }

    fn rings(bell: &Bell) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let rings = poll(&mut [PollFd::new(bell, PollFlags::IN)], Some(&now)).unwrap() == 1;
        bell.silence();
        rings
    }

    #[test]
    fn what_is_no_news_rings_nothing() {
        let exported = ExportedNamespace::new(namespace());
        let (bell, other) = (exported.listen().unwrap(), exported.listen().unwrap());
        let there = |blocks| Found::There(Namespace { blocks, ..namespace() });
        exported.learn("drive", there(1000));
        assert!(!rings(&bell));
        exported.learn("drive", there(2000));
        assert!(rings(&bell));
        assert!(rings(&other), "whoever listens hears it");
        drop(other);
        assert_eq!(exported.known().usable().blocks, 2000);
        exported.learn("drive", Found::Gone);
        assert!(rings(&bell));
        exported.learn("drive", Found::Gone);
        assert!(!rings(&bell));
        let known = exported.known();
        assert_eq!(
            (known.usable().blocks, known.namespace.blocks),
            (0, 2000),
            "nothing to work on, but its size is known"
        );
        // Another one in its place is not it.
        exported.learn("drive", Found::There(Namespace { uuid: Some([9; 16]), ..namespace() }));
        assert!(exported.known().absent.is_some_and(|why| why.contains("unique identifiers")));
        assert!(rings(&bell));
        exported.learn("drive", there(1500));
        assert!(rings(&bell));
        assert_eq!(exported.known(), Known { namespace: Namespace { blocks: 1500, ..namespace() }, absent: None });
    }
}
