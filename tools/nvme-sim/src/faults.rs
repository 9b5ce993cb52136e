//! Faults on demand: seeded, repeatable, changeable while the controller runs.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use fastrand::Rng;

use crate::command::{Command, admin, nvm};
use crate::config::parse_number;
use crate::status::Status;

/// The faults of a controller. `FaultPlan::default()` has none.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FaultPlan {
    /// Seed of everything random here; logged at start. The same commands in the same order meet the same faults.
    pub seed: u64,
    /// What befalls single commands; all that match apply.
    pub rules: Vec<FaultRule>,
    /// CSTS.RDY stays 0 after CC.EN is set.
    pub never_ready: bool,
    /// CSTS.RDY stays 1 after CC.EN is cleared.
    pub never_reset: bool,
    /// CSTS.SHST never reports that a shutdown is complete.
    pub shutdown_hangs: bool,
    /// How long the controller takes to become ready.
    pub ready_delay: Duration,
    /// No command is fetched and none completes.
    pub stopped: bool,
    /// No command is fetched and none completes, and the host is told so (CSTS.PP).
    pub paused: bool,
    /// Abort succeeds and aborts nothing (dword 0 bit 0 of its completion is 1).
    pub never_aborts: bool,
    /// A sanitize operation is going on: I/O commands and Format NVM are answered with Sanitize In Progress.
    pub sanitizing: bool,
    /// This namespace (0xffffffff: each) is being formatted: its I/O commands are answered with Format In Progress.
    pub formatting: Option<u32>,
    /// How long the messages of the front-end wait, each, before they are answered.
    pub message_delay: Duration,
    /// A function reset takes away the eventfds of interrupts: the host has to give them once more.
    pub reset_forgets_interrupts: bool,
    /// CSTS.CFS is set and nothing is processed, until this is false and the host resets the controller.
    pub fatal: bool,
    /// Completions that are posted together are shuffled.
    pub reorder: bool,
    /// Bits of Critical Warning in the health log (NVMe Base 2.0, 5.16.1.3); the host is told of those that appear.
    pub critical_warning: u8,
    /// Each register access by message is answered so much later; commands are not, as they need none.
    pub answer_delay: Duration,
    /// DMA maps are refused while so many regions are mapped, as servers with a small table do. `None`: there is room.
    pub most_dma_regions: Option<usize>,
    /// No more I/O queues of a kind are granted than this, at least 1, the next time that the host asks (Set Features, Number
    /// of Queues). `None`: as configured.
    pub most_queues: Option<u16>,
}

/// A fault of single commands: what, and when.
#[derive(Clone, Debug, PartialEq)]
pub struct FaultRule {
    /// What happens.
    pub action: FaultAction,
    /// The commands to which it happens.
    pub when: FaultMatch,
}

/// What happens to a command.
#[derive(Clone, Debug, PartialEq)]
pub enum FaultAction {
    /// The command is carried out, and completes, this much later (a random time in the range). Abort ends it early.
    Delay(RangeInclusive<Duration>),
    /// The command is carried out, and completes, this much later, even if the controller is reset, or its front-end leaves,
    /// before that: data and completion go to where they would have gone. No controller may do that (NVMe Base 2.0, 3.7.2);
    /// only a reset of the whole function ends it. Counted in [`Counters::strays`](crate::Counters).
    Stray(RangeInclusive<Duration>),
    /// The command is not carried out and completes with this status.
    Fail(Status),
    /// The command completes with success, and nothing was done: data that the host waits for is not written.
    DoNothing,
    /// The command is carried out, but its completion is never posted.
    LoseCompletion,
    /// The command is carried out, but its completion bears the identifier of no outstanding command.
    WrongCommandId,
    /// The controller reports a fatal status (CSTS.CFS) instead; a controller reset ends that.
    Fatal,
    /// The controller stops processing, this command included, until [`FaultControl::change`] clears `stopped`.
    Stop,
    /// The controller is pulled out, this command unanswered.
    Remove,
}

/// Which commands a rule applies to. `FaultMatch::default()`: all I/O commands.
///
/// ```
/// use nvme_sim::FaultMatch;
///
/// // The first Get Log Page for SMART / health information after five that pass.
/// let when = FaultMatch { log_page: Some(0x02), skip: 5, limit: Some(1), ..Default::default() };
/// # let _ = when;
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct FaultMatch {
    /// The rule is for admin commands instead of I/O commands.
    pub admin: bool,
    /// The rule is only for commands with this opcode.
    pub opcode: Option<u8>,
    /// The rule is only for Identify commands for this data structure (CNS).
    pub cns: Option<u8>,
    /// The rule is only for Get and Set Features of this feature identifier (FID).
    pub feature: Option<u8>,
    /// The rule is only for Get Log Page of this log page identifier (LID).
    pub log_page: Option<u8>,
    /// The rule is only for commands with this namespace identifier.
    pub namespace: Option<u32>,
    /// The rule is only for commands whose data is described by an SGL (`Some(true)`), or only for others (`Some(false)`).
    pub sgl: Option<bool>,
    /// The rule is only for commands that touch one of these logical blocks (commands with SLBA and NLB).
    pub blocks: Option<RangeInclusive<u64>>,
    /// How many matching commands pass before one is hit.
    pub skip: u64,
    /// How many matching commands are hit at most; `None`: all.
    pub limit: Option<u64>,
    /// The probability, 0 to 1, with which a matching command is hit.
    pub probability: f64,
}

impl Default for FaultMatch {
    fn default() -> FaultMatch {
        FaultMatch {
            admin: false,
            opcode: None,
            cns: None,
            feature: None,
            log_page: None,
            namespace: None,
            sgl: None,
            blocks: None,
            skip: 0,
            limit: None,
            probability: 1.0,
        }
    }
}

impl FaultMatch {
    /// Admin commands are meant, be it by what only they have.
    fn wants_admin(&self) -> bool {
        self.admin || self.cns.is_some() || self.feature.is_some() || self.log_page.is_some()
    }

    fn matches(&self, command: &Command, is_admin: bool) -> bool {
        if self.wants_admin() != is_admin
            || self.opcode.is_some_and(|opcode| opcode != command.opcode())
            || self.namespace.is_some_and(|namespace| namespace != command.namespace())
            || self.sgl.is_some_and(|sgl| sgl != (command.data_pointer_kind() != 0))
        {
            return false;
        }
        // The three kinds of identifiers all stand in dword 10 bits 7:0.
        let mut selectors = [
            (self.cns, &[admin::IDENTIFY][..]),
            (self.feature, &[admin::GET_FEATURES, admin::SET_FEATURES]),
            (self.log_page, &[admin::GET_LOG_PAGE]),
        ]
        .into_iter()
        .filter_map(|(wanted, opcodes)| Some((wanted?, opcodes)));
        if !selectors.all(|(wanted, opcodes)| opcodes.contains(&command.opcode()) && wanted == command.dword(10) as u8)
        {
            return false;
        }
        let Some(blocks) = &self.blocks else { return true };
        let addressed = !is_admin
            && matches!(command.opcode(), nvm::READ | nvm::WRITE | nvm::COMPARE | nvm::WRITE_ZEROES | nvm::VERIFY);
        let last = command.lba().saturating_add(u64::from(command.blocks()) - 1);
        addressed && *blocks.start() <= last && *blocks.end() >= command.lba()
    }
}

/// What the rules decided for one command.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Decision {
    pub delay: Option<Duration>,
    /// The end of its queue is not its own.
    pub stray: bool,
    pub fail: Option<Status>,
    pub nothing: bool,
    pub lose: bool,
    pub wrong_id: bool,
    pub fatal: bool,
    pub stop: bool,
    pub remove: bool,
}

/// Changes the faults of a running controller.
pub struct FaultControl {
    plan: Mutex<Plan>,
    version: AtomicU64,
    fired: AtomicU64,
    removed: AtomicBool,
}

struct Plan {
    plan: FaultPlan,
    /// One number per rule, so that counts survive a change of other rules.
    numbers: Vec<u64>,
    next: u64,
}

impl FaultControl {
    pub(crate) fn new(plan: FaultPlan) -> FaultControl {
        log::info!("fault seed {}", plan.seed);
        let count = plan.rules.len() as u64;
        FaultControl {
            plan: Mutex::new(Plan { plan, numbers: (0..count).collect(), next: count }),
            version: AtomicU64::new(1),
            fired: AtomicU64::new(0),
            removed: AtomicBool::new(false),
        }
    }

    /// Replaces the whole plan; counts begin anew, and so does the random sequence.
    pub fn set(&self, plan: FaultPlan) {
        log::info!("new faults, seed {}", plan.seed);
        self.update(|held| {
            held.numbers = plan.rules.iter().zip(held.next..).map(|(_, number)| number).collect();
            held.next += plan.rules.len() as u64;
            held.plan = plan;
        });
    }

    /// Changes parts of the plan, but not its list of rules (see [`FaultControl::add`]); counts go on.
    pub fn change(&self, change: impl FnOnce(&mut FaultPlan)) {
        self.update(|held| {
            let rules = held.plan.rules.clone();
            change(&mut held.plan);
            held.plan.rules = rules;
        });
    }

    /// Adds a rule.
    pub fn add(&self, rule: FaultRule) {
        self.update(|held| {
            held.plan.rules.push(rule);
            held.numbers.push(held.next);
            held.next += 1;
        });
    }

    /// Takes all faults away. A controller in a fatal status stays so until the host resets it.
    pub fn clear(&self) {
        self.set(FaultPlan { seed: self.plan().seed, ..Default::default() });
    }

    /// The plan as it stands.
    pub fn plan(&self) -> FaultPlan {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner).plan.clone()
    }

    pub(crate) fn message_delay(&self) -> Duration {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner).plan.message_delay
    }

    /// How many times a rule has hit a command.
    pub fn fired(&self) -> u64 {
        self.fired.load(Ordering::Relaxed)
    }

    fn update(&self, update: impl FnOnce(&mut Plan)) {
        update(&mut self.plan.lock().unwrap_or_else(PoisonError::into_inner));
        // Release: pairs with the Acquire in `FaultState::refresh`.
        self.version.fetch_add(1, Ordering::Release);
    }

    pub(crate) fn set_removed(&self, removed: bool) {
        // Release: pairs with the Acquire in `removed`; nothing else is published by it.
        self.removed.store(removed, Ordering::Release);
    }

    pub(crate) fn removed(&self) -> bool {
        self.removed.load(Ordering::Acquire)
    }
}

/// The data thread's side of the faults.
pub(crate) struct FaultState {
    pub plan: FaultPlan,
    numbers: Vec<u64>,
    version: u64,
    random: Rng,
    /// Matching commands seen, and hit, per rule number.
    counts: HashMap<u64, (u64, u64)>,
}

impl FaultState {
    pub(crate) fn new() -> FaultState {
        FaultState {
            plan: FaultPlan::default(),
            numbers: Vec::new(),
            version: 0,
            random: Rng::with_seed(0),
            counts: HashMap::new(),
        }
    }

    /// Whether there is a plan that was not taken over yet.
    #[inline]
    pub(crate) fn is_stale(&self, control: &FaultControl) -> bool {
        // Acquire: pairs with the Release in `FaultControl::update`.
        control.version.load(Ordering::Acquire) != self.version
    }

    /// Takes a changed plan over; true if there was one.
    #[inline]
    pub(crate) fn refresh(&mut self, control: &FaultControl) -> bool {
        if !self.is_stale(control) {
            return false;
        }
        let held = control.plan.lock().unwrap_or_else(PoisonError::into_inner);
        // Under the lock: it goes with the plan, or a later look finds it changed once more.
        let version = control.version.load(Ordering::Acquire);
        let known = held.numbers.iter().any(|number| self.counts.contains_key(number));
        if self.version == 0 || self.plan.seed != held.plan.seed || !known {
            self.random = Rng::with_seed(held.plan.seed);
        }
        self.counts.retain(|number, _| held.numbers.contains(number));
        self.plan.clone_from(&held.plan);
        self.numbers.clone_from(&held.numbers);
        self.version = version;
        true
    }

    /// Whether any command may be hit.
    #[inline]
    pub(crate) fn any(&self) -> bool {
        !self.numbers.is_empty()
    }

    /// What befalls a command.
    pub(crate) fn decide(&mut self, control: &FaultControl, command: &Command, admin: bool) -> Decision {
        let mut decision = Decision::default();
        for (rule, number) in self.plan.rules.iter().zip(&self.numbers) {
            let when = &rule.when;
            if !when.matches(command, admin) {
                continue;
            }
            let (seen, hit) = self.counts.entry(*number).or_default();
            *seen += 1;
            if *seen <= when.skip || when.limit.is_some_and(|limit| *hit >= limit) {
                continue;
            }
            if when.probability < 1.0 && self.random.f64() >= when.probability {
                continue;
            }
            *hit += 1;
            control.fired.fetch_add(1, Ordering::Relaxed);
            match &rule.action {
                FaultAction::Delay(range) | FaultAction::Stray(range) => {
                    let span = range.end().saturating_sub(*range.start()).as_nanos() as u64;
                    let extra = Duration::from_nanos(self.random.u64(..=span));
                    decision.delay = Some(*range.start() + extra);
                    decision.stray = matches!(rule.action, FaultAction::Stray(_));
                }
                FaultAction::Fail(status) => decision.fail = Some(*status),
                FaultAction::DoNothing => decision.nothing = true,
                FaultAction::LoseCompletion => decision.lose = true,
                FaultAction::WrongCommandId => decision.wrong_id = true,
                FaultAction::Fatal => decision.fatal = true,
                FaultAction::Stop => decision.stop = true,
                FaultAction::Remove => decision.remove = true,
            }
        }
        decision
    }

    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        self.random.shuffle(items);
    }

    pub(crate) fn random(&mut self) -> u64 {
        self.random.u64(..)
    }
}

impl std::str::FromStr for FaultRule {
    type Err = crate::Error;

    /// `ACTION[,CONDITION]…`; actions `delay=TIME[..TIME]` (`us`, `ms` or `s`), `stray=TIME[..TIME]`, `fail=TYPE:CODE`, `nothing`, `lose`,
    /// `wrong-id`, `fatal`, `stop`, `remove`; conditions `admin`, `opcode=NAME` (or a number), `cns=N` (Identify), `fid=N` (features),
    /// `lid=N` (log pages), `nsid=N`, `sgl=on|off` (the data pointer), `lba=FIRST[..LAST]`, `skip=N`, `limit=N`, `p=PROBABILITY`.
    fn from_str(text: &str) -> Result<FaultRule, crate::Error> {
        let bad = |part: &str, want: &str| crate::error::invalid(format!("fault {text:?}: {part:?}: {want}"));
        let mut parts = text.split(',');
        let action = parts.next().unwrap_or_default();
        let (name, value) = action.split_once('=').unwrap_or((action, ""));
        let action = match name {
            "delay" | "stray" => {
                let (from, to) = value.split_once("..").unwrap_or((value, value));
                let time = |text| parse_time(text).ok_or_else(|| bad(text, "not a time like 50us, 10ms or 1s"));
                let range = time(from)?..=time(to)?;
                if name == "delay" { FaultAction::Delay(range) } else { FaultAction::Stray(range) }
            }
            "fail" => {
                let status = value.split_once(':').and_then(|(kind, code)| {
                    let kind = parse_number(kind).filter(|kind| *kind < 8)?;
                    Some(Status::new(kind as u8, u8::try_from(parse_number(code)?).ok()?))
                });
                FaultAction::Fail(status.ok_or_else(|| bad(value, "not TYPE:CODE like 2:0x81"))?)
            }
            "nothing" => FaultAction::DoNothing,
            "lose" => FaultAction::LoseCompletion,
            "wrong-id" => FaultAction::WrongCommandId,
            "fatal" => FaultAction::Fatal,
            "stop" => FaultAction::Stop,
            "remove" => FaultAction::Remove,
            _ => return Err(bad(name, "not one of delay, stray, fail, nothing, lose, wrong-id, fatal, stop, remove")),
        };
        let mut when = FaultMatch::default();
        for part in parts {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            let number = || parse_number(value).ok_or_else(|| bad(part, "not a number"));
            match key {
                "admin" if value.is_empty() => when.admin = true,
                "opcode" => {
                    let admin = admin_opcode_by_name(value);
                    when.admin |= admin.is_some();
                    let opcode =
                        admin.or_else(|| opcode_by_name(value)).or_else(|| u8::try_from(parse_number(value)?).ok());
                    when.opcode = Some(opcode.ok_or_else(|| bad(part, "not an opcode"))?);
                }
                "cns" | "fid" | "lid" => {
                    let number = u8::try_from(number()?).map_err(|_| bad(part, "not a number up to 255"))?;
                    let place = match key {
                        "cns" => &mut when.cns,
                        "fid" => &mut when.feature,
                        _ => &mut when.log_page,
                    };
                    *place = Some(number);
                }
                "nsid" => {
                    let id = u32::try_from(number()?).map_err(|_| bad(part, "not a namespace identifier"))?;
                    when.namespace = Some(id);
                }
                "sgl" => {
                    let sgl = match value {
                        "on" => true,
                        "off" => false,
                        _ => return Err(bad(part, "not on or off")),
                    };
                    when.sgl = Some(sgl);
                }
                "lba" => {
                    let (from, to) = value.split_once("..").unwrap_or((value, value));
                    let blocks =
                        parse_number(from).zip(parse_number(to)).ok_or_else(|| bad(part, "not FIRST..LAST"))?;
                    when.blocks = Some(blocks.0..=blocks.1);
                }
                "skip" => when.skip = number()?,
                "limit" => when.limit = Some(number()?),
                "p" => {
                    let probability = value.parse().ok().filter(|p| (0.0..=1.0).contains(p));
                    when.probability = probability.ok_or_else(|| bad(part, "not a probability from 0 to 1"))?;
                }
                _ => {
                    return Err(bad(
                        part,
                        "not one of admin, opcode=, cns=, fid=, lid=, nsid=, sgl=, lba=, skip=, limit=, p=",
                    ));
                }
            }
        }
        Ok(FaultRule { action, when })
    }
}

fn parse_time(text: &str) -> Option<Duration> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number = digits.parse().ok()?;
    match &text[digits.len()..] {
        "us" => Some(Duration::from_micros(number)),
        "ms" => Some(Duration::from_millis(number)),
        "s" => Some(Duration::from_secs(number)),
        _ => None,
    }
}

/// The names of the admin opcodes.
fn admin_opcode_by_name(name: &str) -> Option<u8> {
    Some(match name {
        "delete-sq" => admin::DELETE_SQ,
        "create-sq" => admin::CREATE_SQ,
        "get-log-page" => admin::GET_LOG_PAGE,
        "delete-cq" => admin::DELETE_CQ,
        "create-cq" => admin::CREATE_CQ,
        "identify" => admin::IDENTIFY,
        "abort" => admin::ABORT,
        "set-features" => admin::SET_FEATURES,
        "get-features" => admin::GET_FEATURES,
        "async-event" => admin::ASYNC_EVENT,
        "doorbell-buffer" => admin::DOORBELL_BUFFER,
        "format" => admin::FORMAT,
        _ => return None,
    })
}

/// The names of the I/O opcodes.
fn opcode_by_name(name: &str) -> Option<u8> {
    Some(match name {
        "flush" => nvm::FLUSH,
        "write" => nvm::WRITE,
        "read" => nvm::READ,
        "compare" => nvm::COMPARE,
        "write-zeroes" => nvm::WRITE_ZEROES,
        "dsm" => nvm::DATASET_MANAGEMENT,
        "verify" => nvm::VERIFY,
        _ => return None,
    })
}
