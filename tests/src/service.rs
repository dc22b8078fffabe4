//! Clients of a key-value service in a guest, which speaks RESP as Redis does, and the judges of what they saw.
//!
//! A [`session`] performs operations one after another over one connection and records each request and reply with its
//! times in a [`history`]. [`writer`] writes numbered keys as fast as it gets answers and then looks whether any that was
//! acknowledged is missing; [`mixed`] has several clients meet on few keys, and [`linear`] finds out whether what they
//! saw is explained by one service that did one thing at a time. [`figures`] has what a summary says of a history.

pub mod figures;
pub mod history;
pub mod linear;
pub mod mixed;
pub mod resp;
#[cfg(test)]
mod server;
pub mod session;
pub mod writer;

use std::net::TcpStream;
use std::sync::Arc;

/// Makes a connection to the service, as often as one is needed.
pub type Dial = Arc<dyn Fn() -> anyhow::Result<TcpStream> + Send + Sync>;
