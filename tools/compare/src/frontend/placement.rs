//! Which host CPUs have which part, and how far apart they are just now.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use crate::Error;
use crate::process::{allowed_cpus, on_cpus};

/// Round trips per batch; the fastest batch counts, so that an interruption does not.
const TRIPS: u32 = 100;
/// Batches of the probe.
const BATCHES: u32 = 20;

/// What the word becomes if there is nobody to answer.
const GIVEN_UP: u32 = u32::MAX;

/// Who runs where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Placement {
    /// The side under test.
    pub side: Vec<usize>,
    /// The load generator.
    pub load: Vec<usize>,
    /// The drive in software.
    pub drive: Vec<usize>,
}

impl Placement {
    /// Splits the CPUs that this process may use; `side` is the user's wish.
    pub(super) fn new(side: Option<&[usize]>) -> Result<Placement, Error> {
        Placement::of(&allowed_cpus()?, side)
    }

    fn of(allowed: &[usize], side: Option<&[usize]>) -> Result<Placement, Error> {
        if let Some(wrong) = side.and_then(|side| side.iter().find(|cpu| !allowed.contains(cpu))) {
            return Err(Error::Options(format!(
                "CPU {wrong} is not there, or this process may not use it: see --cpus"
            )));
        }
        // Without a wish, the last CPU: the first ones have the most of everything else to do.
        let side = side.map_or_else(|| allowed[allowed.len() - 1..].to_vec(), <[usize]>::to_vec);
        let others: Vec<usize> = allowed.iter().copied().filter(|cpu| !side.contains(cpu)).collect();
        Ok(match others.as_slice() {
            [] => Placement { load: side.clone(), drive: side.clone(), side },
            [one] => Placement { side, load: vec![*one], drive: vec![*one] },
            [load @ .., drive] => Placement { side, load: load.to_vec(), drive: vec![*drive] },
        })
    }

    /// For the report.
    pub(super) fn words(&self, with_drive: bool) -> String {
        let mut text =
            format!("side under test on CPU {}, load generator on CPU {}", list(&self.side), list(&self.load));
        if with_drive {
            text += &format!(", vhost-blk's drive in software on CPU {}", list(&self.drive));
            if self.drive == self.load {
                text += " as well (the two take turns)";
            }
        }
        text
    }

    /// A message from the load generator's first CPU to the side's first one and back, in nanoseconds. `None` if they are
    /// the same.
    pub(super) fn hop_ns(&self) -> Result<Option<f64>, Error> {
        let (here, there) = (self.load[0], self.side[0]);
        if here == there {
            return Ok(None);
        }
        on_cpus(&[here], || ping_pong(there)).flatten().map(Some)
    }
}

/// CPUs as the options take them.
pub(super) fn list(cpus: &[usize]) -> String {
    cpus.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// Nanoseconds that one word takes to a thread on CPU `there` and back.
fn ping_pong(there: usize) -> Result<f64, Error> {
    let word = AtomicU32::new(0);
    // Even: ours to raise. Odd: the other thread's.
    let last = 2 * TRIPS * BATCHES;
    let raise = |from: u32| {
        loop {
            match word.load(Ordering::Acquire) {
                now if now == from => break,
                GIVEN_UP => return,
                _ => std::hint::spin_loop(),
            }
        }
        word.store(from + 1, Ordering::Release);
    };
    let answer = || (1..last).step_by(2).for_each(raise);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| on_cpus(&[there], answer).inspect_err(|_| word.store(GIVEN_UP, Ordering::Release)));
        let mut fastest = f64::INFINITY;
        for batch in 0..BATCHES {
            let first = 2 * TRIPS * batch;
            let start = Instant::now();
            (first..first + 2 * TRIPS).step_by(2).for_each(raise);
            // The batch's last answer is awaited by the first step of the next one.
            fastest = fastest.min(start.elapsed().as_nanos() as f64 / f64::from(TRIPS));
        }
        thread.join().expect("the thread only counts")?;
        Ok(fastest)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(allowed: &[usize], side: Option<&[usize]>) -> Placement {
        Placement::of(allowed, side).unwrap()
    }

    #[test]
    fn every_part_has_a_cpu() {
        let expected = |side: &[usize], load: &[usize], drive: &[usize]| Placement {
            side: side.to_vec(),
            load: load.to_vec(),
            drive: drive.to_vec(),
        };
        assert_eq!(place(&[3], None), expected(&[3], &[3], &[3]));
        assert_eq!(place(&[0, 1], None), expected(&[1], &[0], &[0]));
        assert_eq!(place(&[0, 1, 2], None), expected(&[2], &[0], &[1]));
        assert_eq!(place(&[0, 1, 2, 3, 4], None), expected(&[4], &[0, 1, 2], &[3]));
        assert_eq!(place(&[0, 1, 2, 3, 4], Some(&[0, 1])), expected(&[0, 1], &[2, 3], &[4]));
        assert_eq!(place(&[0, 1], Some(&[0, 1])), expected(&[0, 1], &[0, 1], &[0, 1]));
        let error = Placement::of(&[0, 1], Some(&[1, 2])).unwrap_err().to_string();
        assert!(error.contains("CPU 2 is not there"), "{error}");
    }

    #[test]
    fn the_report_says_who_shares() {
        let two = place(&[0, 1], None);
        assert_eq!(two.words(false), "side under test on CPU 1, load generator on CPU 0");
        assert!(two.words(true).ends_with("drive in software on CPU 0 as well (the two take turns)"));
        assert!(
            place(&[0, 1, 2, 3], None)
                .words(true)
                .ends_with("load generator on CPU 0,1, vhost-blk's drive in software on CPU 2")
        );
    }

    #[test]
    fn a_message_takes_time() {
        let placement = Placement::new(None).unwrap();
        match placement.hop_ns().unwrap() {
            Some(hop) => assert!(hop > 1.0 && hop.is_finite(), "{hop}"),
            None => assert_eq!(allowed_cpus().unwrap().len(), 1),
        }
    }
}
