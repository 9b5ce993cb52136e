//! A fixed rate: when each request of a queue is due, whatever became of the ones before it.
//!
//! A load that waits for answers before it asks again hides how long a stuck target would have kept others waiting. Here
//! requests are due at times that were fixed before, and their latency counts from then, however late they are sent.

use std::time::{Duration, Instant};

const NANOSECONDS: u128 = 1_000_000_000;

/// The timetable of one queue. The queues of a run take turns: one is due after the other, evenly.
#[derive(Clone, Debug)]
pub(crate) struct Pace {
    /// When the first request of the run was due; known when the queue's thread has begun.
    start: Option<Instant>,
    /// Requests per second, over all queues.
    rate: u64,
    /// The number, among the requests of all queues, of this queue's next one.
    next: u64,
    /// Queues that take turns.
    queues: u64,
}

impl Pace {
    /// For queue `at` of `queues`; `rate` is that of all of them together and not 0.
    pub(crate) fn new(rate: u64, at: usize, queues: usize) -> Pace {
        Pace { start: None, rate: rate.max(1), next: at as u64, queues: queues as u64 }
    }

    /// When the next request is due. The first call starts the timetable.
    #[inline]
    pub(crate) fn due(&mut self, now: Instant) -> Instant {
        let start = *self.start.get_or_insert(now);
        // Always from the start, in integers: no rounding adds up.
        let nanoseconds = u128::from(self.next) * NANOSECONDS / u128::from(self.rate);
        start + Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
    }

    /// The request that was due is sent.
    #[inline]
    pub(crate) fn advance(&mut self) {
        self.next += self.queues;
    }

    /// Requests that were due before `now` and were not sent.
    pub(crate) fn overdue(&self, now: Instant) -> u64 {
        let Some(start) = self.start else {
            return 0;
        };
        let passed = now.saturating_duration_since(start).as_nanos();
        let due = u64::try_from((passed * u128::from(self.rate)).div_ceil(NANOSECONDS)).unwrap_or(u64::MAX);
        due.saturating_sub(self.next).div_ceil(self.queues)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_alone_has_a_request_due_every_interval() {
        let start = Instant::now();
        let mut pace = Pace::new(10_000, 0, 1);
        for count in 0..50_000u64 {
            assert_eq!(pace.due(start), start + Duration::from_micros(100 * count));
            pace.advance();
        }
    }

    #[test]
    fn a_late_request_does_not_move_the_ones_after_it() {
        let start = Instant::now();
        let mut pace = Pace::new(1000, 0, 1);
        pace.due(start);
        pace.advance();
        let late = start + Duration::from_secs(3);
        assert_eq!(pace.due(late), start + Duration::from_millis(1));
    }

    #[test]
    fn odd_rates_do_not_drift() {
        let start = Instant::now();
        let mut pace = Pace::new(7, 0, 1);
        for _ in 0..7_000_000 {
            pace.due(start);
            pace.advance();
        }
        assert_eq!(pace.due(start), start + Duration::from_secs(1_000_000));
    }

    #[test]
    fn queues_take_turns_and_keep_the_rate_together() {
        let start = Instant::now();
        let mut all = Vec::new();
        for at in 0..3 {
            let mut pace = Pace::new(1000, at, 3);
            for _ in 0..100 {
                all.push(pace.due(start) - start);
                pace.advance();
            }
        }
        all.sort();
        let expected: Vec<Duration> = (0..300).map(Duration::from_millis).collect();
        assert_eq!(all, expected);
    }

    #[test]
    fn what_could_not_be_sent_is_counted() {
        let start = Instant::now();
        let mut pace = Pace::new(1000, 1, 2);
        assert_eq!(pace.overdue(start), 0, "not begun");
        pace.due(start);
        // Due at 1 ms, 3 ms, 5 ms, 7 ms, 9 ms; one of them was sent.
        assert_eq!(pace.overdue(start), 0);
        assert_eq!(pace.overdue(start + Duration::from_millis(10)), 5);
        pace.advance();
        assert_eq!(pace.overdue(start + Duration::from_millis(10)), 4);
        assert_eq!(pace.overdue(start + Duration::from_millis(2)), 0);
    }
}
