//! The client: a deep queue of mixed requests on several rings, every answer checked.

use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use e2e::Blocks;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::Failure;
use crate::front_end::{DiskInfo, FrontEnd, Inflight, RingSetup};
use crate::memory::Memory;
use crate::random::Random;
use crate::request::{MAX_BYTES, Outcome, Request, SLOT_DATA, SLOT_LOW, Slot};
use crate::ring::{Driver, Parts, Used};

/// Requests in flight on one ring at most.
pub(crate) const DEPTH: u16 = 48;
/// A notification that has not come so long after the answer was there will not come.
const NOTIFIED: Duration = Duration::from_secs(3);
/// How long the client sleeps when there is nothing to do.
const NAP: Duration = Duration::from_micros(50);
/// How much is said about what went wrong; all of it is counted.
const REPORTED: u64 = 10;

/// What went wrong.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Wrong {
    pub errors: u64,
    pub lost: u64,
    pub duplicates: u64,
    /// It is counted only.
    pub quiet: bool,
}

impl Wrong {
    pub(crate) fn total(&self) -> u64 {
        self.errors + self.lost + self.duplicates
    }

    pub(crate) fn error(&mut self, text: &str) {
        self.errors += 1;
        self.say("error", text);
    }

    fn lost(&mut self, text: &str) {
        self.lost += 1;
        self.say("lost", text);
    }

    fn duplicate(&mut self, text: &str) {
        self.duplicates += 1;
        self.say("duplicate", text);
    }

    fn say(&self, what: &str, text: &str) {
        if !self.quiet && self.total() <= REPORTED {
            eprintln!("torture: {what}: {text}");
        }
    }
}

struct Ring {
    driver: Driver,
    kick: EventFd,
    call: EventFd,
    slots: Vec<Slot>,
    /// By slot.
    requests: Vec<Option<Request>>,
    free: Vec<usize>,
    /// By the chain's name.
    slot_of: Vec<Option<usize>>,
    /// Since when the ring is looked at only after a notification.
    waiting: Option<Instant>,
    /// Requests to be in flight for the time being; 0: until none is.
    goal: usize,
    until_new_goal: u64,
}

impl Ring {
    fn setup(&self) -> RingSetup<'_> {
        RingSetup { driver: &self.driver, kick: &self.kick, call: &self.call }
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

/// What the client does besides checking answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    Random,
    /// Nothing new.
    Drain,
    /// Reads the disk from this block on.
    ReadBack(u64),
}

pub(crate) struct Client {
    memory: Memory,
    packed: bool,
    rings: Vec<Ring>,
    random: Random,
    disk: Option<Blocks>,
    info: Option<DiskInfo>,
    id: Option<Vec<u8>>,
    inflight: Option<Inflight>,
    /// The drive has lost what was not flushed, and no flush has said so yet.
    untold: bool,
    /// The requests made when a flush said so: others of them may say so, too.
    told: u64,
    epoll: Epoll,
    work: Work,
    front_end: Option<FrontEnd>,
    /// Since when a back-end runs the rings.
    connected: Instant,
    /// Requests made so far.
    pub requests: u64,
    /// Requests answered so far.
    pub answered: u64,
    /// The longest that a request had to wait since this was set to zero.
    pub longest: Duration,
    pub wrong: Wrong,
}

impl Client {
    pub(crate) fn new(seed: u64, packed: bool, rings: u16) -> Result<Client, Failure> {
        let mut random = Random::new(seed);
        let sizes: Vec<u16> = (0..rings).map(|_| Self::size(&mut random, packed)).collect();
        let slots = u64::from(rings) * u64::from(DEPTH);
        let low = sizes.iter().map(|size| Parts::bytes(*size)).sum::<u64>();
        let memory = Memory::new(low + slots * SLOT_LOW, slots * SLOT_DATA)?;
        let stand = |error: std::io::Error| Failure::Stand(format!("an eventfd: {error}"));
        let epoll = Epoll::new().map_err(stand)?;
        let (mut at, mut made) = (0, Vec::new());
        for (index, size) in (0..).zip(sizes) {
            let event = || EventFd::new(EFD_NONBLOCK).map_err(stand);
            let (kick, call) = (event()?, event()?);
            let interest = EpollEvent::new(EventSet::IN, index);
            epoll.ctl(ControlOperation::Add, call.as_raw_fd(), interest).map_err(stand)?;
            let first = index * u64::from(DEPTH);
            let driver = Driver::new(packed, Parts::at(at, size), random.one_in(2));
            driver.ask_for_calls(&memory, false);
            made.push(Ring {
                driver,
                kick,
                call,
                slots: (0..DEPTH.into())
                    .map(|slot| Slot::new(low, first + slot))
                    .inspect(|slot| slot.wipe(&memory))
                    .collect(),
                requests: (0..DEPTH).map(|_| None).collect(),
                free: (0..DEPTH.into()).collect(),
                slot_of: vec![None; size.into()],
                waiting: None,
                goal: DEPTH.into(),
                until_new_goal: 200,
            });
            at += Parts::bytes(size);
        }
        Ok(Client {
            memory,
            packed,
            rings: made,
            random,
            disk: None,
            info: None,
            id: None,
            inflight: None,
            untold: false,
            told: 0,
            epoll,
            work: Work::Random,
            front_end: None,
            connected: Instant::now(),
            requests: 0,
            answered: 0,
            longest: Duration::ZERO,
            wrong: Wrong::default(),
        })
    }

    /// A packed ring may have any number of entries.
    fn size(random: &mut Random, packed: bool) -> u16 {
        match (packed, random.below(3)) {
            (true, 0) => 100 + random.below(50) as u16,
            (_, 1) => 128,
            _ => 256,
        }
    }

    /// Tries to reach a back-end and to have it run the rings. False: nobody listens.
    pub(crate) fn connect(&mut self, socket: &std::path::Path) -> std::io::Result<bool> {
        let Some(mut front_end) = FrontEnd::connect(socket)? else { return Ok(false) };
        let rings: Vec<_> = self.rings.iter().map(Ring::setup).collect();
        let info = front_end.start(&self.memory, self.packed, &rings, &mut self.inflight)?;
        let known = *self.info.get_or_insert(info);
        if known != info {
            return Err(std::io::Error::other(format!("the disk was {known:?} and is {info:?}")));
        }
        let blocks = (info.sectors * 512).min(crate::rounds::MIB << 20) / u64::from(info.block_bytes);
        self.disk.get_or_insert_with(|| Blocks::new(blocks as usize, info.block_bytes as usize));
        self.connected = Instant::now();
        self.front_end = Some(front_end);
        Ok(true)
    }

    /// The drive has lost its power, and what was not flushed, while no back-end runs the rings: what the last one has
    /// answered has to be taken before.
    pub(crate) fn power_cut(&mut self) {
        if let Some(disk) = &mut self.disk {
            disk.power_cut();
            self.untold = true;
        }
    }

    /// How often a block was found to have lost what was answered and not flushed.
    pub(crate) fn went_back(&self) -> u64 {
        self.disk.as_ref().map_or(0, Blocks::went_back)
    }

    /// Takes all answers that are there, whether there was a notification or not.
    pub(crate) fn collect_all(&mut self) {
        (0..self.rings.len()).for_each(|index| self.collect(index));
    }

    /// The back-end is dead.
    pub(crate) fn disconnect(&mut self) {
        self.front_end = None;
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.front_end.is_some()
    }

    /// Whether the back-end has left.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.front_end.as_ref().is_some_and(FrontEnd::has_ended)
    }

    pub(crate) fn tracks_inflight(&self) -> bool {
        self.inflight.is_some()
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.rings.iter().map(Ring::in_flight).sum()
    }

    /// The oldest request that has no answer.
    pub(crate) fn oldest(&self) -> Option<&Request> {
        self.rings.iter().flat_map(|ring| ring.requests.iter().flatten()).min_by_key(|request| request.number)
    }

    /// No new requests from now on.
    pub(crate) fn drain(&mut self) {
        self.work = Work::Drain;
    }

    /// Reads the whole disk from now on; what is in flight has to end first.
    pub(crate) fn read_back(&mut self) {
        self.work = Work::ReadBack(0);
    }

    /// Whether there is nothing left to do.
    pub(crate) fn is_done(&self) -> bool {
        let blocks = self.disk.as_ref().map_or(0, Blocks::count);
        self.in_flight() == 0 && (self.work == Work::Drain || self.work == Work::ReadBack(blocks))
    }

    /// All that is in flight is given up; returns how many requests that are.
    pub(crate) fn give_up(&mut self) {
        for request in self.rings.iter_mut().flat_map(|ring| ring.requests.iter_mut()).filter_map(Option::take) {
            let age = request.since.elapsed();
            let text = format!(
                "request {} ({:?} of {:?}) has no answer after {age:?}",
                request.number, request.kind, request.blocks
            );
            self.wrong.lost(&text);
        }
    }

    /// Looks for what was written into memory that no request has, now or at that time.
    pub(crate) fn check_idle(&mut self) {
        let idle = self.rings.iter().flat_map(|ring| ring.free.iter().map(|slot| &ring.slots[*slot]));
        for text in idle.filter_map(|slot| slot.disturbed(&self.memory)) {
            self.wrong.error(&text);
        }
    }

    /// Looks at every ring once: takes answers, makes new requests. Returns how many answers there were.
    pub(crate) fn turn(&mut self) -> u64 {
        let before = self.answered;
        for index in 0..self.rings.len() {
            if self.may_look(index) {
                self.collect(index);
            }
            self.submit(index);
            self.wait_for_call(index);
        }
        self.answered - before
    }

    /// Sleeps until a ring notifies, or for a moment.
    pub(crate) fn nap(&self) {
        if self.rings.iter().all(|ring| ring.waiting.is_some()) {
            // Interrupted or not: the rings are looked at again anyway.
            let _ = self.epoll.wait(1, &mut [EpollEvent::default()]);
        } else {
            std::thread::sleep(NAP);
        }
    }

    fn may_look(&mut self, index: usize) -> bool {
        let ring = &mut self.rings[index];
        let called = ring.call.read().is_ok();
        let Some(since) = ring.waiting else { return true };
        if called {
            ring.waiting = None;
        } else if since.max(self.connected).elapsed() > NOTIFIED && ring.driver.has_used(&self.memory) {
            self.wrong.error(&format!("ring {index}: an answer is there, and no notification came"));
            ring.waiting = None;
        }
        if ring.waiting.is_none() {
            ring.driver.ask_for_calls(&self.memory, false);
        }
        ring.waiting.is_none()
    }

    fn collect(&mut self, index: usize) {
        let Some(disk) = &mut self.disk else { return };
        let ring = &mut self.rings[index];
        // A device that has lost its way may have an answer to give for ever.
        for _ in 0..ring.slot_of.len() {
            let (id, written) = match ring.driver.used(&self.memory) {
                None => break,
                Some(Used::Chain { id, bytes }) => (id, bytes),
                Some(Used::Stranger { id }) => {
                    self.wrong.duplicate(&format!("ring {index}: chain {id} is given back, and is not in flight"));
                    continue;
                }
            };
            let slot = ring.slot_of[usize::from(id)].take().expect("every chain in flight has a slot");
            let request = ring.requests[slot].take().expect("the slot of a chain in flight has a request");
            ring.free.push(slot);
            self.answered += 1;
            self.longest = self.longest.max(request.since.elapsed());
            match request.complete(&self.memory, disk, written, &mut self.id) {
                Outcome::Right => {}
                Outcome::NotFlushed if std::mem::take(&mut self.untold) => self.told = self.requests,
                Outcome::NotFlushed if request.number < self.told => {}
                Outcome::NotFlushed => self.wrong.error(&format!("request {}: a flush has failed", request.number)),
                Outcome::Error(text) => self.wrong.error(&text),
                Outcome::Lost(texts) => texts.iter().for_each(|text| self.wrong.lost(text)),
            }
            request.wipe(&self.memory);
        }
    }

    fn submit(&mut self, index: usize) {
        let (Some(disk), Some(info)) = (&mut self.disk, &self.info) else { return };
        let ring = &mut self.rings[index];
        if ring.goal > 0 && ring.until_new_goal == 0 || ring.goal == 0 && ring.in_flight() == 0 {
            ring.until_new_goal = self.random.between(50..=400);
            let depth = u64::from(DEPTH);
            ring.goal = if self.random.one_in(5) { 0 } else { self.random.between(depth / 3..=depth) as usize };
        }
        let goal = if self.work == Work::Random { ring.goal } else { DEPTH.into() };
        let mut added = false;
        while ring.in_flight() < goal {
            let Some(&slot) = ring.free.last() else { break };
            let place = ring.slots[slot];
            let mut request = match &mut self.work {
                Work::Drain => break,
                Work::Random => match Request::draw(&mut self.random, disk, info, place, self.requests) {
                    Some(request) => request,
                    None => break,
                },
                Work::ReadBack(next) => {
                    let Some(blocks) = disk.claim(*next, MAX_BYTES / disk.block_bytes() as u64) else { break };
                    *next = blocks.end;
                    Request::read(&mut self.random, disk, place, self.requests, blocks)
                }
            };
            if let Some(text) = request.disturbed(&self.memory) {
                self.wrong.error(&text);
            }
            let (chain, table) = request.prepare(&self.memory, disk);
            let indirect = self.random.one_in(2) || chain.len() > usize::from(ring.driver.parts().size) / 2;
            let Some(id) = ring.driver.add(&self.memory, &chain, indirect.then_some(table)) else {
                request.blocks.iter().for_each(|blocks| disk.release(blocks));
                request.wipe(&self.memory);
                // What was to be read next still is.
                if let Work::ReadBack(next) = &mut self.work {
                    *next = request.blocks[0].start;
                }
                break;
            };
            ring.slot_of[usize::from(id)] = Some(slot);
            ring.requests[slot] = Some(request);
            ring.free.pop();
            ring.until_new_goal = ring.until_new_goal.saturating_sub(1);
            self.requests += 1;
            added = true;
        }
        if added && ring.driver.kick_wanted(&self.memory) {
            // Full: the device has not looked at it for very long, and will.
            let _ = ring.kick.write(1);
        }
    }

    /// Half of the time a ring that has nothing to look at is left alone until it notifies.
    fn wait_for_call(&mut self, index: usize) {
        let ring = &mut self.rings[index];
        if ring.waiting.is_some() || ring.in_flight() == 0 || !self.random.one_in(2) {
            return;
        }
        ring.driver.ask_for_calls(&self.memory, true);
        match ring.driver.has_used(&self.memory) {
            true => ring.driver.ask_for_calls(&self.memory, false),
            false => ring.waiting = Some(Instant::now()),
        }
    }
}
