//! What is kept of a drive's write cache from session to session, and from process to process: its mode, and what it may have
//! lost.

mod common;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use common::served::*;
use common::*;
use vm_memory::{Bytes, GuestAddress};

/// A drive with a volatile cache that outlives targets.
struct Cached {
    simulator: nvme_sim::Simulator,
    _folder: tempfile::TempDir,
}

impl Cached {
    fn new() -> Cached {
        Cached::with(true)
    }

    /// Without SGLs data at odd addresses is copied.
    fn with(sgl: bool) -> Cached {
        let folder = tempfile::tempdir().unwrap();
        let namespace = nvme_sim::NamespaceConfig { bytes: 64 * MIB, ..Default::default() };
        let namespaces = vec![namespace];
        let config = nvme_sim::Config { namespaces, volatile_write_cache: true, sgl, ..Default::default() };
        let simulator = nvme_sim::Simulator::start(config, &folder.path().join("nvme")).unwrap();
        Cached { simulator, _folder: folder }
    }

    /// A new process, as far as anybody can tell.
    fn serve(&self) -> Served {
        let device: vhost_blk::drive::DeviceAddress =
            format!("vfio-user:{}", self.simulator.socket().display()).parse().unwrap();
        serve(1, |_, export| export.device = device.clone())
    }
}

/// Memory for the log of two rings.
fn new_log(served: &Served, size: u16) -> (Vec<u8>, File) {
    let front = served.connect();
    front.negotiate();
    front.ask_file(GET_INFLIGHT_FD, &inflight(0, 2, size))
}

/// A front-end with two rings, of which the first runs with the log in `told` and `file`, if there is one.
fn come_again(served: &Served, region: &Region, ring: &Ring, log: Option<(&[u8], &File)>) -> Front {
    let front = served.connect();
    front.negotiate();
    if let Some((told, file)) = log {
        front.accept(SET_INFLIGHT_FD, told, &[file.as_raw_fd()]);
    }
    region.add(&front);
    ring.start(&front);
    front
}

#[test]
fn the_write_cache_mode_outlives_the_session_and_the_process() {
    let drive = Cached::new();
    let region = Region::new(0, MIB);
    let mut ring = Ring::new(&region, 0, 0x10000);
    let mut served = drive.serve();
    let (told, log) = new_log(&served, ring.size);
    let log = Some((&told[..], &log));
    let front = come_again(&served, &region, &ring, log);
    assert_eq!(front.config(32, 1), [1]);
    front.accept(SET_CONFIG, &config(32, &[0]), &[]);
    drop(front);
    for process in [false, true, true] {
        if process {
            drop(served);
            served = drive.serve();
        }
        let front = come_again(&served, &region, &ring, log);
        assert_eq!(ring.write_one(8), 0);
        assert_eq!(
            drive.simulator.power_cut().unwrap(),
            0,
            "the guest was told that it is safe; new process {process}"
        );
        assert_eq!(front.config(32, 1), [0]);
        assert_eq!(ring.read_one(8), 0);
        // Without a log, too, as long as the process lives: what was told to one is true for the next.
        drop(front);
        let front = served.connect();
        front.negotiate();
        assert_eq!(front.config(32, 1), [0]);
    }
    // The other way, too.
    let front = come_again(&served, &region, &ring, log);
    front.accept(SET_CONFIG, &config(32, &[1]), &[]);
    drop(front);
    drop(served);
    let served = drive.serve();
    let front = come_again(&served, &region, &ring, log);
    assert_eq!(front.config(32, 1), [1]);
    ring.check_io(16);
    // Memory that is new is told the mode that the front-end was shown.
    front.accept(SET_CONFIG, &config(32, &[0]), &[]);
    ring.stop(&front);
    let (told, log) = front.ask_file(GET_INFLIGHT_FD, &inflight(0, 2, ring.size));
    front.accept(SET_INFLIGHT_FD, &told, &[log.as_raw_fd()]);
    drop(front);
    drop(served);
    let mut ring = Ring::new(&region, 0, 0x10000);
    let served = drive.serve();
    let front = come_again(&served, &region, &ring, Some((&told, &log)));
    assert_eq!(front.config(32, 1), [0]);
    ring.check_io(24);
}

/// The process is killed, and before the next one is there the drive loses its power.
#[test]
fn a_flush_fails_if_writes_were_lost_between_two_processes() {
    let drive = Cached::new();
    let region = Region::new(0, MIB);
    let mut ring = Ring::new(&region, 0, 0x10000);
    let mut served = drive.serve();
    let (told, log) = new_log(&served, ring.size);
    let (file, log) = (&log, Some((&told[..], &log)));
    for (flushed, cut) in [(false, true), (true, true), (false, false), (true, false), (false, true)] {
        let front = come_again(&served, &region, &ring, log);
        ring.check_io(8);
        assert_eq!(ring.flush(), 0);
        assert_eq!(ring.write_one(8), 0);
        if flushed {
            assert_eq!(ring.flush(), 0);
            assert_eq!(ring.read_one(8), 0);
        }
        // As a process leaves it that has no time to say good-bye: the cache is not saved, the log stays.
        let kept = Kept::of(file);
        if cut {
            drive.simulator.remove();
            drop((front, served));
            let lost = drive.simulator.power_cut().unwrap();
            assert_eq!(lost == 0, flushed);
            drive.simulator.reinsert().unwrap();
        } else {
            drop((front, served));
        }
        kept.put_back(file);
        served = drive.serve();
        // It may be killed before the guest was told: the next one knows, too.
        drop(come_again(&served, &region, &ring, log));
        drop(served);
        served = drive.serve();
        let front = come_again(&served, &region, &ring, log);
        let expected = if cut && !flushed { 1 } else { 0 };
        assert_eq!(ring.flush(), expected, "flushed {flushed}, cut {cut}");
        assert_eq!(ring.flush(), 0, "told once");
        drop(front);
    }
}

/// What a process that is killed has left in a log.
struct Kept(Vec<u8>);

impl Kept {
    fn of(log: &File) -> Kept {
        let mut bytes = vec![0; log.metadata().unwrap().len() as usize];
        log.read_exact_at(&mut bytes, 0).unwrap();
        Kept(bytes)
    }

    fn put_back(&self, log: &File) {
        log.write_all_at(&self.0, 0).unwrap();
    }
}

#[test]
fn a_guest_that_others_have_served_is_written_through_unless_they_left_word() {
    let drive = Cached::new();
    let region = Region::new(0, MIB);
    let mut ring = Ring::new(&region, 0, 0x10000);
    let mut served = drive.serve();
    let (told, log) = new_log(&served, ring.size);
    // Memory as others make it has nothing behind the logs.
    let bytes = number(&told[..8]) - 2 * 64;
    let old = inflight(bytes, 2, ring.size);
    let blank = vec![0; bytes as usize + 2 * 64];
    log.write_all_at(&blank, 0).unwrap();
    let log = Some((&old[..], &log));
    // Nobody has used it: as usual.
    let front = come_again(&served, &region, &ring, log);
    assert_eq!(front.config(32, 1), [1]);
    ring.check_io(0);
    drop(front);
    // The same process knows that the guest has not chosen anything.
    let front = come_again(&served, &region, &ring, log);
    assert_eq!(front.config(32, 1), [1]);
    ring.check_io(8);
    drop((front, served));
    // Another does not.
    served = drive.serve();
    let front = come_again(&served, &region, &ring, log);
    assert_eq!(front.config(32, 1), [0]);
    ring.check_io(16);
    assert_eq!(drive.simulator.power_cut().unwrap(), 0, "the guest may count on it");
    ring.check_io(24);
    front.accept(SET_CONFIG, &config(32, &[1]), &[]);
    assert_eq!(front.config(32, 1), [1]);
    drop((front, served));
    // Without any log there is still where the ring goes on.
    served = drive.serve();
    let front = come_again(&served, &region, &ring, None);
    assert_eq!(front.config(32, 1), [0]);
    ring.check_io(32);
}

/// A packed ring begins with wrap counters that are 1: that is no earlier server's.
#[test]
fn a_packed_ring_that_begins_anew_has_had_no_other_server() {
    for (base, writeback) in [(0x8000_8000, 1), (0x8000, 1), (0, 1), (0x8003_8003, 0)] {
        let drive = Cached::new();
        let region = Region::new(0, MIB);
        let ring = Ring::new(&region, 0, 0x10000);
        let served = drive.serve();
        let front = served.connect();
        let features = front.negotiate() | F_RING_PACKED;
        front.accept(SET_FEATURES, &features.to_ne_bytes(), &[]);
        region.add(&front);
        front.set_ring(SET_VRING_NUM, 0, ring.size.into());
        front.set_ring(SET_VRING_BASE, 0, base);
        front.accept(SET_VRING_ADDR, &ring.addresses(), &[]);
        ring.set_event(&front, SET_VRING_KICK, Some(&ring.kick));
        ring.enable(&front, true);
        assert_eq!(front.config(32, 1), [writeback], "base {base:#x}");
    }
}

/// A write that the drive refused once, or lost in a reset, is promised as much when it is issued again.
#[test]
fn a_write_that_is_issued_again_goes_through_too() {
    use nvme_sim::{FaultAction, FaultMatch, FaultRule, Status};
    const OUT: u32 = 1;
    const WRITE_ZEROES: u32 = 13;
    let drive = Cached::with(false);
    let served = drive.serve();
    let region = Region::new(0, MIB);
    let front = served.connect();
    front.negotiate();
    let mut ring = Ring::first(&front, &region);
    front.accept(SET_CONFIG, &config(32, &[0]), &[]);
    let (data, range) = (ring.data(), 0x8000);
    let mut sector = 0u64;
    for action in [FaultAction::Fail(Status::new(0, 6)), FaultAction::Fatal] {
        // As it lies, copied, and without data of its own.
        for (kind, opcode, place) in
            [(OUT, 1, (data, 4096)), (OUT, 1, (data + 2, 4096)), (WRITE_ZEROES, 8, (range, 16))]
        {
            sector += 8;
            // A range: this sector, 8 sectors, no flags.
            let words = [sector.to_le_bytes(), 8u64.to_le_bytes()].concat();
            region.memory.write_slice(&words, GuestAddress(range)).unwrap();
            let fired = drive.simulator.faults().fired();
            let when = FaultMatch { opcode: Some(opcode), limit: Some(1), ..FaultMatch::default() };
            drive.simulator.faults().add(FaultRule { action: action.clone(), when });
            assert_eq!(ring.request(kind, sector, place), 0, "{action:?}, {kind}, {place:x?}");
            assert_eq!(drive.simulator.faults().fired(), fired + 1, "{action:?}, {kind}, {place:x?}");
        }
    }
    assert_eq!(drive.simulator.power_cut().unwrap(), 0, "all of it was answered");
}
