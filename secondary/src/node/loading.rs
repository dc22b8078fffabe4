//! What a node begins with after a restart: the guest that was agreed on, the copy of it that the store holds, and what
//! the process before this one handed over.

use colo_common::{History, Point};
use colo_primary::guest_files::{boot_file, spec_path};
use colo_primary::handover::Handover;
use colo_vmm::{BlockSet, DirtySet, GuestMemory, WireSpec};
use std::fs;
use std::sync::Arc;

use super::pairing::PairError;
use super::{Follower, Settings};
use crate::disk::DiskImage;
use crate::persist::{Restored, StoredState};
use crate::store::{Store, StoreError, StoredCopy};

/// What a store held, read back and checked.
pub struct Loaded {
    spec: WireSpec,
    digest: u64,
    /// Memory with the pages; at a point if the copy is whole.
    image: Option<(Arc<GuestMemory>, Option<Point>)>,
    restored: Option<(Restored, Point)>,
    disk_bytes: Option<u64>,
    disk: Option<Arc<DiskImage>>,
    /// What is known of memory that was handed over.
    left: Option<Left>,
}

/// A memory and a disk that hold a point each, but for some of it.
struct Left {
    memory: Option<(Point, DirtySet)>,
    disk: Option<(Point, BlockSet)>,
    /// That the points lie on.
    history: History,
}

impl Loaded {
    /// Opens the image file of the guest's disk, if it has one.
    ///
    /// # Errors
    /// There is no place for it, or the file cannot be used.
    pub fn open_disk(&mut self, store: &mut Store, settings: &Settings) -> Result<(), PairError> {
        let Some(bytes) = self.disk_bytes else { return Ok(()) };
        let path = settings.disk.as_ref().ok_or(PairError::NoDisk { bytes })?;
        let disk = store.open_disk(path, bytes).map_err(|e| PairError::Disk(e.to_string()))?;
        disk.start_folding().map_err(|e| PairError::Disk(e.to_string()))?;
        self.disk = Some(disk);
        Ok(())
    }
}

/// After a restart: what the store holds, loaded and checked; nothing if no guest was ever agreed on.
///
/// # Errors
/// The store or a file beside it is damaged, or the two are of different guests: the copy is of no use.
pub fn load(
    store: &mut Store,
    settings: &Settings,
    left: Option<Handover>,
) -> Result<Option<Loaded>, String> {
    let path = spec_path(&settings.boot_directory);
    let summary = store.summary();
    let spec = match fs::read(&path) {
        Ok(bytes) => WireSpec::decode(&bytes).map_err(|e| e.to_string())?,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => match summary.copy {
            // Without it nobody knows what the pages are of.
            StoredCopy::Whole(_) => return Err(format!("{} is gone", path.display())),
            StoredCopy::Inconsistent | StoredCopy::None => return Ok(None),
        },
        Err(e) => return Err(format!("{}: {e}", path.display())),
    };
    let full = spec.complete(|file| boot_file(&settings.boot_directory, file)).map_err(|e| e.to_string())?;
    let digest = full.digest();
    let left = left.filter(|left| left.spec_digest == digest);
    let memory = match &left {
        Some(left) => Arc::clone(&left.memory),
        None => Arc::new(GuestMemory::new(full.memory_bytes).map_err(|e| e.to_string())?),
    };
    let other = |found: u64| {
        format!(
            "it is of a guest with another description ({found:016x}, {} is {digest:016x})",
            path.display()
        )
    };
    let (image, restored) = match summary.copy {
        StoredCopy::None => (None, None),
        // The store has its pages.
        StoredCopy::Inconsistent if left.is_some() => (Some((memory, None)), None),
        StoredCopy::Inconsistent => {
            // A base for a resync by digests.
            fill(&memory, |each| store.load_base(each).map(drop))?;
            (Some((memory, None)), None)
        }
        StoredCopy::Whole(whole) => {
            if let Some(found) = summary.spec.filter(|&found| found != digest) {
                return Err(other(found));
            }
            fill(&memory, |each| store.load(each))?;
            let restored = StoredState::restore(&store.state().map_err(|e| e.to_string())?)?;
            if restored.state.spec != digest {
                return Err(other(restored.state.spec));
            }
            (Some((memory, Some(whole.point))), Some((restored, whole.point)))
        }
    };
    let disk_bytes = full.virtio.disk.as_ref().map(|disk| disk.bytes);
    let left = left.map(|left| {
        let Handover { base, changed, disk, history, .. } = left;
        Left { memory: base.map(|point| (point, changed)), disk, history }
    });
    Ok(Some(Loaded { spec, digest, image, restored, disk_bytes, disk: None, left }))
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

impl Follower {
    /// Goes on with what [`load`] found.
    ///
    /// # Errors
    /// The guest cannot be built here.
    pub fn take_loaded(&mut self, loaded: Option<Loaded>) -> Result<(), PairError> {
        let Some(Loaded { spec, digest, image, restored, disk, left, .. }) = loaded else { return Ok(()) };
        let stored = restored.as_ref().map(|(_, point)| *point);
        if let Some((restored, point)) = restored {
            self.take_stored(restored, point);
        }
        let mut warm = self.build(spec, digest, image, disk)?;
        stored.into_iter().for_each(|point| warm.0.rejoin.hold(point));
        if let Some(left) = left {
            left.memory.into_iter().for_each(|(point, changed)| warm.0.rejoin.leave_memory(point, changed));
            left.disk.into_iter().for_each(|(point, changed)| warm.0.rejoin.leave_disk(point, changed));
            self.history = left.history;
        }
        self.warm_up(warm)
    }

    fn take_stored(&mut self, restored: Restored, point: Point) {
        self.promotions = restored.promotions;
        self.marks.staged = Some(point);
        (self.marks.applied, self.marks.persisted) = (Some(point), Some(point));
        self.held = colo_primary::release::Release::new(restored.held.start);
        self.held.hold(point.epoch, restored.held.clone());
        self.restored = Some(restored);
    }
}

#[cfg(test)]
mod tests {
    use super::{Settings, load};
    use crate::store::{Base, Mark, MemoryDisk, Store};
    use colo_common::history::point;
    use colo_common::{History, VmId};
    use colo_primary::guest_files::{boot_file_path, spec_path};
    use colo_vmm::egress::OutputPosition;
    use colo_vmm::synthetic::{SyntheticConfig, SyntheticGuest};
    use colo_vmm::{BootFile, BootSource, DirtySet, GuestKind, GuestSpec, ProtectedGuest, WireSpec};
    use std::fs;
    use std::path::Path;
    use std::time::{Duration, SystemTime};

    fn vm() -> VmId {
        "web".parse().unwrap()
    }

    fn settings(boot_directory: &Path) -> Settings {
        Settings {
            auto_failover: true,
            promote_delay: Duration::ZERO,
            startup_grace: Duration::ZERO,
            max_epoch_bytes: 1 << 20,
            window: 8,
            quic_port: 1,
            boot_directory: boot_directory.to_owned(),
            intent: boot_directory.join("disk.intent"),
            claimed: false,
            spare: false,
            disk: None,
        }
    }

    fn spec(memory_mib: u64) -> GuestSpec {
        let image = BootFile { path: "image".into(), bytes: vec![0x90].into() };
        GuestSpec::new("web", memory_mib << 20, BootSource::Flat { image, address: 1 << 16 })
    }

    /// The machine of such a guest, as the store has it beside the output that it holds.
    fn stored(spec: &GuestSpec) -> Vec<u8> {
        let mut guest = SyntheticGuest::new(spec.clone(), SyntheticConfig::default()).unwrap();
        guest.boot().unwrap();
        guest.resume().unwrap();
        let mut dirty = DirtySet::new(guest.memory().layout().frame_limit());
        let state = guest.cut(&mut dirty).unwrap().state;
        let held: Vec<(Option<u32>, Vec<u8>)> = Vec::new();
        postcard::to_stdvec(&(state.encode(), OutputPosition::default(), held, 0_u32)).unwrap()
    }

    /// A store with a whole copy whose state is `state`, of the spec with this digest.
    fn whole(state: &[u8], digest: Option<u64>) -> Store {
        let mut store = Store::open_in_memory(&MemoryDisk::default(), &vm()).unwrap();
        digest.into_iter().for_each(|digest| store.see_spec(digest).unwrap());
        store.begin_copy(Base::Empty).unwrap();
        let mut history = History::default();
        history.extend(point(1, 1));
        let now = SystemTime::UNIX_EPOCH;
        let mark = Mark { point: point(1, 1), history: &history, state, blocks: &[], now };
        store.complete(mark, None).unwrap();
        store
    }

    #[test]
    fn a_copy_of_a_guest_with_another_description_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let settings = settings(place.path());
        let (ours, other) = (spec(4), spec(8));
        let wire = WireSpec::new(&ours, GuestKind::Synthetic(SyntheticConfig::default()));
        assert!(
            load(&mut whole(&stored(&ours), None), &settings, None).is_err_and(|why| why.contains("is gone"))
        );
        fs::write(spec_path(place.path()), wire.encode()).unwrap();
        for file in wire.files() {
            fs::write(boot_file_path(place.path(), file.digest), [0x90]).unwrap();
        }
        let known = Some(ours.digest());
        assert!(
            load(&mut whole(&stored(&ours), known), &settings, None).is_ok_and(|loaded| loaded.is_some())
        );
        for mut store in [whole(&stored(&ours), Some(other.digest())), whole(&stored(&other), known)] {
            let Err(why) = load(&mut store, &settings, None) else { panic!("it was loaded") };
            assert!(why.contains("another description"), "{why}");
        }
    }
}
