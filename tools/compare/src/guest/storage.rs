//! What the disks of both sides are: memory, or a drive.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, open, statvfs};
use tempfile::TempDir;

use super::qemu::Queues;
use crate::job::size_words;
use crate::{Error, Plan};

/// Where files are memory.
const MEMORY: &str = "/dev/shm";

/// What the disks of one comparison are.
#[derive(Debug)]
pub(super) enum Storage {
    /// Files in memory, in a folder of their own: a simulated drive's and data-plane's.
    Memory {
        /// Holds the files, which go with it.
        folder: TempDir,
        /// Disks on each side.
        disks: u32,
        /// Bytes of each.
        bytes: u64,
    },
    /// Drives: what `vhost-blk` takes as `--device`, and the kernel's block device.
    Drives {
        /// A PCI function, or the socket of a controller.
        device: String,
        /// The block device.
        block_device: PathBuf,
        /// Both sides use one drive, which is handed from one side to the other.
        shared: bool,
    },
}

impl Storage {
    /// Chosen by the options; files in memory are made and filled.
    pub(super) fn new(plan: &Plan, disks: u32, rebind: bool) -> Result<Storage, Error> {
        match (&plan.device, &plan.kernel_device) {
            (None, None) => Storage::in_memory(disks, plan.disk_bytes),
            (Some(device), Some(block_device)) => {
                check_drives(plan, device, block_device, rebind)?;
                Ok(Storage::Drives { device: device.clone(), block_device: block_device.clone(), shared: rebind })
            }
            _ => Err(Error::Options(
                "give both --device (the drive through VFIO) and --kernel-device (the same drive, or one like it, through the \
                 kernel), or neither: anything else compares different storage"
                    .into(),
            )),
        }
    }

    fn in_memory(disks: u32, bytes: u64) -> Result<Storage, Error> {
        let wanted = 2 * u64::from(disks) * bytes;
        let room = room_in_memory()?;
        // The rest of the machine needs some too: the guests themselves, for one.
        if wanted > room / 4 * 3 {
            return Err(Error::Options(format!(
                "{disks} disks of {} on each side do not fit into the {} MiB of memory that are free for files in {MEMORY}: use a \
                 smaller --size or fewer --disks",
                size_words(bytes),
                room >> 20
            )));
        }
        let folder = tempfile::Builder::new().prefix(&format!("compare-{}-", std::process::id())).tempdir_in(MEMORY);
        let folder = folder.map_err(Error::system(format!("making a folder in {MEMORY}")))?;
        for disk in 0..disks {
            fill(&simulator_file(folder.path(), disk), bytes)?;
            fill(&data_plane_file(folder.path(), disk), bytes)?;
        }
        Ok(Storage::Memory { folder, disks, bytes })
    }

    /// Our target's configuration file, with its sockets in `folder`; and these.
    pub(super) fn target_config(&self, folder: &Path, queues: Queues, worker_cpus: &[usize]) -> (String, Vec<PathBuf>) {
        let mut text = String::new();
        if !worker_cpus.is_empty() {
            let list = worker_cpus.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
            text += &format!("cpus = \"{list}\"\n");
        }
        let (device, disks) = match self {
            Storage::Memory { folder, disks, bytes } => {
                let file = simulator_file(folder.path(), 0);
                let pairs = disks * queues.count;
                (format!("sim:{bytes},namespaces={disks},queues={pairs},file={}", file.display()), *disks)
            }
            Storage::Drives { device, .. } => (device.clone(), 1),
        };
        let mut sockets = Vec::new();
        for disk in 0..disks {
            let socket = folder.join(format!("disk{disk}.sock"));
            text += &format!(
                "[[export]]\ndevice = {device:?}\nsocket-path = {:?}\nqueues = {}\nqueue-size = {}\n",
                socket.display().to_string(),
                queues.count,
                queues.size,
            );
            if disks > 1 {
                text += &format!("namespace = {}\n", disk + 1);
            }
            sockets.push(socket);
        }
        (text, sockets)
    }

    /// The files or devices that data-plane's disks are.
    pub(super) fn data_plane_files(&self) -> Vec<PathBuf> {
        match self {
            Storage::Memory { folder, disks, .. } => {
                (0..*disks).map(|disk| data_plane_file(folder.path(), disk)).collect()
            }
            Storage::Drives { block_device, .. } => vec![block_device.clone()],
        }
    }

    /// The sides' storages in words, ours first.
    pub(super) fn words(&self) -> (String, String) {
        match self {
            Storage::Memory { disks, bytes, .. } => {
                let (size, files) = (size_words(*bytes), if *disks == 1 { "a file" } else { "files" });
                let simulator =
                    format!("simulated NVMe drive in the target (sim:), {disks} × {size}, over {files} in memory");
                (simulator, format!("{files} in memory ({MEMORY}), {disks} × {size}"))
            }
            Storage::Drives { device, block_device, shared } => {
                let same = if *shared { "the same drive" } else { "a drive of its own" };
                (device.clone(), format!("{} ({same}, through the kernel)", block_device.display()))
            }
        }
    }
}

/// The simulator names the file of namespace *n* > 1 `PATH.n`.
fn simulator_file(folder: &Path, disk: u32) -> PathBuf {
    match disk {
        0 => folder.join("drive.img"),
        _ => folder.join(format!("drive.img.{}", disk + 1)),
    }
}

fn data_plane_file(folder: &Path, disk: u32) -> PathBuf {
    folder.join(format!("disk{disk}.img"))
}

/// Bytes that may be written to files in memory.
fn room_in_memory() -> Result<u64, Error> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").map_err(Error::system("reading /proc/self/mounts"))?;
    // Device, place, kind: the last entry of a place is the one on top.
    let kind = mounts.lines().rev().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        (fields.next() == Some(MEMORY)).then(|| fields.next().unwrap_or_default().to_owned())
    });
    if kind.as_deref() != Some("tmpfs") {
        return Err(Error::Options(format!("{MEMORY} is no tmpfs here: there is no place for files in memory")));
    }
    let room = statvfs(MEMORY)
        .map_err(|error| Error::System { what: format!("looking at {MEMORY}"), source: error.into() })?;
    let text = std::fs::read_to_string("/proc/meminfo").map_err(Error::system("reading /proc/meminfo"))?;
    let available = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB"));
    let available = available.and_then(|kib| kib.trim().parse::<u64>().ok()).map_or(u64::MAX, |kib| kib << 10);
    Ok((room.f_bavail * room.f_frsize).min(available))
}

/// Makes a file of `bytes` without holes: reading a hole would cost less than reading a disk.
fn fill(path: &Path, bytes: u64) -> Result<(), Error> {
    let failed = || Error::system(format!("filling {}", path.display()));
    let mut block = vec![0; 1 << 20];
    // Anything but zeroes will do.
    fastrand::Rng::with_seed(0).fill(&mut block);
    let mut file = File::create_new(path).map_err(failed())?;
    let mut left = bytes;
    while left > 0 {
        let count = left.min(block.len() as u64);
        file.write_all(&block[..count as usize]).map_err(failed())?;
        left -= count;
    }
    Ok(())
}

/// Default deny: nothing on a drive is put at risk that the user has not given away.
fn check_drives(plan: &Plan, device: &str, block_device: &Path, rebind: bool) -> Result<(), Error> {
    let writes = plan.jobs.iter().any(|job| job.pattern.writes());
    if writes && !plan.overwrite {
        let found = "a drive".to_owned();
        return Err(Error::NotEmpty { path: block_device.to_path_buf(), found });
    }
    if let Err(rustix::io::Errno::BUSY) = open(block_device, OFlags::RDONLY | OFlags::EXCL, Mode::empty()) {
        let path = block_device.display();
        return Err(Error::Options(format!("{path} is in use (mounted, or part of something): it is not touched")));
    }
    if rebind {
        return Ok(());
    }
    if !block_device.exists() {
        return Err(Error::Options(format!(
            "{} is not there: a drive is either the kernel's or bound to VFIO. With --rebind, setup/setup.sh hands {device} from one \
             to the other between the rounds",
            block_device.display()
        )));
    }
    let driver = std::fs::read_link(format!("/sys/bus/pci/devices/{device}/driver"));
    let driver = driver.ok().and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
    match driver.as_deref() {
        // Not a PCI function (a controller's socket), or ready.
        None | Some("vfio-pci") => Ok(()),
        Some(other) => Err(Error::Options(format!(
            "{device} is bound to {other}, not to vfio-pci: bind it (setup/setup.sh bind {device}), or let --rebind hand the one drive \
             from the kernel to VFIO and back between the rounds"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::{Job, Pattern};
    use std::sync::Arc;

    fn plan(device: Option<&str>, kernel_device: Option<&str>) -> Plan {
        Plan {
            jobs: vec![Job::new(Pattern::RandomWrite, 4096, 1, None, 1)],
            repeat: 1,
            round: std::time::Duration::from_secs(1),
            queues: 2,
            cpus: None,
            disk_bytes: 1 << 20,
            device: device.map(str::to_owned),
            kernel_device: kernel_device.map(PathBuf::from),
            overwrite: false,
            vhost_blk: None,
            aio: None,
            stop: Arc::default(),
        }
    }

    #[test]
    fn files_in_memory_are_full_and_go_away() {
        let plan = plan(None, None);
        let storage = Storage::new(&plan, 2, false).unwrap();
        let files = storage.data_plane_files();
        assert_eq!(files.len(), 2);
        let content = std::fs::read(&files[1]).unwrap();
        assert_eq!(content.len(), 1 << 20);
        assert!(content.chunks(4096).all(|block| block.iter().any(|&byte| byte != 0)), "a block of zeroes");
        let (config, sockets) = storage.target_config(Path::new("/run/x"), Queues::new(2, 1), &[2, 3]);
        assert_eq!(sockets, ["/run/x/disk0.sock", "/run/x/disk1.sock"].map(PathBuf::from));
        assert!(
            config
                .starts_with("cpus = \"2,3\"\n[[export]]\ndevice = \"sim:1048576,namespaces=2,queues=4,file=/dev/shm/")
        );
        assert!(config.contains("namespace = 2\n"), "{config}");
        let Storage::Memory { folder, .. } = &storage else { panic!("not in memory") };
        // These are the names that the simulator opens.
        for name in ["drive.img", "drive.img.2"] {
            assert_eq!(std::fs::metadata(folder.path().join(name)).unwrap().len(), 1 << 20);
        }
        drop(storage);
        assert!(!files[0].exists());
    }

    #[test]
    fn what_does_not_fit_into_memory_is_refused() {
        let error = Storage::in_memory(64, 1 << 50).unwrap_err().to_string();
        assert!(error.contains("--size"), "{error}");
    }

    #[test]
    fn drives_are_not_written_to_unless_the_user_says_so() {
        let error = |plan: &Plan, rebind| Storage::new(plan, 1, rebind).unwrap_err().to_string();
        let mut plan = plan(Some("0000:01:00.0"), Some("/dev/nvme-not-there"));
        for rebind in [false, true] {
            assert!(error(&plan, rebind).contains("--overwrite"), "{}", error(&plan, rebind));
        }
        plan.overwrite = true;
        assert!(error(&plan, false).contains("--rebind"));
        let storage = Storage::new(&plan, 1, true).unwrap();
        assert_eq!(storage.data_plane_files(), [PathBuf::from("/dev/nvme-not-there")]);
        let (config, _) = storage.target_config(Path::new("/x"), Queues::new(2, 1), &[]);
        assert_eq!(
            config,
            "[[export]]\ndevice = \"0000:01:00.0\"\nsocket-path = \"/x/disk0.sock\"\nqueues = 2\nqueue-size = 256\n"
        );
        plan.device = None;
        assert!(error(&plan, false).contains("both"));
        plan.device = Some("0000:01:00.0".into());
        plan.overwrite = false;
        plan.jobs = vec![Job::new(Pattern::RandomRead, 4096, 1, None, 1)];
        assert!(Storage::new(&plan, 1, true).is_ok(), "reading destroys nothing");
    }
}
