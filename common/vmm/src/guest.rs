//! [`ProtectedGuest`]: how an epoch loop drives a guest, whichever kind it is.
//!
//! ```text
//!            boot | restore                resume
//!  (built) ----------------> stopped ------------------> running
//!                               ^                           |
//!                               +----------- cut -----------+
//!                          reset, restore (in place, stopped -> stopped)
//! ```
//!
//! A builder of epochs takes pages in two ways, and the last version of a page wins:
//! - at the cut: [`cut`](ProtectedGuest::cut) stops the guest and closes the dirty set; pages are read before
//!   [`resume`](ProtectedGuest::resume) and are of exactly that instant;
//! - before it: [`collect`](ProtectedGuest::collect) on a running guest gives frames whose bytes may be read
//!   at once. A page that is written after that is reported again, at the latest by the cut.

use colo_common::limits::MAX_CONSOLE_INPUT;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

use crate::arch::x86_64::processor::{CpuMisfit, GuestCpu};
use crate::block_set::BlockSet;
use crate::boot::BootError;
use crate::devices::DiskTracking;
use crate::dirty_set::DirtySet;
use crate::disk::DiskDelta;
use crate::egress::{Output, OutputPosition};
use crate::host::remedy;
use crate::memory::{GuestMemory, MemoryError};
use crate::spec::GuestSpec;
use crate::state::{MachineState, StateError};

/// What goes wrong with a guest that was built.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// KVM refused a request.
    #[error("KVM refused to {what}: {source}{}", remedy(.source))]
    Kvm {
        /// The request.
        what: &'static str,
        /// What KVM said.
        source: std::io::Error,
    },
    /// A vCPU thread ended or did not answer; the guest cannot go on in this process.
    #[error("vCPU {vcpu} does not answer: {reason}")]
    Vcpu {
        /// The vCPU.
        vcpu: u32,
        /// What is known about it.
        reason: String,
    },
    /// An operation that does not fit the guest's state: an own bug of the caller.
    #[error("cannot {wanted} a guest that is {state}")]
    WrongState {
        /// The operation.
        wanted: &'static str,
        /// What the guest is doing.
        state: &'static str,
    },
    /// A saved state that cannot be taken.
    #[error(transparent)]
    State(#[from] StateError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Loading the boot images.
    #[error(transparent)]
    Boot(#[from] BootError),
}

/// Whether a dirty set names every page that was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "an incomplete dirty set must fail its epoch"]
pub enum Tracked {
    /// The set names every page written since the last collect or cut.
    Complete,
    /// Writes were lost; any page may have changed. The epoch must fail and the whole memory be compared.
    Unknown(TrackingLoss),
}

/// How writes can be lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrackingLoss {
    /// A vCPU's dirty ring was overrun before it was harvested.
    RingOverrun {
        /// The vCPU.
        vcpu: u32,
    },
    /// An entry of a ring named a page that the guest does not have.
    BadEntry {
        /// The vCPU.
        vcpu: u32,
    },
    /// KVM ended the reset of harvested entries early, which can leave pages writable that nobody logs.
    ResetCutShort {
        /// The vCPU whose entries they were.
        vcpu: u32,
    },
}

impl std::fmt::Display for TrackingLoss {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::RingOverrun { vcpu } => write!(f, "the dirty ring of vCPU {vcpu} was overrun"),
            Self::ResetCutShort { vcpu } => write!(f, "the reset of vCPU {vcpu}'s dirty ring was cut short"),
            Self::BadEntry { vcpu } => {
                write!(f, "the dirty ring of vCPU {vcpu} holds an entry that KVM cannot have written")
            }
        }
    }
}

/// What a guest can ask of its machine. It ends the epoch, is part of the state that the cut saves, and takes
/// effect when that epoch is acked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Lifecycle {
    /// Power off (ACPI S5).
    Shutdown,
    /// Restart; by keyboard controller, reset port or triple fault.
    Reset(ResetCause),
    /// A value written to the isa-debug-exit port: a test guest's exit code.
    DebugExit(u32),
}

/// Where a reset came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ResetCause {
    /// Command 0xfe to the keyboard controller.
    Keyboard,
    /// The reset control register, port 0xcf9.
    Port,
    /// A triple fault.
    TripleFault,
}

/// Why a guest cannot run on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GuestFailure {
    /// KVM could not go on with a vCPU, mostly an instruction that it cannot emulate.
    #[error(
        "KVM internal error {suberror} on vCPU {vcpu} at RIP {rip:#x}, instruction bytes {}",
        hex(instruction)
    )]
    Internal {
        /// The vCPU.
        vcpu: u32,
        /// KVM's number: 1 is an instruction that it cannot emulate.
        suberror: u32,
        /// Where.
        rip: u64,
        /// The bytes at `rip`, as far as KVM or guest memory gives them.
        instruction: Vec<u8>,
    },
    /// The processor refused to enter the guest.
    #[error("the processor refused to run vCPU {vcpu} (hardware reason {reason:#x})")]
    Entry {
        /// The vCPU.
        vcpu: u32,
        /// The processor's code.
        reason: u64,
    },
    /// KVM_RUN failed, or ended for a reason that this machine has no answer to.
    #[error("vCPU {vcpu} stopped: {what}")]
    Run {
        /// The vCPU.
        vcpu: u32,
        /// What KVM said.
        what: String,
    },
}

fn hex(bytes: &[u8]) -> String {
    if bytes.is_empty() {
        return "unknown".to_owned();
    }
    bytes.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ")
}

/// What a running guest tells its epoch loop; all of them ask for a cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestEvent {
    /// The guest asked for a change of its life; it waits for the cut.
    Lifecycle(Lifecycle),
    /// The guest cannot run on.
    Failed(GuestFailure),
    /// Writes were lost; the next cut says so and repairs the tracker.
    TrackingLost(TrackingLoss),
    /// The epoch holds as much output, or as many disk writes, as it may; more waits for the cut.
    OutputFull,
    /// The guest has sent a frame, for which somebody may wait: it goes out the sooner the guest is cut.
    Output,
}

/// How an owner that waits for more than one guest's events is woken; see
/// [`on_event`](ProtectedGuest::on_event).
pub type Wake = Arc<dyn Fn() + Send + Sync>;

/// Where the time of a cut went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CutTiming {
    /// From the first kick until every vCPU was in user space with nothing half done.
    pub stop: Duration,
    /// Saving the machine.
    pub save: Duration,
    /// The last harvest and the reset of the rings.
    pub harvest: Duration,
}

/// A guest stopped at an instant.
#[derive(Debug)]
pub struct Cut {
    /// The whole machine but its memory.
    pub state: MachineState,
    /// Whether the dirty set that was passed in is complete.
    pub tracked: Tracked,
    /// What the guest said since the last cut.
    pub output: Output,
    /// What it wrote to its disk since the last cut, as far as that is kept.
    pub disk: DiskDelta,
    /// Why the guest cannot run on, if so: the state is of a guest that has failed.
    pub failed: Option<GuestFailure>,
    /// Where the time went.
    pub timing: CutTiming,
}

/// A guest that an epoch loop can drive. Methods take `&mut self`: one thread owns the guest.
pub trait ProtectedGuest: Send {
    /// What the guest is.
    fn spec(&self) -> &GuestSpec;

    /// Its memory; may be read from other threads.
    fn memory(&self) -> &Arc<GuestMemory>;

    /// The processor that the guest has: that of this host, or of the state that was restored. Nothing for a guest in
    /// software, which needs none.
    fn cpu(&self) -> Option<GuestCpu>;

    /// Refuses a guest with the processor `cpu` that could not be restored here, by the same rules as
    /// [`restore`](Self::restore). Nothing is changed.
    ///
    /// # Errors
    /// What does not fit, and the remedy.
    fn check_cpu(&self, cpu: Option<&GuestCpu>) -> Result<(), CpuMisfit>;

    /// Loads the boot images and sets the machine as after power-on. Only guests that were neither booted nor
    /// restored: one that was is [`reset`](Self::reset).
    ///
    /// # Errors
    /// The guest was booted or restored before, or its boot images do not fit.
    fn boot(&mut self) -> Result<(), GuestError>;

    /// Has a guest that was just booted count its output from `start` on, and its console input from
    /// `start.console` on: see [`colo_common::life`]. Without it, both begin at 0.
    ///
    /// # Errors
    /// The guest is not stopped, or has said or taken something already.
    fn count_from(&mut self, start: OutputPosition) -> Result<(), GuestError>;

    /// Sets the machine to `state`; its memory must already hold the same point. Any guest that does not run.
    /// Setting a machine can write guest memory (KVM renews kvmclock's wall clock), so a guest that shall be
    /// protected without a new full copy is protected before it is restored.
    ///
    /// # Errors
    /// The state is of another spec or kind, or KVM refuses it; the guest must then be dropped.
    fn restore(&mut self, state: &MachineState) -> Result<(), GuestError>;

    /// Resets vCPUs and devices in place and loads the boot images again; tracking goes on, output positions
    /// too, and a pending [`Lifecycle`] is done with. Stopped guests only. Console input that the guest had not
    /// read is there for its next boot.
    ///
    /// # Errors
    /// The guest is not stopped, or its boot images do not fit.
    fn reset(&mut self) -> Result<(), GuestError>;

    /// Starts tracking: from now on every write is reported once. Begin the first full copy after it.
    ///
    /// # Errors
    /// KVM refuses.
    fn protect(&mut self) -> Result<(), GuestError>;

    /// Stops tracking and forgets what was tracked.
    ///
    /// # Errors
    /// KVM refuses.
    fn unprotect(&mut self) -> Result<(), GuestError>;

    /// Adds the frames written since the last collect or cut to `dirty`, as far as they are known without
    /// stopping the guest. Their bytes may be read at once.
    ///
    /// # Errors
    /// KVM refuses.
    fn collect(&mut self, dirty: &mut DirtySet) -> Result<Tracked, GuestError>;

    /// Stops the guest, saves the machine and adds the frames written since the last collect or cut to
    /// `dirty`. Events raised before the cut are in its state, so pending ones are discarded. A guest that is
    /// not protected can be cut as well; nothing is added to `dirty` then.
    ///
    /// # Errors
    /// The guest does not run, a vCPU does not stop, or KVM refuses.
    fn cut(&mut self, dirty: &mut DirtySet) -> Result<Cut, GuestError>;

    /// Lets a stopped guest run on. Guest time goes on from where the cut stopped it.
    ///
    /// # Errors
    /// The guest runs already, or KVM refuses.
    fn resume(&mut self) -> Result<(), GuestError>;

    /// Waits up to `timeout` for something that asks for a cut. Each kind is told once until it is raised anew.
    fn next_event(&mut self, timeout: Duration) -> Option<GuestEvent>;

    /// Has `wake` called whenever [`next_event`](Self::next_event) has something new to give, and at once if it
    /// has already: so an owner waits on several sources and then asks with a timeout of zero. It may be called
    /// on any thread, with no lock held that a guest's methods take, and a call may find nothing left to ask
    /// for. It must not block: a vCPU may be waiting for it. A later `wake` takes its place.
    fn on_event(&mut self, wake: Wake);

    /// Offers console input; returns how many bytes were taken, at most [`MAX_CONSOLE_INPUT`] in all before
    /// the guest reads them. The rest may be offered again later.
    fn console_input(&mut self, bytes: &[u8]) -> usize;

    /// Offset of the next byte of console input that is offered.
    fn console_input_offset(&self) -> u64;

    /// Presses the power button.
    fn power_button(&mut self);

    /// Takes the output of a guest that is not protected, without a cut.
    fn drain_output(&mut self) -> Output;

    /// Changes how writes to the disk are kept; see [`DiskTracking`]. What is kept at that moment is lost only if it is
    /// turned off.
    fn track_disk(&mut self, tracking: DiskTracking);

    /// Takes the blocks that were written since the last cut or collect, where no bytes are kept; and tells how many
    /// bytes of writes are kept for the next cut. Writes that have not ended are told when they have.
    fn collect_blocks(&mut self) -> (BlockSet, usize);
}

const _: () = assert!(MAX_CONSOLE_INPUT >= 64, "the console's own queue must fit");
