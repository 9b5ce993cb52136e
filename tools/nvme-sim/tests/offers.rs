//! What Identify does not offer is refused, bit by bit.

mod support;

use nvme_sim::{Config, IdentifyPatch, NamespaceConfig};
use support::{Host, Sqe, descriptor, with_two_namespaces};

const FLUSH: u8 = 0x00;
const WRITE: u8 = 0x01;
const READ: u8 = 0x02;
const COMPARE: u8 = 0x05;
const WRITE_ZEROES: u8 = 0x08;
const DATASET_MANAGEMENT: u8 = 0x09;
const VERIFY: u8 = 0x0c;

const INVALID_OPCODE: u16 = 0x001;
const INVALID_FIELD: u16 = 0x002;
const INVALID_NAMESPACE: u16 = 0x00b;
const SGL_TYPE: u16 = 0x011;
const SGL_GRANULARITY: u16 = 0x01e;
const INVALID_LOG_PAGE: u16 = 0x109;
const SIZE_LIMIT: u16 = 0x183;

/// The status of `entry` once `patch` is in place, and that of it without.
fn with_and_without(
    controller: &support::Controller,
    host: &mut Host,
    queue: u16,
    patch: IdentifyPatch,
    entry: Sqe,
) -> (u16, u16) {
    controller.simulator.patch_identify(vec![patch]).unwrap();
    let with = host.command(queue, entry).status;
    controller.simulator.patch_identify(vec![]).unwrap();
    (with, host.command(queue, entry).status)
}

/// Dataset Management of these ranges (first block, blocks), with the attribute to deallocate.
fn deallocate(host: &mut Host, ranges: &[(u64, u32)]) -> Sqe {
    let page = host.allocate(4096);
    for (n, (lba, blocks)) in ranges.iter().enumerate() {
        host.put(page + 16 * n as u64 + 4, &blocks.to_le_bytes());
        host.put(page + 16 * n as u64 + 8, &lba.to_le_bytes());
    }
    Sqe::new(DATASET_MANAGEMENT, 1).prp(page, 0).dword(10, ranges.len() as u32 - 1).dword(11, 4)
}

#[test]
fn io_commands() {
    let (controller, mut host) = with_two_namespaces(Config { volatile_write_cache: true, ..Default::default() });
    let buffer = host.allocate(4096);
    let entry = |opcode| Sqe::new(opcode, 1).prp(buffer, 0).blocks(0, 8);
    let dsm = deallocate(&mut host, &[(0, 8)]);
    let zeroes = entry(WRITE_ZEROES).prp(0, 0);
    let deallocating = zeroes.dword(12, 1 << 25 | 7);
    // ONCS without the bit of each.
    let oncs = |bit: u16| IdentifyPatch::new(1, 520, (0x9d_u16 & !(1 << bit)).to_le_bytes());
    for (patch, entry, status, what) in [
        (oncs(0), entry(COMPARE), INVALID_OPCODE, "Compare"),
        (oncs(2), dsm, INVALID_OPCODE, "Dataset Management"),
        (oncs(3), zeroes, INVALID_OPCODE, "Write Zeroes"),
        (oncs(7), entry(VERIFY).prp(0, 0), INVALID_OPCODE, "Verify"),
        (IdentifyPatch::new(0, 33, [1]), deallocating, INVALID_FIELD, "DEAC without DLFEAT bit 3"),
        (IdentifyPatch::new(0, 33, [1]).of_namespace(1), deallocating, INVALID_FIELD, "the same of this namespace"),
        (IdentifyPatch::new(1, 525, [1]), Sqe::new(FLUSH, 0xffff_ffff), INVALID_NAMESPACE, "Flush of all namespaces"),
        (IdentifyPatch::new(1, 77, [0x0]), entry(READ), 0, "MDTS 0 is no limit"),
        (IdentifyPatch::new(6, 0, [0]), entry(VERIFY).prp(0, 0), 0, "VSL 0 is no limit"),
    ] {
        assert_eq!(with_and_without(&controller, &mut host, 1, patch, entry), (status, 0), "{what}");
    }
    // Another namespace's DLFEAT does not matter, nor does it without DEAC.
    let other = IdentifyPatch::new(0, 33, [1]).of_namespace(2);
    assert_eq!(with_and_without(&controller, &mut host, 1, other.clone(), deallocating), (0, 0));
    assert_eq!(with_and_without(&controller, &mut host, 1, IdentifyPatch::new(0, 33, [0]), zeroes), (0, 0));
    // Directives are never there.
    assert_eq!(host.command(1, entry(WRITE).dword(12, 1 << 20 | 7)).status, INVALID_FIELD);
    // A namespace that is added says the same as the others.
    controller.simulator.patch_identify(vec![IdentifyPatch::new(0, 33, [1])]).unwrap();
    let id = controller.simulator.add_namespace(NamespaceConfig { bytes: 1 << 20, ..Default::default() }).unwrap();
    let added = Sqe::new(WRITE_ZEROES, id).blocks(0, 8).dword(12, 1 << 25 | 7);
    assert_eq!(host.command(1, added).status, INVALID_FIELD);
}

#[test]
fn sizes() {
    let (controller, mut host) = with_two_namespaces(Config::default());
    let buffer = host.allocate(32768);
    let (prp1, prp2) = host.prps(buffer, 32768);
    let entry = |opcode, blocks| Sqe::new(opcode, 1).prp(prp1, prp2).blocks(0, blocks);
    let bare = |opcode, blocks| Sqe::new(opcode, 1).blocks(0, blocks);
    // Limits of 16 KiB: MDTS, VSL, WZSL are 2.
    let identify = vec![IdentifyPatch::new(1, 77, [2]), IdentifyPatch::new(6, 0, [2, 2])];
    controller.simulator.patch_identify(identify).unwrap();
    for opcode in [READ, WRITE, COMPARE] {
        assert_eq!(host.command(1, entry(opcode, 33)).status, INVALID_FIELD, "{opcode}");
        assert_eq!(host.command(1, entry(opcode, 32)).status, 0, "{opcode}");
    }
    for opcode in [VERIFY, WRITE_ZEROES] {
        assert_eq!(host.command(1, bare(opcode, 33)).status, INVALID_FIELD, "{opcode}");
        assert_eq!(host.command(1, bare(opcode, 32)).status, 0, "{opcode}");
    }
    // DMRL 2 ranges, DMRSL 100 blocks, DMSL 150.
    let limits = [&[2, 100, 0, 0, 0][..], &150_u64.to_le_bytes()].concat();
    controller.simulator.patch_identify(vec![IdentifyPatch::new(6, 3, limits)]).unwrap();
    for (ranges, status) in [
        (&[(0, 1), (8, 1), (16, 1)][..], SIZE_LIMIT),
        (&[(0, 101)], SIZE_LIMIT),
        (&[(0, 100), (200, 51)], SIZE_LIMIT),
        (&[(0, 100), (200, 50)], 0),
    ] {
        let entry = deallocate(&mut host, ranges);
        assert_eq!(host.command(1, entry).status, status, "{ranges:?}");
    }
    controller.simulator.patch_identify(vec![]).unwrap();
    let entry = deallocate(&mut host, &[(0, 1000), (2000, 1000), (4000, 1000)]);
    assert_eq!(host.command(1, entry).status, 0);
    assert_eq!(host.command(1, bare(WRITE_ZEROES, 65536)).status, 0);
}

#[test]
fn scatter_gather_lists() {
    let (controller, mut host) = with_two_namespaces(Config::default());
    let buffer = host.allocate(8192);
    let list = host.allocate(4096);
    let read = |kind, address, bytes| Sqe::new(READ, 1).sgl(descriptor(kind, address, bytes)).blocks(0, 8);
    let sgls = |value: u32| IdentifyPatch::new(1, 536, value.to_le_bytes());
    let whole = read(0, buffer, 4096);
    assert_eq!(with_and_without(&controller, &mut host, 1, sgls(0), whole), (INVALID_FIELD, 0));
    // Multiples of four only.
    assert_eq!(with_and_without(&controller, &mut host, 1, sgls(2), whole), (0, 0));
    assert_eq!(with_and_without(&controller, &mut host, 1, sgls(2), read(0, buffer + 2, 4096)), (SGL_GRANULARITY, 0));
    host.put(list, &[descriptor(0, buffer, 4095), descriptor(0, buffer + 4096, 1)].concat());
    assert_eq!(with_and_without(&controller, &mut host, 1, sgls(2), read(3, list, 32)), (SGL_GRANULARITY, 0));
    // Bit buckets.
    host.put(list, &[descriptor(0, buffer, 2048), descriptor(1, 0, 2048)].concat());
    assert_eq!(with_and_without(&controller, &mut host, 1, sgls(1), read(3, list, 32)), (SGL_TYPE, 0));
}

#[test]
fn admin_commands() {
    let (controller, mut host) = with_two_namespaces(Config { volatile_write_cache: true, ..Default::default() });
    let [shadow, events, page] = [(); 3].map(|()| host.allocate(8192));
    let oacs = |value: u16| IdentifyPatch::new(1, 256, value.to_le_bytes());
    let log = |id: u32| Sqe::new(2, 0xffff_ffff).prp(page, 0).dword(10, 127 << 16 | id);
    let feature = |opcode, id: u32, value: u32| Sqe::new(opcode, 0).dword(10, id).dword(11, value);
    for (patch, entry, statuses, what) in [
        (oacs(1 << 8), Sqe::new(0x80, 1), (INVALID_OPCODE, 0), "Format NVM"),
        (oacs(1 << 1), Sqe::new(0x7c, 0).prp(shadow, events), (INVALID_OPCODE, 0), "Doorbell Buffer Config"),
        (IdentifyPatch::new(1, 261, [4]), log(5), (INVALID_LOG_PAGE, 0), "the effects log"),
        (IdentifyPatch::new(1, 261, [2]), log(2).dword(12, 64), (INVALID_FIELD, 0), "an offset"),
        (IdentifyPatch::new(1, 520, [0x8d, 0]), feature(10, 2 | 1 << 8, 0), (INVALID_FIELD, 0), "the default"),
        (IdentifyPatch::new(1, 520, [0x8d, 0]), feature(9, 2 | 1 << 31, 0), (INVALID_FIELD, 0x10d), "saving"),
        (IdentifyPatch::new(1, 525, [0]), feature(10, 6, 0), (INVALID_FIELD, 0), "the write cache's feature"),
        (IdentifyPatch::new(1, 92, [0; 4]), feature(9, 11, 1 << 8), (INVALID_FIELD, 0), "events of namespaces"),
        (IdentifyPatch::new(1, 92, [0; 4]), feature(9, 11, 0xff), (0, 0), "events of health are not optional"),
    ] {
        assert_eq!(with_and_without(&controller, &mut host, 0, patch, entry), statuses, "{what}");
    }
    // Health of one namespace needs LPA bit 0.
    let mut of_one = log(2);
    of_one.0[1] = 1;
    assert_eq!(
        with_and_without(&controller, &mut host, 0, IdentifyPatch::new(1, 261, [7]), of_one),
        (0, INVALID_FIELD)
    );
    // The effects log lists what is offered.
    controller.simulator.patch_identify(vec![oacs(0), IdentifyPatch::new(1, 520, [0, 0])]).unwrap();
    let effects = host.log_page(5, 4096);
    let listed = |base: usize, opcode: u8| effects[base + 4 * usize::from(opcode)] & 1 == 1;
    assert!(!listed(0, 0x7c) && !listed(0, 0x80) && listed(0, 6));
    for opcode in [COMPARE, WRITE_ZEROES, DATASET_MANAGEMENT, VERIFY] {
        assert!(!listed(1024, opcode), "{opcode}");
    }
    assert!(listed(1024, READ) && listed(1024, FLUSH));
    // AERL 0: one request waits.
    controller.simulator.patch_identify(vec![IdentifyPatch::new(1, 259, [0])]).unwrap();
    host.submit(0, Sqe::new(12, 0));
    assert_eq!(host.admin(Sqe::new(12, 0)).status, 0x105);
}
