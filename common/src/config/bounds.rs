//! Bounds of what a configuration may say, with their reasons.

/// Milliseconds between two cuts at most: output waits for the cut, and after ten seconds peers give up.
pub(super) const MAX_INTERVAL_MS: u32 = 10_000;

/// Epochs in flight at most: each holds its pages twice until it is acked, and more hide no longer round trip.
pub(super) const MAX_WINDOW: u32 = 64;

/// MiB of one epoch at most: it is held in memory on both sides.
pub(super) const MAX_EPOCH_MIB: u32 = 64 << 10;

/// Milliseconds between two heartbeats: below 5 they measure the host's scheduler, above 10000 they tell nothing.
pub(super) const HEARTBEAT_MS: (u32, u32) = (5, 10_000);

/// Milliseconds until a peer is taken for dead at most: who wants to wait longer wants `failover = "manual"`.
pub(super) const MAX_SUSPECT_MS: u32 = 600_000;

/// Milliseconds that a promotion waits at most, for the same reason.
pub(super) const MAX_PROMOTE_DELAY_MS: u32 = 600_000;

/// MiB that a secondary may hold beside the guest's memory: less holds no window, more than a TiB is a slip.
pub(super) const MEMORY_BUDGET_MIB: (u32, u32) = (64, 1 << 20);

/// Promotions in a row at most: a guest that fails so often is broken.
pub(super) const MAX_PROMOTIONS: u32 = 1000;

/// Modules of one guest at most; Linux takes one, multiboot kernels a few.
pub(super) const MAX_MODULES: usize = 16;

/// virtio-mmio windows at most: as many as the guest machine has interrupts for.
pub(super) const MAX_VIRTIO_SLOTS: u32 = 8;

/// Bytes of a host's name and port at most: DNS ends at 253 and a port at 5.
pub(super) const MAX_ENDPOINT: usize = 260;

/// Milliseconds that one call to the arbiter may take: below 100 a busy etcd looks dead, above a minute nobody waits.
pub(super) const ARBITER_TIMEOUT_MS: (u32, u32) = (100, 60_000);

/// Seconds of a node's lease: etcd itself gives none under two elections, and a spare that is dead for ten minutes helps
/// nobody.
pub(super) const LEASE_S: (u32, u32) = (2, 600);

/// Members of etcd that are named at most: clusters have 3 to 7.
pub(super) const MAX_ARBITER_ENDPOINTS: usize = 16;

/// Bytes of the prefix of etcd's keys at most.
pub(super) const MAX_PREFIX: usize = 128;
