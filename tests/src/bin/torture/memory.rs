//! A guest's memory: two regions, one of which lies far above the other, as in a guest with more than some GiB.

use std::fs::File;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};

use vfio::{DmaElement, SharedMemory};

use crate::Failure;

/// Where data lies; everything else begins at 0.
pub(crate) const DATA: u64 = 4 << 30;
/// How much higher the front-end has it all mapped.
pub(crate) const USER: u64 = 0x7f00_0000_0000;

pub(crate) struct Memory {
    low: SharedMemory,
    data: SharedMemory,
}

/// A region as SET_MEM_TABLE tells it.
pub(crate) struct Region<'a> {
    pub guest: u64,
    pub bytes: u64,
    pub file: &'a File,
}

impl Memory {
    pub(crate) fn new(low: u64, data: u64) -> Result<Memory, Failure> {
        let create = |bytes: u64| {
            SharedMemory::create(bytes as usize).map_err(|error| Failure::Stand(format!("guest memory: {error}")))
        };
        Ok(Memory { low: create(low)?, data: create(data)? })
    }

    pub(crate) fn regions(&self) -> [Region<'_>; 2] {
        [(0, &self.low), (DATA, &self.data)].map(|(guest, memory)| Region {
            guest,
            bytes: memory.len() as u64,
            file: memory.file(),
        })
    }

    fn place(&self, address: u64) -> (&SharedMemory, usize) {
        match address.checked_sub(DATA) {
            Some(at) => (&self.data, at as usize),
            None => (&self.low, address as usize),
        }
    }

    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        let (memory, at) = self.place(address);
        memory.write(at, data).expect("the client uses its own memory");
    }

    pub(crate) fn read(&self, address: u64, data: &mut [u8]) {
        let (memory, at) = self.place(address);
        memory.read(at, data).expect("the client uses its own memory");
    }

    fn element<T: DmaElement>(&self, address: u64) -> &T {
        let (memory, at) = self.place(address);
        &memory.slice(at, 1).expect("the client uses its own memory, aligned")[0]
    }

    pub(crate) fn load_u16(&self, address: u64, order: Ordering) -> u16 {
        u16::from_le(self.element::<AtomicU16>(address).load(order))
    }

    pub(crate) fn store_u16(&self, address: u64, value: u16, order: Ordering) {
        self.element::<AtomicU16>(address).store(value.to_le(), order);
    }

    pub(crate) fn load_u32(&self, address: u64) -> u32 {
        u32::from_le(self.element::<AtomicU32>(address).load(Ordering::Relaxed))
    }

    pub(crate) fn load_u8(&self, address: u64) -> u8 {
        let mut byte = [0];
        self.read(address, &mut byte);
        byte[0]
    }
}
