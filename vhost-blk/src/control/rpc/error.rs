//! Why a call is answered with an error, and the number that clients know it by.

use std::io;

use thiserror::Error;

use crate::vhost_user::listener::ListenError;

/// A call cannot be answered as it wants.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(super) enum RpcError {
    /// What came is no JSON, or passes a limit of it.
    #[error("Parse error: {0}")]
    Parse(String),
    /// It is JSON, and no request.
    #[error("Invalid request: {0}")]
    InvalidRequest(String),
    /// There is no such method.
    #[error("Method not found")]
    MethodNotFound,
    /// The method takes other parameters.
    #[error("Invalid parameters: {0}")]
    InvalidParams(String),
    /// Something that the parameters name is not there. Code and text are SPDK's.
    #[error("No such device")]
    NoSuchDevice,
    /// The method belongs to another state of the program. The text is SPDK's.
    #[error("Method may only be called before framework is initialized using framework_start_init RPC.")]
    WrongState,
    /// The program could not do it.
    #[error("Internal error: {0}")]
    Internal(String),
}

impl RpcError {
    /// The number in the answer (JSON-RPC 2.0, section 5.1; -1 is SPDK's).
    pub(super) fn code(&self) -> i32 {
        match self {
            RpcError::Parse(_) => -32700,
            RpcError::InvalidRequest(_) => -32600,
            RpcError::MethodNotFound => -32601,
            RpcError::InvalidParams(_) => -32602,
            RpcError::NoSuchDevice | RpcError::Internal(_) => -32603,
            RpcError::WrongState => -1,
        }
    }
}

/// The control socket cannot be had.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RpcSocketError {
    /// Another target has the socket.
    #[error(
        "the control socket {path} belongs to another target, which has {path}.lock locked: stop it, or choose another path"
    )]
    Locked {
        /// The socket.
        path: String,
    },
    /// The lock file cannot be made or locked.
    #[error("cannot lock {path}.lock, by which targets keep off each other's control socket: {source}")]
    Lock {
        /// The socket.
        path: String,
        /// What the system says.
        source: io::Error,
    },
    /// The socket cannot be made.
    #[error("the control socket: {0}")]
    Listen(#[from] ListenError),
    /// The process has no descriptor or no thread left.
    #[error("cannot serve the control socket {path}: {source}")]
    Start {
        /// The socket.
        path: String,
        /// What the system says.
        source: io::Error,
    },
}
