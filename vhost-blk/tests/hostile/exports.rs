//! What is wrong with one export, or what is done to the program from outside, is no matter of another's disk.

use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::process::Signal;

use crate::common::*;
use crate::stand::*;

const IOERR: u8 = 1;

/// A front-end of a socket that is served soon.
fn connect(path: &Path) -> Front {
    let mut stream = None;
    eventually("its socket is served", || {
        stream = UnixStream::connect(path).ok();
        stream.is_some()
    });
    let front = Front::on(stream.unwrap());
    front.negotiate();
    front
}

/// The file of a simulated drive takes nothing more. Here it is one in memory that nobody may write; `tests/program.rs` fills a file
/// system where one can be mounted.
#[test]
fn a_file_that_cannot_take_more_under_a_simulated_drive() {
    let file = memfd_create("disk", MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&file, 16 * MIB).unwrap();
    fcntl_add_seals(&file, SealFlags::WRITE).unwrap();
    let device = format!("sim:16M,file=/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    let stand = Stand::with(|setup| {
        setup.more = format!("[[export]]\ndevice = \"{device}\"\nsocket-path = \"{{folder}}/full\"\n");
    });
    let mut neighbour = stand.neighbour();
    let front = connect(&stand.path("full"));
    neighbour.measure_alone();
    let region = Region::new(0, MIB);
    let mut ring = Ring::first(&front, &region);
    for block in 0..200 {
        assert_eq!(ring.write_one(8 * block), IOERR);
        assert_eq!(ring.read_one(8 * block), 0);
    }
    neighbour.verdict();
    assert!(
        (1..=3).contains(&stand.program.lines_with("commands for it fail until it can")),
        "it is told now and then"
    );
}

#[test]
fn exports_that_cannot_be_served() {
    let busy = tempfile::tempdir().unwrap();
    let busy = busy.path().join("busy");
    let in_use = UnixListener::bind(&busy).unwrap();
    let stand = Stand::with(|setup| {
        let export = |device: &str, socket: &str, more: &str| {
            format!("[[export]]\ndevice = \"{device}\"\nsocket-path = \"{socket}\"\n{more}\n")
        };
        setup.more = [
            export("sim:16M", "{folder}/later/s", ""),
            export("sim:32M", busy.to_str().unwrap(), ""),
            export("sim:16M,file={folder}/c.toml", "{folder}/text", ""),
            export("{device}", "{folder}/absent", "namespace = 7"),
            export("sim:16M", "{folder}/wrong", "queues = 0"),
        ]
        .concat();
    });
    let mut neighbour = stand.neighbour();
    neighbour.measure_alone();
    // Each is looked for a few times meanwhile.
    neighbour.answered(300);
    drop(in_use);
    std::fs::create_dir(stand.path("later")).unwrap();
    let region = Region::new(0, MIB);
    for path in [stand.path("later/s"), busy] {
        let front = connect(&path);
        let mut ring = Ring::first(&front, &region);
        ring.check_io(8);
        ring.stop(&front);
    }
    neighbour.verdict();
}

#[test]
fn signals_that_mean_nothing() {
    let stand = Stand::new();
    let mut neighbour = stand.neighbour();
    neighbour.measure_alone();
    for times in 1..=20 {
        let signal = if times % 2 == 0 { Signal::HUP } else { Signal::USR2 };
        stand.program.signal(signal);
        eventually("it is told", || stand.program.lines_with(" changes nothing: ") == times);
    }
    neighbour.verdict();
}
