//! The controller in software inside this program, behind the address `sim:`.

#[cfg(feature = "sim")]
pub use present::Embedded;

#[cfg(feature = "sim")]
mod present {
    use nvme_sim::{SimAddress, Simulator};
    use tempfile::TempDir;

    /// A controller in software inside this process, behind a socket of its own that nobody else can reach.
    pub struct Embedded {
        simulator: Simulator,
        _directory: TempDir,
    }

    impl Embedded {
        /// Starts it. The error is one line.
        pub fn start(description: &str) -> Result<Embedded, String> {
            let cannot = |error: nvme_sim::Error| format!("cannot start the embedded controller: {error}");
            let address: SimAddress = description.parse().map_err(cannot)?;
            let directory = tempfile::Builder::new()
                .prefix("vhost-blk-")
                .tempdir()
                .map_err(|error| format!("cannot create a directory for the embedded controller's socket: {error}"))?;
            let simulator = Simulator::start(address.config, &directory.path().join("nvme.sock")).map_err(cannot)?;
            Ok(Embedded { simulator, _directory: directory })
        }

        /// Where to open it.
        pub fn address(&self) -> vfio::Address {
            vfio::Address::VfioUser(self.simulator.socket().to_owned())
        }
    }
}

#[cfg(not(feature = "sim"))]
pub use absent::Embedded;

#[cfg(not(feature = "sim"))]
mod absent {
    /// There is none in this build.
    pub enum Embedded {}

    impl Embedded {
        pub fn start(_description: &str) -> Result<Embedded, String> {
            Err("this program was built without its embedded controller (feature \"sim\"): use another device".into())
        }

        pub fn address(&self) -> vfio::Address {
            match *self {}
        }
    }
}
