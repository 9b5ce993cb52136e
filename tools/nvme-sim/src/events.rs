//! Asynchronous events (NVMe Base 2.0, 5.2), and what the log pages say about them.

use std::collections::VecDeque;

use crate::features::Features;
use crate::status::Status;

/// Asynchronous Event Requests that may wait; AERL is one less.
pub(crate) const EVENT_REQUESTS: usize = 8;
/// Entries of the error log; ELPE is one less.
pub(crate) const ERROR_ENTRIES: usize = 64;

pub(crate) const LOG_ERROR: u8 = 0x01;
pub(crate) const LOG_HEALTH: u8 = 0x02;
pub(crate) const LOG_FIRMWARE: u8 = 0x03;
pub(crate) const LOG_CHANGED_NAMESPACES: u8 = 0x04;

const TYPE_ERROR: u8 = 0;
const TYPE_HEALTH: u8 = 1;
const TYPE_NOTICE: u8 = 2;

/// Bits of Critical Warning (5.16.1.3) and of the feature that asks for their events (5.27.1.8), by the event they cause.
const SPARE_WARNING: u32 = 1 << 0;
const TEMPERATURE_WARNING: u32 = 1 << 1;
const RELIABILITY_WARNINGS: u32 = 0xfc;

/// An event that the host has not been told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Event {
    kind: u8,
    info: u8,
    page: u8,
}

/// An entry of the error log (5.16.1.2).
#[derive(Clone, Copy, Debug)]
pub(crate) struct ErrorEntry {
    pub count: u64,
    pub sq: u16,
    pub command: u16,
    pub status: Status,
    pub lba: u64,
    pub namespace: u32,
}

/// Events, the requests that wait for them, and the logs they lead to.
pub(crate) struct Events {
    waiting: VecDeque<u16>,
    pending: VecDeque<Event>,
    /// Event types not reported again until their log page was read, by type.
    masked: [bool; 8],
    pub errors: VecDeque<ErrorEntry>,
    pub error_count: u64,
    /// Changed namespaces since the list was read, ascending; more than the page holds: `None`.
    changed: Option<Vec<u32>>,
}

impl Events {
    pub(crate) fn new() -> Events {
        Events {
            waiting: VecDeque::new(),
            pending: VecDeque::new(),
            masked: [false; 8],
            errors: VecDeque::new(),
            error_count: 0,
            changed: Some(Vec::new()),
        }
    }

    /// A controller reset: requests and unreported events are gone, the error log stays.
    pub(crate) fn reset(&mut self) {
        self.waiting.clear();
        self.pending.clear();
        self.masked = [false; 8];
        self.changed = Some(Vec::new());
    }

    /// An Asynchronous Event Request; `most` may wait.
    pub(crate) fn wait(&mut self, id: u16, most: usize) -> Result<(), Status> {
        if self.waiting.len() >= most {
            return Err(Status::EVENT_LIMIT);
        }
        self.waiting.push_back(id);
        Ok(())
    }

    pub(crate) fn is_waiting(&self, id: u16) -> bool {
        self.waiting.contains(&id)
    }

    /// Takes a waiting request away (Abort).
    pub(crate) fn abort(&mut self, id: u16) -> bool {
        let before = self.waiting.len();
        self.waiting.retain(|waiting| *waiting != id);
        self.waiting.len() < before
    }

    fn add(&mut self, kind: u8, info: u8, page: u8) {
        let event = Event { kind, info, page };
        if !self.pending.contains(&event) {
            self.pending.push_back(event);
        }
    }

    /// The next request to complete, and dword 0 of its completion.
    pub(crate) fn next_delivery(&mut self, features: &Features) -> Option<(u16, u32)> {
        // Events the host does not want are dropped as they come.
        let wanted = |event: &Event| match (event.kind, event.info) {
            (TYPE_HEALTH, 1) => features.events() & TEMPERATURE_WARNING != 0,
            (TYPE_HEALTH, 2) => features.events() & SPARE_WARNING != 0,
            (TYPE_HEALTH, _) => features.events() & RELIABILITY_WARNINGS != 0,
            (TYPE_NOTICE, 0) => features.events() & 1 << 8 != 0,
            _ => true,
        };
        self.pending.retain(wanted);
        let at = self.pending.iter().position(|event| !self.masked[usize::from(event.kind)])?;
        let id = self.waiting.pop_front()?;
        let event = self.pending.remove(at)?;
        self.masked[usize::from(event.kind)] = true;
        Some((id, u32::from(event.kind) | u32::from(event.info) << 8 | u32::from(event.page) << 16))
    }

    /// The host has read a log page without keeping its event (RAE 0): events of its type are reported again.
    pub(crate) fn page_read(&mut self, page: u8) {
        let kind = match page {
            LOG_ERROR => TYPE_ERROR,
            LOG_HEALTH => TYPE_HEALTH,
            LOG_CHANGED_NAMESPACES => {
                self.changed = Some(Vec::new());
                TYPE_NOTICE
            }
            _ => return,
        };
        self.masked[usize::from(kind)] = false;
        self.pending.retain(|event| event.page != page);
    }

    pub(crate) fn namespace_changed(&mut self, id: u32) {
        if let Some(changed) = &mut self.changed {
            if let Err(at) = changed.binary_search(&id) {
                changed.insert(at, id);
            }
            if changed.len() > 1024 {
                self.changed = None;
            }
        }
        self.add(TYPE_NOTICE, 0, LOG_CHANGED_NAMESPACES);
    }

    /// The changed namespace list (5.16.1.5).
    pub(crate) fn changed_namespaces(&self) -> Vec<u8> {
        let ids = self.changed.as_deref().unwrap_or(&[0xffff_ffff]);
        let mut page: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        page.resize(4096, 0);
        page
    }

    pub(crate) fn temperature(&mut self) {
        self.add(TYPE_HEALTH, 1, LOG_HEALTH);
    }

    /// Bits of Critical Warning that have appeared.
    pub(crate) fn critical_warnings(&mut self, bits: u8) {
        let bits = u32::from(bits);
        for (info, about) in [(0, RELIABILITY_WARNINGS), (1, TEMPERATURE_WARNING), (2, SPARE_WARNING)] {
            if bits & about != 0 {
                self.add(TYPE_HEALTH, info, LOG_HEALTH);
            }
        }
    }

    /// A doorbell of a queue that does not exist was rung.
    pub(crate) fn unknown_doorbell(&mut self, queue: u16) {
        self.record_error(queue, 0xffff, Status::INVALID_QUEUE_ID, 0, 0);
        self.add(TYPE_ERROR, 0, LOG_ERROR);
    }

    /// A doorbell was rung with a value it cannot have.
    pub(crate) fn invalid_doorbell_value(&mut self, queue: u16) {
        self.record_error(queue, 0xffff, Status::INVALID_FIELD, 0, 0);
        self.add(TYPE_ERROR, 1, LOG_ERROR);
    }

    pub(crate) fn record_error(&mut self, sq: u16, command: u16, status: Status, lba: u64, namespace: u32) {
        self.error_count += 1;
        self.errors.truncate(ERROR_ENTRIES - 1);
        self.errors.push_front(ErrorEntry { count: self.error_count, sq, command, status, lba, namespace });
    }
}
