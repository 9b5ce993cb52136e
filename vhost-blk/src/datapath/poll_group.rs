//! A queue pair and the lanes that share it.

use std::time::Instant;

use nvme_driver::{BouncePool, OWNER_SHIFT, QueuePair};

use super::trial::{Outstanding, Seat, Suspicion};
use crate::datapath::lane::Lane;

/// What a token says about its lane: the bits above this many are the lane's index in its group, those below its slot. So the
/// lanes are the owners between whom multi-command requests share the queue pair.
const LANE_SHIFT: u32 = OWNER_SHIFT;

/// What leads to the drive: a queue pair and the bounce pool that belongs to it.
pub struct QueueResources {
    /// The queue pair.
    pub pair: QueuePair,
    /// Bounce buffers for data that the drive cannot reach where it lies.
    pub pool: BouncePool,
}

/// A queue pair and the lanes that submit to it: usually one, more when the controller has fewer queue pairs than there are
/// virtqueues.
///
/// Without a queue pair, while the drive is detached, requests wait; when its hold has expired they are answered with an error.
pub struct PollGroup {
    /// The queue pair, unless the drive is detached or requests are tried alone.
    resources: Option<QueueResources>,
    /// The queue pair while requests are tried alone on it.
    on_trial: Option<Box<OnTrial>>,
    answered: Answered,
    /// The drive is detached, and its hold has expired.
    hold_expired: bool,
    /// The lanes by index; an index stays free after its lane has gone until another takes it.
    lanes: Vec<Option<Lane>>,
    /// The lane that submits first in the next turn. It moves on: else a lane with much to do would find the queue pair free
    /// each time, and those after it never.
    first: usize,
}

impl PollGroup {
    /// A queue pair without lanes. `pool` is for the same device; it has to have a block at least.
    pub fn new(pair: QueuePair, pool: BouncePool) -> Self {
        PollGroup { resources: Some(QueueResources { pair, pool }), ..PollGroup::without_drive(false) }
    }

    /// A group whose queue pair is not there yet.
    pub fn without_drive(hold_expired: bool) -> Self {
        let answered = Answered::default();
        PollGroup { resources: None, on_trial: None, answered, hold_expired, lanes: Vec::new(), first: 0 }
    }

    /// Adds a lane; returns its index in the group. The driver is told that its ring is polled.
    pub fn add(&mut self, mut lane: Lane) -> usize {
        if self.pair().is_none() {
            lane.detach_drive(None);
        }
        if self.hold_expired {
            lane.expire_hold();
        }
        if lane.is_out_of_reach() {
            lane.stay_away();
        }
        lane.begin();
        let index = self.lanes.iter().position(Option::is_none).unwrap_or(self.lanes.len());
        match self.lanes.get_mut(index) {
            Some(free) => *free = Some(lane),
            None => self.lanes.push(Some(lane)),
        }
        index
    }

    /// One turn: every lane hands what its driver made available to the queue pair; one doorbell; every answer there is goes
    /// back to its lane; each lane publishes once. Returns how many requests moved.
    ///
    /// This is the whole of the data path. It makes no system call but the guest's notification, takes no lock and does not
    /// allocate. It can be called without a worker, which is how its cost is measured.
    #[inline(never)]
    pub fn poll(&mut self) -> usize {
        let Some(QueueResources { pair, pool }) = &mut self.resources else { return self.poll_slow_path() };
        let PollGroup { lanes, first, .. } = self;
        let mut moved = 0;
        let mut index = *first;
        for _ in 0..lanes.len() {
            if let Some(Some(lane)) = lanes.get_mut(index) {
                moved += lane.submit(pair, pool, (index as u64) << LANE_SHIFT);
            }
            index = if index + 1 < lanes.len() { index + 1 } else { 0 };
        }
        *first = if index + 1 < lanes.len() { index + 1 } else { 0 };
        pair.ring();
        moved += pair.reap(|done| {
            if let Some(Some(lane)) = lanes.get_mut((done.token >> LANE_SHIFT) as usize) {
                lane.complete(done.token, done.status);
            }
        });
        for lane in lanes.iter_mut().flatten() {
            lane.publish();
        }
        moved
    }

    /// The queue pair, unless the drive is detached.
    pub fn pair(&self) -> Option<&QueuePair> {
        let resources = self.resources.as_ref().or_else(|| self.on_trial.as_ref().map(|on_trial| &on_trial.resources));
        resources.map(|resources| &resources.pair)
    }

    fn resources_mut(&mut self) -> Option<&mut QueueResources> {
        self.resources.as_mut().or(self.on_trial.as_mut().map(|on_trial| &mut on_trial.resources))
    }

    /// The lane with this index.
    pub fn lane_mut(&mut self, index: usize) -> Option<&mut Lane> {
        self.lanes.get_mut(index)?.as_mut()
    }

    /// All lanes.
    pub fn lanes_mut(&mut self) -> impl Iterator<Item = &mut Lane> {
        self.lanes.iter_mut().flatten()
    }

    /// Takes a lane out if it has nothing in flight.
    pub(crate) fn remove_drained(&mut self, index: usize) -> Option<Lane> {
        self.lanes.get(index)?.as_ref().filter(|lane| lane.drained())?;
        let mut lane = self.remove(index)?;
        lane.end();
        Some(lane)
    }

    /// Takes a lane out. The drive must have nothing of it.
    pub(crate) fn remove(&mut self, index: usize) -> Option<Lane> {
        let lane = self.lanes.get_mut(index)?.take()?;
        if let Some(QueueResources { pool, .. }) = self.resources_mut() {
            pool.stop_waiting((index as u64) << LANE_SHIFT);
        }
        Some(lane)
    }

    /// Is any request of a lane on its way to be answered?
    pub(crate) fn busy(&self) -> bool {
        // Without a drive there is nothing to look for; and nobody tells of a trial's end.
        self.on_trial.is_some()
            || self
                .pair()
                .is_some_and(|pair| pair.outstanding() != 0 || self.lanes.iter().flatten().any(|lane| !lane.drained()))
    }

    /// Does any lane use the queue pair?
    pub(crate) fn has_lanes(&self) -> bool {
        self.lanes.iter().any(Option::is_some)
    }

    /// Gives up the group; returns its queue pair, unless the drive is detached.
    pub(crate) fn into_pair(self) -> Option<QueuePair> {
        self.resources.or(self.on_trial.map(|on_trial| on_trial.resources)).map(|resources| resources.pair)
    }

    /// Tells the lanes the time, and lets commands age; returns how many commands have just exceeded the command timeout.
    pub(crate) fn tick(&mut self, now: Instant) -> usize {
        let mut expired = 0;
        let PollGroup { resources, on_trial, lanes, answered, .. } = self;
        lanes.iter_mut().flatten().for_each(|lane| lane.tick(now));
        let resources = resources.as_mut().or(on_trial.as_mut().map(|on_trial| &mut on_trial.resources));
        let Some(resources) = resources else { return 0 };
        answered.look(&resources.pair, now);
        resources.pair.tick(now, |token| {
            expired += 1;
            if let Some(Some(lane)) = lanes.get_mut((token >> LANE_SHIFT) as usize) {
                lane.expired(token);
            }
        });
        expired
    }

    /// The drive is about to be detached: it is given nothing more before the seat's trial is over, and what it has is still answered.
    /// Returns how many commands it has.
    pub(crate) fn pause(&mut self, seat: Seat) -> usize {
        let Some(mut resources) =
            self.resources.take().or_else(|| self.on_trial.take().map(|on_trial| on_trial.resources))
        else {
            return 0;
        };
        resources.pair.hold();
        let out = resources.pair.outstanding();
        self.on_trial = Some(Box::new(OnTrial { resources, seat }));
        out
    }

    /// The controller is stopped and touches no memory any more: what is in flight waits for [`PollGroup::reattach_drive`], as does
    /// everything that comes. Returns what leads to the controller, and what it had.
    pub(crate) fn detach_drive(&mut self) -> Option<DetachedQueue> {
        let PollGroup { resources, on_trial, lanes, answered, .. } = self;
        let mut resources = resources.take().or_else(|| on_trial.take().map(|on_trial| on_trial.resources))?;
        answered.look(&resources.pair, Instant::now());
        let (mut in_flight, mut expired) = (0, 0);
        resources.pair.drain_after_reset(|token| {
            in_flight += 1;
            if let Some(Some(lane)) = lanes.get_mut((token >> LANE_SHIFT) as usize) {
                expired += usize::from(lane.unanswered(token));
            }
        });
        for lane in lanes.iter_mut().flatten() {
            lane.detach_drive(Some(&mut resources.pool));
            lane.publish();
        }
        let outstanding = Outstanding { requests: in_flight, expired, last_answer: std::mem::take(answered).at };
        Some(DetachedQueue { resources, outstanding })
    }

    /// Says what the failure means for what was in flight then, see [`Lane::judge`].
    pub(crate) fn judge(&mut self, suspicion: Suspicion) -> bool {
        let mut alone = false;
        for lane in self.lanes_mut() {
            alone |= lane.judge(suspicion);
            lane.publish();
        }
        alone
    }

    /// The hold of the detached drive has expired: what waits is answered with an error, as is everything that comes until
    /// [`PollGroup::reattach_drive`].
    pub(crate) fn expire_hold(&mut self) {
        if self.pair().is_some() {
            return;
        }
        self.hold_expired = true;
        for lane in self.lanes_mut() {
            lane.expire_hold();
            lane.publish();
        }
    }

    /// The drive is attached again: the lanes go on with it; with a seat, when the trial is over.
    pub(crate) fn reattach_drive(&mut self, resources: QueueResources, seat: Option<Seat>) {
        match seat {
            Some(seat) => self.on_trial = Some(Box::new(OnTrial { resources, seat })),
            None => self.resources = Some(resources),
        }
        self.answered = Answered::default();
        self.hold_expired = false;
        self.lanes_mut().for_each(Lane::reattach_drive);
    }

    /// A turn while the drive is detached, or requests are tried alone.
    #[cold]
    #[inline(never)]
    fn poll_slow_path(&mut self) -> usize {
        let PollGroup { on_trial, lanes, .. } = self;
        let mut moved = 0;
        let Some(OnTrial { resources: QueueResources { pair, pool }, seat }) = on_trial.as_deref_mut() else {
            for lane in lanes.iter_mut().flatten() {
                moved += lane.refuse();
                lane.publish();
            }
            return moved;
        };
        moved += pair.reap(|done| {
            if let Some(Some(lane)) = lanes.get_mut((done.token >> LANE_SHIFT) as usize) {
                lane.complete(done.token, done.status);
            }
        });
        if pair.outstanding() == 0 && seat.has_drive() {
            let mut all = (0u64..).zip(lanes.iter_mut());
            let tried = all.any(|(index, lane)| {
                lane.as_mut().is_some_and(|lane| lane.submit_alone(pair, pool, index << LANE_SHIFT))
            });
            pair.ring();
            if !tried {
                seat.finish();
            }
        }
        lanes.iter_mut().flatten().for_each(Lane::publish);
        if seat.is_over() && pair.outstanding() == 0 {
            self.resources = on_trial.take().map(|on_trial| on_trial.resources);
        }
        moved
    }
}

/// A queue pair on which requests are tried alone, for now.
struct OnTrial {
    resources: QueueResources,
    seat: Seat,
}

/// When the controller was last seen to answer, to within a few milliseconds.
#[derive(Default)]
struct Answered {
    /// Completions until then.
    count: u64,
    at: Option<Instant>,
}

impl Answered {
    fn look(&mut self, pair: &QueuePair, now: Instant) {
        let count = pair.counters().completions;
        if count != self.count {
            *self = Answered { count, at: Some(now) };
        }
    }
}

/// What a poll group had when its controller was stopped.
pub struct DetachedQueue {
    /// The queue pair.
    pub resources: QueueResources,
    /// What the controller had not answered.
    pub outstanding: Outstanding,
}
