//! PCI configuration space of the controller (PCI Express Base 4.0 chapter 7; NVMe over PCIe Transport 1.0, 3.8).

/// Bytes of the configuration space, extended part included.
pub(crate) const CONFIG_BYTES: usize = 4096;
/// Vendor and device identifier: not assigned to anybody. Drivers bind by the class code.
pub(crate) const VENDOR: u16 = 0x6e76;
const DEVICE: u16 = 0x6d65;

const POWER_CAPABILITY: usize = 0x40;
const MSIX_CAPABILITY: usize = 0x50;
const EXPRESS_CAPABILITY: usize = 0x60;

/// Where the structures stand in BAR0, and how many MSI-X vectors there are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BarLayout {
    /// Bytes of BAR0, a power of two.
    pub bytes: u64,
    /// Bytes of doorbells from offset 0x1000, in whole pages.
    pub doorbell_bytes: u64,
    pub msix_table: u64,
    pub msix_pending: u64,
    pub vectors: u16,
}

impl BarLayout {
    /// Room for `queue_pairs` I/O queue pairs and the admin queue, one vector each.
    pub(crate) fn new(queue_pairs: u16, doorbell_stride: u8) -> BarLayout {
        let queues = u64::from(queue_pairs) + 1;
        let vectors = queue_pairs + 1;
        let doorbell_bytes = (queues * 2 * (4 << doorbell_stride)).next_multiple_of(4096);
        let msix_table = crate::registers::DOORBELLS + doorbell_bytes;
        let msix_pending = msix_table + (u64::from(vectors) * 16).next_multiple_of(4096);
        let bytes = (msix_pending + 4096).next_power_of_two().max(16384);
        BarLayout { bytes, doorbell_bytes, msix_table, msix_pending, vectors }
    }
}

/// The configuration space: its bytes, and which bits the host may change.
pub(crate) struct ConfigSpace {
    bytes: Vec<u8>,
    writable: Vec<u8>,
    write_one_to_clear: Vec<u8>,
}

impl ConfigSpace {
    pub(crate) fn new(layout: &BarLayout) -> ConfigSpace {
        let zeroes = || vec![0; CONFIG_BYTES];
        let mut space = ConfigSpace { bytes: zeroes(), writable: zeroes(), write_one_to_clear: zeroes() };
        let [table, pending] = [layout.msix_table as u32, layout.msix_pending as u32];
        space.set(0x00, &VENDOR.to_le_bytes(), &[]);
        space.set(0x02, &DEVICE.to_le_bytes(), &[]);
        space.set(0x04, &[0, 0], &[0x06, 0x04]); // command: memory, bus master, interrupt disable
        space.set(0x06, &[0x10, 0], &[]); // status: capabilities list
        space.write_one_to_clear[0x07] = 0xf9; // status: error bits
        space.set(0x08, &[0x00, 0x02, 0x08, 0x01], &[]); // revision; NVM Express I/O controller, mass storage
        space.set(0x0c, &[0, 0], &[0xff, 0]); // cache line size
        // BAR0: 64-bit memory. The bits below its size stay zero: that is how its size is found.
        let mask = !(layout.bytes - 1);
        space.set(0x10, &0x4_u64.to_le_bytes(), &mask.to_le_bytes());
        space.set(0x2c, &VENDOR.to_le_bytes(), &[]);
        space.set(0x2e, &DEVICE.to_le_bytes(), &[]);
        space.set(0x34, &[POWER_CAPABILITY as u8], &[]);
        space.set(0x3c, &[0], &[0xff]); // interrupt line; the pin is 0: no INTx
        // Power management 1.2: only D0 and D3hot, no soft reset.
        space.set(POWER_CAPABILITY, &[0x01, MSIX_CAPABILITY as u8, 0x03, 0, 0x08, 0], &[0, 0, 0, 0, 0x03, 0]);
        let control = layout.vectors - 1;
        space.set(MSIX_CAPABILITY, &[0x11, EXPRESS_CAPABILITY as u8], &[]);
        space.set(MSIX_CAPABILITY + 2, &control.to_le_bytes(), &[0, 0xc0]); // enable, function mask
        space.set(MSIX_CAPABILITY + 4, &table.to_le_bytes(), &[]); // BIR 0
        space.set(MSIX_CAPABILITY + 8, &pending.to_le_bytes(), &[]);
        // PCI Express capability version 2, endpoint.
        space.set(EXPRESS_CAPABILITY, &[0x10, 0, 0x02, 0], &[]);
        space.set(EXPRESS_CAPABILITY + 4, &(0x1000_8000_u32 | 1).to_le_bytes(), &[]); // function level reset, 256 bytes
        space.set(EXPRESS_CAPABILITY + 8, &[0x10, 0x28], &[0xff, 0x7f]);
        space.set(EXPRESS_CAPABILITY + 0x0c, &0x0000_0043_u32.to_le_bytes(), &[]); // x4, 8 GT/s
        space.set(EXPRESS_CAPABILITY + 0x12, &0x0043_u16.to_le_bytes(), &[]);
        space
    }

    fn set(&mut self, at: usize, bytes: &[u8], writable: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        self.writable[at..at + writable.len()].copy_from_slice(writable);
    }

    /// Reads at `offset`; what lies outside reads as all ones.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = usize::try_from(at).ok().and_then(|at| self.bytes.get(at)).copied().unwrap_or(0xff);
        }
    }

    /// Writes at `offset`; only the bits the host may change do. True: a function level reset was asked for.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> bool {
        let mut reset = false;
        for (at, value) in (offset..).zip(data) {
            let Ok(at) = usize::try_from(at) else { break };
            if at >= CONFIG_BYTES {
                break;
            }
            // Device Control bit 15, Initiate Function Level Reset; it always reads zero.
            reset |= at == EXPRESS_CAPABILITY + 9 && value & 0x80 != 0;
            let writable = self.writable[at];
            self.bytes[at] = self.bytes[at] & !writable | value & writable;
            self.bytes[at] &= !(value & self.write_one_to_clear[at]);
        }
        reset
    }

    /// Whether the host lets the controller access memory (command register bit 2).
    pub(crate) fn bus_master(&self) -> bool {
        self.bytes[4] & 4 != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_truthful_configuration_space() {
        let layout = BarLayout::new(16, 0);
        let mut space = ConfigSpace::new(&layout);
        let mut class = [0; 3];
        space.read(9, &mut class);
        assert_eq!(class, [0x02, 0x08, 0x01]);
        // The size of BAR0 by the usual probe.
        space.write(0x10, &[0xff; 8]);
        let mut bar = [0; 8];
        space.read(0x10, &mut bar);
        assert_eq!(!(u64::from_le_bytes(bar) & !0xf) + 1, layout.bytes);
        assert_eq!(bar[0] & 0xf, 4);
        // Capabilities: each once, the chain ends.
        let mut seen = vec![];
        let mut at = [0; 1];
        space.read(0x34, &mut at);
        while at[0] != 0 {
            let mut head = [0; 2];
            space.read(u64::from(at[0]), &mut head);
            seen.push(head[0]);
            at[0] = head[1];
        }
        assert_eq!(seen, [0x01, 0x11, 0x10]);
        let mut outside = [0; 2];
        space.read(4095, &mut outside);
        assert_eq!(outside, [0, 0xff]);
        assert!(!space.bus_master());
        space.write(4, &[0xff]);
        assert!(space.bus_master());
        assert!(space.write((EXPRESS_CAPABILITY + 8) as u64, &[0, 0x80]));
    }

    #[test]
    fn structures_do_not_overlap() {
        for (pairs, stride) in [(1, 0), (16, 0), (600, 0), (1023, 4), (2047, 0)] {
            let layout = BarLayout::new(pairs, stride);
            assert!(layout.msix_table >= 0x1000 + layout.doorbell_bytes);
            assert!(layout.msix_pending >= layout.msix_table + u64::from(layout.vectors) * 16);
            assert!(layout.bytes >= layout.msix_pending + u64::from(layout.vectors).div_ceil(64) * 8);
            assert!(layout.bytes.is_power_of_two() && layout.bytes >= 16384);
        }
    }
}
