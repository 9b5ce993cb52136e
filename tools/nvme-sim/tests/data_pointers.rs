//! PRPs and SGLs: whatever list the host makes, the right bytes move, and no others.

mod support;

use nvme_sim::{Config, NamespaceConfig};
use proptest::prelude::*;
use support::{Host, MEMORY, MEMORY_BYTES, Sqe, descriptor, pattern, start};

fn bring_up() -> (support::Controller, Host) {
    let namespace = NamespaceConfig { bytes: 64 << 20, ..Default::default() };
    let config = Config { namespaces: vec![namespace], max_transfer: None, ..Default::default() };
    let controller = start(config);
    let mut host = Host::bring_up(controller.simulator.socket());
    host.create_pair(1, 64, None);
    (controller, host)
}

/// PRP1 and PRP2 for pages that lie anywhere: lists chained over pages, the first list beginning at `list_offset`.
fn chain(host: &mut Host, first: u64, pages: &[u64], list_offset: u64) -> (u64, u64) {
    match pages {
        [] => (first, 0),
        [page] => (first, *page),
        _ => {
            let mut room = (4096 - list_offset) / 8;
            let start = host.allocate(4096) + list_offset;
            let mut at = start;
            let mut left = pages;
            loop {
                if left.len() as u64 <= room {
                    host.put(at, &left.iter().flat_map(|page| page.to_le_bytes()).collect::<Vec<u8>>());
                    return (first, start);
                }
                let (now, rest) = left.split_at(room as usize - 1);
                let next = host.allocate(4096);
                let entries = now.iter().chain([&next]);
                host.put(at, &entries.flat_map(|page| page.to_le_bytes()).collect::<Vec<u8>>());
                (at, left, room) = (next, rest, 512);
            }
        }
    }
}

#[test]
fn prp_chains() {
    let (_controller, mut host) = bring_up();
    // 32 MiB of blocks, in pages in descending order, through lists that begin at several places of their page.
    for (bytes, offset, list_offset) in [
        (4096_u64, 0_u64, 0),
        (4096, 4092, 0),
        (8192, 0, 0),
        (8192, 512, 0),
        (512 * 4096, 0, 0),
        (512 * 4096, 8, 0),
        (513 * 4096, 0, 0),
        (513 * 4096, 4, 4088),
        (1024 * 4096, 0, 2048),
        (3000 * 4096, 2048, 4080),
        (8192 * 4096, 0, 0),
    ] {
        let pages = (offset + bytes).div_ceil(4096);
        let buffer = host.allocate(pages * 4096);
        let page = |n: u64| buffer + (pages - 1 - n) * 4096;
        let data = pattern(bytes + offset, bytes as usize);
        let mut at = 0;
        for n in 0..pages {
            let inner = if n == 0 { offset } else { 0 };
            let len = (4096 - inner).min(bytes - at);
            host.put(page(n) + inner, &data[at as usize..(at + len) as usize]);
            at += len;
        }
        let rest: Vec<u64> = (1..pages).map(page).collect();
        let (prp1, prp2) = chain(&mut host, page(0) + offset, &rest, list_offset);
        let write = Sqe::new(1, 1).prp(prp1, prp2).blocks(3, (bytes / 512) as u32);
        assert_eq!(host.command(1, write).status, 0, "{bytes} {offset} {list_offset}");
        let mut got = vec![];
        while got.len() < data.len() {
            let len = (data.len() - got.len()).min(4096);
            got.extend(host.read_blocks(1, 3 + got.len() as u64 / 512, 9, len).unwrap());
        }
        assert!(got == data, "{bytes} {offset} {list_offset}");
        host.rewind();
    }
}

#[test]
fn prp_lists_that_break_the_rules() {
    let (_controller, mut host) = bring_up();
    let buffer = host.allocate(1 << 22);
    let list = host.allocate(8192);
    let entries: Vec<u8> = (0..1024).flat_map(|n| (buffer + n * 4096).to_le_bytes()).collect();
    let read = |list| Sqe::new(2, 1).prp(buffer, list).blocks(0, 8 * 600);
    host.put(list, &entries);
    host.put(list + 511 * 8, &(list + 4096).to_le_bytes());
    assert_eq!(host.command(1, read(list)).status, 0);
    for (at, value, status) in [
        (0, buffer + 8, 0x013),
        (510 * 8, buffer + 512, 0x013),
        (511 * 8, list + 4096 + 8, 0x013),
        (511 * 8, MEMORY + MEMORY_BYTES, 0x004),
        (4096 + 8, MEMORY - 4096, 0x004),
        (511 * 8, list + 4088, 0x013),
    ] {
        host.put(list, &entries);
        host.put(list + 511 * 8, &(list + 4096).to_le_bytes());
        host.put(list + at, &value.to_le_bytes());
        assert_eq!(host.command(1, read(list)).status, status, "{at} {value:#x}");
    }
    // Lists that lead to themselves come to an end with the transfer.
    host.put(list + 511 * 8, &list.to_le_bytes());
    host.put(list, &buffer.to_le_bytes());
    let status = host.command(1, Sqe::new(2, 1).prp(buffer, list).blocks(0, 65536)).status;
    assert!(matches!(status, 0 | 0x013 | 0x004), "{status:#x}");
}

#[test]
fn sgl_refusals() {
    let (_controller, mut host) = bring_up();
    let buffer = host.allocate(1 << 20);
    let list = host.allocate(8192);
    let outside = MEMORY + MEMORY_BYTES;
    let read = |descriptor| Sqe::new(2, 1).sgl(descriptor).blocks(0, 8);
    let block = |bytes| descriptor(0, buffer, bytes);
    let mut odd = block(4096);
    odd[15] = 0x01;
    for (entry, status, what) in [
        (read(block(4096)), 0, "a data block"),
        (read(descriptor(0, buffer + 3, 4096)), 0, "at any byte"),
        (read(block(4095)), 0x00f, "too short"),
        (read(block(4097)), 0x00f, "too long"),
        (read(descriptor(0, outside - 100, 4096)), 0x004, "outside of memory"),
        (read(descriptor(0, u64::MAX - 100, 4096)), 0x004, "wraps"),
        (read(descriptor(5, buffer, 4096)), 0x011, "transport type"),
        (read(descriptor(4, buffer, 4096)), 0x011, "keyed"),
        (read(odd), 0x011, "subtype"),
        (read(descriptor(1, 0, 4096)), 0, "all into the bit bucket"),
        (read(descriptor(3, list, 0)), 0x00d, "empty segment"),
        (read(descriptor(3, list, 24)), 0x00d, "segment of one and a half descriptors"),
        (read(descriptor(3, outside, 16)), 0x004, "segment outside of memory"),
    ] {
        assert_eq!(host.command(1, entry).status, status, "{what}");
    }
    let mut both = read(block(4096));
    both.0[0] |= 3 << 14;
    assert_eq!(host.command(1, both).status, 0x002, "PSDT 3");
    for (kinds, first, status, what) in [
        (vec![(0, 2048), (0, 2048)], 3, 0, "two blocks"),
        (vec![(0, 2048), (1, 1024), (0, 1024)], 3, 0, "a bit bucket between"),
        (vec![(0, 0), (0, 4096), (0, 0)], 3, 0, "empty blocks"),
        (vec![(0, 4096), (3, 16)], 3, 0x00d, "a segment in the last segment"),
        (vec![(3, 16), (0, 4096)], 2, 0x00e, "a segment before the end"),
        (vec![(0, 2048), (0, 2048)], 2, 0x00e, "a segment that leads nowhere"),
        (vec![(0, 2048), (2, 32)], 2, 0x00f, "a list that leads to itself"),
        (vec![(0, 0), (2, 32)], 2, 0x00e, "an endless list of nothing"),
        (vec![(0, 2048), (9, 2048)], 3, 0x011, "no such type"),
    ] {
        let raw: Vec<u8> = kinds
            .iter()
            .flat_map(|(kind, bytes)| descriptor(*kind, if matches!(kind, 2 | 3) { list } else { buffer }, *bytes))
            .collect();
        host.put(list, &raw);
        let entry = read(descriptor(first, list, raw.len() as u32));
        assert_eq!(host.command(1, entry).status, status, "{what}");
    }
    // A write skips bit buckets: they do not count.
    let raw = [descriptor(1, 0, 512), descriptor(0, buffer, 4096)].concat();
    host.put(list, &raw);
    assert_eq!(host.command(1, Sqe::new(1, 1).sgl(descriptor(3, list, 32)).blocks(0, 8)).status, 0);
}

/// Splits `len` bytes at the given fractions.
fn split(len: u64, cuts: &[f64]) -> Vec<u64> {
    let mut at: Vec<u64> = cuts.iter().map(|cut| (*cut * len as f64) as u64).collect();
    at.extend([0, len]);
    at.sort_unstable();
    at.windows(2).map(|pair| pair[1] - pair[0]).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..Default::default() })]

    /// Any blocks, by any SGL of any number of segments, are what the host wrote: checked by reading them by PRP.
    #[test]
    fn any_sgl(
        lba in 0_u64..1000,
        blocks in 1_u32..200,
        cuts in prop::collection::vec(0.0..1.0_f64, 0..40),
        per_segment in 1_usize..9,
        gaps in prop::collection::vec(0_u64..5000, 41),
        seed: u64,
    ) {
        thread_local! {
            static HOST: std::cell::RefCell<(support::Controller, Host)> = std::cell::RefCell::new(bring_up());
        }
        HOST.with_borrow_mut(|(_, host)| {
            host.rewind();
            let len = u64::from(blocks) * 512;
            let data = pattern(seed, len as usize);
            let buffer = host.allocate(len + gaps.iter().sum::<u64>() + 4096);
            let (mut at, mut done) = (buffer, 0);
            let mut descriptors = vec![];
            for (piece, gap) in split(len, &cuts).into_iter().zip(&gaps) {
                at += gap;
                host.put(at, &data[done..done + piece as usize]);
                descriptors.push(descriptor(0, at, piece as u32));
                at += piece;
                done += piece as usize;
            }
            // From the last segment backwards.
            let chunks: Vec<_> = descriptors.chunks(per_segment).collect();
            let mut next: Option<[u8; 16]> = None;
            for chunk in chunks.iter().rev() {
                let kind = if next.is_none() { 3 } else { 2 };
                let raw: Vec<u8> = chunk.iter().chain(next.iter()).flatten().copied().collect();
                let segment = host.allocate(raw.len() as u64) + 16;
                host.allocate(16);
                host.put(segment, &raw);
                next = Some(descriptor(kind, segment, raw.len() as u32));
            }
            let pointer = next.expect("at least one descriptor");
            let entry = Sqe::new(1, 1).sgl(pointer).blocks(lba, blocks);
            prop_assert_eq!(host.command(1, entry).status, 0);
            prop_assert!(host.read_blocks(1, lba, 9, len as usize).unwrap() == data);
            // And back, by the same list.
            host.put(buffer, &vec![0x55; (at - buffer) as usize]);
            prop_assert_eq!(host.command(1, Sqe::new(2, 1).sgl(pointer).blocks(lba, blocks)).status, 0);
            let (mut from, mut done) = (buffer, 0);
            for (piece, gap) in split(len, &cuts).into_iter().zip(&gaps) {
                prop_assert!(host.get(from, *gap as usize).iter().all(|byte| *byte == 0x55), "bytes between");
                from += gap;
                prop_assert!(host.get(from, piece as usize) == data[done..done + piece as usize]);
                from += piece;
                done += piece as usize;
            }
            Ok(())
        })?;
    }
}
