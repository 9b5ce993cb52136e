//! A vfio-user server made of bytes, to answer wrongly or not at all.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::Duration;

use vfio::{Address, Device, Error, OpenOptions};

pub(crate) const VERSION: u16 = 1;
pub(crate) const DEVICE_GET_INFO: u16 = 4;
pub(crate) const DEVICE_GET_REGION_INFO: u16 = 5;
pub(crate) const DEVICE_RESET: u16 = 13;

/// A message as the protocol frames it: 16 bytes of header, then the payload.
pub(crate) struct Message {
    pub header: [u8; 16],
    pub command: u16,
    pub payload: Vec<u8>,
}

impl Message {
    /// A good reply to it.
    pub(crate) fn reply(&self, payload: Vec<u8>) -> Vec<u8> {
        let mut reply = self.header;
        reply[4..8].copy_from_slice(&(16 + payload.len() as u32).to_ne_bytes());
        reply[8..12].copy_from_slice(&1u32.to_ne_bytes());
        [&reply[..], &payload].concat()
    }

    pub(crate) fn is_reply(&self) -> bool {
        self.header[8] & 0xf == 1
    }
}

pub(crate) struct RawServer {
    _directory: tempfile::TempDir,
    pub socket: PathBuf,
    thread: JoinHandle<()>,
}

impl RawServer {
    /// Serves one client: `answer` gives the payload of the reply, or `None` for silence from there on.
    pub(crate) fn start(mut answer: impl FnMut(&Message) -> Option<Vec<u8>> + Send + 'static) -> RawServer {
        RawServer::start_raw(move |message| answer(&message).map(|payload| message.reply(payload)))
    }

    /// Serves one client: `answer` gives all that is sent, header included, or `None` for silence from there on.
    pub(crate) fn start_raw(mut answer: impl FnMut(Message) -> Option<Vec<u8>> + Send + 'static) -> RawServer {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("raw.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            while let Some(message) = receive(&mut stream) {
                let Some(reply) = answer(message) else { continue };
                if stream.write_all(&reply).is_err() {
                    break;
                }
            }
        });
        RawServer { _directory: directory, socket, thread }
    }

    pub(crate) fn open(&self, timeout: Duration) -> Result<Device, Error> {
        Device::open_with(&Address::VfioUser(self.socket.clone()), &OpenOptions { request_timeout: timeout })
    }

    /// Whether the client has gone.
    pub(crate) fn is_left(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits until the client has gone; fails if it stays.
    pub(crate) fn join(self) {
        self.thread.join().expect("the client left within 20 s");
    }
}

/// The next message; `None` when the client has gone.
fn receive(stream: &mut UnixStream) -> Option<Message> {
    let mut header = [0; 16];
    match stream.read(&mut header).expect("the client sends something, or leaves") {
        0 => return None,
        read => stream.read_exact(&mut header[read..]).unwrap(),
    }
    let command = u16::from_ne_bytes([header[2], header[3]]);
    let bytes = u32::from_ne_bytes(header[4..8].try_into().unwrap());
    let mut payload = vec![0; bytes as usize - 16];
    stream.read_exact(&mut payload).unwrap();
    Some(Message { header, command, payload })
}

/// The payload of a good answer to VERSION.
pub(crate) fn version() -> Vec<u8> {
    [&0u16.to_ne_bytes()[..], &1u16.to_ne_bytes(), b"{\"capabilities\":{}}\0"].concat()
}

/// The payload of an answer to DEVICE_GET_INFO: a PCI device.
pub(crate) fn device_info(regions: u32) -> Vec<u8> {
    [16u32, 1 << 1, regions, 5].iter().flat_map(|number| number.to_ne_bytes()).collect()
}
