use std::io::Read;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::Error;

/// Everything that was read from one stream, kept whole, with a position up to which it has been looked at.
#[derive(Clone)]
pub(crate) struct Transcript(Arc<(Mutex<State>, Condvar)>);

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    looked_at: usize,
    closed: bool,
}

impl Transcript {
    /// Reads `stream` to its end on a thread of its own, which ends with the stream.
    pub(crate) fn of(mut stream: impl Read + Send + 'static) -> Transcript {
        let transcript = Transcript(Arc::default());
        let writer = transcript.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                let count = stream.read(&mut buffer).unwrap_or(0);
                let mut state = writer.lock();
                state.bytes.extend_from_slice(&buffer[..count]);
                state.closed = count == 0;
                let closed = state.closed;
                drop(state);
                writer.0.1.notify_all();
                if closed {
                    break;
                }
            }
        });
        transcript
    }

    /// Waits for the next line that begins with `prefix`: returns what came before it since the last call, and the
    /// rest of the line. `None`: the stream ended without it.
    pub(crate) fn next_line(&self, prefix: &str, limit: Duration) -> Result<Option<(String, String)>, Error> {
        let deadline = Instant::now() + limit;
        let mut state = self.lock();
        loop {
            let start = state.looked_at;
            let text = &state.bytes[start..];
            if let Some((at, end)) = find_line(text, prefix.as_bytes()) {
                let before = String::from_utf8_lossy(&text[..at]).into_owned();
                let rest = String::from_utf8_lossy(&text[at + prefix.len()..end]).into_owned();
                state.looked_at = start + end + 1;
                return Ok(Some((before, rest)));
            }
            if state.closed {
                return Ok(None);
            }
            let now = Instant::now();
            if now >= deadline {
                return Err(Error::Timeout { waiting_for: format!("a line beginning with {prefix:?}"), limit });
            }
            state = self.0.1.wait_timeout(state, deadline - now).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.lock().bytes).into_owned()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is a buffer and two numbers: usable whatever happened to the thread that held it.
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The position of the first complete line of `text` that begins with `prefix`, and of its line feed.
fn find_line(text: &[u8], prefix: &[u8]) -> Option<(usize, usize)> {
    let mut at = 0;
    while let Some(length) = text[at..].iter().position(|&byte| byte == b'\n') {
        if text[at..at + length].starts_with(prefix) {
            return Some((at, at + length));
        }
        at += length + 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_only_complete_lines_that_begin_with_the_prefix() {
        let transcript = Transcript::of(&b"a @end 1\nb\n@end 2\nc\n@end 3"[..]);
        let limit = Duration::from_secs(10);
        assert_eq!(transcript.next_line("@end ", limit).unwrap(), Some(("a @end 1\nb\n".into(), "2".into())));
        assert_eq!(transcript.next_line("@end ", limit).unwrap(), None, "the last line is not complete");
    }
}
