//! The controller in software inside this program, behind the address `sim:`.

#[cfg(feature = "sim")]
pub(super) use present::Embedded;

#[cfg(feature = "sim")]
mod present {
    use std::fs::File;
    use std::io;
    use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
    use std::path::Path;

    use nvme_sim::{SimAddress, Simulator};
    use rustix::fs::OFlags;
    use tempfile::TempDir;

    use crate::drive::error::EmbeddedError;

    /// A controller in software inside this process, behind a socket of its own that nobody else can reach.
    pub(crate) struct Embedded {
        simulator: Simulator,
        _folder: Folder,
    }

    impl Embedded {
        /// Starts it.
        pub(crate) fn start(description: &str) -> Result<Embedded, EmbeddedError> {
            let address: SimAddress = description.parse().map_err(EmbeddedError::Simulator)?;
            // It maps guest memory in this process, too.
            nvme_sim::set_mapping_guard(crate::virtio::memory::guard_mapping);
            let parent = std::env::temp_dir();
            sweep(&parent);
            let folder = Folder::new(&parent).map_err(EmbeddedError::Directory)?;
            let simulator = Simulator::start(address.config, &folder.directory.path().join(SOCKET))
                .map_err(EmbeddedError::Simulator)?;
            Ok(Embedded { simulator, _folder: folder })
        }

        /// Where to open it.
        pub(crate) fn address(&self) -> vfio::Address {
            vfio::Address::VfioUser(self.simulator.socket().to_owned())
        }
    }

    /// What the folders of these sockets, and nothing else, are called.
    const PREFIX: &str = "vhost-blk-embedded-";
    const SOCKET: &str = "nvme.sock";

    /// A folder for a socket, locked as long as it is in use: the kernel releases the lock with the process, however that ends.
    struct Folder {
        // In this order they are dropped.
        directory: TempDir,
        _lock: File,
    }

    impl Folder {
        fn new(parent: &Path) -> io::Result<Folder> {
            loop {
                let directory = tempfile::Builder::new().prefix(PREFIX).tempdir_in(parent)?;
                // Until it is locked it looks like one that was left behind, and may be swept away.
                match lock(directory.path()) {
                    Ok(Some(lock)) => return Ok(Folder { directory, _lock: lock }),
                    Ok(None) => {}
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(error),
                }
            }
        }
    }

    /// Locks a folder of this user; `None` if another process has the lock, or has removed the folder meanwhile.
    fn lock(folder: &Path) -> io::Result<Option<File>> {
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW;
        let file = File::options().read(true).custom_flags(flags.bits() as i32).open(folder)?;
        let opened = file.metadata()?;
        if opened.uid() != rustix::process::geteuid().as_raw() || file.try_lock().is_err() {
            return Ok(None);
        }
        let now = std::fs::symlink_metadata(folder)?;
        Ok(((now.dev(), now.ino()) == (opened.dev(), opened.ino())).then_some(file))
    }

    /// Removes the folders of processes that were killed. What it cannot remove stays.
    fn sweep(parent: &Path) {
        let Ok(entries) = std::fs::read_dir(parent) else { return };
        for entry in entries.flatten() {
            if !entry.file_name().as_encoded_bytes().starts_with(PREFIX.as_bytes()) {
                continue;
            }
            let folder = entry.path();
            // Held until it is removed: nobody takes it for his own meanwhile.
            let Ok(Some(_lock)) = lock(&folder) else { continue };
            let _ = std::fs::remove_file(folder.join(SOCKET));
            // Only if nothing else is in it.
            match std::fs::remove_dir(&folder) {
                Ok(()) => log::debug!("{}: removed; a process that was killed had left it", folder.display()),
                Err(error) => log::debug!("{}: cannot be removed: {error}", folder.display()),
            }
        }
    }

    #[cfg(test)]
    mod tests {
        use std::os::unix::net::UnixListener;

        use super::*;

        #[test]
        fn folders_left_behind_are_swept_away_and_nothing_else() {
            let parent = tempfile::tempdir().unwrap();
            let make = |name: &str| {
                std::fs::create_dir(parent.path().join(name)).unwrap();
                drop(UnixListener::bind(parent.path().join(name).join(SOCKET)).unwrap());
                parent.path().join(name)
            };
            let used = Folder::new(parent.path()).unwrap();
            let (left, other) = (make("vhost-blk-embedded-left"), make("vhost-blk-demo-x"));
            let fuller = make("vhost-blk-embedded-fuller");
            std::fs::write(fuller.join("precious"), "").unwrap();
            let link = parent.path().join("vhost-blk-embedded-link");
            std::os::unix::fs::symlink(&other, &link).unwrap();
            sweep(parent.path());
            assert!(!left.exists());
            assert!(used.directory.path().exists() && other.join(SOCKET).exists() && link.is_symlink());
            assert!(fuller.join("precious").exists());
            let path = used.directory.path().to_owned();
            drop(used);
            assert!(!path.exists());
        }

        /// Whoever has a folder keeps it, while others sweep.
        #[test]
        fn nobody_is_swept_away_while_he_makes_his_folder() {
            let parent = tempfile::tempdir().unwrap();
            std::thread::scope(|scope| {
                for _ in 0..3 {
                    scope.spawn(|| {
                        for _ in 0..300 {
                            sweep(parent.path());
                            let folder = Folder::new(parent.path()).unwrap();
                            UnixListener::bind(folder.directory.path().join(SOCKET)).unwrap();
                            sweep(parent.path());
                            assert!(folder.directory.path().join(SOCKET).exists());
                        }
                    });
                }
            });
            assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 0);
        }
    }
}

#[cfg(not(feature = "sim"))]
pub(crate) use absent::Embedded;

#[cfg(not(feature = "sim"))]
mod absent {
    use crate::drive::error::EmbeddedError;

    /// There is none in this build.
    pub(crate) enum Embedded {}

    impl Embedded {
        pub(crate) fn start(_description: &str) -> Result<Embedded, EmbeddedError> {
            Err(EmbeddedError::NotBuilt)
        }

        pub(crate) fn address(&self) -> vfio::Address {
            match *self {}
        }
    }
}
