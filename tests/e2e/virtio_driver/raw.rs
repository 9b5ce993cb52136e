//! One request at a time, any request: what the crate's own block queue does not offer (GET_ID, several
//! segments, several ranges, unknown types), on its rings and its transport.

use std::ops::Range;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use vfio::PlainMemory;
use virtio_driver::virtqueue::{Virtqueue, VirtqueueLayout};
use virtio_driver::{VhostUser, VirtioBlkConfig, VirtioFeatureFlags, VirtioTransport, iovec};

/// Request types (virtio 1.2, 5.2.6).
pub(crate) const IN: u32 = 0;
pub(crate) const OUT: u32 = 1;
pub(crate) const FLUSH: u32 = 4;
pub(crate) const GET_ID: u32 = 8;
pub(crate) const DISCARD: u32 = 11;
pub(crate) const WRITE_ZEROES: u32 = 13;

/// Status bytes (virtio 1.2, 5.2.6).
pub(crate) const OK: u8 = 0;
pub(crate) const IOERR: u8 = 1;
pub(crate) const UNSUPP: u8 = 2;

/// Feature bits of the block device that the tests look at (virtio 1.2, 5.2.3).
pub(crate) const FEATURE_RO: u64 = 1 << 5;

const RING: u16 = 256;
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
/// virtio-blk's own unit of addresses and lengths (virtio 1.2, 5.2.4).
pub(crate) const SECTOR: u64 = 512;

/// What every request has in ring memory besides its data.
#[derive(Clone, Copy)]
#[repr(C)]
struct Control {
    header: [u8; 16],
    status: u8,
}

type Transport = dyn VirtioTransport<VirtioBlkConfig, Control>;

/// A connected disk with one queue and some memory for data.
pub(crate) struct RawDisk {
    queue: Virtqueue<'static, Control>,
    transport: Box<Transport>,
    data: PlainMemory,
}

/// One range of a discard or write zeroes (virtio 1.2, 5.2.6: `struct virtio_blk_discard_write_zeroes`).
pub(crate) fn range(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
    bytes[12..].copy_from_slice(&flags.to_le_bytes());
    bytes
}

impl RawDisk {
    /// Connects with one queue and `data_bytes` of memory for data.
    pub(crate) fn connect(socket: &Path, packed: bool, data_bytes: usize) -> RawDisk {
        let mut wanted = VirtioFeatureFlags::VERSION_1.bits() | 0xff_ffff;
        if packed {
            wanted |= VirtioFeatureFlags::RING_PACKED.bits();
        }
        let transport = VhostUser::new(socket.to_str().expect("a test's path is UTF-8"), wanted);
        let mut transport: Box<Transport> = Box::new(transport.expect("the target accepts a front-end"));
        let features = VirtioFeatureFlags::from_bits_truncate(transport.get_features());
        assert_eq!(features.contains(VirtioFeatureFlags::RING_PACKED), packed);
        let layout = VirtqueueLayout::new::<Control>(1, RING.into(), features).expect("a valid ring");
        // The queue wants its memory for ever; a test process may keep one page too many.
        let rings = Box::leak(Box::new(PlainMemory::create(layout.end_offset).expect("memory for a ring")));
        share(&mut *transport, rings);
        let queue = Virtqueue::new(transport.iova_translator(), rings.as_mut_slice(), RING, features);
        let queues = [queue.expect("a ring fits its memory")];
        transport.setup_queues(&queues).expect("the target starts the queue");
        // Shared after the queue has started: a front-end may.
        let mut data = PlainMemory::create(data_bytes).expect("memory for data");
        share(&mut *transport, &mut data);
        let [queue] = queues;
        RawDisk { queue, transport, data }
    }

    /// Features both sides speak.
    pub(crate) fn features(&self) -> u64 {
        self.transport.get_features()
    }

    /// The configuration space.
    pub(crate) fn config(&self) -> VirtioBlkConfig {
        self.transport.get_config().expect("the target answers GET_CONFIG")
    }

    /// The memory for data.
    pub(crate) fn data(&mut self) -> &mut [u8] {
        self.data.as_mut_slice()
    }

    /// Gives the data memory back to the target's oblivion and shares new memory instead.
    pub(crate) fn replace_data(&mut self, bytes: usize) {
        let address = self.data.as_mut_slice().as_ptr() as usize;
        let removed = self.transport.unmap_mem_region(address, self.data.len());
        removed.expect("the target forgets a region");
        self.data = PlainMemory::create(bytes).expect("memory for data");
        share(&mut *self.transport, &mut self.data);
    }

    /// Sends one request whose data lies at `out` (to the device), then `input` (from it), and returns its status.
    pub(crate) fn request(&mut self, kind: u32, sector: u64, out: &[Range<usize>], input: &[Range<usize>]) -> u8 {
        let data = self.data.as_mut_slice();
        let segments = |ranges: &[Range<usize>]| -> Vec<iovec> {
            ranges.iter().map(|range| buffer(&mut data[range.clone()])).collect()
        };
        let mut segments = segments;
        let (out, input) = (segments(out), segments(input));
        self.queue
            .add_request(|control, add| {
                control.header[..4].copy_from_slice(&kind.to_le_bytes());
                control.header[4..8].fill(0);
                control.header[8..].copy_from_slice(&sector.to_le_bytes());
                // No status: the device has to write one.
                control.status = 0xff;
                add(buffer(&mut control.header), false)?;
                out.iter().try_for_each(|segment| add(*segment, false))?;
                input.iter().try_for_each(|segment| add(*segment, true))?;
                add(buffer(std::slice::from_mut(&mut control.status)), true)
            })
            .expect("an empty ring has room for a request");
        if self.queue.avail_notif_needed() {
            self.transport.get_submission_notifier(0).notify().expect("an eventfd takes a kick");
        }
        let deadline = Instant::now() + ANSWER_WITHIN;
        loop {
            if let Some(completion) = self.queue.completions().next() {
                return completion.req.status;
            }
            assert!(Instant::now() < deadline, "request type {kind} at sector {sector} is not answered");
            std::thread::yield_now();
        }
    }

    /// Writes `bytes` from the beginning of the data memory.
    pub(crate) fn write(&mut self, sector: u64, bytes: &[u8]) -> u8 {
        self.data()[..bytes.len()].copy_from_slice(bytes);
        self.request(OUT, sector, &first(bytes.len()), &[])
    }

    /// Reads `length` bytes; they must not fail.
    pub(crate) fn read(&mut self, sector: u64, length: usize) -> Vec<u8> {
        self.data()[..length].fill(0xee);
        assert_eq!(self.request(IN, sector, &[], &first(length)), OK, "reading sector {sector}");
        self.data()[..length].to_vec()
    }

    /// Discards or zeroes `ranges`.
    pub(crate) fn change(&mut self, kind: u32, ranges: &[[u8; 16]]) -> u8 {
        let bytes = ranges.concat();
        self.data()[..bytes.len()].copy_from_slice(&bytes);
        self.request(kind, 0, &first(bytes.len()), &[])
    }
}

/// One segment: the first `length` bytes of the data memory.
pub(crate) fn first(length: usize) -> [Range<usize>; 1] {
    std::array::from_fn(|_| 0..length)
}

fn share(transport: &mut Transport, memory: &mut PlainMemory) {
    let address = memory.as_mut_slice().as_ptr() as usize;
    let shared = transport.map_mem_region(address, memory.len(), memory.file().as_raw_fd(), 0);
    shared.expect("the target takes a memory region");
}

fn buffer(bytes: &mut [u8]) -> iovec {
    iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }
}
