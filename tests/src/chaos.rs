//! Chaos: real nodes and a real etcd, each on a host of its own, that are killed, frozen and cut off at random instants
//! under a guest with a service and clients, alone and in pairs, and what must hold whatever fails.
//!
//! [`plan`] says what fails and what is expected of it; [`world`] is what it happens to; [`faults`] does it and puts it
//! right as an operator would; [`step`] plays one fault from its first request to the last, [`judge`] says what broke,
//! [`watcher`] keeps the register's history, and [`report`] makes the table and the summary.

pub mod faults;
pub mod judge;
pub mod plan;
pub mod report;
pub mod step;
pub mod watcher;
pub mod world;
