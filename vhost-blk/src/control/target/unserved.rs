//! What is not served until the configuration is corrected and the program restarted: exports with mistakes, CPUs that cannot be
//! had, and sockets that no export wants. Everything else is served.
//!
//! A front-end that connects to such a socket is disconnected at once, for one that nobody answers stands still.

use std::os::unix::net::UnixListener;

use crate::control::config::RefusedExport;
use crate::datapath::worker;
use crate::vhost_user::listener::Handed;

/// Front-ends left in one go, lest one that comes again and again keep others waiting.
const LEFT_AT_ONCE: usize = 64;

/// Mistakes, and sockets on which front-ends come in vain.
pub(super) struct Unserved {
    reasons: Vec<String>,
    sockets: Vec<UnixListener>,
}

impl Unserved {
    /// Tells the log of exports that make no sense, and of sockets that no export wants.
    pub(super) fn new(refused: &[RefusedExport], unwanted: Vec<Handed>) -> Unserved {
        let (mut reasons, mut sockets) = (Vec::new(), Vec::new());
        for RefusedExport { socket, mistakes } in refused {
            let why = mistakes.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
            let socket = socket.as_ref().map_or_else(|| "its socket".into(), |socket| socket.display().to_string());
            log::error!("{why}; no disk is served on {socket} until this is corrected and the program is restarted");
            reasons.push(why);
        }
        for Handed { name, path, listener, .. } in unwanted {
            let is_refused = refused.iter().any(|export| export.socket.as_ref().is_some_and(|socket| *socket == path));
            if !is_refused {
                let why = format!(
                    "the service manager hands over the socket {} ({name}), and no export is left that has it as \
                     socket-path; change its ListenStream= or the export",
                    path.display()
                );
                log::error!("{why}; front-ends that connect to it are disconnected at once");
                reasons.push(why);
            }
            match listener.set_nonblocking(true) {
                Ok(()) => sockets.push(listener),
                Err(error) => log::error!(
                    "{}: front-ends that connect there are left waiting, as the socket cannot be made non-blocking: {error}",
                    path.display()
                ),
            }
        }
        Unserved { reasons, sockets }
    }

    /// Tells the log of CPUs that cannot be had.
    pub(super) fn lacks_workers(&mut self, unpinned: &[worker::WorkerError]) {
        for error in unpinned {
            log::error!("{error}; the other workers do its work until this is corrected and the program is restarted");
            self.reasons.push(error.to_string());
        }
    }

    /// What is wrong.
    pub(super) fn reasons(&self) -> &[String] {
        &self.reasons
    }

    /// Leaves front-ends that have come: one that nobody answers stands still, with its virtual machine.
    pub(super) fn turn_away(&self) {
        for socket in &self.sockets {
            leave(socket);
        }
    }
}

/// Leaves the front-ends that have come to a socket which does not block; says how many.
pub(super) fn leave(socket: &UnixListener) -> usize {
    (0..LEFT_AT_ONCE).take_while(|_| socket.accept().is_ok()).count()
}
