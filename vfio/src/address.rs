//! What a device is called: a PCI function of this machine, or the socket of a vfio-user server.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::Error;
use crate::backend::kernel::sysfs::{Roots, files};

/// The prefix that tells a vfio-user socket from a PCI address.
const VFIO_USER_PREFIX: &str = "vfio-user:";

/// Where a device is found.
///
/// ```
/// use vfio::Address;
/// let drive: Address = "0000:01:00.0".parse()?;
/// let simulated: Address = "vfio-user:/run/nvme.sock".parse()?;
/// assert_eq!(drive.to_string(), "0000:01:00.0");
/// assert_eq!(simulated.to_string(), "vfio-user:/run/nvme.sock");
/// # Ok::<(), vfio::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// A PCI function, reached through the kernel's VFIO.
    Pci(PciAddress),
    /// The UNIX socket of a vfio-user server.
    VfioUser(PathBuf),
}

/// A PCI function: domain, bus, device and function number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

impl PciAddress {
    /// An address from its parts; `None` if `device` exceeds 31 or `function` exceeds 7.
    pub fn new(domain: u32, bus: u8, device: u8, function: u8) -> Option<PciAddress> {
        (device < 32 && function < 8).then_some(PciAddress { domain, bus, device, function })
    }

    /// Looks, without opening anything, by which files this machine's kernel would let the function be opened: one way after the
    /// other, each with all the files that have to be opened for reading and writing.
    ///
    /// # Errors
    /// There is no such function, or nobody can open it as the machine is set up: no IOMMU, another driver, a shared IOMMU group.
    pub fn device_files(&self) -> Result<Vec<Vec<PathBuf>>, Error> {
        files(&Roots::default(), *self)
    }

    /// The PCI domain (segment); 0 on most machines.
    pub fn domain(&self) -> u32 {
        self.domain
    }

    /// The bus number.
    pub fn bus(&self) -> u8 {
        self.bus
    }

    /// The device number on its bus, 0 to 31.
    pub fn device(&self) -> u8 {
        self.device
    }

    /// The function number, 0 to 7.
    pub fn function(&self) -> u8 {
        self.function
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{:x}", self.domain, self.bus, self.device, self.function)
    }
}

impl FromStr for PciAddress {
    type Err = Error;

    /// Reads `domain:bus:device.function`, all hexadecimal; the domain may be left out and is then 0.
    fn from_str(text: &str) -> Result<PciAddress, Error> {
        let wrong = |reason| Error::Address { text: text.to_owned(), reason };
        let (rest, function) =
            text.rsplit_once('.').ok_or_else(|| wrong("there is no '.' before a function number"))?;
        let mut parts = rest.rsplit(':');
        let device = parts.next().unwrap_or_default();
        let bus = parts.next().ok_or_else(|| wrong("there is no ':' between bus and device"))?;
        let domain = parts.next().unwrap_or("0");
        if parts.next().is_some() {
            return Err(wrong("there are too many ':'"));
        }
        let number = |part: &str, digits: usize, reason| {
            let hexadecimal = !part.is_empty() && part.len() <= digits && part.bytes().all(|b| b.is_ascii_hexdigit());
            hexadecimal.then(|| u32::from_str_radix(part, 16).ok()).flatten().ok_or_else(|| wrong(reason))
        };
        let domain = number(domain, 8, "the domain is not a hexadecimal number of at most 8 digits")?;
        let bus = number(bus, 2, "the bus is not a hexadecimal number of at most 2 digits")?;
        let device = number(device, 2, "the device is not a hexadecimal number of at most 2 digits")?;
        let function = number(function, 1, "the function is not one digit from 0 to 7")?;
        // The digit counts above keep all three below 256.
        PciAddress::new(domain, bus as u8, device as u8, function as u8)
            .ok_or_else(|| wrong("a device number goes up to 1f and a function number up to 7"))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Pci(pci) => pci.fmt(f),
            Address::VfioUser(path) => write!(f, "{VFIO_USER_PREFIX}{}", path.display()),
        }
    }
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Address, Error> {
        match text.strip_prefix(VFIO_USER_PREFIX) {
            Some("") => Err(Error::Address { text: text.to_owned(), reason: "there is no path after 'vfio-user:'" }),
            Some(path) => Ok(Address::VfioUser(PathBuf::from(path))),
            None => text.parse().map(Address::Pci),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_domain_may_be_left_out() {
        let short: Address = "01:00.0".parse().unwrap();
        let long: Address = "0000:01:00.0".parse().unwrap();
        assert_eq!(short, long);
        assert_eq!(short.to_string(), "0000:01:00.0");
    }

    #[test]
    fn long_domains_are_read() {
        let address: PciAddress = "10000:e1:1f.7".parse().unwrap();
        assert_eq!(address.domain(), 0x10000);
        assert_eq!(address.to_string(), "10000:e1:1f.7");
    }

    #[test]
    fn what_is_not_an_address_is_refused_with_a_reason() {
        for text in [
            "",
            ".",
            ":",
            "nvme0",
            "01:00",
            "0000:01:00",
            "0000:01:20.0",
            "0000:01:00.8",
            "0000:01:00.",
            "1:2:3:4.0",
            "0000:01:00.0 ",
            "0000:+1:00.0",
            "0000::00.0",
            "vfio-user:",
            "123456789:00:00.0",
            "0000:100:00.0",
        ] {
            let error = text.parse::<Address>().unwrap_err().to_string();
            assert!(error.contains("0000:01:00.0"), "{text:?} gave {error}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(domain: u32, bus: u8, device in 0u8..32, function in 0u8..8) {
            let address = PciAddress::new(domain, bus, device, function).unwrap();
            prop_assert_eq!(address.to_string().parse::<PciAddress>().unwrap(), address);
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in ".{0,40}") {
            let _ = text.parse::<Address>();
        }
    }
}
