//! Controller registers (NVMe Base 2.0, 3.1.3) as the host sees them.
//!
//! The message thread reads and writes them for the front-end; the data thread carries out what a write of CC asks for and
//! sets CSTS.

use crate::config::Config;
use crate::patch::RegisterPatch;

/// Offset of the first doorbell in BAR0 (3.1.2).
pub(crate) const DOORBELLS: u64 = 0x1000;
/// The version the controller reports and follows: 2.0.
pub(crate) const VERSION: u32 = 0x0002_0000;
/// Smallest and only memory page size exponent (4 KiB) minus 12, and the largest (64 KiB).
pub(crate) const MPS_MAX: u32 = 4;

const NSSR_MAGIC: u32 = 0x4e56_4d65;

/// CSTS.RDY (3.1.3.6).
pub(crate) const CSTS_READY: u32 = 1;
/// CSTS.CFS.
pub(crate) const CSTS_FATAL: u32 = 1 << 1;
/// CSTS.SHST.
pub(crate) const CSTS_SHUTDOWN: u32 = 3 << 2;
/// CSTS.SHST: shutdown is going on.
pub(crate) const CSTS_SHUTDOWN_OCCURRING: u32 = 1 << 2;
/// CSTS.SHST: shutdown is complete.
pub(crate) const CSTS_SHUTDOWN_COMPLETE: u32 = 2 << 2;
/// CSTS.PP: the controller does not process commands for a while.
pub(crate) const CSTS_PAUSED: u32 = 1 << 5;
/// CSTS.NSSRO: a subsystem reset occurred.
pub(crate) const CSTS_SUBSYSTEM_RESET: u32 = 1 << 4;

/// What the host wants of the controller since the data thread last looked.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Wanted {
    /// CC.EN was cleared (even if it was set again since).
    pub reset: bool,
    /// NVM subsystem reset.
    pub subsystem_reset: bool,
    /// CC was written.
    pub configuration: bool,
}

/// The registers.
pub(crate) struct Registers {
    capabilities: u64,
    ready_timeout: u32,
    pub configuration: u32,
    pub status: u32,
    pub admin_attributes: u32,
    pub admin_sq: u64,
    pub admin_cq: u64,
    interrupt_mask: u32,
    pub wanted: Wanted,
    /// What is read otherwise.
    pub patches: Vec<RegisterPatch>,
}

/// CC.EN (3.1.3.5).
pub(crate) fn enabled(cc: u32) -> bool {
    cc & 1 != 0
}

/// CC.SHN: 0 none, 1 normal, 2 abrupt.
pub(crate) fn shutdown_notification(cc: u32) -> u32 {
    cc >> 14 & 3
}

/// CC.MPS.
pub(crate) fn memory_page_size(cc: u32) -> u32 {
    cc >> 7 & 15
}

impl Registers {
    pub(crate) fn new(config: &Config) -> Registers {
        let timeout = u64::from(config.ready_timeout_units());
        let capabilities = u64::from(config.queue_entries - 1) // MQES, 0's based
            | 1 << 16 // CQR: queues are contiguous
            | timeout << 24
            | u64::from(config.doorbell_stride) << 32
            | 1 << 36 // NSSRS
            | 1 << 37 // CSS: NVM command set
            | u64::from(MPS_MAX) << 52
            | 1 << 59; // CRMS: ready with media (CRTO.CRWMT)
        Registers {
            capabilities,
            ready_timeout: timeout as u32,
            configuration: 0,
            status: 0,
            admin_attributes: 0,
            admin_sq: 0,
            admin_cq: 0,
            interrupt_mask: 0,
            wanted: Wanted::default(),
            patches: config.registers.clone(),
        }
    }

    /// Registers after a controller level reset: CC and CSTS; the admin queue attributes stay (3.7.2).
    pub(crate) fn controller_reset(&mut self) {
        self.interrupt_mask = 0;
        self.status &= CSTS_SUBSYSTEM_RESET;
    }

    /// Registers as after power-on.
    pub(crate) fn power_on(&mut self) {
        self.configuration = 0;
        self.status = 0;
        self.admin_attributes = 0;
        self.admin_sq = 0;
        self.admin_cq = 0;
        self.interrupt_mask = 0;
        self.wanted = Wanted::default();
    }

    /// The aligned dword at `offset`; reserved ones read zero.
    pub(crate) fn read_dword(&self, offset: u64) -> u32 {
        let dword = self.dword(offset);
        self.patches.iter().fold(dword, |dword, patch| patch.apply(offset, dword))
    }

    fn dword(&self, offset: u64) -> u32 {
        match offset {
            0x00 => self.capabilities as u32,
            0x04 => (self.capabilities >> 32) as u32,
            0x08 => VERSION,
            0x0c | 0x10 => self.interrupt_mask,
            0x14 => self.configuration,
            0x1c => self.status,
            0x24 => self.admin_attributes,
            0x28 => self.admin_sq as u32,
            0x2c => (self.admin_sq >> 32) as u32,
            0x30 => self.admin_cq as u32,
            0x34 => (self.admin_cq >> 32) as u32,
            0x68 => self.ready_timeout, // CRTO.CRWMT; CRIMT is 0: not supported
            _ => 0,
        }
    }

    /// Reads `data.len()` bytes at `offset`, of whatever width and alignment.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.read_dword(at & !3).to_le_bytes()[(at & 3) as usize];
        }
    }

    /// Writes `data` at `offset`. Writes of parts of a dword change those bytes only.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        if !offset.is_multiple_of(4) || !data.len().is_multiple_of(4) {
            log::warn!("register write of {} bytes at {offset:#x}: not dwords (NVMe Base 2.0, 3.1)", data.len());
        }
        let end = offset + data.len() as u64;
        let mut dword = offset & !3;
        while dword < end {
            let mut bytes = match dword {
                0x0c | 0x10 => [0; 4], // write 1 to set, or to clear
                _ => self.read_dword(dword).to_le_bytes(),
            };
            for (n, byte) in bytes.iter_mut().enumerate() {
                let at = dword + n as u64;
                if at >= offset && at < end {
                    *byte = data[(at - offset) as usize];
                }
            }
            self.write_dword(dword, u32::from_le_bytes(bytes));
            dword += 4;
        }
    }

    fn write_dword(&mut self, offset: u64, value: u32) {
        if matches!(offset, 0x24..=0x34) && enabled(self.configuration) {
            log::warn!("register {offset:#x} written while CC.EN is 1: used at the next enable only");
        }
        let low = |old: u64| old & !0xffff_ffff | u64::from(value & !0xfff);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        match offset {
            0x0c => self.interrupt_mask |= value,
            0x10 => self.interrupt_mask &= !value,
            0x14 => self.write_configuration(value),
            0x1c => self.status &= !(value & CSTS_SUBSYSTEM_RESET),
            0x20 if value == NSSR_MAGIC => self.wanted.subsystem_reset = true,
            0x20 => log::warn!("NSSR written with {value:#x}: only {NSSR_MAGIC:#x} resets"),
            0x24 => self.admin_attributes = value & 0x0fff_0fff,
            0x28 => self.admin_sq = low(self.admin_sq),
            0x2c => self.admin_sq = high(self.admin_sq),
            0x30 => self.admin_cq = low(self.admin_cq),
            0x34 => self.admin_cq = high(self.admin_cq),
            0x00..=0x08 => log::warn!("write of {value:#x} to the read-only register {offset:#x} ignored"),
            _ => log::debug!("write of {value:#x} to the reserved register {offset:#x} ignored"),
        }
    }

    fn write_configuration(&mut self, value: u32) {
        let value = value & 0x00ff_fff1;
        let old = std::mem::replace(&mut self.configuration, value);
        self.wanted.configuration = true;
        if enabled(old) && !enabled(value) {
            self.wanted.reset = true;
        }
        if enabled(old) && enabled(value) && (old ^ value) & 0x3ff0 != 0 {
            log::warn!("CC.CSS, MPS or AMS changed while CC.EN is 1: no effect until the next enable");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_widths_and_alignments() {
        let mut registers = Registers::new(&Config::default());
        registers.write(0x28, &0x1234_5678_9abc_def0_u64.to_le_bytes());
        assert_eq!(registers.admin_sq, 0x1234_5678_9abc_d000);
        registers.write(0x2d, &[0xff]);
        assert_eq!(registers.admin_sq, 0x1234_ff78_9abc_d000);
        let mut bytes = [0; 3];
        registers.read(0x2b, &mut bytes);
        assert_eq!(bytes, [0x9a, 0x78, 0xff]);
        let mut all = [0; 0x1000];
        registers.read(0, &mut all);
        assert_eq!(all[8..12], VERSION.to_le_bytes());
        assert!(all[0x6c..].iter().all(|b| *b == 0));
    }

    #[test]
    fn read_only_and_write_one_registers() {
        let mut registers = Registers::new(&Config::default());
        let before = registers.read_dword(0);
        registers.write(0, &[0xff; 12]);
        assert_eq!((registers.read_dword(0), registers.read_dword(8)), (before, VERSION));
        registers.write(0x0c, &0x11_u32.to_le_bytes());
        registers.write(0x10, &0x10_u32.to_le_bytes());
        assert_eq!((registers.read_dword(0x0c), registers.read_dword(0x10)), (1, 1));
        registers.status = CSTS_READY | CSTS_SUBSYSTEM_RESET;
        registers.write(0x1c, &u32::MAX.to_le_bytes());
        assert_eq!(registers.status, CSTS_READY, "only NSSRO is write-1-to-clear");
    }

    #[test]
    fn disabling_is_remembered_across_an_enable() {
        let mut registers = Registers::new(&Config::default());
        registers.write(0x14, &1_u32.to_le_bytes());
        assert!(!registers.wanted.reset);
        registers.write(0x14, &0_u32.to_le_bytes());
        registers.write(0x14, &1_u32.to_le_bytes());
        assert!(registers.wanted.reset && enabled(registers.configuration));
        registers.write(0x20, &0x4e56_4d65_u32.to_le_bytes());
        assert!(registers.wanted.subsystem_reset);
    }
}
