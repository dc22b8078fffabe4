//! What two Colo processes must agree on.
//!
//! - Between nodes, over QUIC: [`frame`] (header, checksums), [`pages`] (run tables), [`message`] (everything else),
//!   [`heartbeat`] (datagrams). A page goes `primary/encode` -> [`pages`] -> [`frame`] -> `primary/sender`.
//! - Between nodes and with operators, over gRPC: [`v1`], from `types.proto`, `admin.proto` and `pairing.proto`;
//!   [`convert`] leads from there to the types of `colo-common`.
//! - [`version`]: the version of all of it.

pub mod convert;
pub mod frame;
pub mod heartbeat;
pub mod message;
pub mod pages;
pub mod version;

pub use version::PROTOCOL_VERSION;

/// The gRPC package `colo.v1`: messages, clients and servers, as the `.proto` files describe them.
#[allow(missing_docs, unreachable_pub, unused_qualifications, clippy::all, clippy::wildcard_imports)]
#[allow(clippy::too_many_lines, clippy::semicolon_if_nothing_returned, clippy::uninlined_format_args)]
pub mod v1 {
    tonic::include_proto!("colo.v1");
}
