//! Front-ends of the program beside and after each other, and what it says of them.

mod common;
#[path = "common/program.rs"]
mod program;

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use common::served::*;
use common::*;
use program::*;
use rustix::process::Signal;

fn folder() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    (folder, socket)
}

#[test]
fn what_is_refused_is_told_in_one_line() {
    let (_folder, socket) = folder();
    let program = Program::serve(&socket, &[]);
    let region = Region::new(0, MIB);
    let overlapping = Region::new(0x1000, MIB);
    let front = Front::connect(&socket);
    front.negotiate();
    region.add(&front);
    // What can be said is said, and told once.
    (0..3).for_each(|_| front.refuse(SET_VRING_NUM, &state(0, 65535), &[]));
    (0..3).for_each(|_| assert!(front.config(0x80, 0x100).is_empty()));
    front.send(ADD_MEM_REG, 0, &overlapping.single(), &[overlapping.file.as_raw_fd()]);
    front.wait_for_end();
    program.wait_for("the front-end was disconnected: ADD_MEM_REG refused: memory: memory region of 0x100000 bytes at");
    for (line, count) in [
        ("ADD_MEM_REG", 1),
        ("SET_VRING_NUM refused: ring 0 with 65535 entries: 1 to ", 1),
        ("GET_CONFIG refused: 256 bytes at 128 lie outside the configuration space", 1),
    ] {
        assert_eq!(program.lines_with(line), count, "{line}");
    }
}

/// All that a VMM asks and says until its device works, with every answer it waits for. `first`: where its base is.
fn bring_up<'a>(front: &Front, region: &'a Region) -> Ring<'a> {
    front.negotiate();
    assert!(front.ask_u64(GET_QUEUE_NUM) > 0 && front.ask_u64(GET_MAX_MEM_SLOTS) > 0);
    assert_eq!(front.config(0, 8), (64 * MIB / 512).to_le_bytes());
    region.add(front);
    let ring = Ring::new(region, 0, 0x10000);
    let (told, log) = front.ask_file(GET_INFLIGHT_FD, &inflight(0, 1, ring.size));
    front.accept(SET_INFLIGHT_FD, &told, &[log.as_raw_fd()]);
    ring.start(front);
    ring
}

#[test]
fn a_second_front_end_is_answered_at_once_and_served_in_its_turn() {
    let (_folder, socket) = folder();
    let program = Program::serve(&socket, &["--queues", "4"]);
    let regions = [(); 3].map(|()| Region::new(0, MIB));
    let first = Front::connect(&socket);
    let mut running = bring_up(&first, &regions[0]);
    running.check_io(0);
    // Two that wait for the first, the one after the other.
    let waiting = [1, 2].map(|number| {
        let front = Front::connect(&socket);
        let start = Instant::now();
        let mut ring = bring_up(&front, &regions[number]);
        ring.submit(T_FLUSH, 0, (0, 0));
        // A ring that has not run gives its base at once, and goes on waiting when it is started again.
        front.set_ring(SET_VRING_BASE, 1, 7);
        assert_eq!(front.vring_base(1), 7);
        assert_eq!(front.vring_base(0), 0);
        ring.set_event(&front, SET_VRING_KICK, Some(&ring.kick));
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
        (front, ring)
    });
    program.wait_for("a second front-end connected; its rings wait until the first leaves");
    program.wait_for("another front-end connected; its rings wait until the 2 before it leave");
    let [(second, mut ring), (_third, mut last)] = waiting;
    // The first one's requests are answered; had those of the others been taken, they would be, too.
    (0..50).for_each(|at| running.check_io(at));
    assert_eq!((ring.poll(), last.poll()), (None, None));
    drop(first);
    assert_eq!(ring.wait(), 0);
    ring.check_io(8);
    assert_eq!(last.poll(), None);
    drop(second);
    assert_eq!(last.wait(), 0);
    last.check_io(16);
}

#[test]
fn what_a_waiting_front_end_says_reaches_nobody_else() {
    let served = with_cache();
    let regions = [(); 2].map(|()| Region::new(0, MIB));
    let first = served.connect();
    first.negotiate();
    let mut ring = Ring::new(&regions[0], 0, 0x10000);
    let (told, log) = first.ask_file(GET_INFLIGHT_FD, &inflight(0, 1, ring.size));
    first.accept(SET_INFLIGHT_FD, &told, &[log.as_raw_fd()]);
    regions[0].add(&first);
    ring.start(&first);
    ring.check_io(0);
    let contents = |log: &std::fs::File| {
        let mut bytes = vec![0; number(&told[..8]) as usize];
        log.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    // Everything that a session shares with others: the log itself, the mode of the write cache, and resets.
    let before = contents(&log);
    let second = served.connect();
    second.negotiate();
    second.accept(SET_INFLIGHT_FD, &told, &[log.as_raw_fd()]);
    second.accept(SET_CONFIG, &config(32, &[0]), &[]);
    assert_eq!((second.config(32, 1), first.config(32, 1)), (vec![0], vec![1]));
    second.accept(RESET_DEVICE, &[], &[]);
    second.accept(RESET_OWNER, &[], &[]);
    second.accept(SET_INFLIGHT_FD, &told, &[log.as_raw_fd()]);
    second.accept(RESET_DEVICE, &[], &[]);
    assert!(contents(&log) == before, "its log is the first one's until that has left");
    regions[1].add(&second);
    let mut waits = Ring::new(&regions[1], 0, 0x10000);
    waits.start(&second);
    waits.submit(T_FLUSH, 0, (0, 0));
    ring.check_io(8);
    assert_eq!(first.config(32, 1), [1]);
    assert_eq!(waits.poll(), None);
    drop(first);
    // From here on it counts: a log that was reset, and the chosen mode.
    assert_eq!(waits.wait(), 0);
    waits.check_io(16);
    assert_eq!(waits.position(), 3);
    assert_eq!(second.config(32, 1), [0]);
    drop(second);
    let next = served.connect();
    next.negotiate();
    assert_eq!(next.config(32, 1), [0]);
}

/// A guest that was shown write-through does not flush, whatever another one chose later.
#[test]
fn a_waiting_guest_is_served_in_the_stricter_mode() {
    for (shown, left) in [(0, 1), (1, 0)] {
        let served = with_cache();
        let first = served.connect();
        first.negotiate();
        first.accept(SET_CONFIG, &config(32, &[shown]), &[]);
        let second = served.connect();
        second.negotiate();
        assert_eq!(second.config(32, 1), [shown]);
        first.accept(SET_CONFIG, &config(32, &[left]), &[]);
        drop(first);
        eventually("the stricter one", || second.config(32, 1) == [0]);
        let region = Region::new(0, MIB);
        Ring::first(&second, &region).check_io(0);
        assert_eq!(second.config(32, 1), [0]);
    }
}

#[test]
fn one_that_comes_while_the_last_one_is_drained_is_answered_and_waits() {
    use nvme_sim::{Config, FaultAction, FaultMatch, FaultRule, NamespaceConfig, Simulator};
    const DELAY: Duration = Duration::from_secs(3);
    let (folder, socket) = folder();
    let namespace = NamespaceConfig { bytes: 64 * MIB, ..NamespaceConfig::default() };
    let config = Config { namespaces: vec![namespace], ..Config::default() };
    let simulator = Simulator::start(config, &folder.path().join("nvme")).unwrap();
    let device = format!("vfio-user:{}", simulator.socket().display());
    let program = Program::serve_device(&device, &socket, &[]);
    let regions = [(); 2].map(|()| Region::new(0, MIB));
    let first = Front::connect(&socket);
    let mut ring = bring_up(&first, &regions[0]);
    let once = FaultMatch { limit: Some(1), ..FaultMatch::default() };
    simulator.faults().add(FaultRule { action: FaultAction::Delay(DELAY..=DELAY), when: once });
    let start = Instant::now();
    ring.submit(0, 0, (ring.data(), 4096));
    eventually("the drive has it", || simulator.faults().fired() > 0);
    drop(first);
    program.wait_for("the front-end disconnected");
    let second = Front::connect(&socket);
    let mut next = bring_up(&second, &regions[1]);
    assert!(start.elapsed() < DELAY, "answered after {:?}", start.elapsed());
    next.check_io(8);
    assert!(start.elapsed() >= DELAY, "served after {:?}", start.elapsed());
    assert_eq!(program.lines_with("its rings wait until the requests of the last one have ended"), 1);
}

#[test]
fn more_than_can_wait_are_refused_and_told_of() {
    let (_folder, socket) = folder();
    let mut program = Program::serve(&socket, &[]);
    let mut fronts: Vec<Front> = (0..5).map(|_| Front::connect(&socket)).collect();
    fronts.iter().for_each(|front| assert_ne!(front.ask_u64(GET_FEATURES), 0));
    for number in 1..=3 {
        let start = Instant::now();
        Front::connect(&socket).wait_for_end();
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
        eventually("each is told of", || {
            program.lines_with("a front-end was refused: 5 are connected already") == number
        });
    }
    // One that waits goes, and makes room.
    drop(fronts.remove(3));
    let front = Front::connect(&socket);
    assert_ne!(front.ask_u64(GET_FEATURES), 0);
    // Waiting ones keep nobody from ending.
    program.signal(Signal::TERM);
    assert_eq!(program.wait().code(), Some(0));
    fronts.iter().for_each(Front::wait_for_end);
}

#[test]
fn clients_that_say_nothing_keep_nobody_waiting() {
    let (_folder, socket) = folder();
    let program = Program::serve(&socket, &[]);
    let silent = [(); 3].map(|()| UnixStream::connect(&socket).unwrap());
    let half = Front::connect(&socket);
    half.raw(&[1, 0, 0, 0, 1, 0]);
    let region = Region::new(0, MIB);
    let front = Front::connect(&socket);
    bring_up(&front, &region).check_io(0);
    // What begins to speak does not stop in the middle.
    half.wait_for_end();
    program.wait_for("a client was disconnected: a message's header did not arrive completely in time");
    // Nobody needs their places.
    for stream in &silent {
        stream.set_nonblocking(true).unwrap();
        assert!(std::io::Read::read(&mut &*stream, &mut [0]).is_err());
    }
    let bodiless = Front::connect(&socket);
    bodiless.raw(&[&SET_VRING_NUM.to_ne_bytes()[..], &1u32.to_ne_bytes(), &8u32.to_ne_bytes()].concat());
    bodiless.wait_for_end();
    program.wait_for("a client was disconnected: SET_VRING_NUM did not arrive completely in time");
}

/// QEMU keeps the connection of a device that is taken away, removes none of its memory, and begins anew for the next one.
#[test]
fn a_device_is_taken_away_and_another_one_put_on_its_connection() {
    let served = one();
    let front = served.connect();
    let (region, gone, other) = (Region::new(0, MIB), Region::new(0x4000_0000, MIB), Region::new(0x4000_0000, MIB));
    gone.add({
        front.negotiate();
        &front
    });
    for round in 0..3u64 {
        // It is said again, as a whole.
        let mut ring = bring_up(&front, &region);
        ring.check_io(round * 8);
        ring.stop(&front);
    }
    let mut ring = bring_up(&front, &region);
    assert_ne!(ring.request(0, 0, (gone.guest, 4096)), 0, "it was not said again");
    ring.stop(&front);
    // Memory that has changed meanwhile: what was there does not count.
    front.negotiate();
    other.add(&front);
    region.add(&front);
    let mut ring = Ring::new(&region, 2, 0x10000);
    ring.start(&front);
    ring.check_io(8);
    assert_eq!(ring.request(0, 8, (other.guest, 4096)), 0);
    ring.stop(&front);
    // Nothing is left of the log of the device before: this one has none.
    let told = inflight(0, 4, 64);
    let (told, log) = front.ask_file(GET_INFLIGHT_FD, &told);
    front.accept(SET_INFLIGHT_FD, &told, &[log.as_raw_fd()]);
    front.negotiate();
    let mut ring = Ring::new(&region, 2, 0x10000);
    ring.start(&front);
    ring.check_io(24);
    let mut bytes = vec![0; log.metadata().unwrap().len() as usize];
    log.read_exact_at(&mut bytes, 0).unwrap();
    let queue = number(&told[..8]) as usize / 4;
    assert_eq!(bytes[2 * queue + 8..][..8], [0; 8], "no ring has used it");
    ring.stop(&front);
}

/// SET_OWNER that is repeated in the middle of a front-end's life takes nothing from it.
#[test]
fn an_owner_that_says_so_again_loses_nothing() {
    let served = one();
    let front = served.connect();
    let owner = || front.accept(SET_OWNER, &[], &[]);
    let region = Region::new(0, MIB);
    let mut ring = Ring::new(&region, 0, 0x10000);
    front.negotiate();
    // Between any two of the messages that start it.
    let steps: [&dyn Fn(); 6] = [
        &|| region.add(&front),
        &|| ring.enable(&front, true),
        &|| front.set_ring(SET_VRING_NUM, 0, ring.size.into()),
        &|| front.accept(SET_VRING_ADDR, &ring.addresses(), &[]),
        &|| ring.set_event(&front, SET_VRING_CALL, Some(&ring.call)),
        &|| ring.set_event(&front, SET_VRING_KICK, Some(&ring.kick)),
    ];
    for step in steps {
        step();
        owner();
    }
    ring.check_io(0);
    owner();
    ring.check_io(8);
    // A ring that is only disabled is started all the same.
    ring.enable(&front, false);
    owner();
    ring.enable(&front, true);
    ring.check_io(16);
    // One that was stopped is begun anew, in the memory that is there as long as no other is named.
    ring.stop(&front);
    owner();
    front.negotiate();
    let mut ring = Ring::new(&region, 0, 0x10000);
    ring.start(&front);
    ring.check_io(24);
}

#[test]
fn a_socket_file_that_is_removed_is_made_again() {
    let (_folder, socket) = folder();
    let mut program = Program::serve(&socket, &[]);
    let region = Region::new(0, MIB);
    let front = Front::connect(&socket);
    let mut ring = bring_up(&front, &region);
    std::fs::remove_file(&socket).unwrap();
    program.wait_for("s: the socket file was removed; it has been created again");
    let second = Front::connect(&socket);
    assert_ne!(second.ask_u64(GET_FEATURES), 0);
    ring.check_io(0);
    program.signal(Signal::TERM);
    assert_eq!(program.wait().code(), Some(0));
    assert!(!socket.exists());
}

#[test]
fn a_program_that_is_going_is_waited_for() {
    use nvme_sim::{Config, FaultAction, FaultMatch, FaultRule, Simulator};
    const DELAY: Duration = Duration::from_secs(1);
    let (folder, socket) = folder();
    let simulator = Simulator::start(Config::default(), &folder.path().join("nvme")).unwrap();
    let device = format!("vfio-user:{}", simulator.socket().display());
    let mut going = Program::serve_device(&device, &socket, &[]);
    let front = Front::connect(&socket);
    front.negotiate();
    let region = Region::new(0, MIB);
    let mut ring = Ring::first(&front, &region);
    simulator.faults().add(FaultRule { action: FaultAction::Delay(DELAY..=DELAY), when: FaultMatch::default() });
    ring.submit(0, 0, (ring.data(), 4096));
    eventually("the drive has it", || simulator.faults().fired() > 0);
    going.signal(Signal::TERM);
    going.wait_for("stopping");
    let next = Program::serve(&socket, &[]);
    assert_eq!(next.lines_with("another process does already; stop it or choose another path; it may be ending"), 1);
    assert_eq!(going.wait().code(), Some(0));
    bring_up(&Front::connect(&socket), &Region::new(0, MIB)).check_io(0);
}
