//! Which disk has which of a drive's queue pairs.
//!
//! Each disk has a share of what the controller grants: as configured, else an even part. As long as some are free a disk may have
//! more than that. When another one wants its share, the surplus goes back: rings of the one disk move together, on their worker,
//! and a ring of the other gets the queue pair that becomes free. Until then, and when all have their share, rings share one, those
//! of one disk with each other if they can. A drive that comes back with fewer queue pairs takes slots away (`Shares::fold`); their
//! rings share others until there are more.
//!
//! Here is only decided; see `leases` for what is done.

use crate::datapath::worker::{LaneId, QueueSlotId};

/// Names a disk.
pub(super) type DiskNumber = u64;
/// Names a lease.
pub(super) type LeaseNumber = u64;

/// A queue slot that is leased, or that is about to go.
#[derive(Clone, Copy)]
pub(super) struct LeasedSlot {
    pub id: QueueSlotId,
    pub entries: u16,
    /// The disk that it counts for.
    owner: DiskNumber,
    /// No ring leases it any more; it is removed when its lanes have left.
    leaving: bool,
    /// It is removed because another disk has a right to its queue pair.
    surrendered: bool,
}

/// A ring's lease of a queue slot.
struct Leased {
    number: LeaseNumber,
    disk: DiskNumber,
    slot: QueueSlotId,
    entries: u16,
    /// The lane that runs there.
    lane: Option<LaneId>,
}

struct DiskShare {
    number: DiskNumber,
    name: String,
    /// Its share, if it is configured.
    wanted: Option<u16>,
    told: Told,
}

/// What was logged of a disk, so that it is logged once.
#[derive(Default)]
struct Told {
    shares: bool,
    has_own: bool,
    gives_back: bool,
}

/// A ring that is to have a queue pair of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Grant {
    pub lease: LeaseNumber,
    pub worker: usize,
    pub entries: u16,
}

/// Lanes that are to move to another slot, so that their own becomes free.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Merge {
    pub lanes: Vec<LaneId>,
    pub into: QueueSlotId,
}

/// A slot that is removed while the drive is detached; its lanes go on at another.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Fold {
    pub from: QueueSlotId,
    pub into: QueueSlotId,
}

/// The leases of a drive's queue slots, and the disks that have them.
#[derive(Default)]
pub(super) struct Shares {
    slots: Vec<LeasedSlot>,
    leases: Vec<Leased>,
    disks: Vec<DiskShare>,
    next: u64,
}

impl Shares {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// A disk is there. `wanted`: its share, if it is configured.
    pub(super) fn add_disk(&mut self, name: String, wanted: Option<u16>) -> DiskNumber {
        let number = self.number();
        self.disks.push(DiskShare { number, name, wanted, told: Told::default() });
        number
    }

    /// It is not there any more, nor has it leases.
    pub(super) fn remove_disk(&mut self, number: DiskNumber) {
        self.disks.retain(|disk| disk.number != number);
    }

    /// All slots, those that are about to go included.
    pub(super) fn slots(&self) -> &[LeasedSlot] {
        &self.slots
    }

    /// Adds a lease of a slot of its own.
    pub(super) fn add(&mut self, disk: DiskNumber, entries: u16, id: QueueSlotId) -> LeaseNumber {
        self.slots.push(LeasedSlot { id, entries, owner: disk, leaving: false, surrendered: false });
        let number = self.number();
        self.leases.push(Leased { number, disk, slot: id, entries, lane: None });
        number
    }

    /// Leases again a slot that the disk has just left and that is not removed yet: a guest that restarts its device is back at once.
    pub(super) fn reclaim(&mut self, disk: DiskNumber, worker: usize, entries: u16) -> Option<LeaseNumber> {
        let fits = |slot: &&mut LeasedSlot| {
            slot.leaving
                && !slot.surrendered
                && (slot.owner, slot.id.worker()) == (disk, worker)
                && slot.entries >= entries
        };
        let slot = self.slots.iter_mut().find(fits)?;
        slot.leaving = false;
        let id = slot.id;
        let number = self.number();
        self.leases.push(Leased { number, disk, slot: id, entries, lane: None });
        Some(number)
    }

    /// Adds a lease of a slot that other rings have, too. Returns the lease and a line for the log. `None`: there is no slot at all.
    pub(super) fn join(
        &mut self,
        disk: DiskNumber,
        worker: usize,
        entries: u16,
        granted: u16,
    ) -> Option<(LeaseNumber, Option<String>)> {
        let slots = self.slots.iter().filter(|slot| !slot.leaving);
        // With rings of the same disk, for whom it makes least difference; then on the wanted worker.
        let slot = slots
            .min_by_key(|slot| (slot.owner != disk, slot.id.worker() != worker, self.leases_at(slot.id).count()))?
            .id;
        let number = self.number();
        self.leases.push(Leased { number, disk, slot, entries, lane: None });
        let share = self.share(disk, granted);
        let disk = self.disks.iter_mut().find(|known| known.number == disk);
        let line = disk.filter(|disk| !disk.told.shares).map(|disk| {
            disk.told.shares = true;
            format!(
                "{}: rings share a queue pair: all {granted} that the controller grants are in use; {share} of them are this disk's \
                 share (queue-pairs)",
                disk.name
            )
        });
        Some((number, line))
    }

    /// Where a lease's lane is started.
    pub(super) fn slot_of(&self, lease: LeaseNumber) -> Option<QueueSlotId> {
        self.leases.iter().find(|leased| leased.number == lease).map(|leased| leased.slot)
    }

    /// Notes the lane that runs at a lease's slot.
    pub(super) fn set_lane(&mut self, lease: LeaseNumber, lane: Option<LaneId>) {
        self.leases.iter_mut().filter(|leased| leased.number == lease).for_each(|leased| leased.lane = lane);
    }

    /// Ends a lease. Returns its slot if no other ring leases that: it is to be removed.
    pub(super) fn remove(&mut self, lease: LeaseNumber) -> Option<QueueSlotId> {
        let at = self.leases.iter().position(|leased| leased.number == lease)?;
        let id = self.leases.swap_remove(at).slot;
        let heirs: Vec<DiskNumber> = self.leases_at(id).map(|leased| leased.disk).collect();
        let slot = self.slots.iter_mut().find(|slot| slot.id == id)?;
        if heirs.is_empty() {
            slot.leaving = true;
            return Some(id);
        }
        if !heirs.contains(&slot.owner) {
            slot.owner = heirs[0];
        }
        None
    }

    /// Forgets a slot that was removed.
    pub(super) fn forget(&mut self, id: QueueSlotId) {
        self.slots.retain(|slot| slot.id != id);
    }

    /// Whether this slot is still to be removed.
    pub(super) fn is_leaving(&self, id: QueueSlotId) -> bool {
        self.slots.iter().any(|slot| slot.id == id && slot.leaving)
    }

    /// Places that are to go when their lanes have gone.
    pub(super) fn leaving(&self) -> Vec<QueueSlotId> {
        self.slots.iter().filter(|slot| slot.leaving).map(|slot| slot.id).collect()
    }

    fn leases_at(&self, id: QueueSlotId) -> impl Iterator<Item = &Leased> {
        self.leases.iter().filter(move |leased| leased.slot == id)
    }

    /// The drive comes back and grants so many queue pairs, at least 1: if there are more slots, which of them fold into others, one
    /// after the other. They are not there any more.
    pub(super) fn fold(&mut self, granted: u16) -> Vec<Fold> {
        let mut folds = Vec::new();
        while self.slots.len() > usize::from(granted.max(1))
            && let Some((from, into)) = self.next_fold(granted)
        {
            let gone = self.slots.remove(from);
            let into = self.slots.iter_mut().find(|slot| slot.id == into).expect("it was found among them");
            into.entries = into.entries.max(gone.entries);
            let fold = Fold { from: gone.id, into: into.id };
            for leased in self.leases.iter_mut().filter(|leased| leased.slot == fold.from) {
                leased.slot = fold.into;
                let disk = self.disks.iter_mut().find(|disk| disk.number == leased.disk);
                // It is told again when it has one of its own again.
                disk.into_iter().for_each(|disk| disk.told.has_own = false);
            }
            folds.push(fold);
        }
        folds
    }

    /// The first of them: where among the slots it is, and which other one takes its lanes.
    fn next_fold(&self, granted: u16) -> Option<(usize, QueueSlotId)> {
        let counts: Vec<usize> = self.slots.iter().map(|slot| self.leases_at(slot.id).count()).collect();
        let surplus =
            |slot: &LeasedSlot| i32::from(self.pairs(slot.owner)) - i32::from(self.share(slot.owner, granted));
        let surplus: Vec<i32> = self.slots.iter().map(surplus).collect();
        let pairs = (0..self.slots.len()).flat_map(|from| (0..self.slots.len()).map(move |into| (from, into)));
        let (from, into) = pairs.filter(|(from, into)| from != into).min_by_key(|&(from, into)| {
            let [gone, heir] = [from, into].map(|at| &self.slots[at]);
            // What nobody has any more first. Then rings of one disk share, of that which has most beyond its share, if they can on
            // their worker; as few as can be, and those that came last.
            (
                (!gone.leaving, heir.leaving, gone.owner != heir.owner),
                (-surplus[from], gone.id.worker() != heir.id.worker()),
                (counts[from] + counts[into], self.slots.len() - from, into),
            )
        })?;
        Some((from, self.slots[into].id))
    }

    /// Queue pairs that a disk may rely on: its share.
    fn share(&self, disk: DiskNumber, granted: u16) -> u16 {
        let wanted = |disk: &DiskShare| disk.wanted;
        if let Some(wanted) = self.disks.iter().find(|known| known.number == disk).and_then(wanted) {
            return wanted;
        }
        let fixed: u32 = self.disks.iter().filter_map(wanted).map(u32::from).sum();
        let others = self.disks.iter().filter(|disk| disk.wanted.is_none()).count().max(1);
        (u32::from(granted).saturating_sub(fixed) as usize / others).max(1) as u16
    }

    /// Queue pairs that a disk has.
    fn pairs(&self, disk: DiskNumber) -> u16 {
        self.slots.iter().filter(|slot| slot.owner == disk && !slot.leaving).count() as u16
    }

    /// The disk's leases that share a slot: all but the first of the disk's leases at a slot of its own.
    fn sharing(&self, disk: DiskNumber) -> impl Iterator<Item = &Leased> {
        self.leases.iter().filter(move |leased| {
            let slot = self.slots.iter().find(|slot| slot.id == leased.slot);
            let at_home = slot.is_some_and(|slot| slot.owner == disk)
                && self
                    .leases_at(leased.slot)
                    .filter(|other| other.disk == disk)
                    .all(|other| leased.number <= other.number);
            leased.disk == disk && !at_home
        })
    }

    /// Who is to have the next queue pair that is free.
    pub(super) fn next_grant(&self, granted: u16) -> Option<Grant> {
        let disks = self.disks.iter().map(|disk| disk.number);
        let wanting = disks.filter_map(|disk| Some((disk, self.sharing(disk).min_by_key(|leased| leased.number)?)));
        let (_, leased) = wanting.min_by_key(|(disk, _)| {
            let pairs = self.pairs(*disk);
            (pairs >= self.share(*disk, granted), pairs, *disk)
        })?;
        Some(Grant { lease: leased.number, worker: leased.slot.worker(), entries: leased.entries })
    }

    /// Notes that a grant was carried out, with this slot. Returns the lane that has to move there, and a line for the log.
    pub(super) fn give(&mut self, grant: Grant, id: QueueSlotId) -> (Option<LaneId>, Option<String>) {
        let Some(leased) = self.leases.iter_mut().find(|leased| leased.number == grant.lease) else {
            return (None, None);
        };
        leased.slot = id;
        let (owner, lane) = (leased.disk, leased.lane);
        self.slots.push(LeasedSlot { id, entries: grant.entries, owner, leaving: false, surrendered: false });
        let disk = self.disks.iter_mut().find(|disk| disk.number == owner);
        let line = disk.filter(|disk| !disk.told.has_own).map(|disk| {
            disk.told.has_own = true;
            format!("{}: a ring that shared a queue pair has one of its own now", disk.name)
        });
        (lane, line)
    }

    /// A ring that uses another disk's queue pair while its own has one on the same worker: what has to move where, as far as it
    /// runs. `None`: there are none any more.
    pub(super) fn next_return(&mut self) -> Option<Merge> {
        let own = |leased: &Leased| {
            let mine = |slot: &&LeasedSlot| slot.owner == leased.disk && !slot.leaving;
            let at = leased.slot.worker();
            let here = self.slots.iter().filter(mine).filter(|slot| slot.id.worker() == at);
            here.min_by_key(|slot| self.leases_at(slot.id).count()).map(|slot| slot.id)
        };
        let abroad = |leased: &Leased| {
            let at = self.slots.iter().find(|slot| slot.id == leased.slot);
            at.is_some_and(|slot| slot.owner != leased.disk)
        };
        let (at, into) =
            (0..).zip(&self.leases).find_map(|(at, leased)| Some((at, own(leased).filter(|_| abroad(leased))?)))?;
        let leased: &mut Leased = &mut self.leases[at];
        leased.slot = into;
        Some(Merge { lanes: leased.lane.into_iter().collect(), into })
    }

    /// A slot that a disk has beyond its share, while another has less and wants it: its lanes are to move. And a line for the log.
    pub(super) fn next_merge(&mut self, granted: u16) -> Option<(Merge, Option<String>)> {
        let missing = |disk: &DiskShare| {
            let short = self.share(disk.number, granted).saturating_sub(self.pairs(disk.number));
            usize::from(short).min(self.sharing(disk.number).count())
        };
        // One more could be free than is granted to anybody, if too many moved.
        if self.disks.iter().map(missing).sum::<usize>() <= self.leaving().len() {
            return None;
        }
        let surplus = |disk: &DiskShare| self.pairs(disk.number).saturating_sub(self.share(disk.number, granted));
        let mut givers: Vec<_> = self.disks.iter().filter(|disk| surplus(disk) > 0).collect();
        givers.sort_by_key(|disk| std::cmp::Reverse(surplus(disk)));
        let (owner, from, into) = givers.into_iter().find_map(|disk| {
            let mut own: Vec<_> = self.slots.iter().filter(|slot| slot.owner == disk.number && !slot.leaving).collect();
            own.sort_by_key(|slot| self.leases_at(slot.id).count());
            // Lanes stay on their worker.
            let pairs =
                own.iter().enumerate().flat_map(|(at, from)| own[at + 1..].iter().map(move |into| (*from, *into)));
            let mut fitting = pairs.filter(|(from, into)| from.id.worker() == into.id.worker());
            fitting.next().map(|(from, into)| (disk.number, from.id, into.id))
        })?;
        let surrender = |slot: &mut LeasedSlot| (slot.leaving, slot.surrendered) = (true, true);
        self.slots.iter_mut().filter(|slot| slot.id == from).for_each(surrender);
        let moving = self.leases.iter_mut().filter(|leased| leased.slot == from);
        let lanes = moving.filter_map(|leased| {
            leased.slot = into;
            leased.lane
        });
        let merge = Merge { lanes: lanes.collect(), into };
        let share = self.share(owner, granted);
        let disk = self.disks.iter_mut().find(|disk| disk.number == owner);
        let line = disk.filter(|disk| !disk.told.gives_back).map(|disk| {
            disk.told.gives_back = true;
            format!(
                "{}: it has more queue pairs than its share of {share} (queue-pairs), and gives back what others need: some of its \
                 rings share one from now on",
                disk.name
            )
        });
        Some((merge, line))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A drive that grants some queue pairs, on which everything asked for is done at once.
    struct Bench {
        shares: Shares,
        granted: u16,
        made: usize,
        workers: usize,
    }

    impl Bench {
        fn new(granted: u16, workers: usize) -> Bench {
            Bench { shares: Shares::default(), granted, made: 0, workers }
        }

        fn pair(&mut self, worker: usize) -> QueueSlotId {
            self.made += 1;
            QueueSlotId::made_up(worker, self.made)
        }

        fn is_free(&self) -> bool {
            self.shares.slots.len() < usize::from(self.granted)
        }

        fn start(&mut self, disk: DiskNumber, ring: usize) -> LeaseNumber {
            let worker = ring % self.workers;
            if self.is_free() {
                let id = self.pair(worker);
                return self.shares.add(disk, 64, id);
            }
            self.shares.join(disk, worker, 64, self.granted).unwrap().0
        }

        /// As the supervisor does it.
        fn deal(&mut self) {
            for _ in 0..100 {
                self.shares.leaving().into_iter().for_each(|id| self.shares.forget(id));
                while self.is_free()
                    && let Some(grant) = self.shares.next_grant(self.granted)
                {
                    let id = self.pair(grant.worker);
                    self.shares.give(grant, id);
                }
                while self.shares.next_return().is_some() {}
                while self.shares.next_merge(self.granted).is_some() {}
                if self.shares.leaving().is_empty() {
                    return;
                }
            }
            panic!("it goes on for ever");
        }

        fn pairs(&self, disks: &[DiskNumber]) -> Vec<u16> {
            disks.iter().map(|disk| self.shares.pairs(*disk)).collect()
        }
    }

    #[test]
    fn who_comes_later_gets_his_share() {
        let mut bench = Bench::new(16, 2);
        let disks = [None, None, Some(2)].map(|wanted| bench.shares.add_disk("d".into(), wanted));
        let first: Vec<_> = (0..16).map(|ring| bench.start(disks[0], ring)).collect();
        bench.deal();
        assert_eq!(bench.pairs(&disks), [16, 0, 0], "nobody else wants any");
        bench.start(disks[1], 0);
        bench.deal();
        assert_eq!(bench.pairs(&disks), [15, 1, 0], "no more than is wanted");
        (1..32).for_each(|ring| _ = bench.start(disks[1], ring));
        (0..16).for_each(|ring| _ = bench.start(disks[2], ring));
        bench.deal();
        assert_eq!(bench.pairs(&disks), [7, 7, 2]);
        // Nobody's ring uses another disk's.
        assert!(bench.shares.leases.iter().all(|leased| {
            let slot = bench.shares.slots.iter().find(|slot| slot.id == leased.slot).unwrap();
            slot.owner == leased.disk && !slot.leaving
        }));
        for lease in first {
            if let Some(id) = bench.shares.remove(lease) {
                assert!(bench.shares.leaving().contains(&id));
            }
        }
        bench.deal();
        assert_eq!(bench.pairs(&disks), [0, 8, 8], "what is free goes to whoever has least");
        bench.shares.remove_disk(disks[0]);
        bench.deal();
        assert_eq!(bench.pairs(&disks), [0, 14, 2], "the share is larger now");
    }

    #[test]
    fn more_disks_than_queue_pairs_share_them() {
        let mut bench = Bench::new(2, 1);
        let disks: Vec<_> = (0..5).map(|_| bench.shares.add_disk("d".into(), None)).collect();
        let leases: Vec<Vec<_>> =
            disks.iter().map(|disk| (0..4).map(|ring| bench.start(*disk, ring)).collect()).collect();
        bench.deal();
        assert_eq!(bench.pairs(&disks), [1, 1, 0, 0, 0]);
        // When an owner goes, those who shared with it have it.
        leases[0].iter().for_each(|lease| assert_eq!(bench.shares.remove(*lease), None));
        bench.deal();
        assert_eq!(bench.pairs(&disks).iter().sum::<u16>(), 2);
        for lease in leases[1..].iter().flatten() {
            bench.shares.remove(*lease);
        }
        bench.deal();
        assert!(bench.shares.slots.is_empty() && bench.shares.leases.is_empty());
    }

    /// A drive that comes back with fewer queue pairs, and then with more.
    #[test]
    fn rings_share_what_is_left() {
        let mut bench = Bench::new(16, 2);
        let [disk, other] = [0, 1].map(|_| bench.shares.add_disk("d".into(), None));
        let leases: Vec<_> = (0..4).map(|ring| bench.start(disk, ring)).collect();
        let others = bench.start(other, 0);
        let slots: Vec<_> = leases.iter().map(|lease| bench.shares.slot_of(*lease).unwrap()).collect();
        let slot = bench.shares.slot_of(others);
        let at = |bench: &Bench| -> Vec<_> {
            let slot = |lease: &LeaseNumber| bench.shares.slot_of(*lease).unwrap();
            leases.iter().map(|lease| slots.iter().position(|known| *known == slot(lease)).unwrap()).collect()
        };
        assert_eq!(bench.shares.fold(5), []);
        // Those that came last, with one of their disk on their worker.
        let fold = |from: usize, into: usize| Fold { from: slots[from], into: slots[into] };
        assert_eq!(bench.shares.fold(3), [fold(3, 1), fold(2, 0)]);
        assert_eq!(at(&bench), [0, 1, 0, 1]);
        // Rather with one of their disk on another worker than with another disk's.
        assert_eq!(bench.shares.fold(2), [fold(1, 0)]);
        assert_eq!((at(&bench), bench.shares.slot_of(others)), (vec![0; 4], slot));
        bench.granted = 2;
        bench.deal();
        assert_eq!(bench.pairs(&[disk, other]), [1, 1]);
        // The last one is for all.
        let into = bench.shares.fold(1)[0].into;
        assert!(bench.shares.fold(0).is_empty() && bench.shares.slots().len() == 1);
        assert!(bench.shares.leases.iter().all(|leased| leased.slot == into));
        bench.granted = 16;
        bench.deal();
        assert_eq!(bench.pairs(&[disk, other]), [4, 1]);
        assert_eq!(bench.shares.sharing(disk).chain(bench.shares.sharing(other)).count(), 0);
        leases.iter().chain([&others]).for_each(|lease| _ = bench.shares.remove(*lease));
        bench.deal();
        assert!(bench.shares.slots.is_empty());
    }

    #[test]
    fn disks_keep_their_share_of_what_is_left() {
        let mut bench = Bench::new(16, 1);
        let disks = [None, None, Some(2)].map(|wanted| bench.shares.add_disk("d".into(), wanted));
        let first: Vec<_> = (0..8).map(|ring| bench.start(disks[0], ring)).collect();
        (0..2).for_each(|ring| _ = bench.start(disks[1], ring));
        (0..4).for_each(|ring| _ = bench.start(disks[2], ring));
        // What its ring has left needs none.
        let left = bench.shares.remove(first[0]).unwrap();
        assert_eq!(bench.shares.fold(13)[0].from, left);
        assert!(bench.shares.leaving().is_empty());
        bench.shares.fold(6);
        assert_eq!(bench.pairs(&disks), [2, 2, 2]);
        bench.granted = 6;
        bench.deal();
        assert_eq!(bench.pairs(&disks), [2, 2, 2], "nobody wants another's");
        bench.shares.fold(3);
        assert_eq!(bench.pairs(&disks).iter().filter(|pairs| **pairs == 1).count(), 3);
        bench.granted = 16;
        bench.deal();
        assert_eq!(bench.pairs(&disks), [7, 2, 4]);
    }

    #[test]
    fn a_slot_has_entries_for_all_who_share_it() {
        let mut bench = Bench::new(2, 1);
        let disk = bench.shares.add_disk("d".into(), None);
        for entries in [64, 1024] {
            let id = bench.pair(0);
            bench.shares.add(disk, entries, id);
        }
        assert_eq!(bench.shares.fold(1).len(), 1);
        assert_eq!(bench.shares.slots()[0].entries, 1024);
    }

    #[test]
    fn a_slot_that_was_just_left_is_had_again() {
        let mut bench = Bench::new(2, 2);
        let [disk, other] = [0, 1].map(|_| bench.shares.add_disk("d".into(), None));
        let lease = bench.start(disk, 0);
        let slot = bench.shares.slot_of(lease);
        assert_eq!(bench.shares.reclaim(disk, 0, 64), None, "it is in use");
        assert_eq!(bench.shares.remove(lease), slot);
        for (who, worker, entries) in [(other, 0, 64), (disk, 1, 64), (disk, 0, 65)] {
            assert_eq!(bench.shares.reclaim(who, worker, entries), None);
        }
        let again = bench.shares.reclaim(disk, 0, 64).unwrap();
        assert_eq!((bench.shares.slot_of(again), bench.shares.leaving().len()), (slot, 0));
        bench.shares.remove(again);
        bench.deal();
        assert_eq!(bench.shares.reclaim(disk, 0, 64), None, "it has gone");
    }

    #[test]
    fn each_thing_is_told_once() {
        let mut bench = Bench::new(1, 1);
        let disk = bench.shares.add_disk("d".into(), None);
        bench.start(disk, 0);
        let (_, line) = bench.shares.join(disk, 0, 64, 1).unwrap();
        assert!(line.unwrap().starts_with("d: rings share a queue pair: all 1 that the controller grants"));
        assert_eq!(bench.shares.join(disk, 0, 64, 1).unwrap().1, None);
    }
}
