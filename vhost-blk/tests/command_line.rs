//! What the program says of its command line and its configuration, without serving anything.

mod common;
#[path = "common/program.rs"]
mod program;

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::PoisonError;

use nvme_sim::{Config, Simulator};
use program::*;
use rustix::process::Signal;

/// Runs it to its end.
fn run(args: &[&str]) -> Output {
    let _one = SPAWN.lock().unwrap_or_else(PoisonError::into_inner);
    command(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// A folder with a configuration file.
fn configured(contents: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("c.toml");
    std::fs::write(&file, contents).unwrap();
    (folder, file)
}

fn export(device: &str, socket: &Path, more: &str) -> String {
    format!("[[export]]\ndevice = \"{device}\"\nsocket-path = \"{}\"\n{more}\n", socket.display())
}

#[test]
fn checking_tells_what_would_be_served_and_opens_nothing() {
    // Neither the drives nor the folder exist.
    let first = export("0000:01:00.0", Path::new("/nowhere/a"), "namespace = 2\nread-only = true");
    let second =
        export("vfio-user:/nowhere/n", Path::new("/nowhere/b"), "queues = 4\nqueue-size = 256\nserial = \"DISK-B\"");
    let (_folder, file) = configured(&(first + &second));
    let output = run(&["--config", file.to_str().unwrap(), "--check"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(
        text(&output.stdout),
        "/nowhere/a: namespace 2 of 0000:01:00.0, 64 queues of up to 1024 entries, read-only\n\
         /nowhere/b: the only namespace of vfio-user:/nowhere/n, 4 queues of up to 256 entries, serial number DISK-B\n"
    );
    assert_eq!(text(&output.stderr), "");
    // Its options are checked in the same way, with a socket that is in use by now.
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    for words in [&["serve"][..], &[]] {
        let args = ["--device", "sim:64M", "--socket-path", socket.to_str().unwrap(), "--check"];
        let output = run(&[words, &args].concat());
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        assert_eq!(
            text(&output.stdout),
            format!("{}: the only namespace of sim:64M, 64 queues of up to 1024 entries\n", socket.display())
        );
    }
}

#[test]
fn what_is_wrong_with_a_configuration_has_the_status_of_wrong_usage() {
    let one = export("sim:64M", Path::new("/nowhere/a"), "");
    for (contents, whys) in [
        ("cpus = \n".to_owned(), &["line 1: "][..]),
        (one.clone() + "queus = 1\n", &["line 5: unknown field `queus`"]),
        (
            one.repeat(2),
            &["line 3: two exports use the socket /nowhere/a", "line 7: two exports use the socket /nowhere/a"],
        ),
        (String::new(), &["no export: add an [[export]] section"]),
        ("hold = -1\n".to_owned() + &one + "queues = 0\n", &["line 1: -1 seconds to wait", "line 6: 0 queues"]),
    ] {
        let (_folder, file) = configured(&contents);
        let file = file.to_str().unwrap();
        // The service manager, which does not try this again, and the check have to mean the same.
        for check in [&["--check"][..], &[]] {
            let output = run(&[&["--config", file], check].concat());
            assert_eq!(output.status.code(), Some(2), "{output:?}");
            let lines = text(&output.stderr);
            assert_eq!((lines.lines().count(), text(&output.stdout).as_str()), (whys.len(), ""), "{lines}");
            for (line, why) in lines.lines().zip(whys) {
                assert!(line.starts_with(&format!("vhost-blk: {file}")) && line.contains(why), "{lines}");
            }
        }
    }
    for args in [&["--config", "/nowhere/c.toml"][..], &["--check"], &["--device", "sim:64M"], &[]] {
        assert_eq!(run(args).status.code(), Some(2), "{args:?}");
    }
    // What is not there may be there later.
    assert_eq!(run(&["--device", "sim:64M", "--socket-path", "/nowhere/s"]).status.code(), Some(1));
}

#[test]
fn checking_tells_what_would_be_served_and_everything_that_is_wrong() {
    let too_long = format!("/{}", "x".repeat(107));
    let contents = [
        export("sim:64M", Path::new("/nowhere/a"), "queues = 0\nserial = \"\""),
        export("sim:64M", Path::new("/nowhere/b"), ""),
        export("sim:64M", Path::new(&too_long), ""),
    ];
    let (_folder, file) = configured(&contents.concat());
    let output = run(&["--config", file.to_str().unwrap(), "--check"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let served = "/nowhere/b: the only namespace of sim:64M, 64 queues of up to 1024 entries\n";
    assert_eq!(text(&output.stdout), served);
    let lines = text(&output.stderr);
    let whys = ["line 4: 0 queues", "line 5: serial \"\"", "has 108 bytes"];
    assert_eq!(lines.lines().count(), whys.len(), "{lines}");
    lines.lines().zip(whys).for_each(|(line, why)| assert!(line.contains(why), "{lines}"));
}

#[test]
fn checking_the_machine_tells_what_it_lacks_and_disturbs_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let config = |exports: &[String]| {
        std::fs::write(path("c.toml"), exports.concat()).unwrap();
        path("c.toml").to_str().unwrap().to_owned()
    };
    let check = |config: &str| run(&["--config", config, "--check=machine"]);
    let good = export("sim:64M", &path("good"), "");
    let file = config(&[good.clone(), export("vfio-user:/nowhere/n", Path::new("/nowhere/s"), "")]);
    let output = check(&file);
    // The file is right.
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let lines = text(&output.stderr);
    assert!(lines.lines().count() == 2 && lines.lines().all(|line| line.starts_with("vhost-blk: ")), "{lines}");
    assert!(lines.contains("/nowhere does not exist") && lines.contains("vfio-user:/nowhere/n cannot be opened"));
    assert!(text(&output.stdout).contains("\n# not looked at: "), "{output:?}");
    // Both, and all of it.
    let output = check(&config(&[good.clone(), export("vfio-user:/nowhere/n", Path::new("/nowhere/s"), "queues = 0")]));
    assert_eq!((output.status.code(), text(&output.stderr).lines().count()), (Some(2), 1), "{output:?}");

    // What serves it by now may be started again; it hears nothing of that. Another configuration has to do without its socket.
    let file = config(std::slice::from_ref(&good));
    let mut program = Program::start(&["--config", &file], None);
    program.wait_for("is ready for a front-end");
    let output = check(&file);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(text(&output.stdout).contains("serves this configuration there now"), "{output:?}");
    let socket = path("good");
    let args = ["--device", "sim:64M", "--socket-path", socket.to_str().unwrap()];
    let output = run(&[&args[..], &["--check=machine"]].concat());
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(text(&output.stderr).contains(&format!("(process {}) does already", program.child.id())), "{output:?}");
    program.signal(Signal::TERM);
    assert_eq!(program.wait().code(), Some(0));
    program.wait_for("no ring has been used yet");
    assert_eq!(program.lines_with("a front-end connected"), 0);
}

#[test]
fn a_namespace_with_two_writers_is_told_once() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b, file) = (folder.path().join("a"), folder.path().join("b"), folder.path().join("c.toml"));
    std::fs::write(&file, export("sim:64M", &a, "") + &export("sim:64M", &b, "read-only = true")).unwrap();
    let output = run(&["--config", file.to_str().unwrap(), "--check"]);
    assert_eq!(output.status.code(), Some(0));
    let line = text(&output.stderr);
    let what = format!("{} and {} serve the same namespace of sim:64M", a.display(), b.display());
    assert!(line.contains(&what) && line.lines().count() == 1, "{line}");
    let mut program = Program::start(&["--config", file.to_str().unwrap()], None);
    common::eventually("two exports", || program.lines_with("is ready for a front-end") == 2);
    program.signal(Signal::TERM);
    assert_eq!(program.wait().code(), Some(0));
    program.wait_for("no ring has been used yet");
    assert_eq!(program.lines_with(&what), 1);
}

/// Runs it with its error stream in a file, which is the journal's stream or is not.
fn logged(args: &[&str], is_journal: bool) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    let file = File::create(&path).unwrap();
    let stat = file.metadata().unwrap();
    let stream = format!("{}:{}", stat.dev(), stat.ino() + u64::from(!is_journal));
    let status = {
        let _one = SPAWN.lock().unwrap_or_else(PoisonError::into_inner);
        command(args).env("JOURNAL_STREAM", stream).env("RUST_LOG", "debug").stderr(file).status().unwrap()
    };
    assert!(!status.success());
    std::fs::read_to_string(&path).unwrap()
}

#[test]
fn the_journal_is_told_the_level_of_a_line() {
    let folder = tempfile::tempdir().unwrap();
    let _drive = Simulator::start(Config::default(), &folder.path().join("nvme")).unwrap();
    let device = format!("vfio-user:{}", folder.path().join("nvme").display());
    // One export that is refused, and one for which the program ends.
    let (_file, config) = configured(
        &(export(&device, &folder.path().join("a"), "namespace = 9")
            + &export("sim:64M", &folder.path().join("b"), "namespace = 9")),
    );
    let args = ["--config", config.to_str().unwrap()];
    let log = logged(&args, true);
    let priorities = ["<3>", "<4>", "<6>", "<7>"];
    for line in log.lines() {
        assert!(priorities.iter().any(|priority| line.starts_with(priority)), "{line}");
    }
    assert!(log.lines().last().unwrap().starts_with("<3>vhost-blk: vfio-user:"), "{log}");
    assert!(log.lines().last().unwrap().contains("namespace 9 is not active"), "{log}");
    assert!(log.lines().next().unwrap().contains("line 8: sim:64M has no namespace 9"), "{log}");
    assert!(
        log.contains("\n<6>nvme_driver::controller: vfio-user:") || log.starts_with("<6>nvme_driver::controller"),
        "{log}"
    );
    let usage = logged(&["--sped"], true);
    assert!(usage.starts_with("<3>vhost-blk: unexpected argument"), "{usage}");
    // Elsewhere it looks as always.
    let log = logged(&args, false);
    assert!(log.lines().all(|line| line.starts_with('[') || line.starts_with("vhost-blk: ")), "{log}");
}

#[test]
fn the_help_tells_of_what_is_no_option() {
    for args in [&["--help"][..], &["serve", "--help"]] {
        let help = text(&run(args).stdout);
        for word in ["RUST_LOG", "SIGUSR1", "SIGTERM", "Exit status", "write-cache=on", "--check"] {
            assert!(help.contains(word), "{word}: {help}");
        }
    }
}
