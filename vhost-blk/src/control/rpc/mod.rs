//! SPDK's JSON-RPC on a Unix socket, so that what drives SPDK drives this program.
//!
//! One thread answers all clients ([`RpcServer`]): the stream is cut into values (`framing`), a value is read as a request or a batch
//! (`message`), and a table says which handler a method has (`methods`). Clients are trusted with what the methods do, and with nothing
//! else: one that is slow, silent, wrong or does not read costs the others nothing, and no worker or front-end waits for any.

mod connection;
mod context;
mod dispatch;
mod error;
mod framing;
mod message;
mod methods;
mod server;
mod socket;

pub use error::RpcSocketError;
pub use framing::{MAX_REQUEST_BYTES, MAX_VALUES};
pub use server::RpcServer;
pub use socket::RpcSocket;
