//! One side of the comparison while it is up: a guest, and on ours the target below it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use e2e::{Guest, Initramfs, Kernel, Machine};
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_setaffinity};
use serde_json::json;
use tempfile::TempDir;

use super::accelerator::Choice;
use super::cpu::{Clocks, Recorder};
use super::qemu::{Access, DataPlaneDisk, Qemu, Queues, iothread_arguments};
use super::storage::Storage;
use super::{GuestOptions, fio, last_line};
use crate::process::{Process, on_cpus};
use crate::{Error, Job, Plan, Sample, Side};

/// Until the target listens.
const TARGET_LIMIT: Duration = Duration::from_secs(30);
/// A boot takes seconds; minutes where an emulated CPU emulates another one.
const BOOT_LIMIT: Duration = Duration::from_secs(300);
/// For what takes a guest a moment, even an emulated one on a busy host.
const SHORT: Duration = Duration::from_secs(60);
/// What a job may take beyond its own length: starting fio, and one request that takes long.
const JOB_SLACK: Duration = Duration::from_secs(120);

/// What both sides are made of.
pub(super) struct Setup<'a> {
    /// The options of both ways.
    pub plan: &'a Plan,
    /// The options of this one.
    pub options: &'a GuestOptions,
    /// The virtual machine monitor.
    pub qemu: Qemu,
    /// The queues of every disk.
    pub queues: Queues,
    /// The host's CPUs that both sides may use.
    pub cpus: Vec<usize>,
    /// How data-plane's disks are opened; known once they could be looked at.
    pub access: Option<Access>,
    /// The guests' kernel.
    pub kernel: Kernel,
    /// What runs their CPUs.
    pub accelerator: Choice,
    /// What their disks are.
    pub storage: Storage,
    /// Our target's program.
    pub target: PathBuf,
    /// What the report says if the machine was busy at the start.
    pub busy: Option<String>,
    /// The release of the guests' kernel; known once a guest has told.
    pub guest_kernel: Option<String>,
}

impl Setup<'_> {
    /// How many IOThreads data-plane has: as many as our target has workers, unless the user says otherwise.
    pub(super) fn iothreads(&self) -> u32 {
        self.options.iothreads.unwrap_or_else(|| self.worker_cpus().len().max(1) as u32)
    }

    /// CPUs of the workers and IOThreads; none: wherever the system puts them.
    pub(super) fn worker_cpus(&self) -> &[usize] {
        self.options.worker_cpus.as_ref().map_or(&[], |list| &list.0)
    }

    /// CPUs of everything else.
    pub(super) fn other_cpus(&self) -> Vec<usize> {
        let workers = self.worker_cpus();
        let others: Vec<usize> = self.cpus.iter().copied().filter(|cpu| !workers.contains(cpu)).collect();
        if others.is_empty() { self.cpus.clone() } else { others }
    }

    fn disks(&self) -> u32 {
        self.storage.data_plane_files().len() as u32
    }

    fn machine(&self) -> Machine {
        let initramfs = Initramfs::small(&self.kernel).program("fio");
        Machine::new(&self.kernel, &initramfs)
            .accelerator(self.accelerator.for_machine())
            .boot_limit(BOOT_LIMIT)
            .memory_mib(self.options.memory)
            .cpus(self.options.vcpus(self.plan))
    }

    /// How data-plane's disks are opened: found out once.
    pub(super) fn access(&mut self) -> Result<Access, Error> {
        if let Some(access) = self.access {
            return Ok(access);
        }
        let file = self.storage.data_plane_files().swap_remove(0);
        let access = self.qemu.access(&file, self.plan.aio)?;
        self.access = Some(access);
        Ok(access)
    }
}

/// A side that is up.
pub(super) struct Running {
    // Dropped in this order: the guest first, its disks after it.
    guest: Guest,
    target: Option<Process>,
    clocks: Clocks,
    disk_bytes: u64,
    queues: u32,
    vcpus: u32,
    folder: TempDir,
}

impl Running {
    /// Starts the target if the side has one, boots the guest and makes its disks ready for fio.
    pub(super) fn start(side: Side, setup: &mut Setup) -> Result<Running, Error> {
        let folder = tempfile::Builder::new().prefix("compare-").tempdir();
        let folder = folder.map_err(Error::system("making a folder for a guest's files"))?;
        match side {
            Side::VhostBlk => {
                let (target, sockets) = start_target(setup, folder.path())?;
                let properties = setup.queues.properties();
                let machine = sockets.iter().fold(setup.machine(), |machine, socket| machine.disk(socket, &properties));
                Running::boot(side, setup, &machine, Some(target), folder)
            }
            Side::DataPlane | Side::DataPlaneNull => {
                let access = setup.access()?;
                let arguments = data_plane_arguments(setup, access);
                let arguments = arguments.iter().map(String::as_str).collect::<Vec<_>>();
                let machine = setup.machine().arguments(&arguments);
                let mut running = Running::boot(side, setup, &machine, None, folder)?;
                running.pin_iothreads(side, setup.worker_cpus())?;
                Ok(running)
            }
        }
    }

    fn boot(
        side: Side,
        setup: &mut Setup,
        machine: &Machine,
        target: Option<Process>,
        folder: TempDir,
    ) -> Result<Running, Error> {
        let trouble = |source| Error::Guest {
            what: format!("the guest on {side}"),
            source,
            hint: last_line(&folder.path().join("qemu.log")),
        };
        let mut guest = on_cpus(&setup.other_cpus(), || machine.boot(folder.path()))?.map_err(trouble)?;
        let text = guest.run(&ready_script(setup.disks()), SHORT).map_err(trouble)?;
        let (kernel, disks) = text.split_once('\n').unwrap_or((&text, ""));
        setup.guest_kernel = Some(kernel.to_owned());
        let disk_bytes = check_disks(disks, setup.queues.count)?;
        let processes = [Some(guest.process().id()), target.as_ref().map(Process::id)];
        let clocks = Clocks::of(&processes.into_iter().flatten().collect::<Vec<_>>());
        let (queues, vcpus) = (setup.queues.count, setup.options.vcpus(setup.plan));
        Ok(Running { guest, target, clocks, disk_bytes, queues, vcpus, folder })
    }

    /// Gives each IOThread one of `cpus`, as our target does with its workers.
    fn pin_iothreads(&mut self, side: Side, cpus: &[usize]) -> Result<(), Error> {
        if cpus.is_empty() {
            return Ok(());
        }
        let trouble = |source| Error::Guest { what: format!("the IOThreads of {side}"), source, hint: String::new() };
        let mut monitor = self.guest.monitor().map_err(trouble)?;
        let answer = monitor.execute("query-iothreads", json!({})).map_err(trouble)?;
        let threads = answer.as_array().cloned().unwrap_or_default();
        let numbers = threads.iter().filter_map(|thread| Pid::from_raw(thread["thread-id"].as_i64()? as i32));
        for (thread, &cpu) in numbers.zip(cpus.iter().cycle()) {
            let mut set = CpuSet::new();
            set.set(cpu);
            sched_setaffinity(Some(thread), &set).map_err(|error| Error::System {
                what: format!("giving an IOThread CPU {cpu}"),
                source: error.into(),
            })?;
        }
        Ok(())
    }

    /// Runs a job. An error means that this round has failed, and that the side should be started anew.
    pub(super) fn measure(&mut self, job: &Job, plan: &Plan) -> Result<Sample, String> {
        let seconds = plan.round.as_secs_f64();
        let ramp = fio::RAMP_SECONDS.min(seconds);
        let Running { queues, vcpus, disk_bytes, .. } = *self;
        let load = fio::Load { job, queues, vcpus, disk_bytes, seconds, ramp };
        let limit = Duration::from_secs_f64(seconds + ramp) + JOB_SLACK;
        let recorder = Recorder::start(&self.clocks);
        let output = self.guest.try_run(&fio::script(&load.arguments()), limit);
        // The recorder has to end before anything else may return.
        let charges = recorder.finish(seconds, ramp);
        let output = output.map_err(|error| self.explain(&error.to_string()))?;
        if output.status != 0 {
            return Err(self.explain(&format!("fio ended with status {}: {}", output.status, output.text.trim())));
        }
        self.guest.check_kernel_log().map_err(|error| self.explain(&error.to_string()))?;
        let charges = charges.map_err(|error| error.to_string())?;
        let mut sample = fio::parse(&output.text, job)?;
        // fio's own time is longer by the last requests; the CPU time is of the same stretch.
        let scale = sample.seconds / seconds;
        sample.cpu_seconds = charges.side * scale;
        sample.drive_cpu_seconds = self.clocks.have_drive().then_some(charges.drive * scale);
        Ok(sample)
    }

    fn explain(&self, reason: &str) -> String {
        let target =
            if self.target.is_some() { last_line(&self.folder.path().join("target.log")) } else { String::new() };
        format!("{reason}{}{target}", last_line(&self.folder.path().join("qemu.log")))
    }

    /// Powers the guest off and ends the target.
    pub(super) fn stop(self, side: Side) -> Result<(), Error> {
        let trouble = |source| Error::Guest { what: format!("the guest on {side}"), source, hint: String::new() };
        self.guest.power_off(SHORT).map_err(trouble)?;
        let Some(target) = self.target else { return Ok(()) };
        let status = target.stop()?;
        if status.success() {
            return Ok(());
        }
        let reason = last_line(&self.folder.path().join("target.log"));
        Err(Error::Ended { program: "vhost-blk".into(), status, reason: reason.trim().to_owned() })
    }
}

fn start_target(setup: &Setup, folder: &Path) -> Result<(Process, Vec<PathBuf>), Error> {
    let (config, sockets) = setup.storage.target_config(folder, setup.queues, setup.worker_cpus());
    let file = folder.join("vhost-blk.toml");
    std::fs::write(&file, config).map_err(Error::system(format!("writing {}", file.display())))?;
    let arguments = [Path::new("--config"), &file];
    // The workers go to their own CPUs by themselves.
    let mut target = Process::start("vhost-blk", &setup.target, arguments, &setup.cpus, &folder.join("target.log"))?;
    target.wait_until("listening", TARGET_LIMIT, || e2e::are_listening(&sockets).unwrap_or(false))?;
    Ok((target, sockets))
}

/// QEMU's arguments for all disks of data-plane.
fn data_plane_arguments(setup: &Setup, access: Access) -> Vec<String> {
    let iothreads = setup.iothreads();
    let mut arguments = iothread_arguments(iothreads);
    for (number, file) in setup.storage.data_plane_files().iter().enumerate() {
        let disk = DataPlaneDisk { number: number as u32, file, access };
        arguments.extend(disk.arguments(setup.queues, iothreads, setup.qemu.maps_queues));
    }
    arguments
}

/// Prints the kernel's release, then the size and the number of queues of each disk. No side gets an I/O scheduler: the kernel would choose one by the
/// number of queues.
fn ready_script(disks: u32) -> String {
    let names: Vec<String> = (0..disks as usize).map(|disk| fio::disk_path(disk).replace("/dev/", "")).collect();
    format!(
        "set -e\nuname -r\nfor disk in {}; do\n  echo none >/sys/block/$disk/queue/scheduler\n  \
         echo \"$(cat /sys/block/$disk/size) $(ls -1 /sys/block/$disk/mq | wc -l)\"\ndone",
        names.join(" ")
    )
}

/// Checks that both sides' guests get what was asked for, and returns the size of a disk.
fn check_disks(text: &str, queues: u32) -> Result<u64, Error> {
    let queues = u64::from(queues);
    let mut size = None;
    for line in text.lines() {
        let mut numbers = line.split_whitespace().map(|word| word.parse::<u64>().unwrap_or(0));
        // The kernel counts in units of 512 bytes, whatever the block size.
        let (bytes, found) = (numbers.next().unwrap_or(0) * 512, numbers.next().unwrap_or(0));
        if bytes == 0 || found != queues {
            return Err(Error::Options(format!(
                "a disk of the guest has {bytes} bytes and {found} queues, not {queues}"
            )));
        }
        size = Some(size.map_or(bytes, |other: u64| other.min(bytes)));
    }
    size.ok_or_else(|| Error::Options("the guest has no disk".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_have_a_size_and_as_many_queues_as_wanted() {
        assert_eq!(check_disks("2048 2\n4096 2\n", 2).unwrap(), 1 << 20);
        for wrong in ["2048 1", "0 2", "", "x y", "2048 2\n2048 4"] {
            assert!(check_disks(wrong, 2).is_err(), "{wrong:?}");
        }
    }
}
