//! What long requests leave behind, and what those cost that wait.

use std::time::Duration;

use nvme_sim::{FaultAction, FaultMatch, FaultRule};

use crate::common::raw::*;
use crate::common::*;
use crate::program::Program;
use crate::stand::*;

const T_IN: u32 = 0;
/// Where requests of a large ring have their headers, tables and data.
const HEADERS: u64 = 4 * MIB;
const TABLES: u64 = 8 * MIB;
const TABLE_BYTES: u64 = 0x4000;
const DATA: u64 = 40 * MIB;
const RINGS: u32 = 8;
/// On each ring.
const REQUESTS: u64 = 128;

/// Memory that the program has for itself (`RssAnon` in proc(5)), in bytes.
fn own_memory(program: &Program) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", program.child.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("Linux says that");
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// Requests of 1022 segments on rings of 1024 entries: what they need goes back while the rings still run.
#[test]
fn memory_for_long_requests_goes_back() {
    let stand = Stand::new();
    let mut neighbour = stand.neighbour();
    neighbour.measure_alone();
    let front = stand.hostile();
    front.negotiate();
    let region = Region::new(0, 64 * MIB);
    region.add(&front);
    let mut rings: Vec<_> = (0..RINGS)
        .map(|index| RawRing::new(&region, index, u64::from(index) * 0x1_0000, Format::Split, 1024))
        .collect();
    let data = [writable(DATA, 512); 1022];
    for ring in &mut rings {
        ring.start(&front);
        // What a ring that has been used once needs.
        assert_eq!(ring.run(HEADERS, T_IN, 0, &data[..1]), 0);
    }
    let before = own_memory(&stand.program);
    // As many as are taken at all are there before the first is answered.
    let (slow, when) = (Duration::from_millis(100), FaultMatch { namespace: Some(1), ..FaultMatch::default() });
    stand.drive.faults().add(FaultRule { action: FaultAction::Delay(slow..=slow), when });
    for (ring, first) in rings.iter_mut().zip((0..).step_by(REQUESTS as usize)) {
        for at in first..first + REQUESTS {
            let chain = ring.request(HEADERS + 64 * at, T_IN, 0, &data);
            ring.offer_indirect(TABLES + TABLE_BYTES * at, &chain).unwrap();
        }
        ring.kick();
    }
    for ring in &mut rings {
        (0..REQUESTS).for_each(|_| _ = ring.wait_used());
    }
    (0..REQUESTS * u64::from(RINGS)).for_each(|at| assert_eq!(rings[0].status(HEADERS + 64 * at), 0));
    // 64 KiB for each ring, and what the allocator does not give back. Without a bound it was 16 KiB for each request.
    let kept = own_memory(&stand.program).saturating_sub(before);
    println!("{} KiB are kept", kept >> 10);
    assert!(kept < 8 * MIB, "{kept} bytes are kept by rings that have nothing to do");
    neighbour.verdict();
}

/// A request of 4 GiB, of which the last block has to be copied: it is cut once, not at each turn anew.
#[test]
fn a_request_of_4_gib_with_an_odd_end() {
    let stand = Stand::with(|setup| {
        setup.one_pair();
        setup.no_sgl();
        setup.hostile_bytes(5 << 30);
    });
    let mut neighbour = stand.neighbour();
    neighbour.measure_alone();
    let front = stand.hostile();
    front.negotiate();
    let region = Region::new(0, 64 * MIB);
    region.add(&front);
    let mut ring = RawRing::new(&region, 0, 0, Format::Split, 16);
    ring.start(&front);
    // The same megabytes over and over.
    let mut data = vec![writable(DATA, 4 * MIB as u32); 1021];
    data.push(writable(DATA + 4 * MIB + 2, 512));
    for at in 0..4 {
        let chain = ring.request(HEADERS + 64 * at, T_IN, 0, &data);
        ring.offer_indirect(TABLES + TABLE_BYTES * at, &chain).unwrap();
    }
    ring.kick();
    neighbour.answered(200);
    // They are given up in the middle.
    drop(front);
    neighbour.verdict();
}
