//! What a synthetic guest does ([`Program`], part of its state) and how its host tracks it ([`Tracking`],
//! which is not: a state moves between hosts that track in other ways).

use colo_common::PAGE_SIZE;
use colo_common::limits::{MAX_FRAME, MAX_RING_ENTRIES};
use serde::{Deserialize, Serialize};

use crate::arch::x86_64::layout::MAX_VIRTIO_SLOTS;
use crate::guest::Lifecycle;
use crate::memory::MemoryError;

/// Largest number of pages that a step sweeps over.
pub const MAX_WRITES: u32 = 16;
/// Largest number of words of a page's body: a page of them less the head of three and the tail of one.
pub const MAX_WORDS: u32 = (PAGE_SIZE / 8 - 4) as u32;
/// Most blocks that it works on, and most steps that a write may take: so that a round over its disk comes to an end.
pub const MAX_BLOCKS: u32 = 1 << 16;
/// See [`MAX_BLOCKS`].
pub const MAX_WRITE_STEPS: u32 = 1 << 10;
/// Smallest frame in bytes: virtio-net header, Ethernet header, number and hash.
pub const MIN_FRAME_BYTES: u32 = 12 + 14 + 16;
/// Most log entries of a single step: three stores for each page of the sweep, one for the vCPU's own page and
/// one for the ledger, and one entry that a vCPU leaves when its ring stops it. Rings keep as many in reserve.
pub const MAX_STEP_ENTRIES: u32 = MAX_WRITES * 3 + 3;

const _: () = assert!(MIN_FRAME_BYTES as usize <= MAX_FRAME);
const _: () = assert!(MAX_STEP_ENTRIES <= 64);

/// Why a synthetic guest cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum SyntheticError {
    /// A number out of its range.
    #[error("the synthetic guest's configuration is wrong: {0}")]
    Config(String),
    /// Its memory cannot be made.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// Everything that a synthetic guest is told beside its spec.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SyntheticConfig {
    /// What the guest does.
    pub program: Program,
    /// How its writes are tracked.
    pub tracking: Tracking,
}

/// What the guest does; the same program in the same memory does the same on every host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Program {
    /// Where its choices, its contents and its console's hash chain come from.
    pub seed: u64,
    /// Pages that it works on: one ledger, one inbox, one of each vCPU, the rest is swept over.
    pub pages: u32,
    /// Frames from one such page to the next: above 1, the pages are scattered over guest memory.
    pub spread: u32,
    /// Most pages that a step sweeps over, 1 to [`MAX_WRITES`].
    pub writes: u32,
    /// Words of a page's body that are written with it, 1 to [`MAX_WORDS`].
    pub words: u32,
    /// A step in so many prints a line of the chain; 0 is never.
    pub line_every: u32,
    /// A step in so many sends a frame; 0 is never.
    pub frame_every: u32,
    /// Longest frame in bytes with its virtio-net header, [`MIN_FRAME_BYTES`] to [`MAX_FRAME`].
    pub frame_bytes: u32,
    /// virtio slot that frames are sent from.
    pub frame_slot: u32,
    /// Guest time that a step takes, in nanoseconds, 1 to 10^9.
    pub step_ns: u64,
    /// Blocks of its disk that it works on, at least one for each vCPU; 0 is a guest without a disk.
    pub blocks: u32,
    /// A step in so many checks a block and writes it anew; 0 is never.
    pub block_every: u32,
    /// A step in so many wants the disk to be safe; 0 is never.
    pub flush_every: u32,
    /// Steps that a write takes at most, 1 to [`MAX_WRITE_STEPS`].
    pub write_steps: u32,
    /// What the guest asks for in the end.
    pub end: Option<End>,
}

/// The end of a guest that does not run for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// Steps after power-on or reset.
    pub steps: u64,
    /// What it asks for then.
    pub ask: Lifecycle,
}

impl Default for Program {
    fn default() -> Self {
        Self {
            seed: 1,
            pages: 128,
            spread: 1,
            writes: 3,
            words: 8,
            line_every: 8,
            frame_every: 16,
            frame_bytes: 200,
            frame_slot: 0,
            step_ns: 100_000,
            blocks: 0,
            block_every: 4,
            flush_every: 64,
            write_steps: 8,
            end: None,
        }
    }
}

/// Frames that a guest's pages take up, up to the last one.
pub(super) fn frames_needed(program: &Program) -> u64 {
    u64::from(program.pages.saturating_sub(1)) * u64::from(program.spread) + 1
}

/// Pages that are not swept over.
pub(super) fn fixed_pages(vcpus: u32) -> u32 {
    vcpus + 2
}

impl Program {
    /// Says what is out of its range for a guest of so many vCPUs and frames.
    pub(super) fn check(&self, vcpus: u32, frames: u64) -> Result<(), String> {
        let in_range = |name: &str, value: u64, low: u64, high: u64| {
            let good = (low..=high).contains(&value);
            if good { Ok(()) } else { Err(format!("{name} is {value}, not between {low} and {high}")) }
        };
        let fewest = u64::from(fixed_pages(vcpus)) + u64::from(vcpus);
        in_range("pages", self.pages.into(), fewest, frames)?;
        in_range("spread", self.spread.into(), 1, frames)?;
        in_range("the last page", frames_needed(self), 1, frames)?;
        in_range("writes", self.writes.into(), 1, MAX_WRITES.into())?;
        in_range("words", self.words.into(), 1, MAX_WORDS.into())?;
        in_range("frame_bytes", self.frame_bytes.into(), MIN_FRAME_BYTES.into(), MAX_FRAME as u64)?;
        in_range("frame_slot", self.frame_slot.into(), 0, u64::from(MAX_VIRTIO_SLOTS) - 1)?;
        if self.blocks > 0 {
            in_range("blocks", self.blocks.into(), vcpus.into(), MAX_BLOCKS.into())?;
        }
        in_range("write_steps", self.write_steps.into(), 1, MAX_WRITE_STEPS.into())?;
        in_range("step_ns", self.step_ns, 1, 1_000_000_000)
    }
}

/// How the host tracks the guest's writes: the rings of the spec's tracker, as KVM has them, and their faults.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tracking {
    /// Where the faults below come from.
    pub seed: u64,
    /// Entries of each ring instead of the spec's, a power of two: smaller than KVM allows, so that simulations
    /// fill them.
    pub ring_entries: Option<u32>,
    /// Entries past the soft limit, at least [`MAX_STEP_ENTRIES`] and at most half a ring.
    pub reserved: u32,
    /// Every so many steps each vCPU harvests its own ring; 0 is never.
    pub harvest_every: u64,
    /// Whether a vCPU harvests its own ring when more than a quarter of it is used, and when it is full. If not,
    /// a full ring stops the guest until somebody collects.
    pub quarter: bool,
    /// Of 1000 writes to a page that is logged already, how many are logged again all the same.
    pub duplicate_per_mille: u32,
    /// Of 1000 times that a ring is full, how often the vCPU runs on for two rings full of writes, all of them
    /// logged over what was not harvested.
    pub overrun_per_mille: u32,
}

impl Default for Tracking {
    fn default() -> Self {
        Self {
            seed: 1,
            ring_entries: None,
            reserved: 64,
            harvest_every: 64,
            quarter: true,
            duplicate_per_mille: 0,
            overrun_per_mille: 0,
        }
    }
}

impl Tracking {
    /// Says what is out of its range for rings of so many entries.
    pub(super) fn check(&self, entries: u32) -> Result<(), String> {
        if !entries.is_power_of_two() || entries > MAX_RING_ENTRIES {
            return Err(format!(
                "a ring of {entries} entries is not a power of two up to {MAX_RING_ENTRIES}"
            ));
        }
        if self.reserved < MAX_STEP_ENTRIES || self.reserved > entries / 2 {
            let (reserved, most) = (self.reserved, entries / 2);
            return Err(format!("{reserved} reserved entries are not between {MAX_STEP_ENTRIES} and {most}"));
        }
        Ok(())
    }
}
