//! Registers, bring-up, resets, interrupts, and the front-end's side of it.

mod support;

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use nvme_sim::{Config, Error, NamespaceConfig, Simulator};
use support::{Controller, DEADLINE, Host, MEMORY, MEMORY_BYTES, Sqe, await_some, pattern, start};
use vmm_sys_util::eventfd::EventFd;

const EVENTFD_TRIGGER: u32 = 1 << 2 | 1 << 5;
const NONE_TRIGGER: u32 = 1 | 1 << 5;

#[test]
fn a_block_is_written_and_read() {
    for (block_bytes, by_message) in [(512, false), (4096, false), (512, true)] {
        let namespace = NamespaceConfig { bytes: 64 << 20, block_bytes, ..Default::default() };
        let controller = start(Config { namespaces: vec![namespace], ..Default::default() });
        let mut host = Host::connect(controller.simulator.socket());
        host.by_message = by_message;
        host.enable();
        assert_eq!(host.set_feature(7, 3 << 16 | 3).result, 3 << 16 | 3);
        host.create_pair(1, 64, None);
        let data = pattern(1, 64 << 10);
        let shift = block_bytes.ilog2();
        assert_eq!(host.write_blocks(1, 5, shift, &data), 0);
        assert_eq!(host.read_blocks(1, 5, shift, data.len()), Ok(data));
        assert_eq!(host.read_blocks(1, 1000, shift, 4096), Ok(vec![0; 4096]));
        assert_eq!(host.command(1, Sqe::new(0x00, 1)).status, 0);
    }
}

#[test]
fn registers_tell_the_configuration() {
    let controller = start(Config { queue_entries: 256, doorbell_stride: 2, ..Default::default() });
    let mut host = Host::connect(controller.simulator.socket());
    let cap = host.read64(0);
    assert_eq!(cap & 0xffff, 255, "MQES");
    assert_eq!(cap >> 16 & 1, 1, "CQR");
    assert_eq!(cap >> 24 & 0xff, 4, "TO: 2 s");
    assert_eq!(cap >> 32 & 15, 2, "DSTRD");
    assert_eq!(cap >> 37 & 0xff, 1, "CSS");
    assert_eq!((cap >> 48 & 15, cap >> 52 & 15), (0, 4), "MPSMIN, MPSMAX");
    assert_eq!(host.read32(8), 0x0002_0000, "VS");
    assert_eq!((host.read32(0x14), host.status()), (0, 0));
    // The stride is used: three queues work with it.
    host.enable();
    for id in 1..=3 {
        host.create_pair(id, 16, None);
        assert_eq!(host.write_blocks(id, id.into(), 9, &pattern(id.into(), 512)), 0);
    }
}

#[test]
fn the_regions_are_as_pci_says() {
    let controller = start(Config::default());
    let mut host = Host::connect(controller.simulator.socket());
    let bar = host.client.region(0).unwrap();
    assert!(bar.size >= 16384 && bar.size.is_power_of_two());
    assert_eq!(bar.sparse_areas.len(), 1);
    assert_eq!(bar.sparse_areas[0].offset, 0x1000);
    assert_eq!(bar.sparse_areas[0].size % 4096, 0);
    assert!(bar.file_offset.is_some());
    let size = bar.size;
    for empty in [1, 2, 3, 4, 5, 6, 8] {
        assert_eq!(host.client.region(empty).unwrap().size, 0);
    }
    let mut raw = [0; 4];
    host.config_read(8, &mut raw);
    assert_eq!(raw[1..], [2, 8, 1], "class code");
    host.config_write(0x10, &[0xff; 4]);
    host.config_read(0x10, &mut raw);
    assert_eq!(!(u32::from_le_bytes(raw) & !15) as u64 + 1, size);
    // MSI-X: the table is inside the BAR, writable, and not part of the registers.
    host.config_read(0x50, &mut raw);
    assert_eq!(raw[0], 0x11);
    assert_eq!(u16::from_le_bytes([raw[2], raw[3]]) & 0x7ff, 16);
    host.config_read(0x54, &mut raw);
    let table = u64::from(u32::from_le_bytes(raw) & !7);
    host.client.region_write(0, table, &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
    assert_eq!(host.read64(table), 0x0807_0605_0403_0201);
    assert_eq!(host.client.get_irq_info(2).unwrap().count, 17);
    assert_eq!(host.client.get_irq_info(0).unwrap().count, 0);
}

#[test]
fn odd_accesses_are_survived() {
    let controller = start(Config::default());
    let mut host = Host::connect(controller.simulator.socket());
    for (region, offset, len) in [
        (0, 1, 7),
        (0, 0xfff, 2),
        (0, 0x1001, 3),
        (0, u64::MAX - 1, 4),
        (0, 1 << 40, 8),
        (7, 4090, 16),
        (3, 0, 4),
        (0, 0, 65536),
    ] {
        let mut raw = vec![0; len];
        host.client.region_read(region, offset, &mut raw).unwrap();
        host.client.region_write(region, offset, &vec![0; len]).unwrap();
    }
    host.write32(8, 0x1234);
    host.enable();
    assert!(host.identify(1, 0).is_ok());
}

#[test]
fn what_cannot_be_enabled_is_a_fatal_status() {
    const CC: u32 = 4 << 20 | 6 << 16 | 1;
    let controller = start(Config::default());
    let mut host = Host::connect(controller.simulator.socket());
    type Change = fn(&mut Host);
    let cases: [(&str, u32, Change); 6] = [
        ("CC.CSS", CC | 6 << 4, |_| {}),
        ("CC.MPS", CC | 5 << 7, |_| {}),
        ("CC.AMS", CC | 1 << 11, |_| {}),
        ("AQA", CC, |host| host.write32(0x24, 0x1f)),
        ("ASQ alignment for 8 KiB pages", CC | 1 << 7, |host| host.write64(0x28, support::MEMORY + 4096)),
        ("a queue outside of memory, at the first command", CC, |host| host.write64(0x28, 0x5000)),
    ];
    for (what, cc, change) in cases {
        host.prepare(8);
        change(&mut host);
        host.write32(0x14, cc);
        if what.starts_with("a queue") {
            host.await_status(1, 1);
            host.ring(0x1000, 1);
        }
        await_some(what, || (host.status() & 2 != 0).then_some(()));
        host.write32(0x14, 0);
        host.await_status(3, 0);
    }
    host.enable();
    assert!(host.identify(1, 0).is_ok(), "a reset leads out of it");
}

#[test]
fn resets_and_shutdowns() {
    let controller = start(Config::default());
    let mut host = Host::bring_up(controller.simulator.socket());
    host.create_pair(1, 16, None);
    assert_eq!(host.set_feature(0x0b, 0x100).status, 0);
    host.disable();
    assert_ne!(host.read32(0x24), 0, "AQA stays over a controller reset");
    host.enable();
    assert_eq!(host.get_feature(0x0b, 0).result, 0, "features are at their defaults");
    host.create_pair(1, 16, None);
    assert_eq!(host.write_blocks(1, 0, 9, &[1; 512]), 0);

    // Normal shutdown, then a reset, then work again.
    host.write32(0x14, 4 << 20 | 6 << 16 | 1 << 14 | 1);
    host.await_status(0xc, 0x8);
    host.disable();
    assert_eq!(host.status(), 0);
    host.enable();

    // NVM subsystem reset.
    host.write32(0x20, 0x1234_5678);
    assert_eq!(host.status() & 0x11, 1);
    host.write32(0x20, 0x4e56_4d65);
    host.await_status(0x11, 0x10);
    assert_eq!((host.read32(0x14), host.read32(0x24)), (0, 0));
    host.write32(0x1c, 0x10);
    assert_eq!(host.status(), 0);
    host.enable();

    // Reset by vfio-user, and function level reset by configuration space.
    host.client.reset().unwrap();
    assert_eq!((host.read32(0x14), host.status()), (0, 0));
    host.enable();
    host.config_write(0x68, &[0x10, 0xa8]);
    assert_eq!((host.read32(0x14), host.status()), (0, 0));
    host.config_write(4, &[6]);
    host.enable();
    host.create_pair(1, 16, None);
    assert_eq!(host.read_blocks(1, 0, 9, 512), Ok(vec![1; 512]), "no reset touches the data");
}

#[test]
fn no_bus_master_no_memory_access() {
    let controller = start(Config::default());
    let mut host = Host::bring_up(controller.simulator.socket());
    host.create_pair(1, 16, None);
    host.config_write(4, &[2]);
    let id = host.submit(1, Sqe::new(0, 1));
    host.expect_silence(1);
    assert_eq!(host.status(), 1);
    host.config_write(4, &[6]);
    assert_eq!(host.wait(1).id, id);
    drop(host);
    let mut host = Host::connect(controller.simulator.socket());
    let mut raw = [0; 1];
    host.config_read(4, &mut raw);
    assert_eq!(raw, [6], "as the test host has set it");
    host.config_write(0x3c, &[77]);
    drop(host);
    let mut host = Host::connect(controller.simulator.socket());
    host.config_read(0x3c, &mut raw);
    assert_eq!(raw, [0], "nothing is left of the one before");
}

#[test]
fn larger_memory_pages() {
    let controller = start(Config::default());
    let mut host = Host::connect(controller.simulator.socket());
    // Queues at a multiple of 64 KiB.
    let gap = 65536 - (host.allocate(4096) + 4096 - support::MEMORY) % 65536;
    host.allocate(gap);
    let (sq, cq) = (host.allocate(65536), host.allocate(65536));
    host.prepare(8);
    host.relocate_admin(sq, cq);
    host.write32(0x14, 4 << 20 | 6 << 16 | 4 << 7 | 1);
    host.await_status(1, 1);
    let buffer = host.allocate(65536 * 3);
    // 4 KiB that begin in the middle of a 64 KiB page need no second pointer.
    let entry = Sqe::new(6, 0).prp(buffer + 20480, 0).dword(10, 1);
    assert_eq!(host.admin(entry).status, 0);
    assert_eq!(host.get(buffer + 20480 + 4, 7), b"SIM0001");
}

#[test]
fn one_front_end_after_the_other() {
    let controller = start(Config::default());
    let data = pattern(9, 4096);
    for round in 0..4 {
        let mut host = Host::connect(controller.simulator.socket());
        assert_eq!((host.read32(0x14), host.status()), (0, 0), "nothing is left of the one before");
        host.enable();
        host.create_pair(1, 16, None);
        if round == 0 {
            assert_eq!(host.write_blocks(1, 7, 9, &data), 0);
        } else {
            assert_eq!(host.read_blocks(1, 7, 9, 4096).unwrap(), data);
        }
        // Leaves with commands under way.
        let buffer = host.allocate(4096);
        for _ in 0..10 {
            host.push(1, Sqe::new(2, 1).prp(buffer, 0).blocks(0, 8));
        }
        host.flush(1);
    }
}

#[test]
fn malformed_messages_do_not_stop_the_next_front_end() {
    let controller = start(Config::default());
    let message = |command: u16, size: u32, body: &[u8]| {
        let mut raw = vec![1, 0];
        raw.extend(command.to_le_bytes());
        raw.extend(size.to_le_bytes());
        raw.extend([0; 8]);
        raw.extend(body);
        raw
    };
    let cases = [
        message(1, 20 + 3, &[0, 0, 1, 0, b'a', b'b', b'c']), // a version text without its end
        message(1, 4, &[0, 0, 1, 0]),                        // shorter than its header
        message(99, 16, &[]),
        message(5, 16 + 32, &[0xff; 32]),
        message(9, 32, &[0xff; 16]),
        message(2, 48, &[0; 32]),
        vec![7; 5],
    ];
    for raw in cases {
        let mut stream = UnixStream::connect(controller.simulator.socket()).unwrap();
        stream.write_all(&raw).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut rest = vec![];
        // The server answers with an error, or hangs up.
        let _ = stream.read_to_end(&mut rest);
    }
    let mut host = Host::bring_up(controller.simulator.socket());
    assert!(host.identify(1, 0).is_ok());
}

#[test]
fn interrupts_by_eventfd() {
    let controller = start(Config::default());
    let mut host = Host::bring_up(controller.simulator.socket());
    let events: Vec<EventFd> = (0..3).map(|_| EventFd::new(libc::EFD_NONBLOCK).unwrap()).collect();
    let fds: Vec<_> = events.iter().map(AsRawFd::as_raw_fd).collect();
    host.client.set_irqs(2, EVENTFD_TRIGGER, 0, 1, &fds[..1]).unwrap();
    host.client.set_irqs(2, EVENTFD_TRIGGER, 1, 2, &fds[1..]).unwrap();
    host.create_pair(1, 64, Some(2));
    host.create_pair(2, 64, None);
    assert!(events[0].read().unwrap() >= 1, "the admin queue uses vector 0");
    let buffer = host.allocate(4096);
    let read = Sqe::new(2, 1).prp(buffer, 0).blocks(0, 8);
    host.command(1, read);
    assert_eq!(await_some("an interrupt", || events[2].read().ok()), 1);
    assert!(events[1].read().is_err(), "another vector");
    host.command(2, read);
    assert!(events[2].read().is_err(), "interrupts of queue 2 are off");
    // A batch interrupts less often than it completes.
    for _ in 0..48 {
        host.push(1, read);
    }
    host.flush(1);
    for _ in 0..48 {
        assert_eq!(host.wait(1).status, 0);
    }
    let sent = await_some("an interrupt", || events[2].read().ok());
    assert!((1..=4).contains(&sent), "{sent}");
    // A loopback trigger, then off, one vector and all.
    host.client.set_irqs(2, NONE_TRIGGER, 1, 1, &[]).unwrap();
    assert_eq!(events[1].read().unwrap(), 1);
    host.client.set_irqs(2, EVENTFD_TRIGGER, 2, 1, &[]).unwrap();
    host.command(1, read);
    assert!(events[2].read().is_err());
    host.client.set_irqs(2, NONE_TRIGGER, 0, 0, &[]).unwrap();
    let _ = events[0].read();
    assert!(host.identify(1, 0).is_ok());
    assert!(events[0].read().is_err());
    // Vectors that do not exist are refused, and nothing breaks.
    host.client.set_irqs(2, EVENTFD_TRIGGER, 16, 2, &fds[..2]).unwrap();
    host.command(1, read);
}

#[test]
fn unmapped_memory_is_let_go() {
    let controller = start(Config::default());
    let mut host = Host::bring_up(controller.simulator.socket());
    host.create_pair(1, 16, None);
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(1 << 20).unwrap();
    for round in 0..50_u64 {
        let iova = 0x10_0000 + ((round % 3) << 21);
        host.client.dma_map(0, iova, 1 << 20, file.as_raw_fd()).unwrap();
        let read = Sqe::new(2, 1).prp(iova, iova + 4096).blocks(0, 16);
        assert_eq!(host.command(1, read).status, 0);
        for _ in 0..8 {
            host.push(1, read);
        }
        host.flush(1);
        // Commands are under way: each is carried out before the answer, or fails after it.
        host.client.dma_unmap(iova, 1 << 20).unwrap();
        for _ in 0..8 {
            assert!(matches!(host.wait(1).status, 0 | 4));
        }
        assert_eq!(host.command(1, read).status, 4, "Data Transfer Error");
    }
}

/// A front-end lets go of its memory when it wants, and is not kept waiting.
#[test]
fn memory_is_unmapped_after_the_end_too() {
    let Controller { simulator, directory: _directory } = start(Config::default());
    let mut host = Host::bring_up(simulator.socket());
    simulator.stop();
    let (told, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || told.send(host.client.dma_unmap(MEMORY, MEMORY_BYTES).is_ok()));
    assert_eq!(ended.recv_timeout(DEADLINE), Ok(true));
}

#[test]
fn starting_and_stopping() {
    let controller = start(Config::default());
    let socket = controller.path("nvme.sock");
    let error = Simulator::start(Config::default(), &socket).err().unwrap();
    assert!(matches!(error, Error::Socket { .. }), "{error}");
    let mut host = Host::bring_up(&socket);
    let support::Controller { simulator, directory } = controller;
    simulator.stop();
    assert!(!socket.exists());
    assert_eq!(host.status(), 0xffff_ffff, "a front-end that is still there sees that the controller has gone");
    drop(host);
    // A socket left behind by a process that died is replaced; another file is not.
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let simulator = Simulator::start(Config::default(), &socket).unwrap();
    assert!(Host::bring_up(&socket).identify(1, 0).is_ok());
    drop(simulator);
    std::fs::write(&socket, "precious").unwrap();
    assert!(Simulator::start(Config::default(), &socket).is_err());
    assert_eq!(std::fs::read(&socket).unwrap(), b"precious");
    drop(directory);
}

#[test]
fn many_queues() {
    let controller = start(Config { max_queue_pairs: 128, ..Default::default() });
    let mut host = Host::bring_up(controller.simulator.socket());
    assert_eq!(host.set_feature(7, 199 << 16 | 199).result, 127 << 16 | 127);
    for id in 1..=128 {
        host.create_pair(id, 16, Some(id));
    }
    let buffer = host.allocate(128 * 4096);
    for id in 1..=128 {
        host.put(buffer + u64::from(id - 1) * 4096, &[id as u8; 4096]);
        let write = Sqe::new(1, 1).prp(buffer + u64::from(id - 1) * 4096, 0).blocks(u64::from(id) * 8, 8);
        for _ in 0..15 {
            host.push(id, write);
        }
        host.flush(id);
    }
    for _ in 0..15 {
        for id in 1..=128 {
            assert_eq!(host.wait(id).status, 0);
        }
    }
    for id in 1..=128_u16 {
        assert_eq!(host.read_blocks(129 - id, u64::from(id) * 8, 9, 4096), Ok(vec![id as u8; 4096]));
    }
}
