//! A bound on the lines that guests and front-ends can have written to the log.
//!
//! Whoever resets its device in a loop, or connects in one, causes a line each time: that fills a disk, and hides what others'
//! lines say. So each disk has an allowance of lines a minute for each kind of them, whatever sessions and rings come and go, and
//! what goes beyond it is counted and told.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Lines of one kind that a disk may cause in a minute.
const LINES: u64 = 10;
/// How long they have to last, in milliseconds.
const PERIOD: u64 = 60_000;

/// What a line is about. Each kind has an allowance of its own, so that nobody can hide one kind behind another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Front-ends that come and go.
    Connection,
    /// Front-ends that are not served.
    TurnedAway,
    /// Messages that are refused.
    Refusal,
    /// Rings that start, wait, or cannot be served as they should be.
    Ring,
    /// Rings that were broken.
    Broken,
    /// What the set-up of a guest should be.
    Advice,
    /// What the drive has answered, or lost.
    Drive,
}

/// All of them, in their order.
const KINDS: [Kind; 7] =
    [Kind::Connection, Kind::TurnedAway, Kind::Refusal, Kind::Ring, Kind::Broken, Kind::Advice, Kind::Drive];

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Connection => "front-ends that came or went",
            Kind::TurnedAway => "front-ends that were turned away",
            Kind::Refusal => "refused messages",
            Kind::Ring => "its rings",
            Kind::Broken => "broken rings",
            Kind::Advice => "the guest's set-up",
            Kind::Drive => "what the drive answered",
        })
    }
}

/// The lines that were not written since the last one of their kind; says so in brackets, after a space, or nothing if there were none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeftOut(u64);

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => Ok(()),
            count => write!(f, " ({count} more like this in the last minute were left out)"),
        }
    }
}

/// The lines of one kind.
#[derive(Debug, Default)]
struct Allowance {
    /// When the present period began: milliseconds since the limit was made.
    began: AtomicU64,
    /// Lines that were asked for since then.
    lines: AtomicU64,
    left_out: AtomicU64,
}

// All of it Relaxed: numbers, ordered with nothing. When two threads begin a period at the same moment, a line may be too many.
impl Allowance {
    fn is_over(&self, now: u64) -> bool {
        now.saturating_sub(self.began.load(Ordering::Relaxed)) >= PERIOD
    }

    fn admit(&self, now: u64) -> Option<LeftOut> {
        let began = self.began.load(Ordering::Relaxed);
        if self.is_over(now) && self.began.compare_exchange(began, now, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            self.lines.store(0, Ordering::Relaxed);
        }
        if self.lines.fetch_add(1, Ordering::Relaxed) < LINES {
            return Some(LeftOut(self.left_out.swap(0, Ordering::Relaxed)));
        }
        self.left_out.fetch_add(1, Ordering::Relaxed);
        None
    }
}

/// The allowances of one disk. Shared by all who write lines about it; takes no lock.
#[derive(Debug)]
pub struct LogLimit {
    made: Instant,
    allowances: [Allowance; KINDS.len()],
}

impl Default for LogLimit {
    fn default() -> Self {
        LogLimit { made: Instant::now(), allowances: Default::default() }
    }
}

impl LogLimit {
    fn now(&self) -> u64 {
        u64::try_from(self.made.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// May a line of this kind be written now? `None`: it is counted instead. Else what is to be put at the line's end.
    pub fn admit(&self, kind: Kind) -> Option<LeftOut> {
        self.allowances[kind as usize].admit(self.now())
    }

    /// Tells of lines that were left out and that no later line has told of: those of periods that are over, or, at the end, all.
    pub fn tell_left_out(&self, name: &str, end: bool) {
        let now = self.now();
        for (kind, allowance) in KINDS.iter().zip(&self.allowances) {
            if allowance.left_out.load(Ordering::Relaxed) != 0 && (end || allowance.is_over(now)) {
                let count = allowance.left_out.swap(0, Ordering::Relaxed);
                log::warn!("{name}: {count} more lines about {kind} were left out");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minute_has_so_many_lines_and_the_rest_is_counted() {
        let allowance = Allowance::default();
        let written = |from: u64, to: u64| (from..to).filter_map(|now| allowance.admit(now)).collect::<Vec<_>>();
        assert_eq!(written(0, 5000), [LeftOut(0); LINES as usize]);
        assert_eq!(allowance.admit(PERIOD - 1), None);
        // 10 of 5001 were written.
        assert_eq!(allowance.admit(PERIOD), Some(LeftOut(4991)));
        assert_eq!(allowance.admit(PERIOD + 1), Some(LeftOut(0)), "they are told once");
        // Not more in the second minute either.
        assert_eq!(written(PERIOD + 2, 2 * PERIOD).len(), LINES as usize - 2);
        assert_eq!(written(2 * PERIOD, 2 * PERIOD + 1)[0], LeftOut(PERIOD - 2 - (LINES - 2)));
    }

    #[test]
    fn a_line_says_how_many_were_left_out() {
        assert_eq!(LeftOut(0).to_string(), "");
        assert_eq!(LeftOut(12).to_string(), " (12 more like this in the last minute were left out)");
    }

    #[test]
    fn kinds_do_not_share() {
        let limit = LogLimit::default();
        while limit.admit(Kind::Broken).is_some() {}
        for kind in KINDS {
            assert_eq!(limit.admit(kind).is_some(), kind != Kind::Broken, "{kind}");
            assert_eq!(KINDS[kind as usize], kind);
        }
    }

    #[test]
    fn what_no_later_line_tells_is_told_in_the_end() {
        let limit = LogLimit::default();
        assert_eq!((0..LINES + 3).filter_map(|_| limit.admit(Kind::Refusal)).count(), LINES as usize);
        let left_out = || limit.allowances[Kind::Refusal as usize].left_out.load(Ordering::Relaxed);
        limit.tell_left_out("test", false);
        assert_eq!(left_out(), 3, "the minute is not over");
        limit.tell_left_out("test", true);
        assert_eq!(left_out(), 0);
    }
}
