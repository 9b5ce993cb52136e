//! Lanes on a simulated controller, polled by the test itself.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use nvme_sim::{Config, FaultAction, FaultMatch, FaultRule, NamespaceConfig};

use super::testing::{DATA, DEADLINE, Machine, TestClient, count, pattern, wait};
use super::*;
use crate::blk::request::{IOERR, OK, UNSUPP};
use crate::datapath::poll_group::PollGroup;
use crate::virtio::memory::DmaScope;
use crate::virtio::ring::model::{Driver, Guest, Piece, Random, readable, writable};

fn config(block_bytes: u32) -> Config {
    let namespace = NamespaceConfig { bytes: 64 << 20, block_bytes, ..NamespaceConfig::default() };
    // It is ready at once, but for a machine that is busy.
    let ready_timeout = Duration::from_secs(60);
    Config { namespaces: vec![namespace], volatile_write_cache: true, ready_timeout, ..Config::default() }
}

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// Pieces of these lengths, with gaps between them.
fn pieces(mut at: u64, lengths: impl IntoIterator<Item = u32>, gap: u64, writable: bool) -> Vec<Piece> {
    let mut all = Vec::new();
    for bytes in lengths {
        all.push(Piece { address: at, bytes, writable });
        at += u64::from(bytes) + gap;
    }
    all
}

fn scatter(guest: &Guest, pieces: &[Piece], data: &[u8]) {
    let mut done = 0;
    for piece in pieces {
        guest.write(piece.address, &data[done..done + piece.bytes as usize]);
        done += piece.bytes as usize;
    }
}

fn gather(guest: &Guest, pieces: &[Piece]) -> Vec<u8> {
    pieces.iter().flat_map(|piece| guest.read(piece.address, piece.bytes as usize)).collect()
}

#[test]
fn what_was_written_is_read_whatever_its_layout() {
    for (block_bytes, sgl) in [(512, true), (512, false), (4096, true), (4096, false)] {
        for packed in [false, true] {
            println!("block {block_bytes}, sgl {sgl}, packed {packed}");
            let machine = Machine::new(Config { sgl, ..config(block_bytes) });
            let guest = &machine.guest;
            let mut client = TestClient::new(guest, 0, packed, 16);
            let mut group = machine.group(64);
            group.add(client.lane(guest, &Arc::new(machine.disk())));
            let layouts: Vec<Vec<u32>> = vec![
                vec![4096],
                vec![8192],
                vec![4096; 33],
                vec![512; 8],
                vec![512; 1024],
                vec![4096; 600],
                vec![1 << 20, 512, 3584],
                vec![4, 4088, 4],
            ];
            for (index, layout) in layouts.into_iter().enumerate() {
                let bytes: u32 = layout.iter().sum();
                let data = pattern(index as u64, bytes as usize);
                let out = pieces(DATA + 0x1000, layout.iter().copied(), 512, false);
                scatter(guest, &out, &data);
                assert_eq!(client.run(guest, &mut group, OUT, 8 * index as u64, &out), (OK, 1));
                let back = pieces(DATA + 0x100_0000, layout.into_iter().rev(), 1024, true);
                assert_eq!(client.run(guest, &mut group, IN, 8 * index as u64, &back), (OK, bytes + 1));
                assert!(gather(guest, &back) == data, "layout {index}: other data came back");
            }
            let tally = client.counters.read();
            assert_eq!((tally.reads, tally.writes, tally.errors, tally.answered), (8, 8, 0, 0));
            assert_eq!(tally.bytes_read, tally.bytes_written);
        }
    }
}

#[test]
fn data_no_pointer_can_reach_is_copied() {
    for (block_bytes, pool) in [(512, 256 << 10), (4096, 4096)] {
        let machine = Machine::new(Config { sgl: false, ..config(block_bytes) });
        let guest = &machine.guest;
        let mut client = TestClient::new(guest, 0, false, 16);
        let pair = machine.pair(64).0;
        let mut group = PollGroup::new(pair, BouncePool::new(machine.device.dma(), pool).unwrap());
        group.add(client.lane(guest, &Arc::new(machine.disk())));
        let layouts = [vec![4096], vec![1, 4095], vec![100, 300, 7792], vec![300 << 10], vec![997; 1000]];
        for (index, mut layout) in layouts.into_iter().enumerate() {
            let total: u32 = layout.iter().sum();
            let rest = total.next_multiple_of(4096) - total;
            layout.extend((rest != 0).then_some(rest));
            let bytes: u32 = layout.iter().sum();
            let data = pattern(index as u64, bytes as usize);
            let out = pieces(DATA + 1, layout.iter().copied(), 3, false);
            scatter(guest, &out, &data);
            assert_eq!(client.run(guest, &mut group, OUT, 0, &out), (OK, 1));
            let back = pieces(DATA + 0x100_0003, layout, 5, true);
            assert_eq!(client.run(guest, &mut group, IN, 0, &back), (OK, bytes + 1));
            assert!(gather(guest, &back) == data, "layout {index}: other data came back");
        }
        assert_eq!(client.counters.read().copies, 10);
        // Several at a time on a pool with room for one piece, and errors on the way.
        machine.sim.faults().add(FaultRule {
            action: FaultAction::Fail(nvme_sim::Status::new(2, 0x81)),
            when: FaultMatch { opcode: Some(2), blocks: Some(80..=80), ..FaultMatch::default() },
        });
        let ids: Vec<u16> = (0..6u64)
            .map(|k| client.send(guest, IN, 128 * k, &[writable(DATA + 0x10_0000 * k + 1, 128 * 512)]).unwrap())
            .collect();
        let mut answers: Vec<(u16, u8, u32)> = (0..6).map(|_| wait(&mut group, || client.answer(guest))).collect();
        answers.sort_by_key(|answer| ids.iter().position(|id| *id == answer.0));
        let failing = if block_bytes == 512 { 0 } else { 5 };
        for (k, (_, status, length)) in answers.into_iter().enumerate() {
            let expected = if k == failing { IOERR } else { OK };
            assert_eq!((status, length), (expected, 128 * 512 + 1), "request {k}");
        }
    }
}

#[test]
fn odd_requests_are_answered_without_the_drive() {
    let machine = Machine::new(config(4096));
    let guest = &machine.guest;
    let mut client = TestClient::new(guest, 0, true, 16);
    let mut group = machine.group(64);
    group.add(client.lane(guest, &Arc::new(machine.disk())));
    assert_eq!(client.run(guest, &mut group, GET_ID, 0, &[writable(DATA, 20)]), (OK, 21));
    assert_eq!(guest.read(DATA, 20), b"serial-0123456789abc");
    assert_eq!(client.run(guest, &mut group, 77, 0, &[]), (UNSUPP, 1));
    // 4Kn: a sector is not a block.
    assert_eq!(client.run(guest, &mut group, IN, 1, &[writable(DATA, 4096)]), (IOERR, 4097));
    assert_eq!(client.run(guest, &mut group, IN, 0, &[writable(DATA, 512)]), (IOERR, 513));
    assert_eq!(client.run(guest, &mut group, IN, 64 << 11, &[writable(DATA, 4096)]), (IOERR, 4097));
    assert_eq!(client.run(guest, &mut group, IN, (64 << 11) - 8, &[writable(DATA, 4096)]), (OK, 4097));
    let tally = client.counters.read();
    assert_eq!((tally.reads, tally.answered, tally.errors), (1, 5, 4));
}

#[test]
fn discarded_and_zeroed_blocks_read_as_zeroes() {
    let machine = Machine::new(config(512));
    let guest = &machine.guest;
    let mut client = TestClient::new(guest, 0, false, 16);
    let mut group = machine.group(64);
    group.add(client.lane(guest, &Arc::new(machine.disk())));
    let range = |sector: u64, sectors: u32, flags: u32| {
        [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
    };
    for (kind, flags) in [(WRITE_ZEROES, 0), (WRITE_ZEROES, 1), (DISCARD, 0)] {
        let data = pattern(3, 64 << 10);
        guest.write(DATA, &data);
        assert_eq!(client.run(guest, &mut group, OUT, 0, &[readable(DATA, 64 << 10)]).0, OK);
        guest.write(DATA, &[range(8, 8, flags), range(64, 1, flags), range(100, 20, flags)].concat());
        assert_eq!(client.run(guest, &mut group, kind, 0, &[readable(DATA, 48)]), (OK, 1));
        assert_eq!(client.run(guest, &mut group, IN, 0, &[writable(DATA, 64 << 10)]).0, OK);
        let back = guest.read(DATA, 64 << 10);
        for sector in 0..128 {
            let zeroed = (8..16).contains(&sector) || sector == 64 || (100..120).contains(&sector);
            let at = sector * 512..(sector + 1) * 512;
            let expected = if zeroed { &[0; 512][..] } else { &data[at.clone()] };
            assert!(back[at] == *expected, "kind {kind}, sector {sector}");
        }
    }
    let tally = client.counters.read();
    assert_eq!((tally.discards, tally.write_zeroes), (1, 2));
}

/// Writes with a lane in this mode, cuts the power, and says whether the data is still there. The data lies in pieces of
/// these lengths, by PRP only: in one, the write takes the fast path; in several, the slow one, or it is copied.
fn survives_a_power_cut(writeback: bool, flush_negotiated: bool, flush: bool, layout: &[u32]) -> bool {
    let machine = Machine::new(Config { sgl: false, ..config(512) });
    let data = pattern(9, 4096);
    {
        let guest = &machine.guest;
        let mut client = TestClient::new(guest, 0, false, 16);
        let mut group = machine.group(64);
        let mut disk = machine.disk();
        disk.writeback = Arc::new(AtomicBool::new(writeback));
        disk.features = if flush_negotiated { 1 << 9 } else { 0 };
        group.add(client.lane(guest, &Arc::new(disk)));
        let out = pieces(DATA, layout.iter().copied(), 8, false);
        scatter(guest, &out, &data);
        assert_eq!(client.run(guest, &mut group, OUT, 8, &out), (OK, 1));
        // What is no multiple of a block can only be copied.
        assert_eq!(client.counters.read().copies, u64::from(layout.iter().any(|bytes| bytes % 512 != 0)));
        if flush {
            assert_eq!(client.run(guest, &mut group, FLUSH, 0, &[]), (OK, 1));
            assert_eq!(client.counters.read().flushes, 1);
        }
        machine.sim.power_cut().unwrap();
    }
    let machine = machine.reopened();
    let guest = &machine.guest;
    let mut client = TestClient::new(guest, 0, false, 16);
    let mut group = machine.group(64);
    group.add(client.lane(guest, &Arc::new(machine.disk())));
    assert_eq!(client.run(guest, &mut group, IN, 8, &[writable(DATA, 4096)]), (OK, 4097));
    guest.read(DATA, 4096) == data
}

#[test]
fn durability_is_what_the_driver_was_promised() {
    for layout in [&[4096][..], &[512, 3584], &[100, 3996]] {
        assert!(
            !survives_a_power_cut(true, true, false, layout),
            "the cache of this controller has to lose data, else this proves nothing"
        );
        assert!(survives_a_power_cut(true, true, true, layout), "{layout:?}: a flush");
        assert!(survives_a_power_cut(false, true, false, layout), "{layout:?}: writethrough");
        assert!(survives_a_power_cut(true, false, false, layout), "{layout:?}: a driver that cannot flush");
    }
}

#[test]
fn a_small_queue_pair_serves_a_large_ring() {
    for packed in [false, true] {
        let machine = Machine::new(Config { sgl: false, ..config(512) });
        let guest = &machine.guest;
        let mut client = TestClient::new(guest, 0, packed, 256);
        let mut group = machine.group(4);
        group.add(client.lane(guest, &Arc::new(machine.disk())));
        let (mut sent, mut done) = (0, 0);
        while done < 2000 {
            while sent < 2000 {
                // Now and then one that takes many commands.
                let lengths = if sent % 50 == 0 { vec![512; 20] } else { vec![4096] };
                let data = pieces(DATA + 0x4000 * (sent % 500), lengths, 512, true);
                if client.send(guest, IN, 8 * (sent % 100), &data).is_none() {
                    break;
                }
                sent += 1;
            }
            let (_, status, _) = wait(&mut group, || client.answer(guest));
            assert_eq!(status, OK);
            done += 1;
        }
        assert_eq!(client.in_flight(), 0);
        let tally = client.counters.read();
        assert_eq!(tally.reads, 2000);
        assert!(tally.full > 0, "the pair was never full");
    }
}

#[test]
fn the_drives_errors_reach_their_requests_only() {
    let machine = Machine::new(config(512));
    let guest = &machine.guest;
    let mut client = TestClient::new(guest, 0, true, 64);
    let mut group = machine.group(64);
    group.add(client.lane(guest, &Arc::new(machine.disk())));
    machine.sim.faults().add(FaultRule {
        action: FaultAction::Fail(nvme_sim::Status::new(2, 0x81)),
        when: FaultMatch { blocks: Some(64..=71), ..FaultMatch::default() },
    });
    let ids: Vec<u16> =
        (0..16).map(|k| client.send(guest, IN, 8 * k, &[writable(DATA + 4096 * k, 4096)]).unwrap()).collect();
    for _ in 0..16 {
        let (id, status, length) = wait(&mut group, || client.answer(guest));
        let bad = id == ids[8];
        // The status byte lies behind the data: the length has to reach it, else a driver could not rely on it.
        assert_eq!((status, length), (if bad { IOERR } else { OK }, 4097));
    }
    assert_eq!(client.counters.read().errors, 1);
}

#[test]
fn lanes_that_share_a_queue_pair_get_their_own_answers() {
    let machine = Machine::new(config(512));
    let guest = &machine.guest;
    let mut group = machine.group(16);
    let disk = Arc::new(machine.disk());
    let mut clients: Vec<TestClient> = (0..3).map(|k| TestClient::new(guest, k, k == 1, 32)).collect();
    for client in &clients {
        group.add(client.lane(guest, &disk));
    }
    // Each sector says where it is.
    for sector in 0..300u64 {
        guest.write(DATA + 512 * sector, &pattern(sector, 512));
    }
    assert_eq!(clients[0].run(guest, &mut group, OUT, 0, &[readable(DATA, 300 * 512)]).0, OK);
    let mut expected = std::collections::HashMap::new();
    let mut random = Random::new(4);
    let mut done = 0;
    let mut sent = 0u64;
    while done < 3000 {
        for (k, client) in clients.iter_mut().enumerate() {
            let sector = random.below(300);
            let at = DATA + 0x10_0000 * (k as u64 + 1) + 512 * (sent % 1000);
            if let Some(id) = client.send(guest, IN, sector, &[writable(at, 512)]) {
                expected.insert((k, id), (sector, at));
                sent += 1;
            }
        }
        group.poll();
        for (k, client) in clients.iter_mut().enumerate() {
            while let Some((id, status, _)) = client.answer(guest) {
                assert_eq!(status, OK);
                let (sector, at) = expected.remove(&(k, id)).unwrap();
                assert!(guest.read(at, 512) == pattern(sector, 512), "lane {k} got another sector's data");
                done += 1;
            }
        }
    }
}

#[test]
fn one_call_per_batch_and_only_when_asked() {
    for packed in [false, true] {
        let machine = Machine::new(config(512));
        let guest = &machine.guest;
        let mut client = TestClient::new(guest, 0, packed, 64);
        let mut group = machine.group(64);
        group.add(client.lane(guest, &Arc::new(machine.disk())));
        assert_eq!(count(&client.call), 1, "at its start, for what the ring's last user may not have told");
        for round in 0..20 {
            let asked = round % 2 == 0;
            client.driver.ask_for_calls(guest, asked);
            for k in 0..10 {
                // Answered without the drive: all in one batch.
                client.send(guest, GET_ID, 0, &[writable(DATA + 32 * k, 20)]).unwrap();
            }
            group.poll();
            assert_eq!(count(&client.call), u64::from(asked));
            for _ in 0..10 {
                assert_eq!(client.answer(guest).unwrap().1, OK);
            }
        }
        let tally = client.counters.read();
        assert_eq!((tally.calls, tally.batches), (1 + 10, 20));
    }
}

#[test]
fn a_broken_ring_stops_its_lane_and_no_other() {
    for packed in [false, true] {
        let machine = Machine::new(config(512));
        let guest = &machine.guest;
        let mut group = machine.group(16);
        let disk = Arc::new(machine.disk());
        let (mut bad, mut good) = (TestClient::new(guest, 0, packed, 16), TestClient::new(guest, 1, packed, 16));
        let index = group.add(bad.lane(guest, &disk));
        let state = group.lane_mut(index).unwrap().state().clone();
        group.add(good.lane(guest, &disk));
        assert_eq!(bad.run(guest, &mut group, IN, 0, &[writable(DATA, 4096)]).0, OK);
        bad.send(guest, IN, 0, &[writable(DATA, 4096)]).unwrap();
        // A status nobody can write.
        bad.driver.add(guest, &[readable(0x1_0000, 16)], None).unwrap();
        bad.send(guest, IN, 0, &[writable(DATA, 4096)]).unwrap();
        for k in 0..50 {
            assert_eq!(good.run(guest, &mut group, IN, k, &[writable(DATA + 0x1_0000, 4096)]).0, OK);
        }
        assert!(state.broken());
        assert_eq!(count(&bad.error), 1, "told once");
        assert_eq!(count(&good.error), 0);
        let lane = group.lane_mut(index).unwrap();
        assert_eq!(lane.in_flight(), 0, "what the drive had is back");
        assert_eq!(bad.driver.in_flight(), 3, "nothing was answered after the break");
        assert_eq!(bad.counters.read().reads, 2, "nothing was taken after the break");
    }
}

/// Thousands of mad guests beside a sane one, on one queue pair: the sane one's data is right to the last byte, nothing
/// panics, and the drive is never asked to touch an address that is not mapped.
#[test]
fn mad_guests_do_not_disturb_a_sane_one() {
    let _ = env_logger::builder().is_test(true).filter_level(log::LevelFilter::Off).try_init();
    let machine = Machine::new(Config { sgl: true, ..config(512) });
    let guest = &machine.guest;
    let mut group = machine.group(64);
    let disk = Arc::new(machine.disk());
    let mut sane = TestClient::new(guest, 2, false, 16);
    group.add(sane.lane(guest, &disk));
    // The mad ones have their own memory, and their own tables do not know of the other's.
    let other = Guest::new(&[(0, 0x80_0000), (DATA, 0x10_0000)], Some(&DmaScope::new(machine.device.dma().clone())));
    let data = pattern(1, 8192);
    guest.write(DATA, &data);
    assert_eq!(sane.run(guest, &mut group, OUT, 0, &[readable(DATA, 8192)]).0, OK);
    let (mut broken, mut reads) = (0, 0);
    for seed in 0..2500u64 {
        let mut random = Random::new(seed);
        let packed = random.one_in(2);
        let mut mad = TestClient::new(&other, 0, packed, 8);
        let read_only = Arc::new(Disk { read_only: true, ..machine.disk() });
        let index = group.add(mad.lane(&other, &read_only));
        for _ in 0..6 {
            let bytes = 512 * (1 + random.below(16)) as u32;
            let at = DATA + random.below(0x10_0000 - 0x1000);
            let _ = mad.send(
                &other,
                [IN, IN, GET_ID, OUT][random.below(4) as usize],
                random.below(200),
                &[writable(at, bytes)],
            );
            for _ in 0..random.below(3) {
                let (from, bytes) =
                    [(0, Driver::bytes_needed(8)), (0x1_0000, 0x100), (0x2_0000, 0x100)][random.below(3) as usize];
                let value = [0, 0xff, 1, 2, 4, 0x80, 0x10, 0x7f][random.below(8) as usize];
                other.write(from + random.below(bytes), &[if random.one_in(2) { value } else { random.next() as u8 }]);
            }
            group.poll();
        }
        guest.write(DATA + 0x10_0000, &[0; 8192]);
        assert_eq!(sane.run(guest, &mut group, IN, 0, &[writable(DATA + 0x10_0000, 8192)]), (OK, 8193), "seed {seed}");
        assert!(guest.read(DATA + 0x10_0000, 8192) == data, "seed {seed}");
        let lane = group.lane_mut(index).unwrap();
        broken += u64::from(lane.state().broken());
        lane.begin_stop();
        let deadline = Instant::now() + DEADLINE;
        while group.remove_drained(index).is_none() {
            group.poll();
            assert!(Instant::now() < deadline, "seed {seed}: what was in flight never came back");
        }
        reads += mad.counters.read().reads;
    }
    println!("{broken} of 2500 broke their ring, {reads} reads got through");
    assert!(broken > 100 && reads > 2000);
    // The controller refuses what is not mapped for it: there was nothing of the kind.
    assert_eq!(machine.sim.counters().errors.load(Ordering::Relaxed), 0);
    assert!(guest.read(DATA, 8192) == data);
}

/// A lane that always has more requests than the shared queue pair has slots leaves the others their turn.
#[test]
fn a_busy_lane_does_not_starve_the_others_of_a_queue_pair() {
    let machine = Machine::new(Config { sgl: false, ..config(512) });
    let guest = &machine.guest;
    let mut group = machine.group(4);
    let disk = Arc::new(machine.disk());
    let (mut busy, mut calm) = (TestClient::new(guest, 0, false, 64), TestClient::new(guest, 1, true, 64));
    for client in [&busy, &calm] {
        group.add(client.lane(guest, &disk));
    }
    // Each takes more commands than there are slots, as PRPs cannot join such pieces.
    let many = pieces(DATA, vec![512; 20], 512, true);
    for round in 0..20 {
        calm.send(guest, IN, 0, &[writable(DATA + 0x100_0000, 512)]).unwrap();
        let mut before = 0;
        loop {
            while busy.send(guest, IN, 0, &many).is_some() {}
            group.poll();
            while busy.answer(guest).is_some() {
                before += 1;
            }
            if calm.answer(guest).is_some() {
                break;
            }
            assert!(before < 200, "round {round}: {before} requests of the busy lane went first");
            std::thread::yield_now();
        }
    }
}
