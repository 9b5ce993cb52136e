//! The way `--guest`: fio in the same guest, once on this target and once on virtio-blk-data-plane.
//!
//! Both guests have the same kernel, memory, CPUs, number and size of virtqueues, and the same CPUs of the host. One has its
//! disks by `vhost-user-blk-pci` from `vhost-blk`, the other by `virtio-blk-pci` from IOThreads. Both are up all the time and
//! take turns; a single drive that is to be handed from one to the other makes them take turns in being up, too.

mod accelerator;
mod cpu;
mod fio;
mod qemu;
mod rebind;
mod report;
mod side;
mod storage;

use std::path::{Path, PathBuf};

use e2e::Kernel;
use vhost_blk::control::config::CpuList;

pub use accelerator::Wanted as WantedAccelerator;

use self::qemu::{Qemu, Queues};
use self::rebind::Rebind;
use self::side::{Running, Setup};
use self::storage::Storage;
use crate::comparison::FORMAT;
use crate::process::{allowed_cpus, find_program};
use crate::progress::Progress;
use crate::{Comparison, Error, Job, Outcome, Plan, Side, Way, environment};

/// Options of the way `--guest` alone.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "With --guest")]
pub struct GuestOptions {
    /// What runs the guests' CPUs; KVM only if a short boot shows that it works
    #[arg(long, value_enum, default_value = "auto")]
    pub accelerator: WantedAccelerator,
    /// The guests' kernel [default: the one that tests/prepare.sh unpacked, else the host's own]
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// The folder with that kernel's modules.dep; none if it has virtio_pci and virtio_blk built in
    #[arg(long, value_name = "FOLDER", requires = "kernel")]
    pub modules: Option<PathBuf>,
    /// CPUs of each guest [default: 2, or one for each virtqueue if these are more]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub vcpus: Option<u32>,
    /// Memory of each guest, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(512..))]
    pub memory: u32,
    /// Host CPUs with a worker of our target each, or an IOThread of data-plane each [default: one of it, not pinned]
    #[arg(long, value_name = "LIST")]
    pub worker_cpus: Option<CpuList>,
    /// IOThreads of data-plane [default: as many as our target has workers]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub iothreads: Option<u32>,
    /// Let setup/setup.sh hand the drive --device from the kernel to VFIO and back, between the rounds
    #[arg(long, requires_all = ["device", "kernel_device"])]
    pub rebind: bool,
}

impl GuestOptions {
    /// CPUs of each guest.
    fn vcpus(&self, plan: &Plan) -> u32 {
        self.vcpus.unwrap_or(plan.queues.max(2))
    }
}

/// The sides, in the order of the first round; the next one has the other order.
const SIDES: [Side; 2] = [Side::VhostBlk, Side::DataPlane];

/// Makes the comparison.
///
/// # Errors
/// What keeps the whole comparison from being made; failures of single rounds are in its rows.
pub fn run(plan: &Plan, options: &GuestOptions, progress: &Progress) -> Result<Comparison, Error> {
    progress.step("looking at the machine");
    let (jobs, left_out) = jobs_that_fit(plan)?;
    let mut setup = prepare(plan, options, &jobs, progress)?;
    let rebind = options.rebind.then(|| Rebind::new(plan)).transpose()?;
    let mut sides = Sides { running: [None, None], started: [false, false], rebind };
    let mut comparison = Comparison {
        format: FORMAT,
        way: Way::Guest,
        date: environment::date(),
        environment: report::environment(&setup),
        settings: plan.settings(),
        notes: Vec::new(),
        rows: Vec::new(),
    };
    progress.expect(u64::from(plan.repeat) * jobs.len() as u64 * SIDES.len() as u64);
    let result = rounds(&mut sides, &mut setup, &jobs, progress, &mut comparison);
    progress.step("ending the guests");
    let ended = sides.stop_all();
    result.and(ended)?;
    // How data-plane's disks were opened is known now.
    comparison.environment.sides = report::sides(&setup)?;
    comparison.notes = report::notes(&setup, &left_out)?;
    Ok(comparison)
}

fn prepare<'a>(
    plan: &'a Plan,
    options: &'a GuestOptions,
    jobs: &[Job],
    progress: &Progress,
) -> Result<Setup<'a>, Error> {
    let busy = environment::busy_note();
    let cpus = check(plan, options)?;
    let target = plan.vhost_blk_program()?;
    let qemu = Qemu::find()?;
    check_programs()?;
    let kernel = kernel(options)?;
    progress.step("finding out whether KVM works");
    let folder = tempfile::tempdir().map_err(Error::system("making a folder"))?;
    let accelerator = accelerator::choose(options.accelerator, &kernel, folder.path())?;
    progress.step("making the disks");
    let disks = jobs.iter().map(|job| job.disks).max().unwrap_or(1);
    let depth = jobs.iter().map(|job| job.depth).max().unwrap_or(1);
    let storage = Storage::new(plan, disks, options.rebind)?;
    let queues = Queues::new(plan.queues, depth);
    let (access, guest_kernel) = (None, None);
    Ok(Setup { plan, options, queues, cpus, qemu, access, kernel, accelerator, storage, target, busy, guest_kernel })
}

/// Checks the options against each other and the machine; returns the host's CPUs that both sides may use.
fn check(plan: &Plan, options: &GuestOptions) -> Result<Vec<usize>, Error> {
    let vcpus = options.vcpus(plan);
    if vcpus < plan.queues {
        let queues = plan.queues;
        return Err(Error::Options(format!(
            "{queues} queues need {queues} CPUs in the guest: --vcpus {vcpus} is too few"
        )));
    }
    let allowed = allowed_cpus()?;
    let cpus = plan.cpus.clone().unwrap_or_else(|| allowed.clone());
    let workers = options.worker_cpus.as_ref().map_or(&[][..], |list| &list.0);
    match (cpus.iter().find(|cpu| !allowed.contains(cpu)), workers.iter().find(|cpu| !cpus.contains(cpu))) {
        (Some(cpu), _) => Err(Error::Options(format!("CPU {cpu} is not there, or not allowed"))),
        (None, Some(cpu)) => Err(Error::Options(format!("--worker-cpus has CPU {cpu}, which --cpus has not"))),
        (None, None) => Ok(cpus),
    }
}

/// What the guests are made of, besides QEMU.
fn check_programs() -> Result<(), Error> {
    let needed = [
        ("fio", "it makes the load inside the guest: install the package fio"),
        ("bash", "install the package bash"),
        ("setpriv", "install the package util-linux"),
        ("busybox", "install the package busybox-static"),
    ];
    for (name, advice) in needed {
        find_program(Path::new(name)).ok_or_else(|| Error::NoProgram { program: name.into(), advice })?;
    }
    // The guest's first program has nothing to load libraries with: ldd fails on a static one.
    let dynamic = std::process::Command::new("ldd").arg("/bin/busybox").output().is_ok_and(|ldd| ldd.status.success());
    if dynamic {
        let advice = "the one here needs libraries: install the package busybox-static";
        return Err(Error::NoProgram { program: "a static busybox".into(), advice });
    }
    Ok(())
}

fn kernel(options: &GuestOptions) -> Result<Kernel, Error> {
    if let Some(image) = &options.kernel {
        return Ok(Kernel { image: image.clone(), modules: options.modules.clone() });
    }
    Kernel::stable().or_else(|_| Kernel::of_the_host()).map_err(|source| Error::Guest {
        what: "the guests' kernel (--kernel, --modules)".into(),
        source,
        hint: String::new(),
    })
}

/// The jobs that the disks allow, and the names of those left out.
fn jobs_that_fit(plan: &Plan) -> Result<(Vec<Job>, Vec<String>), Error> {
    let has_drive = plan.device.is_some() || plan.kernel_device.is_some();
    let (jobs, left_out): (Vec<Job>, Vec<Job>) =
        plan.jobs.iter().cloned().partition(|job| !has_drive || job.disks == 1);
    if jobs.is_empty() {
        return Err(Error::Options("a job on several disks cannot run on one drive".into()));
    }
    Ok((jobs, left_out.into_iter().map(|job| job.name).collect()))
}

/// One thing after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// A round of a job, by its number.
    Round(usize, Side),
    /// The side goes down and gives the drive away.
    Stop(Side),
}

/// The order of everything. With a drive for each side both are up and take turns at every job; with one drive, whoever is up
/// has it, and they take turns at whole sets of jobs.
fn steps(repeat: u32, jobs: usize, one_drive: bool) -> Vec<Step> {
    let mut steps = Vec::new();
    for number in 0..repeat {
        let mut order = SIDES;
        if number % 2 == 1 {
            order.reverse();
        }
        if one_drive {
            for side in order {
                steps.extend((0..jobs).map(|job| Step::Round(job, side)));
                steps.push(Step::Stop(side));
            }
        } else {
            steps.extend((0..jobs).flat_map(|job| order.map(|side| Step::Round(job, side))));
        }
    }
    steps
}

fn rounds(
    sides: &mut Sides,
    setup: &mut Setup,
    jobs: &[Job],
    progress: &Progress,
    comparison: &mut Comparison,
) -> Result<(), Error> {
    for step in steps(setup.plan.repeat, jobs.len(), sides.rebind.is_some()) {
        let (job, side) = match step {
            Step::Round(job, side) => (&jobs[job], side),
            Step::Stop(side) => {
                sides.stop(side)?;
                continue;
            }
        };
        setup.plan.check_stop()?;
        progress.begin(job, side);
        let outcome = sides.measure(job, side, setup, progress)?;
        // A signal from the terminal ends QEMU too: that is no failure of the side.
        setup.plan.check_stop()?;
        progress.end(job, side, &outcome);
        comparison.add(job, side, outcome);
    }
    Ok(())
}

/// The sides that are up.
struct Sides {
    running: [Option<Running>; 2],
    /// Whether it was ever up: what does not start at all ends the comparison.
    started: [bool; 2],
    rebind: Option<Rebind>,
}

fn index(side: Side) -> usize {
    usize::from(side != Side::VhostBlk)
}

impl Sides {
    fn measure(&mut self, job: &Job, side: Side, setup: &mut Setup, progress: &Progress) -> Result<Outcome, Error> {
        let place = index(side);
        if self.running[place].is_none() {
            progress.step(format!("{side}: booting the guest"));
            match self.start(side, setup) {
                Ok(running) => self.running[place] = Some(running),
                Err(error) if self.started[place] => {
                    return Ok(Outcome::Failed(format!("it could not be started again: {error}")));
                }
                Err(error) => return Err(error),
            }
            self.started[place] = true;
            progress.begin(job, side);
        }
        let Some(running) = &mut self.running[place] else { return Ok(Outcome::Failed("it is not up".into())) };
        Ok(match running.measure(job, setup.plan) {
            Ok(sample) => Outcome::Measured(sample),
            Err(reason) => {
                // Whatever state it is in, the next round gets a fresh one.
                self.running[place] = None;
                Outcome::Failed(reason)
            }
        })
    }

    fn start(&self, side: Side, setup: &mut Setup) -> Result<Running, Error> {
        if let Some(rebind) = &self.rebind {
            rebind.hand_to(side)?;
        }
        Running::start(side, setup)
    }

    fn stop(&mut self, side: Side) -> Result<(), Error> {
        self.running[index(side)].take().map_or(Ok(()), |running| running.stop(side))
    }

    fn stop_all(&mut self) -> Result<(), Error> {
        let stopped = SIDES.map(|side| self.stop(side));
        let given_back = self.rebind.take().map_or(Ok(()), Rebind::give_back);
        stopped.into_iter().collect::<Result<(), Error>>().and(given_back)
    }
}

/// The last line of a log, to be added to a message; nothing if there is none.
fn last_line(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let last = text.lines().rev().map(str::trim).find(|line| !line.is_empty());
    last.map_or_else(String::new, |line| format!("; its log ends with: {line}"))
}

#[cfg(test)]
mod tests;
