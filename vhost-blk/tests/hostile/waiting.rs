//! What long requests leave behind, and what those cost that wait.

use crate::common::raw::*;
use crate::common::*;
use crate::program::Program;
use crate::stand::*;

const T_IN: u32 = 0;
/// Where requests of a large ring have their headers, tables and data.
const HEADERS: u64 = 4 * MIB;
const TABLES: u64 = 8 * MIB;
const TABLE_BYTES: u64 = 0x4000;
const DATA: u64 = 32 * MIB;

/// Memory that the program has for itself (`RssAnon` in proc(5)), in bytes.
fn own_memory(program: &Program) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", program.child.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("Linux says that");
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// Requests of 1022 segments on a ring of 1024 entries: what they need goes back while the ring still runs.
#[test]
fn memory_for_long_requests_goes_back() {
    let stand = Stand::new();
    let mut neighbour = stand.neighbour();
    neighbour.measure_alone();
    let front = stand.hostile();
    front.negotiate();
    let region = Region::new(0, 64 * MIB);
    region.add(&front);
    let mut ring = RawRing::new(&region, 0, 0, Format::Split, 1024);
    ring.start(&front);
    let data = [writable(DATA, 512); 1022];
    // What a ring that has been used once needs.
    assert_eq!(ring.run(HEADERS, T_IN, 0, &data[..1]), 0);
    let before = own_memory(&stand.program);
    for at in 0..512 {
        let chain = ring.request(HEADERS + 64 * at, T_IN, 0, &data);
        ring.offer_indirect(TABLES + TABLE_BYTES * at, &chain).unwrap();
    }
    ring.kick();
    (0..512).for_each(|_| _ = ring.wait_used());
    (0..512).for_each(|at| assert_eq!(ring.status(HEADERS + 64 * at), 0));
    // 24 bytes for each segment would be 12 MiB.
    let kept = own_memory(&stand.program).saturating_sub(before);
    println!("{} KiB are kept", kept >> 10);
    assert!(kept < 4 * MIB, "{kept} bytes are kept by a ring that has nothing to do");
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
