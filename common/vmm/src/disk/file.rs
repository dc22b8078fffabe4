//! A disk in a raw image file.

use colo_common::limits::MAX_DISK_BYTES;
use colo_common::{BLOCK_SIZE, Block};
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use vmm_sys_util::seek_hole::SeekHole;

use super::{Disk, check_range};

/// Why an image file cannot be a guest's disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It cannot be opened.
    #[error("cannot open the disk image {}: {source}; check the path and its permissions", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is no file that can be a disk.
    #[error("the disk image {} is {what}: name a regular file", path.display())]
    Kind {
        /// The file.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// Somebody else has it.
    #[error("the disk image {} is locked by another process: only one may use it, end the other one", path.display())]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// A size that no disk has.
    #[error(
        "the disk image {} has {bytes} bytes; a disk has 1 to {} blocks of {BLOCK_SIZE} bytes: make it so by truncate -s",
        path.display(), MAX_DISK_BYTES / BLOCK_SIZE as u64
    )]
    Size {
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
    /// Another size than the guest's disk has.
    #[error(
        "the disk image {} has {found} bytes and the guest's disk has {expected}: was it cut short, or is it another disk's? Name the right file",
        path.display()
    )]
    OtherSize {
        /// The file.
        path: PathBuf,
        /// Its length.
        found: u64,
        /// That of the guest's disk.
        expected: u64,
    },
}

/// A raw image file, locked for as long as it is open.
#[derive(Debug)]
pub struct FileDisk {
    file: File,
    path: PathBuf,
    bytes: u64,
}

impl FileDisk {
    /// Opens an image; for reading alone if `read_only`, and then others may do so too.
    ///
    /// # Errors
    /// It is not there, cannot be opened, is locked by another process, or has a size that no disk has.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, DiskError> {
        let failed = |source| DiskError::Open { path: path.to_owned(), source };
        let file = OpenOptions::new().read(true).write(!read_only).open(path).map_err(failed)?;
        let meta = file.metadata().map_err(failed)?;
        let kind = meta.file_type();
        if !kind.is_file() {
            let what = if kind.is_block_device() { "a block device" } else { "no regular file" };
            return Err(DiskError::Kind { path: path.to_owned(), what });
        }
        let locked = if read_only { file.try_lock_shared() } else { file.try_lock() };
        locked.map_err(|e| match e {
            TryLockError::WouldBlock => DiskError::Locked { path: path.to_owned() },
            TryLockError::Error(source) => failed(source),
        })?;
        let bytes = meta.len();
        if bytes == 0 || bytes > MAX_DISK_BYTES || !bytes.is_multiple_of(BLOCK_SIZE as u64) {
            return Err(DiskError::Size { path: path.to_owned(), bytes });
        }
        Ok(Self { file, path: path.to_owned(), bytes })
    }

    /// Opens an image of exactly `bytes`; makes an empty one, which takes no room, if there is none and `create`.
    ///
    /// # Errors
    /// As [`open`](Self::open), or it has another size, or it cannot be made.
    pub fn open_sized(path: &Path, bytes: u64, create: bool) -> Result<Self, DiskError> {
        let failed = |source| DiskError::Open { path: path.to_owned(), source };
        if create {
            make_sized(path, bytes).map_err(failed)?;
        }
        let disk = Self::open(path, false)?;
        if disk.bytes != bytes {
            return Err(DiskError::OtherSize { path: path.to_owned(), found: disk.bytes, expected: bytes });
        }
        Ok(disk)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn fallocate(&self, mode: i32, offset: u64, len: u64) -> io::Result<()> {
        let (offset, len) = (offset as libc::off_t, len as libc::off_t);
        // SAFETY: the descriptor is open for as long as `self.file`; the call touches no memory of ours.
        match unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset, len) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Disk for FileDisk {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        check_range(self.bytes, offset, bytes.len() as u64)?;
        self.file.read_exact_at(bytes, offset)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        check_range(self.bytes, offset, bytes.len() as u64)?;
        self.file.write_all_at(bytes, offset)
    }

    fn zero(&self, blocks: Range<Block>, unmap: bool) -> io::Result<()> {
        let (offset, len) = (blocks.start.offset(), blocks.end.offset() - blocks.start.offset());
        check_range(self.bytes, offset, len)?;
        let mode = if unmap { libc::FALLOC_FL_PUNCH_HOLE } else { libc::FALLOC_FL_ZERO_RANGE };
        match self.fallocate(mode | libc::FALLOC_FL_KEEP_SIZE, offset, len) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => {}
            done => return done,
        }
        let zeroes = [0; BLOCK_SIZE];
        (blocks.start.0..blocks.end.0)
            .try_for_each(|block| self.file.write_all_at(&zeroes, Block(block).offset()))
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn next_data(&self, from: Block) -> io::Result<Option<Range<Block>>> {
        let mut file = self.file.try_clone()?;
        if from.offset() >= self.bytes {
            return Ok(None);
        }
        let Some(data) = file.seek_data(from.offset())? else { return Ok(None) };
        let end = file.seek_hole(data)?.unwrap_or(self.bytes).min(self.bytes);
        let first = Block::containing(data).max(from);
        Ok(Some(first..Block(end.div_ceil(BLOCK_SIZE as u64))))
    }
}

/// Makes a file of this size if there is none, or one that a crash left without any; it and its name last.
fn make_sized(path: &Path, bytes: u64) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let file = options.write(true).create(true).truncate(false).mode(0o600).open(path)?;
    if file.metadata()?.len() > 0 {
        return Ok(());
    }
    file.set_len(bytes)?;
    file.sync_all()?;
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::{Disk, DiskError, FileDisk};
    use colo_common::{BLOCK_SIZE, Block};
    use std::fs::File;

    #[test]
    fn an_image_that_cannot_be_a_disk_is_refused_with_the_remedy() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("disk.img");
        let open = |read_only| FileDisk::open(&path, read_only);
        assert!(open(false).unwrap_err().to_string().contains("check the path"));
        File::create(&path).unwrap().set_len(4097).unwrap();
        assert!(open(false).unwrap_err().to_string().contains("truncate -s"));
        File::options().write(true).open(&path).unwrap().set_len(8192).unwrap();
        let first = open(false).unwrap();
        assert!(matches!(open(false).unwrap_err(), DiskError::Locked { .. }));
        assert!(matches!(open(true).unwrap_err(), DiskError::Locked { .. }));
        drop(first);
        let (_a, _b) = (open(true).unwrap(), open(true).unwrap());
        assert!(matches!(open(false).unwrap_err(), DiskError::Locked { .. }));
        assert!(matches!(FileDisk::open(place.path(), true).unwrap_err(), DiskError::Kind { .. }));
        let error = FileDisk::open_sized(&path, 4096, true).unwrap_err();
        assert!(!error.to_string().is_empty());
        let fresh = place.path().join("fresh.img");
        assert!(FileDisk::open_sized(&fresh, 4096, false).is_err());
        assert_eq!(FileDisk::open_sized(&fresh, 4096, true).unwrap().bytes(), 4096);
        // As a crash leaves it right after it was made.
        File::create(&fresh).unwrap();
        assert_eq!(FileDisk::open_sized(&fresh, 4096, true).unwrap().bytes(), 4096);
        let error = FileDisk::open_sized(&fresh, 8192, true).unwrap_err();
        assert!(matches!(error, DiskError::OtherSize { found: 4096, expected: 8192, .. }), "{error}");
    }

    #[test]
    fn holes_are_found_made_and_read_as_zero() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("disk.img");
        let disk = FileDisk::open_sized(&path, 64 << 20, true).unwrap();
        assert_eq!(disk.next_data(Block(0)).unwrap(), None);
        disk.write(Block(256).offset(), &[7; 8 * BLOCK_SIZE]).unwrap();
        let found = disk.next_data(Block(0)).unwrap().unwrap();
        assert!(found.start <= Block(256) && found.end >= Block(264), "{found:?}");
        assert_eq!(disk.next_data(Block(260)).unwrap().unwrap().start, Block(260));
        disk.zero(Block(256)..Block(260), true).unwrap();
        disk.zero(Block(261)..Block(262), false).unwrap();
        let mut bytes = [1; 3 * BLOCK_SIZE];
        disk.read(Block(259).offset(), &mut bytes).unwrap();
        assert_eq!([bytes[0], bytes[BLOCK_SIZE], bytes[2 * BLOCK_SIZE]], [0, 7, 0]);
        assert!(disk.read(64 << 20, &mut [0]).is_err() && disk.write(u64::MAX, &[0]).is_err());
        assert_eq!(disk.next_data(Block(1 << 14)).unwrap(), None);
        disk.flush().unwrap();
    }
}
