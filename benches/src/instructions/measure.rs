//! The measured process: runs under callgrind, which counts only inside the functions called `counted_…`.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nvme_driver::controller::{Controller, Options, QueuePairOptions};
use nvme_driver::{BouncePool, Namespace, QueuePair, Segment, Work};
use vfio::{Address, Device};
use vhost_blk::blk::disk::Disk;
use vhost_blk::datapath::counters::LaneCounters;
use vhost_blk::datapath::lane::{Lane, LaneSetup};
use vhost_blk::datapath::poll_group::PollGroup;
use vhost_blk::virtio::memory::{DmaScope, GuestMemory, GuestView};
use vhost_blk::virtio::ring::{Chain, Head, InflightMemory, Ring};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use crate::guest::{BYTES, Guest, Layout, RING};
use crate::rows::{Row, What};
use crate::simulator::Paused;

/// Nothing here takes longer than this, valgrind's slowness included.
const DEADLINE: Duration = Duration::from_secs(60);

/// The controller as the measured process sees it.
struct Drive {
    device: Device,
    controller: Controller,
    namespace: Namespace,
    scope: DmaScope,
}

impl Drive {
    fn open(socket: &Path) -> Drive {
        let device = Device::open(&Address::VfioUser(socket.into())).expect("the simulator listens");
        // As with a drive: shadow doorbells exist in software controllers only.
        let options = Options { shadow_doorbells: false, ..Default::default() };
        let controller = Controller::open(&device, &options).expect("the simulator comes up");
        let namespace = controller.namespace(1).expect("it has one namespace");
        Drive { scope: DmaScope::new(device.dma().clone()), device, controller, namespace }
    }

    fn pair(&self) -> QueuePair {
        let options = QueuePairOptions { entries: Some(128), ..Default::default() };
        self.controller.create_queue_pair(options).expect("it has queue pairs")
    }
}

/// Runs one row: `warm_up` rounds that are not counted, then `rounds` that are.
pub(crate) fn measure(row: &Row, socket: &Path, simulator: u32) {
    let drive = Drive::open(socket);
    match row.what {
        What::Lane(layout) => lane(row, &drive, simulator, layout, false),
        What::LoggedLane(layout) => lane(row, &drive, simulator, layout, true),
        What::Driver => driver(row, &drive, simulator),
        What::Ring(layout) => ring(row, &drive, layout),
        What::VirtioQueue(layout) => virtio_queue(row, layout),
    }
}

/// The whole path: ring to queue pair in one call, queue pair to ring in another. The controller is stopped during both, so
/// that neither finds less or more to do from one run to the next.
fn lane(row: &Row, drive: &Drive, simulator: u32, layout: Layout, logged: bool) {
    let mut guest = Guest::new(layout);
    let memory = GuestMemory::new().replaced(&drive.scope, guest.regions()).expect("plain memory");
    let memory = Arc::new(memory);
    let disk = Disk::new(drive.namespace.clone());
    let mut ring = Ring::new(&memory, &guest.ring()).expect("a valid ring");
    if logged {
        let log = InflightMemory::create(1, ring.size()).expect("some memory");
        ring.set_log(&log.queue(0).expect("the first")).expect("large enough");
    }
    let lane = Lane::new(LaneSetup {
        name: "measured".into(),
        ring,
        memory: memory.clone(),
        disk: Arc::new(disk),
        kick: None,
        call: None,
        error: None,
        counters: Arc::new(LaneCounters::default()),
        log: Arc::default(),
        hold: std::time::Duration::ZERO,
    });
    let sectors = drive.namespace.bytes() / 512;
    let pool = BouncePool::new(drive.device.dma(), 1 << 20).expect("some memory");
    let mut group = PollGroup::new(drive.pair(), pool);
    group.add(lane);
    for round in 0..row.warm_up() + row.rounds() {
        guest.submit(row.batch, sectors);
        let paused = Paused::new(simulator);
        let submitted = if round < row.warm_up() { group.poll() } else { counted_poll(&mut group) };
        assert_eq!(submitted, usize::from(row.batch), "everything is submitted, nothing has completed");
        drop(paused);
        wait_answered(group.pair().expect("the drive is there"), row.batch);
        let paused = Paused::new(simulator);
        let completed = if round < row.warm_up() { group.poll() } else { counted_poll(&mut group) };
        assert_eq!(completed, usize::from(row.batch), "everything has completed");
        drop(paused);
        assert_eq!(guest.collect(), row.batch);
    }
}

#[inline(never)]
fn counted_poll(group: &mut PollGroup) -> usize {
    std::hint::black_box(group).poll()
}

fn wait_answered(pair: &QueuePair, count: u16) {
    let start = Instant::now();
    while pair.answered() < usize::from(count) {
        assert!(start.elapsed() < DEADLINE, "the simulator does not answer");
        std::thread::yield_now();
    }
}

/// The driver's share: submit, ring, reap.
fn driver(row: &Row, drive: &Drive, simulator: u32) {
    let mut pair = drive.pair();
    let buffer = drive.device.dma().allocate(usize::from(row.batch) * BYTES as usize).expect("some memory");
    let segments: Vec<Segment> = (0..row.batch)
        .map(|at| Segment { iova: buffer.iova() + u64::from(at) * u64::from(BYTES), bytes: BYTES })
        .collect();
    for round in 0..row.warm_up() + row.rounds() {
        let counted = round >= row.warm_up();
        let paused = Paused::new(simulator);
        if counted {
            counted_submit(&mut pair, &drive.namespace, &segments);
        } else {
            submit(&mut pair, &drive.namespace, &segments);
        }
        drop(paused);
        wait_answered(&pair, row.batch);
        let paused = Paused::new(simulator);
        let tokens = if counted { counted_reap(&mut pair) } else { reap(&mut pair) };
        assert_eq!(tokens, (0..u64::from(row.batch)).sum::<u64>());
        drop(paused);
    }
}

#[inline(always)]
fn submit(pair: &mut QueuePair, namespace: &Namespace, segments: &[Segment]) {
    for (token, segment) in segments.iter().enumerate() {
        let work = Work::Read { lba: token as u64 * 64, segments: std::slice::from_ref(segment) };
        pair.submit(namespace, work, token as u64).expect("a valid read, and a free slot");
    }
    pair.ring();
}

#[inline(always)]
fn reap(pair: &mut QueuePair) -> u64 {
    let mut tokens = 0;
    pair.reap(|completed| tokens += completed.token + u64::from(completed.status.bits()));
    tokens
}

#[inline(never)]
fn counted_submit(pair: &mut QueuePair, namespace: &Namespace, segments: &[Segment]) {
    submit(std::hint::black_box(pair), namespace, segments);
}

#[inline(never)]
fn counted_reap(pair: &mut QueuePair) -> u64 {
    reap(std::hint::black_box(pair))
}

/// Our ring alone: chains popped and walked, given back, published.
fn ring(row: &Row, drive: &Drive, layout: Layout) {
    let mut guest = Guest::new(layout);
    let memory = GuestMemory::new().replaced(&drive.scope, guest.regions()).expect("plain memory");
    let memory = Arc::new(memory);
    let mut ring = Ring::new(&memory, &guest.ring()).expect("a valid ring");
    let mut view = GuestView::new(memory);
    let mut chain = Chain::new();
    let mut heads = Vec::with_capacity(RING.into());
    for round in 0..row.warm_up() + row.rounds() {
        guest.submit(row.batch, 1 << 20);
        heads.clear();
        let turn = if round < row.warm_up() { ring_turn } else { counted_ring };
        let bytes = turn(&mut ring, &mut view, &mut chain, &mut heads);
        assert_eq!(bytes, u64::from(row.batch) * (16 + u64::from(BYTES) + 1));
        assert_eq!(collect_unwritten(&mut guest), row.batch);
    }
}

#[inline(never)]
fn counted_ring(ring: &mut Ring, view: &mut GuestView, chain: &mut Chain, heads: &mut Vec<Head>) -> u64 {
    ring_turn(ring, view, chain, heads)
}

#[inline(always)]
fn ring_turn(ring: &mut Ring, view: &mut GuestView, chain: &mut Chain, heads: &mut Vec<Head>) -> u64 {
    let mut bytes = 0;
    while let Ok(Some(head)) = ring.pop(view, chain) {
        for buffer in chain.readable().iter().chain(chain.writable()) {
            bytes += u64::from(buffer.bytes);
        }
        heads.push(head);
    }
    for &head in heads.iter() {
        ring.push_used(head, BYTES + 1);
    }
    ring.publish();
    bytes
}

/// The yardstick: the same with `virtio-queue` over `vm-memory`.
fn virtio_queue(row: &Row, layout: Layout) {
    let mut guest = Guest::new(layout);
    let (region, file) = guest.region();
    let file = FileOffset::new(file, region.file_offset);
    let range = (GuestAddress(region.guest_address), region.bytes as usize, Some(file));
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges_with_files([range]).expect("plain memory");
    let setup = guest.ring();
    let mut queue = Queue::new(RING).expect("a valid size");
    queue.set_desc_table_address(Some(setup.descriptors as u32), Some(0));
    queue.set_avail_ring_address(Some(setup.driver as u32), Some(0));
    queue.set_used_ring_address(Some(setup.device as u32), Some(0));
    queue.set_event_idx(true);
    queue.set_size(RING);
    queue.set_ready(true);
    assert!(queue.is_valid(&memory));
    let mut heads = Vec::with_capacity(RING.into());
    for round in 0..row.warm_up() + row.rounds() {
        guest.submit(row.batch, 1 << 20);
        heads.clear();
        let turn = if round < row.warm_up() { virtio_queue_turn } else { counted_virtio_queue };
        let bytes = turn(&mut queue, &memory, &mut heads);
        assert_eq!(bytes, u64::from(row.batch) * (16 + u64::from(BYTES) + 1));
        assert_eq!(collect_unwritten(&mut guest), row.batch);
    }
}

#[inline(never)]
fn counted_virtio_queue(queue: &mut Queue, memory: &GuestMemoryMmap, heads: &mut Vec<u16>) -> u64 {
    virtio_queue_turn(queue, memory, heads)
}

#[inline(always)]
fn virtio_queue_turn(queue: &mut Queue, memory: &GuestMemoryMmap, heads: &mut Vec<u16>) -> u64 {
    let mut bytes = 0;
    // The iterator holds the queue, so the heads are kept until it is done, as in `ring_turn`.
    for chain in queue.iter(memory).expect("a valid queue") {
        heads.push(chain.head_index());
        for descriptor in chain {
            bytes += u64::from(descriptor.len());
        }
    }
    for &head in heads.iter() {
        queue.add_used(memory, head, BYTES + 1).expect("a valid head");
    }
    let _ = queue.needs_notification(memory);
    bytes
}

/// Takes the used elements of requests nobody has carried out.
fn collect_unwritten(guest: &mut Guest) -> u16 {
    guest.succeed();
    guest.collect()
}
