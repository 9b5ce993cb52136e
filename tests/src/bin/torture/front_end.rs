//! The front-end's messages (the vhost-user protocol), each acknowledged before the next.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::memory::{Memory, USER};
use crate::ring::Driver;

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const GET_QUEUE_NUM: u32 = 17;
const SET_VRING_ENABLE: u32 = 18;
const GET_CONFIG: u32 = 24;
const GET_INFLIGHT_FD: u32 = 31;
const SET_INFLIGHT_FD: u32 = 32;

const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
const HEADER: usize = 12;

const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;
const F_FLUSH: u64 = 1 << 9;
const F_INDIRECT_DESC: u64 = 1 << 28;
const F_EVENT_IDX: u64 = 1 << 29;
const F_PROTOCOL_FEATURES: u64 = 1 << 30;
const F_VERSION_1: u64 = 1 << 32;
const F_RING_PACKED: u64 = 1 << 34;

const P_MQ: u64 = 1 << 0;
const P_REPLY_ACK: u64 = 1 << 3;
const P_CONFIG: u64 = 1 << 9;
const P_INFLIGHT_SHMFD: u64 = 1 << 12;

/// An answer that takes longer than this is none.
const ANSWER: Duration = Duration::from_secs(20);
/// Bytes of `struct virtio_blk_config` (virtio 1.2, 5.2.4).
const CONFIG: u32 = 60;

/// What a front-end keeps for the next back-end: the memory in which the last one has noted what is in flight.
pub(crate) struct Inflight {
    told: [u8; 24],
    file: File,
}

/// What a disk says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DiskInfo {
    pub sectors: u64,
    pub block_bytes: u32,
    pub max_write_zeroes_sectors: u32,
    pub flush: bool,
    pub discard: bool,
    pub write_zeroes: bool,
}

/// A ring as it is set up.
pub(crate) struct RingSetup<'a> {
    pub driver: &'a Driver,
    pub kick: &'a EventFd,
    pub call: &'a EventFd,
}

/// A connection to a back-end.
pub(crate) struct FrontEnd {
    stream: UnixStream,
    /// REPLY_ACK was negotiated.
    acknowledged: bool,
}

impl FrontEnd {
    /// `None`: nobody listens yet.
    pub(crate) fn connect(socket: &Path) -> io::Result<Option<FrontEnd>> {
        let stream = match UnixStream::connect(socket) {
            Ok(stream) => stream,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        stream.set_read_timeout(Some(ANSWER))?;
        Ok(Some(FrontEnd { stream, acknowledged: false }))
    }

    /// Whether the back-end has closed the connection.
    pub(crate) fn has_ended(&self) -> bool {
        // No message is expected: whatever is there to be read is the end.
        let quiet = self.stream.set_nonblocking(true).and_then(|()| {
            let found = (&self.stream).read(&mut [0; 1]);
            self.stream.set_nonblocking(false)?;
            found
        });
        !matches!(quiet, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Negotiates, gives memory and rings, and starts them, in QEMU's order.
    pub(crate) fn start(
        &mut self,
        memory: &Memory,
        packed: bool,
        rings: &[RingSetup],
        inflight: &mut Option<Inflight>,
    ) -> io::Result<DiskInfo> {
        let offered = self.ask(GET_FEATURES)?;
        let wanted = F_VERSION_1 | F_PROTOCOL_FEATURES | F_INDIRECT_DESC | F_EVENT_IDX;
        let wanted = wanted | if packed { F_RING_PACKED } else { 0 };
        if offered & wanted != wanted {
            return Err(io::Error::other(format!("features {wanted:#x} are wanted, {offered:#x} offered")));
        }
        let features = wanted | offered & (F_FLUSH | F_DISCARD | F_WRITE_ZEROES);
        let protocol = self.ask(GET_PROTOCOL_FEATURES)?;
        let must = P_MQ | P_REPLY_ACK | P_CONFIG;
        if protocol & must != must {
            return Err(io::Error::other(format!("protocol features {must:#x} are wanted, {protocol:#x} offered")));
        }
        // Without a log of what is in flight the run goes on, to show what is lost.
        self.tell(SET_PROTOCOL_FEATURES, &(protocol & (must | P_INFLIGHT_SHMFD)).to_ne_bytes(), &[])?;
        self.acknowledged = true;
        let queues = self.ask(GET_QUEUE_NUM)?;
        if queues < rings.len() as u64 {
            return Err(io::Error::other(format!("{} rings are wanted, {queues} offered", rings.len())));
        }
        self.tell(SET_OWNER, &[], &[])?;
        let info = self.config(features)?;
        if protocol & P_INFLIGHT_SHMFD != 0 {
            self.give_inflight(rings, inflight)?;
        }
        self.tell(SET_FEATURES, &features.to_ne_bytes(), &[])?;
        self.give_memory(memory)?;
        for (index, ring) in (0..).zip(rings) {
            self.give_ring(memory, index, ring)?;
        }
        for index in 0..rings.len() as u32 {
            self.tell(SET_VRING_ENABLE, &words([index, 1]), &[])?;
        }
        Ok(info)
    }

    fn config(&mut self, features: u64) -> io::Result<DiskInfo> {
        let mut body = words([0, CONFIG, 0]);
        body.resize(body.len() + CONFIG as usize, 0);
        self.send(GET_CONFIG, &body, &[])?;
        let (reply, _) = self.receive(GET_CONFIG)?;
        if reply.len() != body.len() {
            return Err(io::Error::other("the configuration space cannot be read"));
        }
        let space = &reply[12..];
        let u32_at = |at: usize| u32::from_le_bytes([space[at], space[at + 1], space[at + 2], space[at + 3]]);
        Ok(DiskInfo {
            sectors: u64::from(u32_at(0)) | u64::from(u32_at(4)) << 32,
            block_bytes: u32_at(20),
            max_write_zeroes_sectors: u32_at(48),
            flush: features & F_FLUSH != 0,
            discard: features & F_DISCARD != 0,
            write_zeroes: features & F_WRITE_ZEROES != 0,
        })
    }

    /// The first back-end makes the memory, all others get it back.
    fn give_inflight(&mut self, rings: &[RingSetup], inflight: &mut Option<Inflight>) -> io::Result<()> {
        if inflight.is_none() {
            let most = rings.iter().map(|ring| ring.driver.parts().size).max().unwrap_or(0);
            let mut asked = [0; 24];
            asked[16..18].copy_from_slice(&(rings.len() as u16).to_ne_bytes());
            asked[18..20].copy_from_slice(&most.to_ne_bytes());
            self.send(GET_INFLIGHT_FD, &asked, &[])?;
            let (body, file) = self.receive(GET_INFLIGHT_FD)?;
            let told = body.try_into().map_err(|_| io::Error::other("GET_INFLIGHT_FD: a reply of a wrong length"))?;
            let file = file.ok_or_else(|| io::Error::other("GET_INFLIGHT_FD: a reply without a descriptor"))?;
            *inflight = Some(Inflight { told, file });
        }
        let Some(Inflight { told, file }) = inflight else { return Ok(()) };
        self.tell(SET_INFLIGHT_FD, told, &[file.as_raw_fd()])
    }

    fn give_memory(&mut self, memory: &Memory) -> io::Result<()> {
        let regions = memory.regions();
        let mut body = words([regions.len() as u32, 0]);
        for region in &regions {
            for word in [region.guest, region.bytes, region.guest + USER, 0] {
                body.extend(word.to_ne_bytes());
            }
        }
        self.tell(SET_MEM_TABLE, &body, &regions.map(|region| region.file.as_raw_fd()))
    }

    fn give_ring(&mut self, memory: &Memory, index: u32, ring: &RingSetup) -> io::Result<()> {
        let parts = ring.driver.parts();
        self.tell(SET_VRING_NUM, &words([index, parts.size.into()]), &[])?;
        self.tell(SET_VRING_BASE, &words([index, ring.driver.base(memory)]), &[])?;
        let mut addresses = words([index, 0]);
        for address in [parts.descriptors, parts.device, parts.driver] {
            addresses.extend((address + USER).to_ne_bytes());
        }
        addresses.extend(0u64.to_ne_bytes());
        self.tell(SET_VRING_ADDR, &addresses, &[])?;
        self.tell(SET_VRING_KICK, &u64::from(index).to_ne_bytes(), &[ring.kick.as_raw_fd()])?;
        self.tell(SET_VRING_CALL, &u64::from(index).to_ne_bytes(), &[ring.call.as_raw_fd()])
    }

    fn ask(&mut self, request: u32) -> io::Result<u64> {
        self.send(request, &[], &[])?;
        let (body, _) = self.receive(request)?;
        let body = body.try_into().map_err(|_| io::Error::other(format!("request {request}: no number came back")))?;
        Ok(u64::from_ne_bytes(body))
    }

    fn tell(&mut self, request: u32, body: &[u8], files: &[RawFd]) -> io::Result<()> {
        self.send(request, body, files)?;
        if !self.acknowledged {
            return Ok(());
        }
        match self.receive(request)?.0[..] {
            [0, 0, 0, 0, 0, 0, 0, 0] => Ok(()),
            _ => Err(io::Error::other(format!("request {request} was refused"))),
        }
    }

    fn send(&mut self, request: u32, body: &[u8], files: &[RawFd]) -> io::Result<()> {
        let flags = VERSION | if self.acknowledged { NEED_REPLY } else { 0 };
        let mut message = words([request, flags, body.len() as u32]);
        message.extend(body);
        // So short a message is taken in whole.
        let sent = self.stream.send_with_fds(&[&message[..]], files).map_err(io::Error::from)?;
        if sent == message.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    fn receive(&mut self, request: u32) -> io::Result<(Vec<u8>, Option<File>)> {
        let mut header = [0; HEADER];
        let (bytes, file) = self.stream.recv_with_fd(&mut header).map_err(io::Error::from)?;
        self.stream.read_exact(&mut header[bytes..])?;
        let word = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        if word(0) != request || word(4) & REPLY == 0 || word(8) > 4096 {
            return Err(io::Error::other(format!("request {request}: the reply is one to {}", word(0))));
        }
        let mut body = vec![0; word(8) as usize];
        self.stream.read_exact(&mut body)?;
        Ok((body, file))
    }
}

fn words<const N: usize>(words: [u32; N]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}
