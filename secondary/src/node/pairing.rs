//! Agreeing on a guest with a runner, and finding it again after a restart: the description and the boot files are kept
//! beside the store.

use colo_common::Point;
use colo_common::ReplicaId;
use colo_primary::guest_config::account;
use colo_vmm::wire_spec::FileDigest;
use colo_vmm::{GuestMemory, WireSpec, admission};
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use xxhash_rust::xxh3::xxh3_128;

use super::{Follower, Settings, Warm};
use crate::apply::Applier;
use crate::image::Image;
use crate::persist::{Restored, StoredState};
use crate::replica::Copy;
use crate::store::{Store, StoreError, StoredCopy};

/// What a runner has.
pub struct PairRequest {
    /// Its guest.
    pub spec: WireSpec,
    /// Digest of the spec with its boot files.
    pub digest: u64,
}

/// This node agrees.
#[derive(Clone, Debug)]
pub struct PairAnswer {
    /// Boot files that it lacks.
    pub missing: Vec<FileDigest>,
    /// Its copy's id.
    pub replica: Option<ReplicaId>,
    /// Its newest whole staged point.
    pub staged: Option<Point>,
    /// UDP port of its QUIC endpoint.
    pub quic_port: u16,
    /// Bytes of pages in an epoch at most.
    pub max_epoch_bytes: u64,
}

/// Why a guest is not taken.
#[derive(Debug, thiserror::Error)]
pub enum PairError {
    /// A copy of another guest is here.
    #[error("this node holds a copy of this vm with another description ({held:016x}, offered {offered:016x}): stop the other guest, or remove {} to begin anew", directory.display())]
    OtherSpec {
        /// Of the copy.
        held: u64,
        /// Of the runner.
        offered: u64,
        /// Where the copy is.
        directory: PathBuf,
    },
    /// The digest is not that of the description.
    #[error("the guest's description does not match its digest: do both nodes run the same version of Colo?")]
    Digest,
    /// The guest cannot be built here.
    #[error("the guest cannot be built on this node: {0}")]
    Build(String),
    /// Files beside the store.
    #[error("{} cannot be read or written: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

impl Follower {
    pub(super) fn pair(&mut self, request: PairRequest) -> Result<PairAnswer, PairError> {
        let PairRequest { spec, digest } = request;
        if let Some(warm) = self.warm.as_ref().filter(|warm| warm.digest != digest) {
            if !matches!(self.replica.copy(), Copy::Nothing) {
                let directory = self.settings.boot_directory.clone();
                return Err(PairError::OtherSpec { held: warm.digest, offered: digest, directory });
            }
            (self.warm, self.applier) = (None, None);
        }
        let missing: Vec<FileDigest> =
            spec.files().iter().filter(|file| boot_file(&self.settings, file).is_none()).cloned().collect();
        if missing.is_empty() && self.warm.is_none() {
            self.keep_spec(&spec)?;
            self.warm_up(spec, digest, None)?;
        }
        let (replica, staged) = match self.replica.copy() {
            Copy::Whole { replica, staged, .. } => (Some(*replica), Some(*staged)),
            _ => (None, None),
        };
        let quic_port = self.settings.quic_port;
        let max_epoch_bytes = self.settings.max_epoch_bytes;
        Ok(PairAnswer { missing, replica, staged, quic_port, max_epoch_bytes })
    }

    /// Builds the guest around memory that `image` holds, or around new memory.
    fn warm_up(
        &mut self,
        spec: WireSpec,
        digest: u64,
        image: Option<(Arc<GuestMemory>, Option<Point>)>,
    ) -> Result<(), PairError> {
        let build = |e: &dyn std::fmt::Display| PairError::Build(e.to_string());
        let full = spec.complete(|file| boot_file(&self.settings, file)).map_err(|e| build(&e))?;
        if full.digest() != digest {
            return Err(PairError::Digest);
        }
        admission::check(&full).map_err(|e| build(&e))?;
        let (memory, point) = match image {
            Some(image) => image,
            None => (Arc::new(GuestMemory::new(full.memory_bytes).map_err(|e| build(&e))?), None),
        };
        let guest = spec.kind.build(full, Arc::clone(&memory)).map_err(|e| build(&e))?;
        self.board.describe(account(guest.spec(), &spec.kind), Arc::clone(&memory));
        let tray = self.tray.clone();
        let image = Image::new(Arc::clone(&memory), point);
        let applier = Applier::start(image, move |applied| tray.applied(applied));
        self.applier = Some(applier.map_err(|e| build(&e))?);
        self.warm = Some(Warm { guest, spec, digest, memory });
        Ok(())
    }

    /// Goes on with what [`load`] found.
    ///
    /// # Errors
    /// The guest cannot be built here.
    pub fn take_loaded(&mut self, loaded: Option<Loaded>) -> Result<(), PairError> {
        let Some(Loaded { spec, digest, image, restored }) = loaded else { return Ok(()) };
        if let Some((restored, point)) = restored {
            self.take_stored(restored, point);
        }
        self.warm_up(spec, digest, image)
    }

    fn take_stored(&mut self, restored: Restored, point: Point) {
        self.promotions = restored.promotions;
        self.marks.staged = Some(point);
        (self.marks.applied, self.marks.persisted) = (Some(point), Some(point));
        self.held = colo_primary::release::Release::new(restored.held.start);
        self.held.hold(point.epoch, restored.held.clone());
        self.restored = Some(restored);
    }

    fn keep_spec(&self, spec: &WireSpec) -> Result<(), PairError> {
        let path = spec_file(&self.settings);
        let failed = |source| PairError::File { path: path.clone(), source };
        let fresh = path.with_extension("new");
        fs::write(&fresh, spec.encode()).map_err(failed)?;
        fs::File::open(&fresh).and_then(|file| file.sync_all()).map_err(failed)?;
        fs::rename(&fresh, &path).map_err(failed)?;
        fs::File::open(&self.settings.boot_directory)
            .and_then(|directory| directory.sync_all())
            .map_err(failed)
    }
}

/// What a store held, read back and checked.
pub struct Loaded {
    spec: WireSpec,
    digest: u64,
    /// Memory with the pages; at a point if the copy is whole.
    image: Option<(Arc<GuestMemory>, Option<Point>)>,
    restored: Option<(Restored, Point)>,
}

/// After a restart: what the store holds, loaded and checked; nothing if no guest was ever agreed on.
///
/// # Errors
/// The store or a file beside it is damaged: the copy is of no use.
pub fn load(store: &mut Store, settings: &Settings) -> Result<Option<Loaded>, String> {
    let path = spec_file(settings);
    let spec = match fs::read(&path) {
        Ok(bytes) => WireSpec::decode(&bytes).map_err(|e| e.to_string())?,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(format!("{}: {e}", path.display())),
    };
    let full = spec.complete(|file| boot_file(settings, file)).map_err(|e| e.to_string())?;
    let digest = full.digest();
    let memory = Arc::new(GuestMemory::new(full.memory_bytes).map_err(|e| e.to_string())?);
    let (image, restored) = match store.summary().copy {
        StoredCopy::None => (None, None),
        StoredCopy::Inconsistent => {
            // A base for a resync by digests.
            fill(&memory, |each| store.load_base(each).map(drop))?;
            (Some((memory, None)), None)
        }
        StoredCopy::Whole(whole) => {
            fill(&memory, |each| store.load(each))?;
            let restored = StoredState::restore(&store.state().map_err(|e| e.to_string())?)?;
            (Some((memory, Some(whole.point))), Some((restored, whole.point)))
        }
    };
    Ok(Some(Loaded { spec, digest, image, restored }))
}

fn spec_file(settings: &Settings) -> PathBuf {
    settings.boot_directory.join("guest.spec")
}

fn boot_file(settings: &Settings, file: &FileDigest) -> Option<Arc<[u8]>> {
    let bytes = fs::read(boot_file_path(&settings.boot_directory, file.digest)).ok()?;
    (bytes.len() as u64 == file.len && xxh3_128(&bytes) == file.digest).then(|| bytes.into())
}

/// Where a boot file is kept.
pub fn boot_file_path(directory: &std::path::Path, digest: u128) -> PathBuf {
    directory.join(format!("{digest:032x}"))
}

type Each<'a> = &'a mut dyn FnMut(colo_common::Gfn, &colo_vmm::memory::Page);

/// Fills memory with what a store hands out.
fn fill(memory: &GuestMemory, load: impl FnOnce(Each<'_>) -> Result<(), StoreError>) -> Result<(), String> {
    let mut failed = None;
    load(&mut |gfn, page| {
        if let Err(e) = memory.write_page(gfn, page) {
            failed.get_or_insert(e);
        }
    })
    .map_err(|e| e.to_string())?;
    failed.map_or(Ok(()), |e| Err(format!("the store holds a page that the guest does not have: {e}")))
}
