//! The loop of one worker.

use std::collections::HashMap;
use std::fs::File;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use nvme_driver::QueuePair;
use rustix::event::epoll;

use super::mailbox::{InUse, Mail, Mailbox, MovingLane};
use super::{LaneId, QueueSlotId, WorkerEvent};
use crate::datapath::lane::Lane;
use crate::datapath::poll_group::PollGroup;
use crate::fault_point::fault_point;
use crate::log_limit::Kind;

/// With nothing in flight for this long a worker goes to sleep.
const IDLE_BEFORE_SLEEP: Duration = Duration::from_millis(2);
/// Turns without work before a worker on a crowded machine lets others run.
const SPINS_CROWDED: u32 = 16;
/// Turns without work before a worker lets others run where there is a core for every thread.
const SPINS: u32 = 8192;
/// Turns between two looks at the clock while there is work.
const TURNS_PER_LOOK: u32 = 1024;
/// How often the queue pairs' commands age, and lanes hear what time it is.
const TICK: Duration = Duration::from_millis(5);

/// The mailbox among the things that end a sleep; lanes are numbered from 1.
const MAILBOX: u64 = 0;

/// Where a lane is.
#[derive(Clone, Copy)]
struct LaneLocation {
    slot: usize,
    index: usize,
    /// Its kick eventfd is being watched while asleep.
    watched: bool,
}

/// Why a lane leaves its queue slot.
enum Departure {
    /// It stops; this is who waits for it.
    Stops(Sender<Lane>),
    /// It goes on in this queue slot.
    Moves(usize),
}

pub(super) struct Worker {
    number: usize,
    mailbox: Arc<Mailbox>,
    events: Sender<WorkerEvent>,
    epoll: OwnedFd,
    groups: Vec<Option<PollGroup>>,
    /// The identifiers of the groups' queue slots, by the index of the group.
    ids: Vec<QueueSlotId>,
    lanes: HashMap<LaneId, LaneLocation>,
    /// Lanes on their way out of their queue slot.
    departing: Vec<(LaneId, Departure)>,
    /// Set by the last mail: the worker ends when everything in flight is answered, at this time at the latest.
    ending: Option<Instant>,
    crowded: bool,
    turns: u32,
    idle: u32,
    idle_since: Option<Instant>,
    last_tick: Instant,
}

impl Worker {
    pub(super) fn new(
        number: usize,
        mailbox: Arc<Mailbox>,
        events: Sender<WorkerEvent>,
        crowded: bool,
    ) -> std::io::Result<Worker> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, mailbox.event(), epoll::EventData::new_u64(MAILBOX), epoll::EventFlags::IN)?;
        Ok(Worker {
            number,
            mailbox,
            events,
            epoll,
            groups: Vec::new(),
            ids: Vec::new(),
            lanes: HashMap::new(),
            departing: Vec::new(),
            ending: None,
            crowded,
            turns: 0,
            idle: 0,
            idle_since: None,
            last_tick: Instant::now(),
        })
    }

    /// Runs until the mailbox says that it is enough and everything in flight is answered. Returns the number of requests
    /// that were not answered in time.
    pub(super) fn run(&mut self) -> usize {
        loop {
            if self.mailbox.has_mail() {
                self.read_mail();
            }
            let mut moved = 0;
            for group in self.groups.iter_mut().flatten() {
                moved += group.poll();
            }
            if !self.departing.is_empty() {
                self.let_depart();
            }
            if let Some(deadline) = self.ending {
                let busy = self.groups.iter().flatten().any(PollGroup::busy);
                if !busy || Instant::now() >= deadline {
                    return self.end();
                }
            }
            if moved == 0 {
                self.idle();
                continue;
            }
            self.idle = 0;
            self.idle_since = None;
            self.turns = self.turns.wrapping_add(1);
            if self.turns.is_multiple_of(TURNS_PER_LOOK) {
                self.tick(Instant::now());
            }
        }
    }

    /// What has to be done every few milliseconds.
    fn tick(&mut self, now: Instant) {
        if now.duration_since(self.last_tick) < TICK {
            return;
        }
        self.last_tick = now;
        for (group, &slot) in self.groups.iter_mut().zip(&self.ids) {
            let Some(group) = group else { continue };
            let expired = group.tick(now);
            if expired != 0 {
                // Nobody listens any more when the program ends.
                let _ = self.events.send(WorkerEvent::Expired { slot, count: expired, at: now });
            }
        }
    }

    /// A turn in which nothing moved.
    fn idle(&mut self) {
        self.idle = self.idle.saturating_add(1);
        let spins = if self.crowded { SPINS_CROWDED } else { SPINS };
        if self.idle < spins && !self.idle.is_multiple_of(SPINS_CROWDED) {
            std::hint::spin_loop();
            return;
        }
        let now = Instant::now();
        self.tick(now);
        if self.groups.iter().flatten().any(PollGroup::busy) || !self.departing.is_empty() {
            self.idle_since = None;
        } else if now.duration_since(*self.idle_since.get_or_insert(now)) >= IDLE_BEFORE_SLEEP {
            self.sleep();
            return;
        }
        if self.idle >= spins {
            std::thread::yield_now();
        }
    }

    /// Asks every driver for notifications, looks at the rings once more, and sleeps until a notification or mail comes.
    fn sleep(&mut self) {
        let unwatched = self.lanes.values().any(|location| {
            let lane = self.groups[location.slot].as_mut().and_then(|group| group.lane_mut(location.index));
            lane.is_some_and(|lane| lane.needs_polling() || (lane.kick().is_some() && !location.watched))
        });
        if unwatched {
            std::thread::yield_now();
            return;
        }
        let mut work = false;
        for lane in self.groups.iter_mut().flatten().flat_map(PollGroup::lanes_mut) {
            work |= lane.prepare_sleep();
        }
        if !work && !self.mailbox.has_mail() {
            self.wait();
        }
        for lane in self.groups.iter_mut().flatten().flat_map(PollGroup::lanes_mut) {
            lane.awake();
        }
        self.idle = 0;
        self.idle_since = None;
    }

    fn wait(&mut self) {
        let mut space = [const { MaybeUninit::<epoll::Event>::uninit() }; 64];
        // An error (a signal) is a wake-up like any other: everything is looked at again.
        let Ok((woken, _)) = epoll::wait(&self.epoll, &mut space, None) else { return };
        for event in woken {
            let id = event.data.u64();
            if id == MAILBOX {
                self.mailbox.event().clear();
                continue;
            }
            let Some(location) = self.lanes.get(&LaneId(id)) else { continue };
            let Some(lane) = self.groups[location.slot].as_mut().and_then(|group| group.lane_mut(location.index))
            else {
                continue;
            };
            // The kick is not read: the front-end may have made that block, or have given it to another ring, too.
            lane.count_kick();
        }
    }

    fn watch(epoll: &OwnedFd, id: LaneId, lane: &Lane) -> bool {
        let Some(kick) = lane.kick() else { return false };
        // Edge-triggered: each kick is told once, whatever the counter says, and one from before counts as the first. So
        // nobody has to read it, which could block, and what stays readable for ever does not keep the worker awake.
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        match epoll::add(epoll, kick, epoll::EventData::new_u64(id.0), flags) {
            Ok(()) => true,
            Err(error) => {
                if let Some(more) = lane.log().admit(Kind::Ring) {
                    log::warn!(
                        "{}: cannot wait for the kick eventfd, polling without sleep: {error}{more}",
                        lane.name()
                    );
                }
                false
            }
        }
    }

    fn unwatch(epoll: &OwnedFd, lane: &Lane) {
        if let Some(kick) = lane.kick() {
            // It may never have been watched.
            let _ = epoll::delete(epoll, kick);
        }
    }

    fn lane_mut(&mut self, id: LaneId) -> Option<&mut Lane> {
        let location = self.lanes.get(&id)?;
        self.groups.get_mut(location.slot)?.as_mut()?.lane_mut(location.index)
    }

    fn read_mail(&mut self) {
        for mail in self.mailbox.take() {
            // A reply that nobody waits for any more is dropped.
            match mail {
                Mail::AddGroup { id, group } => {
                    // Indexes come from 0 on.
                    if self.groups.len() <= id.index {
                        self.groups.resize_with(id.index + 1, || None);
                        self.ids.resize(id.index + 1, id);
                    }
                    self.groups[id.index] = Some(group);
                    self.ids[id.index] = id;
                }
                Mail::TakeQueuePair { slot, reply } => {
                    let _ = reply.send(self.take_queue_pair(slot));
                }
                Mail::StartLane { id, slot, lane } => self.start(id, slot, *lane),
                Mail::StopLane { id, reply } => {
                    if let Some(lane) = self.lane_mut(id) {
                        lane.begin_stop();
                        self.departing.push((id, Departure::Stops(reply)));
                    }
                }
                Mail::MoveLane { id, to_slot } => {
                    if self.lane_mut(id).is_some_and(Lane::begin_move) {
                        // It goes where it was told last.
                        self.departing.retain(|(other, why)| *other != id || matches!(why, Departure::Stops(_)));
                        self.departing.push((id, Departure::Moves(to_slot)));
                    }
                }
                Mail::FoldLanes { slot, into_slot, elsewhere, reply } => {
                    let movers = self.take_out(slot);
                    let ids = movers.iter().map(|mover| mover.id).collect();
                    match elsewhere {
                        Some(mailbox) => mailbox.send(Mail::ArriveLanes { slot: into_slot, lanes: movers }),
                        None => self.take_in(into_slot, movers),
                    }
                    let _ = reply.send(ids);
                }
                Mail::ArriveLanes { slot, lanes } => self.take_in(slot, lanes),
                Mail::SetMemory { id, memory, reply } => {
                    if let Some(lane) = self.lane_mut(id) {
                        let _ = reply.send(lane.set_memory(memory));
                    }
                }
                Mail::SetDisk { id, disk, reply } => {
                    if let Some(lane) = self.lane_mut(id) {
                        lane.set_disk(disk);
                        let _ = reply.send(());
                    }
                }
                Mail::SetCall { id, call } => {
                    if let Some(lane) = self.lane_mut(id) {
                        fault_point!("worker panics", lane.name());
                        lane.set_call(call);
                    }
                }
                Mail::SetError { id, error } => {
                    if let Some(lane) = self.lane_mut(id) {
                        lane.set_error(error);
                    }
                }
                Mail::SetKick { id, kick } => self.set_kick(id, kick),
                Mail::OldestCommand { slot, reply } => {
                    let pair = self.group_mut(slot).and_then(|group| group.pair());
                    let _ = reply.send(pair.and_then(QueuePair::oldest));
                }
                Mail::PauseGroup { slot, seat, reply } => {
                    let _ = reply.send(self.group_mut(slot).map_or(0, |group| group.pause(seat)));
                }
                Mail::DetachDrive { slot, reply } => {
                    let _ = reply.send(self.group_mut(slot).and_then(PollGroup::detach_drive));
                }
                Mail::JudgeFailure { slot, suspicion, reply } => {
                    let _ = reply.send(self.group_mut(slot).is_some_and(|group| group.judge(suspicion)));
                }
                Mail::ExpireHold { slot } => self.group_mut(slot).into_iter().for_each(PollGroup::expire_hold),
                Mail::SetStopPolicy { id, policy } => {
                    self.lane_mut(id).into_iter().for_each(|lane| lane.set_stop_policy(policy));
                }
                Mail::EndMultiCommand { id } => self.lane_mut(id).into_iter().for_each(Lane::end_multi_command),
                Mail::UpdateNamespaces { slot, namespaces } => {
                    let lanes = self.group_mut(slot).into_iter().flat_map(PollGroup::lanes_mut);
                    lanes.for_each(|lane| lane.learn(&namespaces));
                }
                Mail::ReattachDrive { slot, resources, seat } => {
                    if let Some(group) = self.group_mut(slot) {
                        group.reattach_drive(resources, seat);
                    }
                }
                Mail::Shutdown { deadline } => {
                    self.groups.iter_mut().flatten().flat_map(PollGroup::lanes_mut).for_each(Lane::begin_stop);
                    self.ending = Some(deadline);
                }
            }
        }
    }

    fn group_mut(&mut self, slot: usize) -> Option<&mut PollGroup> {
        self.groups.get_mut(slot)?.as_mut()
    }

    fn take_queue_pair(&mut self, slot: usize) -> Result<Option<QueuePair>, InUse> {
        let Some(group) = self.groups.get_mut(slot) else { return Ok(None) };
        if group.as_ref().is_some_and(PollGroup::has_lanes) {
            return Err(InUse);
        }
        Ok(group.take().and_then(PollGroup::into_pair))
    }

    fn start(&mut self, id: LaneId, slot: usize, lane: Lane) {
        let Some(Some(group)) = self.groups.get_mut(slot) else {
            // The caller has a QueueSlotId whose queue pair was taken back meanwhile.
            log::error!(
                "{}: it does not run, as worker {} has no such queue slot: a defect of this program",
                lane.name(),
                self.number
            );
            lane.state().set_broken();
            return;
        };
        let watched = Self::watch(&self.epoll, id, &lane);
        let index = group.add(lane);
        self.lanes.insert(id, LaneLocation { slot, index, watched });
    }

    /// Takes all lanes out of a queue slot without a queue pair, with what waits there for the drive.
    fn take_out(&mut self, slot: usize) -> Vec<MovingLane> {
        // Those that were to go elsewhere do.
        self.let_depart();
        let Worker { lanes, groups, departing, epoll, .. } = self;
        let Some(group) = groups.get_mut(slot).and_then(Option::as_mut).filter(|group| group.pair().is_none()) else {
            return Vec::new();
        };
        let leaving = lanes.extract_if(|_, location| location.slot == slot);
        let movers = leaving.filter_map(|(id, location)| {
            let mut lane = group.remove(location.index)?;
            Self::unwatch(epoll, &lane);
            lane.end_move();
            let departures = departing.extract_if(.., |(other, _)| *other == id);
            let waiting = departures.filter_map(|(_, departure)| match departure {
                Departure::Stops(reply) => Some(reply),
                Departure::Moves(_) => None,
            });
            Some(MovingLane { id, lane, waiting: waiting.collect() })
        });
        movers.collect()
    }

    /// Puts lanes that were taken out of one queue slot into another.
    fn take_in(&mut self, slot: usize, movers: Vec<MovingLane>) {
        for MovingLane { id, lane, waiting } in movers {
            self.start(id, slot, lane);
            self.departing.extend(waiting.into_iter().map(|reply| (id, Departure::Stops(reply))));
        }
    }

    fn set_kick(&mut self, id: LaneId, kick: Option<File>) {
        let Some(location) = self.lanes.get_mut(&id) else { return };
        let group = self.groups.get_mut(location.slot).and_then(Option::as_mut);
        let Some(lane) = group.and_then(|group| group.lane_mut(location.index)) else { return };
        Self::unwatch(&self.epoll, lane);
        lane.set_kick(kick);
        location.watched = Self::watch(&self.epoll, id, lane);
    }

    /// Lanes whose requests have been answered leave their queue slots.
    fn let_depart(&mut self) {
        let Worker { departing, lanes, groups, epoll, .. } = self;
        departing.retain(|(id, departure)| {
            let Some(location) = lanes.get_mut(id) else { return false };
            let has_drive = |slot: usize| Some(groups.get(slot)?.as_ref()?.pair().is_some());
            let there = match departure {
                Departure::Moves(to) if *to != location.slot => has_drive(*to),
                _ => None,
            };
            let here = has_drive(location.slot);
            let from = groups.get_mut(location.slot).and_then(Option::as_mut);
            match departure {
                Departure::Stops(reply) => {
                    let Some(lane) = from.and_then(|group| group.remove_drained(location.index)) else { return true };
                    Self::unwatch(epoll, &lane);
                    lanes.remove(id);
                    // Whoever has given up waiting does not want the lane: it is dropped, drained.
                    let _ = reply.send(lane);
                    false
                }
                Departure::Moves(to) => {
                    let Some(lane) = from.and_then(|group| group.lane_mut(location.index)) else { return false };
                    if !lane.is_moving() {
                        // It has been told to stop.
                        return false;
                    }
                    if there.is_none() {
                        lane.end_move();
                        return false;
                    }
                    // The drive may be going, or coming back: soon both slots have it, or neither. Without it what waits goes along.
                    let holds = here == Some(true) && !lane.may_move();
                    if holds || there != here {
                        return true;
                    }
                    let lane = groups[location.slot].as_mut().and_then(|group| group.remove(location.index));
                    if let (Some(mut lane), Some(target)) = (lane, groups[*to].as_mut()) {
                        lane.end_move();
                        (location.slot, location.index) = (*to, target.add(lane));
                    }
                    false
                }
            }
        });
    }

    /// Ends all lanes; returns how many requests the drive has not answered.
    fn end(&mut self) -> usize {
        let mut left = 0;
        for lane in self.groups.iter_mut().flatten().flat_map(PollGroup::lanes_mut) {
            left += lane.in_flight();
            lane.end();
        }
        if left != 0 {
            self.leak();
        }
        left
    }

    /// Keeps queue pairs and guest memory as they are until the process ends: the drive may still write to both.
    fn leak(&mut self) {
        std::mem::forget(std::mem::take(&mut self.groups));
    }

    /// After a panic: nobody serves these lanes any more.
    pub(super) fn break_lanes(&mut self) {
        for lane in self.groups.iter_mut().flatten().flat_map(PollGroup::lanes_mut) {
            lane.state().set_broken();
        }
        self.leak();
    }
}

#[cfg(test)]
mod tests;
