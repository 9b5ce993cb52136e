//! What a front-end or a guest gets wrong: it is told, and nothing else is lost.

mod common;

use std::os::fd::AsRawFd;

use common::served::*;
use common::*;

#[test]
fn memory_that_cannot_be_is_refused() {
    let served = one();
    let front = served.connect();
    front.negotiate();
    let region = Region::new(MIB, MIB);
    region.add(&front);
    let add = |region: &Region| (region.single(), [region.file.as_raw_fd()]);
    // Overlapping, also another place of the same file, and the same place of another; longer than its file; not at a page;
    // without a descriptor.
    let (mut body, fd) = add(&region);
    body[32..].copy_from_slice(&0x1000u64.to_ne_bytes());
    region.file.set_len(2 * MIB).unwrap();
    front.refuse(ADD_MEM_REG, &body, &fd);
    for guest in [MIB, MIB + 0x1000] {
        let overlapping = Region::new(guest, MIB);
        let (body, fd) = add(&overlapping);
        front.refuse(ADD_MEM_REG, &body, &fd);
    }
    let short = Region::new(16 * MIB, MIB);
    short.file.set_len(0x1000).unwrap();
    let (body, fd) = add(&short);
    front.refuse(ADD_MEM_REG, &body, &fd);
    let mut crooked = Region::new(32 * MIB, MIB);
    crooked.guest += 0x800;
    let (body, fd) = add(&crooked);
    front.refuse(ADD_MEM_REG, &body, &fd);
    front.refuse(ADD_MEM_REG, &Region::new(64 * MIB, MIB).single(), &[]);
    front.refuse(REM_MEM_REG, &Region::new(64 * MIB, MIB).single(), &[]);
    // The same once more is no other one.
    region.add(&front);
    // What was there works.
    let mut ring = Ring::new(&region, 0, MIB);
    ring.start(&front);
    ring.check_io(0);
}

#[test]
fn a_read_only_disk() {
    let served = serve(1, |_, export| export.read_only = true);
    let front = served.connect();
    assert_ne!(front.negotiate() & 1 << 5, 0);
    let region = Region::new(0, MIB);
    let mut ring = Ring::first(&front, &region);
    assert_eq!(ring.write_one(0), 1, "IOERR");
    assert_eq!(ring.read_one(0), 0);
    front.refuse(SET_CONFIG, &config(32, &[0]), &[]);
}

#[test]
fn wrong_messages_are_refused_and_nothing_is_lost() {
    let served = one();
    let front = served.connect();
    front.negotiate();
    let region = Region::new(0, MIB);
    let mut ring = Ring::first(&front, &region);
    ring.check_io(0);
    let event = ring.kick.as_raw_fd();
    let (_pipe, pipe) = std::io::pipe().unwrap();

    // Of a ring that does not exist, a running one, or with values that cannot be.
    front.refuse(SET_VRING_NUM, &state(4, 64), &[]);
    front.refuse(SET_VRING_NUM, &state(u32::MAX, 64), &[]);
    front.refuse(SET_VRING_NUM, &state(0, 64), &[]);
    front.refuse(SET_VRING_NUM, &state(1, 0), &[]);
    front.refuse(SET_VRING_NUM, &state(1, 512), &[]);
    front.refuse(SET_VRING_NUM, &state(1, 65536 + 64), &[]);
    front.refuse(SET_VRING_BASE, &state(0, 0), &[]);
    front.refuse(SET_VRING_BASE, &state(9, 0), &[]);
    front.refuse(SET_VRING_ENABLE, &state(4, 1), &[]);
    front.refuse(SET_VRING_ENABLE, &state(0, 2), &[]);
    let moved = Ring::new(&region, 0, 0x20000);
    front.refuse(SET_VRING_ADDR, &moved.addresses(), &[]);
    let mut crooked = Ring::new(&region, 1, 0x20000).addresses();
    crooked[8] |= 1;
    front.refuse(SET_VRING_ADDR, &crooked, &[]);
    let mut logged = Ring::new(&region, 1, 0x20000).addresses();
    logged[4] = 1;
    front.refuse(SET_VRING_ADDR, &logged, &[]);
    // Descriptors: too few, too many, of the wrong kind.
    front.refuse(SET_VRING_KICK, &0u64.to_ne_bytes(), &[]);
    front.refuse(SET_VRING_KICK, &0x100u64.to_ne_bytes(), &[event]);
    front.refuse(SET_VRING_CALL, &1u64.to_ne_bytes(), &[event, event]);
    front.refuse(SET_VRING_CALL, &1u64.to_ne_bytes(), &[pipe.as_raw_fd()]);
    front.refuse(SET_VRING_ERR, &200u64.to_ne_bytes(), &[event]);
    front.refuse(SET_VRING_NUM, &state(1, 64), &[event]);
    // Wrong lengths.
    front.refuse(SET_VRING_NUM, &[0; 4], &[]);
    front.refuse(SET_VRING_ADDR, &[0; 100], &[]);
    front.refuse(SET_OWNER, &[0; 8], &[]);
    front.refuse(SET_MEM_TABLE, &[0; 8], &[]);
    front.refuse(SET_MEM_TABLE, &[0xff; 64], &[event]);
    front.refuse(SET_CONFIG, &[0; 3], &[]);
    // What is not offered, and what nobody knows.
    front.refuse(SET_FEATURES, &u64::MAX.to_ne_bytes(), &[]);
    front.refuse(SET_PROTOCOL_FEATURES, &u64::MAX.to_ne_bytes(), &[]);
    front.negotiate();
    front.refuse(SEND_RARP, &0u64.to_ne_bytes(), &[]);
    front.refuse(1000, &[7; 4000], &[event]);
    front.refuse(0, &[], &[]);
    assert!(front.config(0, 4000).is_empty(), "no configuration there");
    // The ring has not noticed any of it.
    ring.check_io(8);
    ring.stop(&front);
}

#[test]
fn messages_beyond_repair_end_the_connection_only() {
    let served = one();
    let messages: [&dyn Fn(&Front); 6] = [
        // Version 2; a body longer than any; a header that stops short; questions that cannot be answered.
        &|front| front.raw(&[&1u32.to_ne_bytes()[..], &2u32.to_ne_bytes(), &0u32.to_ne_bytes()].concat()),
        &|front| front.raw(&[&1u32.to_ne_bytes()[..], &1u32.to_ne_bytes(), &u32::MAX.to_ne_bytes()].concat()),
        &|front| front.raw(&[0; 5]),
        &|front| front.send(GET_VRING_BASE, 0, &state(77, 0), &[]),
        &|front| front.send(GET_INFLIGHT_FD, 0, &[0; 24], &[]),
        &|front| front.send(GET_QUEUE_NUM, 0, &[0; 8], &[]),
    ];
    for message in messages {
        let front = served.connect();
        front.negotiate();
        message(&front);
        front.wait_for_end();
        let next = served.connect();
        next.negotiate();
        let region = Region::new(0, MIB);
        region.add(&next);
        let mut ring = Ring::new(&region, 0, 0x10000);
        ring.start(&next);
        ring.check_io(0);
    }
}

#[test]
fn a_refusal_that_cannot_be_said_ends_the_connection_only() {
    let served = one();
    let region = Region::new(0, MIB);
    let overlapping = Region::new(0x1000, MIB);
    let fd = [overlapping.file.as_raw_fd()];
    let single = overlapping.single();
    let messages: [(u32, u32, &[u8], &[std::os::fd::RawFd]); 7] = [
        (ADD_MEM_REG, 0, &single, &fd),
        (REM_MEM_REG, 0, &single, &[]),
        (SET_VRING_NUM, 0, &state(0, 512), &[]),
        (SET_VRING_NUM, 0, &[0; 4], &[]),
        (SET_CONFIG, 0, &config(0, &[1]), &[]),
        (SEND_RARP, 0, &[0; 8], &[]),
        (1000, 0, &[7; 4000], &fd),
    ];
    for (request, flags, body, fds) in messages {
        let front = served.connect();
        front.negotiate();
        region.add(&front);
        front.send(request, flags, body, fds);
        front.wait_for_end();
    }
    // An acknowledgement is asked for, and none was agreed on.
    let front = served.connect();
    assert_ne!(front.ask_u64(GET_FEATURES), 0);
    front.send(SET_VRING_NUM, NEED_REPLY, &state(0, 512), &[]);
    front.wait_for_end();
    // Agreed on without a look at the features, which the acknowledgement depends on.
    let front = served.connect();
    front.send(SET_PROTOCOL_FEATURES, 0, &(1u64 << 3).to_ne_bytes(), &[]);
    front.send(SET_VRING_NUM, NEED_REPLY, &state(0, 512), &[]);
    front.wait_for_end();
    // The next one has its disk.
    let next = served.connect();
    next.negotiate();
    Ring::first(&next, &region).check_io(0);
}

#[test]
fn a_configuration_space_counted_from_virtio_mmio() {
    let served = with_cache();
    let front = served.connect();
    front.negotiate();
    assert_eq!(front.config(0x100, 60), front.config(0, 60));
    assert_eq!(front.config(0x100, 8), (64 * MIB / 512).to_le_bytes());
    front.accept(SET_CONFIG, &config(0x100 + 32, &[0]), &[]);
    assert_eq!((front.config(0x100 + 32, 1), front.config(32, 1)), (vec![0], vec![0]));
    assert!(front.config(0x80, 0x100).is_empty() && front.config(0x200, 8).is_empty());
}

#[test]
fn a_ring_outside_memory_waits_and_one_that_cannot_be_is_told() {
    let served = one();
    let front = served.connect();
    front.negotiate();
    let region = Region::new(0, MIB);
    region.add(&front);
    // Its descriptors begin inside and end outside.
    let mut ring = Ring::new(&region, 0, 0x10000);
    let outside = Region::new(0x100000 - 0x1000, 0x40000);
    let crossing = Ring::new(&outside, 1, 0x100000 - 0x200);
    let error = vmm_sys_util::eventfd::EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
    crossing.set_event(&front, SET_VRING_ERR, Some(&error));
    crossing.enable(&front, true);
    front.set_ring(SET_VRING_NUM, 1, 64);
    let mut addresses = ring.addresses();
    addresses[..4].copy_from_slice(&1u32.to_ne_bytes());
    addresses[8..16].copy_from_slice(&(0x100000u64 - 0x200 + USER).to_ne_bytes());
    front.accept(SET_VRING_ADDR, &addresses, &[]);
    front.refuse(SET_VRING_KICK, &1u64.to_ne_bytes(), &[crossing.kick.as_raw_fd()]);
    assert_eq!(error.read().unwrap(), 1);
    // Others are not concerned, and the ring works once it is where it should be.
    ring.start(&front);
    ring.check_io(0);
    front.vring_base(1);
    let mut mended = Ring::new(&region, 1, 0x40000);
    mended.start(&front);
    mended.check_io(64);
}

#[test]
fn a_broken_ring_rests_until_it_is_stopped_or_reset() {
    let served = one();
    let front = served.connect();
    front.negotiate();
    let (region, spare) = (Region::new(0, MIB), Region::new(0x4000_0000, MIB));
    region.add(&front);
    for reset in [false, true] {
        let error = vmm_sys_util::eventfd::EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
        let (mut ring, mut other) = (Ring::new(&region, 0, 0x10000), Ring::new(&region, 1, 0x20000));
        ring.set_event(&front, SET_VRING_ERR, Some(&error));
        ring.start(&front);
        other.start(&front);
        ring.check_io(0);
        ring.break_it();
        eventually("the front-end is told", || error.read().is_ok());
        // Neither memory that comes and goes nor a pause mends it, and nobody else is concerned.
        spare.add(&front);
        front.accept(REM_MEM_REG, &spare.single(), &[]);
        ring.enable(&front, false);
        ring.enable(&front, true);
        other.check_io(8);
        assert!(error.read().is_err(), "it is told once");
        assert_eq!(ring.poll(), None);
        if reset {
            front.accept(RESET_DEVICE, &[], &[]);
        } else {
            front.vring_base(0);
            front.vring_base(1);
        }
        let mut ring = Ring::new(&region, 0, 0x10000);
        ring.start(&front);
        ring.check_io(16);
        front.vring_base(0);
    }
}

#[test]
fn front_ends_that_leave_in_the_middle_of_a_header_hold_nobody_up() {
    let served = one();
    let start = std::time::Instant::now();
    for _ in 0..20 {
        served.connect().raw(&[1, 0, 0, 0, 1, 0]);
    }
    served.connect().negotiate();
    // Each could hold them up for a second.
    assert!(start.elapsed() < std::time::Duration::from_secs(15), "{:?}", start.elapsed());
}
