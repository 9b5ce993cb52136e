//! The plainest ways of being hostile: they show what the harness can do, too.

use std::io::Write;
use std::time::Duration;

use nvme_sim::{FaultAction, FaultMatch, FaultRule, Status};

use crate::common::raw::*;
use crate::common::*;
use crate::stand::*;

/// The neighbour alone: what the harness measures when nobody is hostile.
#[test]
fn a_neighbour_alone_goes_on() {
    let stand = Stand::new();
    let mut neighbour = stand.neighbour();
    neighbour.measure_alone();
    neighbour.answered(100);
    neighbour.verdict();
}

/// Does this to the neighbour's next request, and hopes that it is noticed.
fn harm(action: FaultAction) {
    let stand = Stand::new();
    let mut neighbour = stand.neighbour();
    neighbour.measure_alone();
    let when = FaultMatch { namespace: Some(2), limit: Some(1), ..FaultMatch::default() };
    stand.drive.faults().add(FaultRule { action, when });
    eventually("it is met", || stand.drive.faults().fired() > 0);
    neighbour.verdict();
}

#[test]
#[should_panic(expected = "the neighbour: a request took")]
fn a_request_that_waits_is_noticed() {
    // So long that no machine is busy enough to be the reason.
    let long = Duration::from_secs(2);
    harm(FaultAction::Delay(long..=long));
}

#[test]
#[should_panic(expected = "the neighbour: [\"status 1")]
fn a_request_that_fails_is_noticed() {
    harm(FaultAction::Fail(Status::new(0, 6).not_to_be_retried()));
}

#[test]
fn a_ring_that_is_broken_again_and_again() {
    let stand = Stand::new();
    let mut neighbour = stand.neighbour();
    neighbour.measure_alone();
    let region = Region::new(0, MIB);
    for _ in 0..50 {
        let front = stand.hostile();
        front.negotiate();
        let mut ring = Ring::first(&front, &region);
        ring.check_io(8);
        ring.break_it();
        // It has stopped by itself, or is stopped here: where does not matter.
        front.vring_base(0);
    }
    neighbour.verdict();
}

#[test]
fn a_front_end_that_leaves_in_the_middle_of_a_message() {
    let stand = Stand::new();
    let mut neighbour = stand.neighbour();
    neighbour.measure_alone();
    let region = Region::new(0, MIB);
    for round in 0..50u8 {
        let front = stand.hostile();
        if round % 2 == 0 {
            front.negotiate();
            Ring::first(&front, &region).check_io(8);
        }
        // A header that promises a body, and a part of it.
        let header = [SET_MEM_TABLE, VERSION, 200].map(u32::to_ne_bytes).concat();
        let message = [header, vec![round; 100]].concat();
        (&front.stream).write_all(&message[..1 + usize::from(round) * 2]).unwrap();
    }
    neighbour.verdict();
}

/// Both formats, many requests at once, directly and by tables: what the raw ring of the harness does is right.
#[test]
fn a_raw_ring_works() {
    let stand = Stand::new();
    for format in [Format::Split, Format::Packed] {
        let front = stand.hostile();
        front.negotiate_without(F_EVENT_IDX | if format == Format::Split { F_RING_PACKED } else { 0 });
        let region = Region::new(0, MIB);
        region.add(&front);
        let log = Log::new(&front, 1, 16);
        log.set(&front);
        let mut ring = RawRing::new(&region, 0, 0, format, 16);
        ring.start(&front);
        for round in 0..50u8 {
            let place = |at: u64| (0x40000 + at * 64, 0x50000 + at * 0x1000);
            for at in 0..5 {
                let (request, data) = place(at);
                ring.fill(data, &[round ^ at as u8; 4096]);
                let chain = ring.request(request, 1, at * 8, &[readable(data, 4096)]);
                if round % 2 == 0 { ring.offer(&chain) } else { ring.offer_indirect(0x60000 + at * 256, &chain) }
                    .unwrap();
            }
            ring.kick();
            (0..5).for_each(|_| assert_eq!(ring.wait_used().1, 1));
            (0..5).for_each(|at| assert_eq!(ring.status(place(at).0), 0));
            for at in 0..5 {
                let (request, data) = place(at);
                ring.fill(data, &[0; 4096]);
                let pieces = [writable(data, 1024), writable(data + 1024, 3072)];
                assert_eq!(ring.run(request, 0, at * 8, &pieces), 0);
                assert_eq!(ring.fetch(data, 4096), [round ^ at as u8; 4096], "{format:?}, round {round}");
            }
        }
        assert_eq!(front.vring_base(0), if format == Format::Split { ring.next.into() } else { ring.base() });
    }
}
