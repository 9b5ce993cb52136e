//! The address of a controller: a PCI function, a vfio-user socket, or a controller embedded in this program.

use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::str::FromStr;

use serde::Deserialize;

use super::error::{AddressError, SimError, SocketPathError};

/// Where the NVMe controller of an export is. Two exports with equal addresses share one controller.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum DeviceAddress {
    /// A controller behind VFIO or vfio-user.
    Vfio(vfio::Address),
    /// A controller in software inside this process, as `nvme_sim::SimAddress` describes it: `SIZE[,KEY=VALUE]…`.
    Sim(String),
}

/// Checks the path of a socket.
///
/// # Errors
/// No socket can have it.
pub fn socket_path(path: &Path) -> Result<(), SocketPathError> {
    let bytes = path.as_os_str().as_bytes();
    match bytes.len() {
        0 => Err(SocketPathError::Empty),
        1..=SocketPathError::MOST_BYTES if !bytes.contains(&0) => Ok(()),
        1..=SocketPathError::MOST_BYTES => Err(SocketPathError::ZeroByte),
        bytes => Err(SocketPathError::TooLong { path: path.display().to_string(), bytes }),
    }
}

impl FromStr for DeviceAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        if text.is_empty() {
            return Err(AddressError::Empty);
        }
        let written = || text.to_owned();
        match text.strip_prefix("sim:") {
            Some(rest) => match check_sim(rest) {
                Ok(()) => Ok(DeviceAddress::Sim(rest.to_owned())),
                Err(source) => Err(AddressError::Sim { address: written(), source }),
            },
            None => {
                let address = vfio::Address::from_str(text).map_err(|_| AddressError::Form { address: written() })?;
                if let vfio::Address::VfioUser(path) = &address {
                    socket_path(path).map_err(|source| AddressError::Socket { address: written(), source })?;
                }
                Ok(DeviceAddress::Vfio(address))
            }
        }
    }
}

impl DeviceAddress {
    /// The number of namespaces of an embedded controller; `None`: the address does not say it.
    pub fn namespaces(&self) -> Option<u64> {
        self.simulated(|namespaces| namespaces.len() as u64)
    }
}

#[cfg(feature = "sim")]
impl DeviceAddress {
    /// The files in which an embedded controller keeps its blocks.
    pub fn files(&self) -> Vec<std::path::PathBuf> {
        self.simulated(|namespaces| namespaces.into_iter().filter_map(|namespace| namespace.file).collect())
            .unwrap_or_default()
    }

    /// Checks the files in which an embedded controller keeps its blocks; returns one line for each that cannot be used.
    pub fn check_files(&self) -> Vec<String> {
        let checked = |namespaces: Vec<nvme_sim::NamespaceConfig>| {
            namespaces
                .iter()
                .filter_map(|namespace| namespace.check_file().err())
                .map(|error| error.to_string())
                .collect()
        };
        self.simulated(checked).unwrap_or_default()
    }

    fn simulated<T>(&self, of: impl FnOnce(Vec<nvme_sim::NamespaceConfig>) -> T) -> Option<T> {
        match self {
            DeviceAddress::Vfio(_) => None,
            // It was read once before, when the address was made.
            DeviceAddress::Sim(text) => text.parse::<nvme_sim::SimAddress>().ok().map(|sim| of(sim.config.namespaces)),
        }
    }
}

#[cfg(not(feature = "sim"))]
impl DeviceAddress {
    /// The files in which an embedded controller keeps its blocks: none in this build.
    pub fn files(&self) -> Vec<std::path::PathBuf> {
        Vec::new()
    }

    /// Checks the files in which an embedded controller keeps its blocks: there are none in this build.
    pub fn check_files(&self) -> Vec<String> {
        Vec::new()
    }

    fn simulated<T>(&self, _of: impl FnOnce(Vec<()>) -> T) -> Option<T> {
        None
    }
}

impl TryFrom<String> for DeviceAddress {
    type Error = AddressError;

    fn try_from(text: String) -> Result<Self, AddressError> {
        text.parse()
    }
}

impl fmt::Display for DeviceAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceAddress::Vfio(address) => address.fmt(f),
            DeviceAddress::Sim(text) => write!(f, "sim:{text}"),
        }
    }
}

/// Checks what comes after `sim:`.
#[cfg(feature = "sim")]
fn check_sim(text: &str) -> Result<(), SimError> {
    text.parse::<nvme_sim::SimAddress>().map(drop).map_err(|error| SimError::Description(error.to_string()))
}

#[cfg(not(feature = "sim"))]
fn check_sim(_text: &str) -> Result<(), SimError> {
    Err(SimError::NotBuilt)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<DeviceAddress, AddressError> {
        text.parse()
    }

    #[test]
    fn sim_addresses() {
        for text in ["sim:1G", "sim:8192", "sim:2t,lba=4096", "sim:16K,file=disk.img", "sim:1G,write-cache=on,queues=2"]
        {
            assert_eq!(parse(text), Ok(DeviceAddress::Sim(text["sim:".len()..].into())));
        }
    }

    #[test]
    fn addresses_round_trip() {
        for text in ["sim:1G,lba=4096", "vfio-user:/run/x.sock", "0000:01:00.0"] {
            assert_eq!(parse(text).unwrap().to_string(), text);
        }
        assert_eq!(parse("01:00.0"), parse("0000:01:00.0"), "two spellings are one device");
    }

    #[test]
    fn wrong_addresses_say_what_to_do() {
        for (text, message) in [
            (
                "",
                "the device address is empty: use a PCI function such as 0000:01:00.0, vfio-user:PATH, or sim:SIZE[,lba=4096][,file=PATH]",
            ),
            (
                "nvme0",
                "device address \"nvme0\" is not valid: use a PCI function such as 0000:01:00.0, vfio-user:PATH, or sim:SIZE[,lba=4096][,file=PATH]",
            ),
        ] {
            assert_eq!(parse(text).unwrap_err().to_string(), message);
        }
        // What is wrong with a description is said by whoever reads it.
        for text in ["sim:", "sim:1X", "sim:é", "sim:99999999T", "sim:1G,lba=1024", "sim:1G,file=", "sim:1G,colour=red"]
        {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.starts_with(&format!("device address \"{text}\": ")) && !error.contains('\n'), "{error}");
        }
    }
}
