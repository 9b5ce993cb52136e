//! SPDK's own JSON-RPC client, as it is on PyPI, drives the control socket. `tests/prepare.sh` fetches it.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use e2e::{Target, build_dir};
use serde_json::{Value, json};

/// The client; `input` is what it reads.
fn client(socket: &Path, arguments: &[&str], input: &str) -> Output {
    let folder = build_dir().join("tools/spdk-client-26.9");
    assert!(folder.join("complete").exists(), "{} lacks the client: run tests/prepare.sh", folder.display());
    let mut child = Command::new("python3")
        // Its own limit for an answer is a minute.
        .args(["-m", "spdk.spdk_rpc", "-s", socket.to_str().unwrap()])
        .args(arguments)
        .env("PYTHONPATH", folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // One that has failed already does not read it.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

/// What it prints of a call that succeeds.
#[track_caller]
fn call(socket: &Path, arguments: &[&str]) -> Value {
    let output = client(socket, arguments, "");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{arguments:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    if text.trim().is_empty() { Value::Null } else { serde_json::from_str(&text).unwrap() }
}

fn serve(folder: &Path) -> (Target, PathBuf) {
    let (disk, rpc) = (folder.join("vhost.0"), folder.join("rpc.sock"));
    let arguments =
        ["--device", "sim:64M", "--socket-path", disk.to_str().unwrap(), "--rpc-socket", rpc.to_str().unwrap()];
    (Target::vhost_blk(folder, &arguments, vec![disk.clone(), rpc.clone()]).unwrap(), rpc)
}

#[test]
fn every_method_is_driven_by_spdks_client() {
    let folder = tempfile::tempdir().unwrap();
    let (mut target, rpc) = serve(folder.path());
    let call = |arguments: &[&str]| call(&rpc, arguments);
    assert_eq!(call(&["spdk_get_version"])["fields"]["suffix"], "");
    let methods = call(&["rpc_get_methods"]);
    assert_eq!(call(&["rpc_get_methods", "--current"]), methods);
    assert!(methods.as_array().unwrap().contains(&json!("vhost_get_controllers")));
    let disks = call(&["vhost_get_controllers"]);
    assert_eq!(disks[0]["ctrlr"], "vhost.0");
    assert_eq!(call(&["vhost_get_controllers", "-n", "vhost.0"]), disks);
    assert_eq!(call(&["framework_get_reactors"])["pid"], target.process().id());
    assert_eq!(call(&["thread_get_stats"])["threads"][0]["name"], "worker 0");
    assert_eq!(call(&["framework_wait_init"]), Value::Null);
    call(&["log_set_level", "DEBUG"]);
    assert_eq!(call(&["log_get_level"]), "DEBUG");

    let saved = call(&["save_config"]);
    assert_eq!(saved["subsystems"][0], json!({"subsystem": "bdev", "config": null}));
    let file = folder.path().join("saved.json");
    std::fs::write(&file, saved.to_string()).unwrap();
    call(&["load_config", "-j", file.to_str().unwrap()]);

    for (arguments, code) in [
        (&["framework_start_init"][..], "\"code\": -1"),
        (&["bdev_get_bdevs"], "\"code\": -32601"),
        (&["vhost_get_controllers", "-n", "vhost.1"], "\"message\": \"No such device\""),
        (&["framework_get_config", "nbd"], "\"code\": -32602"),
    ] {
        let output = client(&rpc, arguments, "");
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(!output.status.success() && text.contains(code), "{arguments:?}: {text}");
    }
    let output = client(&rpc, &["-b"], "log_get_level\nframework_wait_init\nspdk_get_version\n");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.contains("\"DEBUG\"") && text.contains("vhost-blk v"), "a batch: {text}");

    call(&["spdk_kill_instance", "SIGTERM"]);
    assert!(target.process().wait(Duration::from_secs(60)).unwrap().success());
    assert!(!rpc.exists());
}
