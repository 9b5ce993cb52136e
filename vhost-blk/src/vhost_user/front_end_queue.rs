//! The order of a disk's front-ends: the rings of one run, those of the others wait until it has left and is drained.
//!
//! This module owns who is served and who waits. A front-end joins the queue with its first message, so a client that says
//! nothing is never served. Nothing here may wait for a front-end.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};

use crate::event::EventFd;

/// The order in which the front-ends of one disk are served.
#[derive(Default)]
pub struct FrontEndQueue {
    order: Mutex<Order>,
}

#[derive(Default)]
struct Order {
    /// Numbers are never used twice.
    next: u64,
    holder: Option<u64>,
    /// The holder has gone, and what it had under way is being ended.
    drains: bool,
    waiting: VecDeque<(u64, Arc<EventFd>)>,
}

/// Where a front-end stands in the queue of its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueuePosition {
    /// It is served.
    First,
    /// It is next; the front-end before it has left, and that one's requests are being drained.
    NextAfterDrain,
    /// So many front-ends are before it.
    Behind(usize),
}

impl FrontEndQueue {
    fn order(&self) -> MutexGuard<'_, Order> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A ticket for a front-end that has just connected; it does not count in the queue before it asks.
    ///
    /// # Errors
    /// No eventfd can be made.
    pub fn join(self: &Arc<Self>) -> io::Result<QueueTicket> {
        let event = Arc::new(EventFd::new()?);
        let mut order = self.order();
        order.next += 1;
        Ok(QueueTicket { queue: self.clone(), number: order.next, event })
    }
}

/// A front-end's ticket for the queue of its disk. Dropping it makes it the next one's turn: whatever belongs to the front-end has
/// to be gone by then.
pub struct QueueTicket {
    queue: Arc<FrontEndQueue>,
    number: u64,
    event: Arc<EventFd>,
}

impl QueueTicket {
    /// Joins the queue; to be called once.
    pub fn ask(&self) -> QueuePosition {
        let mut order = self.queue.order();
        if order.holder.is_none() {
            order.holder = Some(self.number);
            self.event.notify();
            return QueuePosition::First;
        }
        let before = order.waiting.len() + 1;
        order.waiting.push_back((self.number, self.event.clone()));
        if before == 1 && order.drains { QueuePosition::NextAfterDrain } else { QueuePosition::Behind(before) }
    }

    /// Rings when it is its turn.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Waits for the turn if all that is before it is the end of the last one's requests. Whether it has come.
    pub fn wait_soon(&self) -> bool {
        loop {
            let order = self.queue.order();
            if order.holder == Some(self.number) {
                return true;
            }
            if !order.drains || order.waiting.front().is_none_or(|(number, _)| *number != self.number) {
                return false;
            }
            drop(order);
            // An error (a signal) is another look.
            let _ = poll(&mut [PollFd::new(self.event(), PollFlags::IN)], None);
        }
    }

    /// Says that the front-end has gone; what it has under way is ended next.
    pub fn drains(&self) {
        let mut order = self.queue.order();
        order.drains |= order.holder == Some(self.number);
    }
}

impl Drop for QueueTicket {
    fn drop(&mut self) {
        let mut order = self.queue.order();
        order.waiting.retain(|(number, _)| *number != self.number);
        if order.holder != Some(self.number) {
            return;
        }
        order.drains = false;
        order.holder = order.waiting.pop_front().map(|(number, event)| {
            event.notify();
            number
        });
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::Timespec;

    use super::*;

    fn rings(turn: &QueueTicket) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::new(turn.event(), PollFlags::IN)], Some(&now)).unwrap() == 1
    }

    #[test]
    fn front_ends_are_served_in_the_order_of_asking() {
        let queue = Arc::new(FrontEndQueue::default());
        let [silent, first, second, third, fourth] = [(); 5].map(|()| queue.join().unwrap());
        assert_eq!(first.ask(), QueuePosition::First);
        assert_eq!([third.ask(), second.ask(), fourth.ask()], [1, 2, 3].map(QueuePosition::Behind));
        assert!(rings(&first));
        // One that waits goes without a turn, and so does one that never asked.
        drop(third);
        drop(silent);
        assert!(!rings(&second) && !rings(&fourth));
        drop(first);
        assert!(rings(&second) && !rings(&fourth));
        drop(second);
        assert!(rings(&fourth));
        drop(fourth);
        assert_eq!(queue.join().unwrap().ask(), QueuePosition::First);
    }

    #[test]
    fn one_that_is_drained_is_told_apart_from_one_that_stays() {
        let queue = Arc::new(FrontEndQueue::default());
        let [first, second, third] = [(); 3].map(|()| queue.join().unwrap());
        assert_eq!(first.ask(), QueuePosition::First);
        // Not its turn: it says nothing of the holder.
        second.drains();
        assert_eq!(second.ask(), QueuePosition::Behind(1));
        drop(second);
        first.drains();
        assert_eq!(third.ask(), QueuePosition::NextAfterDrain);
        std::thread::scope(|scope| {
            let comes = scope.spawn(|| third.wait_soon());
            drop(first);
            assert!(comes.join().unwrap());
        });
        assert!(rings(&third));
        let fourth = queue.join().unwrap();
        assert_eq!(fourth.ask(), QueuePosition::Behind(1));
        assert!(!fourth.wait_soon(), "the third one stays");
        drop(fourth);
        assert_eq!(queue.join().unwrap().ask(), QueuePosition::Behind(1), "another one holds it");
    }
}
