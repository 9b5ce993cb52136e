use std::path::Path;

use nvme_driver::Options;

use super::*;

fn parse(text: &str, name: &str) -> Result<Settings, Vec<Mistake>> {
    let Configuration { settings, refused } = file::parse(text, name)?;
    assert_eq!(refused, []);
    Ok(settings)
}

/// For which nothing of it is served.
#[track_caller]
fn errors(text: &str) -> Vec<String> {
    let errors = file::parse(text, "c.toml").expect_err("the file is wrong");
    let errors: Vec<String> = errors.iter().map(Mistake::to_string).collect();
    assert!(errors.iter().all(|error| !error.contains('\n')), "one line each: {errors:?}");
    errors
}

#[track_caller]
fn error(text: &str) -> String {
    let errors = errors(text);
    assert_eq!(errors.len(), 1, "{errors:?}");
    errors[0].clone()
}

fn export(device: &str, socket: &str, more: &str) -> String {
    format!("[[export]]\ndevice = \"{device}\"\nsocket-path = \"{socket}\"\n{more}\n")
}

#[test]
fn a_file_with_everything() {
    let settings = parse(
        r#"
        cpus = "2,4-5"
        io-timeout = 2.5
        hold = 0
        rpc-socket = "/run/rpc.sock"
        guest-memory-limit = "64G"
        guest-regions-limit = 32
        [[export]]
        device = "0000:01:00.0"
        socket-path = "/run/a.sock"
        namespace = 2
        queues = 4
        queue-size = 256
        queue-pairs = 3
        read-only = true
        serial = "DISK-A"
        [[export]]
        device = "sim:1G"
        socket-path = "/run/b.sock"
        "#,
        "c.toml",
    )
    .unwrap();
    assert_eq!(settings.cpus, [2, 4, 5]);
    assert_eq!(settings.rpc_socket, Some("/run/rpc.sock".into()));
    assert_eq!(settings.timeouts, DriveTimeouts { io_timeout: Duration::from_millis(2500), hold: Duration::ZERO });
    assert_eq!(settings.memory, Limits { bytes: 64 << 30, regions: 32 });
    assert_eq!(
        settings.exports[0],
        ExportSettings {
            device: "01:00.0".parse().unwrap(),
            listen: Listen::Path("/run/a.sock".into()),
            namespace: Some(2),
            queues: 4,
            queue_size: 256,
            queue_pairs: Some(3),
            read_only: true,
            serial: Some("DISK-A".parse().unwrap()),
        }
    );
    assert_eq!(
        settings.exports[1],
        ExportSettings {
            device: "sim:1G".parse().unwrap(),
            listen: Listen::Path("/run/b.sock".into()),
            namespace: None,
            queues: DEFAULT_QUEUES,
            queue_size: DEFAULT_QUEUE_SIZE,
            queue_pairs: None,
            read_only: false,
            serial: None,
        }
    );
}

#[test]
fn the_example_is_right_and_so_are_the_lines_it_leaves_out() {
    let example = include_str!("../../../../setup/vhost-blk.toml");
    assert_eq!(parse(example, "example").unwrap().exports.len(), 1);
    // A comment that is a line of TOML begins without a space.
    let all: String = example
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(rest) if !rest.starts_with(' ') => format!("{rest}\n"),
            _ => format!("{line}\n"),
        })
        .collect();
    let settings = parse(&all, "example").unwrap();
    assert_eq!((settings.cpus.len(), settings.exports.len()), (2, 2));
    assert_eq!(settings.timeouts, DriveTimeouts::default(), "what the example shows is the default");
    assert_eq!(settings.memory, Limits::default(), "what the example shows is the default");
    let [drive] = &settings.drives[..] else { panic!("{:?}", settings.drives) };
    assert_eq!(drive.device, settings.exports[1].device);
    assert_eq!((drive.sgl, drive.queue_pairs), (Some(false), Some(32)), "all keys are shown");
    assert_eq!(settings.exports[0].queues, DEFAULT_QUEUES, "what the example shows is the default");
    assert_eq!(settings.exports[0].queue_size, DEFAULT_QUEUE_SIZE);
}

#[test]
fn errors_name_the_line() {
    assert_eq!(
        error("[[export]]\ndevice = \"sim:1G\"\nsocket-path = \"/a\"\nqueus = 4\n"),
        "c.toml, line 4: unknown field `queus`, expected one of `device`, `socket-path`, `namespace`, `queues`, `queue-size`, `queue-pairs`, `read-only`, `serial`"
    );
    assert_eq!(
        error("cpu = \"1\"\n"),
        "c.toml, line 1: unknown field `cpu`, expected one of `cpus`, `io-timeout`, `hold`, `guest-memory-limit`, `guest-regions-limit`, `rpc-socket`, `export`, `drive`"
    );
    assert_eq!(error("hold = -1\n"), "c.toml, line 1: -1 seconds to wait for a drive: use 0 to 86400");
    assert_eq!(error("io-timeout = nan\n"), "c.toml, line 1: NaN seconds for a command: use 0.01 to 86400");
    assert_eq!(
        error("guest-memory-limit = \"much\"\n"),
        "c.toml, line 1: size \"much\": use a number with K, M, G or T, such as 64G"
    );
    assert_eq!(
        error("rpc-socket = \"\"\n"),
        "c.toml, line 1: the socket path is empty: give one, such as /run/vhost-blk/disk0.sock"
    );
    assert_eq!(error("guest-regions-limit = 0\n"), "c.toml, line 1: 0 memory regions: use 1 to 509");
    assert_eq!(error("\n[[export]]\ndevice = \"sim:1G\"\n"), "c.toml, line 2: missing field `socket-path`");
    assert_eq!(
        error("[[export]]\nsocket-path = \"/a\"\ndevice = \"nvme\"\n"),
        "c.toml, line 3: device address \"nvme\" is not valid: use a PCI function such as 0000:01:00.0, vfio-user:PATH, or sim:SIZE[,lba=4096][,file=PATH]"
    );
    assert_eq!(
        error("[[export]]\ndevice = \"sim:1G\"\nsocket-path = \"/a\"\nqueues = 0\n"),
        "c.toml, line 4: 0 queues: use 1 to 256"
    );
    assert_eq!(
        error("[[export]]\ndevice = \"sim:1G\"\nsocket-path = \"/a\"\nqueue-pairs = 0\n"),
        "c.toml, line 4: 0 queue pairs: use 1 to 65534"
    );
    assert_eq!(
        error("[[export]]\ndevice = \"sim:1G\"\nsocket-path = \"/a\"\nqueue-size = 100\n"),
        "c.toml, line 4: queue size 100: use a power of two from 2 to 32768"
    );
    assert_eq!(
        error("[[export]]\ndevice = \"sim:1G\"\nsocket-path = \"/a\"\nserial = \"\"\n"),
        "c.toml, line 4: serial \"\": use 1 to 20 printable ASCII characters"
    );
    assert_eq!(
        error("cpus = \"3-1\"\n"),
        "c.toml, line 1: CPU list \"3-1\": the range 3-1 runs backwards; use numbers and ranges such as 2,4-7"
    );
    let broken = error("cpus = \n");
    assert!(broken.starts_with("c.toml, line 1: "), "{broken}");
    let wrong_type = error("[[export]]\ndevice = 5\nsocket-path = \"/a\"\n");
    assert!(wrong_type.starts_with("c.toml, line 2: invalid type: integer `5`"), "{wrong_type}");
    let negative = error("[[export]]\nqueues = -1\nsocket-path = \"/a\"\ndevice = \"sim:1G\"\n");
    assert!(negative.starts_with("c.toml, line 2: "), "{negative}");
}

#[test]
fn a_file_without_exports_is_wrong() {
    let none = "c.toml: no export: add an [[export]] section with device and socket-path";
    assert_eq!(error(""), none);
    assert_eq!(error("hold = 1\nexport = []\n"), none);
    for (text, line) in [("export = 5\n", 1), ("hold = 1\nexport = [5]\n", 2), ("[export]\ndevice = \"sim:1G\"\n", 1)] {
        assert!(errors(text)[0].starts_with(&format!("c.toml, line {line}: export is no section: ")), "{text}");
    }
}

/// What is wrong with each export that is refused, and the sockets of the others.
#[track_caller]
fn split(text: &str) -> (Vec<Vec<String>>, Vec<String>) {
    let Configuration { settings, refused } = file::parse(text, "c.toml").unwrap();
    let sockets = settings.exports.iter().map(|export| export.listen.to_string()).collect();
    let lines = |refused: RefusedExport| refused.mistakes.iter().map(Mistake::to_string).collect();
    (refused.into_iter().map(lines).collect(), sockets)
}

#[test]
fn a_mistake_in_an_export_costs_that_export_only() {
    let one_hundred_and_eight = format!("/{}", "x".repeat(107));
    for (wrong, why) in [
        (export("sim:1G", "/b", "queues = 0"), "line 8: 0 queues: use 1 to 256".to_owned()),
        (export("sim:1G", "/b", "serial = \"\""), "line 8: serial \"\": use 1 to 20 printable ASCII characters".into()),
        (export("sim:1G", "/b", "colour = 1"), "line 8: unknown field `colour`, expected one of ".into()),
        (export("sim:1G", "/b", "read-only = 1"), "line 8: invalid type: integer `1`, expected a boolean".into()),
        (export("nvme0", "/b", ""), "line 6: device address \"nvme0\" is not valid: ".into()),
        (export("sim:1G", "", ""), "line 7: the socket path is empty: give one, such as ".into()),
        (
            export("sim:1G", &one_hundred_and_eight, ""),
            format!("line 7: the socket path {one_hundred_and_eight} has 108 bytes: use at most 107"),
        ),
        (
            export(&format!("vfio-user:{one_hundred_and_eight}"), "/b", ""),
            format!("line 6: device address \"vfio-user:{one_hundred_and_eight}\": the socket path "),
        ),
        (
            export("sim:1G", "/b", "namespace = 2"),
            "line 8: sim:1G has no namespace 2: use 1 to 1, or namespaces=2 ".into(),
        ),
        (export("sim:1G,namespaces=2", "/b", ""), "line 5: sim:1G,namespaces=2 has 2 namespaces: say which one".into()),
        ("[[export]]\nsocket-path = \"/b\"\n\n\n".into(), "line 5: missing field `device`".into()),
    ] {
        let text = export("sim:1G", "/a", "") + &wrong + &export("sim:1G", "/c", "");
        let (mistakes, sockets) = split(&text);
        assert_eq!(sockets, ["/a", "/c"], "{text}");
        assert!(mistakes.len() == 1 && mistakes[0].len() == 1, "{mistakes:?}");
        assert!(mistakes[0][0].starts_with(&format!("c.toml, {why}")), "{mistakes:?}");
        // When it is all there is, nothing is left.
        assert_eq!(errors(&wrong).len(), 1);
    }
    assert_eq!(split(&export("sim:1G", &one_hundred_and_eight[1..], "")).1.len(), 1, "107 bytes fit");
}

#[test]
fn all_mistakes_are_found() {
    let first = export("nvme0", "/a", "queues = 0\nqueue-size = 3");
    let second = export("sim:1G", "/b", "serial = 7\nnamespace = 0\nsize = 1");
    let errors = errors(&format!("cpus = \"3-1\"\nhold = -1\ncpu = 1\n{first}{second}"));
    let lines: Vec<&str> = errors.iter().map(|error| error.split(':').next().unwrap()).collect();
    let expected = [1, 2, 3, 5, 7, 8, 11 + 1, 13, 14].map(|line| format!("c.toml, line {line}"));
    assert_eq!(lines, expected, "{errors:#?}");
    // A mistake elsewhere than in an export costs the file.
    assert_eq!(
        error(&("hold = -1\n".to_owned() + &export("sim:1G", "/a", ""))),
        "c.toml, line 1: -1 seconds to wait for a drive: use 0 to 86400"
    );
}

/// Nobody can tell which of them is meant, and a guest must not find the disk of another one.
#[test]
fn exports_with_the_same_socket_are_not_served() {
    let text = [export("sim:1G", "/a", ""), export("sim:2G", "/b", ""), export("sim:3G", "//a", "")].concat();
    let (mistakes, sockets) = split(&text);
    assert_eq!(sockets, ["/b"]);
    let why = |line, path, other| {
        vec![format!(
            "c.toml, line {line}: two exports use the socket {path} (see line {other}), so neither is served: give each its own"
        )]
    };
    assert_eq!(mistakes, [why(3, "/a", 11), why(11, "/a", 3)]);
    // One that has other mistakes, too; on one line.
    let text = "export = [{ device = \"\", socket-path = \"/a\" }, { device = \"sim:1G\", socket-path = \"/a\" }]\n";
    let found = errors(text);
    assert!(found.len() == 3 && found[2].contains("two exports use the socket /a"), "{found:?}");
}

#[test]
fn a_file_of_an_embedded_controller_belongs_to_one() {
    let (one, two) = ("sim:1G,file=/x,namespaces=2", "sim:1G,file=/x.2");
    let of = |number: u32| format!("namespace = {number}");
    let text = [export(one, "/a", &of(1)), export(one, "/b", &of(2)), export(two, "/c", "")].concat();
    let (mistakes, sockets) = split(&text);
    assert_eq!(sockets, ["/a", "/b"]);
    assert_eq!(mistakes.len(), 1);
    assert!(mistakes[0][0].starts_with(&format!("c.toml, line 11: {two} uses the file /x.2, and so does {one}: ")));
}

#[test]
fn a_namespace_of_two_exports_is_told_unless_nobody_writes() {
    let warnings = |exports: &[(&str, &str)]| {
        let export = |(at, (device, more)): (usize, &(&str, &str))| {
            format!("[[export]]\ndevice = \"{device}\"\nsocket-path = \"/{at}\"\n{more}\n")
        };
        parse(&exports.iter().enumerate().map(export).collect::<String>(), "c.toml").unwrap().warnings()
    };
    let read_only = "read-only = true";
    assert_eq!(warnings(&[("sim:1G", ""), ("sim:2G", "")]), [""; 0]);
    assert_eq!(warnings(&[("01:00.0", "namespace = 1"), ("01:00.0", "namespace = 2")]), [""; 0]);
    assert_eq!(warnings(&[("sim:1G", read_only), ("sim:1G", read_only)]), [""; 0]);
    let told = warnings(&[("01:00.0", "namespace = 1"), ("0000:01:00.0", "namespace = 1\nread-only = true")]);
    assert_eq!(told.len(), 1);
    assert!(told[0].starts_with("/0 and /1 serve the same namespace of 0000:01:00.0: "), "{told:?}");
    // The one of which no number is given may be that one.
    assert_eq!(warnings(&[("sim:1G", "namespace = 1"), ("sim:1G", "")]).len(), 1);
    // A third one is told with the one that it may spoil.
    let told = warnings(&[("sim:1G", read_only), ("sim:1G", ""), ("sim:1G", read_only)]);
    assert!(told.len() == 2 && told[1].starts_with("/1 and /2 "), "{told:?}");
}

#[test]
fn a_missing_file_is_named() {
    let error = load(Path::new("/nowhere/c.toml")).unwrap_err().lines();
    assert_eq!(error, ["cannot read the configuration file /nowhere/c.toml: No such file or directory (os error 2)"]);
}

#[test]
fn cpu_lists() {
    assert_eq!("0".parse(), Ok(CpuList(vec![0])));
    assert_eq!("7,0-2".parse(), Ok(CpuList(vec![7, 0, 1, 2])));
    for (text, why) in [
        ("", "\"\" is not a CPU number"),
        ("a", "\"a\" is not a CPU number"),
        ("1-", "\"\" is not a CPU number"),
        ("+1", "\"+1\" is not a CPU number"),
        ("99999", "\"99999\" is not a CPU number"),
        ("1,0-2", "CPU 1 is listed twice"),
    ] {
        let error = text.parse::<CpuList>().unwrap_err().to_string();
        assert_eq!(error, format!("CPU list \"{text}\": {why}; use numbers and ranges such as 2,4-7"));
    }
}

#[test]
fn serials_are_padded() {
    assert_eq!(&"AB".parse::<Serial>().unwrap().to_bytes()[..3], b"AB\0");
    let full = "12345678901234567890";
    assert_eq!(&full.parse::<Serial>().unwrap().to_bytes(), full.as_bytes());
    assert!("123456789012345678901".parse::<Serial>().is_err());
    assert!("a\nb".parse::<Serial>().is_err());
}

#[test]
fn a_drive_has_settings_of_its_own() {
    let drive = r#"
        [[drive]]
        device = "01:00.0"
        sgl = false
        discard = false
        write-zeroes = true
        shadow-doorbells = false
        ready-timeout = 45
        admin-timeout = 2.5
        shutdown-timeout = 90
        queue-pairs = 7
        [[drive]]
        device = "sim:1G"
    "#;
    let exports = export("0000:01:00.0", "/a", "queues = 200")
        + &export("sim:1G", "/b", "read-only = true")
        + &export("sim:1G", "/c", "read-only = true");
    let settings = parse(&(exports + drive), "c.toml").unwrap();
    let base = Options { io_timeout: Duration::from_secs(3), max_queue_pairs: 1, ..Options::default() };
    let told = settings.options(&settings.exports[0].device, &base);
    assert_eq!((told.sgl, told.discard, told.write_zeroes), (Some(false), Some(false), Some(true)));
    assert!(!told.shadow_doorbells && !told.interrupts, "workers poll");
    assert_eq!(told.ready_timeout, Some(Duration::from_secs(45)));
    assert_eq!((told.admin_timeout, told.shutdown_timeout), (Duration::from_millis(2500), Duration::from_secs(90)));
    assert_eq!((told.max_queue_pairs, told.io_timeout), (7, base.io_timeout));
    // One that says nothing is as it was, with queue pairs for all rings of its disks.
    let untold = settings.options(&settings.exports[1].device, &base);
    assert_eq!((untold.sgl, untold.ready_timeout), (None, None));
    assert_eq!((untold.admin_timeout, untold.max_queue_pairs), (base.admin_timeout, 2 * DEFAULT_QUEUES));
    assert_eq!(
        settings.drives[0].to_string(),
        "the drive 0000:01:00.0: sgl = false, discard = false, write-zeroes = true, shadow-doorbells = false, \
         ready-timeout = 45, admin-timeout = 2.5, shutdown-timeout = 90, queue-pairs = 7"
    );
    assert_eq!(settings.drives[1].to_string(), "the drive sim:1G: as it says");
    assert_eq!(settings.warnings(), [""; 0]);
}

#[test]
fn a_mistake_in_a_drives_settings_costs_its_disks_only() {
    let exports = export("sim:1G", "/a", "") + &export("sim:2G", "/b", "") + &export("sim:1G", "/c", "");
    let drive = |device: &str, more: &str| format!("[[drive]]\ndevice = \"{device}\"\n{more}\n");
    for (wrong, why) in [
        ("sgl = 1", "line 15: invalid type: integer `1`, expected a boolean"),
        ("ready-timeout = 0", "line 15: 0 seconds for a drive: use 0.1 to 86400"),
        ("admin-timeout = \"x\"", "line 15: invalid type: string \"x\", expected f64"),
        ("queue-pairs = 0", "line 15: 0 queue pairs: use 1 to 65534"),
        ("colour = 1", "line 15: unknown field `colour`, expected one of `device`, `sgl`, `discard`, `write-zeroes`, "),
        (&drive("sim:1G", ""), "line 16: the drive sim:1G has two sections (see line 13): write one"),
    ] {
        let (mistakes, sockets) = split(&(exports.clone() + &drive("sim:1G", wrong)));
        assert_eq!(sockets, ["/b"], "{wrong}");
        assert!(mistakes[0][0].starts_with(&format!("c.toml, {why}")), "{mistakes:?}");
        assert!(
            mistakes[1][0].starts_with("c.toml, line 11: the [[drive]] section of its drive has mistakes "),
            "{mistakes:?}"
        );
    }
    // Nobody's: the file makes no sense.
    assert_eq!(error(&(exports.clone() + "[[drive]]\nsgl = true\n")), "c.toml, line 13: missing field `device`");
    assert!(error(&(exports.clone() + &drive("nvme0", ""))).starts_with("c.toml, line 14: device address \"nvme0\" "));
    let unused = parse(&(export("sim:1G", "/a", "") + &drive("sim:3G", "sgl = false")), "c.toml").unwrap().warnings();
    assert!(unused.len() == 1 && unused[0].starts_with("the [[drive]] section of sim:3G has no effect"));
}
