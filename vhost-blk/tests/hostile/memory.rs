//! Memory that a front-end shares and does not leave alone: guest memory, and the log of requests in flight.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::MemfdFlags;
use vhost_blk::virtio::memory::guard_mapping;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use crate::common::raw::*;
use crate::common::*;
use crate::neighbour::Neighbour;
use crate::stand::*;

const LOST: &str = "the file of its memory was shortened while it was in use, or its file system is full";

/// A stand with one more socket, `embedded`, on a drive inside the program, and a neighbour that was measured alone.
fn stand(change: impl FnOnce(&mut Setup)) -> (Stand, Neighbour) {
    // The drive of a stand is in this process, and has mapped the front-ends' memory here, too.
    nvme_sim::set_mapping_guard(guard_mapping);
    let stand = Stand::with(|setup| {
        setup.more = "[[export]]\ndevice = \"sim:64M\"\nsocket-path = \"{folder}/embedded\"\n".into();
        change(setup);
    });
    let mut neighbour = stand.neighbour();
    neighbour.measure_alone();
    (stand, neighbour)
}

/// A region in a file of the caller's.
fn region(guest: u64, bytes: u64, file: File) -> Region {
    let range = (GuestAddress(guest), bytes as usize, Some(FileOffset::new(file.try_clone().unwrap(), 0)));
    let memory = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
    Region { guest, bytes, file, memory }
}

fn memory_file(bytes: u64) -> File {
    let file = File::from(rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(bytes).unwrap();
    file
}

/// An honest front-end is served on the socket as ever.
fn check_served(socket: &Path) {
    let front = Front::connect(socket);
    front.negotiate();
    let region = Region::new(0, MIB);
    let mut ring = Ring::first(&front, &region);
    ring.check_io(8);
    ring.stop(&front);
}

/// While requests are under way the VMM makes the file of its guest's memory shorter: what they read and write is gone, the rings
/// too.
#[test]
fn guest_memory_that_is_shortened_ends_its_session_alone() {
    let (mut stand, neighbour) = stand(|_| {});
    let mut told = 0;
    for (round, socket) in ["hostile", "embedded", "hostile", "embedded"].into_iter().enumerate() {
        let socket = stand.path(socket);
        let front = Front::connect(&socket);
        front.negotiate();
        let memory = region(0, MIB, memory_file(MIB));
        memory.add(&front);
        // The data is elsewhere: the ring stays, and the drive finds out; or all goes.
        let data = region(16 * MIB, 4 * MIB, memory_file(4 * MIB));
        data.add(&front);
        let mut ring = RawRing::new(&memory, 0, 0, Format::Split, 64);
        ring.start(&front);
        let chains: Vec<_> = (0..16u64)
            .map(|at| {
                ring.request(
                    0x40000 + at * 64,
                    (at % 2) as u32,
                    at * 128,
                    &[Piece { address: 16 * MIB + at * 0x10000, bytes: 0x10000, writable: at % 2 == 0 }],
                )
            })
            .collect();
        for chain in &chains {
            ring.offer(chain).unwrap();
        }
        ring.kick();
        if round < 2 {
            memory.file.set_len(0).unwrap();
        } else {
            data.file.set_len(0).unwrap();
            if round == 2 {
                for _ in 0..16 {
                    ring.wait_used();
                }
            }
            // The others may have been done before.
            ring.offer(&chains[0]).unwrap();
            ring.kick();
        }
        // The program itself looks at no data: a drive of another process finds out, and this is none of the program's business.
        if round < 2 || socket == stand.path("embedded") {
            front.wait_for_end();
            eventually("the reason is told", || stand.program.lines_with(LOST) > told);
            told += 1;
        }
        drop(front);
        check_served(&socket);
    }
    assert!(stand.program.child.try_wait().unwrap().is_none(), "the program goes on");
    neighbour.verdict();
}

/// A small file system, full. `None`: this machine lets nobody mount one.
struct Full(tempfile::TempDir);

impl Full {
    fn mount() -> Option<Full> {
        let folder = tempfile::tempdir().unwrap();
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "none"]).arg(folder.path()).output();
        match mount {
            Ok(output) if output.status.success() => Some(Full(folder)),
            other => {
                println!("no file system can be mounted here: {other:?}");
                None
            }
        }
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).output();
    }
}

/// Guest memory with holes on a file system that has no room for them.
#[test]
fn guest_memory_on_a_full_file_system_ends_its_session_alone() {
    let Some(full) = Full::mount() else { return };
    let (mut stand, neighbour) = stand(|_| {});
    let mut told = 0;
    for socket in ["hostile", "embedded"] {
        let file =
            File::options().create(true).truncate(true).read(true).write(true).open(full.0.path().join("m")).unwrap();
        file.set_len(8 * MIB).unwrap();
        let front = Front::connect(&stand.path(socket));
        front.negotiate();
        let memory = region(0, 8 * MIB, file);
        let mut ring = RawRing::new(&memory, 0, 0, Format::Split, 64);
        let chain = ring.request(0x40000, 0, 0, &[writable(4 * MIB, 64 << 10)]);
        std::fs::write(full.0.path().join("filler"), vec![1; 2 << 20]).expect_err("it is full");
        memory.add(&front);
        ring.start(&front);
        // All of this lies in pages that are there.
        ring.offer(&chain).unwrap();
        ring.kick();
        if socket == "embedded" {
            front.wait_for_end();
            told += 1;
            eventually("the reason is told", || stand.program.lines_with(LOST) >= told);
        } else {
            // The drive alone touches it. The status lies in a page that is there.
            ring.wait_used();
        }
        drop(front);
        std::fs::remove_file(full.0.path().join("filler")).unwrap();
        check_served(&stand.path(socket));
    }
    assert!(stand.program.child.try_wait().unwrap().is_none(), "the program goes on");
    neighbour.verdict();
}

/// What the target hands out keeps its length; what a front-end brings of its own does not.
#[test]
fn a_log_that_is_shortened_ends_its_session_alone() {
    let (mut stand, neighbour) = stand(|_| {});
    let front = stand.hostile();
    front.negotiate();
    let log = Log::new(&front, 1, 64);
    assert!(log.file.set_len(0).is_err() && log.file.set_len(log.bytes() + 4096).is_err(), "it is sealed");
    let own = memory_file(log.bytes());
    front.accept(SET_INFLIGHT_FD, &log.told, &[own.as_raw_fd()]);
    let region = Region::new(0, MIB);
    let mut ring = Ring::first(&front, &region);
    ring.check_io(8);
    own.set_len(0).unwrap();
    ring.submit(4, 0, (0, 0));
    front.wait_for_end();
    eventually("the reason is told", || stand.program.lines_with_all(&[LOST, "the log of requests in flight"]) == 1);
    check_served(&stand.socket());
    assert!(stand.program.child.try_wait().unwrap().is_none(), "the program goes on");
    neighbour.verdict();
}

/// A sparse file of 64 TiB, piece by piece, until nothing more is mapped: others are served as before, and anew.
#[test]
fn address_space_that_is_asked_for_without_end() {
    for (limit, option) in [("", "--guest-memory-limit"), ("guest-memory-limit = \"3T\"", "3072 GiB are allowed")] {
        let (mut stand, neighbour) = stand(|setup| setup.top = limit.into());
        let file = memory_file(64 << 40);
        for socket in ["hostile", "embedded"] {
            let front = Front::connect(&stand.path(socket));
            front.negotiate();
            let piece = |at: u64| {
                let words = [0, at << 40, 1 << 40, at << 40, at << 40];
                words.iter().flat_map(|word: &u64| word.to_ne_bytes()).collect::<Vec<_>>()
            };
            let taken = (0..64).take_while(|at| front.acknowledged(ADD_MEM_REG, &piece(*at), &[file.as_raw_fd()]) == 0);
            let taken = taken.count();
            assert!((3..=17).contains(&taken), "{taken} TiB on {socket}");
            stand.program.wait_for(option);
            // Many small pieces, too.
            for at in 0..600u64 {
                let words = [0, (100 << 40) + (at << 21), 4096, (100 << 40) + (at << 21), at << 21];
                let body: Vec<u8> = words.iter().flat_map(|word: &u64| word.to_ne_bytes()).collect();
                front.acknowledged(ADD_MEM_REG, &body, &[file.as_raw_fd()]);
            }
            // While it has all that, a ring with a queue pair of its own starts beside it.
            let other = if socket == "hostile" { "embedded" } else { "hostile" };
            check_served(&stand.path(other));
        }
        assert!(stand.program.child.try_wait().unwrap().is_none());
        neighbour.verdict();
    }
}

/// The log of a packed ring is taken up with 200 requests in it; while that happens and the ring runs, numbers in it change.
#[test]
fn a_log_that_changes_while_the_ring_runs() {
    let (mut stand, neighbour) = stand(|setup| setup.hostile = "queue-size = 256".into());
    let stop = AtomicBool::new(false);
    for round in 0..20u64 {
        let front = stand.hostile();
        front.negotiate_without(F_EVENT_IDX);
        let memory = Region::new(0, MIB);
        memory.add(&front);
        let log = Log::new(&front, 1, 256);
        let mut ring = RawRing::new(&memory, 0, 0, Format::Packed, 256);
        for at in 0..200u64 {
            let chain = ring.request(0x40000 + at * 64, 0, at * 8, &[writable(0x80000 + at % 16 * 4096, 4096)]);
            let id = ring.offer_indirect(0x10000 + at * 64, &chain).unwrap();
            // DescStatePacked: inflight, padding, next, last, num, counter, id, flags, len, addr.
            let entry = 32 + 32 * at;
            log.write(entry, 1u8);
            log.write(entry + 2, at as u16 + 1);
            log.write(entry + 4, at as u16);
            log.write(entry + 6, 1u16);
            log.write(entry + 8, at);
            log.write(entry + 16, id);
            log.write(entry + 18, INDIRECT);
            log.write(entry + 20, 48u32);
            log.write(entry + 24, 0x10000 + at * 64);
        }
        (200..256u64).for_each(|at| log.write(32 + 32 * at + 2, at as u16 + 1));
        log.write(8, [1u16, 256, 200, 200].into_iter().rev().fold(0u64, |all, field| all << 16 | u64::from(field)));
        log.write(16, 0x0101_0000_0000u64);
        stop.store(false, Ordering::Relaxed);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut random = fastrand::Rng::with_seed(round);
                while !stop.load(Ordering::Relaxed) {
                    for at in 0..200u64 {
                        let value = [60_000, 1, random.u16(..1 << 14)][random.usize(..3)];
                        log.write(32 + 32 * at + 6, value);
                        if round % 2 == 1 {
                            log.write(32 + 32 * at + 2, random.u16(..));
                        }
                    }
                    std::thread::yield_now();
                }
            });
            log.set(&front);
            ring.start(&front);
            ring.kick();
            // Whether it runs or is broken, the worker is with us.
            neighbour.answered(20);
            stop.store(true, Ordering::Relaxed);
        });
        front.vring_base(0);
        assert!(stand.program.child.try_wait().unwrap().is_none(), "round {round}");
    }
    check_served(&stand.socket());
    neighbour.verdict();
}

/// Not hostile, but odd: a guest that was stopped with nothing in flight comes back with a ring of another size.
#[test]
fn an_empty_log_takes_a_ring_of_another_size() {
    let (stand, neighbour) = stand(|_| {});
    for packed in [false, true] {
        let front = stand.hostile();
        front.negotiate_without(F_EVENT_IDX | if packed { 0 } else { F_RING_PACKED });
        let region = Region::new(0, MIB);
        region.add(&front);
        let log = Log::new(&front, 1, 256);
        log.set(&front);
        for size in [256, 64, 128] {
            let format = if packed { Format::Packed } else { Format::Split };
            let mut ring = RawRing::new(&region, 0, 0, format, size);
            ring.start(&front);
            for at in 0..5 {
                assert_eq!(ring.run(0x40000, 0, at * 8, &[writable(0x50000, 4096)]), 0, "packed {packed}, {size}");
            }
            front.vring_base(0);
        }
    }
    assert_eq!(stand.program.lines_with("cannot run"), 0);
    neighbour.verdict();
}

/// A log that does not fit the ring. QEMU's microvm asks for a log of 8 entries, and its guest's ring has 256.
#[test]
fn a_log_that_is_too_small_is_done_without() {
    let (stand, neighbour) = stand(|_| {});
    let region = Region::new(0, MIB);
    let mut log: Option<Log> = None;
    for _ in 0..2 {
        let front = stand.hostile();
        front.negotiate_without(F_EVENT_IDX | F_RING_PACKED);
        region.add(&front);
        let log = log.get_or_insert_with(|| Log::new(&front, 1, 8));
        log.set(&front);
        let mut ring = RawRing::new(&region, 0, 0, Format::Split, 256);
        ring.start(&front);
        for at in 0..5 {
            assert_eq!(ring.run(0x40000, 0, at * 8, &[writable(0x50000, 4096)]), 0);
        }
        assert_eq!(front.vring_base(0), 5);
    }
    assert_eq!(stand.program.lines_with_all(&["runs without a log", "Set queue-size=256"]), 2);
    assert_eq!(stand.program.lines_with("cannot run"), 0);
    neighbour.verdict();
}
