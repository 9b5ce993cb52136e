//! What the log says of the hostile and the odd: enough, and not more.

use rustix::process::Signal;

use crate::common::raw::*;
use crate::common::*;
use crate::stand::*;

/// VIRTIO_F_INDIRECT_DESC
const F_INDIRECT: u64 = 1 << 28;
const SHARED: &str = "is the guest's memory shared (share=on)?";
const OUTSIDE: &str = "memory that the front-end has not shared";
const INDIRECT_ON: &str = "the guest needs indirect_desc=on or queue-size=1024";

/// A guest may break its ring, reset the device and begin again as fast as it can, and its front-end may come and go.
#[test]
fn lines_that_a_guest_can_cause_are_few() {
    let mut stand = Stand::new();
    let mut neighbour = stand.neighbour();
    neighbour.measure_alone();
    let region = Region::new(0, MIB);
    for round in 0..60 {
        let front = stand.hostile();
        front.negotiate_without(F_INDIRECT | F_EVENT_IDX | F_RING_PACKED);
        region.add(&front);
        for _ in 0..3 {
            let error = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
            let ring = Ring::new(&region, 0, 0x10000);
            ring.set_event(&front, SET_VRING_ERR, Some(&error));
            ring.start(&front);
            ring.break_it();
            error.read().unwrap();
            front.accept(RESET_DEVICE, &[], &[]);
            // What is refused is told, too.
            front.refuse(SET_VRING_NUM, &state(99, 1), &[]);
        }
        assert!(stand.program.lines_with("/hostile") < 100, "round {round}");
    }
    // A minute is not over, unless the machine is very busy.
    let broken = || stand.program.lines_with("the guest broke its virtqueue");
    assert!((10..=30).contains(&broken()), "{} of 180", broken());
    neighbour.verdict();
    stand.program.signal(Signal::TERM);
    assert!(stand.program.wait().success());
    let told = || {
        let lines = stand.program.lines_with_all(&["/hostile: ", "more lines about broken rings were left out"]);
        lines + stand.program.lines_with("more like this in the last minute were left out")
    };
    eventually("what was left out is told", || told() > 0);
}

#[test]
fn kicks_without_a_ring_that_changes() {
    let stand = Stand::new();
    let mut neighbour = stand.neighbour();
    neighbour.measure_alone();
    for format in [Format::Split, Format::Packed] {
        let front = stand.hostile();
        front.negotiate_without(F_EVENT_IDX | if format == Format::Split { F_RING_PACKED } else { 0 });
        // What the front-end hands over is not what the guest writes to.
        let (handed, private) = (Region::new(0, MIB), Region::new(0, MIB));
        handed.add(&front);
        // A ring that is begun anew, as after the guest's restart, and was kicked before: no reason for a line.
        let mut used = RawRing::new(&handed, 1, 0x20000, format, 16);
        used.start(&front);
        assert_eq!(used.run(0x40000, 0, 0, &[writable(0x50000, 4096)]), 0);
        used.kick();
        front.vring_base(1);
        let mut again = RawRing::new(&handed, 1, 0x20000, format, 16);
        again.kick = used.kick;
        again.start(&front);
        let mut ring = RawRing::new(&private, 0, 0x10000, format, 16);
        ring.start(&front);
        let chain = ring.request(0x40000, 0, 0, &[writable(0x50000, 4096)]);
        let told = || stand.program.lines_with_all(&["/hostile ring 0: kicks come", SHARED]);
        let before = told();
        // A firmware kicks once, and waits for ever.
        ring.offer(&chain).unwrap();
        ring.kick();
        eventually("it is told", || told() == before + 1);
        for _ in 0..20 {
            ring.kick();
            assert_eq!(again.run(0x60000, 0, 0, &[writable(0x50000, 4096)]), 0);
        }
        assert_eq!(told(), before + 1, "once");
        assert_eq!(stand.program.lines_with_all(&["/hostile ring 1: ", SHARED]), 0, "{format:?}");
    }
    assert_eq!(stand.program.lines_with_all(&["/neighbour", SHARED]), 0);
    neighbour.verdict();
}

/// Memory that was plugged into the guest and that the front-end cannot share.
#[test]
fn buffers_in_memory_that_is_not_shared() {
    let stand = Stand::new();
    let mut neighbour = stand.neighbour();
    neighbour.measure_alone();
    let front = stand.hostile();
    front.negotiate();
    let region = Region::new(0, MIB);
    region.add(&front);
    let mut ring = RawRing::new(&region, 0, 0x10000, Format::Split, 16);
    ring.start(&front);
    // Beyond the disk: fails as well, and has nothing to do with memory.
    assert_eq!(ring.run(0x40000, 0, u64::MAX >> 9, &[writable(0x50000, 4096)]), 1);
    assert_eq!(stand.program.lines_with(OUTSIDE), 0);
    for _ in 0..3 {
        let data = [writable(0x50000, 4096), writable(MIB - 512, 1024)];
        assert_eq!(ring.run(0x40000, 0, 0, &data), 1);
    }
    assert_eq!(ring.run(0x40000, 0, 0, &[writable(0x1_2345_6000, 4096)]), 1);
    let told = ["/hostile ring 0: a request fails: its buffer at guest address 0x100000 ", OUTSIDE];
    eventually("it is told", || stand.program.lines_with_all(&told) == 1);
    assert_eq!(stand.program.lines_with(OUTSIDE), 1, "once");
    assert_eq!(ring.run(0x40000, 0, 0, &[writable(0x50000, 4096)]), 0);
    // There is not even a place for the status.
    ring.offer(&[readable(0x40000, 16), writable(0x50000, 4096), writable(0x2_0000_0000, 1)]).unwrap();
    ring.kick();
    let told = ["/hostile ring 0: the guest broke its virtqueue", "0x200000000", OUTSIDE];
    eventually("it is told", || stand.program.lines_with_all(&told) == 1);
    neighbour.verdict();
}

/// Advice comes when there is a reason, and not at each boot through a firmware.
#[test]
fn advice_when_a_request_just_fits() {
    let stand = Stand::new();
    let front = stand.hostile();
    front.negotiate_without(F_INDIRECT | F_EVENT_IDX | F_RING_PACKED);
    let region = Region::new(0, MIB);
    region.add(&front);
    for more in 0..2 {
        let mut ring = RawRing::new(&region, 0, 0x10000, Format::Split, 16);
        ring.start(&front);
        let pieces = |count: u64| (0..count).map(|at| writable(0x50000 + at * 512, 512)).collect::<Vec<_>>();
        for count in 1..=6 {
            assert_eq!(ring.run(0x40000, 0, 0, &pieces(count)), 0);
        }
        assert_eq!(stand.program.lines_with(INDIRECT_ON), more);
        for count in 7..=14 {
            assert_eq!(ring.run(0x40000, 0, 0, &pieces(count)), 0);
        }
        let told = ["/hostile ring 0: a request took 9 of the ring's 16 entries", INDIRECT_ON];
        eventually("it is told", || stand.program.lines_with_all(&told) == more + 1);
        front.vring_base(0);
    }
    drop(front);
    // With indirect descriptors any request fits.
    let front = stand.hostile();
    front.negotiate();
    region.add(&front);
    let mut ring = RawRing::new(&region, 0, 0x10000, Format::Split, 16);
    ring.start(&front);
    let pieces = (0..14).map(|at| writable(0x50000 + at * 512, 512)).collect::<Vec<_>>();
    assert_eq!(ring.run(0x40000, 0, 0, &pieces), 0);
    assert_eq!(stand.program.lines_with(INDIRECT_ON), 2);
}
