//! Front-ends that others have written, by the messages they send: SPDK's initiator, and what the protocol allows besides.

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nvme_sim::{Config, FaultPlan, NamespaceConfig};
use support::{DEADLINE, Host, await_some, pattern, start};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const VERSION: u16 = 1;
const DMA_MAP: u16 = 2;
const DMA_UNMAP: u16 = 3;
const GET_INFO: u16 = 4;
const GET_REGION_INFO: u16 = 5;
const GET_IRQ_INFO: u16 = 7;
const SET_IRQS: u16 = 8;
const REGION_READ: u16 = 9;
const REGION_WRITE: u16 = 10;

const EINVAL: u32 = 22;
const EOPNOTSUPP: u32 = 95;

/// An answer: its body and the file that came with it, or its error number.
type Answer = Result<(Vec<u8>, Option<File>), u32>;

struct FrontEnd(UnixStream);

impl FrontEnd {
    fn connect(controller: &support::Controller) -> FrontEnd {
        let stream = UnixStream::connect(controller.simulator.socket()).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        FrontEnd(stream)
    }

    fn send(&mut self, command: u16, body: &[u8], file: Option<&File>) {
        let mut raw = vec![0, 0];
        raw.extend(command.to_le_bytes());
        raw.extend((16 + body.len() as u32).to_le_bytes());
        raw.extend([0; 8]);
        raw.extend(body);
        match file {
            Some(file) => assert_eq!(self.0.send_with_fd(&raw[..], file.as_raw_fd()).unwrap(), raw.len()),
            None => self.0.write_all(&raw).unwrap(),
        }
    }

    /// Reads as SPDK does: the header with one call, the body with one more, which has to find all of it.
    fn receive(&mut self, command: u16) -> Answer {
        let mut header = [0; 16];
        let (bytes, file) = self.0.recv_with_fd(&mut header).unwrap();
        assert_eq!((bytes, header[2]), (16, command as u8), "{header:?}");
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!(word(8) & 0xf, 1, "a reply");
        if word(8) & 1 << 5 != 0 {
            return Err(word(12));
        }
        let mut body = vec![0; word(4) as usize - 16];
        if !body.is_empty() {
            assert_eq!(self.0.read(&mut body).unwrap(), body.len(), "the whole body at once");
        }
        Ok((body, file))
    }

    fn ask(&mut self, command: u16, body: &[u8], file: Option<&File>) -> Answer {
        self.send(command, body, file);
        self.receive(command)
    }

    fn read(&mut self, region: u32, offset: u64, bytes: u32) -> u64 {
        let access = words(&[offset as u32, (offset >> 32) as u32, region, bytes]);
        let (body, _) = self.ask(REGION_READ, &access, None).unwrap();
        assert_eq!(body[..16], access);
        body[16..].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) {
        let mut access = words(&[offset as u32, (offset >> 32) as u32, region, data.len() as u32]);
        access.extend(data);
        let (body, _) = self.ask(REGION_WRITE, &access, None).unwrap();
        assert_eq!(body, access[..16]);
    }
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_le_bytes()).collect()
}

/// Where SPDK maps its memory: at the addresses it has it at.
const MEMORY: u64 = 0x2000_0020_0000;
const MEMORY_BYTES: u64 = 2 << 20;
const ASQ: u64 = MEMORY;
const ACQ: u64 = MEMORY + 0x10000;
const SQ: u64 = MEMORY + 0x20000;
const CQ: u64 = MEMORY + 0x30000;
const PAGE: u64 = MEMORY + 0x40000;

/// SPDK 24's initiator (lib/vfio_user/host, lib/nvme/nvme_vfio_user.c): VERSION without any data, requests for regions with room
/// for 4 KiB, a file descriptor with both maps and unmaps.
#[test]
fn spdk_attaches_and_reads() {
    let namespace = NamespaceConfig { bytes: 64 << 20, ..Default::default() };
    let controller = start(Config { namespaces: vec![namespace], ..Default::default() });
    let data = pattern(3, 4096);
    let mut host = Host::bring_up(controller.simulator.socket());
    host.create_pair(1, 16, None);
    assert_eq!(host.write_blocks(1, 8, 9, &data), 0);
    drop(host);

    let mut spdk = FrontEnd::connect(&controller);
    let (version, _) = spdk.ask(VERSION, &[0, 0, 1, 0], None).unwrap();
    assert_eq!(version[..4], [0, 0, 1, 0]);
    assert!(version[4..].starts_with(b"{\"capabilities\"") && version.ends_with(b"\0"));
    let (info, _) = spdk.ask(GET_INFO, &words(&[16, 0, 0, 0]), None).unwrap();
    assert_eq!(info, words(&[16, 3, 9, 5]), "PCI, resettable, 9 regions, 5 kinds of interrupts");

    let mut doorbells = None;
    for index in 0..9 {
        let mut body = words(&[4064, 0, index]);
        body.resize(4064, 0);
        let (region, file) = spdk.ask(GET_REGION_INFO, &body, None).unwrap();
        assert_eq!(region[8..12], index.to_le_bytes());
        let size = u64::from_le_bytes(region[16..24].try_into().unwrap());
        match index {
            0 => {
                assert_eq!(region[4], 1 | 2 | 4 | 8, "readable, writable, mappable, with capabilities");
                // One area from 0x1000, described behind the 32 bytes of the region.
                assert_eq!(region[12..16], 32_u32.to_le_bytes());
                assert_eq!(region[32..48], words(&[1 | 1 << 16, 0, 1, 0]));
                assert_eq!(region[48..64], longs(&[0x1000, 0x1000]));
                assert!(size >= 0x2000);
                doorbells = file;
            }
            7 => assert_eq!((size, file.is_none()), (4096, true)),
            _ => assert_eq!((size, file.is_none()), (0, true)),
        }
    }
    let doorbells = doorbells.expect("BAR0 comes with its file");

    let memory = tempfile::tempfile_in("/dev/shm").unwrap();
    memory.set_len(MEMORY_BYTES * 2).unwrap();
    for n in 0..2 {
        let map = [words(&[32, 3]), longs(&[n * MEMORY_BYTES, MEMORY + n * MEMORY_BYTES, MEMORY_BYTES])].concat();
        assert!(spdk.ask(DMA_MAP, &map, Some(&memory)).unwrap().0.is_empty());
    }
    let command = spdk.read(7, 4, 2) as u16 | 0x404;
    spdk.write(7, 4, &command.to_le_bytes());

    assert_eq!((spdk.read(0, 0, 8) & 0xffff, spdk.read(0, 8, 4)), (1023, 0x0002_0000));
    spdk.write(0, 0x28, &ASQ.to_le_bytes());
    spdk.write(0, 0x30, &ACQ.to_le_bytes());
    spdk.write(0, 0x24, &words(&[31 << 16 | 31]));
    spdk.write(0, 0x14, &words(&[4 << 20 | 6 << 16 | 1]));
    await_some("CSTS.RDY", || (spdk.read(0, 0x1c, 4) == 1).then_some(()));

    // Entry `n` (from 0) of a queue that did not wrap, and its completion.
    let run = |sq: u64, cq: u64, doorbell: u64, n: u32, entry: &[(usize, u32)], prp1: u64| {
        let mut raw = [0; 64];
        for (dword, value) in entry {
            raw[4 * dword..][..4].copy_from_slice(&value.to_le_bytes());
        }
        raw[2] = n as u8;
        raw[24..32].copy_from_slice(&prp1.to_le_bytes());
        memory.write_all_at(&raw, sq - MEMORY + u64::from(n) * 64).unwrap();
        doorbells.write_all_at(&(n + 1).to_le_bytes(), 0x1000 + doorbell * 4).unwrap();
        await_some("a completion", || {
            let mut raw = [0; 16];
            memory.read_exact_at(&mut raw, cq - MEMORY + u64::from(n) * 16).unwrap();
            (raw[14] & 1 == 1).then_some(())
        });
        doorbells.write_all_at(&(n + 1).to_le_bytes(), 0x1000 + doorbell * 4 + 4).unwrap();
        let mut raw = [0; 16];
        memory.read_exact_at(&mut raw, cq - MEMORY + u64::from(n) * 16).unwrap();
        assert_eq!(u16::from_le_bytes([raw[14], raw[15]]) >> 1, 0, "status of {entry:?}");
        let mut page = vec![0; 4096];
        memory.read_exact_at(&mut page, PAGE - MEMORY).unwrap();
        page
    };
    let admin = |n, entry: &[(usize, u32)], prp1| run(ASQ, ACQ, 0, n, entry, prp1);
    assert_eq!(admin(0, &[(0, 6), (10, 1)], PAGE)[4..11], *b"SIM0001");
    admin(1, &[(0, 9), (10, 7), (11, 3 << 16 | 3)], 0);
    admin(2, &[(0, 5), (10, 15 << 16 | 1), (11, 1)], CQ);
    admin(3, &[(0, 1), (10, 15 << 16 | 1), (11, 1 << 16 | 1)], SQ);
    assert_eq!(run(SQ, CQ, 2, 0, &[(0, 2), (1, 1), (10, 8), (12, 7)], PAGE), data);

    spdk.write(0, 0x14, &words(&[1 << 14 | 4 << 20 | 6 << 16 | 1]));
    await_some("CSTS.SHST", || (spdk.read(0, 0x1c, 4) >> 2 & 3 == 2).then_some(()));
    for n in 0..2 {
        let unmap = [words(&[24, 0]), longs(&[MEMORY + n * MEMORY_BYTES, MEMORY_BYTES])].concat();
        assert_eq!(spdk.ask(DMA_UNMAP, &unmap, Some(&memory)).unwrap().0, unmap);
    }
}

#[test]
fn errors_say_what_is_wrong_and_the_connection_goes_on() {
    let controller = start(Config { dma_regions: Some(1), ..Default::default() });
    let mut front_end = FrontEnd::connect(&controller);
    let memory = tempfile::tempfile_in("/dev/shm").unwrap();
    memory.set_len(1 << 20).unwrap();
    let map = |address: u64, bytes: u64| [words(&[32, 3]), longs(&[0, address, bytes])].concat();
    for (command, body, file, error) in [
        (VERSION, vec![1, 0, 0, 0], None, EINVAL),
        (VERSION, vec![0], None, EINVAL),
        (DMA_MAP, map(0x10000, 0x1000), None, EOPNOTSUPP),
        (DMA_MAP, map(0x10000, 2 << 20), Some(&memory), EINVAL),
        (DMA_MAP, vec![0; 8], Some(&memory), EINVAL),
        (GET_REGION_INFO, words(&[32, 0, 9, 0, 0, 0, 0, 0]), None, EINVAL),
        (GET_IRQ_INFO, words(&[16, 0, 5, 0]), None, EINVAL),
        (SET_IRQS, words(&[20, 1 << 2 | 1 << 5, 2, 0, 2]), Some(&memory), EINVAL),
        (REGION_READ, words(&[0, 0, 0, 2 << 20]), None, EINVAL),
        (REGION_READ, words(&[0, 0, 99, 4]), None, EINVAL),
        (REGION_WRITE, words(&[0, 0, 0, 8, 1]), None, EINVAL),
        (6, vec![], None, EOPNOTSUPP),
        (99, vec![0; 100], None, EOPNOTSUPP),
    ] {
        assert_eq!(front_end.ask(command, &body, file).err(), Some(error), "command {command} {body:?}");
    }
    // VERSION with a text, ended or not, or with none; a later minor version is spoken down to ours.
    for text in [&b"{\"capabilities\":{\"max_msg_fds\":8}}\0"[..], b"{\"capabilities\":{\"twin\":{}}}", b"", b"\0"] {
        let body = [&[0, 0, 9, 0], text].concat();
        assert_eq!(front_end.ask(VERSION, &body, None).unwrap().0[..4], [0, 0, 1, 0]);
    }
    assert!(front_end.ask(DMA_MAP, &map(0x10000, 0x1000), Some(&memory)).is_ok());
    assert_eq!(front_end.ask(DMA_MAP, &map(0x20000, 0x1000), Some(&memory)).err(), Some(EINVAL), "one region too many");
    assert!(front_end.ask(DMA_UNMAP, &[words(&[24, 4]), longs(&[0, 0])].concat(), None).is_ok(), "everything");
    assert!(front_end.ask(DMA_MAP, &map(0x20000, 0x1000), Some(&memory)).is_ok());
    assert_eq!(front_end.read(0, 8, 4), 0x0002_0000);
}

#[test]
fn a_message_in_pieces_and_one_without_an_answer() {
    let controller = start(Config::default());
    let mut front_end = FrontEnd::connect(&controller);
    // AQA, written in single bytes, and nobody waits for the answer (flag bit 4).
    let mut raw = [&[5, 0][..], &REGION_WRITE.to_le_bytes(), &words(&[36, 1 << 4, 0])].concat();
    raw.extend(words(&[0x24, 0, 0, 4, 0x001f_001f]));
    for byte in raw {
        front_end.0.write_all(&[byte]).unwrap();
    }
    assert_eq!(front_end.read(0, 0x24, 4), 0x001f_001f);
}

#[test]
fn slow_answers() {
    let delay = Duration::from_millis(30);
    let faults = FaultPlan { message_delay: delay, ..Default::default() };
    let controller = start(Config { faults, ..Default::default() });
    let mut front_end = FrontEnd::connect(&controller);
    let begin = Instant::now();
    assert_eq!(front_end.read(0, 8, 4), 0x0002_0000);
    assert!(begin.elapsed() >= delay);
}
