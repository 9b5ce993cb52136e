//! Where the blocks of a namespace are: anonymous memory, or a file.

mod file;

use crate::config::NamespaceConfig;
use crate::data_pointer::transfer_error;
use crate::dma::{DmaView, SharedBytes};
use crate::error::Error;
use crate::status::Status;
use file::BlockFile;

/// The bytes of a namespace, sparse: blocks never written, or deallocated, read zero and cost nothing.
pub(crate) enum Backing {
    Memory(SharedBytes),
    File(BlockFile),
}

/// Checks the file of a namespace, without making or changing it.
pub(crate) fn check_file(config: &NamespaceConfig) -> Result<(), Error> {
    let Some(path) = &config.file else { return Ok(()) };
    let block = u64::from(config.block_bytes);
    let checked = file::check(path, config, config.bytes / block * block);
    checked.map_err(|source| Error::Backing { path: path.clone(), source })
}

/// Gives so much memory to `make`.
fn memory<T>(len: u64, make: impl FnOnce(usize) -> std::io::Result<T>) -> Result<T, Error> {
    let size = usize::try_from(len).map_err(|_| std::io::ErrorKind::OutOfMemory.into());
    size.and_then(make).map_err(|source| Error::Memory { what: "a namespace", bytes: len, source })
}

impl Backing {
    /// Opens or makes the backing of `len` bytes.
    pub(crate) fn open(config: &NamespaceConfig, len: u64) -> Result<Backing, Error> {
        match &config.file {
            None => memory(len, SharedBytes::anonymous).map(Backing::Memory),
            Some(path) => BlockFile::open(path, config, len).map(Backing::File),
        }
    }

    /// Copies blocks straight into host memory. Ranges of blocks lie inside, here and below.
    #[inline]
    pub(crate) fn copy_out(&self, view: &DmaView, iova: u64, len: usize, offset: usize) -> Result<(), Status> {
        match self {
            Backing::Memory(blocks) => view
                .data(iova, len, true, |bytes, at, done, piece| blocks.copy_to(offset + done, bytes, at, piece))
                .map_err(transfer_error),
            Backing::File(file) => file.copy_out(view, iova, len, offset),
        }
    }

    /// Copies host memory straight into blocks.
    #[inline]
    pub(crate) fn copy_in(&self, view: &DmaView, iova: u64, len: usize, offset: usize) -> Result<(), Status> {
        match self {
            Backing::Memory(blocks) => view
                .data(iova, len, false, |bytes, at, done, piece| bytes.copy_to(at, blocks, offset + done, piece))
                .map_err(transfer_error),
            Backing::File(file) => file.copy_in(view, iova, len, offset),
        }
    }

    /// Whether host memory equals blocks.
    pub(crate) fn equals(&self, view: &DmaView, iova: u64, len: usize, offset: usize) -> Result<bool, Status> {
        let blocks = match self {
            Backing::Memory(blocks) => blocks,
            Backing::File(file) => return file.equals(view, iova, len, offset),
        };
        let mut same = true;
        let walked = view.data(iova, len, false, |bytes, at, done, piece| {
            same &= bytes.equals(at, blocks, offset + done, piece)?;
            Some(())
        });
        walked.map(|()| same).map_err(transfer_error)
    }

    /// Copies blocks to memory of the controller's own.
    #[inline]
    pub(crate) fn copy_to(&self, offset: usize, into: &SharedBytes, at: usize, len: usize) -> Option<()> {
        match self {
            Backing::Memory(blocks) => blocks.copy_to(offset, into, at, len),
            Backing::File(file) => file.copy_to(offset, into, at, len),
        }
    }

    /// Copies memory of the controller's own to blocks.
    pub(crate) fn copy_from(&self, from: &SharedBytes, at: usize, offset: usize, len: usize) -> Option<()> {
        match self {
            Backing::Memory(blocks) => from.copy_to(at, blocks, offset, len),
            Backing::File(file) => file.copy_from(from, at, offset, len),
        }
    }

    /// Makes blocks in memory writable before they are written ([`SharedBytes::make_writable`]); a file needs nothing.
    #[inline]
    pub(crate) fn make_writable(&self, offset: usize, len: usize) {
        if let Backing::Memory(blocks) = self {
            blocks.make_writable(offset, len);
        }
    }

    /// Writes zeroes.
    pub(crate) fn zero(&self, offset: usize, len: usize) -> Result<(), Status> {
        match self {
            Backing::Memory(blocks) => blocks.zero(offset, len).ok_or(Status::INTERNAL_ERROR),
            Backing::File(file) => file.zero(offset, len),
        }
    }

    /// Makes the range read zero and gives its whole pages back.
    pub(crate) fn deallocate(&self, offset: usize, len: usize) -> Result<(), Status> {
        let blocks = match self {
            Backing::Memory(blocks) => blocks,
            Backing::File(file) => return file.deallocate(offset, len),
        };
        let (end, page) = (offset + len, 4096);
        let inner = offset.next_multiple_of(page).min(end);
        let last = (end / page * page).max(inner);
        let edges = blocks.zero(offset, inner - offset).and(blocks.zero(last, end - last));
        if edges.is_some() && blocks.forget_pages(inner, last - inner).is_ok() {
            return Ok(());
        }
        self.zero(offset, len)
    }

    /// Changes the size; new bytes read zero. A file never shrinks.
    pub(crate) fn resize(&mut self, len: u64) -> Result<(), Error> {
        match self {
            Backing::File(file) => file.resize(len),
            Backing::Memory(blocks) => memory(len, |size| blocks.resize(size)),
        }
    }

    /// Reads bytes, for tests.
    #[cfg(test)]
    pub(crate) fn read(&self, offset: usize, into: &mut [u8]) {
        let bytes = SharedBytes::anonymous(into.len().max(1)).unwrap();
        self.copy_to(offset, &bytes, 0, into.len()).unwrap();
        bytes.read(0, into).unwrap();
    }

    /// Writes bytes, for tests.
    #[cfg(test)]
    pub(crate) fn write(&self, offset: usize, from: &[u8]) {
        let bytes = SharedBytes::anonymous(from.len().max(1)).unwrap();
        bytes.write(0, from).unwrap();
        self.copy_from(&bytes, 0, offset, from.len()).unwrap();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(backing: &Backing, from: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        backing.read(from, &mut bytes);
        bytes
    }

    #[test]
    fn deallocated_ranges_read_zero_and_no_more() {
        let directory = tempfile::tempdir().unwrap();
        for file in [None, Some(directory.path().join("blocks"))] {
            let config = NamespaceConfig { file, ..Default::default() };
            let backing = Backing::open(&config, 1 << 20).unwrap();
            for (from, len) in [(0, 1 << 20), (512, 512), (4096, 4096), (3584, 9216), (512, 4096), (1 << 19, 0)] {
                backing.write(0, &vec![0xa5; 1 << 20]);
                backing.deallocate(from, len).unwrap();
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
        backing.write((4 << 40) - 3, b"end");
        assert_eq!(filled(&backing, (4 << 40) - 3, 3), b"end");
        backing.resize(5 << 40).unwrap();
        assert_eq!(filled(&backing, (4 << 40) - 3, 4), b"end\0");
        backing.resize(1 << 20).unwrap();
        let outside = SharedBytes::anonymous(1).unwrap();
        assert!(backing.copy_to(1 << 20, &outside, 0, 1).is_none());
    }

    #[test]
    fn a_file_is_kept_and_used_once() {
        let directory = tempfile::tempdir().unwrap();
        let config = NamespaceConfig { file: Some(directory.path().join("blocks")), ..Default::default() };
        let backing = Backing::open(&config, 1 << 20).unwrap();
        backing.write(5000, b"kept");
        let error = Backing::open(&config, 1 << 20).err().unwrap().to_string();
        assert!(error.contains("another controller"), "{error}");
        drop(backing);
        let backing = Backing::open(&config, 1 << 20).unwrap();
        assert_eq!(filled(&backing, 5000, 4), b"kept");
        let nowhere = NamespaceConfig { file: Some("/nonexistent/blocks".into()), ..Default::default() };
        assert!(Backing::open(&nowhere, 4096).is_err() && check_file(&nowhere).is_err());
    }

    #[test]
    fn a_file_that_is_there_and_has_another_size_is_refused_unless_that_is_meant() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("hosts");
        let config = |bytes, resize| NamespaceConfig { bytes, file: Some(path.clone()), resize, ..Default::default() };
        // Its check and its use have to mean the same.
        let open = |config: &NamespaceConfig| {
            let checked = check_file(config).map_err(|error| error.to_string());
            let opened = Backing::open(config, config.bytes >> 9 << 9).map_err(|error| error.to_string());
            assert_eq!(checked, opened.as_ref().map(drop).map_err(String::clone));
            opened
        };
        let text = b"127.0.0.1 localhost\n".repeat(100);
        std::fs::write(&path, &text).unwrap();
        for bytes in [1 << 20, 512, 1024] {
            let error = open(&config(bytes, false)).err().unwrap();
            assert!(error.contains("with 2000 bytes instead of") && error.contains("resize"), "{error}");
            assert_eq!(std::fs::read(&path).unwrap(), text, "it is left as it was");
        }
        // A size that is no number of whole blocks, as it may be given.
        for bytes in [2000, 1536] {
            assert_eq!(filled(&open(&config(bytes, false)).unwrap(), 0, 9), b"127.0.0.1");
        }
        // Of a longer file the beginning is used, a shorter one grows.
        open(&config(1024, true)).unwrap().write(0, b"one");
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 2000);
        open(&config(1 << 20, true)).unwrap().write((1 << 20) - 3, b"end");
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!((bytes.len(), &bytes[..4], &bytes[512..2000]), (1 << 20, &b"one."[..], &text[512..]));
        // One with nothing in it has no size yet.
        std::fs::write(&path, "").unwrap();
        open(&config(1 << 20, false)).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 1 << 20);
    }

    #[test]
    fn only_regular_files_are_used() {
        let directory = tempfile::tempdir().unwrap();
        for path in [directory.path(), std::path::Path::new("/dev/null"), std::path::Path::new("/dev/full")] {
            for resize in [false, true] {
                let config = NamespaceConfig { file: Some(path.into()), resize, ..Default::default() };
                let error = Backing::open(&config, 1 << 20).err().unwrap().to_string();
                assert!(error.contains("no regular file"), "{error}");
                assert!(check_file(&config).is_err());
            }
        }
    }

    /// What is not there any more is an error of the command that needs it.
    #[test]
    fn a_file_that_somebody_shortens_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("blocks");
        let config = NamespaceConfig { file: Some(path.clone()), ..Default::default() };
        let backing = Backing::open(&config, 1 << 20).unwrap();
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(4096).unwrap();
        let bytes = SharedBytes::anonymous(4096).unwrap();
        assert!(backing.copy_to(8192, &bytes, 0, 4096).is_none());
        assert!(backing.copy_to(0, &bytes, 0, 4096).is_some());
    }
}
