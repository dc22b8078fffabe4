//! The node that follows: receives epochs, stages, acks, applies and persists them, and runs the guest when the primary
//! is gone.
//!
//! The way of a page through this crate: [`receiver`] -> [`staging`] -> ack; [`apply`] -> [`image`]; [`persist`] ->
//! [`store`]. [`replica`] and [`detector`] decide, [`node`] holds it together.

pub mod agreement;
pub mod apply;
mod boot_upload;
pub mod detector;
mod digests;
pub mod disk;
pub mod image;
pub mod node;
pub mod offline;
pub mod pairing_service;
pub mod persist;
pub mod receiver;
pub mod rejoin;
pub mod replica;
pub mod secondary;
mod spare;
mod spare_plane;
pub mod staging;
pub mod store;
