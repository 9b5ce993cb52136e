//! One side, up and running: its programs, its sockets.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::placement::{Placement, list};
use super::{drive, storage};
use crate::comparison::Side;
use crate::options::Aio;
use crate::process::{Process, find_program};
use crate::{Error, Plan};

/// How long a program may take until it listens.
const START_LIMIT: Duration = Duration::from_secs(60);
/// Longest virtqueue: what both targets accept.
pub(super) const QUEUE_SIZE: u32 = 1024;

/// How to start the sides.
pub(super) struct Recipe<'p> {
    /// What is wanted.
    pub plan: &'p Plan,
    /// Where everybody runs.
    pub placement: &'p Placement,
    /// Data-plane's way to its file or disk.
    pub aio: Aio,
    /// Its file or disk is opened past the page cache.
    pub direct: bool,
    /// Our target.
    pub vhost_blk: PathBuf,
    /// Data-plane.
    pub storage_daemon: PathBuf,
    /// For sockets, logs and the configuration.
    pub folder: PathBuf,
    /// For files in memory.
    pub memory: PathBuf,
}

/// A side that serves its disks.
#[derive(Debug)]
pub(super) struct Stand {
    /// Which.
    pub side: Side,
    target: Process,
    drive: Option<Process>,
    sockets: Vec<PathBuf>,
}

impl Recipe<'_> {
    /// Starts `side`.
    pub(super) fn start(&self, side: Side) -> Result<Stand, Error> {
        let name = match side {
            Side::VhostBlk => "vhost-blk",
            Side::DataPlane => "data-plane",
            Side::DataPlaneNull => "null",
        };
        let sockets: Vec<PathBuf> =
            (0..self.plan.most_disks()).map(|disk| self.folder.join(format!("{name}-{disk}.sock"))).collect();
        for socket in &sockets {
            // Left behind by a program that was killed.
            let _ = std::fs::remove_file(socket);
        }
        let (mut target, drive) = match side {
            Side::VhostBlk => self.start_vhost_blk(&sockets)?,
            Side::DataPlane | Side::DataPlaneNull => (self.start_storage_daemon(side, &sockets)?, None),
        };
        target.wait_until("listening", START_LIMIT, || are_listening(&sockets))?;
        Ok(Stand { side, target, drive, sockets })
    }

    fn start_vhost_blk(&self, sockets: &[PathBuf]) -> Result<(Process, Option<Process>), Error> {
        let (drive, device) = match &self.plan.device {
            Some(device) => (None, device.clone()),
            None => {
                let drive = self.start_drive()?;
                (Some(drive), format!("vfio-user:{}", self.drive_socket().display()))
            }
        };
        let path = self.folder.join("vhost-blk.toml");
        let text = self.vhost_blk_config(&device, drive.is_some(), sockets);
        std::fs::write(&path, text).map_err(Error::system(format!("writing {}", path.display())))?;
        let arguments = ["--config".to_owned(), path.display().to_string()];
        let log = self.folder.join("vhost-blk.log");
        let target = Process::start("vhost-blk", &self.vhost_blk, arguments, &self.placement.side, &log)?;
        Ok((target, drive))
    }

    fn vhost_blk_config(&self, device: &str, several: bool, sockets: &[PathBuf]) -> String {
        let mut text = format!("cpus = \"{}\"\n", list(&self.placement.side));
        for (disk, socket) in sockets.iter().enumerate() {
            text += &format!(
                "[[export]]\ndevice = {device:?}\nsocket-path = {:?}\nqueues = {}\nqueue-size = {QUEUE_SIZE}\n",
                socket.display().to_string(),
                self.plan.queues,
            );
            if several {
                text += &format!("namespace = {}\n", disk + 1);
            }
        }
        text
    }

    fn drive_socket(&self) -> PathBuf {
        self.folder.join("drive.sock")
    }

    fn start_drive(&self) -> Result<Process, Error> {
        let program = std::env::current_exe().map_err(Error::system("asking for this program's own path"))?;
        let socket = self.drive_socket();
        let disks = self.plan.most_disks();
        let arguments = drive::arguments(&socket, self.plan.disk_bytes, disks, disks * self.plan.queues);
        let log = self.folder.join("drive.log");
        let mut drive = Process::start("the drive in software", &program, arguments, &self.placement.drive, &log)?;
        drive.wait_until("listening", START_LIMIT, || are_listening(std::slice::from_ref(&socket)))?;
        Ok(drive)
    }

    fn start_storage_daemon(&self, side: Side, sockets: &[PathBuf]) -> Result<Process, Error> {
        let mut arguments = Vec::new();
        for (at, _) in self.placement.side.iter().enumerate() {
            arguments.extend(["--object".to_owned(), format!("iothread,id=thread{at}")]);
        }
        for (disk, socket) in sockets.iter().enumerate() {
            let node = match (side, &self.plan.kernel_device) {
                (Side::DataPlaneNull, _) => serde_json::json!({
                    "driver": "null-co", "node-name": format!("disk{disk}"), "size": self.plan.disk_bytes,
                    "read-zeroes": false,
                }),
                (_, Some(path)) => self.file_node(disk, path),
                (_, None) => {
                    let path = self.memory.join(format!("disk{disk}"));
                    make_file(&path, self.plan.disk_bytes)?;
                    self.file_node(disk, &path)
                }
            };
            let export = serde_json::json!({
                "type": "vhost-user-blk", "id": format!("export{disk}"), "node-name": format!("disk{disk}"),
                "writable": true, "num-queues": self.plan.queues, "logical-block-size": 512,
                "iothread": format!("thread{}", disk % self.placement.side.len()),
                "addr": { "type": "unix", "path": socket },
            });
            arguments.extend(["--blockdev".to_owned(), node.to_string(), "--export".to_owned(), export.to_string()]);
        }
        let log = self.folder.join(format!("{side:?}.log"));
        Process::start("qemu-storage-daemon", &self.storage_daemon, arguments, &self.placement.side, &log)
    }

    fn file_node(&self, disk: usize, path: &Path) -> serde_json::Value {
        serde_json::json!({
            "driver": if storage::is_block_device(path) { "host_device" } else { "file" },
            "node-name": format!("disk{disk}"), "filename": path, "aio": self.aio.name(),
            "cache": { "direct": self.direct, "no-flush": false },
        })
    }
}

impl Stand {
    /// The sockets of the first `count` disks.
    pub(super) fn sockets(&self, count: u32) -> &[PathBuf] {
        &self.sockets[..count as usize]
    }

    /// Stands still until [`resume`](Stand::resume). The drive after the target, so that no command of the target waits.
    pub(super) fn hold(&mut self) -> Result<(), Error> {
        self.target.hold()?;
        self.drive.as_mut().map_or(Ok(()), Process::hold)
    }

    /// Goes on.
    pub(super) fn resume(&self) -> Result<(), Error> {
        self.drive.as_ref().map_or(Ok(()), Process::resume)?;
        self.target.resume()
    }

    /// Fails if one of its programs has ended.
    pub(super) fn check_alive(&mut self) -> Result<(), Error> {
        self.target.check_alive()?;
        self.drive.as_mut().map_or(Ok(()), Process::check_alive)
    }

    /// CPU time so far: the target's, and the drive's if there is one in software.
    pub(super) fn cpu_times(&self) -> Result<(Duration, Option<Duration>), Error> {
        let drive = self.drive.as_ref().map(Process::cpu_time).transpose()?;
        Ok((self.target.cpu_time()?, drive))
    }

    /// Ends its programs in order.
    pub(super) fn stop(self) -> Result<(), Error> {
        // A drive that is held could not take part in the target's shutdown.
        self.resume()?;
        let status = self.target.stop()?;
        if !status.success() {
            let reason = "success was expected".to_owned();
            return Err(Error::Ended { program: self.side.to_string(), status, reason });
        }
        self.drive.map_or(Ok(()), |drive| drive.stop().map(drop))
    }
}

/// The program of data-plane.
pub(super) fn storage_daemon(wanted: Option<&Path>) -> Result<PathBuf, Error> {
    let name = wanted.unwrap_or(Path::new("qemu-storage-daemon"));
    find_program(name).ok_or_else(|| Error::NoProgram {
        program: name.display().to_string(),
        advice: "install QEMU's tools (Debian: qemu-utils), or say where it is with --storage-daemon PATH",
    })
}

fn make_file(path: &Path, bytes: u64) -> Result<(), Error> {
    let file = std::fs::File::options().create(true).truncate(false).write(true).open(path);
    file.and_then(|file| file.set_len(bytes)).map_err(Error::system(format!("making {}", path.display())))
}

/// True if there is a program that accepts connections on each of `sockets`. A connection would not do to find out: the
/// targets serve one at a time.
fn are_listening(sockets: &[PathBuf]) -> bool {
    const ACCEPTS_CONNECTIONS: &str = "00010000";
    let table = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
    // Number, references, protocol, flags, type, state, inode, path.
    let listening = |line: &str, path: &str| {
        let mut fields = line.split_ascii_whitespace();
        fields.nth(3) == Some(ACCEPTS_CONNECTIONS) && fields.next_back() == Some(path)
    };
    sockets.iter().all(|socket| table.lines().any(|line| listening(line, &socket.to_string_lossy())))
}
