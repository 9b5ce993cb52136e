//! A drive grants fewer queue pairs than rings use when it comes back: rings share them, and have their own again when it grants more.

use std::sync::atomic::Ordering;
use std::time::Duration;

use nvme_sim::{FaultAction, FaultMatch, FaultRule};

use crate::back::{AWAY, config, replace};
use crate::common::raw::*;
use crate::common::*;
use crate::stand::Stand;
use crate::{MIB, fault};

const CREATE_SUBMISSION_QUEUE: u8 = 0x01;
const RINGS: u64 = 4;
/// Requests that a ring has out, all the time.
const DEPTH: u64 = 8;
const BLOCK: u64 = 4096;

/// What a ring takes of the guest's memory: itself, headers, data.
const STRIDE: u64 = 0x20000;
const REQUESTS: u64 = 0x6000;
const DATA: u64 = 0x8000;

/// A request that is out.
struct Out {
    id: u16,
    /// A read, of what was written before.
    reads: bool,
    round: u64,
}

/// A guest of four rings with requests under way at each moment. Each is answered once, and without an error; what was written is there.
struct Load<'a> {
    rings: Vec<RawRing<'a>>,
    /// By ring and place.
    out: Vec<Vec<Option<Out>>>,
    /// The next one, by ring and place: how often it was written, and whether it is to be read now.
    next: Vec<Vec<(u64, bool)>>,
    answered: Vec<u64>,
}

impl<'a> Load<'a> {
    fn start(front: &Front, region: &'a Region) -> Load<'a> {
        front.negotiate();
        region.add(front);
        let ring = |at| RawRing::new(region, at as u32, 0x10000 + STRIDE * at, Format::Split, 64);
        let rings: Vec<_> = (0..RINGS).map(ring).collect();
        rings.iter().for_each(|ring| ring.start(front));
        let each = || (0..DEPTH).map(|_| None).collect();
        let mut load = Load {
            rings,
            out: (0..RINGS).map(|_| each()).collect(),
            next: vec![vec![(1, false); DEPTH as usize]; RINGS as usize],
            answered: vec![0; RINGS as usize],
        };
        load.goes_on();
        load
    }

    fn pattern(at: usize, place: u64, round: u64) -> Vec<u8> {
        (0..BLOCK).map(|byte| (byte / 8 + 31 * round + 7 * place + at as u64) as u8).collect()
    }

    fn step(&mut self, more: bool) {
        for (at, ring) in self.rings.iter_mut().enumerate() {
            let (requests, data) = (ring.descriptors + REQUESTS, ring.descriptors + DATA);
            while let Some((id, _)) = ring.used() {
                let place = self.out[at].iter().position(|out| out.as_ref().is_some_and(|out| out.id == id));
                let place = place.unwrap_or_else(|| panic!("ring {at}: an answer to {id}, which is not out"));
                let Out { reads, round, .. } = self.out[at][place].take().unwrap();
                assert_eq!(ring.status(requests + 64 * place as u64), 0, "ring {at}, round {round}");
                let found = ring.fetch(data + BLOCK * place as u64, BLOCK as usize);
                assert!(found == Self::pattern(at, place as u64, round), "ring {at}, round {round}: other data");
                self.next[at][place] = (if reads { round + 1 } else { round }, !reads);
                self.answered[at] += 1;
            }
            for place in (0..DEPTH).filter(|_| more) {
                if self.out[at][place as usize].is_some() {
                    continue;
                }
                let (round, reads) = self.next[at][place as usize];
                let (header, buffer) = (requests + 64 * place, data + BLOCK * place);
                let sector = (at as u64 * DEPTH + place) * BLOCK / 512;
                let chain = match reads {
                    true => {
                        ring.fill(buffer, &[0xa5; BLOCK as usize]);
                        ring.request(header, 0, sector, &[writable(buffer, BLOCK as u32)])
                    }
                    false => {
                        ring.fill(buffer, &Self::pattern(at, place, round));
                        ring.request(header, 1, sector, &[readable(buffer, BLOCK as u32)])
                    }
                };
                let id = ring.offer(&chain).expect("there is room");
                self.out[at][place as usize] = Some(Out { id, reads, round });
                ring.kick();
            }
        }
    }

    /// Waits for something while the rings are at work.
    #[track_caller]
    fn until(&mut self, what: &str, mut condition: impl FnMut() -> bool) {
        eventually(what, || {
            self.step(true);
            condition()
        });
    }

    /// Each ring gets answers.
    #[track_caller]
    fn goes_on(&mut self) {
        let before = self.answered.clone();
        eventually("all rings go on", || {
            self.step(true);
            self.answered.iter().zip(&before).all(|(now, before)| *now >= before + 4 * DEPTH)
        });
    }

    /// Everything is answered, and nothing twice; the rings stop where they have got to.
    fn end(mut self, front: &Front) {
        eventually("the rest", || {
            self.step(false);
            self.out.iter().flatten().all(Option::is_none)
        });
        for ring in &mut self.rings {
            assert_eq!(front.vring_base(ring.index), u32::from(ring.next), "ring {}", ring.index);
            assert!(ring.used().is_none());
        }
    }
}

/// The controller fails once, whatever is with it.
fn fail(stand: &Stand) {
    let when = FaultMatch { limit: Some(1), ..FaultMatch::default() };
    stand.drive.faults().add(FaultRule { action: FaultAction::Fatal, when });
}

/// Counts queue pairs that are created, as hits of a fault that does nothing.
fn count_queue_pairs(stand: &Stand) {
    fault(stand, CREATE_SUBMISSION_QUEUE, u64::MAX, FaultAction::Delay(Duration::ZERO..=Duration::ZERO));
}

#[test]
fn rings_share_what_is_granted_after_a_reset() {
    let stand = Stand::with(|setup| {
        setup.drive.max_queue_pairs = 5;
        setup.hostile = format!("queues = {RINGS}");
    });
    let neighbour = stand.neighbour();
    let region = Region::new(0, MIB);
    let front = stand.hostile();
    let mut load = Load::start(&front, &region);
    let pairs = "a ring that shared a queue pair has one of its own now";
    for times in 1..=2 {
        stand.drive.faults().clear();
        stand.drive.faults().change(|plan| plan.most_queues = Some(2));
        count_queue_pairs(&stand);
        let before = stand.drive.faults().fired();
        fail(&stand);
        load.until("it is back", || stand.program.lines_with("the drive is back") == 2 * times - 1);
        load.goes_on();
        neighbour.answered(100);
        assert_eq!(stand.program.lines_with("it grants 2 queue pairs, and 5 were in use"), times);
        assert_eq!(stand.drive.faults().fired() - before, 1 + 2, "the failure, and the queue pairs");

        stand.drive.faults().clear();
        count_queue_pairs(&stand);
        let before = stand.drive.faults().fired();
        fail(&stand);
        load.until("it is back again", || stand.program.lines_with("the drive is back") == 2 * times);
        load.until("all have their own", || stand.drive.faults().fired() - before == 1 + RINGS + 1);
        load.until("which is told", || stand.program.lines_with(pairs) == times);
        load.goes_on();
        neighbour.answered(100);
    }
    assert_eq!(stand.drive.counters().front_ends_gone.load(Ordering::Relaxed), 0, "the device stays open");
    assert_eq!(stand.program.lines_with("answers with I/O errors") + stand.program.lines_with("not back yet"), 0);
    load.end(&front);
    neighbour.verdict_within(AWAY);
}

/// Rings of all workers share the only one.
#[test]
fn rings_share_what_another_device_grants() {
    let blocks = tempfile::tempdir().unwrap();
    let mut stand = Stand::with(|setup| {
        setup.drive = config(blocks.path());
        setup.top = "cpus = \"0-1\"".into();
        setup.hostile = format!("queues = {RINGS}");
    });
    let neighbour = stand.neighbour();
    let region = Region::new(0, MIB);
    let front = stand.hostile();
    let mut load = Load::start(&front, &region);
    for (max_queue_pairs, times) in [(1, 1), (16, 2), (3, 3)] {
        let mut config = config(blocks.path());
        config.max_queue_pairs = max_queue_pairs;
        replace(&mut stand, config);
        load.until("it is back", || stand.program.lines_with("the drive is back") == times);
        load.goes_on();
        neighbour.answered(100);
    }
    for granted in ["it grants 1 queue pairs, and 5 were in use", "it grants 3 queue pairs, and 5 were in use"] {
        assert_eq!(stand.program.lines_with(granted), 1, "{granted}");
    }
    assert_eq!(stand.program.lines_with("answers with I/O errors"), 0);
    load.end(&front);
    neighbour.verdict_within(AWAY);
}
