//! Requests as JSON-RPC 2.0 has them, and their answers.

use serde::Serialize;
use serde_json::{Map, Value};

use super::error::RpcError;

/// Who an answer is for.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Id {
    /// A string, a number or null: it stands in the answer.
    Of(Value),
    /// It is a notification, which is not answered.
    None,
}

/// A request that is one.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Call {
    pub(super) id: Id,
    pub(super) method: String,
    /// An object; an empty one if there are none.
    pub(super) params: Result<Value, RpcError>,
}

/// A value that is no request: for whom the answer is, and what is wrong.
#[derive(Debug, PartialEq)]
pub(super) struct NoCall(pub(super) Value, pub(super) RpcError);

impl Call {
    /// Reads a request.
    pub(super) fn read(value: Value) -> Result<Call, NoCall> {
        let wrong = |id: &Id, why: &str| {
            let id = match id {
                Id::Of(id) => id.clone(),
                Id::None => Value::Null,
            };
            NoCall(id, RpcError::InvalidRequest(why.into()))
        };
        let Value::Object(mut members) = value else { return Err(wrong(&Id::None, "it is no object")) };
        let id = match members.remove("id") {
            None => Id::None,
            Some(id @ (Value::String(_) | Value::Number(_) | Value::Null)) => Id::Of(id),
            Some(_) => return Err(wrong(&Id::None, "its id is no string, number or null")),
        };
        if members.remove("jsonrpc").is_some_and(|version| version != "2.0") {
            return Err(wrong(&id, "jsonrpc is not \"2.0\""));
        }
        let method = match members.remove("method") {
            Some(Value::String(method)) => method,
            Some(_) => return Err(wrong(&id, "its method is no string")),
            None => return Err(wrong(&id, "it has no method")),
        };
        let params = match members.remove("params") {
            None | Some(Value::Null) => Ok(Value::Object(Map::new())),
            Some(params @ Value::Object(_)) => Ok(params),
            Some(_) => Err(RpcError::InvalidParams("they are no object".into())),
        };
        if let Some(name) = members.keys().next() {
            return Err(wrong(&id, &format!("unknown member \"{}\"", short(name))));
        }
        Ok(Call { id, method, params })
    }
}

/// The beginning of a name that somebody else has chosen.
pub(super) fn short(text: &str) -> String {
    const MOST: usize = 64;
    if text.chars().count() <= MOST { text.into() } else { text.chars().take(MOST).chain("…".chars()).collect() }
}

/// An answer, to be written as it is: clients print it in this order.
#[derive(Serialize)]
struct Response<'a> {
    jsonrpc: &'static str,
    id: &'a Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<ErrorMember>,
}

#[derive(Serialize)]
struct ErrorMember {
    code: i32,
    message: String,
}

/// The answer to a call; `result` is JSON. Without a line end.
pub(super) fn answer(id: &Value, outcome: Result<Vec<u8>, RpcError>) -> Vec<u8> {
    let (error, result) = match outcome {
        Ok(result) => (None, Some(result)),
        Err(error) => (Some(ErrorMember { code: error.code(), message: error.to_string() }), None),
    };
    let head = Response { jsonrpc: "2.0", id, error };
    let mut text = serde_json::to_vec(&head).expect("strings, numbers and JSON values are never refused");
    if let Some(result) = result {
        // Its last brace.
        text.pop();
        text.extend(b",\"result\":");
        text.extend(result);
        text.push(b'}');
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_request_is_read() {
        let request = Call::read(json!({"jsonrpc": "2.0", "method": "m", "id": 7, "params": {"a": 1}})).unwrap();
        assert_eq!(request, Call { id: Id::Of(json!(7)), method: "m".into(), params: Ok(json!({"a": 1})) });
        for value in [json!({"method": "m"}), json!({"method": "m", "params": null, "jsonrpc": "2.0"})] {
            assert_eq!(Call::read(value).unwrap(), Call { id: Id::None, method: "m".into(), params: Ok(json!({})) });
        }
        for id in [json!("x"), json!(1.5), json!(-1), json!(u64::MAX), json!(null)] {
            assert_eq!(Call::read(json!({"method": "m", "id": id})).unwrap().id, Id::Of(id));
        }
        for params in [json!([]), json!([1]), json!(1), json!("a"), json!(false)] {
            let code = Call::read(json!({"method": "m", "params": params})).unwrap().params.unwrap_err().code();
            assert_eq!(code, -32602, "{params}");
        }
    }

    #[test]
    fn what_is_no_request_says_why() {
        for (value, id, text) in [
            (json!(1), json!(null), "no object"),
            (json!("a"), json!(null), "no object"),
            (json!({}), json!(null), "no method"),
            (json!({"id": 3}), json!(3), "no method"),
            (json!({"id": 3, "method": 4}), json!(3), "method is no string"),
            (json!({"id": [], "method": "m"}), json!(null), "id is no string"),
            (json!({"id": true, "method": "m"}), json!(null), "id is no string"),
            (json!({"id": 3, "method": "m", "jsonrpc": "1.0"}), json!(3), "jsonrpc"),
            (json!({"id": 3, "method": "m", "jsonrpc": 2.0}), json!(3), "jsonrpc"),
            (json!({"id": 3, "method": "m", "more": 1}), json!(3), "unknown member \"more\""),
            (json!({"id": 3, "method": "m", "\u{e9}".repeat(9999): 1}), json!(3), "unknown member"),
        ] {
            let NoCall(found, error) = Call::read(value.clone()).unwrap_err();
            assert_eq!((found, error.code()), (id, -32600), "{value}");
            assert!(error.to_string().contains(text) && error.to_string().len() < 300, "{value}: {error}");
        }
    }

    #[test]
    fn answers_are_in_the_usual_order() {
        let text = |outcome| String::from_utf8(answer(&json!(1), outcome)).unwrap();
        assert_eq!(text(Ok(b"true".into())), r#"{"jsonrpc":"2.0","id":1,"result":true}"#);
        assert_eq!(
            text(Err(RpcError::MethodNotFound)),
            r#"{"jsonrpc":"2.0","id":1,"error":{"code":-32601,"message":"Method not found"}}"#
        );
    }
}
