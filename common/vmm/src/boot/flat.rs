//! Flat images: raw bytes at an address that the spec names, entered at their first byte in flat 32-bit
//! protected mode. For test payloads and boot loaders of one's own.

use super::{BootError, Entry, MACHINE_TABLES, Target};
use crate::spec::BootFile;

/// Loads `image` at the guest-physical `address`.
///
/// # Errors
/// The image is empty, not inside low RAM, or over the machine's tables.
pub(super) fn load(target: &Target<'_>, image: &BootFile, address: u64) -> Result<Entry, BootError> {
    let bytes = image.bytes.len() as u64;
    let outside = || {
        let (path, ram_end) = (image.path.clone(), target.low_end());
        BootError::FlatOutsideRam { path, bytes, address, ram_end }
    };
    let eip = u32::try_from(address).map_err(|_| outside())?;
    if image.bytes.is_empty() {
        return Err(BootError::Truncated { path: image.path.clone(), what: "its first byte" });
    }
    if address.saturating_add(bytes) > target.low_end() {
        return Err(outside());
    }
    target.check_place(image, address, bytes, &MACHINE_TABLES)?;
    target.write("the flat image", &image.bytes, address)?;
    Ok(Entry::Protected32 { eip, eax: 0, ebx: 0 })
}
