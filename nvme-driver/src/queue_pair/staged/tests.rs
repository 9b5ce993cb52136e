//! Long requests by themselves: whose turn it is, how much is out, and what is kept.

use std::collections::HashMap;
use std::sync::atomic::AtomicU64;

use proptest::prelude::*;

use super::*;
use crate::data_pointer::LIST_WORDS;
use crate::testing::namespace;

const MIB: u64 = 1 << 20;

/// Fills blocks in commands of `command` bytes.
fn job(command: u64) -> Job {
    let mut drive = namespace(9, 1 << 40);
    drive.max_write_zeroes_blocks = (command >> 9) as u32;
    Job::write_zeroes(&drive, false, false)
}

fn range(bytes: u64) -> [LbaRange; 1] {
    [LbaRange { lba: 0, blocks: (bytes >> 9) as u32 }]
}

fn token(owner: u64, request: u16) -> u64 {
    owner << OWNER_SHIFT | u64::from(request)
}

/// Issues a command if one may be: request, weight.
fn issue(staged: &mut Staged) -> Option<(u16, u64)> {
    let list = [const { AtomicU64::new(0) }; LIST_WORDS];
    if !staged.has_room() {
        return None;
    }
    let (at, Next { request, job, segments, ranges }) = staged.next()?;
    let (_, bytes) = job.next(segments, ranges, &list, 0).expect("what is not done has a command");
    Some((request, staged.issued(at, bytes).0))
}

#[test]
fn owners_share_by_bytes_however_many_requests_and_commands_they_have() {
    let mut staged = Staged::new(1000);
    // Owner 0: one request of large commands. Owner 1: ten of small ones. Owner 2: two of both kinds.
    let mut kinds = vec![(0, MIB)];
    kinds.extend([(1, 8192); 10]);
    kinds.extend([(2, MIB / 2), (2, 65536)]);
    for (request, &(owner, command)) in (0..).zip(&kinds) {
        assert!(staged.admits(token(owner, request), 1));
        staged.put(request, token(owner, request), job(command), &[], &range(1 << 40));
    }
    let mut served = vec![0; kinds.len()];
    let mut out = std::collections::VecDeque::new();
    for _ in 0..100_000 {
        while let Some((request, weight)) = issue(&mut staged) {
            served[usize::from(request)] += weight;
            out.push_back(weight);
        }
        assert!(out.len() <= 32 && out.iter().sum::<u64>() < 17 * MIB);
        staged.answered(out.pop_front().expect("something is out"));
    }
    let of =
        |owner| -> u64 { kinds.iter().zip(&served).filter(|(kind, _)| kind.0 == owner).map(|(_, bytes)| bytes).sum() };
    assert!(of(0) > 500 * MIB, "{served:?}");
    assert!(of(0).abs_diff(of(1)) <= MIB && of(0).abs_diff(of(2)) <= MIB, "{served:?}");
    assert!(served[1..11].iter().all(|bytes| bytes.abs_diff(served[1]) <= 8192), "{served:?}");
    assert!(served[11].abs_diff(served[12]) <= MIB / 2, "{served:?}");
}

#[test]
fn who_comes_later_neither_waits_for_nor_catches_up_with_the_others() {
    let mut staged = Staged::new(1000);
    staged.put(0, token(0, 0), job(65536), &[], &range(1 << 40));
    let mut turn = || {
        let (request, weight) = issue(&mut staged)?;
        staged.answered(weight);
        Some(request)
    };
    for _ in 0..1000 {
        assert_eq!(turn(), Some(0));
    }
    staged.put(1, token(1, 1), job(65536), &[], &range(1 << 40));
    let mut turn = || {
        let (request, weight) = issue(&mut staged)?;
        staged.answered(weight);
        Some(request)
    };
    let turns: Vec<_> = (0..100).filter_map(|_| turn()).collect();
    assert!(turns[..2].contains(&1), "{turns:?}");
    assert_eq!(turns.iter().filter(|&&request| request == 1).count(), 50, "{turns:?}");
}

#[test]
fn nobody_takes_all_room_or_keeps_much_memory() {
    let mut staged = Staged::new(1000);
    let mut request = 0;
    let mut put = |staged: &mut Staged, owner, entries: usize| {
        let taken = staged.admits(token(owner, request), entries);
        if taken {
            let segments = vec![Segment { iova: 0, bytes: 512 }; entries];
            staged.put(request, token(owner, request), job(512), &segments, &[]);
            request += 1;
        }
        taken
    };
    // Any one request is taken, however many entries it has; then the sum counts.
    assert!(put(&mut staged, 0, 1 << 20));
    assert!(!put(&mut staged, 0, 1));
    assert_eq!((0..100).filter(|_| put(&mut staged, 1, 1000)).count(), MOST_OF_OWNER);
    assert_eq!((0..100).filter(|_| put(&mut staged, 2, 1)).count(), MOST_REQUESTS / 2 - MOST_OF_OWNER - 1);
    // The rest is for those who have none.
    assert_eq!((3..1000).filter(|&owner| put(&mut staged, owner, 1)).count(), MOST_REQUESTS / 2);
    assert!(!put(&mut staged, 1000, 1));
    let mut ended = Vec::new();
    staged.forget_all(|token| token >> OWNER_SHIFT == 1, |request| ended.push(request));
    assert_eq!(ended.len(), MOST_OF_OWNER);
    assert!(put(&mut staged, 1000, 1));
    staged.forget_all(|_| true, |request| ended.push(request));
    ended.sort_unstable();
    assert_eq!(ended, (0..request).collect::<Vec<_>>());
    assert!(staged.is_empty() && staged.owners.is_empty());
    let kept: usize = staged.spare.iter().map(|lists| lists.segments.capacity() + lists.ranges.capacity()).sum();
    assert!(kept <= SPARE_LISTS * 2 * SPARE_ENTRIES, "{kept}");
}

#[test]
fn a_small_queue_pair_keeps_half_of_its_slots_for_others() {
    for (slots, most) in [(1, 1), (2, 1), (3, 1), (8, 4), (63, 31), (1023, 32)] {
        let mut staged = Staged::new(slots);
        staged.put(0, 0, job(512), &[], &range(MIB));
        assert_eq!(std::iter::from_fn(|| issue(&mut staged)).count(), most);
    }
    let mut staged = Staged::new(1);
    assert!(!staged.yields());
    let turns = [true, true, true, true].map(|refused| {
        staged.refused = refused;
        staged.yields()
    });
    assert_eq!(turns, [true, false, true, false]);
}

#[derive(Clone, Debug)]
enum Act {
    Put { owner: u64, command: u64, commands: u64, discard: bool },
    Issue,
    Answer(usize),
    Forget(usize),
    ForgetOwner(u64),
    Reset,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        3 => (0u64..5, 1u64..2000, 1u64..40, any::<bool>())
            .prop_map(|(owner, blocks, commands, discard)| Act::Put { owner, command: blocks << 9, commands, discard }),
        20 => Just(Act::Issue),
        12 => (0usize..64).prop_map(Act::Answer),
        1 => (0usize..64).prop_map(Act::Forget),
        1 => (0u64..5).prop_map(Act::ForgetOwner),
        1 => Just(Act::Reset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Each request gets the commands that it has, whatever becomes of others, and what is out is counted rightly.
    #[test]
    fn nothing_is_issued_twice_or_left_out(acts in proptest::collection::vec(act(), 1..400)) {
        let slots = 40;
        let mut staged = Staged::new(slots);
        // Commands that each request has yet, and its owner.
        let mut left: HashMap<u16, (u64, u64)> = HashMap::new();
        let mut out: Vec<u64> = Vec::new();
        let mut next = 0u16;
        for act in acts {
            match act {
                Act::Put { owner, command, commands, discard } => if staged.admits(token(owner, next), 1) {
                    let mut drive = namespace(9, 1 << 40);
                    (drive.max_discard_range_blocks, drive.max_discard_ranges) = ((command >> 9) as u32, 1);
                    let job = if discard { Job::discard(&drive) } else { job(command) };
                    staged.put(next, token(owner, next), job, &[], &range(command * commands));
                    left.insert(next, (commands, owner));
                    next += 1;
                },
                Act::Issue => match issue(&mut staged) {
                    Some((request, weight)) => {
                        let of = left.get_mut(&request).expect("one that is there");
                        of.0 -= 1;
                        if of.0 == 0 {
                            left.remove(&request);
                        }
                        prop_assert!(weight > 0);
                        out.push(weight);
                    }
                    None => prop_assert!(left.is_empty() || out.len() == slots / 2 || out.iter().sum::<u64>() >= MOST_BYTES),
                },
                Act::Answer(at) => if !out.is_empty() {
                    let at = at % out.len();
                    staged.answered(out.swap_remove(at));
                },
                Act::Forget(at) => if let Some(&request) = left.keys().nth(at) {
                    staged.forget(request);
                    left.remove(&request);
                },
                Act::ForgetOwner(owner) => {
                    let mut gone = Vec::new();
                    staged.forget_all(|token| token >> OWNER_SHIFT == owner, |request| gone.push(request));
                    for request in gone {
                        prop_assert_eq!(left.remove(&request).map(|of| of.1), Some(owner));
                    }
                    prop_assert!(left.values().all(|of| of.1 != owner));
                }
                Act::Reset => {
                    staged.forget_all(|_| true, |request| { left.remove(&request); });
                    staged.reset();
                    out.clear();
                }
            }
            prop_assert_eq!(staged.is_empty(), left.is_empty());
            prop_assert_eq!((staged.commands, staged.weight), (out.len(), out.iter().sum::<u64>()));
            prop_assert_eq!(staged.owners.iter().map(|owner| owner.requests).sum::<usize>(), left.len());
        }
        // What is left is issued to its end.
        while !staged.is_empty() {
            if let Some((request, weight)) = issue(&mut staged) {
                left.get_mut(&request).expect("one that is there").0 -= 1;
                out.push(weight);
            } else {
                staged.answered(out.pop().expect("else there would be room"));
            }
        }
        prop_assert!(left.values().all(|of| of.0 == 0), "{:?}", left);
    }
}
