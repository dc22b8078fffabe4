//! What of the host is behind the guest's disk and network card. Kept by reference and looked at when the control plane
//! asks: so it is as of the question, and nobody has to keep it up to date.

use colo_common::Mac;
use colo_vmm::tap::Tap;
use std::fmt::Debug;
use std::path::PathBuf;
use std::sync::{Arc, Weak};

/// A disk of which a part is not in its image file yet. None of this waits.
pub trait Overlay: Send + Sync + Debug {
    /// Bytes that are still to go into the image file.
    fn bytes_to_fold(&self) -> u64;

    /// Why it is of no more use to this process, once it is not.
    fn failure(&self) -> Option<String>;
}

/// One that may be closed meanwhile: then there is nothing to tell of it.
impl<T: Overlay> Overlay for Weak<T> {
    fn bytes_to_fold(&self) -> u64 {
        self.upgrade().map_or(0, |overlay| overlay.bytes_to_fold())
    }

    fn failure(&self) -> Option<String> {
        self.upgrade()?.failure()
    }
}

/// The guest's disk here.
#[derive(Clone, Debug)]
pub struct DiskAccount {
    /// Its image file.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// The guest can only read it.
    pub read_only: bool,
    /// What is over the file; none at a node that began the guest. A [`Weak`] one: whoever looks at an account, or keeps
    /// one, does not keep the file open.
    pub overlay: Option<Arc<dyn Overlay>>,
}

impl DiskAccount {
    /// Why it is of no more use to this process, once it is not.
    pub fn failure(&self) -> Option<String> {
        self.overlay.as_ref()?.failure()
    }
}

/// The guest's network card here.
#[derive(Clone, Debug)]
pub struct NetworkAccount {
    /// Its TAP.
    pub tap: Arc<Tap>,
    /// Its address.
    pub mac: Mac,
}

/// Both, as far as the guest has them.
#[derive(Clone, Debug, Default)]
pub struct Devices {
    /// The disk.
    pub disk: Option<DiskAccount>,
    /// The network card.
    pub network: Option<NetworkAccount>,
}
