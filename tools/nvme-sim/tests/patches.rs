//! What a drive says of itself can be set byte by byte, from the start and while it runs.

mod support;

use nvme_sim::{Config, IdentifyPatch, NamespaceConfig, RegisterPatch, Simulator};
use support::{Host, start};

fn le(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn two_namespaces() -> Config {
    let namespace = NamespaceConfig { bytes: 64 << 20, ..Default::default() };
    Config { namespaces: vec![namespace.clone(), namespace], ..Default::default() }
}

#[test]
fn identify_says_what_it_is_told_to() {
    let identify = vec![
        IdentifyPatch::new(0x00, 46, 7_u16.to_le_bytes()),
        IdentifyPatch::new(0x00, 46, 9_u16.to_le_bytes()).of_namespace(2),
        IdentifyPatch::new(0x01, 24, *b"Another"),
        IdentifyPatch::new(0x03, 0, [3, 16, 0, 0, 0xaa]),
        IdentifyPatch::new(0x06, 2, [4]),
    ];
    let controller = start(Config { identify, ..two_namespaces() });
    let mut host = Host::bring_up(controller.simulator.socket());
    let noiob = |host: &mut Host| [1, 2].map(|id| le(&host.identify(0, id).unwrap()[46..48]));
    assert_eq!(noiob(&mut host), [7, 9]);
    let page = host.identify(1, 0).unwrap();
    assert_eq!((&page[24..31], le(&page[516..520])), (&b"Another"[..], 64), "the rest is as it was");
    assert_eq!(host.identify(3, 1).unwrap()[..5], [3, 16, 0, 0, 0xaa]);
    assert_eq!(host.identify(6, 0).unwrap()[2], 4);
    controller.simulator.patch_identify(vec![IdentifyPatch::new(0, 46, [1, 0])]).unwrap();
    assert_eq!(noiob(&mut host), [1, 1]);
    assert!(!host.identify(1, 0).unwrap()[24..].starts_with(b"Another"));
    assert!(controller.simulator.patch_identify(vec![IdentifyPatch::new(0, 4095, [1, 0])]).is_err());
}

#[test]
fn registers_read_what_they_are_told_to() {
    // CAP.MQES and CAP.TO 0, CRTO.CRWMT 4 s.
    let registers = vec![RegisterPatch::new(0, [0, 0]), RegisterPatch::new(3, [0]), RegisterPatch::new(0x68, [8, 0])];
    let controller = start(Config { registers, ..two_namespaces() });
    let mut host = Host::bring_up(controller.simulator.socket());
    assert_eq!((host.read64(0) & 0xffff, host.read64(0) >> 24 & 0xff, host.read32(0x68)), (0, 0, 8));
    // What it does is not changed by that.
    host.create_pair(1, 64, None);
    assert_eq!(host.read_blocks(1, 0, 9, 4096).map(|data| data.len()), Ok(4096));
    controller.simulator.patch_registers(vec![]).unwrap();
    assert_eq!(host.read64(0) & 0xffff, 1023);
    // Registers that the host writes are its own.
    assert!(controller.simulator.patch_registers(vec![RegisterPatch::new(0x1c, [1])]).is_err());
    let config = Config { registers: vec![RegisterPatch::new(0xb, [1, 1])], ..two_namespaces() };
    assert!(Simulator::start(config, &controller.path("other.sock")).is_err());
}
