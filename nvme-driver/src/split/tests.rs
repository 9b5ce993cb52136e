//! Any list of segments, against a model that knows only the specification: which byte of memory is the n-th byte of the
//! transfer, according to the pointers that were written.

use std::cell::Cell;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestRunner};

use super::{Form, Limits};
use crate::Segment;
use crate::data_pointer::{LIST_WORDS, Position, SglAlignment, prp, sgl};

/// Where the slot's page is in the device's eyes.
const LIST: u64 = 0x7fff_f000;

/// The address of every byte of the transfer: the model of the segments.
fn addresses(segments: &[Segment]) -> Vec<u64> {
    segments.iter().flat_map(|segment| (0..u64::from(segment.bytes)).map(move |at| segment.iova + at)).collect()
}

/// Walks PRP1 and PRP2 as NVMe Base 2.0, 4.1.1 says.
fn walk_prps(prp1: u64, prp2: u64, list: &[AtomicU64; LIST_WORDS], bytes: u64) -> Vec<u64> {
    assert_eq!(prp1 & 3, 0, "PRP1's offset is a multiple of four bytes");
    let mut out = Vec::new();
    let mut take = |from: u64, left: u64| {
        let here = left.min(4096 - from % 4096);
        out.extend(from..from + here);
        left - here
    };
    let mut left = take(prp1, bytes);
    if left == 0 {
        assert_eq!(prp2, 0, "PRP2 is reserved for a single page");
    } else if left <= 4096 {
        assert_eq!(prp2 % 4096, 0);
        assert_eq!(take(prp2, left), 0);
    } else {
        assert_eq!(prp2, LIST);
        let mut entries = list.iter();
        while left > 0 {
            let entry = entries.next().expect("the list does not leave its page").load(Ordering::Relaxed);
            assert_eq!(entry % 4096, 0, "list entries have no offset");
            left = take(entry, left);
        }
    }
    out
}

/// Walks the SGL descriptor of a command as NVMe Base 2.0, 4.1.2 says.
fn walk_sgl(descriptor: [u64; 2], list: &[AtomicU64; LIST_WORDS], bytes: u64, alignment: SglAlignment) -> Vec<u64> {
    let mut out = Vec::new();
    let mut data_block = |address: u64, word: u64| {
        assert_eq!(word >> 32, 0, "type Data Block, subtype Address, reserved bits clear");
        let length = word & 0xffff_ffff;
        assert_ne!(length, 0);
        if alignment == SglAlignment::Dword {
            assert_eq!((address % 4, length % 4), (0, 0), "dword alignment and granularity");
        }
        out.extend(address..address + length);
    };
    let (address, word) = (descriptor[0], descriptor[1]);
    match word >> 60 {
        0 => data_block(address, word),
        3 => {
            assert_eq!(word >> 32, 0x3000_0000);
            let length = word & 0xffff_ffff;
            assert_eq!((address, length % 16), (LIST, 0));
            assert!((32..=4096).contains(&length));
            for at in (0..length as usize / 8).step_by(2) {
                data_block(list[at].load(Ordering::Relaxed), list[at + 1].load(Ordering::Relaxed));
            }
        }
        other => panic!("descriptor type {other}"),
    }
    assert_eq!(out.len() as u64, bytes, "the SGL describes exactly the transfer");
    out
}

/// Can one block be said in one command? Straight from the rules, byte by byte.
fn expressible(block: &[u64], sgl: Option<SglAlignment>) -> bool {
    let joints: Vec<usize> = (1..block.len()).filter(|&at| block[at] != block[at - 1] + 1).collect();
    let by_prp = block[0].is_multiple_of(4)
        && joints.iter().all(|&at| (block[at - 1] + 1).is_multiple_of(4096) && block[at].is_multiple_of(4096));
    let starts: Vec<usize> = std::iter::once(0).chain(joints.iter().copied()).chain([block.len()]).collect();
    let by_sgl = starts.len() <= 257
        && match sgl {
            None => false,
            Some(SglAlignment::Byte) => true,
            Some(SglAlignment::Dword) => {
                starts.windows(2).all(|run| block[run[0]].is_multiple_of(4) && (run[1] - run[0]).is_multiple_of(4))
            }
        };
    by_prp || by_sgl
}

#[derive(Clone, Debug)]
struct Case {
    segments: Vec<Segment>,
    lba: u64,
    limits: Limits,
}

/// How one segment lies, relative to the one before.
fn segment(fine: u32) -> impl Strategy<Value = (u8, u64, u32)> {
    // Kind of address, a random address, a length in units of `fine`.
    (0u8..8, 0u64..1 << 40, 0u32..(9000 / fine))
}

fn case() -> impl Strategy<Value = Case> {
    let granularity = prop_oneof![3 => Just(4096u32), 3 => Just(512), 2 => Just(4), 1 => Just(1)];
    let sgl = prop_oneof![Just(None), Just(Some(SglAlignment::Byte)), Just(Some(SglAlignment::Dword))];
    let boundary = prop_oneof![Just(0u32), Just(1), Just(8), Just(24), Just(256), 1u32..5000];
    (granularity, sgl, boundary, prop_oneof![Just(9u8), Just(12)], 0u32..10, 0u64..1 << 50).prop_flat_map(
        |(fine, sgl, boundary_blocks, block_shift, mdts, lba)| {
            let lists = prop_oneof![3 => 1usize..40, 1 => 1usize..600];
            lists.prop_flat_map(move |count| prop::collection::vec(segment(fine), count)).prop_map(move |raw| {
                let mut segments: Vec<Segment> = Vec::new();
                for (kind, address, units) in raw {
                    let end = segments.last().map_or(0x1000, |last| last.iova + u64::from(last.bytes));
                    let iova = match kind {
                        0 | 1 => end,                             // follows in memory
                        2..=4 => address & !4095,                 // begins a page
                        5 => (address & !4095) + end % 4096,      // same offset, elsewhere
                        _ => address - address % u64::from(fine), // anywhere
                    };
                    let mut bytes = units * fine;
                    if kind == 4 {
                        bytes = bytes.next_multiple_of(4096);
                    }
                    if kind == 3 {
                        // Fills its last page.
                        bytes = bytes.next_multiple_of(4096).max(4096);
                    }
                    segments.push(Segment { iova, bytes });
                }
                // Make the sum a whole number of blocks, not 0.
                let sum: u64 = segments.iter().map(|segment| u64::from(segment.bytes)).sum();
                let block = 1u64 << block_shift;
                let missing = (sum.next_multiple_of(block).max(block) - sum) as u32;
                segments.last_mut().expect("at least one segment").bytes += missing;
                let limits = Limits { max_bytes: 4096 << mdts, block_shift, boundary_blocks, sgl };
                Case { segments, lba, limits }
            })
        },
    )
}

fn check(case: &Case) -> Result<bool, TestCaseError> {
    let Case { segments, lba, limits } = case;
    let model = addresses(segments);
    let block = 1usize << limits.block_shift;
    let possible = model.chunks(block).all(|block| expressible(block, limits.sgl));
    let count = limits.count_pieces(segments, *lba, model.len() as u64);
    prop_assert_eq!(count.is_some(), possible, "a copy is needed exactly when some block cannot be said");
    prop_assert_eq!(limits.expressible(segments, model.len() as u64), possible);
    let Some(count) = count else { return Ok(false) };

    let list = Box::new([const { AtomicU64::new(0) }; LIST_WORDS]);
    let (mut position, mut done, mut pieces) = (Position::default(), 0usize, 0);
    while done < model.len() {
        let first = lba + (done / block) as u64;
        let piece = limits.next_piece(segments, position, first, (model.len() - done) as u64).expect("counted before");
        prop_assert!(piece.bytes > 0 && (piece.bytes as usize).is_multiple_of(block));
        prop_assert!(piece.bytes <= u64::from(limits.max_bytes), "MDTS");
        let blocks = piece.bytes >> limits.block_shift;
        if let Some(first_in) = first.checked_rem(u64::from(limits.boundary_blocks)) {
            prop_assert!(first_in + blocks <= u64::from(limits.boundary_blocks), "crosses NOIOB");
        }
        for word in list.iter() {
            word.store(u64::MAX, Ordering::Relaxed);
        }
        let walked = match piece.form {
            Form::Prp => {
                let prps = prp::describe(segments, position, piece.bytes, &list, LIST).expect("planned as PRP");
                walk_prps(prps.prp1, prps.prp2, &list, piece.bytes)
            }
            Form::Sgl => {
                let alignment = limits.sgl.expect("an SGL only where the controller has them");
                let descriptor = sgl::describe(segments, position, piece.bytes, &list, LIST).expect("planned as SGL");
                let one_prp = prp::describe(segments, position, piece.bytes, &list, LIST);
                prop_assert!(one_prp.is_none(), "an SGL only where PRP cannot express it");
                // The attempt above has overwritten the list.
                sgl::describe(segments, position, piece.bytes, &list, LIST);
                walk_sgl(descriptor, &list, piece.bytes, alignment)
            }
        };
        let end = done + piece.bytes as usize;
        prop_assert!(walked == model[done..end], "piece {} at byte {} does not walk the same bytes", pieces, done);
        position = position.advanced(segments, piece.bytes);
        done = end;
        pieces += 1;
    }
    prop_assert_eq!(done, model.len());
    prop_assert_eq!(pieces, count);
    Ok(true)
}

/// Give `PROPTEST_RNG_SEED` to repeat a run; the seed and the shrunk case are printed when it fails.
#[test]
fn any_segments_are_cut_into_commands_that_walk_the_same_bytes() {
    let given = std::env::var("PROPTEST_RNG_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = given.unwrap_or_else(|| RandomState::new().hash_one(0));
    println!("seed: PROPTEST_RNG_SEED={seed}");
    let config = Config { rng_seed: RngSeed::Fixed(seed), failure_persistence: None, ..Config::with_cases(1000) };
    let (expressed, copied) = (Cell::new(0), Cell::new(0));
    let outcome = TestRunner::new(config).run(&case(), |case| {
        let counter = if check(&case)? { &expressed } else { &copied };
        counter.set(counter.get() + 1);
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
    assert!(expressed.get() > 100 && copied.get() > 100, "{} cut, {} to be copied", expressed.get(), copied.get());
}
