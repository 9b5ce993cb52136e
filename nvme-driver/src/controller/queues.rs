//! I/O queue pairs: created, deleted, created again after a reset (NVMe Base 2.0, 5.4 to 5.7), and what they share.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};

use vfio::{DmaBuffer, DmaSlice, EventFd};

use super::admin::{Admin, AdminShadow, Patience};
use super::hardware::Hardware;
use super::{Controller, lock};
use crate::error::Doing;
use crate::queue_pair::{QueuePair, QueueSettings, ShadowDoorbell, ShadowDoorbells};
use crate::quirks::Quirk;
use crate::spec::command::admin;
use crate::{Command, Error};

/// How a queue pair is to be.
#[derive(Clone, Debug, Default)]
pub struct QueuePairOptions {
    /// Entries of each queue, at least 2; `None`: as in [`super::Options`]. Bounded by what the controller can do.
    pub entries: Option<u16>,
    /// With an interrupt vector of its own, so that completions can be waited for.
    pub interrupt: bool,
}

/// The queue identifiers the controller granted, and who has them.
pub(crate) struct Queues {
    /// `slots[0]` is queue identifier 1.
    slots: Vec<Option<QueueSlot>>,
    /// Vectors for queue pairs that are taken; `[0]` is vector 1.
    vectors: Vec<bool>,
    /// Memory the controller may still write to although its owner has given it up; freed by a reset.
    quarantine: Vec<DmaBuffer>,
}

/// One granted queue identifier in use: a queue pair, and what the controller knows of it.
struct QueueSlot {
    /// Dead when the queue pair was dropped without being deleted.
    lease: Weak<()>,
    /// Keeps the queues' memory until the controller has been told to forget it, whatever the owner does.
    memory: DmaBuffer,
    vector: Option<u16>,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// The controller knows nothing of it: not created yet, deleted, or forgotten in a reset.
    Unknown,
    /// Only the completion queue of the pair exists.
    CompletionOnly,
    /// Both queues of the pair exist.
    Created,
}

impl Queues {
    pub(super) fn new(granted: u16, vectors: usize) -> Queues {
        Queues {
            slots: std::iter::repeat_with(|| None).take(granted.into()).collect(),
            vectors: vec![false; vectors.saturating_sub(1)],
            quarantine: Vec::new(),
        }
    }

    pub(super) fn granted(&self) -> u16 {
        self.slots.len() as u16
    }

    /// After the controller was disabled: it has forgotten all queues, and touches no memory any more.
    pub(super) fn forget(&mut self) {
        for slot in self.slots.iter_mut() {
            if let Some(slot) = slot {
                slot.state = State::Unknown;
            }
            if slot.as_ref().is_some_and(|slot| slot.lease.strong_count() == 0) {
                if let Some(vector) = slot.as_ref().and_then(|slot| slot.vector) {
                    self.vectors[usize::from(vector) - 1] = false;
                }
                *slot = None;
            }
        }
        self.quarantine.clear();
    }

    /// After [`Queues::forget`]: takes over how many the controller grants now, more or fewer. False: a queue pair beyond them
    /// is still had by somebody, and nothing has changed.
    pub(super) fn regrant(&mut self, granted: u16) -> bool {
        let granted = usize::from(granted);
        let fits = self.slots.iter().skip(granted).all(Option::is_none);
        if fits {
            self.slots.resize_with(granted, || None);
        }
        fits
    }

    /// Keeps memory until the controller has been reset.
    pub(super) fn quarantine(&mut self, memory: DmaBuffer) {
        self.quarantine.push(memory);
    }

    /// The controller could not be stopped and may write to all of this for ever: it is not used again.
    pub(super) fn abandon(&self) {
        self.slots.iter().flatten().map(|slot| &slot.memory).chain(&self.quarantine).for_each(DmaBuffer::abandon);
    }

    fn take_vector(&mut self) -> Result<u16, Error> {
        if self.vectors.is_empty() {
            return Err(Error::Unsupported(
                "interrupts for queue pairs: the device has no vector for them, or it was opened without interrupts"
                    .into(),
            ));
        }
        let at = self.vectors.iter().position(|taken| !taken);
        let at = at.ok_or(Error::NoInterruptsLeft { vectors: self.vectors.len() as u16 })?;
        self.vectors[at] = true;
        Ok(at as u16 + 1)
    }

    fn give_back(&mut self, id: u16) {
        if let Some(slot) = self.slots[usize::from(id) - 1].take()
            && let Some(vector) = slot.vector
        {
            self.vectors[usize::from(vector) - 1] = false;
        }
    }
}

/// Shadow doorbells and event indexes, one page each (NVMe Base 2.0, 5.11 and B.5).
pub(crate) struct Shadow {
    values: DmaBuffer,
    events: DmaBuffer,
    stride: u8,
}

impl Shadow {
    /// Queue pairs, admin included, that one page has room for.
    pub(super) fn room(stride: u8) -> u16 {
        (4096 / (2 * (4u32 << stride))).min(u16::MAX.into()) as u16
    }

    pub(super) fn new(hardware: &Hardware) -> Result<Shadow, Error> {
        let page = || hardware.device.dma().allocate(4096).doing("allocate the shadow doorbells");
        Ok(Shadow { values: page()?, events: page()?, stride: hardware.capabilities.doorbell_stride() })
    }

    /// Tells the controller, which has been reset before, to use the pages from now on.
    pub(super) fn announce(&self, hardware: &Hardware, admin: &mut Admin, patience: Patience) -> Result<(), Error> {
        for page in [&self.values, &self.events] {
            page.write(0, &[0; 4096]).expect("it has 4096 bytes");
        }
        let command = Command::new(admin::DOORBELL_BUFFER_CONFIG, 0).with_prps(self.values.iova(), self.events.iova());
        admin.execute(hardware, command, patience, || "Doorbell Buffer Config".into())?;
        let word = |index| part(&self.values, index, self.stride);
        admin.use_shadow(AdminShadow { tail: word(0), head: word(1) });
        Ok(())
    }

    /// Never frees the memory of the shadow doorbells: a controller that could not be stopped may still write to it.
    pub(super) fn abandon(&self) {
        self.values.abandon();
        self.events.abandon();
    }

    fn doorbells(&self, id: u16) -> ShadowDoorbells {
        let doorbell = |index| ShadowDoorbell {
            value: part(&self.values, index, self.stride),
            event: part(&self.events, index, self.stride),
        };
        let index = 2 * usize::from(id);
        ShadowDoorbells { submission: doorbell(index), completion: doorbell(index + 1) }
    }
}

fn part(page: &DmaBuffer, index: usize, stride: u8) -> DmaSlice<AtomicU32> {
    page.slice(index * (4 << stride), 1).expect("no more queue pairs are granted than the page has room for")
}

impl Controller {
    /// Queue pairs the controller granted. They can be in use all at once. It may be another number after a
    /// [`Controller::reset`].
    pub fn max_queue_pairs(&self) -> u16 {
        lock(&self.inner.queues).granted()
    }

    /// Creates a queue pair. Give it back with [`Controller::delete_queue_pair`]; one that was dropped is deleted when its
    /// slot is needed.
    pub fn create_queue_pair(&self, options: QueuePairOptions) -> Result<QueuePair, Error> {
        let inner = &*self.inner;
        let limit = match inner.identity.quirks.has(Quirk::OneCommand) {
            true => 2,
            false => inner.hardware.capabilities.max_queue_entries().min(MAX_ENTRIES.into()) as u16,
        };
        let entries = options.entries.unwrap_or(inner.options.queue_entries).min(limit);
        if entries < 2 {
            return Err(Error::Invalid(format!("a queue pair of {entries} entries cannot be; ask for 2 or more")));
        }
        let mut queues = lock(&inner.queues);
        let id = match queues.slots.iter().position(Option::is_none) {
            Some(at) => at as u16 + 1,
            None => self.reclaim(&mut queues)?,
        };
        let vector = options.interrupt.then(|| queues.take_vector()).transpose()?;
        let result = self.make_pair(&mut queues, id, entries, vector);
        // The vector stays taken with the slot, which stays taken while the controller may know of the queues.
        if let Some(vector) = vector
            && queues.slots[usize::from(id) - 1].is_none()
        {
            queues.vectors[usize::from(vector) - 1] = false;
        }
        result
    }

    fn make_pair(&self, queues: &mut Queues, id: u16, entries: u16, vector: Option<u16>) -> Result<QueuePair, Error> {
        let inner = &*self.inner;
        let (submission, completion) = inner.hardware.doorbells(id)?;
        let interrupt = vector
            .map(|vector| inner.vectors[usize::from(vector)].try_clone())
            .transpose()
            .map_err(|error| Error::Invalid(format!("cannot duplicate an interrupt's eventfd: {error}")))?;
        let settings = QueueSettings {
            id,
            entries,
            max_transfer: inner.identity.max_transfer.unwrap_or(u32::MAX),
            // Relaxed: it guards nothing.
            sgl: inner.identity.sgl.filter(|_| !inner.sgl_refused.load(Ordering::Relaxed)),
            sgl_refused: inner.sgl_refused.clone(),
            timeout: inner.options.io_timeout,
            retry_delays: inner.identity.retry_delays,
            interrupt,
            shadow: inner.shadow.as_ref().map(|shadow| shadow.doorbells(id)),
        };
        let pair = QueuePair::new(inner.hardware.device.dma(), settings, submission, completion)
            .doing("allocate the memory of a queue pair")?;
        queues.slots[usize::from(id) - 1] = Some(QueueSlot {
            lease: Arc::downgrade(pair.lease()),
            memory: pair.memory().clone(),
            vector,
            state: State::Unknown,
        });
        let created = self.create_queues(queues, &pair);
        if created.is_err() && self.remove_queues(queues, id).is_ok() {
            queues.give_back(id);
        }
        created.map(|()| pair)
    }

    /// Creates a queue pair again, with its old identifier and memory, after [`Controller::reset`].
    ///
    /// Its outstanding requests have to be taken out before, with [`QueuePair::drain_after_reset`]. Where there are none, that
    /// need not be called: the queues begin anew here, so that the controller finds no command from before the reset in them.
    pub fn recreate_queue_pair(&self, pair: &mut QueuePair) -> Result<(), Error> {
        let mut queues = lock(&self.inner.queues);
        let slot = self.slot_of(&mut queues, pair)?;
        if slot.state != State::Unknown {
            return Err(Error::Invalid(format!(
                "queue pair {} exists; it is created again only after a reset",
                pair.id()
            )));
        }
        if pair.has_requests() {
            return Err(Error::Invalid(format!(
                "queue pair {} has requests from before the reset; take them out first",
                pair.id()
            )));
        }
        pair.drain_after_reset(|_| {});
        self.create_queues(&mut queues, pair).inspect_err(|_| {
            // So that it can be tried again; if this fails too, only a reset helps.
            if let Err(error) = self.remove_queues(&mut queues, pair.id()) {
                log::debug!("queue pair {} could not be taken back: {error}", pair.id());
            }
        })
    }

    /// Deletes a queue pair. The controller touches neither its queues nor the memory of its outstanding requests when this
    /// has succeeded; those requests get no completion.
    ///
    /// After an error the controller may still use that memory, until it has been reset; the queues' own is kept until then.
    pub fn delete_queue_pair(&self, pair: QueuePair) -> Result<(), Error> {
        let mut queues = lock(&self.inner.queues);
        self.slot_of(&mut queues, &pair)?;
        self.remove_queues(&mut queues, pair.id())?;
        queues.give_back(pair.id());
        Ok(())
    }

    /// The slot of a pair, if it is one of this controller's.
    fn slot_of<'a>(&self, queues: &'a mut Queues, pair: &QueuePair) -> Result<&'a mut QueueSlot, Error> {
        let lease = Arc::downgrade(pair.lease());
        let slot = usize::from(pair.id()).checked_sub(1).and_then(|at| queues.slots.get_mut(at)?.as_mut());
        slot.filter(|slot| slot.lease.ptr_eq(&lease)).ok_or_else(|| {
            Error::Invalid(format!(
                "queue pair {} does not belong to controller {}",
                pair.id(),
                self.inner.hardware.name
            ))
        })
    }

    /// Deletes a queue pair whose owner has dropped it, and returns its identifier.
    fn reclaim(&self, queues: &mut Queues) -> Result<u16, Error> {
        let dropped = |slot: &Option<QueueSlot>| slot.as_ref().is_some_and(|slot| slot.lease.strong_count() == 0);
        let Some(at) = queues.slots.iter().position(dropped) else {
            return Err(Error::NoQueuePairsLeft { granted: queues.granted() });
        };
        let id = at as u16 + 1;
        log::debug!("{}: queue pair {id} was dropped; deleting it", self.inner.hardware.name);
        self.remove_queues(queues, id)?;
        queues.give_back(id);
        Ok(id)
    }

    /// Create I/O Completion Queue, then Create I/O Submission Queue (NVMe Base 2.0, 5.4, 5.5). Both are contiguous.
    fn create_queues(&self, queues: &mut Queues, pair: &QueuePair) -> Result<(), Error> {
        const CONTIGUOUS: u32 = 1;
        const INTERRUPTS: u32 = 2;
        let inner = &*self.inner;
        let id = pair.id();
        let Some(slot) = &mut queues.slots[usize::from(id) - 1] else {
            return Err(Error::Invalid(format!("queue pair {id} has no slot")));
        };
        let size = u32::from(pair.entries() - 1) << 16 | u32::from(id);
        let flags = slot.vector.map_or(CONTIGUOUS, |vector| u32::from(vector) << 16 | INTERRUPTS | CONTIGUOUS);
        let mut admin = lock(&inner.admin);
        let completion =
            Command::new(admin::CREATE_CQ, 0).with_prps(pair.completion_iova(), 0).with_cdw10(size).with_cdw11(flags);
        admin.execute(&inner.hardware, completion, inner.options.needed(), || {
            format!("Create I/O Completion Queue {id} of {} entries", pair.entries())
        })?;
        slot.state = State::CompletionOnly;
        let submission = Command::new(admin::CREATE_SQ, 0)
            .with_prps(pair.submission_iova(), 0)
            .with_cdw10(size)
            .with_cdw11(u32::from(id) << 16 | CONTIGUOUS);
        admin.execute(&inner.hardware, submission, inner.options.needed(), || {
            format!("Create I/O Submission Queue {id} of {} entries", pair.entries())
        })?;
        slot.state = State::Created;
        Ok(())
    }

    /// Delete I/O Submission Queue, then Delete I/O Completion Queue (NVMe Base 2.0, 5.7, 5.6), as far as they exist.
    fn remove_queues(&self, queues: &mut Queues, id: u16) -> Result<(), Error> {
        let inner = &*self.inner;
        let Some(slot) = &mut queues.slots[usize::from(id) - 1] else { return Ok(()) };
        let mut admin = lock(&inner.admin);
        let mut delete = |opcode, name: &str| {
            let command = Command::new(opcode, 0).with_cdw10(id.into());
            admin.execute(&inner.hardware, command, inner.options.needed(), || format!("{name} {id}"))
        };
        if slot.state == State::Created {
            delete(admin::DELETE_SQ, "Delete I/O Submission Queue")?;
            slot.state = State::CompletionOnly;
        }
        if slot.state == State::CompletionOnly {
            delete(admin::DELETE_CQ, "Delete I/O Completion Queue")?;
            slot.state = State::Unknown;
        }
        Ok(())
    }
}

/// Queue pairs with an interrupt of their own: each costs an eventfd whether it is used or not, and who has so many polls.
const MAX_INTERRUPTS: u16 = 64;

/// Eventfds for the admin queue (vector 0) and `pairs` queue pairs, up to [`MAX_INTERRUPTS`], as far as the device has vectors,
/// enabled.
pub(crate) fn enable_vectors(hardware: &Hardware, pairs: u16) -> Result<Vec<EventFd>, Error> {
    let count = hardware.device.interrupt_vectors().min(u32::from(pairs.min(MAX_INTERRUPTS)) + 1);
    if count == 0 {
        return Ok(Vec::new());
    }
    let event = |_| {
        EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).map_err(|error| {
            Error::Invalid(format!(
                "cannot make {count} eventfds for interrupts: {error}; raise the limit of open files"
            ))
        })
    };
    let vectors = (0..count).map(event).collect::<Result<Vec<_>, _>>()?;
    let events: Vec<&EventFd> = vectors.iter().collect();
    hardware.device.enable_interrupts(&events).doing("enable MSI-X vectors")?;
    Ok(vectors)
}

/// More entries than this a queue pair does not use: each has a page for its data pointers.
const MAX_ENTRIES: u16 = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shadow_doorbells_of_many_queue_pairs_have_to_fit_into_a_page() {
        assert_eq!(Shadow::room(0), 512);
        assert_eq!(Shadow::room(4), 32);
        assert_eq!(Shadow::room(9), 1, "the admin queue only: of no use");
        assert_eq!(Shadow::room(15), 0);
    }
}
