//! A controller in this process, a queue pair on it, and waiting with deadlines.

use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

use nvme_driver::controller::{Options, QueuePairOptions};
use nvme_driver::{Completed, Controller, Namespace, QueuePair, Segment, Work};
use nvme_sim::{Config, NamespaceConfig, Simulator};
use tempfile::TempDir;
use vfio::{Device, DmaBuffer};

/// No test waits longer for anything.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

pub(crate) struct Rig {
    pub namespace: Namespace,
    pub controller: Controller,
    pub device: Device,
    pub simulator: Simulator,
    _directory: TempDir,
}

/// One namespace of 64 MiB.
pub(crate) fn config(block_bytes: u32) -> Config {
    let namespace = NamespaceConfig { bytes: 64 << 20, block_bytes, ..Default::default() };
    Config { namespaces: vec![namespace], ..Default::default() }
}

pub(crate) fn rig(config: Config, options: &Options) -> Rig {
    let _ = env_logger::builder().is_test(true).try_init();
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("controller.sock");
    let simulator = Simulator::start(config, &socket).unwrap();
    let device = Device::open(&vfio::Address::VfioUser(socket)).unwrap();
    let controller = Controller::open(&device, options).unwrap();
    let namespace = controller.namespace(1).unwrap();
    Rig { namespace, controller, device, simulator, _directory: directory }
}

impl Rig {
    pub(crate) fn pair(&self, entries: u16) -> QueuePair {
        let options = QueuePairOptions { entries: Some(entries), ..Default::default() };
        self.controller.create_queue_pair(options).unwrap()
    }

    pub(crate) fn buffer(&self, bytes: usize) -> DmaBuffer {
        self.device.dma().allocate(bytes).unwrap()
    }
}

/// Part of a buffer.
pub(crate) fn segment(buffer: &DmaBuffer, at: usize, bytes: usize) -> Segment {
    Segment { iova: buffer.iova() + at as u64, bytes: bytes as u32 }
}

/// Reaps until `count` requests have completed.
pub(crate) fn wait(pair: &mut QueuePair, count: usize) -> Vec<Completed> {
    let mut all = Vec::new();
    let start = Instant::now();
    while all.len() < count {
        assert!(start.elapsed() < DEADLINE, "{} of {count} requests completed; {pair:?}", all.len());
        if pair.reap(|completed| all.push(completed)) == 0 {
            std::thread::yield_now();
        }
    }
    assert_eq!(all.len(), count, "more completions than requests");
    all
}

/// Reaps until nothing is out.
pub(crate) fn wait_all(pair: &mut QueuePair) {
    let out = pair.outstanding();
    wait(pair, out);
}

/// One request from beginning to end.
pub(crate) fn carry_out(pair: &mut QueuePair, namespace: &Namespace, work: Work<'_>) -> Completed {
    pair.submit(namespace, work, 0x5eed).unwrap();
    pair.ring();
    let completed = wait(pair, 1)[0];
    assert_eq!(completed.token, 0x5eed);
    assert_eq!(pair.outstanding(), 0);
    completed
}

/// Ticks until `count` requests have expired; nothing may complete meanwhile.
pub(crate) fn wait_expired(pair: &mut QueuePair, count: usize) -> Vec<u64> {
    let mut tokens = Vec::new();
    let start = Instant::now();
    while tokens.len() < count {
        assert!(start.elapsed() < DEADLINE, "{} of {count} requests expired", tokens.len());
        pair.tick(Instant::now(), |token| tokens.push(token));
        pair.reap(|completed| panic!("{completed:?} was to expire"));
        std::thread::yield_now();
    }
    tokens.sort();
    tokens
}

/// A generator whose seed is printed: SEED repeats a run.
pub(crate) struct Random(fastrand::Rng);

impl Random {
    pub(crate) fn new() -> Random {
        let given = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = given.unwrap_or_else(|| RandomState::new().hash_one(1));
        println!("seed: SEED={seed}");
        Random(fastrand::Rng::with_seed(seed))
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.0.usize(..limit)
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Vec<u8> {
        std::iter::repeat_with(|| self.0.u8(..)).take(count).collect()
    }
}
