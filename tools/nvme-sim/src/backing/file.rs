//! Blocks in a file. They are read and written by calls, not through a mapping: what a file system cannot do, because it is full
//! or the file was shortened, is then an error of one command, and no signal that ends the program.

use std::cell::Cell;
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vmm_sys_util::fallocate::{FallocateMode, fallocate};

use crate::config::NamespaceConfig;
use crate::data_pointer::transfer_error;
use crate::dma::{DmaView, SharedBytes};
use crate::error::Error;
use crate::status::Status;

/// How often failures are told.
const TELL_INTERVAL: Duration = Duration::from_secs(10);

/// What is written at once where zeroes are wanted.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

pub(crate) struct BlockFile {
    file: File,
    path: PathBuf,
    told: Cell<Option<Instant>>,
}

/// Checks what can be checked of a file that is there: its kind, its size, and that it may be read and written. It is not locked
/// and not changed.
pub(super) fn check(path: &Path, config: &NamespaceConfig, len: u64) -> io::Result<()> {
    match std::fs::metadata(path) {
        Ok(_) => fits(&open(path, false)?, config, len).map(drop),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
            std::fs::metadata(folder).map(drop)
        }
        Err(error) => Err(error),
    }
}

fn open(path: &Path, create: bool) -> io::Result<File> {
    let is_regular = |metadata: std::fs::Metadata| match metadata.is_file() {
        true => Ok(()),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file")),
    };
    // Opening a device may do anything; looking does not.
    if let Ok(metadata) = std::fs::metadata(path) {
        is_regular(metadata)?;
    }
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true).create(create).truncate(false).custom_flags(libc::O_NONBLOCK);
    let file = options.open(path)?;
    is_regular(file.metadata()?)?;
    Ok(file)
}

/// Whether a file can hold `len` bytes of blocks; and whether it has to grow for it.
fn fits(file: &File, config: &NamespaceConfig, len: u64) -> io::Result<bool> {
    let (there, block) = (file.metadata()?.len(), u64::from(config.block_bytes));
    // It may end with a part of a block, as the size that was given may.
    if there == 0 || there / block == len / block || config.resize {
        return Ok(there < len);
    }
    let why = format!(
        "it is there, with {there} bytes instead of {len}: if it is the right one give the size that it has, or resize beside \
         it; else another file"
    );
    Err(io::Error::new(io::ErrorKind::InvalidInput, why))
}

impl BlockFile {
    /// Opens or makes the file.
    pub(crate) fn open(path: &Path, config: &NamespaceConfig, len: u64) -> Result<BlockFile, Error> {
        let open = || {
            let file = open(path, true)?;
            // Two controllers on one file would each believe it their own.
            file.try_lock().map_err(|error| match error {
                TryLockError::WouldBlock => io::Error::new(io::ErrorKind::ResourceBusy, "another controller uses it"),
                TryLockError::Error(source) => source,
            })?;
            if fits(&file, config, len)? {
                file.set_len(len)?;
            }
            Ok(file)
        };
        let file = open().map_err(|source| Error::Backing { path: path.to_owned(), source })?;
        Ok(BlockFile { file, path: path.to_owned(), told: Cell::new(None) })
    }

    /// The file never shrinks.
    pub(crate) fn resize(&mut self, len: u64) -> Result<(), Error> {
        let grow = || if self.file.metadata()?.len() < len { self.file.set_len(len) } else { Ok(()) };
        grow().map_err(|source| Error::Backing { path: self.path.clone(), source })
    }

    /// From the blocks to host memory.
    pub(crate) fn copy_out(&self, view: &DmaView, iova: u64, len: usize, offset: usize) -> Result<(), Status> {
        let mut failed = None;
        let walked = view.data(iova, len, true, |bytes, at, done, piece| {
            let result = bytes.fill_from(at, &self.file, (offset + done) as u64, piece);
            result.map_err(|error| failed = Some(error)).ok()
        });
        failed.map_or_else(|| walked.map_err(transfer_error), |error| Err(self.cannot_read(&error)))
    }

    /// From host memory to the blocks.
    pub(crate) fn copy_in(&self, view: &DmaView, iova: u64, len: usize, offset: usize) -> Result<(), Status> {
        let mut failed = None;
        let walked = view.data(iova, len, false, |bytes, at, done, piece| {
            let result = bytes.write_to(at, &self.file, (offset + done) as u64, piece);
            result.map_err(|error| failed = Some(error)).ok()
        });
        failed.map_or_else(|| walked.map_err(transfer_error), |error| Err(self.cannot_write(&error)))
    }

    pub(crate) fn equals(&self, view: &DmaView, iova: u64, len: usize, offset: usize) -> Result<bool, Status> {
        let (mut blocks, mut theirs) = (vec![0; len], vec![0; len]);
        self.file.read_exact_at(&mut blocks, offset as u64).map_err(|error| self.cannot_read(&error))?;
        view.read(iova, &mut theirs).map_err(transfer_error)?;
        Ok(blocks == theirs)
    }

    /// To memory of the controller's own.
    pub(crate) fn copy_to(&self, offset: usize, into: &SharedBytes, at: usize, len: usize) -> Option<()> {
        into.fill_from(at, &self.file, offset as u64, len).map_err(|error| self.cannot_read(&error)).ok()
    }

    /// From memory of the controller's own.
    pub(crate) fn copy_from(&self, from: &SharedBytes, at: usize, offset: usize, len: usize) -> Option<()> {
        from.write_to(at, &self.file, offset as u64, len).map_err(|error| self.cannot_write(&error)).ok()
    }

    pub(crate) fn zero(&self, offset: usize, len: usize) -> Result<(), Status> {
        let mut done = 0;
        while done < len {
            let piece = (len - done).min(ZEROES.len());
            let result = self.file.write_all_at(&ZEROES[..piece], (offset + done) as u64);
            result.map_err(|error| self.cannot_write(&error))?;
            done += piece;
        }
        Ok(())
    }

    /// Makes the range read zero and gives its space back, if the file system can.
    pub(crate) fn deallocate(&self, offset: usize, len: usize) -> Result<(), Status> {
        if len == 0 || fallocate(&self.file, FallocateMode::PunchHole, true, offset as u64, len as u64).is_ok() {
            return Ok(());
        }
        self.zero(offset, len)
    }

    fn cannot_read(&self, error: &io::Error) -> Status {
        self.tell("read", error);
        Status::UNRECOVERED_READ_ERROR
    }

    fn cannot_write(&self, error: &io::Error) -> Status {
        self.tell("write", error);
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Status::CAPACITY_EXCEEDED,
            _ => Status::WRITE_FAULT,
        }
    }

    /// A host may try again and again.
    fn tell(&self, what: &str, error: &io::Error) {
        if self.told.get().is_none_or(|told| told.elapsed() >= TELL_INTERVAL) {
            self.told.set(Some(Instant::now()));
            log::error!("cannot {what} {}: {error}; commands for it fail until it can", self.path.display());
        }
    }
}
