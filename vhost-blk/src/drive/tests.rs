//! A drive that has to go, and the last resort of a stop: a lane that is still busy when all deadlines have passed.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nvme_sim::{Config, FaultAction, FaultMatch, FaultRule, NamespaceConfig, Simulator};

use super::leases::STOP_MARGIN;
use super::*;
use crate::blk::disk::Disk;
use crate::blk::request::{IOERR, OK};
use crate::datapath::lane::testing::{DATA, LAYOUT, TestClient, disk, until};
use crate::datapath::stop_policy::StopPolicy;
use crate::virtio::ring::model::{Guest, writable};

/// A drive on a controller of this process, and a guest's memory. Nobody looks after the drive.
struct OneDrive {
    drive: Arc<Drive>,
    guest: Guest,
    disk: Arc<Disk>,
    simulator: Simulator,
    _directory: tempfile::TempDir,
}

impl OneDrive {
    fn new(config: Config, options: &Options) -> OneDrive {
        let directory = tempfile::tempdir().unwrap();
        let namespace = NamespaceConfig { bytes: 64 << 20, ..NamespaceConfig::default() };
        let config = Config { namespaces: vec![namespace], ..config };
        let simulator = Simulator::start(config, &directory.path().join("nvme")).unwrap();
        let pool = Arc::new(WorkerPool::start(&[]).unwrap());
        let address = DeviceAddress::Vfio(vfio::Address::VfioUser(simulator.socket().to_owned()));
        let drive = Arc::new(Drive::open(&address, options, Duration::from_secs(600), pool).unwrap());
        let guest = Guest::new(&LAYOUT, Some(drive.memory()));
        let disk = Arc::new(disk(drive.namespace(Some(1)).unwrap().known().namespace));
        OneDrive { drive, guest, disk, simulator, _directory: directory }
    }
}

fn read(client: &mut TestClient, guest: &Guest) {
    client.send(guest, 0, 0, &[writable(DATA, 4096)]).unwrap();
    rustix::io::write(&client.kick, &1u64.to_ne_bytes()).unwrap();
}

/// Producers first, then the device (NVMe Base 2.0, 3.6.1).
#[test]
fn a_drive_that_is_wanted_back_has_answered_what_it_had_and_gets_nothing_more() {
    // Doorbells of all kinds count.
    for shadow_doorbells in [false, true] {
        let config = Config { shadow_doorbells, ..Config::default() };
        let OneDrive { drive, guest, disk, simulator, .. } = &OneDrive::new(config, &Options::default());
        // So there is something under way, and something new, at each moment.
        let late = Duration::ZERO..=Duration::from_millis(2);
        simulator.faults().add(FaultRule { action: FaultAction::Delay(late), when: FaultMatch::default() });
        let mut client = TestClient::new(guest, 0, false, 16);
        let share = drive.share("test".into(), None);
        let lease = share.lease(0, 16).unwrap();
        let handle = lease.start(client.lane(guest, disk));

        let (answered, stop) = (AtomicU64::new(0), AtomicBool::new(false));
        let (back, after) = std::thread::scope(|scope| {
            scope.spawn(|| {
                let deadline = Instant::now() + Duration::from_secs(60);
                while !stop.load(Ordering::Relaxed) || client.in_flight() > 0 {
                    assert!(Instant::now() < deadline, "{} requests are not answered", client.in_flight());
                    if !stop.load(Ordering::Relaxed) && client.in_flight() < 5 {
                        read(&mut client, guest);
                    }
                    while let Some((_, status, _)) = client.answer(guest) {
                        assert_eq!(status, OK);
                        answered.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
            // What is wrong is told when the guest has ended.
            until("the guest is at work", || (answered.load(Ordering::Relaxed) > 20).then_some(()));
            drive.detach(DetachCause::WantedBack);
            let counters = simulator.counters();
            let after =
                [&counters.commands_after_shutdown, &counters.power_cuts].map(|count| count.load(Ordering::Relaxed));
            let seen = answered.load(Ordering::Relaxed);
            let back = drive.reattach();
            if back.is_ok() {
                until("the guest goes on", || (answered.load(Ordering::Relaxed) > seen + 20).then_some(()));
            }
            stop.store(true, Ordering::Relaxed);
            (back, after)
        });
        back.unwrap();
        assert_eq!(after, [0, 0], "commands after the shutdown; shutdowns without notice");
        assert_eq!(simulator.counters().commands_after_shutdown.load(Ordering::Relaxed), 0);
        assert!(lease.finish_stop(lease.begin_stop(handle, StopPolicy::AnswerAll), lease.stop_deadline()).is_some());
    }
}

/// Nothing holds a device any more that is to go, whether it was brought up in place before or not.
#[test]
fn a_device_that_is_let_go_is_closed() {
    for failures in 0..3 {
        let OneDrive { drive, guest, disk, simulator, .. } = &OneDrive::new(Config::default(), &Options::default());
        let mut client = TestClient::new(guest, 0, false, 16);
        let share = drive.share("test".into(), None);
        let lease = share.lease(0, 16).unwrap();
        let handle = lease.start(client.lane(guest, disk));
        for _ in 0..failures {
            drive.detach(DetachCause::Failed("a test says so".into()));
            assert!(drive.device_is_open());
            drive.reattach().unwrap();
            read(&mut client, guest);
            assert_eq!(until("an answer", || client.answer(guest)).1, OK);
        }
        drive.detach(DetachCause::WantedBack);
        let gone = || simulator.counters().front_ends_gone.load(Ordering::Relaxed);
        until("it is closed", || (gone() == 1).then_some(()));
        drive.reattach().unwrap();
        read(&mut client, guest);
        assert_eq!(until("an answer", || client.answer(guest)).1, OK);
        assert!(lease.finish_stop(lease.begin_stop(handle, StopPolicy::AnswerAll), lease.stop_deadline()).is_some());
    }
}

#[test]
fn a_lane_that_stays_busy_comes_back_when_its_controller_was_reset() {
    for policy in [StopPolicy::AnswerAll, StopPolicy::LeaveInLog] {
        let answered = policy == StopPolicy::AnswerAll;
        // No command expires in time.
        let options = Options { io_timeout: Duration::from_secs(600), ..Options::default() };
        let OneDrive { drive, guest, disk, simulator, .. } = &OneDrive::new(Config::default(), &options);

        simulator.faults().add(FaultRule { action: FaultAction::LoseCompletion, when: FaultMatch::default() });
        let mut client = TestClient::new(guest, 0, false, 16);
        let share = drive.share("test".into(), None);
        let lease = share.lease(0, 16).unwrap();
        let handle = lease.start(client.lane(guest, disk));
        read(&mut client, guest);
        until("the drive has it", || (simulator.faults().fired() > 0).then_some(()));
        let start = Instant::now();
        let stopped = lease.finish_stop(lease.begin_stop(handle, policy), start).expect("the lane is given back");
        assert!(start.elapsed() < STOP_MARGIN, "{:?}", start.elapsed());
        // Whoever has left gets no error later.
        assert_eq!(client.answer(guest).map(|(_, status, _)| status), answered.then_some(IOERR));
        assert!(matches!(drive.presence(), Presence::Detached(_)));
        drop(lease);

        simulator.faults().clear();
        drive.reattach().unwrap();
        let lease = share.lease(0, 16).unwrap();
        if !answered {
            client = TestClient::new(guest, 0, false, 16);
        }
        let base = if answered { stopped.base } else { 0 };
        let handle = lease.start(client.lane_at(guest, disk, base));
        read(&mut client, guest);
        assert_eq!(until("an answer", || client.answer(guest)).1, OK);
        assert!(lease.finish_stop(lease.begin_stop(handle, StopPolicy::AnswerAll), lease.stop_deadline()).is_some());
    }
}

thread_local! {
    /// What is detached when a queue pair could not be created.
    static DETACHED: std::cell::RefCell<Option<Arc<Drive>>> = const { std::cell::RefCell::new(None) };
}

/// A ring that starts while its drive fails waits for the drive, as all others do.
#[test]
fn a_lease_whose_drive_is_detached_meanwhile_gets_its_slot() {
    let OneDrive { drive, simulator, .. } = &OneDrive::new(Config::default(), &Options::default());
    const CREATE_COMPLETION_QUEUE: u8 = 5;
    let when =
        FaultMatch { admin: true, opcode: Some(CREATE_COMPLETION_QUEUE), limit: Some(1), ..FaultMatch::default() };
    let internal_error = FaultAction::Fail(nvme_sim::Status::new(0, 6));
    simulator.faults().add(FaultRule { action: internal_error, when });
    DETACHED.set(Some(drive.clone()));
    crate::fault_point::set(|step| {
        if step == crate::fault_point::FaultStep::QueueFailed {
            let drive = DETACHED.take().expect("it fails once");
            drive.detach(DetachCause::Failed("a test".into()));
        }
    });
    let share = drive.share("test".into(), None);
    let lease = share.lease(0, 16);
    assert!(lease.is_ok(), "{}", lease.err().unwrap());
    assert!(DETACHED.take().is_none(), "no queue pair has failed");
    drive.reattach().unwrap();
    assert_eq!(drive.presence(), Presence::Attached);
}
