//! Memory for the other side of a device: a guest's, or a load generator's.

use std::fs::File;
use std::slice;

use super::SharedMemory;
use crate::Error;

/// Memory of zeroes in a file of its own that this process uses as plain bytes, and another process maps.
///
/// It is a type of its own, as plain bytes and atomics of the same memory must not meet in one process: there is no view
/// of it as atomics, and no [`DmaSpace`](crate::DmaSpace) takes it. What a type cannot keep from happening is left to whoever
/// hands [`PlainMemory::file`] out: this process must neither map the file again nor write to it, and the other one
/// changes only bytes that it was asked to change, while nobody here looks at them. That is how a guest's kernel uses
/// its memory too; a program that cannot promise it takes [`SharedMemory`].
#[derive(Debug)]
pub struct PlainMemory(SharedMemory);

impl PlainMemory {
    /// New memory of zeroes, `bytes` long (rounded up to whole pages).
    pub fn create(bytes: usize) -> Result<PlainMemory, Error> {
        SharedMemory::create(bytes).map(PlainMemory)
    }

    /// The file, for the other process. The memory begins at its offset 0.
    pub fn file(&self) -> &File {
        self.0.file()
    }

    /// The memory's length, bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are no bytes; there always are some.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All of the memory.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is `len` bytes long and lives as long as `self`, and any bytes are valid. `&mut self` excludes
        // every other reference to it, as nothing else here gives one; who has the file is bound by this type's rules.
        unsafe { slice::from_raw_parts_mut(self.0.as_ptr(), self.0.len()) }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn the_other_side_sees_the_same_bytes_through_the_file() {
        let mut memory = PlainMemory::create(5000).unwrap();
        assert_eq!((memory.len(), memory.is_empty()), (8192, false));
        memory.as_mut_slice()[4999] = 7;
        // No reference to the memory is left while the file is used.
        let mut seen = [0; 2];
        memory.file().read_exact_at(&mut seen, 4998).unwrap();
        assert_eq!(seen, [0, 7]);
        memory.file().write_all_at(&[9], 8191).unwrap();
        assert_eq!(memory.as_mut_slice().last(), Some(&9));
    }
}
