//! A boot file that a runner sends, piece by piece: kept under a name of its own until it is whole and its hash is right.
//! Several at a time of one file do not meet, and what is given up leaves nothing behind.

use colo_common::limits::{MAX_BOOT_MODULE, MAX_KERNEL_IMAGE};
use colo_primary::guest_files::boot_file_path;
use colo_proto::convert::{MAX_BOOT_FILE_CHUNK, id};
use colo_proto::v1::BootFileChunk;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::io::AsyncWriteExt;
use xxhash_rust::xxh3::xxh3_128;

/// Bytes of a boot file in all: a kernel or a module.
const MAX_BOOT_FILE: u64 =
    if MAX_KERNEL_IMAGE > MAX_BOOT_MODULE { MAX_KERNEL_IMAGE } else { MAX_BOOT_MODULE };

/// How the name of a file ends that is not whole.
const PART: &str = "part";

/// Why a boot file is not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UploadError {
    /// What was sent is no boot file.
    #[error("{0}")]
    Sent(String),
    /// It cannot be kept.
    #[error("{}: {error}; is the disk full?", directory.display())]
    Kept {
        /// Where boot files are.
        directory: PathBuf,
        /// What the system says.
        error: io::Error,
    },
}

/// A file that is not whole yet; removed unless it becomes so.
struct Part {
    path: PathBuf,
    file: tokio::fs::File,
    digest: u128,
    bytes: u64,
}

impl Drop for Part {
    fn drop(&mut self) {
        // It has another name if it is whole.
        drop(fs::remove_file(&self.path));
    }
}

/// One upload.
pub(crate) struct BootUpload {
    directory: PathBuf,
    part: Option<Part>,
}

impl BootUpload {
    pub(crate) fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned(), part: None }
    }

    fn kept(&self, error: io::Error) -> UploadError {
        UploadError::Kept { directory: self.directory.clone(), error }
    }

    /// Takes the next piece.
    pub(crate) async fn take(&mut self, chunk: &BootFileChunk) -> Result<(), UploadError> {
        let of = id("hash", &chunk.hash).map_err(|e| UploadError::Sent(e.to_string()))?;
        let (at, digest) = self.part.as_ref().map_or((0, of), |part| (part.bytes, part.digest));
        if chunk.offset != at || of != digest {
            return Err(UploadError::Sent("the pieces of a boot file do not follow each other".to_owned()));
        }
        if chunk.bytes.len() > MAX_BOOT_FILE_CHUNK {
            let text = format!("a piece of a boot file has at most {MAX_BOOT_FILE_CHUNK} bytes");
            return Err(UploadError::Sent(text));
        }
        let bytes = at + chunk.bytes.len() as u64;
        if bytes > MAX_BOOT_FILE {
            return Err(UploadError::Sent(format!("a boot file has at most {MAX_BOOT_FILE} bytes")));
        }
        if self.part.is_none() {
            let begun = begin(&self.directory, digest).await;
            self.part = Some(begun.map_err(|e| self.kept(e))?);
        }
        if let Some(part) = &mut self.part {
            part.bytes = bytes;
            let written = part.file.write_all(&chunk.bytes).await;
            written.map_err(|e| self.kept(e))?;
        }
        Ok(())
    }

    /// All pieces are there: the file has its name from now on, synced.
    pub(crate) async fn finish(mut self) -> Result<(), UploadError> {
        let Some(mut part) = self.part.take() else {
            let text = "a boot file without a piece: send an empty one if it is empty";
            return Err(UploadError::Sent(text.to_owned()));
        };
        let synced = async {
            part.file.flush().await?;
            part.file.sync_all().await?;
            tokio::fs::read(&part.path).await
        };
        let bytes = synced.await.map_err(|e| self.kept(e))?;
        if xxh3_128(&bytes) != part.digest {
            return Err(UploadError::Sent("a boot file is not what its hash says".to_owned()));
        }
        let whole = boot_file_path(&self.directory, part.digest);
        tokio::fs::rename(&part.path, whole).await.map_err(|e| self.kept(e))
    }
}

async fn begin(directory: &Path, digest: u128) -> io::Result<Part> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let path = boot_file_path(directory, digest).with_extension(format!("{number}.{PART}"));
    let file = tokio::fs::File::create(&path).await?;
    Ok(Part { path, file, digest, bytes: 0 })
}

/// Removes what a process left behind that ended in the middle of an upload.
///
/// # Errors
/// The directory cannot be read, or a file not removed.
pub(crate) fn sweep(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == PART) {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{BootUpload, UploadError, sweep};
    use colo_primary::guest_files::boot_file_path;
    use colo_proto::convert::id_bytes;
    use colo_proto::v1::BootFileChunk;
    use std::fs;
    use xxhash_rust::xxh3::xxh3_128;

    fn pieces(bytes: &[u8], digest: u128) -> Vec<BootFileChunk> {
        let halves = bytes.split_at(bytes.len() / 2);
        [(0, halves.0), (halves.0.len() as u64, halves.1)]
            .map(|(offset, bytes)| BootFileChunk {
                hash: id_bytes(digest),
                offset,
                bytes: bytes.to_vec().into(),
            })
            .to_vec()
    }

    #[tokio::test]
    async fn two_of_one_file_at_once_do_not_meet() {
        let place = tempfile::tempdir().unwrap();
        let bytes = vec![7; 5000];
        let digest = xxh3_128(&bytes);
        let mut uploads = [BootUpload::new(place.path()), BootUpload::new(place.path())];
        for piece in pieces(&bytes, digest) {
            for upload in &mut uploads {
                upload.take(&piece).await.unwrap();
            }
        }
        for upload in uploads {
            upload.finish().await.unwrap();
        }
        assert_eq!(fs::read(boot_file_path(place.path(), digest)).unwrap(), bytes);
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn what_is_wrong_or_given_up_leaves_nothing() {
        let place = tempfile::tempdir().unwrap();
        let wrong = pieces(&[1, 2, 3, 4], 5);
        let mut upload = BootUpload::new(place.path());
        upload.take(&wrong[0]).await.unwrap();
        assert!(matches!(upload.take(&wrong[0]).await, Err(UploadError::Sent(_))), "the same piece twice");
        upload.take(&wrong[1]).await.unwrap();
        assert!(upload.finish().await.unwrap_err().to_string().contains("hash"));
        let mut given_up = BootUpload::new(place.path());
        given_up.take(&wrong[0]).await.unwrap();
        drop(given_up);
        assert!(BootUpload::new(place.path()).finish().await.unwrap_err().to_string().contains("piece"));
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
        fs::write(place.path().join("0.3.part"), "of a process that is gone").unwrap();
        fs::write(place.path().join("0a"), "whole").unwrap();
        sweep(place.path()).unwrap();
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 1);
    }
}
