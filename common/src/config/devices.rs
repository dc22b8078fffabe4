//! `[network]` and `[disk]`: what of the host stands behind the guest's network card and disk. What the guest sees of
//! them, the primary says and the secondary learns.

use serde::Deserialize;
use std::path::PathBuf;

use super::Problem;
use crate::Mac;

/// Bytes of an interface's name at most: the kernel's limit, without the end.
const MAX_INTERFACE: usize = 15;
/// Bytes of a disk's serial number at most, as virtio has it.
pub const MAX_SERIAL: usize = 20;

/// `[network]` of a primary: gives the guest a network card.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkConfig {
    /// TAP interface; made for as long as the process lives if there is none of that name, which takes CAP_NET_ADMIN.
    pub tap: String,
    /// The card's address; default one made of the vm's name.
    pub mac: Option<Mac>,
}

/// `[disk]` of a primary: gives the guest a disk.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Raw image file, in whole blocks of 4096 bytes.
    pub path: PathBuf,
    /// Whether the guest may only read it; default false.
    #[serde(default)]
    pub read_only: bool,
    /// Serial number that the guest sees, up to 20 printable ASCII characters; default the vm's name, cut to that.
    pub serial: Option<String>,
}

/// `[network]` of a secondary.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FollowNetworkConfig {
    /// TAP interface; its carrier is off until this node runs the guest.
    pub tap: String,
}

/// `[disk]` of a secondary.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FollowDiskConfig {
    /// Raw image file; made if it is not there. Of a spare, `{vm}` in it is the name of the vm that claims it.
    pub path: PathBuf,
}

pub(super) fn check_tap(tap: &str) -> Result<(), Problem> {
    let fits = (1..=MAX_INTERFACE).contains(&tap.len());
    let plain = tap.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b'%' && b != b':');
    if fits && plain && tap != "." && tap != ".." {
        return Ok(());
    }
    let text = format!(
        "it is no name of an interface: use 1 to {MAX_INTERFACE} characters without spaces, '/', ':' or '%'"
    );
    Err(Problem::new("network.tap", text))
}

pub(super) fn check_serial(serial: Option<&str>) -> Result<(), Problem> {
    match serial {
        Some(serial) if serial.len() > MAX_SERIAL || !serial.bytes().all(|b| (0x20..0x7f).contains(&b)) => {
            let text =
                format!("a serial number has up to {MAX_SERIAL} printable ASCII characters; choose another");
            Err(Problem::new("disk.serial", text))
        }
        _ => Ok(()),
    }
}
