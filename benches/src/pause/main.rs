//! How long a guest's request waits when the drive has lost it: until the drive counts as failed (`--io-timeout`), and until it has
//! been brought up again. Described in benches/README.md.

#[path = "../instructions/guest.rs"]
#[allow(dead_code)]
mod guest;

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use guest::{Guest, Layout};
use nvme_driver::Options;
use nvme_sim::{Config, FaultAction, FaultMatch, FaultRule, NamespaceConfig, Simulator};
use vfio::SharedMemory;
use vhost_blk::blk::disk::Disk;
use vhost_blk::datapath::counters::LaneCounters;
use vhost_blk::datapath::lane::{Lane, LaneSetup};
use vhost_blk::datapath::stop_policy::StopPolicy;
use vhost_blk::datapath::worker::{WorkerEvent, WorkerPool};
use vhost_blk::drive::DeviceAddress;
use vhost_blk::drive::{Drive, Supervisor};
use vhost_blk::virtio::memory::{GuestMemory, RegionDescription};
use vhost_blk::virtio::ring::Ring;

/// When a command counts as lost.
const TIMEOUT: Duration = Duration::from_millis(500);
/// A request that is not answered by then never is.
const DEADLINE: Duration = Duration::from_secs(60);
/// Where the memory begins that no request uses.
const ABOVE: u64 = 1 << 42;

/// Measures how long a request waits that the drive has lost.
#[derive(Parser)]
struct Arguments {
    /// One line of JSON for each row.
    #[arg(long)]
    json: bool,
    /// How often each is measured.
    #[arg(long, default_value_t = 9)]
    times: usize,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    for gib in [0, 64, 1024] {
        let mut pauses = measure(gib << 30, arguments.times)?;
        pauses.sort();
        let millis = |pause: Duration| pause.as_secs_f64() * 1e3;
        let (median, worst) = (millis(pauses[pauses.len() / 2]), millis(pauses[pauses.len() - 1]));
        match arguments.json {
            true => println!(
                "{}",
                serde_json::json!({ "guest_memory_gib": gib, "pause_ms_median": median, "pause_ms_worst": worst })
            ),
            false => {
                println!("{gib:5} GiB of guest memory: pause {median:.1} ms, worst {worst:.1} ms, beyond the timeout")
            }
        }
    }
    Ok(())
}

/// The times for which a lost request waited beyond the timeout.
fn measure(memory: u64, times: usize) -> Result<Vec<Duration>, Box<dyn Error>> {
    let folder = tempfile::tempdir()?;
    let namespace = NamespaceConfig { bytes: 64 << 20, ..Default::default() };
    let config = Config { namespaces: vec![namespace], ..Default::default() };
    let simulator = Simulator::start(config, &folder.path().join("nvme"))?;
    let pool = Arc::new(WorkerPool::start(&[])?);
    let address = DeviceAddress::Vfio(vfio::Address::VfioUser(simulator.socket().to_owned()));
    let options = Options { io_timeout: TIMEOUT, ..Options::default() };
    let drive = Drive::open(&address, &options, DEADLINE, pool.clone()).map_err(|error| format!("{error:?}"))?;
    let drive = Arc::new(drive);
    let _supervisor = Supervisor::start(drive.clone())?;

    let mut guest = Guest::new(Layout { packed: false, indirect: true, two_regions: false });
    let mut regions = guest.regions();
    if memory != 0 {
        let unused = SharedMemory::create(memory as usize)?;
        let description =
            RegionDescription { guest_address: ABOVE, user_address: ABOVE, bytes: memory, file_offset: 0 };
        regions.push((description, unused.file().try_clone()?));
    }
    let table = Arc::new(GuestMemory::new().replaced(drive.memory(), regions)?);
    let lane = Lane::new(LaneSetup {
        name: "measured".into(),
        ring: Ring::new(&table, &guest.ring())?,
        memory: table.clone(),
        disk: Arc::new(Disk::new(drive.namespace(Some(1))?.known().namespace)),
        kick: None,
        call: None,
        error: None,
        counters: Arc::new(LaneCounters::default()),
        log: Arc::default(),
        hold: DEADLINE,
    });
    let share = drive.share("measured".into(), None);
    let lease = share.lease(0, guest::RING)?;
    let handle = lease.start(lane);
    let mut read = || -> Result<Duration, Box<dyn Error>> {
        let start = Instant::now();
        guest.submit(1, 1 << 17);
        while guest.collect() == 0 {
            // What the program's own thread does.
            for event in pool.events() {
                if let WorkerEvent::Expired { slot, count, at } = event {
                    drive.report_expired(slot, count, at);
                }
            }
            if start.elapsed() > DEADLINE {
                return Err("a request is not answered".into());
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        guest.succeed();
        Ok(start.elapsed())
    };
    let mut pauses = Vec::new();
    for _ in 0..times {
        read()?;
        let when = FaultMatch { limit: Some(1), ..FaultMatch::default() };
        simulator.faults().add(FaultRule { action: FaultAction::LoseCompletion, when });
        pauses.push(read()?.saturating_sub(TIMEOUT));
        // A drive that fails again at once is brought up less eagerly.
        let rest = Instant::now() + Duration::from_secs(2);
        while Instant::now() < rest {
            read()?;
        }
    }
    let stopping = lease.begin_stop(handle, StopPolicy::AnswerAll);
    lease.finish_stop(stopping, lease.stop_deadline());
    Ok(pauses)
}
