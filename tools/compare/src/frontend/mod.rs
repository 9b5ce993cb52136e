//! The way `--frontend`: the same load generator, as a vhost-user front-end without a guest, against this target and
//! against `qemu-storage-daemon`, which is data-plane's block layer and IOThread behind the same socket protocol.
//!
//! # What it can show
//!
//! What a request costs, and how fast it is, from the moment it stands in a virtqueue until its answer does: the whole of
//! the back end, on any machine. The front-end polls on all sides, and asks for no notifications.
//!
//! # What it cannot
//!
//! - A guest: what it costs to leave and to enter one, its block layer, its file systems. That is [`guest`](crate::guest).
//! - A drive, unless one is given. Without, the storage is memory on both sides: data-plane's is a file in a tmpfs, whose copying
//!   the kernel does in data-plane's name; ours is an NVMe controller in software, whose copying it does itself. The controller
//!   is a process of its own, and its CPU time is told apart: a real drive moves data without a CPU. Data-plane's
//!   copying cannot be told apart; with a real drive it would have the kernel's NVMe driver to pay instead. So the CPU time of
//!   our side is given both ways, and neither is what a drive gives.
//!
//! # How
//!
//! Both sides are up during the whole comparison, on the same CPUs; whoever is not being measured is held (SIGSTOP). The
//! rounds are interleaved, so that what changes on the machine meanwhile meets all sides. Each round makes a new connection.

pub mod drive;
mod placement;
mod stand;
mod storage;

use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use blk_perf::{ClientOptions, Report, Workload};

use crate::comparison::{Accelerator, Comparison, Environment, FORMAT, Outcome, Sample, Side, SideInfo, Way};
use crate::job::Job;
use crate::options::Aio;
use crate::process::{on_cpus, own_cpu_time};
use crate::progress::Progress;
use crate::{Error, Plan, environment};
use placement::Placement;
use stand::{QUEUE_SIZE, Recipe, Stand};

/// Descriptors of a request: header, data, status.
const DESCRIPTORS: u32 = 3;
/// Bytes per request while a disk in memory is filled.
const FILL_BYTES: u64 = 1 << 20;
/// How long no request may complete.
const STALL: Duration = Duration::from_secs(10);
/// A round is repeated, at most this often, if the CPUs were moved apart or together during it.
const RETAKES: u32 = 2;
/// CPUs are known to have been moved if a message between them takes this many times as long, or short, as before.
const MOVED: f64 = 2.0;

/// Options of the way `--frontend` alone.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "With --frontend")]
pub struct FrontendOptions {
    /// Also measure data-plane on a device that stores nothing: its upper bound
    #[arg(long)]
    pub null: bool,
    /// Data-plane's program [default: qemu-storage-daemon in PATH]
    #[arg(long, value_name = "PATH")]
    pub storage_daemon: Option<PathBuf>,
}

/// Makes the comparison.
///
/// # Errors
/// What keeps the whole comparison from being made; failures of single rounds are in its rows.
pub fn run(plan: &Plan, options: &FrontendOptions, progress: &Progress) -> Result<Comparison, Error> {
    check_depths(plan)?;
    storage::check_devices(plan)?;
    let sides = sides(plan, options);
    let placement = Placement::new(plan.cpus.as_deref())?;
    let folder = tempfile::Builder::new().prefix("compare-").tempdir();
    let folder = folder.map_err(Error::system("making a folder for sockets"))?;
    // Data-plane's files, and what the drive in software keeps.
    let in_memory = u64::from(plan.device.is_none()) + u64::from(plan.kernel_device.is_none());
    let memory = storage::memory_folder(plan.disk_bytes * u64::from(plan.most_disks()) * in_memory)?;
    let direct = plan.kernel_device.is_some() || storage::takes_direct(memory.path());
    let aio = plan.aio.unwrap_or_default();
    if aio == Aio::Native && !direct {
        let message =
            "this kernel's tmpfs cannot be opened past the page cache, which native needs; use --aio io_uring";
        return Err(Error::Options(message.into()));
    }
    let needs_daemon = sides.iter().any(|side| *side != Side::VhostBlk);
    let recipe = Recipe {
        plan,
        placement: &placement,
        aio,
        direct,
        vhost_blk: if sides.contains(&Side::VhostBlk) { plan.vhost_blk_program()? } else { PathBuf::new() },
        storage_daemon: match needs_daemon {
            true => stand::storage_daemon(options.storage_daemon.as_deref())?,
            false => PathBuf::new(),
        },
        folder: folder.path().to_path_buf(),
        memory: memory.path().to_path_buf(),
    };
    progress.expect(plan.jobs.len() as u64 * u64::from(plan.repeat) * sides.len() as u64);
    let mut comparison = Comparison {
        format: FORMAT,
        way: Way::Frontend,
        date: environment::date(),
        environment: describe(&recipe, &sides),
        settings: plan.settings(),
        notes: notes(&recipe, &sides),
        rows: Vec::new(),
    };
    let mut bench = Bench { recipe: &recipe, stands: Vec::new(), retaken: 0 };
    for &side in &sides {
        progress.step(format!("{side}: starting, filling its disks"));
        let stand = bench.start(side)?;
        bench.stands.push((side, Some(stand)));
    }
    for job in &plan.jobs {
        for _ in 0..plan.repeat {
            for &side in &sides {
                plan.check_stop()?;
                progress.begin(job, side);
                let outcome = bench.round(job, side)?;
                plan.check_stop()?;
                progress.end(job, side, &outcome);
                comparison.add(job, side, outcome);
            }
        }
    }
    for (side, stand) in bench.stands {
        progress.step(format!("{side}: stopping"));
        // All rounds are done: how it ends does not change them, but is worth knowing.
        if let Err(error) = stand.map_or(Ok(()), Stand::stop) {
            comparison.notes.push(format!("After the last round, when it was to end: {error}."));
        }
    }
    if bench.retaken > 0 {
        let note =
            "rounds were repeated because the distance between the CPUs changed by more than a factor of 2 during them";
        comparison.notes.push(format!("{} {note}.", bench.retaken));
    }
    Ok(comparison)
}

/// Who takes part: if disks are given for one side only, that one. Memory would be no match for a drive.
fn sides(plan: &Plan, options: &FrontendOptions) -> Vec<Side> {
    let none_given = plan.device.is_none() && plan.kernel_device.is_none();
    let mut sides = Vec::new();
    if plan.device.is_some() || none_given {
        sides.push(Side::VhostBlk);
    }
    if plan.kernel_device.is_some() || none_given {
        sides.push(Side::DataPlane);
    }
    if options.null {
        sides.push(Side::DataPlaneNull);
    }
    sides
}

/// Queues to use and requests in flight on each of them.
fn queues_and_depth(job: &Job, queues: u32) -> (u32, u32) {
    let queues = queues.min(job.depth).max(1);
    (queues, job.depth.div_ceil(queues))
}

fn check_depths(plan: &Plan) -> Result<(), Error> {
    for job in &plan.jobs {
        let (queues, depth) = queues_and_depth(job, plan.queues);
        if queues * depth != job.depth {
            let message = format!("{}: depth {} cannot be shared by {queues} queues evenly", job.name, job.depth);
            return Err(Error::Options(message));
        }
        if depth * DESCRIPTORS > QUEUE_SIZE {
            let most = QUEUE_SIZE / DESCRIPTORS;
            let message =
                format!("{}: a queue holds at most {most} requests; use a lower --depth or more --queues", job.name);
            return Err(Error::Options(message));
        }
    }
    Ok(())
}

/// The sides, ready to be measured.
struct Bench<'r> {
    recipe: &'r Recipe<'r>,
    /// `None`: it has failed, and is started again when it is wanted.
    stands: Vec<(Side, Option<Stand>)>,
    retaken: u64,
}

impl Bench<'_> {
    /// Starts `side`, writes its disks in memory full once, and holds it.
    fn start(&self, side: Side) -> Result<Stand, Error> {
        let mut stand = self.recipe.start(side)?;
        let plan = self.recipe.plan;
        let own = match side {
            Side::VhostBlk => plan.device.is_some(),
            Side::DataPlane => plan.kernel_device.is_some(),
            Side::DataPlaneNull => true,
        };
        if !own {
            let bytes = FILL_BYTES.min(plan.disk_bytes);
            let count = plan.disk_bytes.div_ceil(bytes) * u64::from(plan.most_disks());
            let fill = Workload::plain(1, bytes as usize, 0).in_order().for_operations(count);
            self.load(&stand, &fill, plan.most_disks(), 1, 8, || {}).map_err(Error::Options)?;
        }
        stand.hold()?;
        Ok(stand)
    }

    /// One round, repeated if the machine changed meanwhile.
    fn round(&mut self, job: &Job, side: Side) -> Result<Outcome, Error> {
        let at = self.stands.iter().position(|(this, _)| *this == side).expect("every side has a place");
        let mut stand = match self.stands[at].1.take() {
            Some(stand) => stand,
            None => match self.start(side) {
                Ok(stand) => stand,
                Err(error) => return Ok(Outcome::Failed(format!("it does not start any more: {error}"))),
            },
        };
        let mut retakes = 0;
        let outcome = loop {
            let before = self.recipe.placement.hop_ns()?;
            stand.resume()?;
            let measured = self.measure(job, &stand);
            let alive = stand.check_alive();
            let mut sample = match (measured, alive) {
                (Ok(sample), Ok(())) => sample,
                (Ok(_), Err(error)) => break Outcome::Failed(error.to_string()),
                (Err(why), Ok(())) => break Outcome::Failed(why),
                (Err(why), Err(error)) => break Outcome::Failed(format!("{why}; {error}")),
            };
            stand.hold()?;
            let after = self.recipe.placement.hop_ns()?;
            if let (Some(before), Some(after)) = (before, after) {
                if before.max(after) > MOVED * before.min(after) && retakes < RETAKES {
                    retakes += 1;
                    self.retaken += 1;
                    continue;
                }
                sample.hop_ns = Some(before.max(after));
            }
            break Outcome::Measured(sample);
        };
        // Whoever has failed is not trusted with the next round.
        if matches!(outcome, Outcome::Measured(_)) {
            self.stands[at].1 = Some(stand);
        }
        Ok(outcome)
    }

    fn measure(&self, job: &Job, stand: &Stand) -> Result<Sample, String> {
        let plan = self.recipe.plan;
        let (queues, depth) = queues_and_depth(job, plan.queues);
        let request_bytes = usize::try_from(job.block_bytes).map_err(|error| error.to_string())?;
        let mut workload = Workload::plain(1, request_bytes, if job.pattern.writes() { 0 } else { 100 });
        if job.pattern.is_sequential() {
            workload = workload.in_order();
        }
        workload = workload.for_duration(plan.round);
        workload.rate = job.rate.map(u64::from);
        let times = Mutex::new(None);
        let read = || {
            let (side, drive) = stand.cpu_times()?;
            Ok::<_, Error>((side, drive, own_cpu_time(std::process::id())?))
        };
        // The first reading is taken when the load begins, the last one when it has ended.
        let note = || {
            let now = read();
            let mut times = times.lock().expect("nothing panics while it holds this lock");
            *times = match times.take() {
                None => Some((now, None)),
                Some((first, _)) => Some((first, Some(now))),
            };
        };
        let report = self.load(stand, &workload, job.disks, queues, depth, note)?;
        let times = times.into_inner().expect("nothing panics while it holds this lock");
        let Some((first, Some(last))) = times else {
            return Err("the load ended before its CPU time could be read".into());
        };
        let (first, last) = (first.map_err(|error| error.to_string())?, last.map_err(|error| error.to_string())?);
        let passed = |first: Duration, last: Duration| last.saturating_sub(first).as_secs_f64();
        Ok(Sample {
            seconds: report.seconds,
            operations: report.operations,
            errors: report.io_errors,
            iops: report.iops,
            mib_per_s: report.mib_per_s,
            mean_us: report.mean_us,
            p50_us: report.p50_us,
            p99_us: report.p99_us,
            p999_us: report.p999_us,
            cpu_seconds: passed(first.0, last.0),
            drive_cpu_seconds: first.1.zip(last.1).map(|(first, last)| passed(first, last)),
            load_cpu_seconds: Some(passed(first.2, last.2)),
            empty_polls: Some(report.client_empty_polls),
            unsent: job.rate.map(|_| report.unsent),
            hop_ns: None,
        })
    }

    /// Runs a load; `note` is called when it begins and at least once when its time is over.
    fn load(
        &self,
        stand: &Stand,
        workload: &Workload,
        disks: u32,
        queues: u32,
        depth: u32,
        note: impl Fn(),
    ) -> Result<Report, String> {
        let plan = self.recipe.plan;
        let options =
            ClientOptions { queues: queues as usize, depth: depth as usize, stall: STALL, ..ClientOptions::new("") };
        let mut begun = false;
        let progress = |progress: &blk_perf::Progress| {
            // Reading CPU times takes some itself: not more often than needed.
            if !begun || workload.duration.is_none_or(|duration| progress.elapsed >= duration) {
                begun = true;
                note();
            }
        };
        let run = || blk_perf::run_disks(&options, stand.sockets(disks), workload, &plan.stop, progress);
        let report = on_cpus(&self.recipe.placement.load, run).map_err(|error| error.to_string())?;
        let report = report.map_err(|error| error.to_string())?;
        match report.failures.first() {
            _ if report.is_success() => Ok(report),
            Some(first) => Err(format!("{} of {} requests failed: {first}", report.io_errors, report.operations)),
            None => Err("not one request was completed".into()),
        }
    }
}

fn describe(recipe: &Recipe<'_>, sides: &[Side]) -> Environment {
    let plan = recipe.plan;
    let disks = storage::memory_words(plan.most_disks(), plan.disk_bytes);
    let info = |&side: &Side| {
        let (program, storage) = match side {
            Side::VhostBlk => {
                let memory = format!("NVMe controller in software, a process of its own, {disks} in memory");
                (&recipe.vhost_blk, plan.device.clone().unwrap_or(memory))
            }
            Side::DataPlane => {
                let cache = if recipe.direct { "cache.direct=on" } else { "cache.direct=off" };
                let storage = match &plan.kernel_device {
                    Some(path) => storage::disk_words(path),
                    None => format!("files in a tmpfs, {disks}"),
                };
                (&recipe.storage_daemon, format!("{storage}; aio={}, {cache}", recipe.aio.name()))
            }
            Side::DataPlaneNull => (&recipe.storage_daemon, format!("none (null-co), {disks}")),
        };
        SideInfo { side, program: environment::version(program), storage }
    };
    let in_software = sides.contains(&Side::VhostBlk) && plan.device.is_none();
    Environment {
        accelerator: Accelerator::NoGuest,
        sides: sides.iter().map(info).collect(),
        cpu: environment::cpu_model(),
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        kernel: environment::kernel(),
        placement: recipe.placement.words(in_software),
    }
}

/// What a reader has to know.
fn notes(recipe: &Recipe<'_>, sides: &[Side]) -> Vec<String> {
    let plan = recipe.plan;
    let mut notes = vec![
        "No guest: the load generator is a vhost-user front-end that polls its virtqueues, the same for all sides. The figures \
         show what the back ends do; what it costs to leave and enter a guest is not in them."
            .to_owned(),
        "Host CPU is the user and system time of the side's process, the kernel's work in its name included; the load \
         generator's is not charged. A polling worker takes its CPU whole while there is work."
            .to_owned(),
    ];
    if sides.contains(&Side::VhostBlk) && plan.device.is_none() {
        notes.push(
            "The storage is memory, not a drive. vhost-blk has an NVMe controller in software that copies every block, in a process \
             of its own whose CPU time is told apart (\"drive\"), because a real drive takes none; data-plane's file is copied by \
             the kernel in data-plane's own CPU time. Neither is what a real drive \
             gives: it would spare both the copying, and cost data-plane the kernel's NVMe driver."
                .to_owned(),
        );
    }
    if recipe.placement.drive == recipe.placement.load && sides.contains(&Side::VhostBlk) && plan.device.is_none() {
        notes.push(
            "There are too few CPUs: the drive in software takes turns with the load generator on one CPU, which slows vhost-blk \
             down and data-plane not."
                .to_owned(),
        );
    }
    if plan.device.is_some() != plan.kernel_device.is_some() {
        notes.push("One side only: measure the other one, and join the two reports with --merge.".to_owned());
    }
    if plan.device.is_some() || plan.kernel_device.is_some() {
        notes.push(
            "A drive that was never written, or was discarded, answers reads without touching its flash: write it full once \
             before."
                .to_owned(),
        );
    }
    notes.extend(environment::busy_note());
    if sides.contains(&Side::DataPlaneNull) {
        notes.push(
            "\"data-plane, null\" stores nothing and copies nothing: what its block layer can do at most.".to_owned(),
        );
    }
    notes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::Pattern;

    #[test]
    fn depths_are_shared_by_the_queues() {
        let job = |depth| Job::new(Pattern::RandomRead, 4096, depth, None, 1);
        assert_eq!(queues_and_depth(&job(256), 1), (1, 256));
        assert_eq!(queues_and_depth(&job(256), 4), (4, 64));
        assert_eq!(queues_and_depth(&job(1), 4), (1, 1));
        assert_eq!(queues_and_depth(&job(2), 4), (2, 1));
    }
}
