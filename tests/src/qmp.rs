use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::Error;

/// A connection to QEMU's monitor (the QEMU Machine Protocol).
pub struct Qmp {
    stream: BufReader<UnixStream>,
    /// Events that came while something else was awaited.
    events: Vec<Value>,
}

impl Qmp {
    const LIMIT: Duration = Duration::from_secs(30);

    pub(crate) fn connect(socket: &Path) -> Result<Qmp, Error> {
        let doing = || Error::doing(format!("connecting to QEMU's monitor at {}", socket.display()));
        let stream = UnixStream::connect(socket).map_err(doing())?;
        stream.set_read_timeout(Some(Self::LIMIT)).map_err(doing())?;
        stream.set_write_timeout(Some(Self::LIMIT)).map_err(doing())?;
        let mut qmp = Qmp { stream: BufReader::new(stream), events: Vec::new() };
        qmp.receive("greet")?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs one command of the monitor and returns its answer; events that come between are kept for [`Qmp::event`].
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Error> {
        let text = json!({ "execute": command, "arguments": arguments }).to_string();
        let sent = self.stream.get_mut().write_all(text.as_bytes());
        sent.map_err(Error::doing(format!("sending {command} to QEMU's monitor")))?;
        loop {
            let mut answer = self.receive(command)?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if answer.get("error").is_some() {
                return Err(Error::Monitor { command: text, answer: answer.to_string() });
            }
            self.events.push(answer);
        }
    }

    /// The next event of this name: one that has come already, or else one that comes within the limit of all answers,
    /// counted anew with every event.
    pub fn event(&mut self, name: &str) -> Result<Value, Error> {
        loop {
            if let Some(at) = self.events.iter().position(|event| event["event"] == name) {
                return Ok(self.events.remove(at));
            }
            let event = self.receive(name)?;
            self.events.push(event);
        }
    }

    fn receive(&mut self, command: &str) -> Result<Value, Error> {
        let mut line = String::new();
        let read = self.stream.read_line(&mut line);
        read.map_err(Error::doing(format!("awaiting the monitor's answer to {command}")))?;
        serde_json::from_str(&line).map_err(|_| Error::Monitor { command: command.to_owned(), answer: line })
    }
}
