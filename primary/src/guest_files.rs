//! A guest's description and its boot files as a node keeps them beside its store, so that it knows the guest again after
//! a restart.

use colo_vmm::wire_spec::FileDigest;
use colo_vmm::{BootFile, WireSpec};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use xxhash_rust::xxh3::xxh3_128;

/// A file that cannot be kept.
#[derive(Debug, thiserror::Error)]
#[error("{} cannot be written: {source}; is the disk full?", path.display())]
pub struct KeepError {
    /// Which.
    pub path: PathBuf,
    /// What the system said.
    pub source: io::Error,
}

/// Where the description is.
pub fn spec_path(directory: &Path) -> PathBuf {
    directory.join("guest.spec")
}

/// Where a boot file is.
pub fn boot_file_path(directory: &Path, digest: u128) -> PathBuf {
    directory.join(format!("{digest:032x}"))
}

/// A boot file, if it is there and whole.
pub fn boot_file(directory: &Path, file: &FileDigest) -> Option<Arc<[u8]>> {
    let bytes = fs::read(boot_file_path(directory, file.digest)).ok()?;
    (bytes.len() as u64 == file.len && xxh3_128(&bytes) == file.digest).then(|| bytes.into())
}

/// Keeps the description; its boot files are there already.
///
/// # Errors
/// It cannot be written.
pub fn keep_spec(directory: &Path, spec: &WireSpec) -> Result<(), KeepError> {
    keep(directory, spec_path(directory), &spec.encode())
}

/// Keeps a description and its boot files.
///
/// # Errors
/// One of them cannot be written.
pub fn keep_guest(directory: &Path, spec: &WireSpec, files: &[BootFile]) -> Result<(), KeepError> {
    let failed = |source| KeepError { path: directory.to_owned(), source };
    fs::create_dir_all(directory).map_err(failed)?;
    for (known, file) in spec.files().iter().zip(files) {
        if boot_file(directory, known).is_none() {
            keep(directory, boot_file_path(directory, known.digest), &file.bytes)?;
        }
    }
    keep_spec(directory, spec)
}

/// Under another name until it is whole.
fn keep(directory: &Path, path: PathBuf, bytes: &[u8]) -> Result<(), KeepError> {
    let fresh = path.with_extension("new");
    let written = fs::write(&fresh, bytes)
        .and_then(|()| File::open(&fresh)?.sync_all())
        .and_then(|()| fs::rename(&fresh, &path))
        .and_then(|()| File::open(directory)?.sync_all());
    written.map_err(|source| KeepError { path, source })
}

#[cfg(test)]
mod tests {
    use super::{boot_file, boot_file_path, keep_guest, spec_path};
    use colo_vmm::{BootFile, BootSource, GuestKind, GuestSpec, WireSpec};

    #[test]
    fn a_guest_is_known_again_and_a_damaged_file_is_none() {
        let place = tempfile::tempdir().unwrap();
        let directory = place.path().join("boot");
        let image = BootFile { path: "image".into(), bytes: vec![0x90; 9].into() };
        let spec = GuestSpec::new("web", 4 << 20, BootSource::Flat { image, address: 1 << 16 });
        let wire = WireSpec::new(&spec, GuestKind::Kvm);
        keep_guest(&directory, &wire, &spec.boot_files()).unwrap();
        let found = WireSpec::decode(&std::fs::read(spec_path(&directory)).unwrap()).unwrap();
        assert_eq!(found.encode(), wire.encode());
        let known = &wire.files()[0];
        assert_eq!(boot_file(&directory, known).as_deref(), Some(&[0x90_u8; 9][..]));
        std::fs::write(boot_file_path(&directory, known.digest), [0x91; 9]).unwrap();
        assert!(boot_file(&directory, known).is_none());
        keep_guest(&directory, &wire, &spec.boot_files()).unwrap();
        assert!(boot_file(&directory, known).is_some(), "mended");
        std::fs::write(place.path().join("file"), "").unwrap();
        let error = keep_guest(&place.path().join("file"), &wire, &[]).unwrap_err().to_string();
        assert!(error.contains("cannot be written"), "{error}");
    }
}
