//! What guests of one drive share: its controller, its queue pairs, the buffers for data that has to be copied.

use std::time::{Duration, Instant};

use nvme_sim::{FaultAction, FaultMatch, FaultRule};

use crate::common::raw::*;
use crate::common::*;
use crate::neighbour::Neighbour;
use crate::stand::*;

const IOERR: u8 = 1;
const READ: u32 = 0;
/// No PRP may point there.
const ODD: u64 = 2;

/// The hostile reads a block of its own that makes the controller fail, in this way.
fn poisonous(action: FaultAction, offset: u64) {
    let stand = Stand::with(|setup| {
        setup.top = "io-timeout = 0.3".into();
        setup.one_pair();
        setup.no_sgl();
    });
    let mut neighbour = stand.neighbour();
    // What a controller costs it that fails by itself: often, for each attempt to get it back comes later than the one before.
    let when = FaultMatch { namespace: Some(2), limit: Some(4), ..FaultMatch::default() };
    stand.drive.faults().add(FaultRule { action: FaultAction::Fatal, when });
    neighbour.measure_alone();
    assert_eq!(stand.drive.faults().fired(), 4);
    // It has recovered when it has worked for a second.
    let start = Instant::now();
    eventually("its recovery", || start.elapsed() > Duration::from_millis(1100));
    neighbour.answered(1);

    let front = stand.hostile();
    front.negotiate();
    let region = Region::new(0, MIB);
    let mut ring = Ring::first(&front, &region);
    let at = ring.data() + offset;
    assert_eq!(ring.request(READ, 8, (at, 4096)), 0);
    stand.drive.faults().clear();
    // The neighbour has something with the drive whenever it fails.
    let (slow, when) = (Duration::from_millis(2), FaultMatch { namespace: Some(2), ..FaultMatch::default() });
    stand.drive.faults().add(FaultRule { action: FaultAction::Delay(slow..=slow), when });
    let failures = || stand.program.lines_with("out of operation");
    let before = failures();
    let poison = FaultMatch { namespace: Some(1), blocks: Some(800..=807), ..FaultMatch::default() };
    stand.drive.faults().add(FaultRule { action, when: poison });
    assert_eq!(ring.request(READ, 800, (at, 4096)), IOERR);
    // The drive is there for all.
    assert_eq!(ring.request(READ, 8, (at, 4096)), 0);
    neighbour.verdict();
    assert_eq!(failures() - before, 5, "it was tried five times");
    assert_eq!(stand.program.lines_with("I/O errors until"), 0, "the drive is not given up");
    assert_eq!(stand.program.lines_with("was with the drive in 5 of its failures"), 1);
}

/// Only that request is late, and only that one is charged with it.
#[test]
fn a_request_that_the_drive_never_answers() {
    poisonous(FaultAction::LoseCompletion, 0);
}

/// All that the controller had may be the reason. The neighbour's is, each time, one of them.
#[test]
fn a_request_that_makes_the_controller_fail() {
    poisonous(FaultAction::Fatal, 0);
}

#[test]
fn a_request_that_is_copied_and_makes_the_controller_fail() {
    poisonous(FaultAction::Fatal, ODD);
}

/// Long requests that have to be copied, and such whose last block alone has to be, more than may be under way.
#[test]
fn long_requests_that_are_copied() {
    const LONG: u32 = 128 << 20;
    let stand = Stand::with(|setup| {
        setup.one_pair();
        setup.no_sgl();
        // A guest that copies, too.
        setup.drive.namespaces.push(setup.drive.namespaces[1].clone());
        setup.more = "[[export]]\ndevice = \"{device}\"\nnamespace = 3\nsocket-path = \"{folder}/copying\"\n".into();
    });
    let mut neighbour: Neighbour = stand.neighbour();
    let copying = Front::connect(&stand.path("copying"));
    copying.negotiate();
    let small = Region::new(0, MIB);
    let mut copied = Ring::first(&copying, &small);
    let odd = copied.data() + ODD;
    neighbour.measure_alone();

    let front = stand.hostile();
    front.negotiate();
    let region = Region::new(0, 256 * MIB);
    region.add(&front);
    let mut ring = RawRing::new(&region, 0, 0x10000, Format::Split, 256);
    ring.start(&front);
    let data = MIB;
    for k in 0..48 {
        let at = 0x8_0000 + 64 * k;
        let long = match k % 3 {
            0 => vec![writable(data + ODD, LONG)],
            _ => vec![writable(data, LONG), writable(data + u64::from(LONG) + ODD, 512)],
        };
        let chain = ring.request(at, READ, 0, &long);
        ring.offer(&chain).unwrap();
    }
    ring.kick();
    let mut longest = Duration::ZERO;
    for k in 0..50 {
        let start = Instant::now();
        assert_eq!(copied.request(READ, 8 * k, (odd, 4096)), 0);
        longest = longest.max(start.elapsed());
    }
    neighbour.answered(200);
    println!("copied beside long ones: {longest:?} at most");
    assert!(ring.used().is_none(), "the attack is over too early");
    // On a busy machine; all of the long ones take many times as long.
    assert!(longest < Duration::from_secs(1), "{longest:?} for a request that is copied");
    neighbour.verdict();
}

/// One guest's rings have all queue pairs when another comes, which gets its share of them while all go on.
#[test]
fn rings_that_take_all_queue_pairs() {
    let stand = Stand::with(|setup| setup.drive.max_queue_pairs = 4);
    let front = stand.hostile();
    front.negotiate();
    let region = Region::new(0, MIB);
    region.add(&front);
    let space = RawRing::bytes(64).next_multiple_of(0x1_0000);
    let mut rings: Vec<_> =
        (0..8).map(|index| RawRing::new(&region, index, space * u64::from(index), Format::Split, 64)).collect();
    rings.iter().for_each(|ring| ring.start(&front));
    let run_all = |rings: &mut [RawRing]| {
        for (ring, k) in rings.iter_mut().zip(0..) {
            assert_eq!(ring.run(0xc_0000 + 64 * k, READ, 8 * k, &[writable(0xd_0000 + 4096 * k, 4096)]), 0);
        }
    };
    run_all(&mut rings);
    assert_eq!(stand.program.lines_with("hostile: rings share a queue pair"), 1);
    let mut neighbour = stand.neighbour();
    // Its ring has one of its own, and nobody's requests were lost by that.
    eventually("a queue pair for the neighbour", || {
        run_all(&mut rings);
        stand.program.lines_with("neighbour: a ring that shared a queue pair has one of its own now") == 1
    });
    assert_eq!(stand.program.lines_with("hostile: it has more queue pairs than its share of 2"), 1);
    neighbour.measure_alone();
    for _ in 0..20 {
        run_all(&mut rings);
    }
    neighbour.answered(50);
    // What the hostile has left is used by whoever comes next.
    rings.iter().for_each(|ring| _ = front.vring_base(ring.index));
    rings.iter().for_each(|ring| ring.start(&front));
    run_all(&mut rings);
    neighbour.verdict();
    assert_eq!(stand.program.lines_with("neighbour: rings share a queue pair"), 1, "it was told once");
}
