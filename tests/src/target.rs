use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::initramfs::find_program;
use crate::{Error, Process, build_dir, poll};

/// A running program that serves vhost-user-blk sockets: `vhost-blk`, or a peer.
pub struct Target {
    process: Process,
    name: &'static str,
    sockets: Vec<PathBuf>,
}

/// Which program serves a disk that both can.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// `vhost-blk`.
    VhostBlk,
    /// QEMU's storage daemon: a target known to be good, on which a test can be proved (see [`Peer::wanted`]).
    QemuStorageDaemon,
}

impl Peer {
    /// `vhost-blk`, unless the environment's `E2E_PEER` says `qemu-storage-daemon`.
    pub fn wanted() -> Peer {
        match std::env::var("E2E_PEER").as_deref() {
            Err(_) | Ok("" | "vhost-blk") => Peer::VhostBlk,
            Ok("qemu-storage-daemon") => Peer::QemuStorageDaemon,
            Ok(other) => panic!("E2E_PEER={other}: neither vhost-blk nor qemu-storage-daemon"),
        }
    }
}

impl Target {
    const START_LIMIT: Duration = Duration::from_secs(30);
    const STOP_LIMIT: Duration = Duration::from_secs(30);

    /// Serves one disk of `mib` MiB, kept in `folder/disk.img` from run to run, on `folder/disk.sock`: by the program
    /// that [`Peer::wanted`] names; ours gets a drive with a write cache. `lba` is the logical block size in bytes, `more`
    /// further arguments of `vhost-blk`.
    pub fn serve_disk(folder: &Path, mib: u64, lba: u32, more: &[&str]) -> Result<Target, Error> {
        let (file, socket) = (folder.join("disk.img"), folder.join("disk.sock"));
        match Peer::wanted() {
            Peer::VhostBlk => {
                let device = format!("sim:{mib}M,lba={lba},write-cache=on,file={}", file.display());
                let socket_text = socket.display().to_string();
                let mut arguments = vec!["--device", &device, "--socket-path", &socket_text];
                arguments.extend(more);
                Target::vhost_blk(folder, &arguments, vec![socket.clone()])
            }
            Peer::QemuStorageDaemon => {
                let image = File::options().create(true).truncate(false).write(true).open(&file);
                let sized = image.and_then(|image| image.set_len(mib << 20));
                sized.map_err(Error::doing(format!("making {}", file.display())))?;
                let read_only = more.contains(&"--read-only");
                let backend = format!("driver=file,node-name=disk,discard=unmap,filename={}", file.display());
                let export = format!(
                    "type=vhost-user-blk,id=disk,node-name=disk,writable={},num-queues=8,logical-block-size={lba},\
                     addr.type=unix,addr.path={}",
                    if read_only { "off" } else { "on" },
                    socket.display()
                );
                let name = "qemu-storage-daemon";
                let program = find_program(Path::new(name))?;
                let arguments = ["--blockdev", &backend, "--export", &export];
                let process = Process::start(name, &program, arguments, &[], &folder.join("target.log"), false)?;
                Target { process, name, sockets: vec![socket] }.await_sockets()
            }
        }
    }

    /// Starts `vhost-blk` with these arguments and waits until it listens on all of `sockets`. Its log is added to
    /// `folder/target.log`. The program is `VHOST_BLK` of the environment, or the release build of this workspace.
    pub fn vhost_blk(folder: &Path, arguments: &[&str], sockets: Vec<PathBuf>) -> Result<Target, Error> {
        let name = "vhost-blk";
        let program = vhost_blk_program()?;
        // The tests look at the counters that are logged at the end.
        let level = std::env::var("RUST_LOG")
            .map_or("info".to_owned(), |level| format!("vhost_blk::vhost_user::export=info,{level}"));
        // The folder of its embedded controllers goes with the test's, however it ends.
        let environment = [
            ("RUST_LOG".to_owned(), level),
            ("RUST_BACKTRACE".to_owned(), "1".to_owned()),
            ("TMPDIR".to_owned(), folder.display().to_string()),
        ];
        let process = Process::start(name, &program, arguments, &environment, &folder.join("target.log"), false)?;
        Target { process, name, sockets }.await_sockets()
    }

    /// The first socket.
    pub fn socket(&self) -> &Path {
        self.sockets.first().expect("a target serves at least one socket")
    }

    /// All sockets, in the order of the exports.
    pub fn sockets(&self) -> &[PathBuf] {
        &self.sockets
    }

    /// What the target has logged so far.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// The process: to look after it, or to send it a signal.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Asks it to end (SIGTERM) and returns its whole log; fails unless it ends by itself, with success and without
    /// having panicked before.
    pub fn stop(mut self) -> Result<String, Error> {
        self.process.check_alive()?;
        self.process.signal("TERM")?;
        let status = self.process.wait(Self::STOP_LIMIT)?;
        let program = self.name.to_owned();
        if !status.success() {
            return Err(Error::Ended { program, status, expected: ", and not with success, after SIGTERM" });
        }
        let log = self.log();
        if log.contains("panicked at") {
            return Err(Error::Ended { program, status, expected: " after a thread of it had panicked (see its log)" });
        }
        Ok(log)
    }

    fn await_sockets(mut self) -> Result<Target, Error> {
        let waiting_for = format!("{} to listen on {:?}", self.name, self.sockets);
        let (process, sockets) = (&mut self.process, &self.sockets);
        let result = poll(Self::START_LIMIT, &waiting_for, || {
            process.check_alive()?;
            Ok(are_listening(sockets)?.then_some(()))
        });
        // Why it did not start is in its log, which a caller that passes the error on would not see.
        result.inspect_err(|_| eprintln!("==== log of {} ====\n{}", self.name, self.process.log()))?;
        Ok(self)
    }
}

/// The program to be tested: `VHOST_BLK` of the environment, or the release build of this workspace.
pub fn vhost_blk_program() -> Result<PathBuf, Error> {
    let path = match std::env::var_os("VHOST_BLK") {
        Some(path) => PathBuf::from(path),
        None => build_dir().join("release/vhost-blk"),
    };
    if path.is_file() {
        return Ok(path);
    }
    let advice = "build it with `cargo build --release`, or name another build in the environment's VHOST_BLK";
    Err(Error::Missing { what: "the program to be tested", path, advice })
}

/// Whether all of `sockets` are listened on, without connecting: a connection would be a front-end's.
pub fn are_listening(sockets: &[PathBuf]) -> Result<bool, Error> {
    const ACCEPTS_CONNECTIONS: &str = "00010000";
    let table = std::fs::read_to_string("/proc/net/unix").map_err(Error::doing("reading /proc/net/unix"))?;
    // Number, references, protocol, flags, type, state, inode, path.
    let listening = |line: &str, path: &str| {
        let mut fields = line.split_whitespace();
        fields.nth(3) == Some(ACCEPTS_CONNECTIONS) && fields.last() == Some(path)
    };
    Ok(sockets.iter().all(|socket| table.lines().any(|line| listening(line, &socket.to_string_lossy()))))
}
