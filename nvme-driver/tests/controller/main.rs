//! The control path against the simulated controller, over a vfio-user socket.

mod bring_up;
mod commands;
mod events;
mod promises;
mod queues;
mod recovery;
mod unusual;

#[allow(dead_code)] // Its `main` is not called here.
#[path = "../../examples/read_block.rs"]
mod read_block;

use std::time::{Duration, Instant};

use nvme_driver::{Controller, Error, Namespace, Options, QueuePair, Segment, Status, Work};
use nvme_sim::{Config, FaultAction, FaultMatch, FaultRule, NamespaceConfig, Simulator};
use vfio::{Address, Device, DmaBuffer};

/// Every wait for something that is to happen ends here.
const DEADLINE: Duration = Duration::from_secs(60);

/// Less than any deadline that would be waited for by mistake: the shortest of those that tests do not set is 10 seconds.
const PROMPT: Duration = Duration::from_secs(9);

/// A running simulator and a device opened on it.
struct Rig {
    device: Device,
    simulator: Simulator,
    /// What the controller asks for; nobody waits longer here unless a test says so.
    ready_timeout: Duration,
    _directory: tempfile::TempDir,
}

impl Rig {
    fn new(config: Config) -> Rig {
        let _ = env_logger::builder().is_test(true).try_init();
        let directory = tempfile::tempdir().unwrap();
        let ready_timeout = config.ready_timeout;
        let simulator = Simulator::start(config, &directory.path().join("nvme.sock")).unwrap();
        let device = Device::open(&Address::VfioUser(simulator.socket().to_path_buf())).unwrap();
        Rig { device, simulator, ready_timeout, _directory: directory }
    }

    fn open(&self) -> Controller {
        self.try_open(&Options::default()).unwrap()
    }

    fn try_open(&self, options: &Options) -> Result<Controller, Error> {
        let ready_timeout = options.ready_timeout.or(Some(self.ready_timeout));
        Controller::open(&self.device, &Options { ready_timeout, ..options.clone() })
    }

    /// Until `count` commands have met a fault.
    fn wait_for_faults(&self, count: u64) {
        let start = Instant::now();
        while self.simulator.faults().fired() < count {
            assert!(start.elapsed() < DEADLINE, "{} of {count} faults", self.simulator.faults().fired());
            std::thread::yield_now();
        }
    }

    /// From now on admin commands with `opcode` meet `action`, `limit` times.
    fn admin_fault(&self, opcode: u8, action: FaultAction, limit: u64) {
        let when = FaultMatch { admin: true, opcode: Some(opcode), limit: Some(limit), ..Default::default() };
        self.simulator.faults().add(FaultRule { action, when });
    }

    /// From now on I/O commands with `opcode` meet `action`, `limit` times.
    fn io_fault(&self, opcode: u8, action: FaultAction, limit: u64) {
        let when = FaultMatch { opcode: Some(opcode), limit: Some(limit), ..Default::default() };
        self.simulator.faults().add(FaultRule { action, when });
    }
}

/// A small default: one namespace of 16 MiB.
fn small() -> Config {
    Config { namespaces: vec![disk(16 << 20, 512)], ..Config::default() }
}

fn disk(bytes: u64, block_bytes: u32) -> NamespaceConfig {
    NamespaceConfig { bytes, block_bytes, ..Default::default() }
}

/// Reaps until `count` requests have completed.
fn complete(pair: &mut QueuePair, count: usize) -> Vec<(u64, Status)> {
    let start = Instant::now();
    let mut done = Vec::new();
    while done.len() < count {
        assert!(start.elapsed() < DEADLINE, "{} of {count} requests completed in {DEADLINE:?}", done.len());
        if pair.reap(|completed| done.push((completed.token, completed.status))) == 0 {
            std::thread::yield_now();
        }
    }
    done
}

/// Writes blocks with a pattern of `seed`, reads them back and compares.
fn write_and_verify(pair: &mut QueuePair, namespace: &Namespace, memory: &DmaBuffer, lba: u64, seed: u8) {
    const BYTES: usize = 8192;
    let pattern: Vec<u8> = (0..BYTES).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed)).collect();
    memory.write(0, &pattern).unwrap();
    memory.write(BYTES, &[0; BYTES]).unwrap();
    let from = [Segment { iova: memory.iova(), bytes: BYTES as u32 }];
    pair.submit(namespace, Work::Write { lba, segments: &from, fua: false }, 1).unwrap();
    pair.ring();
    assert_eq!(complete(pair, 1), [(1, Status::SUCCESS)]);
    let to = [Segment { iova: memory.iova() + BYTES as u64, bytes: BYTES as u32 }];
    pair.submit(namespace, Work::Read { lba, segments: &to }, 2).unwrap();
    pair.ring();
    assert_eq!(complete(pair, 1), [(2, Status::SUCCESS)]);
    let mut read = vec![0; BYTES];
    memory.read(BYTES, &mut read).unwrap();
    assert_eq!(read, pattern, "seed {seed}");
}

/// One write and read back on a new queue pair.
fn works(controller: &Controller, namespace: u32, seed: u8) {
    let namespace = controller.namespace(namespace).unwrap();
    let mut pair = controller.create_queue_pair(Default::default()).unwrap();
    let memory = controller.device().dma().allocate(16384).unwrap();
    write_and_verify(&mut pair, &namespace, &memory, 8, seed);
    controller.delete_queue_pair(pair).unwrap();
}

/// The error names `register` and has a value for it.
fn assert_names_register(error: &Error, name: &str, expected: u64) {
    let (Error::Register { register, value, .. } | Error::Gone { register, value, .. }) = error else {
        panic!("not about a register: {error}")
    };
    assert_eq!(matches!(error, Error::Gone { .. }), *value == 0xffff_ffff, "{error}");
    assert_eq!((*register, *value), (name, expected), "{error}");
    let text = error.to_string();
    assert!(text.contains(name) && text.contains(&format!("{expected:#x}")), "{text}");
}
