//! The storage below both sides, and what keeps it from being destroyed by mistake.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{OFlags, statvfs};

use crate::job::size_words;
use crate::{Error, Plan};

/// Where files in memory are.
const MEMORY: &str = "/dev/shm";
/// How much of the beginning and the end of a disk has to be zeroes for it to count as empty: partition tables, file
/// systems and RAID members all have their signatures there.
const LOOKED_AT: u64 = 1 << 20;

/// A folder for files in memory with room for `bytes`, removed when dropped.
pub(super) fn memory_folder(bytes: u64) -> Result<tempfile::TempDir, Error> {
    let stat = statvfs(MEMORY)
        .map_err(|error| Error::System { what: format!("looking at {MEMORY}"), source: error.into() })?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    if free < bytes {
        let message = format!(
            "{MEMORY} has {} MiB free and the disks need {} MiB; use a smaller --size or fewer --disks",
            free >> 20,
            bytes >> 20
        );
        return Err(Error::Options(message));
    }
    let folder = tempfile::Builder::new().prefix("compare-").tempdir_in(MEMORY);
    folder.map_err(Error::system(format!("making a folder in {MEMORY}")))
}

/// Whether files in `folder` can be opened past the page cache (O_DIRECT), which a tmpfs takes since Linux 6.6.
pub(super) fn takes_direct(folder: &Path) -> bool {
    let path = folder.join("direct");
    let flags = i32::try_from(OFlags::DIRECT.bits()).expect("a flag of open(2) is an int");
    File::options().create(true).truncate(true).write(true).custom_flags(flags).open(path).is_ok()
}

/// Fails unless the user's own disks may be used as the plan wants to use them.
pub(super) fn check_devices(plan: &Plan) -> Result<(), Error> {
    let writes = plan.jobs.iter().any(|job| job.pattern.writes());
    if let Some(device) = &plan.device
        && writes
        && !plan.overwrite
    {
        let found = "what is on a drive that is not the kernel's cannot be seen from here".into();
        return Err(Error::NotEmpty { path: device.into(), found });
    }
    if let Some(path) = &plan.kernel_device {
        let size = check_disk(path)?;
        if writes && !plan.overwrite {
            check_empty(path, size)?;
        }
    }
    for job in &plan.jobs {
        if (plan.device.is_some() || plan.kernel_device.is_some()) && job.disks > 1 {
            let message = format!("{} loads {} disks, and one was given; add --disks 1", job.name, job.disks);
            return Err(Error::Options(message));
        }
    }
    Ok(())
}

/// What the storage of data-plane is, in words.
pub(super) fn disk_words(path: &Path) -> String {
    let size = check_disk(path).map_or_else(|_| "size unknown".to_owned(), |size| format!("{} MiB", size >> 20));
    format!("{} ({size})", path.display())
}

/// What a disk in memory is, in words.
pub(super) fn memory_words(disks: u32, bytes: u64) -> String {
    match disks {
        1 => format!("1 disk of {}", size_words(bytes)),
        _ => format!("{disks} disks of {}", size_words(bytes)),
    }
}

/// True if it is a block device, otherwise it is a file.
pub(super) fn is_block_device(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.file_type().is_block_device())
}

/// Fails unless `path` is a disk, or a file, that nobody uses; its size.
fn check_disk(path: &Path) -> Result<u64, Error> {
    let metadata = path.metadata().map_err(Error::system(format!("looking at {}", path.display())))?;
    let kind = metadata.file_type();
    if !kind.is_block_device() && !kind.is_file() {
        return Err(Error::Options(format!("{} is neither a block device nor a file", path.display())));
    }
    // Exclusively, which a block device refuses as long as it is mounted, swapped to, or part of another device.
    let exclusive = if kind.is_block_device() { OFlags::EXCL } else { OFlags::empty() };
    let flags = i32::try_from(exclusive.bits()).expect("a flag of open(2) is an int");
    let opened = File::options().read(true).custom_flags(flags).open(path);
    let mut file = opened.map_err(|source| match source.kind() {
        io::ErrorKind::ResourceBusy => Error::Options(format!(
            "{} is in use: mounted, swap, or part of another device; use a disk that is not (--overwrite does not change this)",
            path.display()
        )),
        _ => Error::System { what: format!("opening {}", path.display()), source },
    })?;
    file.seek(SeekFrom::End(0)).map_err(Error::system(format!("asking {} for its size", path.display())))
}

/// Fails if there is anything at the beginning or the end of `path`.
fn check_empty(path: &Path, size: u64) -> Result<(), Error> {
    let failed = || Error::system(format!("reading {}", path.display()));
    let mut file = File::open(path).map_err(failed())?;
    for start in [0, size.saturating_sub(LOOKED_AT)] {
        let mut data = Vec::new();
        file.seek(SeekFrom::Start(start)).map_err(failed())?;
        (&mut file).take(LOOKED_AT).read_to_end(&mut data).map_err(failed())?;
        if let Some(at) = data.iter().position(|&byte| byte != 0) {
            let found = format!("there is data on it, at byte {}", start + at as u64);
            return Err(Error::NotEmpty { path: PathBuf::from(path), found });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::job::default_jobs;

    fn disk() -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8 << 20).unwrap();
        file
    }

    fn plan(path: &Path, overwrite: bool) -> Plan {
        Plan {
            jobs: default_jobs(1),
            repeat: 1,
            round: std::time::Duration::from_secs(1),
            queues: 1,
            cpus: None,
            disk_bytes: 1 << 20,
            device: None,
            kernel_device: Some(path.into()),
            overwrite,
            vhost_blk: None,
            aio: None,
            stop: Arc::new(AtomicBool::new(false)),
        }
    }

    #[test]
    fn a_disk_that_holds_something_is_not_overwritten() {
        let file = disk();
        check_devices(&plan(file.path(), false)).unwrap();
        for at in [510, (8 << 20) - 1] {
            file.as_file().write_at(&[0x55], at).unwrap();
            let error = check_devices(&plan(file.path(), false)).unwrap_err().to_string();
            let expected = format!(
                "{}: there is data on it, at byte {at}; the jobs write all over it: add --overwrite if what it holds may be lost",
                file.path().display()
            );
            assert_eq!(error, expected);
            check_devices(&plan(file.path(), true)).unwrap();
            let mut reads = plan(file.path(), false);
            reads.jobs.retain(|job| !job.pattern.writes());
            check_devices(&reads).unwrap();
            file.as_file().write_at(&[0], at).unwrap();
        }
    }

    #[test]
    fn a_drive_that_cannot_be_looked_at_is_not_overwritten() {
        let mut plan = plan(Path::new("/unused"), false);
        (plan.kernel_device, plan.device) = (None, Some("0000:01:00.0".into()));
        let error = check_devices(&plan).unwrap_err().to_string();
        assert!(error.starts_with("0000:01:00.0: ") && error.contains("--overwrite"), "{error}");
        plan.overwrite = true;
        check_devices(&plan).unwrap();
        plan.jobs = default_jobs(2);
        assert!(check_devices(&plan).unwrap_err().to_string().contains("add --disks 1"));
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        let error = |path: &str| check_devices(&plan(Path::new(path), true)).unwrap_err().to_string();
        assert!(error("/dev/null").ends_with("is neither a block device nor a file"));
        assert!(error("/no/such/disk").starts_with("looking at /no/such/disk: "));
    }

    #[test]
    fn memory_that_is_not_there_is_refused() {
        let error = memory_folder(u64::MAX).unwrap_err().to_string();
        assert!(error.contains("smaller --size"), "{error}");
        assert!(memory_folder(1).unwrap().path().starts_with(MEMORY));
    }
}
