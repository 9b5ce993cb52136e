//! The virtual machine monitor: what it can do, and how each side's disks are told to it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::Error;
use crate::options::Aio;
use crate::process::find_program;

/// For a QEMU that only says something and ends.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// The virtqueues of every disk, alike on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Queues {
    /// Virtqueues per disk.
    pub count: u32,
    /// Entries of each virtqueue.
    pub size: u32,
}

impl Queues {
    /// Virtqueues so large that a job of `depth` fits into one of them, as far as QEMU allows.
    pub(super) fn new(count: u32, depth: u32) -> Queues {
        Queues { count, size: depth.next_power_of_two().clamp(256, 1024) }
    }

    /// QEMU's properties of a disk on our target.
    pub(super) fn properties(self) -> String {
        format!("num-queues={},queue-size={}", self.count, self.size)
    }
}

/// How a disk of data-plane is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Access {
    /// Asynchronous I/O.
    pub aio: Aio,
    /// Around the page cache (O_DIRECT): `cache=none` in QEMU's shorter words.
    pub direct: bool,
}

impl Access {
    /// For a report.
    pub(super) fn words(self) -> String {
        let cache =
            if self.direct { "cache=none (O_DIRECT)" } else { "through the page cache (no O_DIRECT to be had)" };
        format!("aio={}, {cache}", self.aio.name())
    }
}

/// The program, and what of interest it can do.
#[derive(Clone, Debug)]
pub(super) struct Qemu {
    /// Where the program is.
    pub program: PathBuf,
    /// The version of QEMU, as a report tells it.
    pub version: String,
    /// Whether a disk's queues can be shared out among IOThreads (QEMU 9.0 and newer).
    pub maps_queues: bool,
}

impl Qemu {
    /// Finds it and asks it.
    pub(super) fn find() -> Result<Qemu, Error> {
        let program = find_program(Path::new("qemu-system-x86_64")).ok_or(Error::NoProgram {
            program: "qemu-system-x86_64".into(),
            advice: "install the package qemu-system-x86",
        })?;
        let version = crate::environment::version(&program);
        // "QEMU emulator version 10.0.2 (Debian …)"
        let number = version.split_whitespace().nth(3).unwrap_or("of an unknown version");
        let answer = answer_of(Command::new(&program).args(["-device", "virtio-blk-pci,help"]))?;
        let maps_queues = answer.output.contains("iothread-vq-mapping=");
        Ok(Qemu { version: format!("QEMU {number}"), program, maps_queues })
    }

    /// The fastest way to open `file` that works there: io_uring before Linux AIO, around the page cache if at all
    /// possible. `wanted` narrows it down to one.
    pub(super) fn access(&self, file: &Path, wanted: Option<Aio>) -> Result<Access, Error> {
        let mut refusals = Vec::new();
        for access in candidates(wanted) {
            match self.try_access(file, access)? {
                None => return Ok(access),
                Some(why) => refusals.push(format!("{}: {why}", access.words())),
            }
        }
        Err(Error::Options(format!("QEMU cannot open {}: {}", file.display(), refusals.join("; "))))
    }

    /// Starts a machine without a guest on the disk. Returns QEMU's reason if it does not take it.
    fn try_access(&self, file: &Path, access: Access) -> Result<Option<String>, Error> {
        let disk = DataPlaneDisk { number: 0, file, access };
        let mut command = Command::new(&self.program);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-S", "-accel", "tcg", "-machine", "q35"]);
        command.args(["-qmp", "stdio"]).args(iothread_arguments(1)).args(disk.arguments(
            Queues::new(1, 1),
            1,
            self.maps_queues,
        ));
        let answer = answer_of_talk(&mut command, QUIT)?;
        // Some versions go on with threads where io_uring is not to be had, with a warning.
        let worked = answer.success && !answer.errors.contains("falling back");
        let why = || answer.errors.lines().last().unwrap_or("no reason given").to_owned();
        Ok((!worked).then(why))
    }
}

/// QEMU's monitor takes no command before this one.
const QUIT: &str = "{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"quit\"}\n";

fn candidates(wanted: Option<Aio>) -> Vec<Access> {
    let all =
        [(Aio::IoUring, true), (Aio::Native, true), (Aio::IoUring, false), (Aio::Threads, true), (Aio::Threads, false)];
    // Threads are nobody's choice but the user's.
    let fits = |aio: Aio| wanted.map_or(aio != Aio::Threads, |wanted| aio == wanted);
    all.into_iter().filter(|&(aio, _)| fits(aio)).map(|(aio, direct)| Access { aio, direct }).collect()
}

/// The arguments that make `count` IOThreads.
pub(super) fn iothread_arguments(count: u32) -> Vec<String> {
    (0..count).flat_map(|number| ["-object".to_owned(), format!("iothread,id=io{number}")]).collect()
}

/// One disk of data-plane.
#[derive(Clone, Copy, Debug)]
pub(super) struct DataPlaneDisk<'a> {
    /// The number of the disk, from 0.
    pub number: u32,
    /// A file or a block device.
    pub file: &'a Path,
    /// How the disk is opened.
    pub access: Access,
}

impl DataPlaneDisk<'_> {
    /// QEMU's arguments for it: `queues` served by `iothreads` IOThreads. Where QEMU can share out the queues of
    /// a disk (`maps_queues`), they are, and otherwise each disk has one of the IOThreads.
    pub(super) fn arguments(&self, queues: Queues, iothreads: u32, maps_queues: bool) -> Vec<String> {
        let DataPlaneDisk { number, file, access } = *self;
        let cache = json!({ "direct": access.direct, "no-flush": false });
        let block_device = file.starts_with("/dev") && is_block_device(file);
        let mut below =
            json!({ "driver": if block_device { "host_device" } else { "file" }, "aio": access.aio.name() });
        below["filename"] = json!(file);
        below["cache"] = cache.clone();
        let node = json!({ "driver": "raw", "node-name": format!("disk{number}"), "cache": cache, "file": below });
        let mut device = json!({
            "driver": "virtio-blk-pci",
            "id": format!("virtio{number}"),
            "drive": format!("disk{number}"),
            "num-queues": queues.count,
            "queue-size": queues.size,
        });
        if maps_queues {
            // A disk cannot have more IOThreads than queues; the disks together go round all of them.
            let mine = (0..queues.count.min(iothreads)).map(|own| (number * queues.count + own) % iothreads);
            let mapping = mine.map(|io| json!({ "iothread": format!("io{io}") })).collect::<Vec<Value>>();
            device["iothread-vq-mapping"] = Value::Array(mapping);
        } else {
            device["iothread"] = json!(format!("io{}", number % iothreads));
        }
        vec!["-blockdev".into(), node.to_string(), "-device".into(), device.to_string()]
    }
}

fn is_block_device(file: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::metadata(file).is_ok_and(|metadata| metadata.file_type().is_block_device())
}

/// What a program said that ended by itself.
struct Answer {
    success: bool,
    output: String,
    errors: String,
}

fn answer_of(command: &mut Command) -> Result<Answer, Error> {
    answer_of_talk(command, "")
}

/// Runs a program that takes `input` and ends; kills it if it does not.
fn answer_of_talk(command: &mut Command, input: &str) -> Result<Answer, Error> {
    use std::io::{Read, Write};
    let name = command.get_program().to_string_lossy().into_owned();
    let failed = |source| Error::System { what: format!("running {name}"), source };
    let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = pipes.spawn().map_err(failed)?;
    // A program that has ended takes no input; its status tells.
    let mut pipe = child.stdin.take().expect("asked for above");
    let _ = pipe.write_all(input.as_bytes());
    let reader = |stream: Option<Box<dyn Read + Send>>| {
        let mut stream = stream.expect("asked for above");
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = stream.read_to_end(&mut bytes);
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let output = reader(child.stdout.take().map(|stream| Box::new(stream) as Box<dyn Read + Send>));
    let errors = reader(child.stderr.take().map(|stream| Box::new(stream) as Box<dyn Read + Send>));
    let deadline = Instant::now() + ANSWER_LIMIT;
    let status = loop {
        match child.try_wait().map_err(failed)? {
            Some(status) => break status,
            None if Instant::now() >= deadline => {
                let _ = child.kill();
                let _ = child.wait();
                let reason = errors.join().unwrap_or_default();
                return Err(Error::Timeout { what: format!("an answer of {name}"), limit: ANSWER_LIMIT, reason });
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    drop(pipe);
    let text = |thread: std::thread::JoinHandle<String>| thread.join().unwrap_or_default();
    Ok(Answer { success: status.success(), output: text(output), errors: text(errors) })
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAM: Access = Access { aio: Aio::IoUring, direct: true };

    fn json_after(arguments: &[String], option: &str) -> Value {
        let at = arguments.iter().position(|argument| argument == option).unwrap();
        serde_json::from_str(&arguments[at + 1]).unwrap()
    }

    #[test]
    fn a_disk_of_data_plane_goes_around_the_page_cache_through_the_wanted_aio() {
        let disk = DataPlaneDisk { number: 3, file: Path::new("/dev/shm/a,b.img"), access: RAM };
        let node = json_after(&disk.arguments(Queues::new(2, 1), 2, true), "-blockdev");
        assert_eq!(node["node-name"], "disk3");
        // A comma in the name would split an argument that is not JSON.
        assert_eq!(node["file"]["filename"], "/dev/shm/a,b.img");
        assert_eq!((&node["file"]["driver"], &node["file"]["aio"]), (&json!("file"), &json!("io_uring")));
        assert_eq!((&node["cache"]["direct"], &node["file"]["cache"]["direct"]), (&json!(true), &json!(true)));
        // A guest's flush must reach the disk.
        assert_eq!(node["file"]["cache"]["no-flush"], false);
    }

    #[test]
    fn queues_are_shared_out_among_iothreads_where_qemu_can() {
        let mapping = |number, queues, iothreads| {
            let disk = DataPlaneDisk { number, file: Path::new("x"), access: RAM };
            let device = json_after(&disk.arguments(Queues::new(queues, 300), iothreads, true), "-device");
            assert_eq!(device["num-queues"], queues);
            assert_eq!(device["queue-size"], 512);
            assert!(device.get("iothread").is_none(), "QEMU refuses both");
            let names = device["iothread-vq-mapping"].as_array().unwrap().clone();
            names.iter().map(|entry| entry["iothread"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(mapping(0, 4, 2), ["io0", "io1"]);
        assert_eq!(mapping(0, 2, 4), ["io0", "io1"], "not more than there are queues");
        assert_eq!(mapping(1, 2, 4), ["io2", "io3"]);
        assert_eq!(mapping(2, 1, 7), ["io2"], "one for each disk");
        assert_eq!(mapping(5, 2, 1), ["io0"]);
    }

    #[test]
    fn the_deepest_job_fits_into_a_queue() {
        assert_eq!(Queues::new(2, 1), Queues { count: 2, size: 256 });
        assert_eq!(Queues::new(1, 257).properties(), "num-queues=1,queue-size=512");
        assert_eq!(Queues::new(1, 5000).size, 1024);
    }

    #[test]
    fn older_versions_give_each_disk_one_iothread() {
        let disk = DataPlaneDisk { number: 3, file: Path::new("x"), access: RAM };
        let device = json_after(&disk.arguments(Queues::new(2, 1), 2, false), "-device");
        assert_eq!(device["iothread"], "io1");
        assert!(device.get("iothread-vq-mapping").is_none());
        assert_eq!(iothread_arguments(2), ["-object", "iothread,id=io0", "-object", "iothread,id=io1"]);
    }

    #[test]
    fn io_uring_without_the_page_cache_is_tried_first_and_threads_only_when_asked_for() {
        let names = |wanted| candidates(wanted).iter().map(|a| (a.aio.name(), a.direct)).collect::<Vec<_>>();
        assert_eq!(names(None), [("io_uring", true), ("native", true), ("io_uring", false)]);
        assert_eq!(names(Some(Aio::Native)), [("native", true)]);
        assert_eq!(names(Some(Aio::Threads)), [("threads", true), ("threads", false)]);
    }

    #[test]
    fn qemu_itself_takes_the_arguments() {
        let qemu = Qemu::find().unwrap();
        assert!(qemu.version.len() > "QEMU ".len());
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let access = qemu.access(file.path(), Some(Aio::Threads)).unwrap();
        assert_eq!(access.aio, Aio::Threads);
        let error = qemu.access(Path::new("/no/such/file"), None).unwrap_err().to_string();
        assert!(error.contains("/no/such/file") && error.contains("No such file"), "{error}");
    }
}
