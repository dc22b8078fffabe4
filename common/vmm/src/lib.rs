//! Runs one guest, on either node: the machine, what it wrote since the last cut, and its whole state,
//! saved and restored at any instant. No sockets and no async runtime in here.
//!
//! The way of a page begins in this crate: [`memory`] holds it, [`dirty_ring`] (or the bitmap, both behind
//! [`tracker`]) tells that the guest wrote it, [`dirty_set`] collects it together with what our own devices
//! wrote, and a cut ([`guest::ProtectedGuest::cut`]) closes the set and saves the machine beside it.

pub mod admission;
pub mod arch;
pub mod block_runs;
pub mod block_set;
pub mod boot;
pub mod devices;
mod dirty_ring;
pub mod dirty_set;
pub mod disk;
pub mod egress;
mod events;
pub mod guest;
pub mod host;
pub mod inherit;
mod ioctl;
mod kick;
pub mod last_dirty;
pub mod machine;
pub mod memory;
pub mod page_batch;
pub mod sigbus;
pub mod spec;
pub mod state;
pub mod synthetic;
pub mod tap;
pub mod tracker;
mod vcpu;
mod vcpu_exit;
pub mod wire_spec;

pub use block_set::BlockSet;
pub use devices::{Backends, DiskTracking};
pub use dirty_set::DirtySet;
pub use disk::{Disk, DiskContent, DiskDelta, DiskWrite};
pub use guest::{Cut, GuestError, GuestEvent, ProtectedGuest, Tracked};
pub use last_dirty::{LastDirty, LastDirtyBlocks};
pub use machine::KvmGuest;
pub use memory::GuestMemory;
pub use page_batch::{PageBatch, PagePool};
pub use spec::{BootFile, BootSource, CpuModel, GuestSpec, TrackerKind};
pub use state::MachineState;
pub use wire_spec::{GuestKind, WireSpec};
