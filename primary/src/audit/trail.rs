//! The audit trail on disk: a small RocksDB of its own in the vm's directory. A key is an entry's sequence, big endian; a
//! value is the format, XXH3-64 over the rest, and the entry as `colo.v1.AuditEntry`. Appended in synced batches, so a
//! kill at any instant leaves every batch whole or not there; bounded in number and bytes, the oldest go.

use colo_proto::v1::AuditEntry;
use prost::Message;
use rocksdb::{DB, Direction, ErrorKind, IteratorMode, LogLevel, Options, WriteBatch, WriteOptions};
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use xxhash_rust::xxh3::xxh3_64;

/// Entries that are kept: years of an ordinary vm.
pub const MAX_ENTRIES: usize = 100_000;
/// Bytes of their values: the store of a guest must not run out of room for its diary.
pub const MAX_BYTES: u64 = 32 << 20;
/// Bytes of one value: words are bounded before, so a longer one is none of ours.
const MAX_VALUE: usize = 16 << 10;
/// Version of the values.
const FORMAT: u8 = 1;
/// Format and checksum.
const HEAD: usize = 9;
/// Bytes of unflushed writes, and of the log that a start replays.
const WRITE_BUFFER: usize = 1 << 20;
const LOG_BYTES: u64 = 4 << 20;
/// Files open at once, out of the process' own limit.
const OPEN_FILES: i32 = 16;

const _: () = assert!(MAX_VALUE as u64 * 16 < MAX_BYTES);

/// Why the trail cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TrailError {
    /// The medium fails, or is full.
    #[error("the audit trail in {} cannot be used: {source}; free some space there, and let Colo's user own it", path.display())]
    Engine {
        /// The directory.
        path: PathBuf,
        /// What RocksDB said.
        source: rocksdb::Error,
    },
    /// It is not what was written.
    #[error("the audit trail in {} is damaged: {reason}; keep it aside if it matters, and remove it", path.display())]
    Damaged {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// It was never begun, or has ended.
    #[error("there is no audit trail in {}: this node has kept none for the vm, or is ending", path.display())]
    Missing {
        /// The directory.
        path: PathBuf,
    },
}

/// What is kept, by number.
#[derive(Debug, Default)]
struct Kept {
    /// The oldest one's sequence; that of the next if there is none.
    first: u64,
    /// Bytes of each value.
    sizes: VecDeque<u64>,
    bytes: u64,
}

impl Kept {
    fn next(&self) -> u64 {
        self.first + self.sizes.len() as u64
    }
}

/// The trail.
pub struct Trail {
    db: DB,
    path: PathBuf,
    kept: Mutex<Kept>,
    most: (usize, u64),
}

impl Trail {
    /// Opens what is there, or begins one. Everything is read and checked.
    ///
    /// # Errors
    /// It is damaged, or the medium fails.
    pub fn open(path: &Path) -> Result<Self, TrailError> {
        Self::with(path, DB::open(&options(true), path))
    }

    /// Opens it to be read, for a node that does not run.
    ///
    /// # Errors
    /// There is none, it is damaged, or the medium fails.
    pub fn open_to_read(path: &Path) -> Result<Self, TrailError> {
        if !path.join("CURRENT").exists() {
            return Err(TrailError::Missing { path: path.to_owned() });
        }
        Self::with(path, DB::open_for_read_only(&options(false), path, false))
    }

    /// Opens what is there. What is damaged is set aside, where the next that is damaged takes its place, and a new trail
    /// begun; answers what was wrong then.
    ///
    /// # Errors
    /// The medium fails.
    pub fn open_or_set_aside(path: &Path) -> Result<(Self, Option<String>), TrailError> {
        let (error, aside) = match Self::open(path) {
            Ok(trail) => return Ok((trail, None)),
            Err(error @ TrailError::Damaged { .. }) => (error, path.with_extension("damaged")),
            Err(error) => return Err(error),
        };
        let failed = |e: std::io::Error| TrailError::Damaged {
            path: path.to_owned(),
            reason: format!("{error}, and it cannot be set aside: {e}"),
        };
        if aside.exists() {
            std::fs::remove_dir_all(&aside).map_err(failed)?;
        }
        std::fs::rename(path, &aside).map_err(failed)?;
        Ok((Self::open(path)?, Some(format!("{error}; it is set aside as {}", aside.display()))))
    }

    fn with(path: &Path, opened: Result<DB, rocksdb::Error>) -> Result<Self, TrailError> {
        let db = opened.map_err(|source| error(path, source))?;
        let (kept, path, most) = (Mutex::default(), path.to_owned(), (MAX_ENTRIES, MAX_BYTES));
        let trail = Self { db, path, kept, most };
        let mut kept = Kept { first: 1, ..Kept::default() };
        for found in trail.scan(0) {
            let (entry, size) = found?;
            if kept.sizes.is_empty() {
                kept.first = entry.sequence;
            } else if entry.sequence != kept.next() {
                return Err(trail.damaged(format!("{} follows {}", entry.sequence, kept.next() - 1)));
            }
            kept.sizes.push_back(size);
            kept.bytes += size;
        }
        *trail.kept() = kept;
        Ok(trail)
    }

    /// Keeps fewer, for tests.
    #[must_use]
    pub fn bounded(mut self, entries: usize, bytes: u64) -> Self {
        self.most = (entries, bytes);
        self
    }

    /// Appends entries, numbers them, and removes the oldest that are too many; all of it, synced, or nothing.
    ///
    /// # Errors
    /// The medium fails.
    pub fn append(&self, entries: &mut [AuditEntry]) -> Result<(), TrailError> {
        let mut kept = self.kept();
        let (mut batch, mut next, mut sizes) = (WriteBatch::default(), kept.next(), Vec::new());
        for entry in entries.iter_mut() {
            entry.sequence = next;
            let value = encode(entry);
            sizes.push(value.len() as u64);
            batch.put(next.to_be_bytes(), value);
            next += 1;
        }
        let mut bytes = kept.bytes + sizes.iter().sum::<u64>();
        let (all, mut gone) = (kept.sizes.len() + sizes.len(), 0);
        for size in kept.sizes.iter().chain(&sizes) {
            if all - gone <= self.most.0 && bytes <= self.most.1 {
                break;
            }
            batch.delete((kept.first + gone as u64).to_be_bytes());
            (gone, bytes) = (gone + 1, bytes - size);
        }
        let mut synced = WriteOptions::default();
        synced.set_sync(true);
        self.db.write_opt(batch, &synced).map_err(|source| error(&self.path, source))?;
        kept.sizes.extend(sizes);
        kept.sizes.drain(..gone);
        (kept.first, kept.bytes) = (kept.first + gone as u64, bytes);
        Ok(())
    }

    /// Entries from this sequence on, so many at most.
    ///
    /// # Errors
    /// One is damaged, or the medium fails.
    pub fn read(&self, from: u64, most: usize) -> Result<Vec<AuditEntry>, TrailError> {
        self.scan(from).take(most).map(|found| found.map(|(entry, _)| entry)).collect()
    }

    /// The newest entry, if there is one.
    ///
    /// # Errors
    /// It cannot be read, or is damaged.
    pub fn newest(&self) -> Result<Option<AuditEntry>, TrailError> {
        let Some(last) = self.range().1.checked_sub(1) else { return Ok(None) };
        Ok(self.read(last, 1)?.pop())
    }

    /// The sequences of the oldest that is kept, and of the next that comes.
    pub fn range(&self) -> (u64, u64) {
        let kept = self.kept();
        (kept.first, kept.next())
    }

    fn scan(&self, from: u64) -> impl Iterator<Item = Result<(AuditEntry, u64), TrailError>> + '_ {
        let from = from.to_be_bytes();
        self.db.iterator(IteratorMode::From(&from, Direction::Forward)).map(|found| {
            let (key, value) = found.map_err(|source| error(&self.path, source))?;
            let entry = decode(&value).map_err(|reason| self.damaged(reason))?;
            if *key != entry.sequence.to_be_bytes() {
                return Err(self.damaged(format!("entry {} stands at another's place", entry.sequence)));
            }
            Ok((entry, value.len() as u64))
        })
    }

    fn damaged(&self, reason: String) -> TrailError {
        TrailError::Damaged { path: self.path.clone(), reason }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn encode(entry: &AuditEntry) -> Vec<u8> {
    let body = entry.encode_to_vec();
    let mut value = Vec::with_capacity(HEAD + body.len());
    value.push(FORMAT);
    value.extend(xxh3_64(&body).to_le_bytes());
    value.extend(body);
    assert!(value.len() <= MAX_VALUE, "an entry of {} bytes: its words are bounded before", value.len());
    value
}

fn decode(value: &[u8]) -> Result<AuditEntry, String> {
    if value.len() < HEAD || value.len() > MAX_VALUE {
        return Err(format!("an entry has {} bytes", value.len()));
    }
    let ((head, body), format) = (value.split_at(HEAD), value[0]);
    if format != FORMAT {
        return Err(format!("an entry has format {format}, and this Colo reads {FORMAT}"));
    }
    if head[1..] != xxh3_64(body).to_le_bytes() {
        return Err("an entry does not match its checksum".to_owned());
    }
    AuditEntry::decode(body).map_err(|e| format!("an entry cannot be read: {e}"))
}

fn options(create: bool) -> Options {
    let mut options = Options::default();
    options.create_if_missing(create);
    options.set_write_buffer_size(WRITE_BUFFER);
    options.set_max_total_wal_size(LOG_BYTES);
    options.set_max_open_files(OPEN_FILES);
    options.set_keep_log_file_num(1);
    options.set_max_log_file_size(WRITE_BUFFER);
    options.set_log_level(LogLevel::Warn);
    options.set_paranoid_checks(true);
    options
}

/// Damage is told from a medium that fails: what is whole must not be set aside for want of room.
fn error(path: &Path, source: rocksdb::Error) -> TrailError {
    let path = path.to_owned();
    let missing = || source.as_ref().contains("No such file");
    match source.kind() {
        ErrorKind::Corruption => TrailError::Damaged { path, reason: source.into_string() },
        ErrorKind::IOError if missing() => TrailError::Damaged { path, reason: source.into_string() },
        _ => TrailError::Engine { path, source },
    }
}

#[cfg(test)]
mod tests {
    use super::{FORMAT, Trail, TrailError, decode, encode};
    use colo_proto::v1::AuditEntry;
    use std::fs;
    use std::path::{Path, PathBuf};

    fn entry(what: &str) -> AuditEntry {
        AuditEntry { what: what.to_owned(), ..AuditEntry::default() }
    }

    fn place() -> (tempfile::TempDir, PathBuf) {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("audit");
        (place, path)
    }

    fn words(trail: &Trail, from: u64) -> Vec<(u64, String)> {
        trail.read(from, 1000).unwrap().into_iter().map(|entry| (entry.sequence, entry.what)).collect()
    }

    #[test]
    fn what_is_appended_is_numbered_and_read_again() {
        let (_place, path) = place();
        assert!(matches!(Trail::open_to_read(&path), Err(TrailError::Missing { .. })));
        let trail = Trail::open(&path).unwrap();
        trail.append(&mut [entry("a"), entry("b")]).unwrap();
        trail.append(&mut [entry("c")]).unwrap();
        assert_eq!(trail.range(), (1, 4));
        drop(trail);
        let trail = Trail::open(&path).unwrap();
        trail.append(&mut [entry("d")]).unwrap();
        assert_eq!(words(&trail, 3), [(3, "c".to_owned()), (4, "d".to_owned())]);
        drop(trail);
        let trail = Trail::open_to_read(&path).unwrap();
        assert_eq!(trail.range(), (1, 5));
        assert_eq!(trail.read(0, 2).unwrap().len(), 2);
    }

    #[test]
    fn the_oldest_go() {
        let (_place, path) = place();
        let trail = Trail::open(&path).unwrap().bounded(3, 1 << 20);
        for n in 0..10 {
            trail.append(&mut [entry(&n.to_string())]).unwrap();
        }
        assert_eq!(trail.range(), (8, 11));
        assert_eq!(words(&trail, 0).len(), 3);
        trail.append(&mut ["x", "y", "z", "w"].map(entry)).unwrap();
        assert_eq!(words(&trail, 0), [(12, "y"), (13, "z"), (14, "w")].map(|(n, w)| (n, w.to_owned())));
        drop(trail);
        // By bytes: each of these is some hundred.
        let trail = Trail::open(&path).unwrap().bounded(100, 400);
        for _ in 0..5 {
            trail.append(&mut [entry(&"long ".repeat(20))]).unwrap();
        }
        assert_eq!(words(&trail, 0).len(), 3);
        drop(trail);
        let trail = Trail::open(&path).unwrap();
        assert_eq!(trail.range(), (17, 20), "what is gone stays gone");
    }

    #[test]
    fn a_value_that_is_not_as_it_was_is_refused() {
        let good = encode(&AuditEntry { sequence: 7, ..entry("words") });
        assert_eq!(decode(&good).unwrap().sequence, 7);
        for bit in 0..good.len() * 8 {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&bytes).is_err(), "bit {bit}");
        }
        assert!(decode(&[FORMAT; 3]).is_err() && decode(&[]).is_err());
    }

    /// Overwrites the middle of every file of this kind.
    fn damage(path: &Path, kind: &str) {
        for file in fs::read_dir(path).unwrap().map(|file| file.unwrap().path()) {
            if file.to_string_lossy().ends_with(kind) {
                let mut bytes = fs::read(&file).unwrap();
                let middle = bytes.len() / 2;
                bytes[middle..].iter_mut().take(16).for_each(|byte| *byte ^= 0xa5);
                fs::write(&file, bytes).unwrap();
            }
        }
    }

    #[test]
    fn what_is_damaged_is_set_aside() {
        let (place, path) = place();
        for round in 0..2 {
            let trail = Trail::open(&path).unwrap();
            trail.append(&mut [entry("a"), entry("b")]).unwrap();
            trail.db.flush().unwrap();
            drop(trail);
            damage(&path, ".sst");
            assert!(matches!(Trail::open(&path), Err(TrailError::Damaged { .. })), "round {round}");
            let (trail, why) = Trail::open_or_set_aside(&path).unwrap();
            let why = why.unwrap();
            assert!(why.contains("is damaged") && why.contains("audit.damaged"), "{why}");
            assert_eq!(trail.range(), (1, 1));
            assert!(place.path().join("audit.damaged").exists());
        }
        // A file in its place is no damage, and not ours to move.
        fs::remove_dir_all(&path).unwrap();
        fs::write(&path, "something").unwrap();
        assert!(matches!(Trail::open_or_set_aside(&path), Err(TrailError::Engine { .. })));
    }
}
