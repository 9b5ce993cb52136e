//! Requests of every shape arrive as what they are: checked by the bytes on the simulated drive.

use nvme_driver::controller::Options;
use nvme_driver::{BouncePool, LbaRange, Namespace, QueuePair, Segment, Status, SubmitError, Work};
use vfio::DmaBuffer;

use crate::setup::{Random, Rig, carry_out, config, rig, segment, wait, wait_all};

/// Cuts `bytes` bytes of `buffer` into segments that do not overlap, in random order of address.
fn cut(random: &mut Random, buffer: &DmaBuffer, bytes: usize, fine: usize, most: usize) -> Vec<Segment> {
    let mut lengths = Vec::new();
    let mut left = bytes;
    while left > 0 {
        let length = match lengths.len() + 1 >= most {
            true => left,
            false => ((1 + random.below(9000 / fine)) * fine).min(left),
        };
        lengths.push(length);
        left -= length;
    }
    // Places: one after the other with random gaps of the same fineness.
    let mut at = 0;
    let mut segments: Vec<Segment> = lengths
        .iter()
        .map(|&length| {
            at += random.below(3) * fine;
            let place = segment(buffer, at, length);
            at += length;
            place
        })
        .collect();
    assert!(at <= buffer.len(), "the buffer is too small for the test");
    for index in (1..segments.len()).rev() {
        segments.swap(index, random.below(index + 1));
    }
    segments
}

fn fill(buffer: &DmaBuffer, segments: &[Segment], data: &[u8]) {
    let mut rest = data;
    for segment in segments {
        let (piece, after) = rest.split_at(segment.bytes as usize);
        buffer.write((segment.iova - buffer.iova()) as usize, piece).unwrap();
        rest = after;
    }
}

fn collect(buffer: &DmaBuffer, segments: &[Segment]) -> Vec<u8> {
    let mut data = Vec::new();
    for segment in segments {
        let start = data.len();
        data.resize(start + segment.bytes as usize, 0);
        buffer.read((segment.iova - buffer.iova()) as usize, &mut data[start..]).unwrap();
    }
    data
}

/// Writes or reads, by way of a bounce buffer where that is what it takes.
fn transfer(
    pair: &mut QueuePair,
    namespace: &Namespace,
    pool: &mut BouncePool,
    (lba, write): (u64, bool),
    buffer: &DmaBuffer,
    segments: &[Segment],
) -> bool {
    let work = |segments| match write {
        true => Work::Write { lba, segments, fua: false },
        false => Work::Read { lba, segments },
    };
    let (by_sgl, sgls) = (pair.describes_by_sgl(namespace, &work(segments)), pair.counters().sgls);
    match pair.submit(namespace, work(segments), 7) {
        Ok(()) => {
            pair.ring();
            let completed = wait(pair, 1)[0];
            assert_eq!((completed.token, completed.status), (7, Status::SUCCESS));
            assert_eq!(pair.counters().sgls > sgls, by_sgl, "it is said beforehand");
            false
        }
        Err(SubmitError::NeedsBounce) => {
            assert_eq!(pair.outstanding(), 0, "nothing may have been sent");
            let bytes: u64 = segments.iter().map(|segment| u64::from(segment.bytes)).sum();
            let bounce = pool.take(bytes).expect("a pool large enough");
            if write {
                bounce.write(0, &collect(buffer, segments)).unwrap();
            }
            let completed = carry_out(pair, namespace, work(bounce.segments()));
            assert_eq!(completed.status, Status::SUCCESS);
            if !write {
                let mut data = vec![0; bytes as usize];
                bounce.read(0, &mut data).unwrap();
                fill(buffer, segments, &data);
            }
            pool.give_back(bounce);
            true
        }
        Err(error) => panic!("{error}"),
    }
}

fn random_transfers(rig: &Rig, entries: u16, rounds: usize) -> QueuePair {
    let mut random = Random::new();
    let mut pair = rig.pair(entries);
    let buffer = rig.buffer(16 << 20);
    let mut pool = BouncePool::new(rig.device.dma(), 4 << 20).unwrap();
    let block = rig.namespace.block_bytes() as usize;
    let mut model = vec![0u8; 4 << 20];
    let mut bounced = 0;
    for round in 0..rounds {
        let fine = [4096, 512, 512, 4, 1][random.below(5)];
        let most = [1, 3, 40, 600][random.below(4)];
        let blocks = 1 + random.below((2 << 20) / block);
        let blocks = if random.below(2) == 0 { blocks.min(16) } else { blocks };
        let lba = random.below(model.len() / block - blocks + 1);
        let bytes = blocks * block;
        let segments = cut(&mut random, &buffer, bytes, fine, most);
        let on_drive = lba * block..lba * block + bytes;
        let write = random.below(2) == 0;
        if write {
            let data = random.bytes(bytes);
            fill(&buffer, &segments, &data);
            model[on_drive.clone()].copy_from_slice(&data);
        } else {
            fill(&buffer, &segments, &vec![0xa5; bytes]);
        }
        let request = (lba as u64, write);
        bounced += u64::from(transfer(&mut pair, &rig.namespace, &mut pool, request, &buffer, &segments));
        if !write {
            assert!(collect(&buffer, &segments) == model[on_drive], "round {round}: {} segments", segments.len());
        }
    }
    assert_eq!(pool.counters().loans, bounced);
    assert_eq!(pair.counters().needs_bounce, bounced);
    assert_eq!(pair.counters().stale_completions, 0);
    pair
}

fn options() -> Options {
    Options::default()
}

#[test]
fn any_segments_with_sgl() {
    let rig = rig(config(512), &options());
    let pair = random_transfers(&rig, 64, 300);
    assert!(pair.counters().sgls > 0 && pair.counters().splits > 0);
}

#[test]
fn any_segments_by_prp_alone_with_boundaries_and_small_transfers() {
    let mut config = config(512);
    (config.sgl, config.noiob, config.max_transfer) = (false, 24, Some(8192));
    let rig = rig(config, &options());
    assert_eq!(rig.namespace.boundary_blocks, 24);
    let pair = random_transfers(&rig, 64, 150);
    assert_eq!(pair.counters().sgls, 0);
    assert!(pair.counters().splits > 0 && pair.counters().staged > 0);
}

#[test]
fn a_single_request_or_all_can_do_without_sgls() {
    let rig = rig(config(512), &options());
    let (mut pair, mut other) = (rig.pair(16), rig.pair(16));
    let buffer = rig.buffer(16384);
    // PRPs can say the first, in two commands, and not the second.
    let (gap, odd) =
        ([segment(&buffer, 0, 512), segment(&buffer, 1024, 512)], [segment(&buffer, 1, 511), segment(&buffer, 513, 1)]);
    let read = |segments| Work::Read { lba: 0, segments };
    for segments in [&gap, &odd] {
        assert!(pair.describes_by_sgl(&rig.namespace, &read(segments)));
    }
    assert!(
        !pair.describes_by_sgl(&rig.namespace, &read(&gap[..1]))
            && !pair.describes_by_sgl(&rig.namespace, &Work::Flush)
    );
    pair.submit_without_sgls(&rig.namespace, read(&gap), 1).unwrap();
    assert_eq!(pair.submit_without_sgls(&rig.namespace, read(&odd), 2), Err(SubmitError::NeedsBounce));
    pair.ring();
    assert_eq!(wait(&mut pair, 1)[0].status, Status::SUCCESS);
    assert_eq!((pair.counters().commands, pair.counters().sgls), (2, 0));
    // Only those.
    assert_eq!(carry_out(&mut pair, &rig.namespace, read(&odd)).status, Status::SUCCESS);
    assert_eq!((pair.counters().commands, pair.counters().sgls), (3, 1));
    assert_eq!((pair.refuse_sgls(), pair.refuse_sgls(), other.refuse_sgls()), (true, false, false));
    for pair in [&mut pair, &mut other] {
        assert_eq!(pair.submit(&rig.namespace, read(&odd), 3), Err(SubmitError::NeedsBounce));
        assert!(pair.describes_by_sgl(&rig.namespace, &read(&odd)), "as it was before");
    }
    let mut later = rig.pair(16);
    assert_eq!(later.submit(&rig.namespace, read(&odd), 3), Err(SubmitError::NeedsBounce));
    assert!(!later.describes_by_sgl(&rig.namespace, &read(&odd)));
}

#[test]
fn a_boundary_is_not_crossed_even_by_the_smallest_requests() {
    let mut config = config(512);
    config.noiob = 24;
    let rig = rig(config, &options());
    let mut pair = rig.pair(16);
    let buffer = rig.buffer(16384);
    // Blocks 22 and 23, then 24 and 25: one segment in one page, and in several.
    for (lba, blocks, commands) in [(22, 2, 1), (22, 3, 2), (23, 2, 2), (24, 2, 1), (0, 24, 1), (1, 24, 2), (47, 2, 2)]
    {
        let before = pair.counters().commands;
        let target = [segment(&buffer, 0, blocks * 512)];
        let read = carry_out(&mut pair, &rig.namespace, Work::Read { lba, segments: &target });
        assert_eq!(read.status, Status::SUCCESS);
        assert_eq!(pair.counters().commands - before, commands, "{blocks} blocks from {lba}");
    }
}

#[test]
fn a_forced_write_survives_a_power_cut_and_another_one_does_not() {
    for fua in [true, false] {
        let mut config = config(512);
        config.volatile_write_cache = true;
        let rig = rig(config, &options());
        let mut pair = rig.pair(16);
        let buffer = rig.buffer(64 << 10);
        buffer.write(0, &[0xab; 64 << 10]).unwrap();
        // The short way, one command with a list, and many commands; then zeroes over what was written and flushed.
        for (lba, bytes) in [(0, 512), (100, 32 << 10)] {
            let segments = [segment(&buffer, 0, bytes)];
            let written = carry_out(&mut pair, &rig.namespace, Work::Write { lba, segments: &segments, fua });
            assert_eq!(written.status, Status::SUCCESS);
        }
        let pieces: Vec<Segment> = (0..16).map(|at| segment(&buffer, at * 1024, 512)).collect();
        let written = carry_out(&mut pair, &rig.namespace, Work::Write { lba: 300, segments: &pieces, fua });
        assert_eq!(written.status, Status::SUCCESS);
        let lost = rig.simulator.power_cut().unwrap();
        assert_eq!(lost, if fua { 0 } else { 1 + 64 + 16 }, "blocks");
        rig.controller.reset().unwrap();
        pair.drain_after_reset(|_| panic!("nothing is outstanding"));
        rig.controller.recreate_queue_pair(&mut pair).unwrap();
        let zeroes = Work::WriteZeroes { ranges: &[LbaRange { lba: 0, blocks: 8 }], deallocate: false, fua };
        buffer.write(0, &[0xcd; 4096]).unwrap();
        let full = [segment(&buffer, 0, 4096)];
        carry_out(&mut pair, &rig.namespace, Work::Write { lba: 0, segments: &full, fua: false });
        carry_out(&mut pair, &rig.namespace, Work::Flush);
        assert_eq!(carry_out(&mut pair, &rig.namespace, zeroes).status, Status::SUCCESS);
        assert_eq!(rig.simulator.power_cut().unwrap(), if fua { 0 } else { 8 }, "blocks zeroed");
    }
}

#[test]
fn any_segments_with_large_blocks_and_hardly_any_slots() {
    let mut config = config(4096);
    config.max_transfer = Some(16384);
    let rig = rig(config, &options());
    let pair = random_transfers(&rig, 3, 200);
    assert!(pair.counters().staged > 0);
}

#[test]
fn a_full_queue_says_so_and_goes_on() {
    let rig = rig(config(512), &options());
    let mut pair = rig.pair(256);
    let buffer = rig.buffer(4096);
    let target = [segment(&buffer, 0, 512)];
    assert_eq!(pair.capacity(), 255);
    let mut random = Random::new();
    let mut next = 0u64;
    let mut seen = Vec::new();
    for _ in 0..40 {
        for _ in 0..1 + random.below(300) {
            match pair.submit(&rig.namespace, Work::Read { lba: next % 1000, segments: &target }, next) {
                Ok(()) => next += 1,
                Err(error) => {
                    assert_eq!((error, pair.outstanding()), (SubmitError::Full, 255));
                    break;
                }
            }
        }
        pair.ring();
        let some = pair.outstanding() / 2;
        let before = seen.len();
        let start = std::time::Instant::now();
        while seen.len() < before + some {
            assert!(start.elapsed() < crate::setup::DEADLINE);
            pair.reap(|completed| seen.push(completed));
            std::thread::yield_now();
        }
    }
    seen.extend(wait(&mut pair, next as usize - seen.len()));
    assert!(seen.iter().all(|completed| completed.status.is_success()));
    let mut tokens: Vec<u64> = seen.iter().map(|completed| completed.token).collect();
    tokens.sort();
    assert_eq!(tokens, (0..next).collect::<Vec<_>>(), "each request completes once");
    assert_eq!(pair.counters().commands, next);
    assert!(pair.counters().batches <= 40);
}

#[test]
fn one_token_may_be_used_many_times() {
    let rig = rig(config(512), &options());
    let mut pair = rig.pair(64);
    let buffer = rig.buffer(1 << 20);
    for _ in 0..20 {
        pair.submit(&rig.namespace, Work::Read { lba: 0, segments: &[segment(&buffer, 0, 512)] }, 9).unwrap();
    }
    // One request of two commands among them.
    pair.submit(&rig.namespace, Work::Read { lba: 0, segments: &[segment(&buffer, 0, 1 << 20)] }, 9).unwrap();
    pair.ring();
    assert!(wait(&mut pair, 21).iter().all(|completed| completed.token == 9));
    assert_eq!(pair.outstanding(), 0);
}

#[test]
fn requests_that_make_no_sense_are_refused_before_anything_is_sent() {
    let rig = rig(config(4096), &options());
    let mut pair = rig.pair(16);
    let buffer = rig.buffer(1 << 20);
    let size = rig.namespace.blocks;
    let page = [segment(&buffer, 0, 4096)];
    let pages = [segment(&buffer, 0, 4096), segment(&buffer, 8192, 4096)];
    let mut refused = |work: Work<'_>, expected: fn(&SubmitError) -> bool| {
        let error = pair.submit(&rig.namespace, work, 1).unwrap_err();
        assert!(expected(&error), "{work:?}: {error}");
    };
    let out = |error: &SubmitError| matches!(error, SubmitError::OutOfRange { .. });
    let invalid = |error: &SubmitError| matches!(error, SubmitError::Invalid(_));
    for lba in [size, u64::MAX, u64::MAX - 1, size - 1 + (1 << 52)] {
        refused(Work::Read { lba, segments: &page }, out);
        refused(Work::Write { lba, segments: &page, fua: true }, out);
        refused(Work::Verify(LbaRange { lba, blocks: 1 }), out);
        refused(Work::Discard { ranges: &[LbaRange { lba: 0, blocks: 1 }, LbaRange { lba, blocks: 1 }] }, out);
    }
    refused(Work::Read { lba: size - 1, segments: &pages }, out);
    refused(Work::Compare { lba: size - 1, segments: &pages }, out);
    refused(Work::Verify(LbaRange { lba: size - 1, blocks: 2 }), out);
    refused(Work::WriteZeroes { ranges: &[LbaRange { lba: 1, blocks: u32::MAX }], deallocate: false, fua: false }, out);
    for bytes in [0, 1, 512, 4095, 4097] {
        refused(Work::Read { lba: 0, segments: &[segment(&buffer, 0, bytes)] }, invalid);
    }
    refused(Work::Read { lba: 0, segments: &[] }, invalid);
    refused(Work::Discard { ranges: &[] }, invalid);
    refused(Work::Discard { ranges: &[LbaRange { lba: 0, blocks: 0 }] }, invalid);
    assert_eq!(pair.outstanding(), 0);
    assert_eq!(pair.counters().commands, 0);
    let last = Work::Read { lba: size - 1, segments: &page };
    assert!(carry_out(&mut pair, &rig.namespace, last).status.is_success());
}

#[test]
fn zeroes_discards_compares_and_verifies() {
    let rig = rig(config(512), &options());
    let mut pair = rig.pair(32);
    let namespace = &rig.namespace;
    let bytes = 1 << 20;
    let buffer = rig.buffer(bytes);
    let all = [segment(&buffer, 0, bytes)];
    let mut random = Random::new();
    let mut model = random.bytes(bytes);
    buffer.write(0, &model).unwrap();
    assert!(carry_out(&mut pair, namespace, Work::Write { lba: 0, segments: &all, fua: true }).status.is_success());
    assert!(carry_out(&mut pair, namespace, Work::Compare { lba: 0, segments: &all }).status.is_success());
    assert!(carry_out(&mut pair, namespace, Work::Verify(LbaRange { lba: 0, blocks: 2048 })).status.is_success());

    let ranges = [LbaRange { lba: 3, blocks: 5 }, LbaRange { lba: 100, blocks: 1 }];
    let zeroes = Work::WriteZeroes { ranges: &ranges, deallocate: true, fua: false };
    assert!(carry_out(&mut pair, namespace, zeroes).status.is_success());
    for range in ranges {
        model[range.lba as usize * 512..][..range.blocks as usize * 512].fill(0);
    }
    let compare = carry_out(&mut pair, namespace, Work::Compare { lba: 0, segments: &all });
    assert_eq!(compare.status.kind(), Status::COMPARE_FAILURE);

    // More ranges than one command takes; all but the last blocks of the drive.
    let ranges: Vec<_> = (0..300).map(|at| LbaRange { lba: 200 + at * 4, blocks: 2 }).collect();
    assert!(carry_out(&mut pair, namespace, Work::Discard { ranges: &ranges }).status.is_success());
    if namespace.discard_reads_zeroes {
        for range in &ranges {
            model[range.lba as usize * 512..][..1024].fill(0);
        }
    }
    assert!(carry_out(&mut pair, namespace, Work::Read { lba: 0, segments: &all }).status.is_success());
    assert!(collect(&buffer, &all) == model);

    // A range longer than a command can count.
    let whole = [LbaRange { lba: 0, blocks: namespace.blocks as u32 }];
    let before = pair.counters().commands;
    let zeroes = Work::WriteZeroes { ranges: &whole, deallocate: false, fua: false };
    assert!(carry_out(&mut pair, namespace, zeroes).status.is_success());
    assert!(pair.counters().commands >= before + namespace.blocks.div_ceil(65536));
    assert!(carry_out(&mut pair, namespace, Work::Read { lba: 0, segments: &all }).status.is_success());
    assert!(collect(&buffer, &all).iter().all(|&byte| byte == 0));
    assert!(carry_out(&mut pair, namespace, Work::Flush).status.is_success());
}

#[test]
fn shadow_doorbells_spare_the_registers() {
    for shadow_doorbells in [true, false] {
        let rig = rig(config(512), &Options { shadow_doorbells, ..options() });
        let mut pair = random_transfers(&rig, 16, 40);
        let buffer = rig.buffer(4096);
        let target = [segment(&buffer, 0, 4096)];
        for round in 0..2000 {
            pair.submit(&rig.namespace, Work::Read { lba: round, segments: &target }, round).unwrap();
            pair.ring();
            if pair.outstanding() > 10 {
                wait_all(&mut pair);
            }
        }
        wait_all(&mut pair);
        let counters = *pair.counters();
        if shadow_doorbells {
            assert!(counters.submission_doorbells < counters.batches, "{counters:?}");
        } else {
            assert_eq!(counters.submission_doorbells, counters.batches);
        }
    }
}
