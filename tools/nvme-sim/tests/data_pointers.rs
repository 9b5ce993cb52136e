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

/// The pieces of host memory that PRPs name, or the status of what is wrong with them: read entry by entry from the host's
/// memory, as NVMe Base 2.0, 4.1.1, says it.
fn named_by_prps(host: &Host, page: u64, (prp1, prp2): (u64, u64), bytes: u64) -> Result<Vec<(u64, u64)>, u16> {
    const OFFSET_INVALID: u16 = 0x013;
    let whole_page = |address: u64| if address.is_multiple_of(page) { Ok(address) } else { Err(OFFSET_INVALID) };
    if prp1 % 4 != 0 {
        return Err(OFFSET_INVALID);
    }
    let mut pieces = vec![(prp1, bytes.min(page - prp1 % page))];
    let mut left = bytes - pieces[0].1;
    if left > 0 && left <= page {
        pieces.push((whole_page(prp2)?, left));
        return Ok(pieces);
    }
    let mut at = prp2;
    if left > 0 && at % 8 != 0 {
        return Err(OFFSET_INVALID);
    }
    while left > 0 {
        let entry = u64::from_le_bytes(host.get(at, 8).try_into().unwrap());
        let last_of_its_page = (at + 8) % page == 0;
        if last_of_its_page && left > page {
            at = whole_page(entry)?;
            continue;
        }
        pieces.push((whole_page(entry)?, left.min(page)));
        left -= left.min(page);
        at += 8;
    }
    Ok(pieces)
}

/// A controller with memory pages of `4096 << shift` bytes, whose queues begin at such pages.
fn with_pages(shift: u32) -> (support::Controller, Host) {
    let namespace = NamespaceConfig { bytes: 64 << 20, ..Default::default() };
    let controller = start(Config { namespaces: vec![namespace], max_transfer: None, ..Default::default() });
    let mut host = Host::connect(controller.simulator.socket());
    let page = 4096_u64 << shift;
    let (sq, cq) = (host.allocate(page), host.allocate(page));
    host.prepare(32);
    host.relocate_admin(sq, cq);
    host.write32(0x14, 4 << 20 | 6 << 16 | shift << 7 | 1);
    host.await_status(1, 1);
    host.align(page);
    host.create_pair(1, (page / 64).min(1024) as u16, None);
    (controller, host)
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

    /// Pages that lie anywhere, in any order, also the same one twice; lists that begin anywhere in their page and go on
    /// anywhere; every page size; now and then one pointer with an offset it must not have. The bytes that move are those of
    /// the pages a walk by the specification finds, and no others.
    #[test]
    fn any_prps(
        shift in 0_u32..5,
        blocks in 1_u32..1400,
        offset in 0_u64..16384,
        list_slot in 0_u64..8192,
        order in prop::collection::vec(0_u64..64, 180),
        first_list in 0_u64..40,
        broken in prop::option::weighted(0.3, (0_usize..200, 1_u64..512)),
        seed: u64,
    ) {
        thread_local! {
            static HOSTS: [std::cell::RefCell<(support::Controller, Host)>; 5] =
                std::array::from_fn(|shift| std::cell::RefCell::new(with_pages(shift as u32)));
        }
        HOSTS.with(|hosts| {
            let (_, host) = &mut *hosts[shift as usize].borrow_mut();
            host.rewind();
            let page = 4096_u64 << shift;
            let bytes = u64::from(blocks) * 512;
            host.align(page);
            let data_area = host.allocate(64 * page);
            let list_area = host.allocate(40 * page);
            host.put(data_area, &vec![0xee; 64 * page as usize]);
            // The pointers: one data page for each entry, and a list page wherever a list is full.
            let prp1 = data_area + order[0] * page + (offset * 4) % page;
            let after_first = bytes.saturating_sub(page - prp1 % page);
            let mut pages = order[1..].iter().map(|at| data_area + at * page);
            let mut written = vec![];
            let prp2 = if after_first == 0 {
                0
            } else if after_first <= page {
                pages.next().unwrap()
            } else {
                let mut fresh = (0..40).map(|n| list_area + (first_list + 7 * n) % 40 * page);
                let start = fresh.next().unwrap() + list_slot * 8 % page;
                let (mut at, mut left) = (start, after_first);
                while left > 0 {
                    let full = (at + 8) % page == 0 && left > page;
                    let entry = if full { fresh.next().unwrap() } else { pages.next().unwrap() };
                    host.put(at, &entry.to_le_bytes());
                    written.push(at);
                    at = if full { entry } else { at + 8 };
                    left -= if full { 0 } else { left.min(page) };
                }
                start
            };
            let mut prps = (prp1, prp2);
            if let Some((which, by)) = broken {
                match written.get(which) {
                    Some(at) => {
                        let entry = u64::from_le_bytes(host.get(*at, 8).try_into().unwrap());
                        host.put(*at, &(entry + by).to_le_bytes());
                    }
                    None if which % 2 == 0 => prps.0 |= by % 4,
                    None => prps.1 |= by | 1,
                }
            }
            let expected = named_by_prps(host, page, prps, bytes);
            // By one contiguous SGL, which is another way through the controller.
            let data = pattern(seed, bytes as usize);
            let source = host.allocate(bytes);
            host.put(source, &data);
            let write = Sqe::new(1, 1).sgl(descriptor(0, source, bytes as u32)).blocks(7, blocks);
            prop_assert_eq!(host.command(1, write).status, 0);
            let mut area = vec![0xee; 64 * page as usize];
            let read = Sqe::new(2, 1).prp(prps.0, prps.1).blocks(7, blocks);
            prop_assert_eq!(host.command(1, read).status, expected.as_ref().err().copied().unwrap_or(0));
            if let Ok(pieces) = &expected {
                let mut done = 0;
                for (address, length) in pieces {
                    let to = (address - data_area) as usize;
                    area[to..to + *length as usize].copy_from_slice(&data[done..done + *length as usize]);
                    done += *length as usize;
                }
                prop_assert_eq!(done as u64, bytes);
            }
            prop_assert!(host.get(data_area, area.len()) == area, "other bytes than those");
            Ok(())
        })?;
    }

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
