//! Sessions over their sockets, against the embedded controller: messages in every order, memory that comes and goes,
//! front-ends that come and go.

mod common;

use std::os::fd::AsRawFd;

use common::served::*;
use common::*;

#[test]
fn a_disk_is_written_and_read() {
    let served = with_cache();
    let front = served.connect();
    front.negotiate();
    let region = Region::new(0, MIB);
    let mut ring = Ring::first(&front, &region);
    (0..20).for_each(|at| ring.check_io(at * 64));
    assert_eq!(ring.flush(), 0);
    ring.stop(&front);
    let totals = served.target.totals();
    assert_eq!((totals.reads, totals.writes, totals.flushes, totals.errors, totals.copies), (20, 20, 1, 0, 0));
}

#[test]
fn what_is_offered() {
    let served = serve(1, |_, export| export.queues = 7);
    let front = served.connect();
    // MQ, REPLY_ACK, BACKEND_REQ, CONFIG, INFLIGHT_SHMFD, RESET_DEVICE, CONFIGURE_MEM_SLOTS; no log of written pages.
    assert_eq!(front.ask_u64(GET_PROTOCOL_FEATURES), 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 15);
    let features = front.ask_u64(GET_FEATURES);
    front.negotiate();
    // SEG_MAX, BLK_SIZE, TOPOLOGY, MQ, INDIRECT, EVENT_IDX, protocol features, VERSION_1, PACKED.
    let always = 1 << 2 | 1 << 6 | 1 << 10 | 1 << 12 | 1 << 28 | 1 << 29 | 1 << 30 | 1 << 32 | 1 << 34;
    assert_eq!(features & always, always);
    assert_eq!(features & 1 << 5, 0, "not read-only");
    assert_eq!(front.ask_u64(GET_QUEUE_NUM), 7);
    assert_eq!(front.ask_u64(GET_MAX_MEM_SLOTS), 509);
    assert_eq!(front.config(0, 8), (64 * MIB / 512).to_le_bytes());
    assert_eq!(front.config(34, 2), 7u16.to_le_bytes());
    assert_eq!(front.config(0, 256).len(), 256);
    let seg_max = u32::from_le_bytes(front.config(12, 4).try_into().unwrap());
    assert!(seg_max >= 512);
}

#[test]
fn every_order_of_the_messages() {
    let served = one();
    // Memory, size, addresses, kick, enable: 120 orders, each a session of its own.
    let mut orders: Vec<Vec<usize>> = vec![vec![]];
    for _ in 0..5 {
        orders = orders
            .iter()
            .flat_map(|order| {
                (0..5)
                    .filter(|step| !order.contains(step))
                    .map(|step| [&order[..], &[step]].concat())
                    .collect::<Vec<_>>()
            })
            .collect();
    }
    assert_eq!(orders.len(), 120);
    for order in orders {
        let front = served.connect();
        front.negotiate();
        let region = Region::new(0, MIB);
        let mut ring = Ring::new(&region, 1, 0x20000);
        for step in &order {
            match step {
                0 => region.add(&front),
                1 => front.set_ring(SET_VRING_NUM, 1, ring.size.into()),
                2 => front.accept(SET_VRING_ADDR, &ring.addresses(), &[]),
                3 => ring.set_event(&front, SET_VRING_KICK, Some(&ring.kick)),
                _ => ring.enable(&front, true),
            }
        }
        ring.check_io(8);
        ring.stop(&front);
    }
}

#[test]
fn without_protocol_features_rings_are_enabled_from_the_start() {
    let served = one();
    let front = served.connect();
    let features = front.ask_u64(GET_FEATURES) & !(F_PROTOCOL_FEATURES | F_EVENT_IDX | F_RING_PACKED);
    front.send(SET_OWNER, 0, &[], &[]);
    front.send(SET_FEATURES, 0, &features.to_ne_bytes(), &[]);
    let region = Region::new(0, MIB);
    let (body, fds) = table(&[&region]);
    front.send(SET_MEM_TABLE, 0, &body, &fds);
    let mut ring = Ring::new(&region, 0, 0x10000);
    front.send(SET_VRING_NUM, 0, &state(0, 64), &[]);
    front.send(SET_VRING_BASE, 0, &state(0, 0), &[]);
    front.send(SET_VRING_ADDR, 0, &ring.addresses(), &[]);
    front.send(SET_VRING_KICK, 0, &0u64.to_ne_bytes(), &[ring.kick.as_raw_fd()]);
    ring.check_io(0);
    ring.stop(&front);
}

#[test]
fn a_disabled_ring_rests_and_goes_on() {
    let served = one();
    let front = served.connect();
    front.negotiate();
    let region = Region::new(0, MIB);
    let mut ring = Ring::first(&front, &region);
    ring.check_io(0);
    ring.enable(&front, false);
    ring.submit(4, 0, (0, 0));
    // Another ring answers meanwhile, so the worker had its chance.
    let mut other = Ring::new(&region, 1, 0x20000);
    other.start(&front);
    (0..50).for_each(|at| other.check_io(at));
    assert_eq!(ring.poll(), None, "a disabled ring is not processed");
    ring.enable(&front, true);
    assert_eq!(ring.wait(), 0);
    ring.check_io(8);
    // Enabling what is enabled changes nothing.
    ring.enable(&front, true);
    ring.check_io(16);
    ring.stop(&front);
}

#[test]
fn a_stopped_ring_goes_on_where_it_was() {
    let served = one();
    let front = served.connect();
    front.negotiate();
    let region = Region::new(0, MIB);
    region.add(&front);
    let mut ring = Ring::new(&region, 0, 0x10000);
    for round in 0..5 {
        ring.start(&front);
        ring.check_io(round * 8);
        ring.stop(&front);
        ring.stop(&front);
    }
}

#[test]
fn descriptors_change_under_a_running_ring() {
    let served = one();
    let front = served.connect();
    front.negotiate();
    let region = Region::new(0, MIB);
    let mut ring = Ring::first(&front, &region);
    ring.check_io(0);
    // No call descriptor: the guest polls.
    ring.set_event(&front, SET_VRING_CALL, None);
    let _ = ring.call.read();
    ring.check_io(8);
    assert!(ring.call.read().is_err(), "nobody is called");
    let call = vmm_sys_util::eventfd::EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
    ring.set_event(&front, SET_VRING_CALL, Some(&call));
    ring.check_io(16);
    eventually("the new call descriptor is written", || call.read().is_ok());
    // A new kick, an error descriptor, and a kick by polling.
    ring.kick = vmm_sys_util::eventfd::EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
    ring.set_event(&front, SET_VRING_KICK, Some(&ring.kick));
    ring.set_event(&front, SET_VRING_ERR, Some(&call));
    ring.check_io(24);
    ring.set_event(&front, SET_VRING_KICK, None);
    ring.check_io(32);
    ring.stop(&front);
}

#[test]
fn memory_comes_while_rings_run() {
    let served = one();
    let front = served.connect();
    front.negotiate();
    let region = Region::new(0, MIB);
    let mut ring = Ring::first(&front, &region);
    // Requests run all the time; each new region is used at once.
    let mut regions = Vec::new();
    for number in 0..20u64 {
        ring.submit(4, 0, (0, 0));
        let more = Region::new(0x1000_0000 + number * MIB, MIB);
        more.add(&front);
        assert_eq!(ring.wait(), 0);
        assert_eq!(ring.request(0, 0, (more.guest + 0x5000, 8192)), 0, "read into region {number}");
        regions.push(more);
    }
    // And it goes again, whether the message has a descriptor or not.
    for (number, region) in regions.iter().enumerate() {
        ring.submit(4, 0, (0, 0));
        let descriptor = [region.file.as_raw_fd()];
        front.accept(REM_MEM_REG, &region.single(), if number % 2 == 0 { &descriptor } else { &[] });
        assert_eq!(ring.wait(), 0);
        assert_ne!(ring.request(0, 0, (region.guest + 0x5000, 8192)), 0, "region {number} is gone");
        ring.check_io(8);
    }
    ring.stop(&front);
}

#[test]
fn a_whole_new_table_while_rings_run() {
    let served = one();
    let front = served.connect();
    front.negotiate();
    let (first, second) = (Region::new(0, MIB), Region::new(0x4000_0000, MIB));
    let (body, fds) = table(&[&first]);
    front.accept(SET_MEM_TABLE, &body, &fds);
    let mut ring = Ring::new(&first, 0, 0x10000);
    ring.start(&front);
    ring.check_io(0);
    let (body, fds) = table(&[&first, &second]);
    front.accept(SET_MEM_TABLE, &body, &fds);
    assert_eq!(ring.request(0, 0, (second.guest, 4096)), 0);
    let (body, fds) = table(&[&first]);
    front.accept(SET_MEM_TABLE, &body, &fds);
    assert_ne!(ring.request(0, 0, (second.guest, 4096)), 0);
    ring.check_io(8);
    // The ring's own memory goes: it waits, and goes on when it is back.
    let (body, fds) = table(&[&second]);
    front.accept(SET_MEM_TABLE, &body, &fds);
    ring.submit(4, 0, (0, 0));
    let (body, fds) = table(&[&second, &first]);
    assert_eq!(ring.poll(), None);
    front.accept(SET_MEM_TABLE, &body, &fds);
    assert_eq!(ring.wait(), 0);
    ring.stop(&front);
}

#[test]
fn hundreds_of_regions() {
    let served = one();
    let front = served.connect();
    front.negotiate();
    let slots = front.ask_u64(GET_MAX_MEM_SLOTS);
    let regions: Vec<Region> = (0..slots).map(|number| Region::new(number * MIB, 0x40000)).collect();
    regions.iter().for_each(|region| region.add(&front));
    let mut ring = Ring::new(regions.last().unwrap(), 0, (slots - 1) * MIB);
    ring.start(&front);
    ring.check_io(0);
    for region in &regions {
        assert_eq!(ring.request(0, 0, (region.guest + 0x20000, 4096)), 0);
    }
    front.refuse(ADD_MEM_REG, &Region::new(slots * MIB, MIB).single(), &[regions[0].file.as_raw_fd()]);
    ring.check_io(8);
}

#[test]
fn a_hundred_front_ends_one_after_the_other() {
    let served = one();
    for number in 0..100u64 {
        let front = served.connect();
        front.negotiate();
        let region = Region::new(0, MIB);
        region.add(&front);
        let mut rings: Vec<Ring> = (0..4).map(|index| Ring::new(&region, index, u64::from(index) * 0x10000)).collect();
        for ring in &mut rings {
            ring.start(&front);
            ring.check_io(number);
        }
        match number % 3 {
            0 => rings.iter().for_each(|ring| ring.stop(&front)),
            // It dies with requests under way.
            1 => rings.iter_mut().for_each(|ring| ring.submit(0, 0, (ring.data(), 4096))),
            _ => {}
        }
    }
    assert_eq!(served.target.totals().errors, 0);
}

#[test]
fn reset_device_begins_anew_and_keeps_memory() {
    let served = one();
    let front = served.connect();
    front.negotiate();
    let region = Region::new(0, MIB);
    region.add(&front);
    for round in 0..3 {
        let mut ring = Ring::new(&region, 0, 0x10000);
        ring.start(&front);
        ring.check_io(round);
        ring.submit(4, 0, (0, 0));
        front.accept(RESET_DEVICE, &[], &[]);
        assert!(matches!(ring.poll(), Some(0) | None), "finished, or not begun");
        assert_eq!(front.vring_base(0), 0);
        ring.submit(4, 0, (0, 0));
        // Nothing runs after a reset until everything is told again.
        ring.enable(&front, true);
        ring.set_event(&front, SET_VRING_KICK, Some(&ring.kick));
        assert_eq!(ring.poll(), None);
        front.accept(RESET_DEVICE, &[], &[]);
    }
}

#[test]
fn reset_owner_disables_the_rings() {
    let served = one();
    let front = served.connect();
    front.negotiate();
    let region = Region::new(0, MIB);
    let mut ring = Ring::first(&front, &region);
    ring.check_io(0);
    front.accept(RESET_OWNER, &[], &[]);
    ring.start(&front);
    ring.check_io(8);
    ring.stop(&front);
}

#[test]
fn the_write_cache_mode() {
    let served = with_cache();
    let front = served.connect();
    let features = front.negotiate();
    assert_ne!(features & F_FLUSH, 0, "the embedded controller has a volatile write cache");
    assert_eq!(front.config(32, 1), [1]);
    front.accept(SET_CONFIG, &config(32, &[0]), &[]);
    assert_eq!(front.config(32, 1), [0]);
    let region = Region::new(0, MIB);
    let mut ring = Ring::first(&front, &region);
    ring.check_io(0);
    front.accept(SET_CONFIG, &config(32, &[1]), &[]);
    ring.check_io(8);
    front.refuse(SET_CONFIG, &config(32, &[2]), &[]);
    front.refuse(SET_CONFIG, &config(0, &[1]), &[]);
    assert_eq!(front.config(32, 1), [1]);
    front.accept(SET_CONFIG, &config(32, &[0]), &[]);
    front.accept(RESET_DEVICE, &[], &[]);
    assert_eq!(front.config(32, 1), [0], "a driver that does not look after a reset counts on what it chose");
}

#[test]
fn a_switch_to_writethrough_makes_earlier_writes_durable() {
    // With a queue pair to spare for the flush, and without.
    for pairs in [8, 1] {
        let folder = tempfile::tempdir().unwrap();
        let namespace = nvme_sim::NamespaceConfig { bytes: 64 * MIB, ..Default::default() };
        let config = nvme_sim::Config {
            namespaces: vec![namespace],
            volatile_write_cache: true,
            max_queue_pairs: pairs,
            ..Default::default()
        };
        let simulator = nvme_sim::Simulator::start(config, &folder.path().join("nvme")).unwrap();
        let device: vhost_blk::drive::DeviceAddress =
            format!("vfio-user:{}", simulator.socket().display()).parse().unwrap();
        let served = serve(1, |_, export| export.device = device.clone());
        let front = served.connect();
        front.negotiate();
        let region = Region::new(0, MIB);
        let mut ring = Ring::first(&front, &region);
        assert_eq!(ring.write_one(8), 0);
        front.accept(SET_CONFIG, &common::config(32, &[0]), &[]);
        assert_eq!(ring.write_one(16), 0);
        assert_eq!(simulator.power_cut().unwrap(), 0, "{pairs} queue pairs: blocks lost");
    }
}

#[test]
fn two_exports_on_one_controller() {
    let served = serve(2, |number, export| export.read_only = number == 1);
    let (writer, reader) = (Front::connect(&served.socket(0)), Front::connect(&served.socket(1)));
    writer.negotiate();
    reader.negotiate();
    // Both guests have memory at guest address 0.
    let (write_region, read_region) = (Region::new(0, MIB), Region::new(0, MIB));
    write_region.add(&writer);
    read_region.add(&reader);
    let mut write_ring = Ring::new(&write_region, 0, 0x10000);
    let mut read_ring = Ring::new(&read_region, 0, 0x10000);
    write_ring.start(&writer);
    read_ring.start(&reader);
    for sector in (0..80).step_by(8) {
        write_ring.check_io(sector);
        assert_eq!(read_ring.read_one(sector), 0);
        use vm_memory::{Bytes, GuestAddress};
        let (mut written, mut read) = (vec![0; 4096], vec![0; 4096]);
        write_region.memory.read_slice(&mut written, GuestAddress(write_ring.data())).unwrap();
        read_region.memory.read_slice(&mut read, GuestAddress(read_ring.data())).unwrap();
        assert!(written == read, "the same namespace");
    }
    drop(writer);
    assert_eq!(read_ring.read_one(0), 0, "one guest goes, the other stays");
}

#[test]
fn more_rings_than_queue_pairs() {
    const RINGS: u32 = 80;
    let served = serve(1, |_, export| export.queues = RINGS as u16);
    let front = served.connect();
    front.negotiate();
    let region = Region::new(0, 0x10000 * u64::from(RINGS));
    region.add(&front);
    let mut rings: Vec<Ring> = (0..RINGS).map(|index| Ring::new(&region, index, u64::from(index) * 0x10000)).collect();
    for round in 0..2 {
        rings.iter().for_each(|ring| ring.start(&front));
        for (number, ring) in rings.iter_mut().enumerate() {
            ring.check_io(number as u64 * 8 + round);
        }
        // All at once, too.
        rings.iter_mut().for_each(|ring| ring.submit(4, 0, (0, 0)));
        rings.iter_mut().for_each(|ring| assert_eq!(ring.wait(), 0));
        rings.iter().for_each(|ring| ring.stop(&front));
    }
}

#[test]
fn blocks_of_4096_bytes() {
    let served = serve(1, |_, export| export.device = "sim:64M,lba=4096".parse().unwrap());
    let front = served.connect();
    front.negotiate();
    assert_eq!(front.config(20, 4), 4096u32.to_le_bytes());
    let region = Region::new(0, MIB);
    let mut ring = Ring::first(&front, &region);
    ring.check_io(8);
    assert_eq!(ring.read_one(1), 1, "not a multiple of the block");
}

#[test]
fn stopping_the_target_finishes_requests() {
    let served = one();
    let front = served.connect();
    front.negotiate();
    let region = Region::new(0, MIB);
    let mut ring = Ring::first(&front, &region);
    ring.check_io(0);
    ring.submit(4, 0, (0, 0));
    let Served { target, folder } = served;
    target.stop().unwrap();
    assert!(matches!(ring.poll(), Some(0) | None));
    front.wait_for_end();
    assert!(!folder.path().join("0").exists(), "the socket is removed");
}

/// A ring goes on from what is in the log, whatever base the front-end believes in, and does first what the log says was
/// taken: here as a process would have left it that was killed after it had taken a request.
#[test]
fn a_ring_goes_on_from_its_log() {
    use std::os::unix::fs::FileExt;
    let served = one();
    let region = Region::new(0, MIB);
    let mut ring = Ring::new(&region, 2, 0x10000);
    let told = inflight(0, 3, ring.size);
    let (told, log) = {
        let front = served.connect();
        front.negotiate();
        let (told, file) = front.ask_file(GET_INFLIGHT_FD, &told);
        assert!(number(&told[..8]) <= file.metadata().unwrap().len());
        (told, file)
    };
    let start = |ring: &Ring| {
        let front = served.connect();
        front.negotiate();
        front.accept(SET_INFLIGHT_FD, &told, &[log.as_raw_fd()]);
        region.add(&front);
        ring.start(&front);
        front
    };
    let front = start(&ring);
    ring.check_io(0);
    front.refuse(SET_INFLIGHT_FD, &told, &[log.as_raw_fd()]);
    drop(front);
    // Requests are counted just after they are answered.
    let counted = |reads| eventually("they are counted", || served.target.totals().reads == reads);
    let reads = 1;
    counted(reads);
    // Put on the ring while nobody serves it, and taken by nobody but the log.
    let data = (ring.data(), 4096);
    ring.submit(0, 0, data);
    let of_ring = 2 * number(&told[..8]) / 3;
    let mut state = [0; 8];
    log.read_exact_at(&mut state, of_ring + 8).unwrap();
    assert_eq!(state, [1, 0, 64, 0, 0, 0, 2, 0], "version, size, last head, used index");
    log.write_all_at(&[1], of_ring + 16).unwrap();
    // The base that a front-end tells after a crash may be any.
    let base = std::mem::replace(&mut ring.next, 7);
    let front = start(&ring);
    ring.next = base;
    assert_eq!(ring.wait(), 0, "it is done");
    counted(reads + 1);
    ring.check_io(8);
    // Once: each check reads once.
    counted(reads + 2);
    assert_eq!(front.vring_base(2), ring.position());
    // A device that is reset forgets.
    front.accept(RESET_DEVICE, &[], &[]);
    log.read_exact_at(&mut state, of_ring + 8).unwrap();
    assert_eq!(state, [0; 8]);
}

/// The process before may have died between an answer and the word of it.
#[test]
fn a_ring_that_goes_on_from_its_log_notifies_at_once() {
    let served = one();
    let region = Region::new(0, MIB);
    let mut ring = Ring::new(&region, 0, 0x10000);
    let told = inflight(0, 1, ring.size);
    let front = served.connect();
    front.negotiate();
    let (told, log) = front.ask_file(GET_INFLIGHT_FD, &told);
    front.accept(SET_INFLIGHT_FD, &told, &[log.as_raw_fd()]);
    region.add(&front);
    ring.start(&front);
    ring.check_io(0);
    drop(front);
    let front = served.connect();
    front.negotiate();
    front.accept(SET_INFLIGHT_FD, &told, &[log.as_raw_fd()]);
    region.add(&front);
    front.set_ring(SET_VRING_NUM, 0, ring.size.into());
    front.set_ring(SET_VRING_BASE, 0, ring.next.into());
    front.accept(SET_VRING_ADDR, &ring.addresses(), &[]);
    ring.set_event(&front, SET_VRING_CALL, Some(&ring.call));
    ring.enable(&front, true);
    let _ = ring.call.read();
    // It runs from here on; nothing is asked of it.
    ring.set_event(&front, SET_VRING_KICK, Some(&ring.kick));
    eventually("the notification", || ring.call.read().is_ok());
}

#[test]
fn logs_that_cannot_be_used_are_refused() {
    let served = one();
    let front = served.connect();
    front.negotiate();
    let region = Region::new(0, MIB);
    let file = &region.file;
    for bad in [inflight(MIB + 4096, 1, 64), inflight(0, 1, 64), inflight(u64::MAX, 1, 64)] {
        front.refuse(SET_INFLIGHT_FD, &bad, &[file.as_raw_fd()]);
    }
    // Longer than any log.
    let huge = tempfile::tempfile().unwrap();
    huge.set_len(1 << 40).unwrap();
    front.refuse(SET_INFLIGHT_FD, &inflight(1 << 40, 1, 64), &[huge.as_raw_fd()]);
    // Too small for the ring: that runs without.
    front.accept(SET_INFLIGHT_FD, &inflight(64, 1, 64), &[file.as_raw_fd()]);
    let mut ring = Ring::first(&front, &region);
    ring.check_io(0);
    ring.stop(&front);
    // More rings than are offered: the reply cannot say no.
    assert_eq!(front.ask(GET_INFLIGHT_FD, &inflight(0, 5, 64)), None);
}
