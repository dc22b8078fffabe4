//! [`SyntheticState`]: everything of a synthetic guest but its memory, its output position, its console input
//! offset and what it asked for, which [`MachineState`](crate::state::MachineState) has.

use colo_common::PAGE_SIZE;
use colo_common::bounded::list;
use colo_common::limits::{MAX_CONSOLE_INPUT, MAX_GUEST_MEMORY, MAX_VCPUS};
use serde::{Deserialize, Serialize};

use super::chain;
use super::config::Program;
use super::disk::{MAX_REQUESTS, Request};
use crate::state::StateError;

/// Longest line of input that is echoed in one piece, in bytes; a longer one comes back in several.
pub(super) const MAX_LINE: usize = 75;
/// Bytes of input that the console's device puts into guest memory at a time.
pub(super) const INBOX_BYTES: usize = 512;
/// No guest counts so far: a state that says so is not ours, and what it counts may still be added to.
pub(super) const MAX_COUNT: u64 = 1 << 62;

/// A synthetic guest's machine at one instant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyntheticState {
    /// What it does. In a box, so that a state is about as small as one of KVM.
    pub(super) program: Box<Program>,
    /// Power-on and resets so far.
    pub(super) boots: u64,
    /// Steps since then: guest time, and whose turn it is.
    pub(super) time: u64,
    /// Hash over the steps of all vCPUs, as the ledger in memory has it.
    pub(super) ledger: u64,
    /// Running digest of the memory that was found.
    pub(super) found: u64,
    /// Console lines printed, and their chain.
    pub(super) lines: u64,
    pub(super) line_chain: u64,
    /// Frames sent, and their chain.
    pub(super) frames: u64,
    pub(super) frame_chain: u64,
    /// By number.
    #[serde(deserialize_with = "list::<_, _, { MAX_VCPUS as usize }>")]
    pub(super) vcpus: Vec<VcpuRegisters>,
    /// Console input that the device holds.
    #[serde(deserialize_with = "list::<_, _, MAX_CONSOLE_INPUT>")]
    pub(super) input: Vec<u8>,
    /// Pieces of input that the device has put into memory, and the bytes of the last one while it is unread.
    pub(super) deliveries: u64,
    pub(super) unread: u32,
    /// The line of input so far.
    #[serde(deserialize_with = "list::<_, _, MAX_CONSOLE_INPUT>")]
    pub(super) line: Vec<u8>,
    /// The power button was pressed.
    pub(super) power_button: bool,
    /// Writes to the disk that have not ended, in the order in which they were submitted.
    #[serde(deserialize_with = "list::<_, _, MAX_REQUESTS>")]
    pub(super) requests: Vec<Request>,
    /// Why the guest stopped for good.
    pub(super) failed: Option<WrongContent>,
}

/// What a vCPU has beside memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct VcpuRegisters {
    pub(super) rng: u64,
    pub(super) steps: u64,
    pub(super) chain: u64,
    /// How often it has been over its pages, counted from 1, and how far it is this time.
    pub(super) round: u64,
    pub(super) position: u64,
    /// The same of its blocks of the disk.
    pub(super) disk_round: u64,
    pub(super) disk_position: u64,
}

/// Where a guest keeps what it checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Medium {
    Memory,
    Disk,
}

/// A word of memory or of the disk that is not what the guest left there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct WrongContent {
    pub(super) vcpu: u32,
    pub(super) medium: Medium,
    pub(super) address: u64,
    pub(super) found: u64,
    pub(super) expected: u64,
}

impl std::fmt::Display for WrongContent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { address, found, expected, medium, .. } = self;
        let medium = match medium {
            Medium::Memory => "memory",
            Medium::Disk => "disk",
        };
        write!(f, "{medium} at {address:#x} found={found:016x} expected={expected:016x}")
    }
}

impl SyntheticState {
    /// The machine after power-on (`boots` is 1) or a reset.
    pub(super) fn power_on(program: &Program, vcpus: u32, boots: u64) -> Self {
        let seed = program.seed;
        let registers = |vcpu: u32| VcpuRegisters {
            rng: chain::mix(chain::mix(seed, boots), u64::from(vcpu)),
            steps: 0,
            chain: chain::mix(seed, u64::from(vcpu)),
            round: 1,
            position: 0,
            disk_round: 1,
            disk_position: 0,
        };
        Self {
            program: Box::new(program.clone()),
            boots,
            time: 0,
            ledger: chain::mix(seed, boots),
            found: 0,
            lines: 0,
            line_chain: chain::start(seed),
            frames: 0,
            frame_chain: chain::mix(seed, boots),
            vcpus: (0..vcpus).map(registers).collect(),
            input: Vec::new(),
            deliveries: 0,
            unread: 0,
            line: Vec::new(),
            power_button: false,
            requests: Vec::new(),
            failed: None,
        }
    }

    /// Whose turn it is.
    pub(super) fn turn(&self) -> u32 {
        (self.time % self.vcpus.len() as u64) as u32
    }

    /// Refuses what no guest of ours can be in; decoding calls it before anything is done with the state.
    ///
    /// # Errors
    /// [`StateError::Malformed`], with the first number that is out of bounds.
    pub fn check_limits(&self) -> Result<(), StateError> {
        self.check_for(self.vcpus.len() as u64, MAX_GUEST_MEMORY / PAGE_SIZE as u64)
            .map_err(StateError::Malformed)
    }

    /// The same for a guest of so many vCPUs and frames.
    pub(super) fn check_for(&self, vcpus: u64, frames: u64) -> Result<(), String> {
        let count = self.vcpus.len() as u64;
        if count == 0 || count > u64::from(MAX_VCPUS) || count != vcpus {
            return Err(format!("{count} vCPUs"));
        }
        self.program.check(count as u32, frames)?;
        let counts = [self.boots, self.time, self.lines, self.frames, self.deliveries];
        let pages = u64::from(self.program.pages);
        let blocks = u64::from(self.program.blocks);
        let bad_vcpu = |v: &VcpuRegisters| {
            let rounds = [v.round, v.disk_round];
            v.steps > MAX_COUNT
                || rounds.iter().any(|round| !(1..=MAX_COUNT).contains(round))
                || v.position >= pages
                || v.disk_position > blocks
        };
        if self.boots == 0 || counts.iter().any(|&n| n > MAX_COUNT) || self.vcpus.iter().any(bad_vcpu) {
            return Err("a counter that no guest reaches".to_owned());
        }
        let waiting = self.input.len().saturating_add(self.unread as usize);
        if waiting > MAX_CONSOLE_INPUT || self.unread as usize > INBOX_BYTES || self.line.len() > MAX_LINE {
            return Err(format!("{waiting} bytes of console input"));
        }
        let bad_request =
            |r: &Request| u64::from(r.block) >= blocks || r.round > MAX_COUNT || r.ends > MAX_COUNT;
        if self.requests.len() > MAX_REQUESTS || self.requests.iter().any(bad_request) {
            return Err("a write to a disk that the guest does not have".to_owned());
        }
        if self.failed.is_some_and(|wrong| u64::from(wrong.vcpu) >= count) {
            return Err("a failure of a vCPU that the guest does not have".to_owned());
        }
        Ok(())
    }
}
