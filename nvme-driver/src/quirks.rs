//! What is known of drives that their Identify data does not say, or says wrongly.
//!
//! The entries are facts from the public lists of other drivers (Linux: `drivers/nvme/host/pci.c`; SPDK:
//! `lib/nvme/nvme_quirks.c`). What those lists say of power states, temperature thresholds, shared tags, addresses over 48 bits
//! and names of NVM subsystems is left out: nothing here uses them. So is what they say of QEMU's controller 1b36:0010, whose
//! namespaces have the identifiers they are given.

use std::fmt;
use std::time::Duration;

/// Something that a drive does otherwise than others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[non_exhaustive]
pub enum Quirk {
    /// After a reset of the function it is left alone for two seconds before the first register is read.
    RestBeforeStart,
    /// CSTS is not read for 2.3 seconds after CC.EN was cleared: some forget to reset, some leave the bus.
    RestAfterDisable,
    /// CSTS.SHST never says that a shutdown is complete; it is taken to be when it was asked for.
    NoShutdownStatus,
    /// No more than one command at a time on a queue pair.
    OneCommand,
    /// The list of active namespaces (Identify CNS 02h) is none: each namespace is asked for.
    NoNamespaceList,
    /// There are no namespace identification descriptors (Identify CNS 03h), and the question is taken badly: it is not asked.
    NoDescriptors,
    /// Several drives have the same EUI-64, NGUID or UUID, or they change: they are not used.
    UntrueIdentifiers,
    /// Scatter gather lists are not used.
    NoSgl,
    /// Write Zeroes is not used.
    NoWriteZeroes,
    /// Dataset Management is not used.
    NoDiscard,
    /// Write Zeroes is used without deallocating, whatever DLFEAT says.
    NoDeallocatingZeroes,
    /// Commands that cross a multiple of the largest transfer are slow: they are split there, as if it were NOIOB.
    Striped,
}

/// All of them, in the order in which they are told.
const ALL: [Quirk; 12] = [
    Quirk::RestBeforeStart,
    Quirk::RestAfterDisable,
    Quirk::NoShutdownStatus,
    Quirk::OneCommand,
    Quirk::NoNamespaceList,
    Quirk::NoDescriptors,
    Quirk::UntrueIdentifiers,
    Quirk::NoSgl,
    Quirk::NoWriteZeroes,
    Quirk::NoDiscard,
    Quirk::NoDeallocatingZeroes,
    Quirk::Striped,
];

/// [`Quirk::RestBeforeStart`].
pub(crate) const REST_BEFORE_START: Duration = Duration::from_secs(2);
/// [`Quirk::RestAfterDisable`].
pub(crate) const REST_AFTER_DISABLE: Duration = Duration::from_millis(2300);

impl fmt::Display for Quirk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Quirk::RestBeforeStart => "rests 2 s before it is started",
            Quirk::RestAfterDisable => "rests 2.3 s after it was disabled",
            Quirk::NoShutdownStatus => "does not tell when it has shut down",
            Quirk::OneCommand => "one command at a time on a queue pair",
            Quirk::NoNamespaceList => "namespaces are asked for one by one",
            Quirk::NoDescriptors => "no namespace identification descriptors",
            Quirk::UntrueIdentifiers => "EUI-64, NGUID and UUID are not used",
            Quirk::NoSgl => "no scatter gather lists",
            Quirk::NoWriteZeroes => "no Write Zeroes",
            Quirk::NoDiscard => "no Dataset Management",
            Quirk::NoDeallocatingZeroes => "Write Zeroes does not deallocate",
            Quirk::Striped => "commands end at multiples of the largest transfer",
        })
    }
}

/// The quirks of one drive.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Quirks(u16);

impl Quirks {
    /// None.
    pub const NONE: Quirks = Quirks(0);

    /// Does the drive have it?
    pub const fn has(self, quirk: Quirk) -> bool {
        self.0 & 1 << quirk as u8 != 0
    }

    /// All that it has.
    pub fn iter(self) -> impl Iterator<Item = Quirk> {
        ALL.into_iter().filter(move |&quirk| self.has(quirk))
    }

    /// None at all?
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    const fn of(quirks: &[Quirk]) -> Quirks {
        let (mut bits, mut at) = (0, 0);
        while at < quirks.len() {
            bits |= 1 << quirks[at] as u8;
            at += 1;
        }
        Quirks(bits)
    }

    /// The quirks of a PCI function of which nothing else is known yet.
    pub(crate) fn of_function(function: Function) -> Quirks {
        find(TABLE, function, None)
    }

    /// The quirks of a drive that has said its model and firmware.
    pub(crate) fn of_drive(function: Function, model: &str, firmware: &str) -> Quirks {
        find(TABLE, function, Some((model, firmware)))
    }
}

impl fmt::Debug for Quirks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

/// Writes the names of the quirks with commas between them.
impl fmt::Display for Quirks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, quirk) in self.iter().enumerate() {
            write!(f, "{}{quirk}", if at > 0 { ", " } else { "" })?;
        }
        Ok(())
    }
}

/// What a PCI function says it is (PCI Local Bus 3.0, 6.2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Function {
    pub vendor: u16,
    pub device: u16,
}

impl Function {
    /// From the first 32 bits of configuration space.
    pub(crate) fn from_register(value: u32) -> Function {
        Function { vendor: value as u16, device: (value >> 16) as u16 }
    }
}

/// An entry of the table; every condition that it has counts.
struct Entry {
    function: Option<Function>,
    /// What the model number begins with.
    model: &'static str,
    /// What the firmware revision begins with.
    firmware: &'static str,
    quirks: Quirks,
}

impl Entry {
    fn matches(&self, function: Function, drive: Option<(&str, &str)>) -> bool {
        // What has not said anything yet begins with nothing but nothing.
        let (model, firmware) = drive.unwrap_or_default();
        self.function.is_none_or(|wanted| wanted == function)
            && model.starts_with(self.model)
            && firmware.starts_with(self.firmware)
    }
}

fn find(table: &[Entry], function: Function, drive: Option<(&str, &str)>) -> Quirks {
    let all = table.iter().filter(|entry| entry.matches(function, drive));
    Quirks(all.fold(0, |bits, entry| bits | entry.quirks.0))
}

/// An entry for a PCI function, whatever its model and firmware.
const fn pci(vendor: u16, device: u16, quirks: &[Quirk]) -> Entry {
    Entry { function: Some(Function { vendor, device }), model: "", firmware: "", quirks: Quirks::of(quirks) }
}

const TABLE: &[Entry] = &[
    // Intel 750, P3500, P3600, P3700; P3520; P4500, P4600; Dell's P4600.
    pci(0x8086, 0x0953, &[Quirk::Striped, Quirk::RestBeforeStart]),
    pci(0x8086, 0x0a53, &[Quirk::Striped, Quirk::RestBeforeStart]),
    pci(0x8086, 0x0a54, &[Quirk::Striped, Quirk::UntrueIdentifiers]),
    pci(0x8086, 0x0a55, &[Quirk::Striped]),
    // Intel 600P, P3100.
    pci(0x8086, 0xf1a5, &[Quirk::NoWriteZeroes]),
    // QEMU's controller, as it was and as it can be told to look.
    pci(0x8086, 0x5845, &[Quirk::NoNamespaceList, Quirk::NoWriteZeroes, Quirk::UntrueIdentifiers]),
    // VMware.
    pci(0x15ad, 0x07f0, &[Quirk::NoShutdownStatus]),
    // Apple, of 2015.
    pci(0x106b, 0x2001, &[Quirk::OneCommand]),
    // Samsung PM1725, PM1725a, SM953, MZALQ, PM9B1.
    pci(0x144d, 0xa821, &[Quirk::RestAfterDisable]),
    pci(0x144d, 0xa822, &[Quirk::RestAfterDisable, Quirk::NoWriteZeroes]),
    pci(0x144d, 0xa802, &[Quirk::UntrueIdentifiers]),
    pci(0x144d, 0xa809, &[Quirk::NoWriteZeroes]),
    pci(0x144d, 0xa80b, &[Quirk::NoWriteZeroes, Quirk::UntrueIdentifiers]),
    // Seagate Nytro.
    pci(0x1bb1, 0x0100, &[Quirk::RestAfterDisable, Quirk::NoDescriptors]),
    // HGST, WDC SN200.
    pci(0x1c58, 0x0003, &[Quirk::RestAfterDisable]),
    pci(0x1c58, 0x0023, &[Quirk::RestAfterDisable]),
    // Memblaze PBlaze4.
    pci(0x1c5f, 0x0540, &[Quirk::RestAfterDisable]),
    // Lexar.
    pci(0x1b4b, 0x1092, &[Quirk::NoDescriptors]),
    pci(0x1d97, 0x1d97, &[Quirk::UntrueIdentifiers]),
    pci(0x1d97, 0x2263, &[Quirk::NoWriteZeroes, Quirk::UntrueIdentifiers]),
    pci(0x1d97, 0x2269, &[Quirk::UntrueIdentifiers]),
    // SanDisk Skyhawk.
    pci(0x15b7, 0x2001, &[Quirk::NoWriteZeroes]),
    // SK hynix PC400, P31, BC901.
    pci(0x1c5c, 0x1504, &[Quirk::NoWriteZeroes]),
    pci(0x1c5c, 0x174a, &[Quirk::UntrueIdentifiers]),
    pci(0x1c5c, 0x1d59, &[Quirk::NoWriteZeroes]),
    // UMIS.
    pci(0x1cc4, 0x6302, &[Quirk::NoWriteZeroes]),
    pci(0x1cc4, 0x6303, &[Quirk::NoWriteZeroes]),
    // Kingston.
    pci(0x2646, 0x5016, &[Quirk::NoWriteZeroes]),
    pci(0x2646, 0x5018, &[Quirk::NoWriteZeroes]),
    pci(0x2646, 0x501a, &[Quirk::NoWriteZeroes]),
    pci(0x2646, 0x501b, &[Quirk::NoWriteZeroes]),
    pci(0x2646, 0x501e, &[Quirk::NoWriteZeroes]),
    // Phison E12, E16, E19, E21.
    pci(0x1987, 0x5012, &[Quirk::UntrueIdentifiers]),
    pci(0x1987, 0x5016, &[Quirk::UntrueIdentifiers]),
    pci(0x1987, 0x5019, &[Quirk::NoWriteZeroes]),
    pci(0x1987, 0x5021, &[Quirk::NoWriteZeroes]),
    // Silicon Motion.
    pci(0x126f, 0x2262, &[Quirk::UntrueIdentifiers]),
    pci(0x126f, 0x2263, &[Quirk::NoDescriptors, Quirk::UntrueIdentifiers]),
    // Realtek: ADATA SX6000, Teamgroup.
    pci(0x10ec, 0x5762, &[Quirk::UntrueIdentifiers]),
    pci(0x10ec, 0x5763, &[Quirk::UntrueIdentifiers]),
    pci(0x10ec, 0x5765, &[Quirk::UntrueIdentifiers]),
    // Maxio.
    pci(0x1e4b, 0x1001, &[Quirk::UntrueIdentifiers]),
    pci(0x1e4b, 0x1002, &[Quirk::UntrueIdentifiers]),
    pci(0x1e4b, 0x1202, &[Quirk::UntrueIdentifiers]),
    pci(0x1e4b, 0x1602, &[Quirk::UntrueIdentifiers]),
    // Micron Nitro, Crucial P2, Netac, ADATA.
    pci(0x1344, 0x6001, &[Quirk::UntrueIdentifiers]),
    pci(0xc0a9, 0x540a, &[Quirk::UntrueIdentifiers]),
    pci(0x1f40, 0x1202, &[Quirk::UntrueIdentifiers]),
    pci(0x1f40, 0x5236, &[Quirk::UntrueIdentifiers]),
    pci(0x1cc1, 0x33f8, &[Quirk::UntrueIdentifiers]),
    pci(0x1cc1, 0x5350, &[Quirk::UntrueIdentifiers]),
    pci(0x1dbe, 0x5236, &[Quirk::UntrueIdentifiers]),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drive_has_what_every_entry_says_whose_conditions_it_meets() {
        let here = Function { vendor: 0x1234, device: 0x5678 };
        let text = |model, firmware, quirk| Entry { function: None, model, firmware, quirks: Quirks::of(&[quirk]) };
        let table = [
            pci(0x1234, 0x5678, &[Quirk::NoSgl, Quirk::Striped]),
            pci(0x1234, 0x5679, &[Quirk::OneCommand]),
            text("BOX 1", "", Quirk::NoDiscard),
            text("BOX", "2.", Quirk::NoWriteZeroes),
            Entry { function: Some(here), ..text("BOX", "", Quirk::NoDescriptors) },
        ];
        let quirks = |function, drive| find(&table, function, drive).iter().collect::<Vec<_>>();
        assert_eq!(quirks(here, None), [Quirk::NoSgl, Quirk::Striped], "before it has said more");
        let other = Function { vendor: 1, device: 1 };
        assert_eq!(quirks(other, None), []);
        assert_eq!(quirks(other, Some(("BOX 1000", "1.0"))), [Quirk::NoDiscard]);
        assert_eq!(quirks(other, Some(("BOX 7", "2.9"))), [Quirk::NoWriteZeroes]);
        let all = [Quirk::NoDescriptors, Quirk::NoSgl, Quirk::NoWriteZeroes, Quirk::NoDiscard, Quirk::Striped];
        assert_eq!(quirks(here, Some(("BOX 10", "2.0"))), all);
    }

    #[test]
    fn the_table_is_read_by_vendor_and_device() {
        let samsung = Quirks::of_function(Function::from_register(0xa822_144d));
        assert_eq!(samsung.iter().collect::<Vec<_>>(), [Quirk::RestAfterDisable, Quirk::NoWriteZeroes]);
        assert_eq!(samsung.to_string(), "rests 2.3 s after it was disabled, no Write Zeroes");
        assert!(Quirks::of_drive(Function::from_register(0x0010_1b36), "QEMU NVMe Ctrl", "9.0").is_empty());
        for (at, entry) in TABLE.iter().enumerate() {
            let twice = TABLE[..at].iter().any(|other| other.function == entry.function && other.model == entry.model);
            assert!(!twice && !entry.quirks.is_empty(), "{:?}", entry.function);
        }
    }

    #[test]
    fn each_has_a_bit_of_its_own() {
        let of = |quirk| Quirks::of(&[quirk]);
        for (at, quirk) in ALL.into_iter().enumerate() {
            assert_eq!(quirk as usize, at);
            assert!(ALL.into_iter().filter(|&other| of(quirk).has(other)).eq([quirk]));
        }
    }
}
