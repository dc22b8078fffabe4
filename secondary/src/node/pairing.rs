//! Agreeing on a guest with a runner: its description and boot files are kept beside the store, where
//! [`load`](super::load) finds them after a restart. A link is taken only from a process that has agreed on the guest that waits here.

use colo_common::config::Endpoint;
use colo_common::{BLOCK_SIZE, Incarnation, NodeId, Point, ReplicaId};
use colo_primary::guest_config::account;
use colo_primary::guest_files::{KeepError, boot_file, keep_spec};
use colo_primary::node::status::Devices;
use colo_primary::runner_disk::RunnerDisk;
use colo_proto::message::Hello;
use colo_vmm::arch::x86_64::processor::{CpuMisfit, GuestCpu};
use colo_vmm::disk::intent::Claim;
use colo_vmm::spec::NetSpec;
use colo_vmm::tap::Tap;
use colo_vmm::tap::learn::Learner;
use colo_vmm::wire_spec::FileDigest;
use colo_vmm::{Backends, Disk, GuestKind, GuestMemory, WireSpec, admission};
use std::path::PathBuf;
use std::sync::Arc;

use super::{Follower, Warm};
use crate::agreement::PairRequest;
use crate::apply::Applier;
use crate::disk::DiskImage;
use crate::image::Image;
use crate::rejoin::Rejoin;
use crate::replica::{AckPolicy, Copy};

/// Processes that are remembered to have agreed: the runner, and those that were it or want to be.
const MAX_AGREED: usize = 16;

/// This node agrees.
#[derive(Clone, Debug)]
pub struct PairAnswer {
    /// Boot files that it lacks.
    pub missing: Vec<FileDigest>,
    /// Its copy's id.
    pub replica: Option<ReplicaId>,
    /// Its newest whole staged point.
    pub staged: Option<Point>,
    /// A point that its copy holds and that no id vouches for.
    pub stale: Option<Point>,
    /// What its acks mean.
    pub policy: AckPolicy,
    /// UDP port of its QUIC endpoint.
    pub quic_port: u16,
    /// Bytes of pages in an epoch at most.
    pub max_epoch_bytes: u64,
}

/// What was agreed on with a process, beside the description.
pub(super) struct Agreement {
    incarnation: Incarnation,
    cpu: Option<GuestCpu>,
    address: Option<Endpoint>,
}

/// Why a guest is not taken.
#[derive(Debug, thiserror::Error)]
pub enum PairError {
    /// The runner goes by this node's own name: the register could not tell them apart.
    #[error(
        "this node is named {node} and so is the runner: give every node a name of its own, as `node` of its configuration"
    )]
    SameName {
        /// The name.
        node: NodeId,
    },
    /// A copy of another guest is here.
    #[error("this node holds, or is sent, a copy of this vm with another description ({held:016x}, offered {offered:016x}): stop the other guest, or remove {} to begin anew", directory.display())]
    OtherSpec {
        /// Of the copy.
        held: u64,
        /// Of the runner.
        offered: u64,
        /// Where the copy is.
        directory: PathBuf,
    },
    /// A copy of a guest of another kind is here.
    #[error("this node holds, or is sent, a copy of this vm as a guest on {held}, and the runner's is one on {offered}: stop the other guest, or remove {} to begin anew", directory.display())]
    OtherKind {
        /// Of the copy.
        held: String,
        /// Of the runner.
        offered: String,
        /// Where the copy is.
        directory: PathBuf,
    },
    /// The digest is not that of the description.
    #[error(
        "the guest's description has the digest {found:016x} here and {offered:016x} at the runner: run the same version of Colo on both"
    )]
    Digest {
        /// Of the description and the boot files, as this node has them.
        found: u64,
        /// Of the runner.
        offered: u64,
    },
    /// The guest has a processor that this host cannot give it.
    #[error("the guest of {node} (CPU model {model}, on {host:?}) could not run on at this node: {source}")]
    Processor {
        /// The runner.
        node: NodeId,
        /// The model of the description.
        model: &'static str,
        /// What the runner's host calls its processor.
        host: String,
        /// What does not fit.
        source: CpuMisfit,
    },
    /// The guest has a network card, and this node was given no TAP for it.
    #[error(
        "the guest has a network card and this node has no TAP for it: name one in [network] of its configuration"
    )]
    NoTap,
    /// The guest was promised offloads that this host does not have.
    #[error(
        "the guest leaves checksums and segments to its host, and the TAP {tap} of this node cannot make them: use the kernel of the runner's host here"
    )]
    Offloads {
        /// The interface.
        tap: String,
    },
    /// The guest cannot be built here.
    #[error("the guest cannot be built on this node: {0}")]
    Build(String),
    /// The guest has a disk, and this node's configuration has none.
    #[error(
        "the guest has a disk of {bytes} bytes, and this node has no place for it: add [disk] with path = \"FILE\" to its configuration"
    )]
    NoDisk {
        /// Its size.
        bytes: u64,
    },
    /// The image file of the guest's disk cannot be used.
    #[error("the guest's disk cannot be kept here: {0}")]
    Disk(String),
    /// Files beside the store.
    #[error(transparent)]
    File(#[from] KeepError),
}

impl Follower {
    pub(super) fn pair(&mut self, request: &PairRequest) -> Result<PairAnswer, PairError> {
        if request.node == self.me {
            return Err(PairError::SameName { node: self.me.clone() });
        }
        // What was agreed on with it before does not count any more.
        self.agreed.retain(|agreed| agreed.incarnation != request.incarnation);
        let missing = self.agree(request)?;
        if missing.is_empty() {
            let PairRequest { node, spec, .. } = request;
            tracing::info!(vm = %self.vm, runner = %node, hypervisor = spec.kind.name(),
                cpu_model = spec.cpu_model().name(), host = request.host, "agreed on the guest");
            self.agreed.truncate(MAX_AGREED - 1);
            let (incarnation, cpu, address) =
                (request.incarnation, request.cpu.clone(), request.address.clone());
            self.agreed.push_front(Agreement { incarnation, cpu, address });
        }
        let (replica, staged, stale) = offered(self.replica.copy());
        let quic_port = self.settings.quic_port;
        let max_epoch_bytes = self.settings.max_epoch_bytes;
        let policy = self.replica.policy();
        Ok(PairAnswer { missing, replica, staged, stale, policy, quic_port, max_epoch_bytes })
    }

    /// Has the runner's guest wait here, if it can; answers the boot files that it takes to know.
    fn agree(&mut self, request: &PairRequest) -> Result<Vec<FileDigest>, PairError> {
        let PairRequest { spec, digest, .. } = request;
        let is_other = |warm: &&Warm| warm.digest != *digest || !warm.spec.kind.is_like(&spec.kind);
        if let Some(warm) = self.warm.as_ref().filter(is_other) {
            if !matches!(self.replica.copy(), Copy::Nothing) || self.link.is_some() {
                return Err(self.other_guest(warm, request));
            }
            (self.warm, self.applier) = (None, None);
            // Nothing waits here: the account neither tells of it nor holds any of it.
            self.board.change(|status| (status.guest, status.devices) = (None, Devices::default()));
            self.agreed.clear();
        }
        if let Some(warm) = &self.warm {
            fits(warm, request)?;
        }
        let missing: Vec<FileDigest> = spec
            .files()
            .iter()
            .filter(|file| boot_file(&self.settings.boot_directory, file).is_none())
            .cloned()
            .collect();
        if missing.is_empty() && self.warm.is_none() {
            let warm = self.build(spec.clone(), *digest, None, None)?;
            fits(&warm.0, request)?;
            keep_spec(&self.settings.boot_directory, spec)?;
            self.warm_up(warm)?;
        }
        if let (Some(_), Some(persister)) = (&self.warm, &self.persister) {
            // Also if it was built at the start: the last process may have died before the store knew.
            persister.order(crate::persist::Job::Spec(*digest));
        }
        Ok(missing)
    }

    fn other_guest(&self, warm: &Warm, request: &PairRequest) -> PairError {
        let directory = self.settings.boot_directory.clone();
        if warm.digest != request.digest {
            return PairError::OtherSpec { held: warm.digest, offered: request.digest, directory };
        }
        let name = |kind: &GuestKind| match kind {
            GuestKind::Kvm => kind.name().to_owned(),
            GuestKind::Synthetic(config) => format!("{} (seed {})", kind.name(), config.program.seed),
        };
        let (held, offered) = (name(&warm.spec.kind), name(&request.spec.kind));
        PairError::OtherKind { held, offered, directory }
    }

    /// The guest that `hello` is about and the processor that it has there, if its process has agreed on them.
    ///
    /// # Errors
    /// Why not, and the remedy.
    pub(super) fn agreed_on(&self, hello: &Hello) -> Result<(&Warm, Option<GuestCpu>), String> {
        let warm = self.warm.as_ref().ok_or("no guest was agreed on: pair first")?;
        if hello.spec_digest != warm.digest {
            let (found, held) = (hello.spec_digest, warm.digest);
            return Err(format!(
                "the link is for a guest with the description {found:016x} and what was agreed on is {held:016x}: pair first"
            ));
        }
        let agreed = self.agreed.iter().find(|agreed| agreed.incarnation == hello.incarnation);
        let none = || format!("this process of {} has not agreed on the guest: pair first", hello.node);
        Ok((warm, agreed.ok_or_else(none)?.cpu.clone()))
    }

    /// The control plane of a process that has agreed.
    pub(super) fn address_of(&self, process: Incarnation) -> Option<Endpoint> {
        self.agreed.iter().find(|agreed| agreed.incarnation == process)?.address.clone()
    }

    /// Builds the guest around memory that `image` holds, or around new memory; and over `disk`, or over the one of this
    /// node's configuration.
    pub(super) fn build(
        &self,
        spec: WireSpec,
        digest: u64,
        image: Option<(Arc<GuestMemory>, Option<Point>)>,
        disk: Option<Arc<DiskImage>>,
    ) -> Result<(Warm, Image), PairError> {
        let build = |e: &dyn std::fmt::Display| PairError::Build(e.to_string());
        let full =
            spec.complete(|file| boot_file(&self.settings.boot_directory, file)).map_err(|e| build(&e))?;
        let found = full.digest();
        if found != digest {
            return Err(PairError::Digest { found, offered: digest });
        }
        admission::check(&full).map_err(|e| build(&e))?;
        let (memory, point) = match image {
            Some(image) => image,
            None => (Arc::new(GuestMemory::new(full.memory_bytes).map_err(|e| build(&e))?), None),
        };
        let disk = match (&full.virtio.disk, disk) {
            (Some(needed), None) => Some(self.open_disk(needed.bytes)?),
            (_, disk) => disk,
        };
        let tap = full.virtio.net.map(|net| self.fitting_tap(net)).transpose()?;
        let intent = self.settings.intent.clone();
        let image = disk.clone().map(|disk| disk as Arc<dyn Disk>);
        let runner_disk = image.map(|image| Arc::new(RunnerDisk::new(image, intent)));
        let backends = Backends { tap, disk: runner_disk.clone().map(|disk| disk as Arc<dyn Disk>) };
        let guest = spec.kind.build(full, Arc::clone(&memory), &backends).map_err(|e| build(&e))?;
        let image = Image::new(Arc::clone(&memory), point);
        let learner = spec.virtio().net.map(|net| Learner::new(net.mac));
        let blocks = disk.as_ref().map_or(0, |disk| disk.bytes() / BLOCK_SIZE as u64);
        let mut rejoin = Rejoin::new(memory.layout().frame_limit(), blocks);
        if let Some(claim) = self.claimed(blocks) {
            rejoin.leave_disk(claim.point, claim.extents.blocks());
        }
        Ok((Warm { guest, spec, digest, memory, disk, runner_disk, learner, rejoin }, image))
    }

    /// What the intent log says of the disk, if this node ran the guest on it. A promotion makes the log before the guest
    /// runs, and the store notes after that what the disk is: a crash in between leaves a log of a disk that is not there.
    fn claimed(&self, blocks: u64) -> Option<Claim> {
        let known = self.directory.runner().ok().flatten();
        if !self.replica.is_active() && known.is_none_or(|known| known.active.is_none()) {
            return None;
        }
        let claimed = RunnerDisk::claimed(&self.settings.intent);
        let told = claimed.inspect_err(|e| tracing::warn!(vm = %self.vm, "{e}")).ok().flatten();
        told.filter(|claim| claim.vm == self.vm && claim.extents.disk_bytes() == blocks * BLOCK_SIZE as u64)
    }

    /// This node's TAP, if it can do what the guest was promised.
    fn fitting_tap(&self, net: NetSpec) -> Result<Arc<Tap>, PairError> {
        let tap = self.tap.as_ref().ok_or(PairError::NoTap)?;
        if net.offloads && !tap.offers_offloads() {
            return Err(PairError::Offloads { tap: tap.name().to_owned() });
        }
        Ok(Arc::clone(tap))
    }

    /// The store opens it, which belongs to the persist thread.
    fn open_disk(&self, bytes: u64) -> Result<Arc<DiskImage>, PairError> {
        let path = self.settings.disk.clone().ok_or(PairError::NoDisk { bytes })?;
        let persister =
            self.persister.as_ref().ok_or_else(|| PairError::Disk("there is no store".to_owned()))?;
        let (reply, answer) = crossbeam_channel::bounded(1);
        persister.order(crate::persist::Job::OpenDisk(path, bytes, reply));
        let opened = answer.recv().map_err(|_| "the persist thread has ended".to_owned());
        opened.and_then(|opened| opened).map_err(PairError::Disk)
    }

    /// Has a guest that was built wait for its state.
    pub(super) fn warm_up(&mut self, (warm, image): (Warm, Image)) -> Result<(), PairError> {
        self.board.describe(account(warm.guest.spec(), &warm.spec.kind), Arc::clone(&warm.memory));
        self.board.attach(self.devices(&warm));
        let tray = self.tray.clone();
        let applier = Applier::start(image, move |applied| tray.applied(applied));
        self.applier = Some(applier.map_err(|e| PairError::Build(e.to_string()))?);
        self.warm = Some(warm);
        Ok(())
    }
}

/// What a copy can be gone on with from: its id and point, or the point of a base for a resync by digests.
pub fn offered(copy: &Copy) -> (Option<ReplicaId>, Option<Point>, Option<Point>) {
    match copy {
        Copy::Whole { replica, staged, .. } => (Some(*replica), Some(*staged), None),
        Copy::Stale { point } => (None, None, Some(*point)),
        // Pages of a seed that broke off: a base as good as any.
        Copy::Inconsistent => (None, None, Some(Point::default())),
        Copy::Nothing => (None, None, None),
    }
}

/// Whether the guest that waits here could run on as the runner's: what its restore would refuse is refused now.
fn fits(warm: &Warm, request: &PairRequest) -> Result<(), PairError> {
    let PairRequest { node, spec, host, .. } = request;
    warm.guest.check_cpu(request.cpu.as_ref()).map_err(|source| PairError::Processor {
        node: node.clone(),
        model: spec.cpu_model().name(),
        host: host.clone(),
        source,
    })
}
