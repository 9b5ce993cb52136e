//! Whose turn it is on a disk: the rings of one front-end run, those of others wait until it has left and is drained.
//!
//! A front-end asks for its turn with its first message, so that whoever says nothing never has it.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};

use crate::event::EventFd;

/// The order in which the front-ends of one disk are served.
#[derive(Default)]
pub struct Turns {
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

/// What a front-end that asks for its turn is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// It is its turn.
    Now,
    /// The one before it has gone and is only being drained.
    Soon,
    /// So many are before it.
    After(usize),
}

impl Turns {
    fn order(&self) -> MutexGuard<'_, Order> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a front-end that has just come; it is not in the order before it asks.
    ///
    /// # Errors
    /// No eventfd can be made.
    pub fn join(self: &Arc<Self>) -> io::Result<Turn> {
        let event = Arc::new(EventFd::new()?);
        let mut order = self.order();
        order.next += 1;
        Ok(Turn { turns: self.clone(), number: order.next, event })
    }
}

/// A front-end's place. Dropping it makes it the next one's turn: whatever belongs to the front-end has to be gone by then.
pub struct Turn {
    turns: Arc<Turns>,
    number: u64,
    event: Arc<EventFd>,
}

impl Turn {
    /// Asks for the turn, once.
    pub fn ask(&self) -> Asked {
        let mut order = self.turns.order();
        if order.holder.is_none() {
            order.holder = Some(self.number);
            self.event.notify();
            return Asked::Now;
        }
        let before = order.waiting.len() + 1;
        order.waiting.push_back((self.number, self.event.clone()));
        if before == 1 && order.drains { Asked::Soon } else { Asked::After(before) }
    }

    /// Rings when it is its turn.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Waits for the turn if all that is before it is the end of the last one's requests. Whether it has come.
    pub fn wait_soon(&self) -> bool {
        loop {
            let order = self.turns.order();
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
        let mut order = self.turns.order();
        order.drains |= order.holder == Some(self.number);
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut order = self.turns.order();
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

    fn rings(turn: &Turn) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::new(turn.event(), PollFlags::IN)], Some(&now)).unwrap() == 1
    }

    #[test]
    fn turns_are_taken_in_the_order_of_asking() {
        let turns = Arc::new(Turns::default());
        let [silent, first, second, third, fourth] = [(); 5].map(|()| turns.join().unwrap());
        assert_eq!(first.ask(), Asked::Now);
        assert_eq!([third.ask(), second.ask(), fourth.ask()], [1, 2, 3].map(Asked::After));
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
        assert_eq!(turns.join().unwrap().ask(), Asked::Now);
    }

    #[test]
    fn one_that_is_drained_is_told_apart_from_one_that_stays() {
        let turns = Arc::new(Turns::default());
        let [first, second, third] = [(); 3].map(|()| turns.join().unwrap());
        assert_eq!(first.ask(), Asked::Now);
        // Not its turn: it says nothing of the holder.
        second.drains();
        assert_eq!(second.ask(), Asked::After(1));
        drop(second);
        first.drains();
        assert_eq!(third.ask(), Asked::Soon);
        std::thread::scope(|scope| {
            let comes = scope.spawn(|| third.wait_soon());
            drop(first);
            assert!(comes.join().unwrap());
        });
        assert!(rings(&third));
        let fourth = turns.join().unwrap();
        assert_eq!(fourth.ask(), Asked::After(1));
        assert!(!fourth.wait_soon(), "the third one stays");
        drop(fourth);
        assert_eq!(turns.join().unwrap().ask(), Asked::After(1), "another one holds it");
    }
}
