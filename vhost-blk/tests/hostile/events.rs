//! Descriptors that the hostile shares with the program, and makes as blocking as it can.

use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{read, write};
use rustix::process::Signal;

use crate::common::raw::*;
use crate::common::*;
use crate::stand::*;

/// The most a counter holds; another signal by `write` waits for a reader.
const FULL: u64 = u64::MAX - 1;

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

fn set(front: &Front, request: u32, ring: u32, event: &OwnedFd) {
    front.accept(request, &u64::from(ring).to_ne_bytes(), &[event.as_raw_fd()]);
}

fn fill(event: &OwnedFd) {
    eventually("its counter is full", || {
        // What it says until now leaves too little room.
        let _ = read(event, &mut [0; 8]);
        write(event, &FULL.to_ne_bytes()).is_ok()
    });
}

/// Whatever was done to its flags until now, from here on they say that it blocks.
fn make_block(event: &OwnedFd) {
    fcntl_setfl(event, fcntl_getfl(event).unwrap() & !OFlags::NONBLOCK).unwrap();
}

/// Call and error are full and block; one kick, which blocks, is that of two rings.
#[test]
fn eventfds_that_block() {
    let mut stand = Stand::new();
    let mut neighbour = stand.neighbour();
    neighbour.measure_alone();
    let front = stand.hostile();
    front.negotiate();
    let region = Region::new(0, MIB);
    region.add(&front);
    let [kick, call, error] = std::array::from_fn(|_| event());
    let mut rings = [0, 1].map(|index: u32| {
        let ring = RawRing::new(&region, index, u64::from(index) * 0x10000, Format::Split, 16);
        ring.start(&front);
        set(&front, SET_VRING_KICK, index, &kick);
        set(&front, SET_VRING_CALL, index, &call);
        set(&front, SET_VRING_ERR, index, &error);
        ring
    });
    [&call, &error].into_iter().for_each(fill);
    [&kick, &call, &error].into_iter().for_each(make_block);
    for round in 0..100 {
        for ring in &mut rings {
            let at = 0x40000 + u64::from(ring.index) * 0x10000;
            let chain = ring.request(at, 0, round, &[writable(at + 0x1000, 4096)]);
            ring.offer(&chain).unwrap();
        }
        write(&kick, &1u64.to_ne_bytes()).unwrap();
        rings.iter_mut().for_each(|ring| assert_eq!(ring.wait_used().1, 4097));
    }
    // It is to be told of two failures: of a ring that breaks, and of one that cannot start.
    let next = rings[0].next;
    rings[0].publish(next.wrapping_add(1000));
    write(&kick, &1u64.to_ne_bytes()).unwrap();
    eventually("its ring has broken", || stand.program.lines_with("the guest broke its virtqueue") == 1);
    front.vring_base(1);
    front.set_ring(SET_VRING_NUM, 1, 15);
    front.refuse(SET_VRING_KICK, &1u64.to_ne_bytes(), &[kick.as_raw_fd()]);
    neighbour.verdict();
    stand.program.signal(Signal::TERM);
    assert!(stand.program.wait().success());
}

/// It asks and asks, and does not listen: whoever answers it must not wait for it when the program is to end.
#[test]
fn replies_that_nobody_reads() {
    let mut stand = Stand::new();
    let mut neighbour = stand.neighbour();
    neighbour.measure_alone();
    let front = stand.hostile();
    let question = [GET_FEATURES, VERSION, 0].map(u32::to_ne_bytes).concat();
    front.stream.set_nonblocking(true).unwrap();
    let mut full = 0;
    // Its questions fill the socket once its answers do.
    eventually("nobody takes its questions any more", || {
        while (&front.stream).write_all(&question).is_ok() {
            full = 0;
        }
        full += 1;
        full > 50
    });
    neighbour.verdict();
    stand.program.signal(Signal::TERM);
    assert!(stand.program.wait().success());
}
