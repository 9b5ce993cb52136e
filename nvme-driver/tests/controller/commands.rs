//! Namespaces, features, log pages, abort, format.

use std::time::{Duration, Instant};

use nvme_driver::spec::command;
use nvme_driver::spec::features::{
    EventConfiguration, InterruptCoalescing, NumberOfQueues, Select, TemperatureSensor, TemperatureThreshold,
    VolatileWriteCache,
};
use nvme_driver::spec::log_page::{ChangedNamespaces, id};
use nvme_driver::{
    Erase, Error, FormatOptions, LbaRange, Options, QueuePairOptions, Segment, Status, SubmitError, Work,
};
use nvme_sim::{Config, FaultAction, NamespaceConfig};

use crate::{Rig, complete, disk, small, works};

#[test]
fn geometry_of_namespaces() {
    let read_only = NamespaceConfig { read_only: true, ..disk(1 << 40, 4096) };
    let namespaces = vec![disk(16 << 20, 512), disk(32 << 20, 4096), read_only];
    let rig = Rig::new(Config { namespaces, noiob: 256, ..Config::default() });
    let controller = rig.open();
    assert_eq!(controller.namespaces().unwrap(), [1, 2, 3]);
    let [first, second, third] = [1, 2, 3].map(|id| controller.namespace(id).unwrap());
    assert_eq!((first.blocks, first.block_shift, first.boundary_blocks), (32768, 9, 256));
    assert_eq!((second.blocks, second.block_bytes()), (8192, 4096));
    assert_eq!((third.bytes(), third.read_only), (1 << 40, true));
    assert!(!first.read_only && first.discard && first.write_zeroes);
    assert!(first.physical_block_bytes >= 512 && first.physical_block_bytes.is_power_of_two());
    let ids = |namespace: &nvme_driver::Namespace| (namespace.uuid, namespace.nguid, namespace.eui64);
    assert_ne!(ids(&first), ids(&second), "namespaces can be told apart");
    works(&controller, 1, 1);
    works(&controller, 2, 2);
}

#[test]
fn more_namespaces_than_one_list_has_room_for() {
    // 1024 fill a list exactly; 2049 need three.
    for count in [1023u32, 1024, 1025, 2049] {
        let namespaces = vec![disk(1 << 20, 512); count as usize];
        let rig = Rig::new(Config { namespaces, ..Config::default() });
        let controller = rig.open();
        assert_eq!(controller.namespaces().unwrap(), (1..=count).collect::<Vec<_>>());
        works(&controller, count, 1);
    }
}

#[test]
fn namespaces_that_are_not_there() {
    let rig = Rig::new(Config { namespaces: vec![disk(1 << 20, 512); 3], ..Config::default() });
    let controller = rig.open();
    rig.simulator.remove_namespace(2).unwrap();
    assert_eq!(controller.namespaces().unwrap(), [1, 3]);
    for id in [0, 2, 4, 100_000, u32::MAX] {
        let error = controller.namespace(id).unwrap_err();
        let Error::NoSuchNamespace { namespace, active } = &error else { panic!("{id}: {error}") };
        assert_eq!((*namespace, active.as_slice()), (id, &[1, 3][..]));
    }
}

#[test]
fn metadata_is_refused_by_name() {
    let with_metadata = NamespaceConfig { metadata_bytes: 8, ..disk(1 << 20, 512) };
    let namespaces = vec![with_metadata, disk(1 << 20, 4096)];
    let rig = Rig::new(Config { metadata_formats: true, namespaces, ..Config::default() });
    let controller = rig.open();
    assert_eq!(controller.namespaces().unwrap(), [1, 2]);
    let error = controller.namespace(1).unwrap_err();
    assert!(matches!(error, Error::Format { namespace: 1, .. }), "{error}");
    assert!(error.to_string().contains("512 bytes per block and 8 bytes of metadata"), "{error}");
    works(&controller, 2, 1);

    // Formatting it makes it of use.
    let options = FormatOptions { block_bytes: 512, erase: Erase::No, timeout: Duration::from_secs(30) };
    assert_eq!(controller.format(1, &options).unwrap().block_bytes(), 512);
    works(&controller, 1, 2);
}

#[test]
fn format_changes_the_block_size_and_loses_the_data() {
    let rig = Rig::new(small());
    let controller = rig.open();
    works(&controller, 1, 1);
    for (block_bytes, erase) in [(4096, Erase::No), (512, Erase::UserData)] {
        let options = FormatOptions { block_bytes, erase, timeout: Duration::from_secs(30) };
        let namespace = controller.format(1, &options).unwrap();
        assert_eq!((namespace.block_bytes(), namespace.bytes()), (block_bytes, 16 << 20));
        assert_eq!(controller.namespace(1).unwrap(), namespace);
        let mut data = vec![1; 64 << 10];
        controller.blocking(1, Duration::from_secs(10)).unwrap().read(0, &mut data).unwrap();
        assert!(data.iter().all(|&byte| byte == 0));
        works(&controller, 1, 2);
    }
    let options = FormatOptions { block_bytes: 1024, erase: Erase::No, timeout: Duration::from_secs(30) };
    assert!(matches!(controller.format(1, &options), Err(Error::Invalid(_))));
    let options = FormatOptions { block_bytes: 512, ..options };
    assert!(matches!(controller.format(7, &options), Err(Error::NoSuchNamespace { namespace: 7, .. })));
}

#[test]
fn the_write_cache_can_be_switched() {
    let rig = Rig::new(Config { volatile_write_cache: true, ..small() });
    let controller = rig.open();
    assert!(controller.identity().volatile_write_cache);
    assert!(controller.namespace(1).unwrap().volatile_write_cache);
    controller.set_feature(&VolatileWriteCache { enabled: false }, false).unwrap();
    assert!(!controller.get_feature::<VolatileWriteCache>(Select::Current, &()).unwrap().enabled);
    assert!(!controller.namespace(1).unwrap().volatile_write_cache);
    if controller.identity().supports_feature_select {
        assert!(controller.get_feature::<VolatileWriteCache>(Select::Default, &()).unwrap().enabled);
    }
    controller.reset().unwrap();
    assert!(controller.namespace(1).unwrap().volatile_write_cache, "what was not saved is gone after a reset");

    let rig = Rig::new(small());
    let error = rig.open().set_feature(&VolatileWriteCache { enabled: false }, false).unwrap_err();
    assert!(matches!(error, Error::Unsupported(_)), "{error}");
    let error = rig.open().get_feature::<VolatileWriteCache>(Select::Current, &()).unwrap_err();
    assert_eq!(error.status().map(Status::kind), Some(Status::INVALID_FIELD));
    assert!(error.to_string().contains("Get Features (Volatile Write Cache)"), "{error}");
    assert!(error.to_string().contains("Generic: Invalid Field in Command"), "{error}");
}

/// What a drive offers and is not to be used is as if it did not offer it.
#[test]
fn abilities_can_be_left_off() {
    let rig = Rig::new(small());
    let off = Options { sgl: Some(false), discard: Some(false), write_zeroes: Some(false), ..Default::default() };
    for (options, on) in [(Options::default(), true), (off, false)] {
        let controller = rig.try_open(&options).unwrap();
        assert_eq!(controller.identity().sgl.is_some(), on);
        let namespace = controller.namespace(1).unwrap();
        assert_eq!((namespace.discard, namespace.write_zeroes), (on, on));
        let mut pair = controller.create_queue_pair(QueuePairOptions::default()).unwrap();
        let ranges = [LbaRange { lba: 0, blocks: 1 }];
        assert_eq!(pair.submit(&namespace, Work::Discard { ranges: &ranges }, 1).is_ok(), on);
        // Half a block here and half a block there: only a list of segments can say that.
        let memory = rig.device.dma().allocate(16384).unwrap();
        let odd = [512, 8192].map(|at| Segment { iova: memory.iova() + at, bytes: 256 });
        let submitted = pair.submit(&namespace, Work::Read { lba: 0, segments: &odd }, 2);
        assert_eq!(submitted, if on { Ok(()) } else { Err(SubmitError::NeedsBounce) });
        controller.reset().unwrap();
        assert_eq!(controller.identity().sgl.is_some(), on);
        works(&controller, 1, 1);
    }
}

#[test]
fn features_are_what_they_were_set_to() {
    let rig = Rig::new(Config { max_queue_pairs: 5, ..small() });
    let controller = rig.open();
    let coalescing = InterruptCoalescing { threshold: 7, time: 3 };
    controller.set_feature(&coalescing, false).unwrap();
    assert_eq!(controller.get_feature::<InterruptCoalescing>(Select::Current, &()).unwrap(), coalescing);

    let granted: NumberOfQueues = controller.get_feature(Select::Current, &()).unwrap();
    assert_eq!((granted.submission, granted.completion), (5, 5));

    let events: EventConfiguration = controller.get_feature(Select::Current, &()).unwrap();
    assert!(events.namespace_attributes, "chosen at bring-up");

    let under = TemperatureSensor { sensor: 0, under: true };
    controller.set_feature(&TemperatureThreshold { kelvins: 250, which: under }, false).unwrap();
    controller.set_feature(&TemperatureThreshold { kelvins: 350, which: Default::default() }, false).unwrap();
    let get = |which| controller.get_feature::<TemperatureThreshold>(Select::Current, &which).unwrap().kelvins;
    assert_eq!((get(under), get(TemperatureSensor::default())), (250, 350));

    // The simulator saves nothing.
    let error = controller.set_feature(&coalescing, true).unwrap_err();
    assert_eq!(error.status().map(|status| status.name()), Some("Feature Identifier Not Saveable"));
}

#[test]
fn logs_tell_what_happened() {
    let rig = Rig::new(small());
    let controller = rig.open();
    let before = controller.health_log().unwrap();
    assert!((250..400).contains(&before.temperature_kelvins), "{before:?}");
    works(&controller, 1, 1);
    let after = controller.health_log().unwrap();
    assert!(after.host_reads > before.host_reads && after.host_writes > before.host_writes, "{before:?} {after:?}");

    // A command the controller refuses leaves an entry with its status.
    let count = controller.error_log().unwrap().len();
    let mut pair = controller.create_queue_pair(QueuePairOptions::default()).unwrap();
    let memory = rig.device.dma().allocate(4096).unwrap();
    for lba in [1 << 40, 1 << 41] {
        let read = nvme_driver::Command::blocks(command::io::READ, 1, lba, 1, 0).with_prps(memory.iova(), 0);
        pair.push(read, lba).unwrap();
        pair.ring();
        let [(token, status)] = complete(&mut pair, 1)[..] else { panic!("one command, one completion") };
        assert_eq!((token, status.kind(), status.name()), (lba, Status::LBA_OUT_OF_RANGE, "LBA Out of Range"));
    }
    let entries = controller.error_log().unwrap();
    assert_eq!(entries.len(), count + 2);
    let newest = entries[0];
    assert_eq!((newest.status.kind(), newest.lba, newest.namespace), (Status::LBA_OUT_OF_RANGE, 1 << 41, 1));
    assert_eq!(newest.sq_id, Some(pair.id()));
    assert!(entries.windows(2).all(|pair| pair[0].count > pair[1].count), "newest first");
}

#[test]
fn a_media_error_has_its_name() {
    let rig = Rig::new(small());
    let controller = rig.open();
    rig.io_fault(command::io::READ, FaultAction::Fail(nvme_sim::Status::new(2, 0x81)), 1);
    let mut disk = controller.blocking(1, Duration::from_secs(10)).unwrap();
    let error = disk.read(77, &mut [0; 512]).unwrap_err();
    assert_eq!(error.status(), Some(Status::UNRECOVERED_READ));
    assert!(error.to_string().contains("Media and Data Integrity: Unrecovered Read Error"), "{error}");
    disk.read(77, &mut [0; 512]).unwrap();
}

#[test]
fn log_pages_of_all_sizes() {
    let rig = Rig::new(Config { max_transfer: None, ..small() });
    let controller = rig.open();
    assert!(controller.identity().log_page_offsets);
    for _ in 0..3 {
        assert!(controller.get_log_page(0xc0, None, 0, 512).is_err(), "leaves an entry in the error log");
    }
    // One page, two pages, a list of pages: the data pointer differs, the log does not. Beyond its end there are zeroes.
    let log = |offset, bytes| controller.get_log_page(id::ERROR_INFORMATION, None, offset, bytes).unwrap();
    let page = log(0, 4096);
    assert_ne!(page[64], 0, "there are entries");
    for bytes in [64, 4100, 8192, 8196, 12288, 16384] {
        let other = log(0, bytes);
        assert_eq!(other.len(), bytes);
        let (inside, beyond) = other.split_at(bytes.min(4096));
        assert!(*inside == page[..inside.len()] && beyond.iter().all(|&byte| byte == 0), "{bytes} bytes");
    }
    assert_eq!(log(64, 128), page[64..192]);

    for (offset, bytes) in [(0, 0), (0, 6), (2, 8)] {
        assert!(matches!(controller.get_log_page(id::SMART_HEALTH, None, offset, bytes), Err(Error::Invalid(_))));
    }
    let error = controller.get_log_page(0xc0, None, 0, 512).unwrap_err();
    assert_eq!(error.status().map(|status| status.name()), Some("Invalid Log Page"));
    assert_eq!(controller.changed_namespaces().unwrap(), ChangedNamespaces::Some(vec![]));
}

#[test]
fn abort_of_a_command_that_waits() {
    let rig = Rig::new(small());
    let controller = rig.open();
    let namespace = controller.namespace(1).unwrap();
    let mut pair = controller.create_queue_pair(QueuePairOptions::default()).unwrap();
    let memory = rig.device.dma().allocate(4096).unwrap();
    rig.io_fault(command::io::READ, FaultAction::Delay(Duration::from_secs(3600)..=Duration::from_secs(3600)), 1);
    let read = nvme_driver::Command::blocks(command::io::READ, 1, 0, 1, 0).with_prps(memory.iova(), 0);
    let id = pair.push(read, 42).unwrap();
    pair.ring();
    // The abort may overtake the command: both queues are read by their own time.
    let start = Instant::now();
    while !controller.abort(pair.id(), id).unwrap() {
        assert!(start.elapsed() < crate::DEADLINE);
        std::thread::yield_now();
    }
    let done = complete(&mut pair, 1);
    assert_eq!(done[0].0, 42);
    assert_eq!(done[0].1.kind(), Status::ABORT_REQUESTED);
    assert!(!controller.abort(pair.id(), id).unwrap(), "it is not there any more");
    // The pair goes on.
    let segment = [Segment { iova: memory.iova(), bytes: 512 }];
    pair.submit(&namespace, Work::Read { lba: 0, segments: &segment }, 1).unwrap();
    pair.ring();
    assert_eq!(complete(&mut pair, 1), [(1, Status::SUCCESS)]);
    controller.delete_queue_pair(pair).unwrap();
}

#[test]
fn blocking_reads_and_writes() {
    let rig = Rig::new(Config { max_transfer: Some(8192), volatile_write_cache: true, ..small() });
    let controller = rig.open();
    let mut disk = controller.blocking(1, Duration::from_secs(10)).unwrap();
    // Longer than the buffer, and than what one command moves.
    let data: Vec<u8> = (0..300u32 << 10).map(|at| (at % 251) as u8).collect();
    disk.write(1000, &data).unwrap();
    disk.flush().unwrap();
    let mut read = vec![0; data.len()];
    disk.read(1000, &mut read).unwrap();
    assert!(read == data);
    let ranges = [nvme_driver::LbaRange { lba: 1000, blocks: 8 }];
    disk.execute(Work::WriteZeroes { ranges: &ranges, deallocate: true, fua: false }).unwrap();
    disk.read(1000, &mut read).unwrap();
    assert!(read[..4096].iter().all(|&byte| byte == 0) && read[4096..] == data[4096..]);

    let blocks = disk.namespace().blocks;
    assert!(matches!(disk.read(blocks - 1, &mut [0; 1024]), Err(Error::Invalid(_))));
    assert!(matches!(disk.read(u64::MAX, &mut [0; 512]), Err(Error::Invalid(_))));
    assert!(matches!(disk.write(0, &[0; 100]), Err(Error::Invalid(_))));
    disk.read(blocks - 1, &mut [0; 512]).unwrap();
}

#[test]
fn the_example_reads_what_is_there() {
    let rig = Rig::new(Config { namespaces: vec![disk(1 << 20, 512), disk(1 << 20, 4096)], ..Config::default() });
    let controller = rig.open();
    controller.blocking(2, Duration::from_secs(10)).unwrap().write(3, &[b'#'; 4096]).unwrap();
    drop(controller);
    let socket = rig.simulator.socket().to_path_buf();
    let Rig { device, simulator: _simulator, _directory, .. } = rig;
    // One front-end at a time.
    drop(device);
    let mut out = Vec::new();
    let arguments = [format!("vfio-user:{}", socket.display()), "2".into(), "3".into()];
    crate::read_block::run(arguments.into_iter(), &mut out).unwrap();
    let out = String::from_utf8(out).unwrap();
    assert!(out.contains("SIM0001") && out.contains("256 blocks of 4096 bytes"), "{out}");
    assert_eq!(out.matches("################").count(), 256, "{out}");
}
