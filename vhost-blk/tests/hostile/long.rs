//! Requests of very many commands, beside a neighbour on the same queue pair.

use std::time::{Duration, Instant};

use nvme_sim::{FaultAction, FaultMatch, FaultRule};

use crate::common::raw::*;
use crate::common::*;
use crate::stand::*;

const IN: u32 = 0;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const OK: u8 = 0;
const IOERR: u8 = 1;
const NOTHING: u8 = 0xff;

/// Long ones that are out at once.
const MANY: u64 = 16;
/// The largest range of write zeroes, in sectors: 32 MiB.
const ZEROES: u32 = 0x1_0000;

fn request(number: u64) -> u64 {
    0x4_0000 + number * REQUEST_BYTES
}

const RANGES: u64 = 0x5_0000;
const TABLE: u64 = 0x6_0000;
const SMALL: u64 = 0x8_0000;
const DATA: u64 = MIB;

/// 256 ranges of this many sectors, all over the disk of 256 MiB.
fn fill_ranges(ring: &RawRing, sectors: u32) {
    let range = |at: u32| [&u64::from(at % 8 * ZEROES).to_le_bytes()[..], &sectors.to_le_bytes(), &[0; 4]].concat();
    ring.fill(RANGES, &(0..256).flat_map(range).collect::<Vec<_>>());
}

/// One queue pair for all, and commands that have to be answered within two seconds.
fn stand() -> Stand {
    Stand::with(|setup| {
        setup.one_pair();
        setup.top = "io-timeout = 2".into();
    })
}

/// The drive takes so long for each of the hostile's commands, and does nobody else's later for it.
fn slow(stand: &Stand, each: Duration) {
    let when = FaultMatch { namespace: Some(1), ..FaultMatch::default() };
    stand.drive.faults().add(FaultRule { action: FaultAction::Delay(each..=each), when });
}

/// Offers so many reads of the whole disk: 512 commands each. All go to the same memory.
fn offer_reads(ring: &mut RawRing) {
    for number in 0..MANY {
        let chain = ring.request(request(number), IN, 0, &[writable(DATA, MIB as u32); 256]);
        ring.offer_indirect(TABLE + number * 0x1200, &chain).unwrap();
    }
    ring.kick();
}

/// A front-end with a ring of 64 entries.
fn start(stand: &Stand, region: &Region) -> Front {
    let front = stand.hostile();
    front.negotiate_without(F_RING_PACKED);
    region.add(&front);
    front
}

/// The next `count` used chains.
fn answered(ring: &mut RawRing, count: u64) {
    (0..count).for_each(|_| _ = ring.wait_used());
}

fn nothing_was_reset(stand: &Stand) {
    assert_eq!(stand.program.lines_with("out of operation"), 0);
}

#[test]
fn ranges_beyond_what_is_offered_fail_at_once() {
    let stand = stand();
    let mut neighbour = stand.neighbour();
    neighbour.measure_alone();
    let region = Region::new(0, 2 * MIB);
    let front = start(&stand, &region);
    let mut ring = RawRing::new(&region, 0, 0, Format::Split, 64);
    ring.start(&front);
    let began = Instant::now();
    // A discard may be of the whole disk; its ranges are beyond the end of it then.
    for (kind, sectors) in
        [(WRITE_ZEROES, 256 << 11), (WRITE_ZEROES, ZEROES + 1), (DISCARD, 257 << 11), (DISCARD, u32::MAX)]
    {
        fill_ranges(&ring, sectors);
        for number in 0..50 {
            assert_eq!(ring.run(request(number % 16), kind, 0, &[readable(RANGES, 4096)]), IOERR);
        }
    }
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    neighbour.verdict();
    nothing_was_reset(&stand);
}

#[test]
fn all_the_zeroes_that_may_be_asked_for_leave_others_their_part() {
    let stand = stand();
    let mut neighbour = stand.neighbour();
    neighbour.measure_alone();
    let region = Region::new(0, 2 * MIB);
    let front = start(&stand, &region);
    let mut ring = RawRing::new(&region, 0, 0, Format::Split, 64);
    ring.start(&front);
    fill_ranges(&ring, ZEROES);
    for number in 0..MANY {
        let chain = ring.request(request(number), WRITE_ZEROES, 0, &[readable(RANGES, 4096)]);
        ring.offer(&chain).unwrap();
    }
    ring.kick();
    neighbour.answered(300);
    // 128 GiB: they are far from done. A reset does not wait for them, and everything works afterwards.
    let began = Instant::now();
    front.accept(RESET_DEVICE, &[], &[]);
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    assert!((0..MANY).any(|number| ring.status(request(number)) == NOTHING));
    let mut ring = RawRing::new(&region, 0, 0, Format::Split, 64);
    ring.start(&front);
    assert_eq!(ring.run(request(0), IN, 0, &[writable(SMALL, 4096)]), OK);
    neighbour.verdict();
    nothing_was_reset(&stand);
}

#[test]
fn small_requests_pass_long_ones_and_a_stop_waits_seconds_at_most() {
    let stand = stand();
    let mut neighbour = stand.neighbour();
    neighbour.measure_alone();
    let each = Duration::from_millis(30);
    slow(&stand, each);
    let region = Region::new(0, 2 * MIB);
    let front = start(&stand, &region);
    let mut ring = RawRing::new(&region, 0, 0, Format::Split, 64);
    ring.start(&front);
    // With 31 of their 8192 commands out they would take eight seconds.
    offer_reads(&mut ring);
    for number in MANY..MANY + 10 {
        let began = Instant::now();
        assert_eq!(ring.run(request(number), IN, 0, &[writable(SMALL, 4096)]), OK);
        assert!(began.elapsed() < Duration::from_secs(1), "through the same ring: {:?}", began.elapsed());
    }
    assert!((0..MANY).all(|number| ring.status(request(number)) == NOTHING));
    let began = Instant::now();
    assert_eq!(front.vring_base(0), u32::from(ring.next), "each was taken");
    assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
    answered(&mut ring, MANY);
    assert!((0..MANY).all(|number| ring.status(request(number)) == IOERR));
    // The ring goes on where it stopped.
    ring.start(&front);
    assert_eq!(ring.run(request(0), IN, 0, &[writable(SMALL, 4096)]), OK);
    // Whoever leaves is not waited for: the next one is served at once.
    offer_reads(&mut ring);
    let began = Instant::now();
    drop(front);
    let front = stand.hostile();
    front.negotiate();
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    Ring::first(&front, &Region::new(0, MIB)).check_io(8);
    neighbour.verdict();
    nothing_was_reset(&stand);
}

/// A guest that is paused in the middle of a long request gets it done.
#[test]
fn a_long_request_that_is_soon_done_is_waited_for() {
    let stand = stand();
    let mut neighbour = stand.neighbour();
    neighbour.measure_alone();
    slow(&stand, Duration::from_millis(10));
    let region = Region::new(0, 2 * MIB);
    let front = start(&stand, &region);
    let mut ring = RawRing::new(&region, 0, 0, Format::Split, 64);
    ring.start(&front);
    let chain = ring.request(request(0), IN, 0, &[writable(DATA, MIB as u32); 256]);
    ring.offer_indirect(TABLE, &chain).unwrap();
    ring.kick();
    // It is under way when a later one is answered.
    assert_eq!(ring.run(request(1), IN, 0, &[writable(SMALL, 4096)]), OK);
    assert_eq!(ring.status(request(0)), NOTHING);
    front.vring_base(0);
    answered(&mut ring, 1);
    assert_eq!(ring.status(request(0)), OK);
    neighbour.verdict();
}
