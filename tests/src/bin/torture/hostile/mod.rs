//! A hostile front-end beside the client: each round it is another one, with random habits.
//!
//! It believes nothing, waits for little, and survives whatever it does: only the target may suffer. All of it follows from the
//! run's seed, but for what the target's own timing makes of it.

mod habits;
mod line;

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};

pub(crate) use habits::Habit;

use crate::Failure;
use crate::hostile::habits::Session;
use crate::random::Random;

/// What the hostile has done.
#[derive(Clone, Debug, Default)]
pub(crate) struct Deeds {
    pub habits: BTreeMap<&'static str, u64>,
    /// Sessions that got as far as rings that run.
    pub sessions: u64,
    /// Requests that it has made, sound or not.
    pub requests: u64,
    /// Answers to them that it has seen.
    pub answers: u64,
    /// Messages that were refused, or that ended the connection.
    pub refusals: u64,
}

/// It works in a thread of its own, a round at a time.
pub(crate) struct Hostile {
    begin: Sender<u64>,
    done: Receiver<Deeds>,
    busy: bool,
    pub deeds: Deeds,
}

impl Hostile {
    pub(crate) fn start(socket: &Path) -> Result<Hostile, Failure> {
        let (begin, rounds) = channel();
        let (told, done) = channel();
        let thread = std::thread::Builder::new().name("hostile".into());
        let socket = socket.to_owned();
        let body = move || {
            let mut one = One { socket, deeds: Deeds::default(), held: Vec::new() };
            // Until either end is dropped.
            while let Ok(seed) = rounds.recv() {
                one.round(&mut Random::new(seed));
                if told.send(one.deeds.clone()).is_err() {
                    break;
                }
            }
        };
        thread.spawn(body).map_err(|error| Failure::Stand(format!("a thread for the hostile: {error}")))?;
        Ok(Hostile { begin, done, busy: false, deeds: Deeds::default() })
    }

    /// Begins a round.
    pub(crate) fn begin(&mut self, seed: u64) {
        self.busy = self.begin.send(seed).is_ok();
    }

    /// Whether the round is over.
    pub(crate) fn is_done(&mut self) -> bool {
        if self.busy
            && let Ok(deeds) = self.done.try_recv()
        {
            (self.deeds, self.busy) = (deeds, false);
        }
        !self.busy
    }
}

struct One {
    socket: PathBuf,
    deeds: Deeds,
    /// Connections that stay until the next round, or for ever.
    held: Vec<UnixStream>,
}

impl One {
    fn round(&mut self, random: &mut Random) {
        if random.one_in(2) {
            self.held.clear();
        }
        // Connections that cannot be had, answers that do not come: all of that is no matter here.
        let Ok(mut session) = Session::open(&self.socket, random, &mut self.deeds) else { return };
        for _ in 0..random.between(1..=4) {
            let habit = Habit::draw(random);
            if session.follow(habit, random, &mut self.held).is_err() {
                // The connection has ended.
                break;
            }
        }
        session.end(random, &mut self.held);
    }
}
