//! Where the blocks of a namespace are: anonymous memory, or a file.

use std::fs::{File, OpenOptions};
use std::path::PathBuf;

use vmm_sys_util::fallocate::{FallocateMode, fallocate};

use crate::config::NamespaceConfig;
use crate::dma::SharedBytes;
use crate::error::Error;

/// The bytes of a namespace, sparse: blocks never written, or deallocated, read zero and cost nothing.
pub(crate) struct Backing {
    bytes: SharedBytes,
    file: Option<(File, PathBuf)>,
}

impl Backing {
    /// Opens or makes the backing of `len` bytes. A file that is longer is left so, a shorter one grows.
    pub fn open(config: &NamespaceConfig, len: u64) -> Result<Backing, Error> {
        let memory = |source| Error::Memory { what: "a namespace", bytes: len, source };
        let size = usize::try_from(len).map_err(|_| memory(std::io::ErrorKind::OutOfMemory.into()))?;
        let Some(path) = &config.file else {
            return Ok(Backing { bytes: SharedBytes::anonymous(size).map_err(memory)?, file: None });
        };
        let failed = |source| Error::Backing { path: path.clone(), source };
        let options = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let file = options.map_err(failed)?;
        // Two controllers on one file would each believe it their own.
        match file.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => {
                return Err(failed(std::io::Error::new(
                    std::io::ErrorKind::ResourceBusy,
                    "another controller uses it",
                )));
            }
            Err(std::fs::TryLockError::Error(source)) => return Err(failed(source)),
        }
        if file.metadata().map_err(failed)?.len() < len {
            file.set_len(len).map_err(failed)?;
        }
        let bytes = SharedBytes::of_file(&file, 0, size, true).map_err(failed)?;
        Ok(Backing { bytes, file: Some((file, path.clone())) })
    }

    /// The blocks.
    #[inline]
    pub fn bytes(&self) -> &SharedBytes {
        &self.bytes
    }

    /// Makes the range read zero and gives its whole pages back. The range lies inside.
    pub fn deallocate(&self, offset: usize, len: usize) {
        let given_back = match &self.file {
            Some((file, _)) => fallocate(file, FallocateMode::PunchHole, true, offset as u64, len as u64).is_ok(),
            None => {
                let (end, page) = (offset + len, 4096);
                let inner = offset.next_multiple_of(page).min(end);
                let last = (end / page * page).max(inner);
                let edges = self.bytes.zero(offset, inner - offset).and(self.bytes.zero(last, end - last));
                edges.is_some() && self.bytes.forget_pages(inner, last - inner).is_ok()
            }
        };
        if !given_back {
            // The file system cannot punch holes: the blocks must read zero all the same.
            self.bytes.zero(offset, len);
        }
    }

    /// Changes the size; new bytes read zero. A file never shrinks.
    pub fn resize(&mut self, len: u64) -> Result<(), Error> {
        if let Some((file, path)) = &self.file {
            let failed = |source| Error::Backing { path: path.clone(), source };
            if file.metadata().map_err(failed)?.len() < len {
                file.set_len(len).map_err(failed)?;
            }
        }
        let memory = |source| Error::Memory { what: "a namespace", bytes: len, source };
        let size = usize::try_from(len).map_err(|_| memory(std::io::ErrorKind::OutOfMemory.into()))?;
        self.bytes.resize(size).map_err(memory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(backing: &Backing, from: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        backing.bytes().read(from, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn deallocated_ranges_read_zero_and_no_more() {
        let directory = tempfile::tempdir().unwrap();
        for file in [None, Some(directory.path().join("blocks"))] {
            let config = NamespaceConfig { file, ..Default::default() };
            let backing = Backing::open(&config, 1 << 20).unwrap();
            for (from, len) in [(0, 1 << 20), (512, 512), (4096, 4096), (3584, 9216), (512, 4096), (1 << 19, 0)] {
                backing.bytes().write(0, &vec![0xa5; 1 << 20]).unwrap();
                backing.deallocate(from, len);
                let bytes = filled(&backing, 0, 1 << 20);
                for (at, byte) in bytes.iter().enumerate() {
                    let want = if (from..from + len).contains(&at) { 0 } else { 0xa5 };
                    assert_eq!(*byte, want, "{from}+{len} at {at}");
                }
            }
        }
    }

    #[test]
    fn sizes_from_megabytes_to_terabytes() {
        let mut backing = Backing::open(&NamespaceConfig::default(), 4 << 40).unwrap();
        backing.bytes().write((4 << 40) - 3, b"end").unwrap();
        assert_eq!(filled(&backing, (4 << 40) - 3, 3), b"end");
        backing.resize(5 << 40).unwrap();
        assert_eq!(filled(&backing, (4 << 40) - 3, 4), b"end\0");
        backing.resize(1 << 20).unwrap();
        assert!(backing.bytes().read(1 << 20, &mut [0]).is_none());
    }

    #[test]
    fn a_file_is_kept_and_used_once() {
        let directory = tempfile::tempdir().unwrap();
        let config = NamespaceConfig { file: Some(directory.path().join("blocks")), ..Default::default() };
        let backing = Backing::open(&config, 1 << 20).unwrap();
        backing.bytes().write(5000, b"kept").unwrap();
        let error = Backing::open(&config, 1 << 20).err().unwrap().to_string();
        assert!(error.contains("another controller"), "{error}");
        drop(backing);
        let backing = Backing::open(&config, 2 << 20).unwrap();
        assert_eq!(filled(&backing, 5000, 4), b"kept");
        let nowhere = NamespaceConfig { file: Some("/nonexistent/blocks".into()), ..Default::default() };
        assert!(Backing::open(&nowhere, 4096).is_err());
    }
}
