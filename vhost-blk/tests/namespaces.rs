//! Namespaces that change while guests use them: another size, write protection, taken away and returned; and what a drive warns
//! of.

mod common;
#[path = "common/program.rs"]
mod program;

use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::*;
use nvme_sim::{Config, FaultAction, FaultMatch, FaultRule, NamespaceConfig, Simulator, Status};
use program::Program;

const MIB: u64 = 1 << 20;
const IOERR: u8 = 1;
/// Sectors of a MiB.
const SECTORS: u64 = MIB / 512;

/// The program, on a controller of this process.
struct Bench {
    program: Program,
    simulator: Option<Simulator>,
    folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Bench {
        let folder = tempfile::tempdir().unwrap();
        let simulator = Simulator::start(Self::config(64), &folder.path().join("nvme")).unwrap();
        let device = format!("vfio-user:{}", simulator.socket().display());
        let socket = folder.path().join("s");
        let program = Program::serve_device(&device, &socket, &[]);
        Bench { program, simulator: Some(simulator), folder }
    }

    fn config(mib: u64) -> Config {
        Config {
            namespaces: vec![NamespaceConfig { bytes: mib * MIB, ..NamespaceConfig::default() }],
            ..Config::default()
        }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("s")
    }

    fn simulator(&self) -> &Simulator {
        self.simulator.as_ref().expect("it was taken away")
    }

    fn logged(&self, text: &str) -> usize {
        self.program.lines_with(text)
    }
}

/// A front-end with a channel on which it hears of changes.
struct Hearing {
    front: Front,
    channel: UnixStream,
}

impl Hearing {
    fn connect(bench: &Bench) -> Hearing {
        let front = Front::connect(&bench.socket());
        front.negotiate();
        Hearing::open(front)
    }

    /// Opens a channel, or another one.
    fn open(front: Front) -> Hearing {
        let (channel, theirs) = UnixStream::pair().unwrap();
        front.accept(SET_BACKEND_REQ_FD, &[], &[theirs.as_raw_fd()]);
        channel.set_read_timeout(Some(DEADLINE)).unwrap();
        Hearing { front, channel }
    }

    /// Waits to be told that the configuration has changed, and nothing else.
    #[track_caller]
    fn hears_of_a_change(&self) {
        let mut header = [0; 12];
        (&self.channel).read_exact(&mut header).expect("nothing is told");
        let words = [2u32, VERSION, 0];
        assert_eq!(header.to_vec(), words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<_>>());
    }

    #[track_caller]
    fn heard_nothing(&self) {
        self.channel.set_nonblocking(true).unwrap();
        let error = (&self.channel).read(&mut [0]).map_err(|error| error.kind());
        assert_eq!(error, Err(std::io::ErrorKind::WouldBlock));
        self.channel.set_nonblocking(false).unwrap();
    }

    fn capacity(&self) -> u64 {
        u64::from_le_bytes(self.front.config(0, 8).try_into().unwrap())
    }
}

#[test]
fn a_resize_reaches_the_guest() {
    let bench = Bench::new();
    let hearing = Hearing::connect(&bench);
    let region = Region::new(0, MIB);
    region.add(&hearing.front);
    let mut rings = [Ring::new(&region, 0, 0x10000), Ring::new(&region, 1, 0x20000)];
    rings.iter().for_each(|ring| ring.start(&hearing.front));
    rings[0].store(0, 0x11);
    assert_eq!(hearing.capacity(), 64 * SECTORS);
    for ring in &mut rings {
        assert_eq!(ring.write_one(64 * SECTORS - 8), 0);
        assert_eq!(ring.write_one(64 * SECTORS), IOERR, "beyond the end");
    }
    for (mib, before) in [(96, 64), (32, 96), (128, 32)] {
        bench.simulator().resize(1, mib * MIB).unwrap();
        hearing.hears_of_a_change();
        assert_eq!(hearing.capacity(), mib * SECTORS);
        for ring in &mut rings {
            assert_eq!(ring.write_one(mib * SECTORS - 8), 0, "the last block of {mib} MiB");
            assert_eq!(ring.read_one(mib * SECTORS - 8), 0);
            assert_eq!(ring.write_one(mib * SECTORS), IOERR, "beyond the end of {mib} MiB");
            assert_eq!(ring.write_one(mib * SECTORS - 7), IOERR, "over the end of {mib} MiB");
        }
        let blocks = |mib: u64| mib * SECTORS;
        let line = format!("namespace 1 was resized from {} to {} blocks of 512 bytes", blocks(before), blocks(mib));
        assert_eq!(bench.logged(&line), 1);
    }
    hearing.heard_nothing();
    assert!(rings[0].holds(0, 0x11));
    rings.iter().for_each(|ring| ring.stop(&hearing.front));

    // Whoever comes later sees it in any case; whoever opens no channel is no trouble.
    drop(hearing);
    let front = Front::connect(&bench.socket());
    front.negotiate();
    assert_eq!(front.config(0, 8), (128 * SECTORS).to_le_bytes());
    bench.simulator().resize(1, 16 * MIB).unwrap();
    bench.program.wait_for("cannot tell the front-end of the new size: it has opened no channel");
    assert_eq!(front.config(0, 8), (16 * SECTORS).to_le_bytes());
    assert_eq!(bench.logged("the front-end was told of the new size"), 3);
}

#[test]
fn a_front_end_that_does_not_listen_any_more_holds_nobody_up() {
    let bench = Bench::new();
    let hearing = Hearing::connect(&bench);
    let Hearing { front, channel } = hearing;
    drop(channel);
    bench.simulator().resize(1, 32 * MIB).unwrap();
    bench.program.wait_for("cannot tell the front-end of the new size: Broken pipe");
    assert_eq!(front.config(0, 8), (32 * SECTORS).to_le_bytes());
    // Another channel can be opened; what is none does not take its place.
    let hearing = Hearing::open(front);
    let (_pipe, pipe) = std::io::pipe().unwrap();
    hearing.front.refuse(SET_BACKEND_REQ_FD, &[], &[pipe.as_raw_fd()]);
    hearing.front.refuse(SET_BACKEND_REQ_FD, &[], &[]);
    bench.simulator().resize(1, 48 * MIB).unwrap();
    hearing.hears_of_a_change();
}

#[test]
fn a_namespace_that_is_taken_away_and_returned() {
    let bench = Bench::new();
    let hearing = Hearing::connect(&bench);
    let region = Region::new(0, MIB);
    let mut ring = Ring::first(&hearing.front, &region);
    ring.check_io(0);
    bench.simulator().remove_namespace(1).unwrap();
    bench.program.wait_for("namespace 1 was deleted or detached");
    for sector in 0..100 {
        assert_eq!((ring.read_one(sector * 8), ring.write_one(sector * 8)), (IOERR, IOERR));
    }
    assert_eq!(hearing.capacity(), 64 * SECTORS, "the guest's disk does not shrink");
    // It is still away, which is looked at, and told once.
    let nothing = FaultAction::Delay(Duration::ZERO..=Duration::ZERO);
    const IDENTIFY: u8 = 6;
    let when = FaultMatch { admin: true, opcode: Some(IDENTIFY), namespace: Some(1), ..FaultMatch::default() };
    bench.simulator().faults().add(FaultRule { action: nothing, when });
    eventually("it was looked at twice", || bench.simulator().faults().fired() >= 2);
    assert_eq!(bench.logged("namespace 1 was deleted or detached"), 1);
    bench.simulator().add_namespace(NamespaceConfig { bytes: 64 * MIB, ..NamespaceConfig::default() }).unwrap();
    eventually("it works again", || ring.read_one(0) == 0);
    assert_eq!(bench.logged("namespace 1 is back"), 1);
    ring.check_io(0);
    hearing.heard_nothing();

    // One with other blocks is not it.
    bench.simulator().remove_namespace(1).unwrap();
    let other = NamespaceConfig { bytes: 64 * MIB, block_bytes: 4096, ..NamespaceConfig::default() };
    bench.simulator().add_namespace(other).unwrap();
    bench.program.wait_for("namespace 1 has blocks of 4096 bytes now, and had blocks of 512");
    assert_eq!((ring.read_one(0), ring.write_one(0)), (IOERR, IOERR));
    bench.simulator().remove_namespace(1).unwrap();
    bench.simulator().add_namespace(NamespaceConfig { bytes: 32 * MIB, ..NamespaceConfig::default() }).unwrap();
    hearing.hears_of_a_change();
    assert_eq!(hearing.capacity(), 32 * SECTORS);
    ring.check_io(0);
    ring.stop(&hearing.front);
}

#[test]
fn a_drive_comes_back_with_another_size() {
    let mut bench = Bench::new();
    let hearing = Hearing::connect(&bench);
    let region = Region::new(0, MIB);
    let mut ring = Ring::first(&hearing.front, &region);
    ring.check_io(0);
    let path = bench.simulator().socket().to_owned();
    drop(bench.simulator.take());
    bench.simulator = Some(Simulator::start(Bench::config(96), &path).unwrap());
    bench.program.wait_for("the drive is back");
    // Before anything was asked of it.
    assert_eq!(bench.logged("was resized from 131072 to 196608 blocks"), 1);
    hearing.hears_of_a_change();
    assert_eq!(hearing.capacity(), 96 * SECTORS);
    eventually("the drive is back", || ring.write_one(96 * SECTORS - 8) == 0);
    assert_eq!(ring.write_one(96 * SECTORS), IOERR);
}

#[test]
fn a_namespace_that_is_write_protected() {
    let bench = Bench::new();
    let hearing = Hearing::connect(&bench);
    let region = Region::new(0, MIB);
    let mut ring = Ring::first(&hearing.front, &region);
    ring.store(0, 0x33);
    bench.simulator().protect(1, true).unwrap();
    bench.program.wait_for("namespace 1 is write-protected; writes fail, reads go on");
    let refused = || bench.simulator().counters().errors.load(Ordering::Relaxed);
    eventually("the drive is not asked for writes any more", || {
        let before = refused();
        assert_eq!(ring.write_one(0), IOERR);
        refused() == before
    });
    let before = refused();
    for _ in 0..100 {
        assert_eq!(ring.write_one(0), IOERR);
    }
    assert_eq!(refused(), before);
    assert!(ring.holds(0, 0x33));
    bench.simulator().protect(1, false).unwrap();
    bench.program.wait_for("namespace 1 is no longer write-protected");
    eventually("it can be written", || ring.write_one(0) == 0);
    ring.check_io(0);
    assert_eq!(bench.logged("is write-protected"), 1);
    hearing.heard_nothing();
}

#[test]
fn media_that_cannot_be_written_any_more() {
    let bench = Bench::new();
    let front = Front::connect(&bench.socket());
    front.negotiate();
    let region = Region::new(0, MIB);
    let mut ring = Ring::first(&front, &region);
    ring.store(0, 0x44);
    const WRITE: u8 = 1;
    let when = FaultMatch { opcode: Some(WRITE), ..FaultMatch::default() };
    // Namespace is Write Protected, do not retry.
    bench
        .simulator()
        .faults()
        .add(FaultRule { action: FaultAction::Fail(Status::new(0, 0x20).not_to_be_retried()), when });
    bench.simulator().faults().change(|plan| plan.critical_warning = 1 << 3);
    for _ in 0..100 {
        assert_eq!(ring.write_one(0), IOERR);
        assert!(ring.holds(0, 0x44));
    }
    bench.program.wait_for("the drive warns: its media cannot be written any more");
    const GET_LOG_PAGE: u8 = 2;
    let when = FaultMatch { admin: true, opcode: Some(GET_LOG_PAGE), ..FaultMatch::default() };
    let before = bench.simulator().faults().fired();
    let nothing = FaultAction::Delay(Duration::ZERO..=Duration::ZERO);
    bench.simulator().faults().add(FaultRule { action: nothing, when });
    eventually("the drive was asked again", || bench.simulator().faults().fired() >= before + 3);
    assert_eq!(bench.logged("the drive warns"), 1);
}

#[test]
fn warnings_are_told_when_they_appear_and_when_they_go() {
    let bench = Bench::new();
    let warns = |bits: u8| bench.simulator().faults().change(|plan| plan.critical_warning = bits);
    warns(0b00_0011);
    bench.program.wait_for(
        "the drive warns: its spare capacity has fallen to 100 %, below its threshold of 10 %; replace it soon",
    );
    bench.program.wait_for("the drive warns: its temperature");
    warns(0b11_0110);
    bench.program.wait_for("the drive no longer warns of low spare capacity");
    bench.program.wait_for("the drive warns: it has become unreliable");
    bench.program.wait_for("the drive warns: the backup of its volatile memory has failed");
    bench.program.wait_for("the drive warns: its persistent memory region");
    warns(0);
    bench.program.wait_for("the drive no longer warns of its persistent memory region");
    assert_eq!(bench.logged("the drive no longer warns of its temperature"), 1);
    assert_eq!((bench.logged("the drive warns"), bench.logged("the drive no longer warns")), (5, 5));
    warns(2);
    eventually("it is told again", || bench.logged("the drive warns: its temperature") == 2);
}
