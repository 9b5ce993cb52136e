//! A whole run: connect, load, read back, report.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vfio::PlainMemory;

use crate::client::{Connection, DiskInfo};
use crate::load::{Buffers, QueueClient, QueueProgress, Ring, Shared, drive};
use crate::model::{Limits, Mix, Model, ReadBack, VerifiedPlan, Window};
use crate::options::Load;
use crate::pace::Pace;
use crate::pattern::Pattern;
use crate::plan::{MAX_SHIFT, PlainPlan, Plan};
use crate::random::Random;
use crate::report::{Phase, Polls, Progress, QueueStats, Report};
use crate::{ClientOptions, Error, Workload};

/// Slots per queue that take long requests.
const LONG_SLOTS: usize = 2;
/// Longest discard or write zeroes of the verified load, in bytes.
const LONGEST_RANGE: u64 = 4 << 20;
/// Pause between two calls of the progress function.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// Connects to a target, runs `workload` and returns what was measured.
///
/// `progress` is called about ten times a second. `stop` ends the load early when it becomes true; the
/// read-back still happens. Errors and wrong blocks are in the report, they do not end the run.
///
/// # Errors
/// When the connection cannot be made, the options do not fit the disk, or the target stops answering.
pub fn run(
    options: &ClientOptions,
    workload: &Workload,
    stop: &AtomicBool,
    progress: impl FnMut(&Progress),
) -> Result<Report, Error> {
    run_disks(options, std::slice::from_ref(&options.socket), workload, stop, progress)
}

/// Runs a load on several disks at once, each with its own connection to one of `sockets` (that of `options` is not used), and
/// with the queues and the depth of `options`. The report is about all of them together.
///
/// # Errors
/// Whatever ends [`run`] with an error, and a verified load on more than one disk.
pub fn run_disks(
    options: &ClientOptions,
    sockets: &[PathBuf],
    workload: &Workload,
    stop: &AtomicBool,
    mut progress: impl FnMut(&Progress),
) -> Result<Report, Error> {
    check_workload(options, sockets, workload)?;
    let mut connections = Vec::with_capacity(sockets.len());
    let mut memory = Vec::new();
    for socket in sockets {
        let mut connection = Connection::open(&ClientOptions { socket: socket.clone(), ..options.clone() })?;
        let sizes = buffer_sizes(options, workload, connection.info())?;
        for queues in split_regions(options, &sizes) {
            let bytes = queues.iter().sum();
            let mut region = PlainMemory::create(bytes).map_err(|source| Error::Memory { bytes, source })?;
            connection.share(&mut region)?;
            memory.push((region, queues));
        }
        connections.push(connection);
    }
    let mut slices = memory.iter_mut().flat_map(|(region, sizes)| cut(region.as_mut_slice(), sizes));
    let buffers: Vec<Buffers<'_>> =
        (0..options.queues * sockets.len()).map(|_| slices.by_ref().take(options.depth).collect()).collect();
    let mut rings = Vec::new();
    for connection in &mut connections {
        rings.extend(connection.start_queues()?);
    }
    let run = Run { connections: &connections, options, stop };
    match &workload.load {
        Load::Plain { request_bytes, read_percent, sequential } => {
            let mut plans = Vec::with_capacity(rings.len());
            for connection in &connections {
                let info = connection.info();
                let blocks = u32::try_from(request_bytes / info.block_bytes)
                    .map_err(|_| Error::Options("requests of 2^32 blocks or more".into()))?;
                for queue in 0..options.queues {
                    let random = Random::new(workload.seed, plans.len() as u64);
                    let plan = PlainPlan::new(random, info.blocks, blocks, *read_percent);
                    plans.push(if *sequential { plan.in_order(queue, options.queues) } else { plan });
                }
            }
            let phase = run.load(rings, buffers, plans, workload, &mut progress)?;
            Ok(phase.into_report(stop).0)
        }
        Load::Verified { mix, window_bytes, .. } => {
            let plans = verified_plans(options, workload, connections[0].info(), mix, *window_bytes)?;
            let phase = run.load(rings, buffers, plans, workload, &mut progress)?;
            let (mut report, rings, buffers, plans) = phase.into_report(stop);
            // Each queue reads what another one wrote.
            let mut models: Vec<Model> = plans.into_iter().map(VerifiedPlan::into_model).collect();
            models.rotate_left(1);
            let plans: Vec<ReadBack> = models.into_iter().map(ReadBack::new).collect();
            report.blocks_read_back = plans.iter().map(ReadBack::known_blocks).sum();
            let end = End {
                deadline: None,
                operations: None,
                rate: None,
                // A second Ctrl-C is the way out of a read-back that takes too long.
                stop: &AtomicBool::new(false),
                phase: Phase::ReadBack,
            };
            let phase = run.phase(rings, buffers, plans, &end, &mut progress)?;
            report.add_read_back(&phase.stats);
            Ok(report)
        }
    }
}

/// What every phase of a run shares.
struct Run<'r> {
    /// One per disk, each with as many queues as the others.
    connections: &'r [Connection],
    options: &'r ClientOptions,
    stop: &'r AtomicBool,
}

/// When a phase ends, unless its plans end by themselves.
struct End<'s> {
    deadline: Option<Duration>,
    operations: Option<u64>,
    rate: Option<u64>,
    stop: &'s AtomicBool,
    phase: Phase,
}

/// What a phase leaves behind.
struct PhaseResult<'m, P> {
    rings: Vec<Ring>,
    buffers: Vec<Buffers<'m>>,
    plans: Vec<P>,
    stats: Vec<QueueStats>,
    polls: Polls,
    elapsed: Duration,
}

impl<'m, P> PhaseResult<'m, P> {
    fn into_report(self, stop: &AtomicBool) -> (Report, Vec<Ring>, Vec<Buffers<'m>>, Vec<P>) {
        let mut report = Report::new(self.stats, self.polls, self.elapsed);
        report.interrupted = stop.load(Ordering::Relaxed);
        (report, self.rings, self.buffers, self.plans)
    }
}

impl Run<'_> {
    fn load<'m, P: Plan>(
        &self,
        rings: Vec<Ring>,
        buffers: Vec<Buffers<'m>>,
        plans: Vec<P>,
        workload: &Workload,
        progress: &mut impl FnMut(&Progress),
    ) -> Result<PhaseResult<'m, P>, Error> {
        let end = End {
            deadline: workload.duration,
            operations: workload.operations,
            rate: workload.rate,
            stop: self.stop,
            phase: Phase::Load,
        };
        self.phase(rings, buffers, plans, &end, progress)
    }

    /// Runs one phase on threads of its own; the calling thread only reports progress.
    fn phase<'m, P: Plan>(
        &self,
        rings: Vec<Ring>,
        buffers: Vec<Buffers<'m>>,
        plans: Vec<P>,
        end: &End<'_>,
        progress: &mut impl FnMut(&Progress),
    ) -> Result<PhaseResult<'m, P>, Error> {
        let queues = rings.len();
        let shared = Shared {
            stop: end.stop,
            failed: AtomicBool::new(false),
            queues: (0..queues).map(|_| QueueProgress::default()).collect(),
        };
        let started = Instant::now();
        let parts = rings.into_iter().zip(buffers).zip(plans).enumerate();
        let threads = self.options.thread_count(self.connections.len());
        let mut groups: Vec<Vec<QueueClient<'m, P>>> = (0..threads).map(|_| Vec::new()).collect();
        for (at, ((ring, buffers), plan)) in parts {
            let (disk, index) = (&self.connections[at / self.options.queues], at % self.options.queues);
            let block_bytes = disk.info().block_bytes;
            let client = QueueClient::new(at, index, ring, disk.transport(), buffers, block_bytes, plan)
                .with_quota(share(end.operations, at, queues))
                .with_pace(end.rate.map(|rate| Pace::new(rate, at, queues)));
            groups[at % threads].push(client);
        }
        let deadline = end.deadline.map(|duration| started + duration);
        let first_error = Mutex::new(None);
        let finished = std::thread::scope(|scope| {
            let (shared, first_error) = (&shared, &first_error);
            let work = |mut group: Vec<QueueClient<'m, P>>| {
                let result = catch_unwind(AssertUnwindSafe(|| drive(&mut group, self.options, deadline, shared)));
                let result = result.unwrap_or_else(|panic| Err(Error::Panicked(panic_message(panic.as_ref()))));
                let polls = result.unwrap_or_else(|error| {
                    shared.failed.store(true, Ordering::Relaxed);
                    let mut first = first_error.lock().expect("nothing panics while it holds this lock");
                    first.get_or_insert(error);
                    Polls::default()
                });
                (group, polls, Instant::now())
            };
            let handles: Vec<_> = groups.into_iter().map(|group| scope.spawn(move || work(group))).collect();
            while !handles.iter().all(|handle| handle.is_finished()) {
                progress(&shared.progress(end, started.elapsed()));
                std::thread::park_timeout(PROGRESS_EVERY);
            }
            let results =
                handles.into_iter().map(|handle| handle.join().expect("a client thread catches its own panics"));
            results.collect::<Vec<_>>()
        });
        progress(&shared.progress(end, started.elapsed()));
        let failed = first_error.into_inner().expect("nothing panics while it holds this lock");
        if let Some(error) = failed {
            return Err(error);
        }
        let mut polls = Polls::default();
        let mut elapsed = Duration::ZERO;
        let mut clients = Vec::with_capacity(queues);
        for (group, thread_polls, ended) in finished {
            polls.all += thread_polls.all;
            polls.empty += thread_polls.empty;
            elapsed = elapsed.max(ended - started);
            clients.extend(group);
        }
        clients.sort_by_key(QueueClient::at);
        let mut result = PhaseResult {
            rings: Vec::new(),
            buffers: Vec::new(),
            plans: Vec::new(),
            stats: Vec::new(),
            polls,
            elapsed,
        };
        for client in clients {
            let (ring, buffers, plan, stats) = client.into_parts();
            result.rings.push(ring);
            result.buffers.push(buffers);
            result.plans.push(plan);
            result.stats.push(stats);
        }
        Ok(result)
    }
}

impl Shared<'_> {
    fn progress(&self, end: &End<'_>, elapsed: Duration) -> Progress {
        // For display only: no order with anything else is needed.
        let sum = |value: fn(&QueueProgress) -> u64| self.queues.iter().map(value).sum();
        let operations = sum(|queue| queue.operations.load(Ordering::Relaxed));
        let by_time = end.deadline.map(|limit| elapsed.as_secs_f64() / limit.as_secs_f64().max(f64::MIN_POSITIVE));
        let by_count = end.operations.map(|limit| operations as f64 / limit.max(1) as f64);
        let fraction = match (by_time, by_count) {
            (Some(time), Some(count)) => Some(time.max(count)),
            (time, count) => time.or(count),
        };
        Progress {
            phase: end.phase,
            operations,
            bytes: sum(|queue| queue.bytes.load(Ordering::Relaxed)),
            elapsed,
            fraction: fraction.map(|fraction| fraction.min(1.0)),
        }
    }
}

/// The part of `operations` that falls to queue `index` of `queues`; without a number, no limit.
fn share(operations: Option<u64>, index: usize, queues: usize) -> u64 {
    let Some(operations) = operations else {
        return u64::MAX;
    };
    let (index, queues) = (index as u64, queues as u64);
    operations / queues + u64::from(index < operations % queues)
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message").to_owned()
}

/// What can be refused before anything is connected.
fn check_workload(options: &ClientOptions, sockets: &[PathBuf], workload: &Workload) -> Result<(), Error> {
    let refuse = |why: &str| Err(Error::Options(why.into()));
    match workload {
        _ if sockets.is_empty() => refuse("a load needs at least one disk"),
        Workload { load: Load::Verified { .. }, .. } if sockets.len() > 1 => {
            refuse("a verified load is for one disk: run one for each")
        }
        Workload { rate: Some(0), .. } => refuse("a rate of 0 requests per second never sends any; use at least 1"),
        Workload { rate: Some(_), .. } if options.interrupts => {
            refuse("a client that sleeps until it is notified cannot keep a rate: poll instead")
        }
        _ => Ok(()),
    }
}

/// The sizes of one queue's buffers, in bytes.
fn buffer_sizes(options: &ClientOptions, workload: &Workload, info: &DiskInfo) -> Result<Vec<usize>, Error> {
    options.ring_size()?;
    let check = |bytes: usize| {
        let blocks = (bytes / info.block_bytes) as u64;
        if blocks == 0 || !bytes.is_multiple_of(info.block_bytes) || blocks > info.blocks {
            return Err(Error::Options(format!(
                "requests of {bytes} bytes do not fit a disk of {} blocks of {} bytes; use a multiple of the block size",
                info.blocks, info.block_bytes
            )));
        }
        Ok(bytes)
    };
    match workload.load {
        Load::Plain { request_bytes, read_percent, .. } => {
            if read_percent > 100 {
                return Err(Error::Options(format!("{read_percent} % reads: use 0 to 100")));
            }
            if read_percent < 100 && info.read_only {
                return Err(Error::Options("the disk is read-only: use 100 % reads".into()));
            }
            Ok(vec![check(request_bytes)?; options.depth])
        }
        Load::Verified { request_bytes, long_request_bytes, .. } => {
            let long = check(long_request_bytes.max(request_bytes))? + MAX_SHIFT;
            let mut sizes = vec![check(request_bytes)? + MAX_SHIFT; options.depth];
            for size in sizes.iter_mut().take(LONG_SLOTS) {
                *size = long;
            }
            Ok(sizes)
        }
    }
}

/// The buffers of all queues, in order, dealt out to the regions of memory.
fn split_regions(options: &ClientOptions, sizes: &[usize]) -> Vec<Vec<usize>> {
    let all: Vec<usize> = (0..options.queues).flat_map(|_| sizes).copied().collect();
    let per_region = all.len().div_ceil(options.memory_regions);
    all.chunks(per_region).map(<[usize]>::to_vec).collect()
}

/// Cuts `memory` into pieces of the given sizes.
fn cut<'m>(mut memory: &'m mut [u8], sizes: &[usize]) -> Vec<&'m mut [u8]> {
    let mut pieces = Vec::with_capacity(sizes.len());
    for &size in sizes {
        let (piece, rest) = memory.split_at_mut(size);
        pieces.push(piece);
        memory = rest;
    }
    pieces
}

fn verified_plans(
    options: &ClientOptions,
    workload: &Workload,
    info: &DiskInfo,
    mix: &Mix,
    window_bytes: u64,
) -> Result<Vec<VerifiedPlan>, Error> {
    if info.read_only {
        return Err(Error::Options(
            "the disk is read-only: nothing can be verified on it; use a plain load of 100 % reads".into(),
        ));
    }
    let range = u32::try_from(LONGEST_RANGE / info.block_bytes as u64).unwrap_or(u32::MAX);
    let limits =
        Limits { discard: info.max_discard_blocks.min(range), write_zeroes: info.max_write_zeroes_blocks.min(range) };
    let offered = |share: u32, offered: bool| if offered { share } else { 0 };
    let mix = Mix {
        flush: offered(mix.flush, info.flush),
        discard: offered(mix.discard, limits.discard > 0),
        write_zeroes: offered(mix.write_zeroes, limits.write_zeroes > 0),
        ..*mix
    };
    let pattern = Pattern::new(workload.seed, info.block_bytes);
    let window_blocks = window_bytes / info.block_bytes as u64;
    (0..options.queues as u64)
        .map(|queue| {
            let window = Window::new(info.blocks, window_blocks, queue, options.queues as u64).ok_or_else(|| {
                Error::Options(format!(
                    "{} blocks are too few for {} queues; use a larger disk or window, or fewer queues",
                    info.blocks.min(window_blocks),
                    options.queues
                ))
            })?;
            let random = Random::new(workload.seed, queue);
            Ok(VerifiedPlan::new(Model::new(window, pattern), random, mix, limits))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_add_up() {
        for (operations, queues) in [(0, 1), (10, 3), (7, 8), (1_000_001, 4)] {
            let sum: u64 = (0..queues).map(|index| share(Some(operations), index, queues)).sum();
            assert_eq!(sum, operations);
        }
        assert_eq!(share(None, 0, 2), u64::MAX);
    }

    #[test]
    fn regions_hold_every_buffer_once_and_in_order() {
        let mut options = ClientOptions::new("/nowhere");
        (options.queues, options.depth, options.memory_regions) = (3, 5, 4);
        let sizes = [10, 20, 30, 40, 50];
        let regions = split_regions(&options, &sizes);
        assert_eq!(regions.len(), 4);
        assert_eq!(regions.concat(), [sizes, sizes, sizes].concat());
    }
}
