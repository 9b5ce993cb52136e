//! Exported namespaces as the drive has them now: they may be resized, write-protected, detached and attached while front-ends use
//! them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use nvme_driver::{Controller, Error, Namespace};

use super::Drive;
use crate::blk::config::Offer;
use crate::blk::disk::{FlushPromise, Refused};
use crate::event::EventFd;

/// What is known of an exported namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// The namespace's geometry, limits and abilities when they were last read.
    pub namespace: Namespace,
    /// The largest limits that guests were told since it was exported.
    pub offer: Offer,
    /// Why it cannot be used now: it is inactive, or it is another namespace. `None`: it can be used.
    pub absent: Option<String>,
}

impl Known {
    /// Takes over what was read of the same namespace. An identifier that was not told this time is kept.
    fn adopt(&mut self, now: Namespace) {
        let before = &self.namespace;
        let namespace = Namespace {
            uuid: now.uuid.or(before.uuid),
            nguid: now.nguid.or(before.nguid),
            eui64: now.eui64.or(before.eui64),
            ..now
        };
        *self = Known { offer: self.offer.max(Offer::new(&namespace)), namespace, absent: None };
    }

    /// The namespace as lanes may use it. One that is absent has no blocks, so that every request is beyond its end.
    pub fn usable(&self) -> Namespace {
        match self.absent {
            None => self.namespace.clone(),
            Some(_) => Namespace { blocks: 0, ..self.namespace.clone() },
        }
    }
}

/// An exported namespace. Its drive's monitor and supervisor write it; the sessions of the export's front-ends read it.
pub struct ExportedNamespace {
    /// Namespace identifier.
    pub id: u32,
    /// What its flushes have promised, over all front-ends.
    pub flushes: Arc<FlushPromise>,
    /// Features that the drive announced and refused, over all front-ends.
    pub refused: Arc<Refused>,
    known: Mutex<Known>,
    listeners: Mutex<Vec<Weak<EventFd>>>,
}

impl ExportedNamespace {
    /// An active namespace.
    pub fn new(namespace: Namespace) -> ExportedNamespace {
        let id = namespace.id;
        let known = Mutex::new(Known { offer: Offer::new(&namespace), namespace, absent: None });
        ExportedNamespace { id, flushes: Arc::default(), refused: Arc::default(), known, listeners: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A copy of what is known of the namespace.
    pub fn known(&self) -> Known {
        self.lock().clone()
    }

    /// An eventfd that becomes readable whenever something else is known of the namespace, as long as the caller keeps it.
    ///
    /// # Errors
    /// No eventfd can be made.
    pub fn listen(&self) -> std::io::Result<Arc<EventFd>> {
        let event = Arc::new(EventFd::new()?);
        let mut listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.retain(|listener| listener.strong_count() > 0);
        listeners.push(Arc::downgrade(&event));
        Ok(event)
    }

    /// Notes that the drive has lost its write cache. To be called before any lane uses the drive again. `losses`: unsafe shutdowns so
    /// far. `drive`: its name, for the log.
    pub(super) fn lose_cache(&self, drive: &str, losses: Option<u64>) {
        if self.flushes.lose_cache(losses) {
            let id = self.id;
            log::error!(
                "{drive}: namespace {id}: writes that were not flushed are lost; the next flush fails, so that the guest knows"
            );
        }
    }

    /// Takes over what was read, and logs it if it is new. `drive`: its name.
    pub(super) fn learn(&self, drive: &str, found: NamespaceStatus) {
        let mut known = self.lock();
        let before = known.clone();
        let id = self.id;
        match found {
            NamespaceStatus::Active(namespace) => match difference(&known.namespace, &namespace) {
                Some(why) => known.absent = Some(why),
                None => known.adopt(namespace),
            },
            NamespaceStatus::Inactive => known.absent = Some("was deleted or detached from the controller".into()),
            NamespaceStatus::Unusable(why) => known.absent = Some(format!("has another format now: {why}")),
        }
        if *known == before {
            return;
        }
        let Known { namespace, absent, .. } = &*known;
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
        self.tell_listeners();
    }

    /// Wakes everybody who has called [`ExportedNamespace::listen`].
    pub(super) fn tell_listeners(&self) {
        let listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.iter().filter_map(Weak::upgrade).for_each(|event| event.notify());
    }
}

/// What the controller says about a namespace.
pub(super) enum NamespaceStatus {
    Active(Namespace),
    Inactive,
    /// Active, in a format that cannot be served, for this reason.
    Unusable(String),
}

impl NamespaceStatus {
    /// Reads it from the controller.
    ///
    /// # Errors
    /// The controller did not tell, which says nothing about the namespace.
    pub(super) fn read(controller: &Controller, id: u32) -> Result<NamespaceStatus, Error> {
        match controller.namespace(id) {
            Ok(namespace) => Ok(NamespaceStatus::Active(namespace)),
            Err(Error::NoSuchNamespace { .. }) => Ok(NamespaceStatus::Inactive),
            Err(Error::Format { reason, .. }) => Ok(NamespaceStatus::Unusable(reason)),
            Err(error) => Err(error),
        }
    }
}

/// The difference that makes a namespace another one than guests know, in words that follow "namespace 1"; `None`: it is the same.
///
/// Guests rely on its identifiers (as far as both are told), the size of its blocks, its abilities, and that no write stays in a cache
/// that they would not flush. Everything else is only a hint how to use the drive.
pub(super) fn difference(before: &Namespace, now: &Namespace) -> Option<String> {
    fn differ<T: PartialEq>(before: Option<T>, now: Option<T>) -> bool {
        before.zip(now).is_some_and(|(before, now)| before != now)
    }
    if differ(before.uuid, now.uuid) || differ(before.nguid, now.nguid) || differ(before.eui64, now.eui64) {
        return Some("is another one, by its unique identifiers".into());
    }
    if before.block_shift != now.block_shift {
        let (now, before) = (now.block_bytes(), before.block_bytes());
        return Some(format!("has blocks of {now} bytes now, and had blocks of {before}"));
    }
    if now.volatile_write_cache && !before.volatile_write_cache {
        return Some("has a write cache now, which guests were not told to flush".into());
    }
    let lost = |before: bool, now: bool, what| (before && !now).then_some(what);
    let lost =
        lost(before.discard, now.discard, "discard").or(lost(before.write_zeroes, now.write_zeroes, "write zeroes"));
    lost.map(|what| format!("does not support {what} any more, which guests were offered"))
}

impl Drive {
    /// Reads all exported namespaces again. True: all of them can be used.
    ///
    /// # Errors
    /// The controller did not tell about one of them. What is known of that one is kept; the others were read.
    pub(super) fn look_at_namespaces(&self, controller: &Controller) -> Result<bool, Error> {
        let exported = self.state().namespaces.clone();
        let mut failed = None;
        for namespace in &exported {
            match NamespaceStatus::read(controller, namespace.id) {
                Ok(found) => namespace.learn(&self.name, found),
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        failed.map_or_else(|| Ok(exported.iter().all(|namespace| namespace.lock().absent.is_none())), Err)
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;

    fn namespace() -> Namespace {
        crate::blk::request::tests::disk(9, 1000).namespace
    }

    #[test]
    fn a_namespace_is_the_same_as_long_as_guests_can_count_on_it() {
        let before = Namespace { nguid: Some([6; 16]), volatile_write_cache: false, ..namespace() };
        for now in [
            before.clone(),
            Namespace { blocks: 999, ..before.clone() },
            Namespace { read_only: !before.read_only, ..before.clone() },
            Namespace { boundary_blocks: 256, optimal_io_bytes: 1 << 20, ..before.clone() },
            Namespace { max_write_zeroes_blocks: 1, max_discard_ranges: 1, blocks: 999, ..before.clone() },
            Namespace { max_discard_range_blocks: 8, max_discard_blocks: 16, ..before.clone() },
            Namespace { write_zeroes_deallocates: !before.write_zeroes_deallocates, ..before.clone() },
            // A name more, or none just now: neither says that it is another.
            Namespace { uuid: Some([7; 16]), ..before.clone() },
            Namespace { nguid: None, ..before.clone() },
        ] {
            assert_eq!(difference(&before, &now), None, "{now:?}");
        }
        assert_eq!(difference(&Namespace { volatile_write_cache: true, ..before.clone() }, &before), None);
        for (now, says) in [
            (Namespace { nguid: Some([7; 16]), ..before.clone() }, "unique identifiers"),
            (
                Namespace { nguid: Some([7; 16]), uuid: Some([7; 16]), blocks: 999, ..before.clone() },
                "unique identifiers",
            ),
            (Namespace { block_shift: 12, ..before.clone() }, "blocks of 4096 bytes now, and had blocks of 512"),
            // Nobody would flush it.
            (Namespace { volatile_write_cache: true, ..before.clone() }, "write cache"),
            (Namespace { discard: false, ..before.clone() }, "discard"),
            (Namespace { write_zeroes: false, ..before.clone() }, "write zeroes"),
        ] {
            let text = difference(&before, &now).expect(says);
            assert!(text.contains(says), "{text:?} does not say {says:?}");
        }
    }

    #[test]
    fn what_it_was_called_and_what_was_offered_is_kept() {
        let named = Namespace { nguid: Some([6; 16]), ..namespace() };
        let exported = ExportedNamespace::new(named.clone());
        let offered = exported.known().offer;
        let smaller = Namespace { max_write_zeroes_blocks: 8, max_discard_ranges: 1, nguid: None, ..named.clone() };
        exported.learn("drive", NamespaceStatus::Active(smaller.clone()));
        let known = exported.known();
        assert_eq!(known.namespace, Namespace { nguid: named.nguid, ..smaller });
        assert_eq!((known.offer, known.absent), (offered, None), "a driver may have read it");
        exported.learn("drive", NamespaceStatus::Active(Namespace { nguid: Some([9; 16]), ..named }));
        assert!(exported.known().absent.is_some());
    }

    fn rings(event: &EventFd) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let rings = poll(&mut [PollFd::new(event, PollFlags::IN)], Some(&now)).unwrap() == 1;
        event.clear();
        rings
    }

    #[test]
    fn what_is_no_news_rings_nothing() {
        let exported = ExportedNamespace::new(namespace());
        let (event, other) = (exported.listen().unwrap(), exported.listen().unwrap());
        let there = |blocks| NamespaceStatus::Active(Namespace { blocks, ..namespace() });
        exported.learn("drive", there(1000));
        assert!(!rings(&event));
        exported.learn("drive", there(2000));
        assert!(rings(&event));
        assert!(rings(&other), "whoever listens hears it");
        drop(other);
        assert_eq!(exported.known().usable().blocks, 2000);
        exported.learn("drive", NamespaceStatus::Inactive);
        assert!(rings(&event));
        exported.learn("drive", NamespaceStatus::Inactive);
        assert!(!rings(&event));
        let known = exported.known();
        assert_eq!(
            (known.usable().blocks, known.namespace.blocks),
            (0, 2000),
            "nothing to work on, but its size is known"
        );
        // Another one in its place is not it.
        exported.learn("drive", NamespaceStatus::Active(Namespace { block_shift: 12, ..namespace() }));
        assert!(exported.known().absent.is_some_and(|why| why.contains("blocks of 4096")));
        assert!(rings(&event));
        exported.learn("drive", there(1500));
        assert!(rings(&event));
        let known = exported.known();
        assert_eq!((known.namespace.blocks, known.absent), (1500, None));
    }
}
