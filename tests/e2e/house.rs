//! The rules of the house that a machine can check: what lies where, who may use whom, and where `unsafe` may be.

use std::collections::BTreeSet;
use std::process::Command;

use e2e::workspace;
use serde_json::Value;

fn output_of(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).current_dir(workspace()).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Every file of the repository.
fn files() -> Vec<String> {
    // The checkout may belong to another user than the one who runs the tests.
    let text = output_of("git", &["-c", "safe.directory=*", "ls-files"]);
    let files: Vec<_> = text.lines().map(str::to_owned).collect();
    assert!(files.len() > 50, "git knows {} files: is this a checkout?", files.len());
    files
}

#[test]
fn the_top_level_is_as_agreed() {
    let allowed = [
        ".ci",
        ".gitignore",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "Cargo.lock",
        "Cargo.toml",
        "LICENSE",
        "README.md",
        "benches",
        "clippy.toml",
        "deny.toml",
        "nvme-driver",
        "rustfmt.toml",
        "setup",
        "tests",
        "tools",
        "vfio",
        "vhost-blk",
    ];
    let found: BTreeSet<_> = files().iter().map(|file| file.split('/').next().unwrap().to_owned()).collect();
    let strangers: Vec<_> = found.iter().filter(|name| !allowed.contains(&name.as_str())).collect();
    assert!(strangers.is_empty(), "{strangers:?}");
}

/// Where the workspace's lint against `unsafe` is lifted. The compiler sees to it that there is none elsewhere.
#[test]
fn unsafe_is_only_in_its_rooms() {
    let rooms = [
        "tools/nvme-sim/src/lib.rs",
        "vfio/src/lib.rs",
        "vfio/tests/full_queue.rs",
        "vhost-blk/src/virtio/mod.rs",
        "vhost-blk/src/virtio/ring/mod.rs",
    ];
    let lifts = |file: &String| {
        let source = std::fs::read_to_string(workspace().join(file)).unwrap();
        source.lines().map(str::trim_start).any(|line| line.starts_with('#') && line.contains("allow(unsafe_code)"))
    };
    let found: Vec<_> = files().into_iter().filter(|file| file.ends_with(".rs") && lifts(file)).collect();
    assert_eq!(found, rooms);
    let driver = std::fs::read_to_string(workspace().join("nvme-driver/src/lib.rs")).unwrap();
    assert!(driver.lines().any(|line| line == "#![forbid(unsafe_code)]"), "nvme-driver forbids unsafe code");
}

/// What each crate may use of the workspace; test dependencies do not count.
const ARROWS: [(&str, &[&str]); 9] = [
    ("vfio", &[]),
    ("nvme-driver", &["vfio"]),
    ("vhost-blk", &["nvme-driver", "vfio", "nvme-sim", "blk-perf"]),
    ("nvme-sim", &[]),
    ("blk-perf", &["vfio", "nvme-driver", "nvme-sim"]),
    ("e2e", &["vfio", "nvme-driver", "vhost-blk", "nvme-sim", "blk-perf"]),
    ("fuzz", &["vfio", "nvme-driver", "vhost-blk"]),
    ("compare", &["vhost-blk", "nvme-sim", "blk-perf", "e2e"]),
    ("benches", &["vfio", "nvme-driver", "vhost-blk", "nvme-sim", "blk-perf"]),
];

#[test]
fn arrows_between_crates_go_one_way() {
    let text = output_of(env!("CARGO"), &["metadata", "--format-version", "1", "--no-deps", "--offline", "--locked"]);
    let metadata: Value = serde_json::from_str(&text).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let name = |value: &Value| value["name"].as_str().unwrap().to_owned();
    let ours: Vec<_> = packages.iter().map(name).collect();
    for package in packages {
        let crate_name = name(package);
        let rule = ARROWS.iter().find(|rule| rule.0 == crate_name);
        let (_, allowed) = rule.unwrap_or_else(|| panic!("say in ARROWS what {crate_name} may use"));
        for dependency in package["dependencies"].as_array().unwrap() {
            let used = name(dependency);
            // `null` is a normal dependency; the simulator's tests must not know the driver either.
            let counts = dependency["kind"] != "dev" || crate_name == "nvme-sim" || crate_name == "vfio";
            if counts && ours.contains(&used) {
                assert!(allowed.contains(&used.as_str()), "{crate_name} uses {used}");
            }
            // The embedded controller and its client can be switched off by a distribution.
            if crate_name == "vhost-blk" && dependency["kind"].is_null() && ["nvme-sim", "blk-perf"].contains(&&*used) {
                assert_eq!(dependency["optional"], true, "{crate_name} uses {used} only as a feature");
            }
        }
    }
}

/// What each room of the target may use of the others, from the top of the house to its cellar.
const ROOMS: [(&str, &[&str]); 6] = [
    ("control", &["vhost_user", "drive", "datapath", "blk", "virtio"]),
    ("vhost_user", &["drive", "datapath", "blk", "virtio"]),
    ("drive", &["datapath", "blk", "virtio"]),
    ("datapath", &["blk", "virtio"]),
    ("blk", &["virtio"]),
    ("virtio", &[]),
];
/// Modules that belong to no room, and use none.
const EVERYWHERE: [&str; 3] = ["event", "fault_point", "log_limit"];

/// A source file up to its tests.
fn without_tests(source: &str) -> &str {
    let tests = source.find("#[cfg(test)]\nmod ").into_iter().chain(source.find("#[cfg(test)]\npub(crate) mod tests"));
    &source[..tests.filter(|at| source[*at..].contains('{')).min().unwrap_or(source.len())]
}

#[test]
fn arrows_between_rooms_go_one_way() {
    let root = "vhost-blk/src/";
    let is_test = |name: &str| name.ends_with("tests.rs") || name.contains("/tests/") || name.ends_with("/testing.rs");
    let mut found = BTreeSet::new();
    for file in files().iter().filter(|file| file.ends_with(".rs") && !is_test(file)) {
        let Some(name) = file.strip_prefix(root) else { continue };
        let room = name.split(['/', '.']).next().unwrap();
        if ["lib", "main"].contains(&room) {
            continue;
        }
        let rule = ROOMS.iter().find(|rule| rule.0 == room).map(|rule| rule.1);
        let allowed = rule.or(EVERYWHERE.contains(&room).then_some(&[][..]));
        let allowed = allowed.unwrap_or_else(|| panic!("{file} is in no room: say in ROOMS what {room} may use"));
        let source = std::fs::read_to_string(workspace().join(file)).unwrap();
        let code = without_tests(&source).lines().filter(|line| !line.trim_start().starts_with("//"));
        for path in code.flat_map(|line| line.split("crate::").skip(1)) {
            let used: String = path.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            let fits = used == room || EVERYWHERE.contains(&used.as_str()) || allowed.contains(&used.as_str());
            assert!(fits, "{file} uses {used}, which {room} may not");
            found.insert((room.to_owned(), used));
        }
    }
    // Were they not found, this test could not fail.
    assert!(found.contains(&("datapath".into(), "virtio".into())) && found.len() > 15, "{found:?}");
}

#[test]
fn every_crate_has_the_common_lints() {
    let manifests: Vec<_> = files().into_iter().filter(|file| file.ends_with("/Cargo.toml")).collect();
    assert!(manifests.len() >= ARROWS.len(), "{manifests:?}");
    for file in manifests {
        let manifest = std::fs::read_to_string(workspace().join(&file)).unwrap();
        assert!(manifest.contains("[lints]\nworkspace = true\n"), "{file}");
    }
}
