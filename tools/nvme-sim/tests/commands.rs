//! Each command, and each refusal.

mod support;

use nvme_sim::{Config, NamespaceConfig, PowerLoss};
use support::{Host, MEMORY, MEMORY_BYTES, Sqe, await_some, pattern, start};

const INVALID_FIELD: u16 = 0x002;
const INVALID_NAMESPACE: u16 = 0x00b;
const PRP_OFFSET: u16 = 0x013;
const OUT_OF_RANGE: u16 = 0x080;
const QUEUE_ID: u16 = 0x101;
const QUEUE_SIZE: u16 = 0x102;

fn le(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn namespace(bytes: u64) -> NamespaceConfig {
    NamespaceConfig { bytes, ..Default::default() }
}

/// A controller with a namespace of 64 MiB, brought up, with one queue pair.
fn small(config: Config) -> (support::Controller, Host) {
    let controller = start(Config { namespaces: vec![namespace(64 << 20)], ..config });
    let mut host = Host::bring_up(controller.simulator.socket());
    host.create_pair(1, 64, None);
    (controller, host)
}

#[test]
fn identify() {
    let config = Config {
        namespaces: vec![
            namespace(64 << 20),
            NamespaceConfig { block_bytes: 4096, read_only: true, ..namespace(32 << 20) },
        ],
        noiob: 256,
        volatile_write_cache: true,
        serial: "S1".into(),
        ..Default::default()
    };
    let controller = start(config);
    let mut host = Host::bring_up(controller.simulator.socket());
    let page = host.identify(1, 0).unwrap();
    assert_eq!(&page[4..24], b"S1                  ");
    assert_eq!(page[77], 7, "MDTS: 512 KiB");
    assert_eq!(le(&page[80..84]), 0x0002_0000);
    assert_eq!(page[111], 1);
    assert_eq!(le(&page[256..258]), 0x102, "OACS");
    assert_eq!(&page[512..514], &[0x66, 0x44]);
    assert_eq!(le(&page[520..522]), 0x9d, "ONCS");
    assert_eq!(page[525], 7, "VWC");
    assert_eq!(le(&page[536..540]), 0x1_0001, "SGLS");
    assert!(page[768..].starts_with(b"nqn."));
    let first = host.identify(0, 1).unwrap();
    assert_eq!((le(&first[..8]), first[26] & 15, le(&first[46..48])), (131072, 0, 256));
    assert_eq!((first[130], first[134], first[25]), (9, 12, 1));
    let second = host.identify(0, 2).unwrap();
    assert_eq!((le(&second[..8]), second[26] & 15, second[99]), (8192, 1, 1));
    assert_ne!(first[104..128], second[104..128], "identifiers differ");
    assert_eq!(host.identify(0, 3).unwrap(), vec![0; 4096], "inactive");
    assert_eq!(host.identify(0, 0), Err(INVALID_NAMESPACE));
    assert_eq!(host.identify(0, 0xffff_ffff), Err(INVALID_NAMESPACE));
    assert_eq!(host.identify(0, 1000), Err(INVALID_NAMESPACE));
    let list = host.identify(2, 0).unwrap();
    assert_eq!((le(&list[..4]), le(&list[4..8]), le(&list[8..12])), (1, 2, 0));
    assert_eq!(le(&host.identify(2, 1).unwrap()[..8]), 2);
    assert_eq!(host.identify(2, 0xffff_fffe), Err(INVALID_NAMESPACE));
    let descriptors = host.identify(3, 1).unwrap();
    assert_eq!(descriptors[..2], [1, 8]);
    assert_eq!(descriptors[12..14], [2, 16]);
    assert_eq!(descriptors[16..32], first[104..120]);
    assert_eq!(descriptors[32..34], [3, 16]);
    assert_eq!(descriptors[52..57], [4, 1, 0, 0, 0]);
    for selector in [5, 6, 7, 8, 0x1c] {
        assert!(host.identify(selector, 1).is_ok(), "{selector}");
    }
    assert_eq!(host.identify(0x77, 1), Err(INVALID_FIELD));
    let page = host.allocate(4096);
    let zoned = Sqe::new(6, 1).prp(page, 0).dword(10, 5).dword(11, 2 << 24);
    assert_eq!(host.admin(zoned).status, INVALID_FIELD, "another command set");
}

#[test]
fn queues_are_created_and_deleted_by_the_rules() {
    let (_controller, mut host) = small(Config { queue_entries: 128, ..Default::default() });
    let base = host.allocate(65536);
    let cq = |id, entries, base, flags| Host::create_cq_entry(id, entries, base, flags);
    let sq = |id, entries, base, cq| Host::create_sq_entry(id, entries, base, cq);
    assert_eq!(host.set_feature(7, 3 << 16 | 3).status, 0x00c, "number of queues after the first queue");
    let unused = host.allocate(4096);
    for (entry, status, what) in [
        (cq(0, 16, base, 1), QUEUE_ID, "the admin queue"),
        (cq(1, 16, base, 1), QUEUE_ID, "exists"),
        (cq(17, 16, base, 1), QUEUE_ID, "above what was granted"),
        (cq(2, 1, base, 1), QUEUE_SIZE, "one entry"),
        (cq(2, 129, base, 1), QUEUE_SIZE, "above MQES"),
        (cq(2, 16, base, 0), INVALID_FIELD, "not contiguous"),
        (cq(2, 16, base + 64, 1), PRP_OFFSET, "not on a page"),
        (cq(2, 16, base, 17 << 16 | 3), 0x108, "no such vector"),
        (sq(2, 16, base, 2), 0x100, "no such completion queue"),
        (sq(2, 16, base, 0), QUEUE_ID, "the admin completion queue"),
        (sq(2, 16, base, 99), QUEUE_ID, "completion queue out of range"),
        (sq(1, 16, base, 1), QUEUE_ID, "exists"),
        (sq(2, 1, base, 1), QUEUE_SIZE, "one entry"),
        (sq(2, 16, base, 1).dword(11, 1 << 16), INVALID_FIELD, "not contiguous"),
        (Sqe::new(4, 0).dword(10, 1), 0x10c, "in use by a submission queue"),
        (Sqe::new(4, 0).dword(10, 0), QUEUE_ID, "the admin queue"),
        (Sqe::new(4, 0).dword(10, 9), QUEUE_ID, "no such queue"),
        (Sqe::new(0, 0).dword(10, 0), QUEUE_ID, "the admin queue"),
        (Sqe::new(0, 0).dword(10, 9), QUEUE_ID, "no such queue"),
        (cq(2, 128, base, 1), 0, "a completion queue"),
        (sq(2, 16, unused, 2), 0, "a submission queue"),
        (sq(3, 16, unused, 2), 0, "a second one for the same completion queue"),
        (Sqe::new(0, 0).dword(10, 2), 0, "deleted"),
        (Sqe::new(4, 0).dword(10, 2), 0x10c, "the other one is still there"),
        (Sqe::new(0, 0).dword(10, 3), 0, "deleted"),
        (Sqe::new(4, 0).dword(10, 2), 0, "deleted"),
        (Sqe::new(4, 0).dword(10, 2), QUEUE_ID, "deleted already"),
    ] {
        let completion = host.admin(entry);
        assert_eq!(completion.status, status, "{what}: {:#x}", completion.status);
        assert_eq!(completion.do_not_retry, status != 0);
    }
    // A queue made anew begins at its first entry.
    for _ in 0..3 {
        host.create_pair(2, 8, None);
        for lba in 0..5 {
            assert_eq!(host.write_blocks(2, lba, 9, &[1; 512]), 0);
        }
        host.delete_pair(2);
    }
    // Queue entry sizes must be set before.
    host.prepare(16);
    host.write32(0x14, 0);
    host.await_status(1, 0);
    host.write32(0x14, 1);
    host.await_status(1, 1);
    assert_eq!(host.admin(cq(1, 16, base, 1)).status, QUEUE_SIZE);
}

#[test]
fn features() {
    let (_controller, mut host) =
        small(Config { volatile_write_cache: true, max_queue_pairs: 4, ..Default::default() });
    assert_eq!(host.get_feature(7, 0).result, 3 << 16 | 3);
    for (id, value) in [(1, 0x0102_0303), (5, 7), (6, 0), (8, 0x0104), (10, 1), (11, 0x100)] {
        assert_eq!(host.set_feature(id, value).status, 0, "{id}");
        assert_eq!(host.get_feature(id, 0).result, value, "{id}");
    }
    assert_eq!(host.get_feature(6 | 1 << 8, 0).result, 1, "default");
    assert_eq!(host.get_feature(6 | 3 << 8, 0).result, 4, "capabilities: changeable");
    assert_eq!(host.get_feature(6 | 5 << 8, 0).status, INVALID_FIELD);
    assert_eq!(host.set_feature(9, 1 << 16 | 3).status, 0);
    assert_eq!((host.get_feature(9, 3).result, host.get_feature(9, 2).result), (1 << 16 | 3, 2));
    assert_eq!(host.set_feature(9, 40).status, INVALID_FIELD);
    assert_eq!(host.set_feature(2, 1).status, INVALID_FIELD, "one power state");
    assert_eq!(host.set_feature(6 | 1 << 31, 0).status, 0x10d, "not saveable");
    for id in [0, 3, 0x0c, 0x7f, 0xc0] {
        assert_eq!(host.get_feature(id, 0).status, INVALID_FIELD, "{id}");
        assert_eq!(host.set_feature(id, 0).status, INVALID_FIELD, "{id}");
    }
    let (_controller, mut host) = small(Config::default());
    assert_eq!(host.get_feature(6, 0).status, INVALID_FIELD, "no write cache");
    host.disable();
    host.enable();
    assert_eq!(host.set_feature(7, 0xffff).status, INVALID_FIELD);
    assert_eq!(host.set_feature(7, 0).result, 0);
    host.create_pair(1, 16, None);
    let base = host.allocate(4096);
    assert_eq!(host.admin(Host::create_cq_entry(2, 16, base, 1)).status, QUEUE_ID, "only one was asked for");
}

#[test]
fn log_pages() {
    let (controller, mut host) = small(Config::default());
    assert_eq!(host.write_blocks(1, 0, 9, &[1; 4096]), 0);
    assert!(host.read_blocks(1, 0, 9, 512).is_ok());
    assert_eq!(host.command(1, Sqe::new(0x7f, 1).dword(10, 0x55)).status, 1);
    let errors = host.log_page(1, 128);
    assert_eq!(le(&errors[..8]), 1);
    assert_eq!((le(&errors[8..10]), le(&errors[12..14]) >> 1 & 0x7ff, le(&errors[24..28])), (1, 1, 1));
    assert_eq!(le(&errors[16..24]), 0x55);
    assert_eq!(le(&errors[64..72]), 0);
    let health = host.log_page(2, 512);
    assert_eq!((health[0], le(&health[1..3])), (0, 300));
    assert_eq!((le(&health[64..72]), le(&health[80..88]), le(&health[112..120])), (1, 1, 1));
    assert_eq!((le(&health[32..40]), le(&health[176..184])), (1, 1));
    controller.simulator.power_cut().unwrap();
    host.enable();
    assert_eq!(le(&host.log_page(2, 512)[144..152]), 1, "unsafe shutdowns");
    assert_eq!(host.log_page(3, 512)[0], 1);
    assert_eq!(host.log_page(4, 4096), vec![0; 4096]);
    let effects = host.log_page(5, 4096);
    assert_eq!((effects[6 * 4] & 1, effects[1024 + 4] & 3, effects[1024 + 3 * 4]), (1, 3, 0));
    assert_eq!(host.log_page(0, 1024)[8], 1);
    let page = host.allocate(4096);
    let log = |id: u32| Sqe::new(2, 0xffff_ffff).prp(page, 0).dword(10, 0x7f << 16 | id);
    assert_eq!(host.admin(log(0x70)).status, 0x109, "invalid log page");
    assert_eq!(host.admin(log(2).dword(12, 3)).status, INVALID_FIELD, "offset not a dword");
    assert_eq!(host.admin(log(2).dword(12, 516)).status, INVALID_FIELD, "offset outside");
    assert_eq!(host.admin(log(2).dword(11, 0xffff)).status, INVALID_FIELD, "above MDTS");
    assert_eq!(host.admin(log(2).dword(12, 144)).status, 0);
    assert_eq!(host.get(page, 1), [1], "from an offset");
}

#[test]
fn events_and_namespace_changes() {
    let (controller, mut host) = small(Config::default());
    let wait = Sqe::new(0x0c, 0);
    let simulator = &controller.simulator;
    // Not wanted: nothing comes.
    let first = host.submit(0, wait);
    assert_eq!(simulator.add_namespace(namespace(1 << 20)).unwrap(), 2);
    host.expect_silence(0);
    assert_eq!(le(&host.log_page(4, 4096)[..8]), 2);
    assert_eq!(host.set_feature(11, 0x100).status, 0);
    simulator.resize(1, 128 << 20).unwrap();
    let event = host.wait(0);
    assert_eq!((event.id, event.result, event.status), (first, 0x04_00_02, 0));
    // The type is masked until the log is read.
    let second = host.submit(0, wait);
    simulator.remove_namespace(2).unwrap();
    host.expect_silence(0);
    assert_eq!(le(&host.log_page(4, 4096)[..12]), 1 | 2 << 32);
    assert_eq!(le(&host.log_page(4, 4096)[..8]), 0, "read once");
    assert_eq!(simulator.add_namespace(namespace(1 << 20)).unwrap(), 2);
    assert_eq!(host.wait(0).id, second);
    assert_eq!(le(&host.identify(0, 1).unwrap()[..8]), 262144);
    assert_eq!(host.write_blocks(1, 262143, 9, &[1; 512]), 0, "the new blocks are there");
    assert!(simulator.remove_namespace(9).is_err());
    assert!(simulator.resize(9, 4096).is_err());
    assert!(simulator.add_namespace(namespace(0)).is_err());
    // More requests than AERL allows; Abort ends one.
    let ids: Vec<u16> = (0..8).map(|_| host.submit(0, wait)).collect();
    assert_eq!(host.admin(wait).status, 0x105);
    let abort = |id: u16| Sqe::new(8, 0).dword(10, u32::from(id) << 16);
    let abort_id = host.submit(0, abort(ids[3]));
    let mut seen = [host.wait(0), host.wait(0)];
    seen.sort_by_key(|completion| completion.id);
    assert_eq!((seen[0].id, seen[0].status), (ids[3], 7));
    assert_eq!((seen[1].id, seen[1].result), (abort_id, 0));
    assert_eq!(host.admin(abort(0x7777)).result, 1, "nothing to abort");
    // Temperature above the threshold.
    assert_eq!(host.set_feature(11, 2).status, 0);
    host.submit(0, Sqe::new(9, 0).dword(10, 4).dword(11, 290));
    let mut results = [host.wait(0).result, host.wait(0).result];
    results.sort();
    assert_eq!(results, [0, 0x02_01_01]);
    assert_eq!(host.log_page(2, 512)[0], 2);
}

#[test]
fn invalid_doorbells_are_reported() {
    let (_controller, mut host) = small(Config::default());
    host.submit(0, Sqe::new(0x0c, 0));
    host.ring(0x1000 + 8, 64);
    assert_eq!(host.wait(0).result, 0x01_01_00, "invalid value");
    assert_eq!(host.log_page(1, 64)[8], 1, "queue 1");
    assert_eq!(host.write_blocks(1, 0, 9, &[1; 512]), 0, "the queue works on");
    host.submit(0, Sqe::new(0x0c, 0));
    host.ring(0x1000 + 12, 40);
    assert_eq!(host.wait(0).result, 0x01_01_00, "completion queue head past its tail");
    host.log_page(1, 64);
    assert_eq!(host.write_blocks(1, 0, 9, &[1; 512]), 0);
    host.submit(0, Sqe::new(0x0c, 0));
    host.ring(0x1000 + 16 * 8, 1);
    assert_eq!(host.wait(0).result, 0x01_00_00, "no such queue");
}

#[test]
fn admin_refusals() {
    let (_controller, mut host) = small(Config { shadow_doorbells: false, ..Default::default() });
    let page = host.allocate(8192);
    let outside = MEMORY + MEMORY_BYTES;
    for (entry, status, what) in [
        (Sqe::new(0x7d, 0), 1, "opcode"),
        (Sqe::new(0x7c, 0).prp(page, page), 1, "shadow doorbells are not offered"),
        (Sqe::new(6, 0).prp(outside, 0).dword(10, 1), 4, "outside of memory"),
        (Sqe::new(6, 0).prp(page + 2048, outside).dword(10, 1), 4, "second half outside of memory"),
        (Sqe::new(6, 0).prp(page + 2, 0).dword(10, 1), PRP_OFFSET, "not a dword"),
        (Sqe::new(6, 0).prp(page + 4, page + 8).dword(10, 1), PRP_OFFSET, "PRP2 not a page"),
        (Sqe::new(6, 0).sgl(support::descriptor(0, page, 4096)).dword(10, 1), INVALID_FIELD, "admin SGL"),
        (Sqe::new(0x80, 1).dword(10, 9), 0x10a, "format"),
        (Sqe::new(0x80, 1).dword(10, 2), 0x10a, "metadata formats are not offered"),
        (Sqe::new(0x80, 1).dword(10, 1 << 5), 0x10a, "protection information"),
        (Sqe::new(0x80, 1).dword(10, 2 << 9), INVALID_FIELD, "cryptographic erase"),
        (Sqe::new(0x80, 5), INVALID_NAMESPACE, "format of no namespace"),
    ] {
        assert_eq!(host.admin(entry).status, status, "{what}");
    }
    let mut fused = Sqe::new(6, 0).prp(page, 0).dword(10, 1);
    fused.0[0] |= 1 << 8;
    assert_eq!(host.admin(fused).status, INVALID_FIELD, "fused");
}

#[test]
fn io_refusals() {
    let (_controller, mut host) = small(Config { max_transfer: Some(128 << 10), sgl: false, ..Default::default() });
    let page = host.allocate(256 << 10);
    let (prp1, prp2) = host.prps(page, 256 << 10);
    let outside = MEMORY + MEMORY_BYTES;
    let read = Sqe::new(2, 1).prp(prp1, prp2).blocks(0, 8);
    let last = (64 << 20) / 512;
    for (entry, status, what) in [
        (Sqe::new(0x7f, 1), 1, "opcode"),
        (Sqe::new(4, 1), 1, "write uncorrectable"),
        (Sqe::new(2, 0).prp(prp1, 0).blocks(0, 1), INVALID_NAMESPACE, "namespace 0"),
        (Sqe::new(2, 2).prp(prp1, 0).blocks(0, 1), INVALID_NAMESPACE, "no such namespace"),
        (Sqe::new(2, 0xffff_ffff).prp(prp1, 0).blocks(0, 1), INVALID_NAMESPACE, "read of all namespaces"),
        (Sqe::new(0, 7), INVALID_NAMESPACE, "flush of no namespace"),
        (Sqe::new(0, 0xffff_ffff), 0, "flush of all"),
        (read.blocks(last, 1), OUT_OF_RANGE, "past the end"),
        (read.blocks(last - 1, 2), OUT_OF_RANGE, "across the end"),
        (read.blocks(u64::MAX, 2), OUT_OF_RANGE, "wraps"),
        (read.blocks(u64::MAX - 7, 8), OUT_OF_RANGE, "wraps to zero"),
        (read.blocks(0, 257), INVALID_FIELD, "above MDTS"),
        (read.blocks(0, 256), 0, "MDTS"),
        (read.prp(outside, 0), 4, "outside of memory"),
        (read.prp(page + 8, page + 8200), PRP_OFFSET, "PRP2 not a page"),
        (read.prp(u64::MAX - 4095, 0), 4, "the end of the address space"),
        (read.prp(page + 1, 0), PRP_OFFSET, "not a dword"),
        (read.blocks(0, 64).prp(page, page + 4), PRP_OFFSET, "list not at a quadword"),
        (read.blocks(0, 64).prp(page, outside), 4, "list outside of memory"),
        (read.sgl(support::descriptor(0, page, 4096)), INVALID_FIELD, "SGLs are not offered"),
        (Sqe::new(8, 1).blocks(last - 1, 2), OUT_OF_RANGE, "write zeroes across the end"),
        (Sqe::new(12, 1).blocks(last - 1, 2), OUT_OF_RANGE, "verify across the end"),
        (Sqe::new(12, 1).blocks(0, 65536), 0, "verify has no transfer to limit"),
    ] {
        assert_eq!(host.command(1, entry).status, status, "{what}");
    }
    // The same identifier twice in one batch, and in flight.
    let mut entry = read;
    entry.0[0] |= 0x1234 << 16;
    host.push_raw(1, entry);
    host.push_raw(1, entry);
    host.flush(1);
    assert_eq!((host.wait(1).status, host.wait(1).status), (0, 3));
    // A write whose data are partly outside changes nothing.
    assert_eq!(host.write_blocks(1, 0, 9, &[7; 8192]), 0);
    let write = Sqe::new(1, 1).prp(page, outside).blocks(0, 16);
    assert_eq!(host.command(1, write).status, 4);
    assert_eq!(host.read_blocks(1, 0, 9, 8192), Ok(vec![7; 8192]));
}

#[test]
fn write_protected_and_with_metadata() {
    let read_only = NamespaceConfig { read_only: true, ..namespace(1 << 20) };
    let metadata = NamespaceConfig { metadata_bytes: 8, ..namespace(1 << 20) };
    let config = Config { namespaces: vec![read_only, metadata], metadata_formats: true, ..Default::default() };
    let controller = start(config);
    let mut host = Host::bring_up(controller.simulator.socket());
    host.create_pair(1, 16, None);
    assert_eq!(host.write_blocks(1, 0, 9, &[1; 512]), 0x020);
    assert_eq!(host.command(1, Sqe::new(8, 1).blocks(0, 1)).status, 0x020);
    let range = host.allocate(4096);
    host.put(range + 4, &1_u32.to_le_bytes());
    let dsm = Sqe::new(9, 1).prp(range, 0);
    assert_eq!(host.command(1, dsm.dword(11, 4)).status, 0x020, "deallocation");
    assert_eq!(host.command(1, dsm.dword(11, 1)).status, 0, "a hint");
    assert_eq!(host.admin(Sqe::new(0x80, 1)).status, 0x020);
    assert!(host.read_blocks(1, 0, 9, 512).is_ok());
    let page = host.identify(0, 2).unwrap();
    assert_eq!((page[25], page[26] & 15, le(&page[136..138]), page[138]), (3, 2, 8, 9));
    let buffer = host.allocate(4096);
    assert_eq!(host.command(1, Sqe::new(2, 2).prp(buffer, 0).blocks(0, 1)).status, INVALID_NAMESPACE);
    assert_eq!(host.admin(Sqe::new(0x80, 2).dword(10, 1)).status, 0, "formatted to plain 4096");
    assert_eq!(host.command(1, Sqe::new(2, 2).prp(buffer, 0).blocks(255, 1)).status, 0);
}

#[test]
fn zeroes_deallocation_compare_and_verify() {
    let (_controller, mut host) = small(Config::default());
    let data = pattern(3, 64 << 9);
    assert_eq!(host.write_blocks(1, 0, 9, &data), 0);
    let mut model = data;
    assert_eq!(host.command(1, Sqe::new(8, 1).blocks(3, 5)).status, 0);
    model[3 * 512..8 * 512].fill(0);
    assert_eq!(host.command(1, Sqe::new(8, 1).blocks(20, 13).dword(12, 1 << 25 | 12)).status, 0);
    model[20 * 512..33 * 512].fill(0);
    assert_eq!(host.read_blocks(1, 0, 9, model.len()).unwrap(), model);
    // Dataset management: three ranges, one of them empty.
    let ranges = host.allocate(4096);
    let mut raw = vec![];
    for (lba, blocks) in [(40_u64, 10_u32), (0, 0), (60, 1)] {
        raw.extend([0; 4]);
        raw.extend(blocks.to_le_bytes());
        raw.extend(lba.to_le_bytes());
    }
    host.put(ranges, &raw);
    let dsm = Sqe::new(9, 1).prp(ranges, 0).dword(10, 2);
    assert_eq!(host.command(1, dsm.dword(11, 3)).status, 0, "hints only");
    assert_eq!(host.read_blocks(1, 0, 9, model.len()).unwrap(), model);
    assert_eq!(host.command(1, dsm.dword(11, 4)).status, 0);
    model[40 * 512..50 * 512].fill(0);
    model[60 * 512..61 * 512].fill(0);
    assert_eq!(host.read_blocks(1, 0, 9, model.len()).unwrap(), model);
    // One range of many outside: nothing happens.
    host.put(ranges + 32 + 8, &(1_u64 << 40).to_le_bytes());
    host.put(ranges + 8, &1_u64.to_le_bytes());
    assert_eq!(host.command(1, dsm.dword(11, 4)).status, OUT_OF_RANGE);
    assert_eq!(host.read_blocks(1, 0, 9, model.len()).unwrap(), model);
    // Compare.
    let buffer = host.allocate(model.len() as u64);
    host.put(buffer, &model);
    let (prp1, prp2) = host.prps(buffer, model.len() as u64);
    let compare = Sqe::new(5, 1).prp(prp1, prp2).blocks(0, 64);
    assert_eq!(host.command(1, compare).status, 0);
    host.put(buffer + model.len() as u64 - 1, &[!model[model.len() - 1]]);
    assert_eq!(host.command(1, compare).status, 0x285);
    assert_eq!(host.command(1, Sqe::new(12, 1).blocks(0, 64)).status, 0);
    // Format: all zero, other blocks.
    assert_eq!(host.admin(Sqe::new(0x80, 1).dword(10, 1 | 1 << 9)).status, 0);
    assert_eq!(le(&host.identify(0, 1).unwrap()[..8]), 16384);
    assert_eq!(host.read_blocks(1, 0, 12, 32768), Ok(vec![0; 32768]));
}

#[test]
fn power_cuts_lose_what_was_not_flushed() {
    for loss in [PowerLoss::All, PowerLoss::Some] {
        let (controller, mut host) = small(Config { volatile_write_cache: true, ..Default::default() });
        assert_eq!(host.write_blocks(1, 0, 9, &[1; 32768]), 0);
        assert_eq!(host.command(1, Sqe::new(0, 1)).status, 0);
        assert_eq!(host.write_blocks(1, 0, 9, &[2; 32768]), 0);
        let buffer = host.allocate(4096);
        host.put(buffer, &[3; 4096]);
        let forced = Sqe::new(1, 1).prp(buffer, 0).blocks(8, 8).dword(12, 1 << 30 | 7);
        assert_eq!(host.command(1, forced).status, 0, "FUA");
        let lost = controller.simulator.power_cut_losing(loss).unwrap();
        assert_eq!((host.read32(0x14), host.status()), (0, 0));
        host.enable();
        host.create_pair(1, 16, None);
        let data = host.read_blocks(1, 0, 9, 32768).unwrap();
        assert_eq!(data[4096..8192], [3; 4096]);
        let old = data.chunks(512).filter(|block| **block == [1; 512]).count();
        let new = data.chunks(512).filter(|block| **block == [2; 512]).count();
        assert_eq!((old as u64, old + new), (lost, 56));
        assert!(if loss == PowerLoss::All { new == 0 } else { new > 5 && old > 5 });
        // A shutdown, and switching the cache off, keep everything.
        assert_eq!(host.write_blocks(1, 0, 9, &[4; 512]), 0);
        host.write32(0x14, 4 << 20 | 6 << 16 | 1 << 14 | 1);
        host.await_status(0xc, 8);
        assert_eq!(controller.simulator.power_cut().unwrap(), 0);
        host.enable();
        assert_eq!(host.set_feature(6, 0).status, 0);
        host.create_pair(1, 16, None);
        assert_eq!(host.write_blocks(1, 0, 9, &[5; 512]), 0);
        assert_eq!(controller.simulator.power_cut().unwrap(), 0);
    }
}

#[test]
fn what_is_not_a_write_is_lost_and_flushed_like_one() {
    let config = Config { namespaces: vec![namespace(1 << 20); 2], volatile_write_cache: true, ..Default::default() };
    let controller = start(config);
    let mut host = Host::bring_up(controller.simulator.socket());
    host.create_pair(1, 16, None);
    let write = |host: &mut Host, id: u32, value: u8| {
        let buffer = host.allocate(4096);
        host.put(buffer, &[value; 4096]);
        assert_eq!(host.command(1, Sqe::new(1, id).prp(buffer, 0).blocks(0, 8)).status, 0);
    };
    // A flush of all namespaces reaches the second, too.
    (1..=2).for_each(|id| write(&mut host, id, 7));
    assert_eq!(host.command(1, Sqe::new(0, u32::MAX)).status, 0);
    // Deallocated and zeroed blocks come back.
    let range = host.allocate(4096);
    host.put(range + 4, &2_u32.to_le_bytes());
    assert_eq!(host.command(1, Sqe::new(9, 1).prp(range, 0).dword(11, 4)).status, 0);
    assert_eq!(host.command(1, Sqe::new(8, 1).blocks(2, 1)).status, 0);
    assert_eq!(host.command(1, Sqe::new(8, 1).blocks(3, 1).dword(12, 1 << 25)).status, 0);
    assert_eq!(host.read_blocks(1, 0, 9, 2048), Ok(vec![0; 2048]));
    assert_eq!(controller.simulator.power_cut().unwrap(), 4);
    host.enable();
    host.create_pair(1, 16, None);
    assert_eq!(host.read_blocks(1, 0, 9, 4096), Ok(vec![7; 4096]));
}

#[test]
fn a_file_survives_restarts() {
    let directory = tempfile::tempdir().unwrap();
    let file = Some(directory.path().join("blocks"));
    let config = || Config {
        namespaces: nvme_sim::replicate(&NamespaceConfig { file: file.clone(), ..namespace(1 << 40) }, 2),
        ..Default::default()
    };
    let lba = (1 << 40) / 512 - 8;
    {
        let controller = start(config());
        let mut host = Host::bring_up(controller.simulator.socket());
        host.create_pair(1, 16, None);
        assert_eq!(host.write_blocks(1, lba, 9, &pattern(5, 4096)), 0);
    }
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata(file.as_ref().unwrap()).unwrap();
    assert_eq!(metadata.len(), 1 << 40);
    assert!(metadata.blocks() * 512 < 1 << 20, "sparse");
    assert!(directory.path().join("blocks.2").exists());
    let controller = start(config());
    let mut host = Host::bring_up(controller.simulator.socket());
    host.create_pair(1, 16, None);
    assert_eq!(host.read_blocks(1, lba, 9, 4096).unwrap(), pattern(5, 4096));
    // Deallocation gives the space back.
    let before = std::fs::metadata(file.as_ref().unwrap()).unwrap().blocks();
    assert_eq!(host.command(1, Sqe::new(8, 1).blocks(lba, 8).dword(12, 1 << 25 | 7)).status, 0);
    assert_eq!(host.read_blocks(1, lba, 9, 4096), Ok(vec![0; 4096]));
    await_some("a hole", || (std::fs::metadata(file.as_ref().unwrap()).unwrap().blocks() < before).then_some(()));
}

#[test]
fn shadow_doorbells() {
    let (_controller, mut host) = small(Config::default());
    let (shadow, event_idx) = (host.allocate(4096), host.allocate(4096));
    let configure = |doorbells, event_idx| Sqe::new(0x7c, 0).prp(doorbells, event_idx);
    assert_eq!(host.admin(configure(shadow + 8, event_idx)).status, PRP_OFFSET);
    assert_eq!(host.admin(configure(MEMORY + MEMORY_BYTES, event_idx)).status, 4);
    for lba in 0..5 {
        assert_eq!(host.write_blocks(1, lba, 9, &[lba as u8; 512]), 0);
    }
    assert_eq!(host.admin(configure(shadow, event_idx)).status, 0);
    assert_eq!(le(&host.get(shadow + 8, 4)), 5, "a queue that exists goes on where it was");
    host.shadow = Some(shadow);
    for lba in 0..200 {
        assert_eq!(host.write_blocks(1, lba, 9, &[lba as u8; 512]), 0);
    }
    host.create_pair(2, 16, None);
    for lba in 0..200 {
        assert_eq!(host.read_blocks(2, lba, 9, 512), Ok(vec![lba as u8; 512]));
    }
    // Before it sleeps, the controller asks to be rung at the next entry.
    await_some("EventIdx", || (host.get(event_idx + 8, 4) == host.get(shadow + 8, 4)).then_some(()));
    host.disable();
    host.enable();
    host.create_pair(1, 16, None);
    assert_eq!(host.write_blocks(1, 0, 9, &[1; 512]), 0, "a reset ends it");
}

#[test]
fn completion_queues_never_overflow() {
    let (_controller, mut host) = small(Config::default());
    // Many submission entries, few completion entries.
    let (sq, cq) = (host.allocate(64 * 64), host.allocate(4096));
    assert_eq!(host.admin(Host::create_cq_entry(2, 4, cq, 1)).status, 0);
    assert_eq!(host.admin(Host::create_sq_entry(2, 64, sq, 2)).status, 0);
    let buffer = host.allocate(4096);
    host.adopt(2, sq, 64, cq, 4);
    let ids: Vec<u16> = (0..60).map(|_| host.push(2, Sqe::new(2, 1).prp(buffer, 0).blocks(0, 8))).collect();
    host.flush(2);
    for id in ids {
        let completion = host.wait(2);
        assert_eq!((completion.id, completion.status), (id, 0));
    }
}
