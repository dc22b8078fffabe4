//! The node that runs a guest: cuts epochs, sends them, and lets output go when the protocol allows it. A library for
//! `colo-secondary` too, which runs the guest after a promotion.
//!
//! The way of a page through this crate: [`epoch`] (when to cut), [`checkpoint`], [`encode`], [`quic`] (the sender),
//! and back by acks: [`replicator`], [`release`]. [`node`] holds it together.

pub mod admin;
pub mod arbiter_worker;
pub mod audit;
pub mod backends;
pub mod changes;
pub mod checkpoint;
pub mod console;
pub mod drain;
pub mod encode;
pub mod epoch;
pub(crate) mod events;
pub mod guest_config;
pub mod guest_files;
pub mod handover;
pub mod heal;
pub mod heal_worker;
pub mod heartbeat;
pub mod last_changed;
pub mod link;
pub mod metrics;
pub mod node;
pub mod outlet;
pub mod pairing;
pub mod presence;
pub mod primary;
pub mod pty;
pub mod quic;
pub mod rejoin;
pub mod release;
pub mod replicator;
pub mod runner_disk;
pub mod serve;
pub mod standby;
pub mod start;
pub mod switchover;
pub mod terminal;
pub mod transfer;
pub mod wire;
