//! The control socket, as its clients meet it.

mod common;
#[path = "common/program.rs"]
mod program;

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::*;
use program::*;
use rustix::process::Signal;
use serde_json::{Value, json};

/// A program with a control socket, and its folder.
struct Target {
    program: Program,
    folder: tempfile::TempDir,
}

impl Target {
    fn start(more: &[&str]) -> Target {
        let folder = tempfile::tempdir().unwrap();
        let rpc = folder.path().join("rpc.sock");
        let args = [&["--rpc-socket", rpc.to_str().unwrap()], more].concat();
        let program = Program::serve(&folder.path().join("disk0.sock"), &args);
        program.wait_for("the control socket is ready");
        Target { program, folder }
    }

    fn rpc(&self) -> PathBuf {
        self.folder.path().join("rpc.sock")
    }

    fn client(&self) -> Client {
        Client::connect(&self.rpc())
    }

    /// The result of a call on a connection of its own.
    #[track_caller]
    fn call(&self, method: &str, params: Value) -> Value {
        self.client().call(method, params).unwrap()
    }
}

/// A client that reads answers as they come.
struct Client {
    stream: UnixStream,
    come: Vec<u8>,
}

impl Client {
    fn connect(path: &Path) -> Client {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        Client { stream, come: Vec::new() }
    }

    fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).unwrap();
    }

    /// The next answer; `None`: the connection has ended.
    fn read(&mut self) -> Option<Value> {
        loop {
            if let Some(end) = self.come.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.come.drain(..=end).collect();
                return Some(serde_json::from_slice(&line).unwrap());
            }
            let mut bytes = [0; 4096];
            match self.stream.read(&mut bytes) {
                Ok(0) => return None,
                Ok(count) => self.come.extend(&bytes[..count]),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("no answer: {error}"),
            }
        }
    }

    /// The result of a call, or its error's code and text.
    fn call(&mut self, method: &str, params: Value) -> Result<Value, (i64, String)> {
        let mut request = json!({"jsonrpc": "2.0", "method": method, "id": 1});
        if !params.is_null() {
            request["params"] = params;
        }
        // As SPDK's client sends it: in several lines, with none at the end.
        self.send(&serde_json::to_string_pretty(&request).unwrap());
        let mut answer = self.read().expect("an answer");
        assert_eq!((&answer["jsonrpc"], &answer["id"]), (&json!("2.0"), &json!(1)), "{answer}");
        match answer.get("error") {
            Some(error) => Err((error["code"].as_i64().unwrap(), error["message"].as_str().unwrap().to_owned())),
            None => Ok(answer["result"].take()),
        }
    }
}

fn code(result: Result<Value, (i64, String)>) -> i64 {
    result.map_or_else(|(code, _)| code, |result| panic!("it is answered with {result}"))
}

#[test]
fn every_method_answers_both_generations_of_clients() {
    let target = Target::start(&["--cpus", "0", "--read-only"]);
    let call = |method: &str, params: Value| target.call(method, params);
    assert_eq!(call("spdk_get_version", json!(null))["fields"]["major"], 0);
    let names = call("rpc_get_methods", json!(null));
    for params in [json!({"current": true, "include_aliases": false}), json!({"include_aliases": false}), json!({})] {
        assert_eq!(call("rpc_get_methods", params), names);
    }
    let names: Vec<&str> = names.as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    assert!(names.contains(&"vhost_get_controllers") && !names.contains(&"framework_start_init"), "{names:?}");
    assert_eq!(call("framework_wait_init", json!(null)), true);
    // save_config, as SPDK's client makes it.
    let subsystems = call("framework_get_subsystems", json!(null));
    let mut seen = Vec::new();
    for subsystem in subsystems.as_array().unwrap() {
        assert!(subsystem["depends_on"].as_array().unwrap().iter().all(|other| seen.contains(other)));
        seen.push(subsystem["subsystem"].clone());
        for params in
            [json!({"name": subsystem["subsystem"]}), json!({"name": subsystem["subsystem"], "with_batches": false})]
        {
            assert_eq!(call("framework_get_config", params), Value::Null);
        }
    }
    assert_eq!(seen, ["bdev", "vhost_blk"]);
    let reactors = call("framework_get_reactors", json!(null));
    assert_eq!(reactors["pid"], target.program.child.id());
    assert_eq!(reactors["reactors"][0]["lcore"], 0);
    let threads = call("thread_get_stats", json!(null));
    assert_eq!(threads["threads"], json!([{"name": "worker 0", "id": 1, "cpumask": "0x1"}]));

    let mut client = target.client();
    assert_eq!(code(client.call("framework_start_init", json!(null))), -1);
    assert_eq!(code(client.call("framework_get_config", json!({"name": "nbd"}))), -32602);
    assert_eq!(code(client.call("framework_get_config", json!(null))), -32602);
    assert_eq!(code(client.call("spdk_get_version", json!({"verbose": true}))), -32602);
    assert_eq!(code(client.call("bdev_get_bdevs", json!(null))), -32601, "what comes later is not there");
    assert_eq!(
        client.call("vhost_get_controllers", json!({"name": "disk1.sock"})),
        Err((-32603, "No such device".into()))
    );
}

#[test]
fn disks_are_told_with_their_front_ends() {
    let target = Target::start(&["--cpus", "0"]);
    let disk = target.folder.path().join("disk0.sock");
    let expected = |sessions: Value| {
        json!([{
            "ctrlr": "disk0.sock", "cpumask": "0x1", "delay_base_us": 0, "iops_threshold": 60000, "socket": disk,
            "sessions": sessions,
            "backend_specific": {"block": {"readonly": false, "bdev": "sim:64Mn1", "transport": "vhost_user_blk"}},
        }])
    };
    let controllers = || target.call("vhost_get_controllers", json!(null));
    assert_eq!(controllers(), expected(json!([])));
    let text = serde_json::to_string(&json!({"method": "vhost_get_controllers", "id": 1})).unwrap();
    let mut client = target.client();
    client.send(&text);
    client.read().unwrap();
    assert_eq!(target.call("vhost_get_controllers", json!({"name": "disk0.sock"})), expected(json!([])));

    let front = Front::connect(&disk);
    front.negotiate();
    let session = |started: bool| json!([{"vid": 1, "id": 1, "name": "disk0.socks1", "started": started, "max_queues": u16::from(started)}]);
    eventually("the front-end is there", || controllers() == expected(session(false)));
    let region = Region::new(0, 1 << 20);
    let mut ring = Ring::first(&front, &region);
    ring.check_io(8);
    assert_eq!(controllers(), expected(session(true)));
    ring.stop(&front);
    assert_eq!(controllers(), expected(session(false)));
    drop(front);
    eventually("the front-end is gone", || controllers() == expected(json!([])));
}

#[test]
fn the_order_of_members_is_spdks() {
    let target = Target::start(&[]);
    let mut client = target.client();
    client.send(r#"{"method":"vhost_get_controllers","id":1}"#);
    let mut come = Vec::new();
    while !come.ends_with(b"\n") {
        let mut byte = [0];
        client.stream.read_exact(&mut byte).unwrap();
        come.extend(byte);
    }
    let text = String::from_utf8(come).unwrap();
    let places = ["ctrlr", "cpumask", "delay_base_us", "iops_threshold", "socket", "sessions", "backend_specific"]
        .map(|name| text.find(&format!("\"{name}\"")).unwrap());
    assert!(places.is_sorted(), "{text}");
}

#[test]
fn the_log_level_is_really_set_and_who_sets_it_is_told() {
    let target = Target::start(&[]);
    let changes = |level: &str| {
        assert_eq!(target.call("log_set_level", json!({"level": level})), true);
        assert_eq!(target.call("log_get_level", json!(null)), level.to_uppercase());
    };
    assert_eq!(target.call("log_get_level", json!(null)), "NOTICE");
    let come = || {
        let front = Front::connect(&target.folder.path().join("disk0.sock"));
        front.negotiate();
    };
    let gone = |count: usize| {
        eventually("the front-end is gone", || target.program.lines_with("the front-end disconnected") == count);
    };
    come();
    gone(1);
    changes("debug");
    let uid = rustix::process::getuid().as_raw();
    target
        .program
        .wait_for(&format!("log_set_level {{\"level\":\"debug\"}} by uid {uid}, process {}: done", std::process::id()));
    // A client that says nothing is told of at this level only.
    drop(UnixStream::connect(target.folder.path().join("disk0.sock")).unwrap());
    target.program.wait_for("DEBUG vhost_blk::vhost_user::server] ");
    changes("ERROR");
    let lines = target.program.lines_with("");
    come();
    changes("NOTICE");
    come();
    // Nothing of the quiet time.
    gone(2);
    let quiet = target.program.lines_with("") - lines;
    assert!(quiet <= 4, "{quiet} lines: the change, and one front-end that came and went");
    assert_eq!(code(target.client().call("log_set_level", json!({"level": "LOUD"}))), -32602);
    target.program.wait_for("log_set_level {\"level\":\"LOUD\"} by uid");
}

#[test]
fn a_killed_instance_ends_as_by_the_signal_and_answers_before() {
    for name in ["SIGTERM", "SIGINT"] {
        let mut target = Target::start(&[]);
        let mut client = target.client();
        assert_eq!(code(client.call("spdk_kill_instance", json!({"sig_name": "SIGSTOP"}))), -32602);
        assert_eq!(client.call("spdk_kill_instance", json!({"sig_name": name})), Ok(true.into()));
        assert_eq!(client.read(), None);
        assert_eq!(target.program.wait().code(), Some(0));
        assert!(target.program.lines_with("spdk_kill_instance") > 0);
        let left: Vec<_> =
            std::fs::read_dir(target.folder.path()).unwrap().map(|file| file.unwrap().file_name()).collect();
        assert!(left.iter().all(|name| !name.to_string_lossy().contains("sock")), "{left:?}");
    }
}

#[test]
fn a_stream_is_cut_however_it_comes() {
    let target = Target::start(&[]);
    let mut client = target.client();
    // Byte by byte.
    for byte in r#"{"method":"framework_wait_init","id":"é"}"#.as_bytes() {
        client.stream.write_all(&[*byte]).unwrap();
    }
    assert_eq!(client.read().unwrap(), json!({"jsonrpc": "2.0", "id": "é", "result": true}));
    // Several at once, with a notification, a batch, an empty batch and things that are no requests.
    client.send(
        r#"{"method":"framework_wait_init","id":1}{"method":"framework_wait_init"}
        [{"method":"framework_wait_init","id":2},{"method":"no","id":3},{"method":"no"}][] 5 "x"
        [{"method":"framework_wait_init"}] {"method":"framework_wait_init","id":4}"#,
    );
    assert_eq!(client.read().unwrap()["id"], 1);
    let batch = client.read().unwrap();
    assert_eq!(batch.as_array().unwrap().len(), 2);
    assert_eq!((&batch[0]["result"], &batch[1]["error"]["code"]), (&json!(true), &json!(-32601)));
    for _ in 0..3 {
        assert_eq!(client.read().unwrap()["error"]["code"], -32600);
    }
    assert_eq!(client.read().unwrap()["id"], 4, "a batch of notifications has no answer");
    // A client that has said all and waits for the rest.
    client.send(r#"{"method":"framework_wait_init","id":5} 7"#);
    client.stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(client.read().unwrap()["id"], 5);
    assert_eq!(client.read().unwrap()["error"]["code"], -32600);
    assert_eq!(client.read(), None);
}

#[test]
fn what_makes_no_sense_ends_its_own_connection() {
    let target = Target::start(&[]);
    let mut other = target.client();
    let deep = "[".repeat(100);
    let long = format!("\"{}", "a".repeat(300_000));
    let many = format!("[{}1]", "1,".repeat(9000));
    for (text, expected) in [
        ("GET / HTTP/1.1\r\n\r\n", -32700),
        ("{\"method\":}", -32700),
        ("{\"a\":1]", -32700),
        (&deep, -32700),
        (&many, -32700),
        (&long, -32600),
    ] {
        let mut client = target.client();
        // It may be answered and closed before all of it is sent.
        let _ = client.stream.write_all(text.as_bytes());
        // What it did not read of ours makes the end of its connection a reset, which may overtake the answer.
        if let Some(answer) = client.read() {
            assert_eq!((&answer["error"]["code"], &answer["id"]), (&json!(expected), &Value::Null));
            assert_eq!(client.read(), None);
        } else {
            assert_eq!(expected, -32600, "only one that is too long is sent in vain");
        }
        assert_eq!(other.call("framework_wait_init", json!(null)), Ok(true.into()));
    }
}

#[test]
fn sixty_four_clients_silent_and_slow_ones_hold_up_nobody() {
    let target = Target::start(&[]);
    let mut silent: Vec<Client> = (0..30).map(|_| target.client()).collect();
    let mut slow: Vec<Client> = (0..30).map(|_| target.client()).collect();
    slow.iter_mut().for_each(|client| client.send("{\"method\":\"framework_wa"));
    let mut busy: Vec<Client> = (0..4).map(|_| target.client()).collect();
    for _ in 0..50 {
        for client in &mut busy {
            client.send(r#"{"method":"rpc_get_methods","id":1}"#);
        }
        for client in &mut busy {
            assert!(client.read().unwrap()["result"].is_array());
        }
    }
    // One more has no place as long as nobody is silent for long, and is told so by the end of its connection.
    let mut more = target.client();
    assert_eq!(more.read(), None);
    slow.iter_mut().for_each(|client| client.send("it_init\",\"id\":9}"));
    for client in &mut slow {
        assert_eq!(client.read().unwrap(), json!({"jsonrpc": "2.0", "id": 9, "result": true}));
    }
    // One that is silent for long gives way.
    eventually("a silent one gives way", || {
        let mut client = target.client();
        let asks = client.stream.write_all(br#"{"method":"framework_wait_init","id":1}"#);
        asks.is_ok() && client.read().is_some()
    });
    target.program.wait_for("that was silent for");
    // Whoever leaves makes room.
    silent.clear();
    eventually("there is room", || {
        let mut client = target.client();
        let asks = client.stream.write_all(br#"{"method":"framework_wait_init","id":1}"#);
        asks.is_ok() && client.read().is_some()
    });
}

#[test]
fn a_client_that_does_not_read_is_disconnected_and_holds_up_nobody() {
    let target = Target::start(&[]);
    let mut deaf = target.client();
    deaf.stream.set_nonblocking(true).unwrap();
    let request = r#"{"method":"rpc_get_methods","id":1}"#.repeat(100);
    let began = Instant::now();
    let mut other = target.client();
    // It asks until nothing more of it is taken, and goes on trying.
    let ended = loop {
        match deaf.stream.write(request.as_bytes()) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(_) => break began.elapsed(),
        }
        let asked = Instant::now();
        assert_eq!(other.call("framework_wait_init", json!(null)), Ok(true.into()));
        assert!(asked.elapsed() < Duration::from_secs(5), "others are answered");
        assert!(began.elapsed() < DEADLINE, "it is not disconnected");
    };
    assert!(ended > Duration::from_secs(5), "it has some time");
    target.program.wait_for("it does not read its answers");
    // What its answers have cost is bounded: the queue, and what the kernel had in between.
    let status = std::fs::read_to_string(format!("/proc/{}/status", target.program.child.id())).unwrap();
    let peak = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    eprintln!("{peak}");
    drop(deaf);
}

#[test]
fn a_client_that_reads_late_gets_every_answer() {
    let target = Target::start(&[]);
    let mut client = target.client();
    const COUNT: usize = 20_000;
    let mut writer = client.stream.try_clone().unwrap();
    let sender = std::thread::spawn(move || {
        for id in 0..COUNT {
            writer.write_all(format!(r#"{{"method":"rpc_get_methods","id":{id}}}"#).as_bytes()).unwrap();
        }
    });
    for id in 0..COUNT {
        assert_eq!(client.read().unwrap()["id"], id);
    }
    sender.join().unwrap();
}

#[test]
fn two_targets_do_not_share_a_control_socket() {
    let mut first = Target::start(&[]);
    let rpc = first.rpc();
    assert_eq!(rpc.metadata().unwrap().permissions().mode() & 0o7777, 0o660);
    let disk = first.folder.path().join("disk1.sock");
    let args = ["--device", "sim:64M", "--socket-path", disk.to_str().unwrap(), "--rpc-socket", rpc.to_str().unwrap()];
    let output = command(&args).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("belongs to another target"), "{text}");
    assert!(!disk.exists());
    assert_eq!(first.call("framework_wait_init", json!(null)), true, "the first one has lost nothing");
    // One that is killed leaves its files, which are in nobody's way.
    first.program.signal(Signal::KILL);
    first.program.wait();
    assert!(rpc.exists());
    let second = Program::serve(&disk, &["--rpc-socket", rpc.to_str().unwrap()]);
    second.wait_for("the control socket is ready");
    assert_eq!(Client::connect(&rpc).call("framework_wait_init", json!(null)), Ok(true.into()));
}
