//! A drive that comes back better, or merely different, goes on; a namespace that is another one costs its own disk alone.

use std::path::Path;
use std::time::Duration;

use nvme_sim::{Config, FaultAction, FaultMatch, FaultRule, IdentifyPatch, NamespaceConfig, Simulator};
use vm_memory::{Bytes, GuestAddress};

use crate::common::*;
use crate::stand::Stand;
use crate::{IOERR, MIB, guest};

const T_DISCARD: u32 = 11;
/// What the neighbour's requests wait for a drive that is opened anew.
pub(crate) const AWAY: Duration = Duration::from_secs(5);

/// A drive whose blocks outlive it.
pub(crate) fn config(folder: &Path) -> Config {
    let namespace = |name: &str| {
        let file = Some(folder.join(name));
        NamespaceConfig { bytes: 64 * MIB, file, ..NamespaceConfig::default() }
    };
    Config { namespaces: vec![namespace("first"), namespace("second")], ..Config::default() }
}

/// Another drive comes where the first one was.
pub(crate) fn replace(stand: &mut Stand, config: Config) {
    let place = stand.drive.socket().to_owned();
    let small = NamespaceConfig { bytes: MIB, ..NamespaceConfig::default() };
    let none = Config { namespaces: vec![small], ..Config::default() };
    let none = Simulator::start(none, &stand.path("none")).unwrap();
    // There is one at a time: they have the same files.
    drop(std::mem::replace(&mut stand.drive, none));
    stand.drive = Simulator::start(config, &place).unwrap();
}

#[test]
fn other_hints_and_limits_are_taken_over() {
    let blocks = tempfile::tempdir().unwrap();
    let mut stand = Stand::with(|setup| setup.drive = config(blocks.path()));
    let neighbour = stand.neighbour();
    let region = Region::new(0, MIB);
    let (_front, mut ring) = guest(&stand, &region);
    let changes: [fn(&mut Config); 4] = [
        |config| config.noiob = 64,
        |config| (config.noiob, config.max_transfer) = (0, Some(64 << 10)),
        |config| (config.sgl, config.shadow_doorbells, config.queue_entries) = (false, false, 128),
        |config| (config.max_transfer, config.max_queue_pairs, config.doorbell_stride) = (None, 64, 2),
    ];
    for (change, times) in changes.iter().zip(1..) {
        let mut config = config(blocks.path());
        change(&mut config);
        replace(&mut stand, config);
        ring.check_io(8 * times);
        eventually("it is back", || stand.program.lines_with("the drive is back") == times as usize);
        neighbour.answered(100);
    }
    assert_eq!(stand.program.lines_with("answers with I/O errors"), 0);
    neighbour.verdict_within(AWAY);
}

#[test]
fn another_namespace_costs_its_own_disk() {
    let blocks = tempfile::tempdir().unwrap();
    let mut stand = Stand::with(|setup| setup.drive = config(blocks.path()));
    let neighbour = stand.neighbour();
    let region = Region::new(0, MIB);
    let (_front, mut ring) = guest(&stand, &region);
    let mut other = config(blocks.path());
    other.namespaces[0].block_bytes = 4096;
    replace(&mut stand, other);
    eventually("its disk is away", || ring.read_one(0) == IOERR);
    assert_eq!(stand.program.lines_with("namespace 1 has blocks of 4096 bytes now, and had blocks of 512"), 1);
    neighbour.answered(1000);
    replace(&mut stand, config(blocks.path()));
    eventually("its disk is back", || ring.read_one(0) == 0);
    ring.check_io(8);
    neighbour.verdict_within(AWAY);
}

/// A firmware that comes with a reset, say, takes fewer ranges in a command. Drivers that were told otherwise are served as before.
#[test]
fn limits_that_shrink_with_a_reset_are_kept_to() {
    let stand = Stand::with(|setup| setup.top = "io-timeout = 1".into());
    let neighbour = stand.neighbour();
    let region = Region::new(0, MIB);
    let (_front, mut ring) = guest(&stand, &region);
    let ranges: Vec<u8> = (0..16u64)
        .flat_map(|at| [&(at * 64).to_le_bytes()[..], &8u32.to_le_bytes(), &0u32.to_le_bytes()].concat())
        .collect();
    let discard = |ring: &mut Ring| {
        region.memory.write_slice(&ranges, GuestAddress(ring.data())).unwrap();
        ring.request(T_DISCARD, 0, (ring.data(), ranges.len() as u32))
    };
    assert_eq!(discard(&mut ring), 0);
    // DMRL of CNS 06h.
    stand.drive.patch_identify(vec![IdentifyPatch::new(6, 3, [1])]).unwrap();
    let when = FaultMatch { opcode: Some(2), namespace: Some(1), limit: Some(1), ..FaultMatch::default() };
    stand.drive.faults().add(FaultRule { action: FaultAction::LoseCompletion, when });
    ring.check_io(1024);
    stand.program.wait_for("the drive is back");
    assert_eq!(discard(&mut ring), 0);
    neighbour.verdict_within(AWAY);
}
