//! MSI-X vectors: eventfds that the front-end hands over (vfio-user SET_IRQS).
//!
//! The MSI-X table in BAR0 is kept as the host writes it, but messages are delivered by the eventfds alone, as VFIO does.

use std::fs::File;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

type Vectors = Vec<Option<Arc<File>>>;

/// The vectors, shared by the message thread (which changes them) and the data thread.
pub(crate) struct Interrupts {
    vectors: Mutex<Vectors>,
    generation: AtomicU64,
}

impl Interrupts {
    pub(crate) fn new(count: u16) -> Interrupts {
        Interrupts { vectors: Mutex::new(vec![None; count.into()]), generation: AtomicU64::new(0) }
    }

    fn change<T>(&self, change: impl FnOnce(&mut Vectors) -> T) -> T {
        let mut vectors = self.vectors.lock().unwrap_or_else(PoisonError::into_inner);
        let result = change(&mut vectors);
        // Release: pairs with the Acquire in `Signals::send`.
        self.generation.fetch_add(1, Ordering::Release);
        result
    }

    /// Takes all eventfds away.
    pub(crate) fn disable_all(&self) {
        self.change(|vectors| vectors.fill(None));
    }

    /// Gives `count` vectors from `start` the eventfds `files`, or takes theirs away if there are none.
    pub(crate) fn assign(&self, start: u32, count: u32, files: Vec<File>) -> io::Result<()> {
        let given = files.len();
        let refuse = |why: &str| {
            let text = format!("SET_IRQS of {count} MSI-X vectors from {start} with {given} eventfds: {why}");
            Err(io::Error::new(io::ErrorKind::InvalidInput, text))
        };
        if given != 0 && given != count as usize {
            return refuse("one eventfd per vector, at most 16 in a message");
        }
        self.change(|vectors| {
            let range = start as usize..start as usize + count as usize;
            let Some(slots) = vectors.get_mut(range) else { return refuse("there are not so many vectors") };
            let mut files = files.into_iter();
            for slot in slots {
                *slot = files.next().map(Arc::new);
            }
            Ok(())
        })
    }

    /// Signals vectors on the front-end's own request (a loopback test).
    pub(crate) fn trigger(&self, start: u32, count: u32) {
        let vectors = self.vectors.lock().unwrap_or_else(PoisonError::into_inner);
        for file in vectors.iter().skip(start as usize).take(count as usize).flatten() {
            signal(file);
        }
    }
}

fn signal(mut file: &File) {
    if let Err(error) = file.write_all(&1_u64.to_ne_bytes()) {
        log::warn!("an interrupt eventfd cannot be written: {error}");
    }
}

/// The data thread's copy of the vectors.
pub(crate) struct Signals {
    shared: Arc<Interrupts>,
    generation: u64,
    vectors: Vectors,
}

impl Signals {
    pub(crate) fn new(shared: Arc<Interrupts>) -> Signals {
        Signals { shared, generation: u64::MAX, vectors: Vec::new() }
    }

    /// Signals one vector; false if it has no eventfd.
    pub(crate) fn send(&mut self, vector: u16) -> bool {
        // Acquire: pairs with the Release in `Interrupts::change`.
        let generation = self.shared.generation.load(Ordering::Acquire);
        if generation != self.generation {
            self.vectors.clone_from(&self.shared.vectors.lock().unwrap_or_else(PoisonError::into_inner));
            self.generation = generation;
        }
        let file = self.vectors.get(usize::from(vector)).and_then(Option::as_ref);
        file.inspect(|file| signal(file)).is_some()
    }
}
