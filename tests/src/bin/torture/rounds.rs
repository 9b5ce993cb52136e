//! A run: one fault after the other while the client works, then everything is compared.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::client::{Client, Wrong};
use crate::hostile::{Deeds, Hostile};
use crate::namespace::{self, Sufferer, Suffering};
use crate::random::Random;
use crate::stand::{Signal, SimulatedDrive, TargetProcess};
use crate::{Failure, Fault, Options, Programs, RingFormat};

/// What the client uses of its disk.
pub(crate) const MIB: u64 = 32;
/// A disk's size beside a hostile one, whose requests may be long.
const LARGE_MIB: u64 = 512;
/// The longest between two faults.
const LOAD: Duration = Duration::from_millis(60);
/// What a drive has to work for until the target no longer counts its failures.
const RECOVERED: Duration = Duration::from_millis(1100);
/// The longest that a drive is away.
const AWAY: Duration = Duration::from_millis(300);
/// The target's limit for a command: lost completions are noticed so late.
const IO_TIMEOUT: &str = "0.5";
/// How long a request may stay without an answer before it counts as lost, and a back-end without a word.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long an orderly answer may still come after the last one.
const AFTERWARDS: Duration = Duration::from_millis(50);
/// What the drive's log says when a host has brought it up, at a fatal status, and for each completion that is lost.
const READY: &str = "] ready";
const FATAL: &str = "a fatal status was injected";
const LOST: &str = "loses its completion";
/// More that is wrong than this is not worth a longer run.
const ENOUGH: u64 = 1000;

/// What came of a run.
pub(crate) struct Report {
    pub kills: u32,
    pub wrong: Wrong,
    /// The longest that any request had to wait, for each time.
    pub pauses: Vec<Duration>,
    /// No pause was longer than it may be.
    pub in_time: bool,
    pub requests: u64,
    /// Requests in flight when something happened, all times together.
    pub resumed: u64,
    /// Blocks that the drive has lost in power cuts.
    pub blocks_lost: u64,
    /// Blocks that were read and had lost what was answered.
    pub went_back: u64,
    /// What the hostile has done, if there is one.
    pub deeds: Option<Deeds>,
    /// What the client of a failing namespace has met, if there is one.
    pub suffering: Option<Suffering>,
}

/// A folder that is removed, unless something went wrong.
struct Folder {
    path: PathBuf,
    keep: bool,
}

impl Folder {
    fn new() -> Result<Folder, Failure> {
        let path = std::env::temp_dir().join(format!("torture-{}", std::process::id()));
        std::fs::create_dir(&path).map_err(|error| Failure::Stand(format!("making {}: {error}", path.display())))?;
        Ok(Folder { path, keep: true })
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        match self.keep {
            true => eprintln!("torture: the logs of target and drive are in {}", self.path.display()),
            // What is left of it harms nobody.
            false => _ = std::fs::remove_dir_all(&self.path),
        }
    }
}

pub(crate) fn run(options: &Options, seed: u64, programs: &Programs) -> Result<Report, Failure> {
    let mut folder = Folder::new()?;
    let mut random = Random::new(seed ^ 0x746f_7274);
    let socket = folder.path.join("disk.sock");
    let (mut drive, mut hostile, mut sufferer) = (None, None, None);
    let arguments = if options.fault == Fault::Neighbour {
        let other = folder.path.join("hostile.sock");
        hostile = Some(Hostile::start(&other)?);
        beside_a_hostile(seed, &folder.path, [&socket, &other])?
    } else {
        let started =
            SimulatedDrive::start(&programs.drive, &folder.path, drive_arguments(options, seed, &folder.path))?;
        let device = format!("vfio-user:{}", started.socket().display());
        drive = Some(started);
        let mut arguments = if options.fault == Fault::Namespace {
            let other = folder.path.join("failing.sock");
            let packed = options.ring == RingFormat::Packed;
            sufferer = Some(Sufferer::start(random.next(), packed, options.rings, &other)?);
            two_disks(&device, &folder.path, [&socket, &other])?
        } else {
            ["--device", &device, "--socket-path", &socket.display().to_string()].map(String::from).to_vec()
        };
        if options.fault == Fault::Lost {
            arguments.extend(["--io-timeout", IO_TIMEOUT].map(String::from));
        }
        arguments
    };
    let target = TargetProcess::start(&programs.target, &folder.path, arguments)?;
    let client = Client::new(random.next(), options.ring == RingFormat::Packed, options.rings)?;
    let (wrong, pauses) = (Wrong::default(), Vec::new());
    let report = Report {
        kills: 0,
        wrong,
        pauses,
        in_time: true,
        requests: 0,
        resumed: 0,
        blocks_lost: 0,
        went_back: 0,
        deeds: None,
        suffering: None,
    };
    let mut run = Run { options, drive, target, client, hostile, random, socket, report, ready: false, broken: false };
    run.rounds()?;
    let suffering = sufferer.map(Sufferer::end).transpose()?;
    run.end();
    let mut report = run.report;
    report.wrong = run.client.wrong;
    report.requests = run.client.requests;
    report.went_back = run.client.went_back();
    report.deeds = run.hostile.map(|hostile| hostile.deeds);
    report.suffering = suffering;
    if let Some(Suffering { wrong, failures, .. }) = suffering {
        if wrong > 0 {
            report.wrong.error(&format!("{wrong} requests of the failing namespace have no answer, or more than one"));
        }
        // A namespace that does not fail proves nothing.
        if failures == 0 {
            report.wrong.error("the other namespace has not failed");
        }
    }
    // A drive that loses nothing proves nothing.
    if options.fault == Fault::Power && report.blocks_lost == 0 {
        report.wrong.error("the drive has lost nothing in its power cuts");
    }
    report.in_time = report.pauses.iter().all(|pause| *pause <= Duration::from_millis(options.pause_limit));
    folder.keep = report.wrong.total() > 0 || !report.in_time;
    Ok(report)
}

/// Arguments of a target with two disks of one drive. That one is in the target itself: a process of its own dies of guest
/// memory that is made shorter.
fn beside_a_hostile(seed: u64, folder: &Path, sockets: [&Path; 2]) -> Result<Vec<String>, Failure> {
    let lba = if seed.is_multiple_of(3) { "4096" } else { "512" };
    // Queue pairs to share or of one's own; data that has to be copied or not.
    let pairs = ["1", "4", "16"][(seed / 3 % 3) as usize];
    let sgl = if seed.is_multiple_of(2) { "on" } else { "off" };
    let device = format!("sim:{LARGE_MIB}M,lba={lba},namespaces=2,queues={pairs},sgl={sgl},write-cache=on");
    two_disks(&device, folder, sockets)
}

/// Arguments of a target with two disks, the first two namespaces of `device`.
fn two_disks(device: &str, folder: &Path, sockets: [&Path; 2]) -> Result<Vec<String>, Failure> {
    let exports = (1..).zip(sockets).map(|(namespace, socket)| {
        let socket = socket.display();
        format!("[[export]]\ndevice = \"{device}\"\nnamespace = {namespace}\nsocket-path = \"{socket}\"\n")
    });
    let file = folder.join("vhost-blk.toml");
    let failed = |error| Failure::Stand(format!("writing {}: {error}", file.display()));
    std::fs::write(&file, exports.collect::<String>()).map_err(failed)?;
    Ok(vec!["--config".into(), file.display().to_string()])
}

/// A drive on which commands overtake each other.
fn drive_arguments(options: &Options, seed: u64, folder: &Path) -> Vec<String> {
    let lba = if seed.is_multiple_of(3) { "4096" } else { "512" };
    let size = format!("{MIB}M");
    let mut arguments =
        vec!["--size", &size, "--lba", lba, "--reorder"].into_iter().map(String::from).collect::<Vec<_>>();
    arguments.extend(["--seed".into(), seed.to_string()]);
    if options.fault == Fault::Namespace {
        arguments.extend(["--namespaces".into(), namespace::FAILING.to_string()]);
    }
    arguments.extend(UNEVEN.iter().flat_map(|rule| ["--fault".into(), (*rule).into()]));
    match options.fault {
        // A drive that is pulled out loses what is in its cache, and nobody can do anything about that.
        Fault::Removal => arguments.extend(["--file".into(), folder.join("blocks").display().to_string()]),
        _ => arguments.push("--write-cache".into()),
    }
    arguments
}

/// Half of the commands take their time, some of them long.
const UNEVEN: [&str; 2] = ["delay=0us..2ms,p=0.5", "delay=2ms..15ms,p=0.05"];

/// What the drive still does long after the reset that was to end it.
const STRAY: &str = "stray=50ms..250ms,opcode=read,p=0.05";

struct Run<'a> {
    options: &'a Options,
    /// The drive, a process of its own, unless there is a hostile.
    drive: Option<SimulatedDrive>,
    target: TargetProcess,
    client: Client,
    hostile: Option<Hostile>,
    random: Random,
    socket: PathBuf,
    report: Report,
    /// The present target has taken a front-end's messages.
    ready: bool,
    /// There is no point in going on.
    broken: bool,
}

impl Run<'_> {
    fn drive(&mut self) -> &mut SimulatedDrive {
        self.drive.as_mut().expect("only a hostile front-end goes without")
    }

    fn rounds(&mut self) -> Result<(), Failure> {
        self.answers(1);
        if !self.client.tracks_inflight() {
            self.client.wrong.error("the target does not offer INFLIGHT_SHMFD");
        }
        while self.report.kills < self.options.kills && !self.broken {
            match self.options.fault {
                Fault::Kill | Fault::Power => self.kill()?,
                Fault::Neighbour => self.hostile(),
                Fault::Namespace => self.fail_namespace()?,
                fault => self.fail_drive(fault)?,
            }
        }
        Ok(())
    }

    /// Kills the target at a random moment, in part of all cases once more before it has answered anything. The pause is the
    /// longest that a request had to wait of those that were answered before the next time.
    fn kill(&mut self) -> Result<(), Failure> {
        self.end_target(LOAD);
        self.note_pause();
        self.restart()?;
        self.report.kills += 1;
        while self.random.one_in(4) && self.report.kills < self.options.kills && !self.broken {
            // While it starts, while it is told what to do, while it does again what was in flight.
            self.end_target(LOAD);
            self.restart()?;
            self.report.kills += 1;
        }
        let before = self.client.requests;
        self.answers(1);
        // The next target may do what this one forgets, so in part of all cases there is no next one before all is done.
        if self.random.one_in(3) {
            self.settle(before);
        }
        Ok(())
    }

    /// One of the times is over: how long did a request have to wait?
    fn note_pause(&mut self) {
        let longest = std::mem::take(&mut self.client.longest);
        // Before the first time there was none.
        if self.report.kills > 0 {
            self.report.pauses.push(longest);
        }
    }

    /// Has the drive fail at a random moment. The pause is the longest that any request had to wait.
    fn fail_drive(&mut self, fault: Fault) -> Result<(), Failure> {
        // A drive that fails again at once is brought up again less and less eagerly: mostly it works for a while.
        let rest = if self.random.one_in(4) { Duration::ZERO } else { RECOVERED };
        let delay = rest + self.random.time(LOAD);
        self.work_for(delay);
        let before = (self.drive().times(READY), self.drive().times(FATAL) + self.drive().times(LOST));
        self.report.kills += 1;
        self.report.resumed += self.client.in_flight() as u64;
        self.client.longest = Duration::ZERO;
        match fault {
            Fault::Removal => self.remove()?,
            _ => {
                let skip = self.random.below(50);
                let rule = match fault {
                    Fault::Lost => format!("lose,p=0.2,skip={skip},limit={}", self.random.between(1..=8)),
                    _ if self.random.one_in(2) => format!("fatal,skip={skip},limit=1 {STRAY}"),
                    _ => format!("fatal,skip={skip},limit=1"),
                };
                self.drive().tell(&format!("faults {} {rule}", UNEVEN.join(" ")))?;
            }
        }
        if fault != Fault::Removal && self.random.one_in(4) {
            // While the target waits for the drive, or brings it up: all that it holds back is for the next one to do.
            self.end_target(AWAY);
            self.restart()?;
        }
        // One of so many will have met the fault.
        let settled = self.client.requests + 200;
        self.until(|client| {
            client.requests >= settled && client.oldest().is_none_or(|oldest| oldest.number >= settled)
        });
        self.report.pauses.push(self.client.longest);
        if !self.broken && self.drive().times(READY) == before.0 {
            self.client.wrong.error("the drive has not been brought up again");
        }
        if !self.broken && fault != Fault::Removal && self.drive().times(FATAL) + self.drive().times(LOST) == before.1 {
            self.client.wrong.error("no command has met the fault");
        }
        Ok(())
    }

    /// Has the other namespace fail for a while. The pause is the longest that any request of ours had to wait; there is no
    /// need for one: nothing that befalls one namespace is a reason to reset the drive.
    fn fail_namespace(&mut self) -> Result<(), Failure> {
        let delay = self.random.time(LOAD);
        self.work_for(delay);
        let before = self.drive().times(READY);
        self.report.kills += 1;
        self.report.resumed += self.client.in_flight() as u64;
        self.client.longest = Duration::ZERO;
        let rules = format!("faults {} {}", UNEVEN.join(" "), namespace::fault(&mut self.random));
        self.drive().tell(&rules)?;
        let settled = self.client.requests + 200;
        let done = |client: &Client| {
            client.requests >= settled && client.oldest().is_none_or(|oldest| oldest.number >= settled)
        };
        self.until(done);
        self.drive().tell(&format!("faults {}", UNEVEN.join(" ")))?;
        self.report.pauses.push(self.client.longest);
        if self.drive().times(READY) != before {
            self.client.wrong.error(&format!("the drive was reset for its other namespace: {rules}"));
        }
        Ok(())
    }

    /// Has a hostile front-end do its worst on the other disk. The pause is the longest that any request had to wait.
    fn hostile(&mut self) {
        let (delay, seed) = (self.random.time(LOAD / 4), self.random.next());
        self.work_for(delay);
        let Some(mut hostile) = self.hostile.take() else { return };
        self.report.kills += 1;
        self.report.resumed += self.client.in_flight() as u64;
        self.client.longest = Duration::ZERO;
        hostile.begin(seed);
        let began = Instant::now();
        while !self.broken && !hostile.is_done() {
            let more = self.client.answered + 1;
            self.until(|client| client.answered >= more || client.in_flight() == 0);
            // It waits for no answer longer than a moment.
            if began.elapsed() > 2 * PATIENCE {
                self.fail("the hostile front-end hangs");
            }
        }
        self.hostile = Some(hostile);
        let settled = self.client.requests;
        self.settle(settled);
        self.report.pauses.push(self.client.longest);
        if let Some(why) = self.target.ended() {
            self.fail(&why);
        }
    }

    /// Pulls the drive out, and puts it back some time later: half of the time its registers are gone, half of the time
    /// everything.
    fn remove(&mut self) -> Result<(), Failure> {
        let away = self.random.time(AWAY);
        if self.random.one_in(2) {
            self.drive().tell("remove")?;
            self.work_for(away);
            self.drive().tell("reinsert").map(drop)
        } else {
            self.drive().kill()?;
            self.work_for(away);
            self.drive().restart()
        }
    }

    /// Works until every request before this one is answered.
    fn settle(&mut self, request: u64) {
        self.until(|client| client.oldest().is_none_or(|oldest| oldest.number >= request));
    }

    fn work_for(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.work();
        }
    }

    /// Starts the next target.
    fn restart(&mut self) -> Result<(), Failure> {
        self.client.disconnect();
        // What it had answered before is no sign of the next one.
        self.client.collect_all();
        if self.options.fault == Fault::Power {
            self.cut_power()?;
        }
        self.client.turn();
        self.report.resumed += self.client.in_flight() as u64;
        self.ready = false;
        self.target.restart()
    }

    /// The drive's power fails: all that was not flushed is lost, or a part of it.
    fn cut_power(&mut self) -> Result<(), Failure> {
        let how = if self.random.one_in(4) { "power-cut" } else { "power-cut some" };
        let lost = self.drive().tell(how)?;
        self.report.blocks_lost += lost.parse::<u64>().unwrap_or(0);
        self.client.power_cut();
        Ok(())
    }

    /// Has the target end at some moment of this time, and works until it has.
    fn end_target(&mut self, within: Duration) {
        let signal =
            if self.options.fault != Fault::Power && self.random.one_in(4) { Signal::Terminate } else { Signal::Kill };
        self.target.kill_after(self.random.time(within), signal);
        while !self.broken {
            match self.target.has_ended(self.ready) {
                Ok(true) => return,
                Ok(false) => self.work(),
                Err(why) => self.fail(&why),
            }
            if let Some(why) = self.target.ended() {
                self.fail(&why);
            }
        }
    }

    /// There is no point in going on after this.
    fn fail(&mut self, why: &str) {
        self.client.wrong.error(why);
        self.broken = true;
    }

    /// Works until there were so many more answers.
    fn answers(&mut self, count: u64) {
        let wanted = self.client.answered + count;
        self.until(|client| client.answered >= wanted);
    }

    /// Works until `done`, as long as that makes sense.
    fn until(&mut self, done: impl Fn(&Client) -> bool) {
        let began = Instant::now();
        let (mut since, mut answered) = (began, self.client.answered);
        while !self.broken && !done(&self.client) {
            self.work();
            if self.client.answered != answered {
                (since, answered) = (Instant::now(), self.client.answered);
            }
            // Time counts from here on: what was in flight before may have been so for long.
            let forgotten = began.elapsed() > PATIENCE && self.client.oldest().is_some_and(|one| one.since < began);
            if since.elapsed() > PATIENCE || forgotten {
                let state = if self.client.is_connected() { "nothing goes on" } else { "no target can be reached" };
                self.client.wrong.error(&format!("{state} for {PATIENCE:?}"));
                self.client.give_up();
                self.broken = true;
            }
            self.broken |= self.client.wrong.total() > ENOUGH;
        }
    }

    /// A bit of work: connects if there is no connection, looks after the rings, sleeps if there is nothing to do.
    fn work(&mut self) {
        if !self.client.is_connected() {
            match self.client.connect(&self.socket) {
                Ok(connected) => self.ready |= connected,
                // It was killed in the middle of it.
                Err(_) if self.target.killed().is_some() => {}
                Err(error) => self.may_be_killed(&error.to_string()),
            }
        } else if self.client.is_abandoned() {
            self.client.disconnect();
            self.may_be_killed("the target has closed the connection");
        }
        if self.client.turn() == 0 {
            self.client.nap();
        }
    }

    /// What has happened is an error, unless the target was killed.
    fn may_be_killed(&mut self, what: &str) {
        // The process is dead a moment before it is known to have been killed.
        let deadline = Instant::now() + Duration::from_millis(200);
        while Instant::now() < deadline {
            if self.target.killed().is_some() {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let text = self.target.ended().map_or_else(|| what.to_owned(), |end| format!("{what}: {end}"));
        self.fail(&text);
    }

    /// Everything is answered, the whole disk is compared, and the target ends as it should.
    fn end(&mut self) {
        self.client.drain();
        self.until(Client::is_done);
        if matches!(self.options.fault, Fault::Kill | Fault::Power) {
            self.note_pause();
        }
        if !self.broken {
            self.client.read_back();
            self.until(Client::is_done);
        }
        if !self.broken {
            let until = Instant::now() + AFTERWARDS;
            while Instant::now() < until {
                self.work();
            }
        }
        self.client.disconnect();
        if self.broken {
            return;
        }
        if let Err(why) = self.target.stop() {
            self.client.wrong.error(&why);
        }
        self.client.check_idle();
        if self.target.log().contains("panicked at") {
            self.client.wrong.error("a thread of the target has panicked: see its log");
        }
    }
}
