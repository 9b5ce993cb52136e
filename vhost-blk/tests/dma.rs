//! What a drive's server does not take of guests' memory is the matter of the guest whose memory it is.

mod common;

use std::os::fd::AsRawFd;

use common::served::MIB;
use common::*;
use nvme_sim::{Config, FaultPlan, NamespaceConfig, Simulator};
use vhost_blk::control::config::{ExportSettings, Listen, Settings};
use vhost_blk::control::target::Target;
use vhost_blk::drive::DeviceAddress;

/// Regions that the server takes.
const MOST: usize = 64;

/// A target of one drive, whose exports have so many queues each: `0`, `1`, and so on.
struct Bench {
    // Dropped in this order.
    target: Target,
    simulator: Simulator,
    folder: tempfile::TempDir,
}

impl Bench {
    fn new(queues: &[u16]) -> Bench {
        let _ = env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info"))
            .is_test(true)
            .try_init();
        let folder = tempfile::tempdir().unwrap();
        let config = Config {
            namespaces: vec![NamespaceConfig { bytes: 64 * MIB, ..NamespaceConfig::default() }],
            max_queue_pairs: queues.iter().sum(),
            faults: FaultPlan { most_dma_regions: Some(MOST), ..FaultPlan::default() },
            ..Config::default()
        };
        let simulator = Simulator::start(config, &folder.path().join("nvme")).unwrap();
        let exports = (0..).zip(queues).map(|(number, &queues): (usize, _)| ExportSettings {
            device: DeviceAddress::Vfio(vfio::Address::VfioUser(simulator.socket().to_owned())),
            listen: Listen::Path(folder.path().join(number.to_string())),
            namespace: None,
            queues,
            queue_size: 256,
            queue_pairs: None,
            read_only: false,
            serial: None,
        });
        let target = Target::start(&Settings { exports: exports.collect(), ..Settings::default() }).unwrap();
        Bench { target, simulator, folder }
    }

    fn connect(&self, export: usize) -> Front {
        let front = Front::connect(&self.folder.path().join(export.to_string()));
        front.negotiate();
        front
    }
}

/// Regions of one page each, far from those with rings.
fn pages(count: u64) -> Vec<Region> {
    (0..count).map(|number| Region::new((1 << 40) + number * 8192, 4096)).collect()
}

#[test]
fn many_rings_need_few_regions_of_a_server_and_one_too_many_costs_its_own_session() {
    const RINGS: u32 = 64;
    let bench = Bench::new(&[RINGS as u16, 1, 1]);
    let region = Region::new(0, 8 * MIB);
    let front = bench.connect(0);
    region.add(&front);
    let mut rings: Vec<_> = (0..RINGS).map(|index| Ring::new(&region, index, u64::from(index + 1) << 16)).collect();
    rings.iter().for_each(|ring| ring.start(&front));
    rings.iter_mut().for_each(|ring| ring.check_io(u64::from(ring.index) * 8));
    let neighbours_region = Region::new(0, MIB);
    let neighbours_front = bench.connect(1);
    let mut neighbour = Ring::first(&neighbours_front, &neighbours_region);
    neighbour.check_io(1024);

    let greedy = bench.connect(2);
    let more = pages(MOST as u64);
    let refused = more.iter().position(|page| {
        greedy.send(ADD_MEM_REG, NEED_REPLY, &page.single(), &[page.file.as_raw_fd()]);
        greedy.reply(ADD_MEM_REG).is_none_or(|reply| number(&reply) != 0)
    });
    let room = refused.expect("no server takes that many");
    assert!(room > 20, "64 rings and their memory left room for {room} regions");
    // What it has is as good as before; what it has not is nobody else's matter.
    neighbour.check_io(2048);
    rings.iter_mut().for_each(|ring| ring.check_io(u64::from(ring.index) * 8));
    drop(greedy);
    eventually("its regions are given back", || {
        let again = bench.connect(2);
        again.send(ADD_MEM_REG, NEED_REPLY, &more[0].single(), &[more[0].file.as_raw_fd()]);
        again.reply(ADD_MEM_REG).is_some_and(|reply| number(&reply) == 0)
    });
    neighbour.check_io(2048);
    bench.target.stop().unwrap();
}

#[test]
fn a_drive_that_comes_back_and_takes_less_is_back_for_all_but_those_whose_memory_it_does_not_take() {
    let bench = Bench::new(&[1, 2]);
    let (region, victims_region) = (Region::new(0, MIB), Region::new(0, MIB));
    let front = bench.connect(0);
    let mut neighbour = Ring::first(&front, &region);
    neighbour.check_io(0);
    let victim = bench.connect(1);
    let mut ring = Ring::first(&victim, &victims_region);
    ring.check_io(1024);
    let more = pages(30);
    more[..20].iter().for_each(|page| page.add(&victim));

    // What comes while it is away is good for now.
    bench.simulator.remove();
    neighbour.submit(0, 0, (neighbour.data(), 4096));
    ring.submit(0, 1024, (ring.data(), 4096));
    more[20..].iter().for_each(|page| page.add(&victim));
    bench.simulator.faults().change(|plan| plan.most_dma_regions = Some(20));
    bench.simulator.reinsert().unwrap();
    assert_eq!(neighbour.wait(), 0);
    victim.wait_for_end();
    neighbour.check_io(8);
    // It may come again with less.
    eventually("there is room again", || {
        let again = bench.connect(1);
        let region = Region::new(0, MIB);
        again.send(ADD_MEM_REG, NEED_REPLY, &region.single(), &[region.file.as_raw_fd()]);
        again.reply(ADD_MEM_REG).is_some_and(|reply| number(&reply) == 0) && {
            let mut ring = Ring::new(&region, 0, 0x10000);
            ring.start(&again);
            ring.check_io(1024);
            true
        }
    });
    neighbour.check_io(8);
    bench.target.stop().unwrap();
}
