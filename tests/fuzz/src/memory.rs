//! A guest's memory, seen from the guest.

use std::cell::Cell;
use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

/// What lies in the last bytes of the last page of memory whose last bytes are not the guest's.
const CANARY: [u8; 8] = *b"canary!!";

/// A file of `bytes` bytes of memory.
pub(crate) fn file(bytes: u64) -> File {
    let file = memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a memory file can be made");
    ftruncate(&file, bytes).expect("a memory file can grow");
    File::from(file)
}

/// A region of a guest's memory that may end before its last page does: what is behind its end must never change.
pub(crate) struct Region {
    pub guest: u64,
    pub bytes: u64,
    pub file: File,
    /// Its file was made shorter: what is there may be gone, and come back as zeroes.
    pub shortened: Cell<bool>,
}

impl Region {
    pub(crate) fn new(guest: u64, bytes: u64) -> Region {
        let file = file(bytes.next_multiple_of(4096));
        if !bytes.is_multiple_of(4096) {
            file.write_all_at(&CANARY, bytes).expect("a memory file takes bytes");
        }
        Region { guest, bytes, file, shortened: Cell::new(false) }
    }

    /// Writes what of `bytes` is inside.
    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        let Some(offset) = address.checked_sub(self.guest).filter(|offset| *offset < self.bytes) else { return };
        let bytes = &bytes[..bytes.len().min((self.bytes - offset) as usize)];
        self.file.write_all_at(bytes, offset).expect("a memory file takes bytes");
    }

    pub(crate) fn read_u16(&self, address: u64) -> u16 {
        let mut bytes = [0; 2];
        match address.checked_sub(self.guest).filter(|offset| offset + 2 <= self.bytes) {
            // Of what was cut off nothing is read.
            Some(offset) if self.shortened.get() => _ = self.file.read_exact_at(&mut bytes, offset),
            Some(offset) => self.file.read_exact_at(&mut bytes, offset).expect("it is inside"),
            None => return 0,
        }
        u16::from_le_bytes(bytes)
    }

    /// Makes its file shorter, as a front-end may at any time, or as long as it was.
    pub(crate) fn set_len(&self, bytes: u64) {
        self.shortened.set(true);
        ftruncate(&self.file, bytes.min(self.bytes.next_multiple_of(4096))).expect("a memory file takes any length");
    }

    /// Nobody may have written behind the end.
    pub(crate) fn check(&self) {
        if !self.bytes.is_multiple_of(4096) && !self.shortened.get() {
            let mut found = CANARY;
            self.file.read_exact_at(&mut found, self.bytes).expect("the page is the file's");
            assert_eq!(found, CANARY, "something was written behind the end of the region at {:#x}", self.guest);
        }
    }
}
