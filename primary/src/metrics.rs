//! What Prometheus is told of a node: one table of metrics, the account that most of them are read from, the meters of
//! what is told as it happens, and the endpoint.
//!
//! A name is `colo_`, the thing, its unit (base units: `_seconds`, `_bytes`), and `_total` for what only grows. Every
//! sample has the labels `vm` and `node` (a spare's has no `vm`), and at most one more, whose values are in the table.
//!
//! To add a metric, put a line into [`table`], its row into `docs/metrics.md` (a test prints it), and one call:
//! - what the account ([`Status`](crate::node::status::Status)) says already is `from account`: set it in `account.rs`;
//! - what happens is `from events`: where it does, `board.meters().add(metrics::THING, 1.0)`, `set` or `observe`; with
//!   a label `add_for(metrics::THING, "its value", 1.0)`.
//!
//! `tests/tests/e2e/metrics.rs` finds what is listed and never told, and the other way round.

mod account;
mod meters;
mod serve;
mod table;

pub use account::registry;
pub use meters::Meters;
pub use serve::{CONTENT_TYPE, Endpoint};
pub use table::*;

/// All that is told, as text.
pub fn text(registry: &prometheus_client::registry::Registry) -> String {
    let mut text = String::new();
    // A string takes all.
    let _ = prometheus_client::encoding::text::encode(&mut text, registry);
    text
}
