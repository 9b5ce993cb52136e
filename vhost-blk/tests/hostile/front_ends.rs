//! Front-ends that crowd a socket, say what cannot be, begin again and again, and take their socket's file away.

use std::os::fd::AsRawFd;

use crate::common::*;
use crate::stand::*;

#[test]
fn front_ends_that_crowd_a_socket() {
    let stand = Stand::new();
    let mut neighbour = stand.neighbour();
    neighbour.measure_alone();
    let regions = [(); 3].map(|()| Region::new(0, MIB));
    let start = std::time::Instant::now();
    for round in 0..5 {
        // Two say nothing.
        let _silent = [stand.hostile(), stand.hostile()];
        let fronts = [(); 3].map(|()| stand.hostile());
        let mut rings: Vec<Ring> = fronts
            .iter()
            .zip(&regions)
            .map(|(front, region)| {
                front.negotiate();
                let ring = Ring::first(front, region);
                front.accept(RESET_DEVICE, &[], &[]);
                ring.start(front);
                ring
            })
            .collect();
        rings[0].check_io(round * 8);
        rings[2].submit(T_FLUSH, 0, (0, 0));
        // More than there is room for.
        let refused = [(); 3].map(|()| stand.hostile());
        refused.iter().for_each(Front::wait_for_end);
        rings[0].check_io(round * 8);
        assert_eq!(rings[2].poll(), None);
        // They go in any order, and everybody's turn comes.
        let [first, second, third] = fronts;
        match round % 2 {
            0 => drop((first, second)),
            _ => drop((second, first)),
        }
        assert_eq!(rings[2].wait(), 0);
        drop(third);
    }
    neighbour.verdict();
    // Ten a minute.
    let told = stand.program.lines_with("refused: 5 are connected already") as u64;
    assert!((1..=10 + start.elapsed().as_secs() / 6).contains(&told), "{told} in {:?}", start.elapsed());
}

#[test]
fn a_front_end_that_is_refused_again_and_again() {
    let stand = Stand::new();
    let mut neighbour = stand.neighbour();
    neighbour.measure_alone();
    let (region, overlapping) = (Region::new(0, MIB), Region::new(0x1000, MIB));
    for round in 0..50 {
        let front = stand.hostile();
        front.negotiate();
        let mut ring = Ring::first(&front, &region);
        ring.check_io(8);
        ring.submit(T_FLUSH, 0, (0, 0));
        match round % 3 {
            0 => front.send(ADD_MEM_REG, 0, &overlapping.single(), &[overlapping.file.as_raw_fd()]),
            1 => front.send(SET_VRING_BASE, 0, &state(0, 1), &[]),
            _ => front.send(1000, 0, &[round; 100], &[]),
        }
        front.wait_for_end();
    }
    neighbour.verdict();
}

#[test]
fn devices_that_come_and_go_on_one_connection() {
    let stand = Stand::new();
    let mut neighbour = stand.neighbour();
    neighbour.measure_alone();
    let (region, other) = (Region::new(0, MIB), Region::new(0, MIB));
    let front = stand.hostile();
    for round in 0..100u64 {
        front.negotiate();
        let region = if round % 3 == 0 { &other } else { &region };
        let mut ring = Ring::first(&front, region);
        ring.check_io(round * 8);
        front.accept(SET_OWNER, &[], &[]);
        ring.check_io(round * 8);
        ring.stop(&front);
    }
    neighbour.verdict();
}

#[test]
fn a_socket_whose_file_is_taken_away() {
    let stand = Stand::new();
    let mut neighbour = stand.neighbour();
    neighbour.measure_alone();
    let region = Region::new(0, MIB);
    let front = stand.hostile();
    front.negotiate();
    let mut ring = Ring::first(&front, &region);
    let told = |text: &str| eventually(text, || stand.program.lines_with(text) > 0);
    std::fs::remove_file(stand.socket()).unwrap();
    told("hostile: the socket file was removed; it has been created again");
    assert_ne!(stand.hostile().ask_u64(GET_FEATURES), 0);
    // Another process is there first.
    std::fs::remove_file(stand.socket()).unwrap();
    let other = std::os::unix::net::UnixListener::bind(stand.socket()).unwrap();
    told("another process does already");
    drop(other);
    told("hostile: the socket file was replaced; it has been created again");
    assert_ne!(stand.hostile().ask_u64(GET_FEATURES), 0);
    ring.check_io(8);
    neighbour.verdict();
}
