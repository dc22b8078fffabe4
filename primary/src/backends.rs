//! The parts of this host that stand behind a new guest's network card and disk, and what the guest sees of them.

use colo_common::config::{DiskConfig, MAX_SERIAL, NetworkConfig};
use colo_common::{Mac, VmId};
use colo_vmm::disk::{DiskError, FileDisk};
use colo_vmm::spec::{DiskSpec, NetSpec};
use colo_vmm::tap::{Tap, TapError};
use colo_vmm::{Backends, Disk};
use std::sync::Arc;

use crate::node::status::{Devices, DiskAccount, NetworkAccount};

/// A part of the host that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The network.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// What was opened, and as what the guest sees it.
#[derive(Debug, Default)]
pub struct Opened {
    /// The parts of the host.
    pub backends: Backends,
    /// The network card.
    pub net: Option<NetSpec>,
    /// The disk.
    pub disk: Option<DiskSpec>,
    /// The same for the control plane.
    pub devices: Devices,
}

/// Opens what a configuration names.
///
/// # Errors
/// It cannot be opened, or is in use.
pub fn open(
    vm: &VmId,
    network: Option<&NetworkConfig>,
    disk: Option<&DiskConfig>,
) -> Result<Opened, BackendError> {
    let mut opened = Opened::default();
    if let Some(NetworkConfig { tap, mac }) = network {
        let tap = Tap::open(tap)?;
        let mac = mac.unwrap_or_else(|| Mac::of(vm));
        opened.net = Some(NetSpec { mac, offloads: tap.offers_offloads() });
        let tap = Arc::new(tap);
        opened.devices.network = Some(NetworkAccount { tap: Arc::clone(&tap), mac });
        opened.backends.tap = Some(tap);
    }
    if let Some(DiskConfig { path, read_only, serial }) = disk {
        let file = FileDisk::open(path, *read_only)?;
        let serial = serial.clone().unwrap_or_else(|| vm.as_str().chars().take(MAX_SERIAL).collect());
        opened.disk = Some(DiskSpec { bytes: file.bytes(), read_only: *read_only, serial });
        opened.devices.disk = Some(DiskAccount {
            path: path.clone(),
            bytes: file.bytes(),
            read_only: *read_only,
            overlay: None,
        });
        opened.backends.disk = Some(Arc::new(file));
    }
    Ok(opened)
}
