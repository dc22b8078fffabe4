//! What a runner says of its guest at pairing: read, bounded, and compared with what this build makes of the same
//! description. Pure; what this host can do is asked of the warm guest afterwards (`node/pairing`).

use colo_common::config::Endpoint;
use colo_common::{BadName, Incarnation, NodeId};
use colo_primary::guest_config::tracker;
use colo_proto::convert::{ConvertError, incarnation};
use colo_proto::v1;
use colo_proto::version::Versions;
use colo_vmm::arch::x86_64::cpuid::{CpuidError, CpuidTable};
use colo_vmm::arch::x86_64::processor::GuestCpu;
use colo_vmm::memory::MemoryLayout;
use colo_vmm::state::STATE_VERSION;
use colo_vmm::wire_spec::WireSpecError;
use colo_vmm::{GuestKind, WireSpec};
use std::net::IpAddr;

/// Characters of a name of the runner's that go into messages.
const MAX_NAME: usize = 80;
/// What both sides of a disagreement that is nobody's choice can do.
const SAME_VERSION: &str = "run the same version of Colo on both";

/// What a runner has.
#[derive(Clone, Debug)]
pub struct PairRequest {
    /// Its node.
    pub node: NodeId,
    /// Its process.
    pub incarnation: Incarnation,
    /// Its guest.
    pub spec: WireSpec,
    /// Digest of the spec with its boot files.
    pub digest: u64,
    /// The guest's processor; nothing for a guest in software.
    pub cpu: Option<GuestCpu>,
    /// What the runner's host calls its processor; for messages.
    pub host: String,
    /// The runner's control plane, if that can be reached by what it says.
    pub address: Option<Endpoint>,
}

/// Why a request is not even considered.
#[derive(Debug, thiserror::Error)]
pub enum Disagreement {
    /// No protocol version in common.
    #[error("the runner speaks protocol {min} to {max}, this node {} to {}: {SAME_VERSION}", Versions::OURS.min, Versions::OURS.max)]
    Protocol {
        /// The runner's oldest.
        min: u32,
        /// The runner's newest.
        max: u32,
    },
    /// Machine states that cannot be read here.
    #[error("the runner's machine states have version {0}, this node's {STATE_VERSION}: {SAME_VERSION}")]
    StateVersion(u32),
    /// A field that cannot be read.
    #[error(transparent)]
    Field(#[from] ConvertError),
    /// The runner's name.
    #[error(transparent)]
    Name(#[from] BadName),
    /// The description.
    #[error(transparent)]
    Spec(#[from] WireSpecError),
    /// The CPUID.
    #[error("the runner's guest has no CPU model that can be read: {0}")]
    Cpuid(#[from] CpuidError),
    /// Another hypervisor than the description's.
    #[error(
        "the runner's guest runs on {found:?} and is described as one on {described}: use nodes that both run it on {described}"
    )]
    Hypervisor {
        /// What the runner says, or its beginning.
        found: String,
        /// What the description says.
        described: &'static str,
    },
    /// Another CPU model than the description's.
    #[error(
        "the runner's guest has the CPU model {found:?} and is described with {described}: {SAME_VERSION}"
    )]
    CpuModel {
        /// What the runner says, or its beginning.
        found: String,
        /// What the description says.
        described: &'static str,
    },
    /// A processor where there is none, or none where there must be one.
    #[error("the runner's guest is {0}: {SAME_VERSION}")]
    Processor(&'static str),
    /// Another tracker than the description's.
    #[error(
        "the runner tracks its guest's writes by {found} and describes it with {described}: {SAME_VERSION}"
    )]
    Tracker {
        /// What the runner says.
        found: String,
        /// What the description says.
        described: String,
    },
    /// Guest memory lies elsewhere.
    #[error(
        "memory slot {at} of the runner's guest is {found}, and here it would be {expected}: {SAME_VERSION}"
    )]
    Slot {
        /// Its place in the list.
        at: usize,
        /// The runner's.
        found: String,
        /// This node's.
        expected: String,
    },
}

impl Disagreement {
    /// Whether the request itself makes no sense, rather than that the nodes differ.
    pub fn is_malformed(&self) -> bool {
        matches!(self, Self::Field(_) | Self::Name(_) | Self::Spec(_) | Self::Cpuid(_))
    }
}

/// Reads a request.
///
/// # Errors
/// The first thing that cannot be read, contradicts another, or is not as here.
pub fn read(request: v1::PairRequest) -> Result<PairRequest, Disagreement> {
    let (min, max) = (request.protocol_min, request.protocol_max);
    if max < u32::from(Versions::OURS.min) || min > u32::from(Versions::OURS.max) {
        return Err(Disagreement::Protocol { min, max });
    }
    if request.state_version != STATE_VERSION {
        return Err(Disagreement::StateVersion(request.state_version));
    }
    let spec = WireSpec::decode(&request.spec)?;
    let described = spec.kind.name();
    if request.hypervisor != described {
        return Err(Disagreement::Hypervisor { found: beginning(&request.hypervisor), described });
    }
    let cpu = request.cpu.ok_or(ConvertError::Missing("the guest's processor"))?;
    let host = beginning(&cpu.host);
    let cpu = processor(cpu, &spec)?;
    check_tracker(request.tracker, &spec)?;
    check_slots(&request.slots, &spec)?;
    Ok(PairRequest {
        node: request.node.parse()?,
        incarnation: incarnation(&request.incarnation)?,
        spec,
        digest: request.spec_digest,
        cpu,
        host,
        address: reachable(&request.admin_address),
    })
}

/// An address of every interface is none that others can reach.
fn reachable(address: &str) -> Option<Endpoint> {
    let endpoint: Endpoint = address.parse().ok()?;
    let any = endpoint.host().parse().is_ok_and(|address: IpAddr| address.is_unspecified());
    Some(endpoint).filter(|_| !any)
}

fn processor(cpu: v1::CpuModel, spec: &WireSpec) -> Result<Option<GuestCpu>, Disagreement> {
    let described = spec.cpu_model().name();
    if cpu.name != described {
        return Err(Disagreement::CpuModel { found: beginning(&cpu.name), described });
    }
    let none = cpu.cpuid.is_empty() && cpu.tsc_khz == 0 && !cpu.tsc_moves;
    match (matches!(spec.kind, GuestKind::Kvm), none) {
        (false, true) => Ok(None),
        (false, false) => Err(Disagreement::Processor("in software and has a processor")),
        (true, true) => Err(Disagreement::Processor("on KVM and has no processor")),
        (true, false) => {
            let cpuid = CpuidTable::decode(&cpu.cpuid)?;
            Ok(Some(GuestCpu { cpuid, tsc_khz: cpu.tsc_khz, tsc_moves: cpu.tsc_moves }))
        }
    }
}

fn check_tracker(found: Option<v1::Tracker>, spec: &WireSpec) -> Result<(), Disagreement> {
    let described = tracker(spec.tracker());
    let found = found.ok_or(ConvertError::Missing("the guest's tracker"))?;
    if found == described {
        return Ok(());
    }
    Err(Disagreement::Tracker { found: tracker_words(&found), described: tracker_words(&described) })
}

fn tracker_words(tracker: &v1::Tracker) -> String {
    match tracker.kind {
        Some(v1::tracker::Kind::RingEntries(entries)) => format!("rings of {entries} entries"),
        Some(v1::tracker::Kind::Bitmap(_)) => "a bitmap".to_owned(),
        None => "nothing that is known here".to_owned(),
    }
}

fn check_slots(found: &[v1::MemorySlot], spec: &WireSpec) -> Result<(), Disagreement> {
    let layout = MemoryLayout::new(spec.memory_bytes());
    let here: Vec<_> = (layout.slots().iter())
        .map(|slot| v1::MemorySlot { id: slot.id, first_gfn: slot.first.0, frames: slot.frames })
        .collect();
    let Some(at) = (0..found.len().max(here.len())).find(|&at| found.get(at) != here.get(at)) else {
        return Ok(());
    };
    let (found, expected) = (slot_words(found.get(at)), slot_words(here.get(at)));
    Err(Disagreement::Slot { at, found, expected })
}

fn slot_words(slot: Option<&v1::MemorySlot>) -> String {
    slot.map_or_else(
        || "none".to_owned(),
        |slot| format!("slot {} of {} frames from {:#x}", slot.id, slot.frames, slot.first_gfn),
    )
}

/// The beginning of a peer's text, fit for one line.
fn beginning(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(MAX_NAME).collect()
}

#[cfg(test)]
mod tests;
