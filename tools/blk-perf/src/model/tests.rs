//! The model against disks in memory: an honest one, and one for each way of lying.

use super::*;
use crate::plan::MAX_SHIFT;

const BLOCK: usize = 512;
const DISK_BLOCKS: u64 = 20_000;
const CAPACITY: usize = 64 * BLOCK + MAX_SHIFT;
const REQUESTS: usize = 20_000;

/// What the disk does wrong, once in a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lie {
    Nothing,
    LoseWrite,
    MisplaceWrite,
    TearWrite,
    ReadOldData,
    ReadNothing,
    SkipZeroes,
    ZeroTooMuch,
    DiscardTooMuch,
    DiscardIntoOtherBlock,
    MisplaceRead,
}

struct MemoryDisk {
    bytes: Vec<u8>,
    /// The content of every block before its last write.
    before: Vec<u8>,
    lie: Lie,
    random: Random,
}

impl MemoryDisk {
    fn new(lie: Lie) -> Self {
        let bytes = vec![0xaa; DISK_BLOCKS as usize * BLOCK];
        MemoryDisk { before: bytes.clone(), bytes, lie, random: Random::new(99, 0) }
    }

    fn perform(&mut self, request: &Request, buffer: &mut [u8]) {
        let start = request.lba as usize * BLOCK;
        let end = start + request.blocks as usize * BLOCK;
        let next = end..end + BLOCK;
        let next_exists = next.end <= self.bytes.len();
        let lie = match self.random.chance(1, 100) {
            true => self.lie,
            false => Lie::Nothing,
        };
        match (request.kind, lie) {
            (Kind::Flush, _) => {}
            (Kind::Read, Lie::ReadOldData) => buffer.copy_from_slice(&self.before[start..end]),
            (Kind::Read, Lie::ReadNothing) => {}
            (Kind::Read, Lie::MisplaceRead) if next_exists => {
                buffer.copy_from_slice(&self.bytes[start + BLOCK..next.end]);
            }
            (Kind::Read, _) => buffer.copy_from_slice(&self.bytes[start..end]),
            (Kind::Write, Lie::LoseWrite) => {}
            (Kind::Write, Lie::MisplaceWrite) if next_exists => {
                self.bytes[start + BLOCK..next.end].copy_from_slice(buffer);
            }
            (Kind::Write, Lie::TearWrite) => {
                let torn = buffer.len() - BLOCK / 2;
                self.bytes[start..start + torn].copy_from_slice(&buffer[..torn]);
            }
            (Kind::Write, _) => {
                self.before[start..end].copy_from_slice(&self.bytes[start..end]);
                self.bytes[start..end].copy_from_slice(buffer);
            }
            (Kind::WriteZeroes, Lie::SkipZeroes) => {}
            (Kind::WriteZeroes, Lie::ZeroTooMuch) if next_exists => {
                self.bytes[start..next.end].fill(0);
            }
            (Kind::WriteZeroes, _) => self.bytes[start..end].fill(0),
            (Kind::Discard, Lie::DiscardTooMuch) if next_exists => {
                self.bytes[start..next.end].fill(0);
            }
            (Kind::Discard, Lie::DiscardIntoOtherBlock) if next_exists => {
                self.bytes.copy_within(next, start);
            }
            // What a discarded block holds afterwards is the disk's choice.
            (Kind::Discard, _) => match self.random.below(3) {
                0 => self.bytes[start..end].fill(0),
                1 => self.bytes[start..end].fill(0xff),
                _ => {}
            },
        }
    }
}

fn plan(seed: u64, mix: Mix) -> VerifiedPlan {
    // 600 blocks: met often enough for every lie to be noticed.
    let window = Window::new(DISK_BLOCKS, 1200, 1, 2).unwrap();
    let model = Model::new(window, Pattern::new(seed, BLOCK));
    VerifiedPlan::new(model, Random::new(seed, 1), mix, Limits { discard: 16, write_zeroes: 16 })
}

/// Sends requests to the disk, several in flight, completed in random order; then reads back.
fn run(seed: u64, lie: Lie, mix: Mix) -> (Vec<Mismatch>, Vec<Mismatch>) {
    let mut disk = MemoryDisk::new(lie);
    let mut order = Random::new(seed, 2);
    let mut plan = plan(seed, mix);
    let mut flight: Vec<(Request, Vec<u8>)> = Vec::new();
    let mut wrong = Vec::new();
    let mut sent = 0;
    while sent < REQUESTS || !flight.is_empty() {
        if sent < REQUESTS
            && flight.len() < 8
            && let Next::Request(request) = plan.next(CAPACITY)
        {
            let length = match request.kind {
                Kind::Read | Kind::Write => request.blocks as usize * BLOCK,
                _ => 0,
            };
            assert!(request.shift + length <= CAPACITY);
            let mut buffer = vec![0; length];
            plan.prepare(&request, &mut buffer);
            flight.push((request, buffer));
            sent += 1;
            continue;
        }
        let (request, mut buffer) = flight.swap_remove(order.below(flight.len() as u64) as usize);
        disk.perform(&request, &mut buffer);
        plan.complete(&request, true, &buffer, &mut wrong);
    }
    disk.lie = Lie::Nothing;
    let mut read_back = ReadBack::new(plan.into_model());
    let (mut compared, mut late) = (0, Vec::new());
    while let Next::Request(request) = read_back.next(CAPACITY) {
        let mut buffer = vec![0; request.blocks as usize * BLOCK];
        read_back.prepare(&request, &mut buffer);
        disk.perform(&request, &mut buffer);
        read_back.complete(&request, true, &buffer, &mut late);
        compared += u64::from(request.blocks);
    }
    assert_eq!(compared, read_back.known_blocks());
    assert!(compared > 500, "{compared} blocks known");
    (wrong, late)
}

#[test]
fn an_honest_disk_is_believed() {
    for seed in 1..5 {
        assert_eq!(run(seed, Lie::Nothing, Mix::default()), (vec![], vec![]), "seed {seed}");
    }
}

#[test]
fn every_lie_is_caught() {
    let lies = [
        Lie::LoseWrite,
        Lie::MisplaceWrite,
        Lie::TearWrite,
        Lie::ReadOldData,
        Lie::ReadNothing,
        Lie::SkipZeroes,
        Lie::ZeroTooMuch,
        Lie::DiscardTooMuch,
        Lie::DiscardIntoOtherBlock,
        Lie::MisplaceRead,
    ];
    for lie in lies {
        for seed in 1..4 {
            let (wrong, _) = run(seed, lie, Mix::default());
            assert!(!wrong.is_empty(), "{lie:?}, seed {seed}");
        }
    }
}

/// True if some mismatch is described with `word`.
fn describes(wrong: &[Mismatch], word: &str) -> bool {
    wrong.iter().any(|mismatch| mismatch.to_string().contains(word))
}

#[test]
fn a_mismatch_says_what_happened() {
    let data_only = Mix { read: 50, write: 50, flush: 0, discard: 0, write_zeroes: 0 };
    let cases = [
        (Lie::LoseWrite, "stale"),
        (Lie::MisplaceWrite, "misplaced"),
        (Lie::TearWrite, "torn"),
        (Lie::ReadOldData, "stale"),
        (Lie::ReadNothing, "the buffer was not written"),
        (Lie::MisplaceRead, "misplaced"),
    ];
    for (lie, word) in cases {
        let (wrong, _) = run(7, lie, data_only);
        assert!(describes(&wrong, word), "{lie:?}: {:?}", wrong.first().map(ToString::to_string));
    }
}

#[test]
fn the_read_back_finds_what_no_read_met() {
    // Without reads, only the read-back can notice.
    let mix = Mix { read: 0, ..Mix::default() };
    for lie in [Lie::LoseWrite, Lie::MisplaceWrite, Lie::TearWrite] {
        let (wrong, late) = run(3, lie, mix);
        assert!(wrong.is_empty());
        assert!(!late.is_empty(), "{lie:?}");
    }
}

#[test]
fn a_failed_write_leaves_the_content_open() {
    let mut plan = plan(1, Mix { read: 0, write: 1, flush: 0, discard: 0, write_zeroes: 0 });
    let Next::Request(write) = plan.next(CAPACITY) else { panic!("a write was due") };
    plan.complete(&write, true, &[], &mut Vec::new());
    plan.complete(&write, false, &[], &mut Vec::new());
    let read = Request { kind: Kind::Read, ..write };
    let mut wrong = Vec::new();
    plan.complete(&read, true, &vec![0x55; write.blocks as usize * BLOCK], &mut wrong);
    assert_eq!(wrong, []);
}

#[test]
fn requests_in_flight_never_overlap_and_stay_inside() {
    let mut plan = plan(5, Mix { flush: 0, ..Mix::default() });
    let mut flight: Vec<Request> = Vec::new();
    let mut order = Random::new(5, 2);
    let mut kinds = [0; 5];
    for _ in 0..20_000 {
        let next = plan.next(CAPACITY);
        if let Next::Request(request) = next {
            let range = |r: &Request| r.lba..r.lba + u64::from(r.blocks);
            assert!(request.blocks > 0);
            assert!(range(&request).end <= DISK_BLOCKS);
            for other in &flight {
                let (a, b) = (range(other), range(&request));
                assert!(a.end <= b.start || b.end <= a.start, "{other:?} {request:?}");
            }
            kinds[request.kind as usize] += 1;
            flight.push(request);
        }
        if flight.len() > 16 || matches!(next, Next::Later) {
            let done = flight.swap_remove(order.below(flight.len() as u64) as usize);
            plan.complete(&done, false, &[], &mut Vec::new());
        }
    }
    assert!(kinds[Kind::Read as usize] > kinds[Kind::Discard as usize]);
    assert!(kinds[Kind::Discard as usize] > 100 && kinds[Kind::WriteZeroes as usize] > 100);
}

#[test]
fn windows_of_queues_are_apart_and_reach_both_ends() {
    for (disk_blocks, blocks, queues) in
        [(1 << 21, 1 << 19, 4), (2048, 2048, 4), (1 << 52, 1 << 16, 3), (1000, 1 << 40, 7), (u64::MAX, 4096, 1)]
    {
        let mut ranges = Vec::new();
        for queue in 0..queues {
            let window = Window::new(disk_blocks, blocks, queue, queues).unwrap();
            for start in &window.starts {
                ranges.push((*start, start + window.length));
            }
            let last = window.blocks() - 1;
            assert_eq!(window.lba(0), window.starts[0]);
            assert_eq!(window.lba(last), window.starts[15] + window.length - 1);
            assert_eq!(window.room(last), 1);
        }
        ranges.sort_unstable();
        for pair in ranges.windows(2) {
            assert!(pair[0].1 <= pair[1].0, "{pair:?} on {disk_blocks} blocks");
        }
        assert_eq!(ranges[0].0, 0);
        assert_eq!(ranges[ranges.len() - 1].1, disk_blocks);
    }
    assert!(Window::new(63, 63, 0, 4).is_none());
    assert!(Window::new(64, 64, 0, 4).is_some());
}
