//! From a value of the stream to its answer: single requests, batches, notifications.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use rustix::process::{Signal, getpid, kill_process};
use serde_json::Value;

use super::context::Context;
use super::error::RpcError;
use super::message::{Call, Id, NoCall, answer, short};
use super::methods::{self, Method};
use super::socket::Peer;
use crate::control::target::registry::Registry;
use crate::datapath::worker::panic_message;

/// The longest answer, in bytes; SPDK's own limit.
const MAX_ANSWER_BYTES: usize = 32 << 20;

/// Carries calls out.
pub(super) struct Caller {
    socket: String,
    context: Context,
}

/// What becomes of a value of the stream.
pub(super) struct Reply {
    /// JSON without a line end; `None`: nobody wants an answer.
    pub(super) text: Option<Vec<u8>>,
    /// The stream makes no sense any more.
    pub(super) broken: bool,
}

/// A signal for this program itself.
pub(super) struct SignalToSelf(Signal);

impl SignalToSelf {
    /// Sends it.
    pub(super) fn send(self) {
        if let Err(error) = kill_process(getpid(), self.0) {
            log::error!("cannot send {:?} to this program: {error}", self.0);
        }
    }
}

impl Caller {
    /// `socket`: for the log.
    pub(super) fn new(socket: String, registry: Arc<Registry>) -> Caller {
        Caller { socket, context: Context { registry, signal: None } }
    }

    /// The socket's name.
    pub(super) fn socket(&self) -> &str {
        &self.socket
    }

    /// A signal that a call has asked for, once.
    pub(super) fn take_signal(&mut self) -> Option<SignalToSelf> {
        self.context.signal.take().map(SignalToSelf)
    }

    /// Answers a whole value.
    pub(super) fn answer(&mut self, value: &[u8], peer: Peer) -> Reply {
        let value = match serde_json::from_slice::<Value>(value) {
            Ok(value) => value,
            // Where a string ends that is none, nobody knows.
            Err(error) => {
                let text = answer(&Value::Null, Err(RpcError::Parse(error.to_string())));
                return Reply { text: Some(text), broken: true };
            }
        };
        let text = match value {
            Value::Array(calls) if calls.is_empty() => {
                Some(answer(&Value::Null, Err(RpcError::InvalidRequest("an empty batch".into()))))
            }
            Value::Array(calls) => self.batch(calls, peer),
            value => self.single(value, MAX_ANSWER_BYTES, peer),
        };
        Reply { text, broken: false }
    }

    fn batch(&mut self, calls: Vec<Value>, peer: Peer) -> Option<Vec<u8>> {
        let mut text = Vec::new();
        for call in calls {
            let room = MAX_ANSWER_BYTES.saturating_sub(text.len());
            if let Some(one) = self.single(call, room, peer) {
                text.push(if text.is_empty() { b'[' } else { b',' });
                text.extend(one);
            }
        }
        (!text.is_empty()).then(|| {
            text.push(b']');
            text
        })
    }

    /// Carries one call out; with no `room` left for its answer it is not begun.
    fn single(&mut self, value: Value, room: usize, peer: Peer) -> Option<Vec<u8>> {
        let Call { id, method, params } = match Call::read(value) {
            Ok(request) => request,
            Err(NoCall(id, error)) => return Some(answer(&id, Err(error))),
        };
        let too_long = || RpcError::Internal("the answer is too long".into());
        let outcome = match (methods::find(&method), params) {
            (None, _) => Err(RpcError::MethodNotFound),
            (Some(_), Err(error)) => Err(error),
            _ if room == 0 => Err(too_long()),
            (Some(method), Ok(params)) => self.call(method, params, peer),
        };
        let outcome = outcome.and_then(|text| if text.len() <= room { Ok(text) } else { Err(too_long()) });
        match id {
            Id::Of(id) => Some(answer(&id, outcome)),
            Id::None => None,
        }
    }

    /// A handler that only reads leaves nothing half done when it panics: that costs its caller the answer, and no guest anything. If
    /// one panics that changes something, or anything else on this thread does, the program ends as it does for any other control
    /// thread: it is not known what state it is in, and started again it goes on from a known one.
    fn call(&mut self, method: &Method, params: Value, peer: Peer) -> Result<Vec<u8>, RpcError> {
        let wanted = if method.changes { short(&params.to_string()) } else { String::new() };
        let name = method.name;
        let run = || (method.run)(&mut self.context, params);
        if !method.changes {
            return catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
                let message = panic_message(panic.as_ref());
                log::error!("{}: {name} panicked, which is a defect of this program: {message}", self.socket);
                Err(RpcError::Internal("a defect of the program; its log has more".into()))
            });
        }
        let outcome = run();
        let result = outcome.as_ref().err().map_or_else(|| "done".into(), ToString::to_string);
        log::info!("{}: {name} {wanted} by {peer}: {result}", self.socket);
        outcome
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::control::target::registry;

    fn caller() -> Caller {
        Caller::new("test".into(), registry::testing::empty())
    }

    fn ask(caller: &mut Caller, text: &str) -> (Option<Value>, bool) {
        let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let Reply { text, broken } = caller.answer(text.as_bytes(), Peer::of(&one));
        (text.map(|text| serde_json::from_slice(&text).unwrap()), broken)
    }

    fn code(answer: &Value) -> i64 {
        answer["error"]["code"].as_i64().unwrap_or_default()
    }

    #[test]
    fn calls_are_answered() {
        let mut caller = caller();
        let mut ask = |text: &str| ask(&mut caller, text);
        assert_eq!(
            ask(r#"{"method":"framework_wait_init","id":"x"}"#),
            (Some(json!({"jsonrpc": "2.0", "id": "x", "result": true})), false)
        );
        assert_eq!(ask(r#"{"method":"framework_wait_init"}"#), (None, false), "a notification");
        assert_eq!(ask(r#"{"method":"nonsense"}"#), (None, false), "also one that fails");
        for (text, expected) in [
            (r#"{"method":"nonsense","id":1}"#, -32601),
            (r#"{"method":"spdk_get_version","id":1,"params":{"a":1}}"#, -32602),
            (r#"{"method":"spdk_get_version","id":1,"params":[]}"#, -32602),
            (r#"{"method":"log_set_level","id":1}"#, -32602),
            (r#"{"method":"log_set_level","id":1,"params":{"level":"LOUD"}}"#, -32602),
            (r#"{"method":"framework_start_init","id":1}"#, -1),
            (r#"{"method":1,"id":1}"#, -32600),
            ("[]", -32600),
            ("7", -32600),
            ("\"a\"", -32600),
        ] {
            let (answer, broken) = ask(text);
            assert_eq!((code(&answer.unwrap()), broken), (expected, false), "{text}");
        }
        for text in [r#"{"a":}"#, "[1,]", "-", "tru", "\"\n\"", r#"{"method":"a","id":1e999}"#] {
            let (answer, broken) = ask(text);
            assert_eq!((code(&answer.unwrap()), broken), (-32700, true), "{text}");
        }
    }

    #[test]
    fn a_batch_is_answered_in_one_array() {
        let mut caller = caller();
        let (answer, _) = ask(
            &mut caller,
            r#"[{"method":"framework_wait_init","id":1},{"method":"framework_wait_init"},5,{"method":"no","id":2},[]]"#,
        );
        let answer = answer.unwrap();
        let answers = answer.as_array().unwrap();
        assert_eq!(answers[0], json!({"jsonrpc": "2.0", "id": 1, "result": true}));
        assert_eq!(answers[1..].iter().map(code).collect::<Vec<_>>(), [-32600, -32601, -32600]);
        assert_eq!(answers.len(), 4);
        assert_eq!(ask(&mut caller, r#"[{"method":"framework_wait_init"},{"method":"no"}]"#), (None, false));
    }

    #[test]
    fn an_answer_that_is_too_long_is_an_error() {
        let mut caller = caller();
        let call = || json!({"method": "rpc_get_methods", "id": 1});
        let mut single = |room| {
            let text =
                caller.single(call(), room, Peer::of(&std::os::unix::net::UnixStream::pair().unwrap().0)).unwrap();
            code(&serde_json::from_slice(&text).unwrap())
        };
        assert_eq!([single(0), single(10), single(1 << 20)], [-32603, -32603, 0]);
    }

    #[test]
    fn a_panic_of_a_handler_that_only_reads_costs_the_answer() {
        let mut caller = caller();
        let peer = Peer::of(&std::os::unix::net::UnixStream::pair().unwrap().0);
        let method = |changes| {
            let mut method = methods::METHODS[0];
            method.changes = changes;
            method.run = |_, _| panic!("asked to by a test");
            method
        };
        let error = caller.call(&method(false), json!({}), peer).unwrap_err();
        assert_eq!(error.code(), -32603);
        let end = catch_unwind(AssertUnwindSafe(|| caller.call(&method(true), json!({}), peer)));
        assert!(end.is_err(), "the program ends with one that changes something");
    }
}
