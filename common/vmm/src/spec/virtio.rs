//! The guest's virtio devices, each in a window of its own, always the same one.

use colo_common::limits::MAX_DISK_BYTES;
use colo_common::{BLOCK_SIZE, Mac};
use serde::{Deserialize, Serialize};

use super::SpecError;

/// Bytes of a disk's serial number at most.
pub const MAX_SERIAL: usize = 20;

/// Windows of the devices: [`VirtioSpec`] says which are there.
pub const NET_SLOT: u32 = 0;
/// See [`NET_SLOT`].
pub const DISK_SLOT: u32 = 1;
/// See [`NET_SLOT`].
pub const RNG_SLOT: u32 = 2;
/// See [`NET_SLOT`].
pub const CONSOLE_SLOT: u32 = 3;

/// Which virtio devices a guest has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioSpec {
    /// Its network card.
    pub net: Option<NetSpec>,
    /// Its disk.
    pub disk: Option<DiskSpec>,
    /// Whether it has a source of randomness.
    pub rng: bool,
    /// Whether it has a console beside the serial one.
    pub console: bool,
    /// Whether what is typed goes to that console.
    pub console_input: bool,
    /// Whether a Linux is told of the devices on its command line, as one without ACPI has to be. One that reads the
    /// ACPI tables finds them there and must not be told twice.
    pub on_command_line: bool,
}

/// A network card as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetSpec {
    /// Its address.
    pub mac: Mac,
    /// Whether checksums and segmentation are offered to be left to the host.
    pub offloads: bool,
}

/// A disk as the guest sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpec {
    /// Its size, whole blocks.
    pub bytes: u64,
    /// Whether it can only be read.
    pub read_only: bool,
    /// Its serial number.
    pub serial: String,
}

impl VirtioSpec {
    /// The windows that have a device, ascending.
    pub fn occupied(&self) -> impl Iterator<Item = u32> {
        let devices = [
            (self.net.is_some(), NET_SLOT),
            (self.disk.is_some(), DISK_SLOT),
            (self.rng, RNG_SLOT),
            (self.console, CONSOLE_SLOT),
        ];
        devices.into_iter().filter(|(there, _)| *there).map(|(_, slot)| slot)
    }

    /// Windows that are needed for them.
    pub fn slots(&self) -> u32 {
        self.occupied().last().map_or(0, |slot| slot + 1)
    }

    pub(super) fn validate(&self) -> Result<(), SpecError> {
        let Some(disk) = &self.disk else { return Ok(()) };
        let bytes = disk.bytes;
        if bytes == 0 || bytes > MAX_DISK_BYTES || !bytes.is_multiple_of(BLOCK_SIZE as u64) {
            return Err(SpecError::DiskSize { bytes });
        }
        let serial = &disk.serial;
        if serial.len() > MAX_SERIAL || !serial.bytes().all(|b| (0x20..0x7f).contains(&b)) {
            return Err(SpecError::Serial { serial: serial.chars().take(40).collect() });
        }
        Ok(())
    }
}
