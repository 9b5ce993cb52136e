//! The client against a target that is not this project's: a disk in memory on the crate `vhost-user-backend`, with the rings of
//! `virtio-queue`. A client that agreed only with our own target could share its mistakes.

use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use blk_perf::{ClientOptions, Report, Workload};
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

const SECTOR: usize = 512;
const DISK_BYTES: usize = 16 << 20;
const QUEUES: usize = 2;

/// virtio 1.2, section 6 (VERSION_1), section 5.2.3 (BLK_SIZE, FLUSH, MQ, WRITE_ZEROES), and the vhost-user protocol's own bit.
const FEATURES: u64 = 1 << 32 | 1 << 6 | 1 << 9 | 1 << 12 | 1 << 14 | 1 << 30;
/// virtio 1.2, section 5.2.6.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const WRITE_ZEROES: u32 = 13;
const OK: u8 = 0;
const IOERR: u8 = 1;

/// How long a read of a slow disk takes, at least.
const SLOW_READ: Duration = Duration::from_millis(2);

/// How the disk behaves.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Manner {
    Honest,
    /// Every 50th write is acknowledged and forgotten.
    LosesWrites,
    /// Every 50th read is refused.
    FailsReads,
    /// Every read takes [`SLOW_READ`].
    SlowReads,
}

struct MemoryDisk {
    memory: Option<GuestMemoryAtomic<GuestMemoryMmap>>,
    data: Vec<u8>,
    manner: Manner,
    reads: u64,
    writes: u64,
}

impl MemoryDisk {
    fn new(manner: Manner) -> Self {
        MemoryDisk { memory: None, data: vec![0; DISK_BYTES], manner, reads: 0, writes: 0 }
    }

    /// Does one request, whose answer may have `room` bytes before the status byte; the status byte's value.
    fn request(&mut self, reader: &mut impl Read, writer: &mut impl Write, room: usize) -> io::Result<u8> {
        let mut header = [0; 16];
        reader.read_exact(&mut header)?;
        let kind = u32::from_le_bytes(header[..4].try_into().expect("four bytes"));
        let sector = u64::from_le_bytes(header[8..].try_into().expect("eight bytes")) as usize;
        match kind {
            IN => {
                self.reads += 1;
                if self.manner == Manner::SlowReads {
                    thread::sleep(SLOW_READ);
                }
                let data = &self.data[sector * SECTOR..][..room];
                if self.manner == Manner::FailsReads && self.reads.is_multiple_of(50) {
                    writer.write_all(&vec![0; room])?;
                    return Ok(IOERR);
                }
                writer.write_all(data)?;
                Ok(OK)
            }
            OUT => {
                self.writes += 1;
                let mut data = Vec::new();
                reader.read_to_end(&mut data)?;
                if self.manner != Manner::LosesWrites || !self.writes.is_multiple_of(50) {
                    self.data[sector * SECTOR..][..data.len()].copy_from_slice(&data);
                }
                Ok(OK)
            }
            FLUSH => Ok(OK),
            WRITE_ZEROES => {
                let mut range = [0; 16];
                reader.read_exact(&mut range)?;
                let sector = u64::from_le_bytes(range[..8].try_into().expect("eight bytes")) as usize;
                let count = u32::from_le_bytes(range[8..12].try_into().expect("four bytes")) as usize;
                self.data[sector * SECTOR..][..count * SECTOR].fill(0);
                Ok(OK)
            }
            other => panic!("request type {other}, which was not offered"),
        }
    }

    fn serve(&mut self, vring: &VringRwLock) -> io::Result<()> {
        let memory = self.memory.as_ref().expect("memory comes before the first kick").memory();
        let mut ring = vring.get_mut();
        while let Some(chain) = ring.get_queue_mut().pop_descriptor_chain(memory.clone()) {
            let head = chain.head_index();
            let wrong = |error| io::Error::other(format!("descriptor chain {head}: {error}"));
            let mut reader = chain.clone().reader(&memory).map_err(wrong)?;
            let mut writer = chain.writer(&memory).map_err(wrong)?;
            let room = writer.available_bytes() - 1;
            let mut status = writer.split_at(room).map_err(wrong)?;
            let code = self.request(&mut reader, &mut writer, room)?;
            status.write_all(&[code])?;
            ring.get_queue_mut().add_used(&*memory, head, room as u32 + 1).map_err(io::Error::other)?;
        }
        if ring.get_queue_mut().needs_notification(&*memory).map_err(io::Error::other)? {
            ring.signal_used_queue()?;
        }
        Ok(())
    }
}

impl VhostUserBackendMut for MemoryDisk {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        1024
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn set_event_idx(&mut self, enabled: bool) {
        assert!(!enabled, "it was not offered");
    }

    /// The configuration space of virtio 1.2, section 5.2.4, up to `write_zeroes_may_unmap`.
    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut config = [0; 64];
        config[..8].copy_from_slice(&((DISK_BYTES / SECTOR) as u64).to_le_bytes());
        config[20..24].copy_from_slice(&(SECTOR as u32).to_le_bytes());
        config[34..36].copy_from_slice(&(QUEUES as u16).to_le_bytes());
        config[48..52].copy_from_slice(&1024u32.to_le_bytes());
        config[52..56].copy_from_slice(&1u32.to_le_bytes());
        config.get(offset as usize..(offset + size) as usize).unwrap_or_default().to_vec()
    }

    fn update_memory(&mut self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        self.memory = Some(memory);
        Ok(())
    }

    /// Without it the daemon would wait for its thread for ever.
    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        Some(new_event_consumer_and_notifier(EventFlag::NONBLOCK).expect("an eventfd can be had"))
    }

    fn handle_event(&mut self, ring: u16, _events: EventSet, vrings: &[VringRwLock], _thread: usize) -> io::Result<()> {
        self.serve(&vrings[usize::from(ring)])
    }
}

/// Serves one connection on `socket` with a disk of this manner while `client` runs.
fn with_disk<T>(manner: Manner, client: impl FnOnce(&Path) -> T) -> T {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("disk.sock");
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let disk = Arc::new(Mutex::new(MemoryDisk::new(manner)));
    let mut daemon = VhostUserDaemon::new("disk".into(), disk, memory).unwrap();
    let mut listener = Listener::new(&socket, true).unwrap();
    thread::scope(|scope| {
        // The listener waits for the client; the client finds the socket bound already.
        let server = scope.spawn(move || {
            daemon.start(&mut listener).unwrap();
            // The client's going ends the connection, which this crate tells as an error.
            let _ = daemon.wait();
        });
        let result = client(&socket);
        server.join().unwrap();
        result
    })
}

fn run(manner: Manner, change: impl FnOnce(&mut ClientOptions)) -> Report {
    with_disk(manner, |socket| {
        let mut options = ClientOptions::new(socket);
        change(&mut options);
        let workload = Workload::verified(7).for_operations(3000);
        blk_perf::run(&options, &workload, &AtomicBool::new(false), |_| {}).unwrap()
    })
}

#[test]
fn an_honest_disk_is_found_honest() {
    let report = run(Manner::Honest, |_| {});
    assert!(report.is_success(), "{:?}", report.failures);
    assert_eq!((report.verify_errors, report.io_errors), (0, 0));
    assert!(report.operations >= 3000);
    assert!(report.reads > 0 && report.writes > 0 && report.flushes > 0 && report.write_zeroes > 0, "{report:?}");
    assert_eq!(report.discards, 0, "the disk does not offer it");
}

#[test]
fn two_queues_and_interrupts() {
    let report = run(Manner::Honest, |options| {
        options.queues = 2;
        options.interrupts = true;
    });
    assert!(report.is_success(), "{:?}", report.failures);
    assert!(report.client_calls > 0, "{report:?}");
}

#[test]
fn lost_writes_are_found() {
    let report = run(Manner::LosesWrites, |_| {});
    assert!(!report.is_success());
    assert!(report.verify_errors > 0, "{report:?}");
}

#[test]
fn failed_requests_are_found() {
    let report = run(Manner::FailsReads, |_| {});
    assert!(!report.is_success());
    assert!(report.io_errors > 0 && report.verify_errors == 0, "{report:?}");
    assert!(report.read_back_errors > 0 && !report.is_right_where_it_worked(), "the read-back cannot vouch for them");
}

/// Plain reads of 4 KiB.
fn reads() -> Workload {
    Workload::plain(1, 4096, 100)
}

#[test]
fn several_disks_are_loaded_at_once_and_reported_together() {
    with_disk(Manner::Honest, |first| {
        with_disk(Manner::Honest, |second| {
            let sockets = [first.to_path_buf(), second.to_path_buf()];
            let options = ClientOptions { queues: 2, depth: 4, ..ClientOptions::new("/not/used") };
            let stop = AtomicBool::new(false);
            let workload = Workload::plain(1, 4096, 50).for_operations(4001);
            let report = blk_perf::run_disks(&options, &sockets, &workload, &stop, |_| {}).unwrap();
            assert!(report.is_success(), "{:?}", report.failures);
            assert_eq!((report.operations, report.bytes), (4001, 4001 * 4096));
        });
    });
}

#[test]
fn a_failing_disk_among_several_is_noticed() {
    with_disk(Manner::Honest, |first| {
        with_disk(Manner::FailsReads, |second| {
            let sockets = [first.to_path_buf(), second.to_path_buf()];
            let workload = reads().in_order().for_operations(400);
            let stop = AtomicBool::new(false);
            let report = blk_perf::run_disks(&ClientOptions::new(""), &sockets, &workload, &stop, |_| {}).unwrap();
            assert_eq!((report.operations, report.io_errors), (400, 4), "every 50th of 200");
        });
    });
}

#[test]
fn a_rate_is_kept() {
    let workload = reads().at_rate(2000).for_operations(1000);
    let report = with_disk(Manner::Honest, |socket| {
        let options = ClientOptions { queues: 2, depth: 64, ..ClientOptions::new(socket) };
        blk_perf::run(&options, &workload, &AtomicBool::new(false), |_| {}).unwrap()
    });
    // The last one is due after 999 intervals; nothing is early, and on a busy machine much may be late.
    assert_eq!((report.operations, report.unsent), (1000, 0));
    assert!(report.seconds >= 0.4995, "{report:?}");
}

#[test]
fn waiting_to_be_sent_counts_as_latency() {
    // 1000 a second of a disk that does 500: the last request of half a second has waited for a quarter of one.
    let run = |workload: &Workload| {
        with_disk(Manner::SlowReads, |socket| {
            let options = ClientOptions { depth: 4, ..ClientOptions::new(socket) };
            blk_perf::run(&options, workload, &AtomicBool::new(false), |_| {}).unwrap()
        })
    };
    let paced = run(&reads().at_rate(1000).for_duration(Duration::from_millis(500)));
    assert!(paced.max_us > 200_000.0 && paced.mean_us > 100_000.0, "{paced:?}");
    assert!(paced.unsent > 200, "{paced:?}");
    // As many at a time, but each only after another has completed: the same disk looks good.
    let closed = run(&reads().for_operations(250));
    assert!(closed.p50_us >= 2000.0 && closed.p50_us < paced.p50_us, "{closed:?}");
    assert_eq!(closed.unsent, 0);
}

#[test]
fn loads_that_make_no_sense_are_refused() {
    let run = |options: &ClientOptions, sockets: &[&str], workload: &Workload| {
        let sockets: Vec<_> = sockets.iter().map(Into::into).collect();
        let error = blk_perf::run_disks(options, &sockets, workload, &AtomicBool::new(false), |_| {}).unwrap_err();
        assert!(matches!(error, blk_perf::Error::Options(_)), "{error}");
        error.to_string()
    };
    let options = ClientOptions::new("");
    assert!(run(&options, &[], &reads()).contains("at least one disk"));
    assert!(run(&options, &["/a", "/b"], &Workload::verified(1)).contains("one disk"));
    assert!(run(&options, &["/a"], &reads().at_rate(0)).contains("rate of 0"));
    let sleeper = ClientOptions { interrupts: true, ..options };
    assert!(run(&sleeper, &["/a"], &reads().at_rate(1)).contains("poll"));
}
