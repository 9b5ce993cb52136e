//! A drive that answers anything: registers, Identify structures, log pages, and completions of every kind, late, doubled,
//! out of turn, for commands that are not out and for queues that do not exist.
//!
//! The first bytes change the drive; then it is brought up, and its queue pair used. Checked besides: a request is answered once
//! and only while it is out, and all that is out when the drive is reset is given up, once.

use std::collections::HashSet;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nvme_driver::spec::features::{Select, VolatileWriteCache};
use nvme_driver::{Command, Controller, LbaRange, Namespace, Options, QueuePair, QueuePairOptions, Segment, Work};
use vfio::{Device, DmaBuffer};

use crate::drive::{Drive, Fetched, Page, State};
use crate::input::Input;

const PAGES: [Page; 8] = [
    Page::Identify(1),
    Page::Identify(0),
    Page::Identify(2),
    Page::Identify(3),
    Page::Identify(6),
    Page::Log(1),
    Page::Log(2),
    Page::Log(4),
];

/// Does what `data` says.
pub fn run(data: &[u8]) {
    static DRIVE: OnceLock<Drive> = OnceLock::new();
    let drive = DRIVE.get_or_init(Drive::start);
    drive.renew();
    let mut input = Input::new(data);
    let settings = input.u8();
    for _ in 0..input.u8() % 8 {
        change(&mut drive.state(), &mut input);
    }
    let device = Device::open(&drive.address).expect("the drive's socket is served");
    let options = Options {
        queue_entries: [4, 2, 3, 64][usize::from(settings & 3)],
        max_queue_pairs: 1 + u16::from(settings >> 2 & 1),
        shadow_doorbells: settings & 8 == 0,
        interrupts: false,
        // A drive in the same process answers at once or never.
        admin_timeout: Duration::from_millis(10),
        io_timeout: Duration::from_millis(5),
        shutdown_timeout: Duration::from_millis(10),
        ready_timeout: Some(Duration::from_millis(500)),
        ..Options::default()
    };
    let Ok(controller) = Controller::open(&device, &options) else { return };
    let Some(mut bench) = CompletionBench::new(drive, &device, controller) else { return };
    while !input.is_empty() && bench.step(&mut input) {}
}

/// Changes something of the drive.
fn change(state: &mut State, input: &mut Input) {
    match input.u8() % 4 {
        0 => {
            let page = PAGES[usize::from(input.u8()) % PAGES.len()];
            let (at, count) = (usize::from(input.u16()) % 4096, usize::from(input.u8() % 64));
            let bytes = input.bytes(count);
            if let Some(place) = state.pages.get_mut(&page).and_then(|page| page.get_mut(at..at + bytes.len())) {
                place.copy_from_slice(bytes);
            }
        }
        1 => {
            // Any bit of CAP or VS but the time to become ready, for which nobody here has the time.
            let (at, bytes) = (u64::from(input.u8() % 12), input.bytes(1));
            if at != 3 {
                state.set(at, bytes);
            }
        }
        2 => {
            let feature = input.u8() % 16;
            state.features.insert(feature, input.u32());
        }
        _ => {
            let count = usize::from(input.u8() % 16);
            state.manners = input.bytes(count).iter().copied().collect();
        }
    }
}

struct CompletionBench<'a> {
    drive: &'a Drive,
    controller: Controller,
    namespace: Namespace,
    pair: QueuePair,
    memory: DmaBuffer,
    /// Tokens of the requests that are out.
    out: HashSet<u64>,
    token: u64,
    began: Instant,
}

impl<'a> CompletionBench<'a> {
    fn new(drive: &'a Drive, device: &Device, controller: Controller) -> Option<CompletionBench<'a>> {
        let namespace = controller.namespace(1).ok()?;
        let pair = controller.create_queue_pair(QueuePairOptions::default()).ok()?;
        let memory = device.dma().allocate(1 << 16).expect("a buffer of 64 KiB");
        let began = Instant::now();
        Some(CompletionBench { drive, controller, namespace, pair, memory, out: HashSet::new(), token: 0, began })
    }

    /// False: the drive is of no use any more.
    fn step(&mut self, input: &mut Input) -> bool {
        match input.u8() % 16 {
            0..3 => self.submit(input),
            3 => {
                let command = Command::new(input.u8(), 1).with_cdw10(input.u32());
                if self.pair.push(command, self.token).is_ok() {
                    self.sent();
                }
            }
            4 => self.pair.ring(),
            5 | 6 => self.answer(input),
            7 => self.answer_nothing(input),
            8 | 9 => self.reap(),
            10 => {
                let now = self.began + Duration::from_millis(input.u8().into());
                let out = &self.out;
                self.pair.tick(now, |token| assert!(out.contains(&token), "{token} is told late and is not out"));
            }
            11 => return self.reset(),
            12 | 13 => self.ask(input),
            14 => change(&mut self.drive.state(), input),
            _ => {
                // A drive tells of an event: an error, its health, its namespaces.
                let mut state = self.drive.state();
                if let Some(id) = state.events.pop() {
                    let result = input.one_of(&[0x0001_0000, 0x0002_0001, 0x0004_0002, 0x0003_0102]) as u32;
                    state.complete(0, result, 0, id, 0);
                }
            }
        }
        assert!(self.pair.outstanding() <= self.pair.capacity(), "more commands out than there are slots");
        true
    }

    fn sent(&mut self) {
        self.out.insert(self.token);
        self.token += 1;
    }

    fn submit(&mut self, input: &mut Input) {
        let kind = input.u8();
        let lba = input.one_of(&[0, 1, 7, 100, 2040, 2047]);
        let bytes = input.one_of(&[512, 4096, 8192, 1 << 16, 513]) as u32;
        let pieces = [1, 2, 3, 5][usize::from(kind >> 6)];
        let iova = self.memory.iova() + u64::from(input.u8() & 3) * 512;
        let segments: Vec<Segment> = (0..pieces).map(|at| Segment { iova: iova + at * 1024, bytes }).collect();
        let ranges: Vec<LbaRange> =
            (0..pieces).map(|at| LbaRange { lba: lba.wrapping_add(at * 3), blocks: bytes }).collect();
        let (segments, ranges) = (&segments[..], &ranges[..]);
        let work = match kind % 8 {
            0 | 1 => Work::Read { lba, segments },
            2 => Work::Write { lba, segments, fua: kind & 8 != 0 },
            3 => Work::Flush,
            4 => Work::Discard { ranges },
            5 => Work::WriteZeroes { ranges, deallocate: kind & 8 != 0, fua: kind & 16 != 0 },
            6 => Work::Compare { lba, segments },
            _ => Work::Verify(LbaRange { lba, blocks: bytes }),
        };
        if self.pair.submit(&self.namespace, work, self.token).is_ok() {
            self.sent();
        }
    }

    /// A completion for a command that is out, or was, or was never.
    fn answer(&mut self, input: &mut Input) {
        let mut state = self.drive.state();
        let (which, how) = (usize::from(input.u8()), input.u8());
        let status = if how & 1 == 0 { 0 } else { input.u16() };
        let commands = &mut state.fetched;
        let command = match commands.len() {
            0 => Fetched { queue: self.pair.id(), id: which as u16 },
            // Kept where it may be answered again.
            count if how & 2 != 0 => commands[which % count],
            count => commands.remove(which % count),
        };
        let submission = if how & 4 != 0 { input.u16() } else { command.queue };
        let id = if how & 8 != 0 { command.id ^ input.u16() } else { command.id };
        state.complete(self.pair.id(), how.into(), submission, id, status);
    }

    /// An entry of the completion queue that the drive has no business with.
    fn answer_nothing(&mut self, input: &mut Input) {
        let state = self.drive.state();
        let Some(queue) = state.completion.get(&self.pair.id()) else { return };
        let at = u64::from(input.u8()) % u64::from(queue.entries.max(1));
        state.write(queue.address + 16 * at, input.bytes(16));
    }

    fn reap(&mut self) {
        let out = &mut self.out;
        self.pair.reap(|completed| {
            assert!(out.remove(&completed.token), "{} was answered and is not out", completed.token);
            // Every status has a name and a text.
            let _ = completed.status.to_string();
        });
    }

    fn reset(&mut self) -> bool {
        let result = self.controller.reset();
        let out = &mut self.out;
        self.pair.drain_after_reset(|token| assert!(out.remove(&token), "{token} was given up and is not out"));
        assert!(out.is_empty(), "{out:?} were out when the drive was reset, and nobody was told");
        result.is_ok() && self.controller.recreate_queue_pair(&mut self.pair).is_ok()
    }

    /// Asks the drive for something, whatever it answers.
    fn ask(&mut self, input: &mut Input) {
        let controller = &self.controller;
        match input.u8() % 10 {
            0 => _ = controller.namespaces(),
            1 => {
                if let Ok(namespace) = controller.namespace(u32::from(input.u8())) {
                    self.namespace = namespace;
                }
            }
            2 => _ = controller.error_log().map(|entries| format!("{entries:?}")),
            3 => _ = controller.health_log().map(|health| format!("{health:?}")),
            4 => _ = controller.changed_namespaces(),
            5 => _ = controller.poll_events().map(|events| format!("{events:?}")),
            6 => _ = controller.get_feature::<VolatileWriteCache>(Select::Current, &()),
            7 => {
                _ = controller.get_log_page(
                    input.u8(),
                    None,
                    input.one_of(&[0, 4, 4096]),
                    input.one_of(&[4, 512, 8192]) as usize % (1 << 20),
                )
            }
            8 => _ = controller.health(),
            _ => {
                let bits = [0, 1, 2, 3, u32::MAX, 1 << 2, 2 << 2, 1];
                self.drive.state().set(0x1c, &bits[usize::from(input.u8() % 8)].to_le_bytes());
            }
        }
    }
}
