//! The program with one worker and one drive, a socket for the hostile, one for the neighbour.
#![allow(dead_code)] // each row uses a part of it

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nvme_sim::{Config, NamespaceConfig, Simulator};
use tempfile::TempDir;

use crate::common::{Front, eventually};
use crate::neighbour::Neighbour;
use crate::program::{Program, command};

pub(crate) const MIB: u64 = 1 << 20;

/// One stand at a time: tests measure how long requests take.
static ONE: Mutex<()> = Mutex::new(());

/// What a test may want otherwise. Lines are of the configuration file.
pub(crate) struct Setup {
    /// The drive. Namespace 1 is the hostile's, namespace 2 the neighbour's; others are for `more`.
    pub drive: Config,
    /// Lines before the exports, such as `io-timeout = 2`.
    pub top: String,
    /// Lines of the hostile's export, such as `queue-size = 256`.
    pub hostile: String,
    /// Lines of the neighbour's export.
    pub neighbour: String,
    /// More text at the end: exports, whole. `{device}` and `{folder}` stand for the drive's address and the test's folder.
    pub more: String,
    /// More arguments.
    pub args: Vec<String>,
    /// More of the environment, such as `RUST_LOG`.
    pub env: Vec<(String, String)>,
}

impl Setup {
    /// The drive has one I/O queue pair, so that all rings share it.
    pub(crate) fn one_pair(&mut self) {
        self.drive.max_queue_pairs = 1;
    }

    /// The drive takes no SGLs: data at odd addresses is copied.
    pub(crate) fn no_sgl(&mut self) {
        self.drive.sgl = false;
    }

    /// Size of the hostile's namespace.
    pub(crate) fn hostile_bytes(&mut self, bytes: u64) {
        self.drive.namespaces[0].bytes = bytes;
    }
}

/// The program, serving. All of it goes when this is dropped.
pub(crate) struct Stand {
    // Dropped in this order.
    pub program: Program,
    /// The drive, in this process, so that faults can be set.
    pub drive: Simulator,
    pub folder: TempDir,
    _one: MutexGuard<'static, ()>,
}

impl Stand {
    pub(crate) fn new() -> Stand {
        Stand::with(|_| {})
    }

    /// The program is ready when this returns.
    pub(crate) fn with(change: impl FnOnce(&mut Setup)) -> Stand {
        let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let namespace = |bytes| NamespaceConfig { bytes, ..NamespaceConfig::default() };
        let drive = Config { namespaces: vec![namespace(256 * MIB), namespace(64 * MIB)], ..Config::default() };
        let mut setup = Setup {
            drive,
            top: String::new(),
            hostile: String::new(),
            neighbour: String::new(),
            more: String::new(),
            args: Vec::new(),
            env: Vec::new(),
        };
        change(&mut setup);
        let folder = tempfile::tempdir().unwrap();
        let drive = Simulator::start(setup.drive, &folder.path().join("nvme")).unwrap();
        let device = format!("vfio-user:{}", drive.socket().display());
        let at = folder.path().display().to_string();
        let export = |namespace: u32, socket: &str, more: &str| {
            format!(
                "[[export]]\ndevice = \"{device}\"\nnamespace = {namespace}\nsocket-path = \"{at}/{socket}\"\n{more}\n"
            )
        };
        let more = setup.more.replace("{device}", &device).replace("{folder}", &at);
        let text =
            [setup.top + "\n", export(1, "hostile", &setup.hostile), export(2, "neighbour", &setup.neighbour), more]
                .concat();
        let file = folder.path().join("c.toml");
        std::fs::write(&file, text).unwrap();
        let mut command = command(&["--config", file.to_str().unwrap()]);
        command.args(&setup.args).envs(setup.env).env("TMPDIR", folder.path());
        let program = Program::spawn(command, &[]);
        for socket in ["hostile", "neighbour"] {
            let told = [&format!("{at}/{socket}: "), "is ready for a front-end"];
            eventually("the sockets are served", || program.lines_with_all(&told) > 0);
        }
        Stand { program, drive, folder, _one: one }
    }

    /// A socket in the test's folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Where the hostile connects.
    pub(crate) fn socket(&self) -> PathBuf {
        self.path("hostile")
    }

    /// A connection to the hostile's socket that has said nothing.
    pub(crate) fn hostile(&self) -> Front {
        Front::connect(&self.socket())
    }

    /// A neighbour with its load.
    pub(crate) fn neighbour(&self) -> Neighbour {
        Neighbour::start(&self.path("neighbour"), &self.program)
    }

    /// A neighbour on another socket than its own.
    pub(crate) fn neighbour_on(&self, socket: &Path) -> Neighbour {
        Neighbour::start(socket, &self.program)
    }
}
