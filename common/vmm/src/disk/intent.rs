//! The intent log of a runner's disk: which parts of the image file may be ahead of what the secondary has acked. When a
//! runner has died and comes back, only those parts, and what the guest has changed on the other node since, differ.
//!
//! ```text
//!   guest --request--> device --change_begins--> LoggedDisk.write --before_write--> log: named? else write, sync
//!                        |                            +-------> image file
//!                        +-- into the open epoch --change_recorded
//!   cleaner: acked point A; extents not written after A --> sync the image --> write, sync the log without them, with A
//! ```
//!
//! The log claims a point A and names extents of 1 MiB. **At any instant of a crash, of the process or of its power, every
//! block outside the named extents is in the image file as it is in the disk at A, and at each later point of this
//! runner's history; and the secondary has acked A.** So:
//! - Nothing is written into an extent before a synced log names it. If that fails, the write fails.
//! - An extent leaves the log only when all that was ever written into it lies in epochs up to an acked A, and the image was
//!   synced after that; the log that lacks it is synced before anybody relies on it.
//! - A write counts for the epoch into which the device records it, and that may be epochs after its bytes are in the file: so
//!   the device says when a request begins and when it is recorded ([`Disk::change_begins`], [`Disk::change_recorded`]).
//! - A failed sync of the image may have lost anything; after one no extent leaves the log in this process.
//!
//! A guest's write never waits for the secondary: the log names as much of the disk as it has to. It is written for the
//! first write into an extent; those that stay in use stay in it, so a steady load does not write it at all.
//!
//! [`Disk::change_begins`]: super::Disk::change_begins
//! [`Disk::change_recorded`]: super::Disk::change_recorded

mod choice;
mod claim;
mod cleaner;
mod extents;
mod file;
mod log;
mod logged;
mod tracks;

pub use choice::Cleaning;
pub use claim::Claim;
pub use cleaner::{CLEAN_EVERY, Cleaner};
pub use extents::Extents;
pub use file::IntentError;
pub use log::{IntentLog, IntentStatus};
pub use logged::LoggedDisk;

use colo_common::BLOCK_SIZE;

/// Bytes of an extent. DRBD has 4 MiB, and sends the whole of it; here digests decide within it, so it is the size that
/// keeps a log of 1 TiB at 128 KiB, and a sync of the log at one for each MiB that is written in sequence.
pub const EXTENT_BYTES: u64 = 1 << 20;
const EXTENT_BLOCKS: u64 = EXTENT_BYTES / BLOCK_SIZE as u64;

#[cfg(test)]
mod tests;
