//! What a lane does so that a flush keeps its promise: see [`FlushPromise`](crate::blk::disk::FlushPromise).

use super::Lane;
use super::mode::DriveAccess;
use crate::blk::request::Operation;
use crate::log_limit::Kind;

/// What a lane has told of its changes to the disk.
pub(super) struct Changes {
    /// How many it had been asked for when none was left to be answered, and all were told.
    settled: u64,
    /// The last flush that had begun when it told of changes; `u64::MAX`: it never has.
    told: u64,
    /// A search for changes that are still to be answered: how many it had been asked for when it began, and the slot where it
    /// goes on. None before it waits for the drive's answer, for there were no new ones meanwhile.
    looked: (u64, u16),
}

/// Slots that a lane looks at in one turn.
const LOOK: usize = 64;

impl Default for Changes {
    fn default() -> Changes {
        Changes { settled: 0, told: u64::MAX, looked: (0, 0) }
    }
}

/// Does a request of this kind change the disk?
pub(super) fn changes(operation: Operation) -> bool {
    !matches!(operation, Operation::Read | Operation::Flush)
}

impl Lane {
    /// Answers are about to be shown to the driver: those of changes are promised from then on, by the next flush.
    #[inline]
    pub(super) fn note_changes(&mut self) {
        let tally = &self.tally;
        let all = tally.writes + tally.discards + tally.write_zeroes;
        if all != self.changes.settled {
            let now = self.disk.flushes.now();
            if now != self.changes.told {
                self.look_for_changes(all, now);
            }
        }
    }

    /// A flush has begun since the lane told of changes. What it showed earlier is part of that flush, which began later; what
    /// it shows now may not be.
    #[cold]
    #[inline(never)]
    fn look_for_changes(&mut self, all: u64, now: u64) {
        // Without the drive nothing is done.
        if self.drive != DriveAccess::Attached {
            return;
        }
        // Those that failed, too: they may have changed something.
        if self.slots.freed().any(|(_, slot)| slot.record.changes()) {
            return self.tell_changes(now);
        }
        let Lane { slots, changes, bounced, .. } = self;
        if changes.looked.0 != all {
            changes.looked = (all, 0);
        }
        // Only some, and the same one first as long as it waits: a ring may have thousands of slots.
        let (mut waiting, end) = slots.held(changes.looked.1, LOOK);
        let found = waiting.find(|(_, slot)| slot.record.changes()).map(|(number, _)| number);
        changes.looked.1 = found.unwrap_or(end as u16);
        if found.is_none() && slots.is_end(end) && !bounced.any_changes() {
            changes.settled = all;
        }
    }

    /// A change is about to be answered.
    pub(super) fn note_change(&mut self) {
        let now = self.disk.flushes.now();
        if now != self.changes.told {
            self.tell_changes(now);
        }
    }

    fn tell_changes(&mut self, now: u64) {
        // Under write-through nothing is answered from the cache.
        if self.disk.namespace.volatile_write_cache && !self.disk.force_unit_access() {
            self.disk.flushes.changed(now);
            self.changes.told = now;
        }
    }

    /// A flush is given to the drive; its number. `None`: it has to fail, for the drive has lost what it would have made safe.
    pub(super) fn begin_flush(&mut self) -> Option<u64> {
        let number = self.disk.flushes.begin();
        self.warn_of_loss(number)
    }

    /// The flush in a slot, which the drive has not answered, is given to it once more; its new number. `None`: it has to fail, for the
    /// drive has lost what it would have made safe.
    pub(super) fn begin_flush_retry(&mut self, slot: u16) -> Option<u64> {
        let before = self.slots.held_mut(slot)?.record.flush_number();
        let number = self.disk.flushes.begin_again(before);
        self.warn_of_loss(number)
    }

    fn warn_of_loss(&self, number: Option<u64>) -> Option<u64> {
        if number.is_none()
            && let Some(more) = self.log.admit(Kind::Drive)
        {
            log::error!("{}: a flush fails: the drive has lost writes that were not flushed before{more}", self.name);
        }
        number
    }

    /// The flush in this slot has succeeded.
    pub(super) fn flush_succeeded(&mut self, number: u16) {
        if let Some(slot) = self.slots.held_mut(number) {
            // It came from the drive that it was given to: nothing was lost meanwhile.
            self.disk.flushes.succeed(slot.record.flush_number());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use nvme_sim::{Config, FaultAction, FaultMatch, FaultRule, NamespaceConfig};

    use super::super::testing::{DATA, Machine, TestClient, wait};
    use crate::blk::request::{IOERR, OK};
    use crate::datapath::poll_group::PollGroup;
    use crate::virtio::ring::model::{readable, writable};

    const IN: u32 = 0;
    const OUT: u32 = 1;
    const FLUSH: u32 = 4;
    const WRITE_ZEROES: u32 = 13;

    fn machine() -> Machine {
        let namespace = NamespaceConfig { bytes: 64 << 20, ..NamespaceConfig::default() };
        let namespaces = vec![namespace];
        Machine::new(Config { namespaces, volatile_write_cache: true, sgl: false, ..Config::default() })
    }

    /// The next command of this kind is not answered.
    fn lose_one(machine: &Machine, opcode: u8) {
        let when = FaultMatch { opcode: Some(opcode), limit: Some(1), ..FaultMatch::default() };
        machine.sim.faults().add(FaultRule { action: FaultAction::LoseCompletion, when });
    }

    #[test]
    fn a_flush_of_one_lane_knows_what_another_has_answered() {
        let machine = machine();
        let guest = &machine.guest;
        let disk = Arc::new(machine.disk());
        let mut clients: Vec<TestClient> =
            (0..3).map(|number| TestClient::new(guest, number, number == 1, 16)).collect();
        let mut groups: Vec<PollGroup> = (0..3).map(|_| machine.group(64)).collect();
        for (client, group) in clients.iter_mut().zip(&mut groups) {
            group.add(client.lane(guest, &disk));
        }
        assert_eq!(clients[2].run(guest, &mut groups[2], OUT, 8, &[readable(DATA, 4096)]), (OK, 1));
        // Two flushes that the drive has when it goes.
        for (client, group) in clients.iter_mut().zip(&mut groups).take(2) {
            lose_one(&machine, 0);
            client.send(guest, FLUSH, 0, &[]).unwrap();
            let fired = machine.sim.faults().fired();
            wait(group, || (machine.sim.faults().fired() > fired).then_some(()));
        }
        machine.controller.reset().unwrap();
        let lost: Vec<_> = groups.iter_mut().map(|group| group.detach_drive().unwrap()).collect();
        assert!(disk.flushes.lose_cache(None));
        // Each is back before the lane with the write is.
        for ((client, group), mut lost) in clients.iter_mut().zip(&mut groups).zip(lost) {
            machine.controller.recreate_queue_pair(&mut lost.resources.pair).unwrap();
            group.reattach_drive(lost.resources, None);
            if client.in_flight() != 0 {
                assert_eq!(wait(group, || client.answer(guest)).1, IOERR);
            }
        }
        for (client, group) in clients.iter_mut().zip(&mut groups) {
            assert_eq!(client.run(guest, group, FLUSH, 0, &[]), (OK, 1), "the guest knows");
        }
    }

    #[test]
    fn reads_under_way_are_no_changes() {
        for packed in [false, true] {
            let machine = machine();
            let guest = &machine.guest;
            let disk = Arc::new(machine.disk());
            let mut clients = [0, 1].map(|number| TestClient::new(guest, number, packed, 16));
            let mut groups = [(); 2].map(|()| machine.group(64));
            for (client, group) in clients.iter_mut().zip(&mut groups) {
                group.add(client.lane(guest, &disk));
                // One is never answered.
                lose_one(&machine, 2);
                client.send(guest, IN, 0, &[writable(DATA, 4096)]).unwrap();
                let fired = machine.sim.faults().fired();
                wait(group, || (machine.sim.faults().fired() > fired).then_some(()));
            }
            let [writer, flusher] = &mut clients;
            let [first, second] = &mut groups;
            let read = |writer: &mut TestClient, first: &mut PollGroup| {
                assert_eq!(writer.run(guest, first, IN, 0, &[writable(DATA, 4096)]), (OK, 4097));
            };
            let range = DATA + 0x2000;
            guest.write(range, &[&8u64.to_le_bytes()[..], &8u32.to_le_bytes(), &[0; 4]].concat());
            for (kind, data) in [(OUT, readable(DATA, 4096)), (WRITE_ZEROES, readable(range, 16))] {
                // More than one, so that the last is not the one that was told.
                for _ in 0..2 {
                    assert_eq!(writer.run(guest, first, kind, 0, &[data]), (OK, 1));
                    read(writer, first);
                }
                assert_eq!(flusher.run(guest, second, FLUSH, 0, &[]), (OK, 1));
                (0..3).for_each(|_| read(writer, first));
                assert!(!disk.flushes.lose_cache(None), "everything is safe");
                assert_eq!(writer.run(guest, first, kind, 0, &[data]), (OK, 1));
                // Its own flush as well as the other's.
                assert_eq!(writer.run(guest, first, FLUSH, 0, &[]), (OK, 1));
                read(writer, first);
                assert!(!disk.flushes.lose_cache(None), "everything is safe");
                assert_eq!(writer.run(guest, first, kind, 0, &[data]), (OK, 1));
                read(writer, first);
                assert!(disk.flushes.lose_cache(None), "nobody has flushed this");
                assert_eq!(flusher.run(guest, second, FLUSH, 0, &[]), (IOERR, 1));
            }
        }
    }

    #[test]
    fn what_is_copied_or_written_through_is_known_for_what_it_is() {
        let machine = machine();
        let guest = &machine.guest;
        let mut disk = machine.disk();
        // Without flushes everything is written through.
        disk.features = 0;
        let disks = [Arc::new(machine.disk()), Arc::new(disk)];
        for (number, disk) in (0..).zip(&disks) {
            let mut client = TestClient::new(guest, number, false, 16);
            let mut group = machine.group(64);
            group.add(client.lane(guest, disk));
            // At an odd address: no data pointer can say where it is.
            let pieces = [readable(DATA + 1, 100), readable(DATA + 201, 412)];
            assert_eq!(client.run(guest, &mut group, OUT, 0, &pieces), (OK, 1));
            assert_eq!(client.counters.read().copies, 1);
            assert_eq!(disk.flushes.lose_cache(None), number == 0);
            assert_eq!(client.run(guest, &mut group, OUT, 0, &[readable(DATA, 4096)]), (OK, 1));
            assert_eq!(disk.flushes.lose_cache(None), number == 0);
        }
    }
}
