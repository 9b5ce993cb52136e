//! One namespace of several fails: a client of its own bears that, and the client of the other one must not notice.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::Failure;
use crate::client::Client;
use crate::random::Random;

/// The namespace that fails; the client's is 1.
pub(crate) const FAILING: u32 = 2;
/// How long the last answers may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// What befalls the failing namespace for a while: rules for the drive, all of them with its identifier.
pub(crate) fn fault(random: &mut Random) -> String {
    // Media errors, a namespace that is not ready, is formatted, is gone, is write protected, a drive that gives no reason or does not
    // know the command, and one that is slow.
    const STATUSES: [&str; 10] = [
        "fail=2:0x81,opcode=read",
        "fail=2:0x80,opcode=write",
        "fail=0:0x82",
        "fail=0:0x84",
        "fail=0:0x0b",
        "fail=0:0x20,opcode=write",
        "fail=0:0x06",
        "fail=0:0x01,opcode=write-zeroes",
        "fail=0:0x02,opcode=dsm",
        "delay=50ms..300ms",
    ];
    let what = STATUSES[random.below(STATUSES.len() as u64) as usize];
    let often = ["p=0.1", "p=0.5", "p=1"][random.below(3) as usize];
    let mut rules = format!("{what},nsid={FAILING},{often}");
    if random.one_in(2) {
        // What it is cannot be found out either.
        rules += &format!(" fail=0:0x06,cns=0,nsid={FAILING} fail=0:0x06,cns=3,nsid={FAILING}");
    }
    rules
}

/// What the client of the failing namespace has met.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Suffering {
    pub requests: u64,
    /// Answers with an error, and what follows from those.
    pub failures: u64,
    /// Answers to nothing, and requests without an answer at the end: not even its own client has to put up with these.
    pub wrong: u64,
}

/// The client of the failing namespace, in a thread of its own.
pub(crate) struct Sufferer {
    over: Arc<AtomicBool>,
    thread: JoinHandle<Result<Suffering, Failure>>,
}

impl Sufferer {
    pub(crate) fn start(seed: u64, packed: bool, rings: u16, socket: &Path) -> Result<Sufferer, Failure> {
        let over = Arc::new(AtomicBool::new(false));
        let (told, socket) = (over.clone(), socket.to_owned());
        let body = move || {
            let mut client = Client::new(seed, packed, rings)?;
            client.wrong.quiet = true;
            while !told.load(Ordering::Relaxed) {
                work(&mut client, &socket);
            }
            client.drain();
            let end = Instant::now() + PATIENCE;
            while !client.is_done() && Instant::now() < end {
                work(&mut client, &socket);
            }
            let wrong = client.wrong.duplicates + client.in_flight() as u64;
            client.disconnect();
            Ok(Suffering { requests: client.requests, failures: client.wrong.errors + client.wrong.lost, wrong })
        };
        let thread = std::thread::Builder::new().name("sufferer".into()).spawn(body);
        thread
            .map(|thread| Sufferer { over, thread })
            .map_err(|error| Failure::Stand(format!("a thread for the failing namespace's client: {error}")))
    }

    /// Has it end, after its last answer.
    pub(crate) fn end(self) -> Result<Suffering, Failure> {
        self.over.store(true, Ordering::Relaxed);
        let ended = self.thread.join();
        ended.unwrap_or_else(|_| Err(Failure::Stand("the failing namespace's client has panicked".into())))
    }
}

/// A bit of work.
fn work(client: &mut Client, socket: &Path) {
    if !client.is_connected() {
        // Where nobody listens yet, or for a moment, it is tried again.
        let _ = client.connect(socket);
    } else if client.is_abandoned() {
        client.disconnect();
    }
    if client.turn() == 0 {
        client.nap();
    }
}
