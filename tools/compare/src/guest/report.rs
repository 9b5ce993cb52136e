//! What the report says of the machine and the sides.

use super::side::Setup;
use super::storage::Storage;
use crate::{Accelerator, Environment, Error, Side, SideInfo, environment};

/// Where the comparison is made; the sides are told when they are known.
pub(super) fn environment(setup: &Setup) -> Environment {
    Environment {
        accelerator: setup.accelerator.accelerator,
        sides: Vec::new(),
        cpu: environment::cpu_model(),
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        kernel: environment::kernel(),
        placement: placement(setup),
    }
}

fn placement(setup: &Setup) -> String {
    let list = |cpus: &[usize]| cpus.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let all = list(&setup.cpus);
    match setup.worker_cpus() {
        [] => format!("both sides: the whole of QEMU and the target on the CPUs {all}, nothing pinned"),
        workers => format!(
            "both sides: a worker or an IOThread on each of the CPUs {}, the guest on {}, the rest of the target on {all}",
            list(workers),
            list(&setup.other_cpus()),
        ),
    }
}

/// What each side was and stood on.
pub(super) fn sides(setup: &Setup) -> Result<Vec<SideInfo>, Error> {
    let qemu = &setup.qemu.version;
    let queues =
        format!("{} of {} entries per disk", count(setup.queues.count as usize, "virtqueue"), setup.queues.size);
    let workers = setup.worker_cpus().len().max(1);
    let iothreads = setup.iothreads();
    let by = match setup.qemu.maps_queues {
        true => "iothread-vq-mapping",
        false => "iothread (this QEMU has no iothread-vq-mapping)",
    };
    let (ours, theirs) = setup.storage.words();
    let access = setup.access.ok_or_else(|| Error::Options("data-plane's disks were never opened".into()))?;
    Ok(vec![
        SideInfo {
            side: Side::VhostBlk,
            program: format!(
                "{}, {}; vhost-user-blk-pci of {qemu}, {queues}",
                environment::version(&setup.target),
                count(workers, "polled worker"),
            ),
            storage: ours,
        },
        SideInfo {
            side: Side::DataPlane,
            program: format!("virtio-blk-pci of {qemu}, {}, {by}, {queues}", count(iothreads as usize, "IOThread")),
            storage: format!("{theirs}, {}", access.words()),
        },
    ])
}

/// What a reader has to know.
pub(super) fn notes(setup: &Setup, left_out: &[String]) -> Result<Vec<String>, Error> {
    let (plan, vcpus) = (setup.plan, setup.options.vcpus(setup.plan));
    let mut notes = vec![setup.accelerator.note.clone()];
    notes.push(format!(
        "Both guests: {vcpus} CPUs, {} MiB, Linux {}, no I/O scheduler, {} with libaio and direct=1, one process for each queue.",
        setup.options.memory,
        setup.guest_kernel.as_deref().unwrap_or("of an unknown release"),
        fio_version(),
    ));
    notes.push(match &setup.storage {
        Storage::Memory { .. } => "Storage: memory on both sides, not a drive. Ours goes through a simulated NVMe controller, whose \
             threads in the target stand for a drive: their CPU time is told apart and not charged. Data-plane's copy from and to \
             memory is done by the kernel in its name, and is charged to it."
            .to_owned(),
        Storage::Drives { shared: true, .. } => "Storage: one drive, handed over by setup/setup.sh: the sides take turns by whole \
             rounds over all jobs."
            .to_owned(),
        Storage::Drives { .. } => "Storage: two drives. They should be of one model, and alike full.".to_owned(),
    });
    if setup.access.is_some_and(|access| !access.direct) {
        notes.push(
            "Data-plane's storage refused O_DIRECT: it goes through the page cache, which is not cache=none.".into(),
        );
    }
    notes.push(
        "Host CPU: the whole of QEMU, the guest's own CPUs included, and on our side the target. It is taken over the inner part of a \
         round, without fio's start and end."
            .into(),
    );
    if plan.jobs.iter().any(|job| job.rate.is_some()) {
        notes.push(
            "At a fixed rate requests come at random moments (Poisson); latency counts from a request's submission."
                .into(),
        );
    }
    notes.extend(setup.busy.clone());
    if !left_out.is_empty() {
        notes.push(format!("Left out, because there is one drive: {}.", left_out.join(", ")));
    }
    if setup.accelerator.accelerator == Accelerator::Kvm && setup.cpus.len() < 2 + vcpus as usize {
        notes.push(format!(
            "{} host CPUs for {vcpus} CPUs of a guest, a polled worker and a drive in software: they wait for each other.",
            setup.cpus.len()
        ));
    }
    Ok(notes)
}

fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

fn fio_version() -> String {
    environment::version("fio".as_ref())
}
