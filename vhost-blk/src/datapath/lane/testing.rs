//! What tests of lanes and workers share: a simulated controller, and a guest's driver.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nvme_driver::controller::QueuePairOptions;
use nvme_driver::{Controller, Options};
use nvme_sim::{Config, Simulator};
use vfio::{Address, Device};

use super::*;
use crate::blk::request::tests::header;
use crate::datapath::poll_group::PollGroup;
use crate::virtio::memory::DmaScope;
use crate::virtio::ring::model::{Driver, Guest, Piece, Random, readable, writable};

pub(crate) const DATA: u64 = 0x100_0000;
pub(crate) const DATA_BYTES: u64 = 0x200_0000;
/// A guest's memory: addresses and bytes.
pub(crate) const LAYOUT: [(u64, u64); 2] = [(0, DATA), (DATA, DATA_BYTES)];
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// What a status byte says before the device has written it.
const UNTOUCHED: u8 = 0xaa;

/// A controller, and a guest whose memory it can reach.
pub(crate) struct Machine {
    pub guest: Guest,
    pub namespace: nvme_driver::Namespace,
    pub controller: Controller,
    pub device: Device,
    pub sim: Arc<Simulator>,
    _directory: Arc<tempfile::TempDir>,
}

impl Machine {
    pub(crate) fn new(config: Config) -> Machine {
        Machine::with_options(config, &Options::default())
    }

    pub(crate) fn with_options(config: Config, options: &Options) -> Machine {
        let directory = Arc::new(tempfile::tempdir().unwrap());
        let sim = Arc::new(Simulator::start(config, &directory.path().join("nvme.sock")).unwrap());
        Machine::on(sim, directory, options)
    }

    fn on(sim: Arc<Simulator>, directory: Arc<tempfile::TempDir>, options: &Options) -> Machine {
        let socket: &Path = sim.socket();
        let patience = vfio::OpenOptions { request_timeout: DEADLINE };
        let device = Device::open_with(&Address::VfioUser(socket.to_owned()), &patience).unwrap();
        let controller = Controller::open(&device, options).unwrap();
        let namespace = controller.namespace(1).unwrap();
        let guest = Guest::new(&LAYOUT, Some(&DmaScope::new(device.dma().clone())));
        Machine { guest, namespace, controller, device, sim, _directory: directory }
    }

    /// This machine's controller with another driver and another guest, after a power cut.
    pub(crate) fn reopened(self) -> Machine {
        let Machine { sim, _directory, controller, device, guest, .. } = self;
        drop((guest, controller, device));
        Machine::on(sim, _directory, &Options::default())
    }

    pub(crate) fn disk(&self) -> Disk {
        disk(self.namespace.clone())
    }

    pub(crate) fn pair(&self, entries: u16) -> (QueuePair, BouncePool) {
        let options = QueuePairOptions { entries: Some(entries), ..QueuePairOptions::default() };
        (self.controller.create_queue_pair(options).unwrap(), BouncePool::new(self.device.dma(), 256 << 10).unwrap())
    }

    pub(crate) fn group(&self, entries: u16) -> PollGroup {
        let (pair, pool) = self.pair(entries);
        PollGroup::new(pair, pool)
    }
}

/// A namespace as a guest may use it that flushes.
pub(crate) fn disk(namespace: nvme_driver::Namespace) -> Disk {
    Disk { serial: *b"serial-0123456789abc", features: 1 << 9, ..Disk::new(namespace) }
}

/// An eventfd as a front-end makes it: blocking.
pub(crate) fn event() -> File {
    File::from(rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap())
}

/// How often an eventfd was signalled since the last call.
pub(crate) fn count(event: &File) -> u64 {
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut value = [0; 8];
    // Only the test reads it, so that what is readable stays so.
    let mut looked_at = [rustix::event::PollFd::new(event, rustix::event::PollFlags::IN)];
    match rustix::event::poll(&mut looked_at, Some(&now)).unwrap() {
        0 => 0,
        _ => rustix::io::read(event, &mut value).map(|_| u64::from_ne_bytes(value)).unwrap(),
    }
}

/// A guest's block driver on one ring.
pub(crate) struct TestClient {
    /// The name of its lanes.
    pub name: &'static str,
    pub driver: Driver,
    /// Headers, status bytes and indirect tables are here.
    at: u64,
    size: u16,
    next: u64,
    pub kick: File,
    pub call: File,
    pub error: File,
    pub counters: Arc<LaneCounters>,
    /// Status bytes of the chains in flight.
    statuses: std::collections::HashMap<u16, u64>,
}

/// Bytes for the ring and tables of one client: they are at multiples of this.
pub(crate) const CLIENT_BYTES: u64 = 0x40_0000;
/// Room for an indirect table of 1100 descriptors.
const TABLE_BYTES: u64 = 0x5000;

impl TestClient {
    pub(crate) fn new(guest: &Guest, index: u64, packed: bool, size: u16) -> TestClient {
        let at = index * CLIENT_BYTES;
        let driver = Driver::new(guest, packed, size, at, true);
        driver.ask_for_calls(guest, false);
        let (kick, call, error) = (event(), event(), event());
        let counters = Arc::default();
        TestClient {
            name: "test ring",
            driver,
            at,
            size,
            next: 0,
            kick,
            call,
            error,
            counters,
            statuses: Default::default(),
        }
    }

    pub(crate) fn lane(&self, guest: &Guest, disk: &Arc<Disk>) -> Lane {
        self.lane_at(guest, disk, self.driver.setup.base)
    }

    pub(crate) fn lane_at(&self, guest: &Guest, disk: &Arc<Disk>, base: u32) -> Lane {
        let setup = crate::virtio::ring::RingSetup { base, ..self.driver.setup };
        Lane::new(LaneSetup {
            name: format!("{} at {:#x}", self.name, self.at),
            ring: Ring::new(&guest.memory, &setup).unwrap(),
            memory: guest.memory.clone(),
            disk: disk.clone(),
            kick: Some(self.kick.try_clone().unwrap()),
            call: Some(self.call.try_clone().unwrap()),
            error: Some(self.error.try_clone().unwrap()),
            counters: self.counters.clone(),
            log: Arc::default(),
            hold: Duration::ZERO,
        })
    }

    /// Makes a request available; `None`: the ring is full.
    pub(crate) fn send(&mut self, guest: &Guest, kind: u32, sector: u64, data: &[Piece]) -> Option<u16> {
        // Twice as many places as requests can be in flight, so that none is used twice at a time.
        let place = self.next % (2 * u64::from(self.size));
        let head = self.at + 0x1_0000 + 32 * place;
        guest.write(head, &header(kind, sector));
        guest.write(head + 16, &[UNTOUCHED]);
        let mut chain = vec![readable(head, 16)];
        chain.extend_from_slice(data);
        chain.push(writable(head + 16, 1));
        // Large chains need a table; small ones are now direct, now indirect.
        let indirect = chain.len() > usize::from(self.size) || self.next.is_multiple_of(2);
        let table = self.at + 0x2_0000 + TABLE_BYTES * place;
        assert!(place < 48 || chain.len() <= 64, "tables would leave the client's space");
        let table = if place < 48 { table } else { self.at + 0x12_0000 + 1024 * place };
        let id = self.driver.add(guest, &chain, indirect.then_some(table))?;
        self.next += 1;
        assert!(self.statuses.insert(id, head + 16).is_none());
        Some(id)
    }

    /// The next answer: chain, status byte, length.
    pub(crate) fn answer(&mut self, guest: &Guest) -> Option<(u16, u8, u32)> {
        let (id, length) = self.driver.used(guest)?;
        let status = guest.read(self.statuses.remove(&id).unwrap(), 1)[0];
        assert_ne!(status, UNTOUCHED, "an answer without a status");
        Some((id, status, length))
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.statuses.len()
    }

    /// One request from beginning to end: its status and length.
    pub(crate) fn run(
        &mut self,
        guest: &Guest,
        group: &mut PollGroup,
        kind: u32,
        sector: u64,
        data: &[Piece],
    ) -> (u8, u32) {
        let id = self.send(guest, kind, sector, data).expect("room in the ring");
        let answer = wait(group, || self.answer(guest));
        assert_eq!(answer.0, id);
        (answer.1, answer.2)
    }
}

/// Polls until there is a result.
pub(crate) fn wait<T>(group: &mut PollGroup, mut ready: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if group.poll() == 0 {
            std::thread::yield_now();
        }
        if let Some(result) = ready() {
            return result;
        }
        assert!(Instant::now() < deadline, "no answer in time");
    }
}

/// Waits for something that other threads bring about.
pub(crate) fn until<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(result) = ready() {
            return result;
        }
        assert!(Instant::now() < deadline, "{what}: not within {DEADLINE:?}");
        std::thread::yield_now();
    }
}

pub(crate) fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut data: Vec<u8> = (0..bytes.div_ceil(8)).flat_map(|_| random.next().to_le_bytes()).collect();
    data.truncate(bytes);
    data
}

/// How many lines of warning or worse this thread has written to the log since it asked first.
pub(crate) fn log_lines() -> u64 {
    struct Counter;

    thread_local! {
        static LINES: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
    }

    impl log::Log for Counter {
        fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
            metadata.level() <= log::Level::Warn
        }

        fn log(&self, record: &log::Record<'_>) {
            LINES.set(LINES.get() + u64::from(self.enabled(record.metadata())));
        }

        fn flush(&self) {}
    }

    static COUNTER: std::sync::Once = std::sync::Once::new();
    COUNTER.call_once(|| {
        log::set_logger(&Counter).expect("unit tests have no other logger");
        log::set_max_level(log::LevelFilter::Warn);
    });
    LINES.get()
}
