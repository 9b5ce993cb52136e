//! One disk on one socket: front-ends come, one at a time, and go.

use std::io;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};

use crate::bell::Bell;
use crate::blk_config;
use crate::config::ExportSettings;
use crate::counters::{LaneCounters, Tally};
use crate::drive::{Drive, ExportedNamespace};
use crate::listener::Listener;
use crate::log_limit::LogLimit;
use crate::session::Session;
use crate::session::connection::{self, End};
use crate::worker::panic_message;

/// What the sessions of one export have in common.
pub struct Export {
    /// Its socket, for the log.
    pub name: String,
    /// The controller.
    pub drive: Arc<Drive>,
    /// The namespace served.
    pub namespace: Arc<ExportedNamespace>,
    /// The export, or the namespace when it was exported, refuses writes.
    pub read_only: bool,
    /// The answer to GET_ID.
    pub serial: [u8; 20],
    /// Virtqueues offered.
    pub queues: u16,
    /// Largest virtqueue accepted, in entries.
    pub queue_size: u16,
    /// Feature bits offered.
    pub features: u64,
    /// The mode of the write cache as its front-ends know it, true for write-back; `None`: this process has not served any yet.
    /// It outlives sessions: a front-end that comes again shows its guest the mode that was set, and does not set it again.
    mode: Mutex<Option<bool>>,
    first_worker: usize,
    workers: usize,
    counters: Vec<Arc<LaneCounters>>,
    /// How many lines its front-ends and guests may cause, over all sessions.
    pub log: Arc<LogLimit>,
}

impl Export {
    /// Looks the namespace up. `number`: of the export in the whole program, so that exports start on different workers.
    pub fn new(settings: &ExportSettings, drive: Arc<Drive>, number: usize, workers: usize) -> Result<Export, String> {
        let namespace = drive.namespace(settings.namespace)?;
        let serial = match &settings.serial {
            Some(serial) => serial.to_bytes(),
            None => {
                let mut bytes = [0; 20];
                bytes.iter_mut().zip(drive.serial().bytes()).for_each(|(to, from)| *to = from);
                bytes
            }
        };
        let known = namespace.known().namespace;
        let read_only = settings.read_only || known.read_only;
        let mut counters = Vec::new();
        counters.resize_with(settings.queues.into(), Arc::default);
        Ok(Export {
            name: settings.listen.to_string(),
            features: blk_config::features(&known, read_only),
            mode: Mutex::new(None),
            drive,
            namespace,
            read_only,
            serial,
            queues: settings.queues,
            queue_size: settings.queue_size,
            first_worker: number,
            workers,
            counters,
            log: Arc::default(),
        })
    }

    /// See the field.
    pub fn mode(&self) -> Option<bool> {
        *self.mode.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See the field.
    pub fn set_mode(&self, writeback: bool) {
        *self.mode.lock().unwrap_or_else(PoisonError::into_inner) = Some(writeback);
    }

    /// The worker for a ring: round robin, so that the rings of one disk are spread.
    pub fn worker_hint(&self, ring: usize) -> usize {
        (self.first_worker + ring) % self.workers
    }

    /// The counters of a ring; they go on over all sessions.
    pub fn counters(&self, ring: usize) -> Arc<LaneCounters> {
        self.counters[ring].clone()
    }

    /// The counters of all its rings together.
    pub fn totals(&self) -> Tally {
        let mut sum = Tally::default();
        self.counters.iter().for_each(|counters| sum += counters.read());
        sum
    }

    /// Tells of lines that were not written, see [`LogLimit::tell_left_out`].
    pub fn tell_left_out(&self, end: bool) {
        self.log.tell_left_out(&self.name, end);
    }

    /// Logs the counters of every ring that ever did anything.
    pub fn log_counters(&self) {
        let mut idle = true;
        for (ring, counters) in self.counters.iter().enumerate() {
            let tally = counters.read();
            if tally.fields().all(|(_, value)| value == 0) {
                continue;
            }
            idle = false;
            let fields = tally.fields().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ");
            log::info!("{} ring {ring}: {fields}", self.name);
        }
        if idle {
            log::info!("{}: no ring has been used yet", self.name);
        }
    }
}

/// The thread that serves an export.
pub struct Server {
    export: Arc<Export>,
    stop: Arc<Stop>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// How a thread is told to stop, wherever it waits.
struct Stop {
    bell: Bell,
    /// The present front-end; shutting it down ends a read or write in the middle of a message.
    stream: Mutex<Option<UnixStream>>,
}

impl Stop {
    fn set_stream(&self, stream: Option<UnixStream>) {
        *self.stream.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = stream;
    }
}

impl Server {
    /// Starts to accept front-ends; `ended` is called when there will be no more of them, with an error, in one line, if there
    /// should be.
    pub fn start(
        export: Arc<Export>,
        listener: Listener,
        ended: impl FnOnce(Result<(), String>) + Send + 'static,
    ) -> Result<Server, String> {
        let cannot = |error: io::Error| format!("{}: cannot start serving: {error}", export.name);
        let bell = Bell::new().map_err(cannot)?;
        let stop = Arc::new(Stop { bell, stream: Mutex::new(None) });
        let thread = {
            let (export, stop) = (export.clone(), stop.clone());
            let run = move || {
                // Its disk would be gone for as long as the program lives.
                let end = catch_unwind(AssertUnwindSafe(|| accept(&export, listener, &stop)));
                ended(end.unwrap_or_else(|panic| {
                    Err(format!("the thread that serves {} died: {}", export.name, panic_message(panic.as_ref())))
                }));
            };
            std::thread::Builder::new().name("vhost-user".into()).spawn(run).map_err(cannot)?
        };
        Ok(Server { export, stop, thread: Some(thread) })
    }

    /// The export it serves.
    pub fn export(&self) -> &Arc<Export> {
        &self.export
    }

    /// Asks the thread to stop; dropping the server waits for it.
    pub fn ask_to_stop(&self) {
        self.stop.bell.ring();
        if let Some(stream) = &*self.stop.stream.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ask_to_stop();
        if let Some(thread) = self.thread.take() {
            // It catches its panics.
            let _ = thread.join();
        }
    }
}

/// Accepts front-ends until told to stop.
fn accept(export: &Arc<Export>, listener: Listener, stop: &Stop) -> Result<(), String> {
    // Dropped in this order: the file, then the socket, on which nobody else can take the file for a stale one.
    let (socket, _bound) = match listener {
        Listener::Connected(stream) => {
            serve(export, stream, stop);
            return Ok(());
        }
        Listener::Listening(bound, socket) => (socket, bound),
    };
    log::info!("{}: {} is ready for a front-end", export.name, describe(export));
    loop {
        let mut sources = [PollFd::new(&stop.bell, PollFlags::IN), PollFd::new(&socket, PollFlags::IN)];
        if let Err(error) = poll(&mut sources, None)
            && error != rustix::io::Errno::INTR
        {
            return Err(format!("{}: cannot wait for front-ends: {error}", export.name));
        }
        if !sources[0].revents().is_empty() {
            return Ok(());
        }
        match socket.accept() {
            Ok((stream, _)) => serve(export, stream, stop),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => {
                log::error!("{}: cannot accept a front-end: {error}", export.name);
                // Out of descriptors, most likely: give others time to release some, but hear a stop.
                let pause = rustix::event::Timespec { tv_sec: 1, tv_nsec: 0 };
                let _ = poll(&mut [PollFd::new(&stop.bell, PollFlags::IN)], Some(&pause));
            }
        }
    }
}

/// Serves one front-end until it goes.
fn serve(export: &Arc<Export>, stream: UnixStream, stop: &Stop) {
    let prepared = stream.set_nonblocking(false).and_then(|()| stream.try_clone());
    match prepared {
        Ok(clone) => stop.set_stream(Some(clone)),
        Err(error) => return log::error!("{}: cannot use a front-end's socket: {error}", export.name),
    }
    log::info!("{}: a front-end connected", export.name);
    #[cfg(test)]
    crate::target::tests::panic_if_asked(&export.name, "server panics");
    let session = Arc::new(Mutex::new(Session::new(export.clone())));
    let end = connection::serve(stream, session, &stop.bell, export.namespace.changed(), &export.name);
    stop.set_stream(None);
    match end {
        End::Closed => log::info!("{}: the front-end disconnected", export.name),
        End::Stopped => log::debug!("{}: the front-end is left", export.name),
        End::Broken(why) => log::warn!("{}: the front-end was disconnected: {why}", export.name),
    }
}

fn describe(export: &Export) -> String {
    let namespace = export.namespace.known().namespace;
    format!(
        "namespace {} of {}, {} blocks of {} bytes{}",
        namespace.id,
        export.drive,
        namespace.blocks,
        namespace.block_bytes(),
        if export.read_only { ", read-only" } else { "" }
    )
}
