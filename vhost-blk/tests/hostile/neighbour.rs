//! An innocent guest beside the hostile: a load that knows what every block has to hold, and how long every request took.
#![allow(dead_code)] // each row uses a part of it

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fastrand::Rng;

use crate::common::raw::{Format, RawRing, readable, writable};
use crate::common::{DEADLINE, Front, Region, T_FLUSH, eventually};
use crate::program::Program;

/// Nobody's request may take longer because of somebody else, unless its own were half as slow when it was alone.
const LIMIT: Duration = Duration::from_millis(100);
/// The part of a request's time that counts at least, however busy the machine was: threads that poll are always ready to run.
const LEAST: u32 = 10;
/// How long it is watched alone.
const ALONE: Duration = Duration::from_millis(300);
/// So many requests have to be answered while it is watched, and after the attack.
const ENOUGH: u64 = 50;

const DEPTH: usize = 4;
const BLOCK: u64 = 4096;
/// Blocks that it uses.
const BLOCKS: u64 = 2048;
const REGION: u64 = 1 << 20;
const REQUESTS: u64 = 0x80000;
const DATA: u64 = 0x90000;

/// What it has seen since it was last asked.
#[derive(Clone, Debug, Default)]
struct Seen {
    answered: u64,
    /// Failed requests, wrong data, silence.
    wrong: Vec<String>,
    /// The longest request, without the time for which the machine had no CPU for it.
    longest: Duration,
    /// The longest request by the clock.
    by_the_clock: Duration,
}

/// A front-end of its own, with its load, in a thread.
pub(crate) struct Neighbour {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<Mutex<bool>>,
    alone: Duration,
    thread: Option<JoinHandle<()>>,
}

impl Neighbour {
    pub(crate) fn start(socket: &Path, program: &Program) -> Neighbour {
        let seed = std::env::var("HOSTILE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            now.map_or(1, |now| now.as_nanos() as u64)
        });
        println!("the neighbour's load: HOSTILE_SEED={seed}");
        let seen = Arc::new(Mutex::new(Seen::default()));
        let stop = Arc::new(Mutex::new(false));
        let front = Front::connect(socket);
        let (told, stopped, process) = (seen.clone(), stop.clone(), program.child.id());
        let thread = std::thread::Builder::new().name("neighbour".into());
        let body = move || {
            front.negotiate();
            let region = Region::new(0, REGION);
            region.add(&front);
            let ring = RawRing::new(&region, 0, 0x10000, Format::Split, 64);
            ring.start(&front);
            let mut load = Load::new(ring, Rng::with_seed(seed), Starved::new(process), &told);
            while !*stopped.lock().unwrap_or_else(PoisonError::into_inner) {
                load.step(true);
                if load.stuck() {
                    return;
                }
            }
            while load.outstanding() > 0 && !load.stuck() {
                load.step(false);
            }
        };
        let thread = thread.spawn(body).unwrap();
        let neighbour = Neighbour { seen, stop, alone: Duration::ZERO, thread: Some(thread) };
        neighbour.answered(ENOUGH);
        neighbour
    }

    fn seen(&self) -> Seen {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many requests were answered since the attack began.
    pub(crate) fn progress(&self) -> u64 {
        self.seen().answered
    }

    /// Waits until so many more requests are answered, or something was wrong.
    #[track_caller]
    pub(crate) fn answered(&self, more: u64) {
        let before = self.seen().answered;
        eventually("the neighbour's requests are answered", || {
            let seen = self.seen();
            !seen.wrong.is_empty() || seen.answered >= before + more || self.thread.as_ref().unwrap().is_finished()
        });
    }

    /// Watches it alone, so that what an attack does can be told from that. Counts begin anew.
    #[track_caller]
    pub(crate) fn measure_alone(&mut self) {
        *self.seen.lock().unwrap() = Seen::default();
        std::thread::sleep(ALONE);
        self.answered(ENOUGH);
        let seen = std::mem::take(&mut *self.seen.lock().unwrap());
        assert!(seen.wrong.is_empty(), "the neighbour, alone: {:?}", seen.wrong);
        self.alone = seen.longest;
    }

    /// What no request of it may exceed.
    pub(crate) fn limit(&self) -> Duration {
        LIMIT.max(2 * self.alone)
    }

    /// Ends the load. None of its requests failed, none read a wrong byte, it went on, and none waited too long.
    #[track_caller]
    pub(crate) fn verdict(self) {
        let limit = self.limit();
        self.verdict_within(limit);
    }

    /// Ends the load, in which the drive itself may make each request wait for `limit`. None failed, none read a wrong byte.
    #[track_caller]
    pub(crate) fn verdict_within(mut self, limit: Duration) {
        // It goes on after the attack, too.
        self.answered(ENOUGH);
        self.end();
        let seen = self.seen();
        println!(
            "the neighbour: {} requests, the longest {:?} ({:?} by the clock), alone {:?}",
            seen.answered, seen.longest, seen.by_the_clock, self.alone
        );
        assert!(seen.wrong.is_empty(), "the neighbour: {:?}", seen.wrong);
        assert!(seen.answered >= ENOUGH, "the neighbour: {} requests only", seen.answered);
        assert!(seen.longest <= limit, "the neighbour: a request took {:?}, alone {:?}", seen.longest, self.alone);
    }

    fn end(&mut self) {
        *self.stop.lock().unwrap_or_else(PoisonError::into_inner) = true;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            self.seen.lock().unwrap_or_else(PoisonError::into_inner).wrong.push("its thread panicked".into());
        }
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        self.end();
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Read,
    Write,
    Flush,
}

struct Request {
    slot: u64,
    kind: Kind,
    block: u64,
    /// Of a write: what the block holds afterwards.
    version: u64,
    began: Instant,
    /// Of the threads that serve it, when it began.
    starved: Waited,
}

struct Load<'a> {
    ring: RawRing<'a>,
    random: Rng,
    starved: Starved,
    seen: &'a Mutex<Seen>,
    /// What each block holds; 0: nothing was written.
    versions: Vec<u64>,
    next_version: u64,
    out: Vec<Option<Request>>,
    free: Vec<u64>,
    silent: bool,
}

impl<'a> Load<'a> {
    fn new(ring: RawRing<'a>, random: Rng, starved: Starved, seen: &'a Mutex<Seen>) -> Load<'a> {
        let out = (0..ring.size).map(|_| None).collect();
        let versions = vec![0; BLOCKS as usize];
        let free = (0..DEPTH as u64).collect();
        Load { ring, random, starved, seen, versions, next_version: 1, out, free, silent: false }
    }

    fn outstanding(&self) -> usize {
        DEPTH - self.free.len()
    }

    /// A request has no answer for so long that there will be none.
    fn stuck(&mut self) -> bool {
        self.silent
    }

    fn data(block: u64, version: u64) -> Vec<u8> {
        let word = version.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ block << 40;
        (0..BLOCK / 8).flat_map(|at| if version == 0 { 0 } else { word.wrapping_add(at) }.to_le_bytes()).collect()
    }

    fn step(&mut self, more: bool) {
        let mut offered = false;
        while more && let Some(slot) = self.free.pop() {
            self.offer(slot);
            offered = true;
        }
        if offered {
            self.ring.kick();
        }
        while let Some((id, _)) = self.ring.used() {
            self.answer(id);
        }
        let oldest = self.out.iter().flatten().map(|request| request.began).min();
        if let Some(oldest) = oldest.filter(|began| began.elapsed() > DEADLINE / 2) {
            self.silent = true;
            let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            seen.wrong.push(format!("no answer for {:?}", oldest.elapsed()));
        }
        // Now and then long enough for the worker to go to sleep.
        let pause = match self.random.u64(..64) {
            0 if self.outstanding() == 0 => 4000,
            _ => 50 + self.random.u64(..400),
        };
        std::thread::sleep(Duration::from_micros(pause));
    }

    fn offer(&mut self, slot: u64) {
        let kind = match self.random.u64(..20) {
            0 => Kind::Flush,
            1..10 => Kind::Write,
            _ => Kind::Read,
        };
        let block = loop {
            let block = self.random.u64(..BLOCKS);
            if self.out.iter().flatten().all(|request| request.block != block) {
                break block;
            }
        };
        let (at, data) = (REQUESTS + 64 * slot, DATA + BLOCK * slot);
        let version = self.next_version;
        self.next_version += 1;
        let sector = block * BLOCK / 512;
        let chain = match kind {
            Kind::Read => {
                self.ring.fill(data, &[0xa5; BLOCK as usize]);
                self.ring.request(at, 0, sector, &[writable(data, BLOCK as u32)])
            }
            Kind::Write => {
                self.ring.fill(data, &Self::data(block, version));
                self.ring.request(at, 1, sector, &[readable(data, BLOCK as u32)])
            }
            Kind::Flush => self.ring.request(at, T_FLUSH, 0, &[]),
        };
        let starved = self.starved.recent();
        let request = Request { slot, kind, block, version, began: Instant::now(), starved };
        let id = self.ring.offer(&chain).expect("a ring of 64 entries has room for a few requests");
        self.out[usize::from(id)] = Some(request);
    }

    fn answer(&mut self, id: u16) {
        let mut wrong = Vec::new();
        let Some(request) = self.out.get_mut(usize::from(id)).and_then(Option::take) else {
            self.seen.lock().unwrap().wrong.push(format!("an answer to {id}, which is not out"));
            return;
        };
        let took = request.began.elapsed();
        // A short one is no matter, however it came about.
        let mut own = took;
        if took > LIMIT / 10 {
            own = took.saturating_sub(self.starved.since(&request.starved)).max(took / LEAST);
        }
        let status = self.ring.status(REQUESTS + 64 * request.slot);
        if status != 0 {
            wrong.push(format!("status {status} after {took:?}"));
        }
        match request.kind {
            Kind::Read if status == 0 => {
                let expected = Self::data(request.block, self.versions[request.block as usize]);
                if self.ring.fetch(DATA + BLOCK * request.slot, BLOCK as usize) != expected {
                    wrong.push(format!("block {} holds something else", request.block));
                }
            }
            Kind::Write => self.versions[request.block as usize] = request.version,
            _ => {}
        }
        self.free.push(request.slot);
        let mut seen = self.seen.lock().unwrap();
        seen.answered += 1;
        seen.longest = seen.longest.max(own);
        seen.by_the_clock = seen.by_the_clock.max(took);
        seen.wrong.extend(wrong);
    }
}

/// For how long the threads that serve the neighbour were ready to run and had no CPU (Documentation/scheduler/sched-stats.rst of
/// Linux: the second figure of schedstat, in nanoseconds).
struct Starved {
    threads: Vec<File>,
    last: Instant,
    waited: Waited,
}

/// Of each thread.
#[derive(Clone, Default)]
struct Waited(Vec<u64>);

impl Starved {
    /// Of the program's workers; the drive and the calling thread are of this process.
    fn new(program: u32) -> Starved {
        let mut threads = Vec::new();
        for (process, names) in [(program, &["worker"][..]), (std::process::id(), &["nvme-sim\n", "neighbour"])] {
            let Ok(tasks) = std::fs::read_dir(format!("/proc/{process}/task")) else { continue };
            for task in tasks.flatten() {
                let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
                let wanted = names.iter().any(|start| name.starts_with(start));
                threads.extend(wanted.then(|| File::open(task.path().join("schedstat")).ok()).flatten());
            }
        }
        let mut starved = Starved { threads, last: Instant::now(), waited: Waited::default() };
        starved.look();
        starved
    }

    fn look(&mut self) {
        let waited = |file: &File| {
            let mut text = [0; 96];
            let bytes = file.read_at(&mut text, 0).ok()?;
            std::str::from_utf8(&text[..bytes]).ok()?.split_whitespace().nth(1)?.parse::<u64>().ok()
        };
        self.waited = Waited(self.threads.iter().map(|file| waited(file).unwrap_or(0)).collect());
        self.last = Instant::now();
    }

    /// Of the last millisecond, which saves system calls.
    fn recent(&mut self) -> Waited {
        if self.last.elapsed() > Duration::from_millis(1) {
            self.look();
        }
        self.waited.clone()
    }

    /// The longest that one of them has waited since then. What others have waited may be the same time, so it is not added.
    fn since(&mut self, then: &Waited) -> Duration {
        self.look();
        let waited = self.waited.0.iter().zip(&then.0).map(|(now, then)| now.saturating_sub(*then));
        Duration::from_nanos(waited.max().unwrap_or(0))
    }
}

const _: () = assert!(DATA + DEPTH as u64 * BLOCK <= REGION);
