//! The primary's side: decides when to cut, and will ship what changed. Today it has the pacing of epochs and
//! runs a guest without protection; replication builds on both.

pub mod epoch;
pub mod terminal;
