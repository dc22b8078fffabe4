//! What an epoch has beside output: the same for all.

use colo_common::VmId;
use colo_proto::frame::VmTag;
use colo_vmm::memory::GuestMemory;
use colo_vmm::synthetic::{SyntheticConfig, SyntheticGuest};
use colo_vmm::{BootFile, BootSource, DirtySet, GuestSpec, MachineState, ProtectedGuest};
use std::sync::{Arc, OnceLock};

/// A guest that says nothing, for all that an epoch has beside output.
pub(crate) struct Fixture {
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) state: MachineState,
    pub(crate) digest: u64,
    pub(crate) frames: u64,
}

pub(crate) fn fixture() -> &'static Fixture {
    static FIXTURE: OnceLock<Fixture> = OnceLock::new();
    FIXTURE.get_or_init(|| {
        let image = BootFile { path: "none".into(), bytes: Vec::new().into() };
        let boot = BootSource::Flat { image, address: 1 << 16 };
        let frames = 256;
        let spec = GuestSpec::new("silent", frames * 4096, boot);
        let digest = spec.digest();
        let mut guest = SyntheticGuest::new(spec, SyntheticConfig::default()).expect("a guest");
        guest.boot().and_then(|()| guest.resume()).expect("it runs");
        let cut = guest.cut(&mut DirtySet::new(frames)).expect("it is cut");
        Fixture { memory: Arc::clone(guest.memory()), state: cut.state, digest, frames }
    })
}

pub(crate) fn tag() -> VmTag {
    VmTag::of(&vm())
}

/// The one vm.
pub(crate) fn vm() -> VmId {
    "web".parse().expect("a name")
}
