//! The PCI configuration space (PCI Local Bus 3.0, section 6.1; capabilities: section 6.7).

use std::fmt;
use std::sync::Arc;

use crate::Error;
use crate::backend::{Backend, CONFIG_REGION};

/// Offset of the 16-bit command register.
pub const COMMAND: u16 = 0x04;
/// Command register, bit 1: the device answers accesses to its memory BARs.
pub const COMMAND_MEMORY_SPACE: u16 = 1 << 1;
/// Command register, bit 2: the device may do DMA and send message-signalled interrupts.
pub const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Command register, bit 10: the device must not use its interrupt pin.
pub const COMMAND_INTERRUPT_DISABLE: u16 = 1 << 10;
/// Capability id of MSI-X (PCI Local Bus 3.0, section 6.8.2).
pub const CAPABILITY_MSIX: u8 = 0x11;

/// Offset of the 16-bit status register.
const STATUS: u16 = 0x06;
/// Status register, bit 4: there is a list of capabilities.
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Offset of the 8-bit pointer to the first capability.
const CAPABILITIES: u16 = 0x34;
/// Capabilities lie behind the 64-byte header, each at least 4 bytes, within 256 bytes.
const FIRST_CAPABILITY: u16 = 0x40;
const MOST_CAPABILITIES: usize = (256 - FIRST_CAPABILITY as usize) / 4;

/// A device's PCI configuration space. Values are in the host's byte order, offsets in bytes.
#[derive(Clone)]
pub struct ConfigSpace {
    backend: Arc<dyn Backend>,
}

impl ConfigSpace {
    pub(crate) fn new(backend: Arc<dyn Backend>) -> ConfigSpace {
        ConfigSpace { backend }
    }

    /// Reads 8 bits.
    pub fn read_u8(&self, offset: u16) -> Result<u8, Error> {
        read(&*self.backend, offset).map(u8::from_le_bytes)
    }

    /// Reads 16 bits; `offset` is a multiple of 2.
    pub fn read_u16(&self, offset: u16) -> Result<u16, Error> {
        read(&*self.backend, offset).map(u16::from_le_bytes)
    }

    /// Reads 32 bits; `offset` is a multiple of 4.
    pub fn read_u32(&self, offset: u16) -> Result<u32, Error> {
        read(&*self.backend, offset).map(u32::from_le_bytes)
    }

    /// Writes 16 bits; `offset` is a multiple of 2.
    pub fn write_u16(&self, offset: u16, value: u16) -> Result<(), Error> {
        write(&*self.backend, offset, value.to_le_bytes())
    }

    /// Writes 32 bits; `offset` is a multiple of 4.
    pub fn write_u32(&self, offset: u16, value: u32) -> Result<(), Error> {
        write(&*self.backend, offset, value.to_le_bytes())
    }

    /// The offset of the first capability with this id, if the device has one.
    pub fn capability(&self, id: u8) -> Result<Option<u16>, Error> {
        find_capability(&*self.backend, id)
    }
}

/// Whether the device has a configuration space that can be reached.
pub(crate) fn exists(backend: &dyn Backend) -> bool {
    backend.region(CONFIG_REGION).size > 0
}

/// Lets the device answer memory accesses and do DMA, and keeps it from its interrupt pin: until MSI-X is enabled a device
/// uses the pin, nobody here listens to it, and on a line that is shared the kernel would switch off all who use it.
/// Nothing is written if nothing changes.
pub(crate) fn enable_device(backend: &dyn Backend) -> Result<(), Error> {
    let command = u16::from_le_bytes(read(backend, COMMAND)?);
    let wanted = command | COMMAND_MEMORY_SPACE | COMMAND_BUS_MASTER | COMMAND_INTERRUPT_DISABLE;
    if wanted == command { Ok(()) } else { write(backend, COMMAND, wanted.to_le_bytes()) }
}

/// Walks the list of capabilities. A list that loops ends where it has visited all that fit.
pub(crate) fn find_capability(backend: &dyn Backend, id: u8) -> Result<Option<u16>, Error> {
    if u16::from_le_bytes(read(backend, STATUS)?) & STATUS_CAPABILITIES == 0 {
        return Ok(None);
    }
    let [first] = read(backend, CAPABILITIES)?;
    let mut at = u16::from(first & !3);
    for _ in 0..MOST_CAPABILITIES {
        if at < FIRST_CAPABILITY {
            break;
        }
        let [found, next] = read(backend, at)?;
        if found == id {
            return Ok(Some(at));
        }
        at = u16::from(next & !3);
    }
    Ok(None)
}

fn check(backend: &dyn Backend, offset: u16, bytes: usize) -> Result<(), Error> {
    let size = backend.region(CONFIG_REGION).size;
    if usize::from(offset) % bytes == 0 && u64::from(offset) + bytes as u64 <= size {
        return Ok(());
    }
    let region = "the PCI configuration space".to_owned();
    Err(Error::OutOfRegion { region, offset: offset.into(), bytes, size })
}

fn read<const N: usize>(backend: &dyn Backend, offset: u16) -> Result<[u8; N], Error> {
    check(backend, offset, N)?;
    let mut data = [0; N];
    backend.read(CONFIG_REGION, offset.into(), &mut data)?;
    Ok(data)
}

fn write<const N: usize>(backend: &dyn Backend, offset: u16, data: [u8; N]) -> Result<(), Error> {
    check(backend, offset, N)?;
    backend.write(CONFIG_REGION, offset.into(), &data)
}

impl fmt::Debug for ConfigSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ConfigSpace")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::fake::FakeBackend;

    fn config(bytes: &[(usize, u8)]) -> (Arc<FakeBackend>, ConfigSpace) {
        let backend = Arc::new(FakeBackend::default());
        bytes.iter().for_each(|&(at, byte)| backend.config.lock().unwrap()[at] = byte);
        (backend.clone(), ConfigSpace::new(backend))
    }

    #[test]
    fn capabilities_are_found_in_their_list() {
        let (_, config) = config(&[(6, 0x10), (0x34, 0x43), (0x40, 1), (0x41, 0x70), (0x70, 0x11)]);
        assert_eq!(config.capability(1).unwrap(), Some(0x40));
        assert_eq!(config.capability(CAPABILITY_MSIX).unwrap(), Some(0x70));
        assert_eq!(config.capability(5).unwrap(), None);
    }

    #[test]
    fn without_the_status_bit_there_is_no_list() {
        let (_, config) = config(&[(0x34, 0x40), (0x40, 0x11)]);
        assert_eq!(config.capability(CAPABILITY_MSIX).unwrap(), None);
    }

    #[test]
    fn a_list_that_loops_or_leaves_ends() {
        let (backend, config) = config(&[(6, 0x10), (0x34, 0x40), (0x40, 1), (0x41, 0x40)]);
        assert_eq!(config.capability(5).unwrap(), None);
        backend.config.lock().unwrap()[0x41] = 0x10;
        assert_eq!(config.capability(5).unwrap(), None);
        // A removed device reads as all ones.
        backend.config.lock().unwrap().fill(0xff);
        assert_eq!(config.capability(CAPABILITY_MSIX).unwrap(), None);
    }

    #[test]
    fn the_device_is_enabled_once_and_other_bits_stay() {
        let (backend, config) = config(&[(4, 0x01), (5, 0x01)]);
        enable_device(&*backend).unwrap();
        assert_eq!(config.read_u16(COMMAND).unwrap(), 0x0507, "memory, bus master, no interrupt pin");
        let requests = backend.requests();
        enable_device(&*backend).unwrap();
        assert_eq!(backend.requests(), requests + 1, "nothing is written if nothing changes");
    }

    #[test]
    fn accesses_outside_or_misaligned_are_refused() {
        let (_, config) = config(&[]);
        assert!(config.read_u8(255).is_ok() && config.read_u8(256).is_err());
        assert!(config.read_u16(254).is_ok() && config.read_u16(255).is_err());
        assert!(config.read_u32(254).is_err() && config.write_u32(256, 0).is_err() && config.write_u16(1, 0).is_err());
        config.write_u32(8, 0x0102_0304).unwrap();
        assert_eq!(config.read_u16(10).unwrap(), 0x0102);
    }
}
