//! The store's bytes in RocksDB, and how it is set: values of a page each, written in large batches, scanned whole,
//! looked up rarely.

use rocksdb::checkpoint::Checkpoint;
use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, DBCompressionType, DBRecoveryMode,
    Direction, ErrorKind, IteratorMode, LogLevel, Options, ReadOptions, WriteBatch, WriteOptions,
};
use std::path::Path;

use super::engine::{Batch, Change, Column, Durability, PageStore, Scan};
use super::error::StoreError;
use super::home::Home;

/// Memory of unflushed writes, over all columns. A flush of 64 MiB is one large sequential write; two more may wait.
const WRITE_BUFFERS: usize = 192 << 20;
const PAGES_BUFFER: usize = 64 << 20;
/// For the columns that hold little.
const SMALL_BUFFER: usize = 4 << 20;
/// Memory of read blocks: index blocks of what is scanned; the pages themselves are read once and not cached.
const BLOCK_CACHE: usize = 32 << 20;
/// Four pages to a block: a scan reads everything anyway, a lookup reads no more than 20 KiB.
const BLOCK_BYTES: usize = 16 << 10;
/// Files of the image. With 64 MiB each, 16384 of them hold the largest guest.
const FILE_BYTES: u64 = 64 << 20;
/// Files open at once, out of the process' own limit (1024 by default), which sockets share.
const OPEN_FILES: i32 = 256;
/// The log that a restart has to replay; more makes a small column flush.
const LOG_BYTES: u64 = 256 << 20;
/// How far a scan reads ahead, and how much is handed to the device at a time.
const READ_AHEAD: usize = 2 << 20;
const WRITE_BEHIND: u64 = 1 << 20;
/// RocksDB's own diary: enough to see why it stalled, no more.
const DIARY_BYTES: usize = 1 << 20;
const DIARIES: usize = 2;
/// A flush and a compaction at once.
const BACKGROUND_JOBS: i32 = 2;
/// Above every key: keys are at most 25 bytes.
const BEYOND: [u8; 32] = [0xff; 32];

/// RocksDB in a locked directory.
pub(super) struct Rocks {
    /// Closed before the lock is given up.
    db: DB,
    home: Home,
}

impl Rocks {
    /// Opens what is there; makes it only if `create`.
    pub(super) fn open(home: Home, create: bool) -> Result<Self, StoreError> {
        let path = home.current();
        let cache = Cache::new_lru_cache(BLOCK_CACHE);
        let columns = Column::ALL
            .into_iter()
            .map(|column| ColumnFamilyDescriptor::new(column.name(), column_options(column, &cache)));
        let columns: Vec<_> = columns.collect();
        match DB::open_cf_descriptors(&options(create), &path, columns) {
            Ok(db) => Ok(Self { db, home }),
            Err(error) => Err(opening_error(home.dir(), &error)),
        }
    }

    /// The directory that it is in.
    pub(super) fn home(&self) -> &Home {
        &self.home
    }

    fn column(&self, column: Column) -> &ColumnFamily {
        self.db.cf_handle(column.name()).expect("every column was opened")
    }

    fn error(&self, error: &rocksdb::Error) -> StoreError {
        engine_error(self.home.dir(), error)
    }
}

impl PageStore for Rocks {
    fn write(&self, batch: &Batch, durability: Durability) -> Result<(), StoreError> {
        let mut writes = WriteBatch::with_capacity_bytes(batch.bytes());
        for change in batch.changes() {
            match change {
                Change::Put(column, key, value) => writes.put_cf(self.column(*column), key, value),
                Change::Delete(column, key) => writes.delete_cf(self.column(*column), key),
                Change::Clear(column) => {
                    writes.delete_range_cf(self.column(*column), [].as_slice(), BEYOND.as_slice());
                }
            }
        }
        let mut options = WriteOptions::default();
        options.set_sync(durability == Durability::Synced);
        self.db.write_opt(writes, &options).map_err(|error| self.error(&error))
    }

    fn get(&self, column: Column, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.db.get_cf(self.column(column), key).map_err(|error| self.error(&error))
    }

    fn scan(&self, column: Column, from: &[u8]) -> Scan<'_> {
        let mut options = ReadOptions::default();
        options.fill_cache(false);
        options.set_readahead_size(READ_AHEAD);
        // The store has a checksum for each page: RocksDB's, of a block, could not say which page is damaged.
        options.set_verify_checksums(false);
        let mode = IteratorMode::From(from, Direction::Forward);
        let entries = self.db.iterator_cf_opt(self.column(column), options, mode);
        Box::new(entries.map(|entry| entry.map_err(|error| self.error(&error))))
    }

    fn keep_aside(&self) -> Result<bool, StoreError> {
        self.home.drop_aside()?;
        if !self.has_room() {
            return Ok(false);
        }
        let made = Checkpoint::new(&self.db).and_then(|at| at.create_checkpoint(self.home.previous()));
        match made.map_err(|error| self.error(&error)) {
            Ok(()) => Ok(true),
            Err(StoreError::NoSpace { .. }) => self.home.drop_aside().map(|()| false),
            Err(error) => Err(error),
        }
    }

    fn has_room(&self) -> bool {
        let size = |column| {
            let files = self.db.property_int_value_cf(self.column(column), "rocksdb.live-sst-files-size");
            files.ok().flatten().unwrap_or(0)
        };
        let needed: u64 = [Column::Pages, Column::Disk, Column::Pending].into_iter().map(size).sum();
        colo_vmm::host::disk_free(self.home.dir()).is_none_or(|free| free > needed)
    }

    fn drop_aside(&self) -> Result<(), StoreError> {
        self.home.drop_aside()
    }

    fn reclaim(&self, column: Column) -> Result<(), StoreError> {
        let column = self.column(column);
        self.db.compact_range_cf(column, None::<&[u8]>, None::<&[u8]>);
        Ok(())
    }
}

fn options(create: bool) -> Options {
    let mut options = Options::default();
    options.create_if_missing(create);
    options.create_missing_column_families(create);
    // A prefix of what was written, whatever the crash left of the log behind it.
    options.set_wal_recovery_mode(DBRecoveryMode::PointInTime);
    options.set_max_total_wal_size(LOG_BYTES);
    options.set_db_write_buffer_size(WRITE_BUFFERS);
    options.set_max_open_files(OPEN_FILES);
    options.set_max_background_jobs(BACKGROUND_JOBS);
    options.set_bytes_per_sync(WRITE_BEHIND);
    options.set_wal_bytes_per_sync(WRITE_BEHIND);
    // Written with write(2) only: a mapped file's errors would be signals.
    options.set_allow_mmap_writes(false);
    options.set_allow_mmap_reads(false);
    options.set_log_level(LogLevel::Warn);
    options.set_max_log_file_size(DIARY_BYTES);
    options.set_keep_log_file_num(DIARIES);
    options.set_stats_dump_period_sec(0);
    options.set_stats_persist_period_sec(0);
    options
}

fn column_options(column: Column, cache: &Cache) -> Options {
    let mut blocks = BlockBasedOptions::default();
    blocks.set_block_size(BLOCK_BYTES);
    blocks.set_block_cache(cache);
    blocks.set_cache_index_and_filter_blocks(true);
    let mut options = Options::default();
    options.set_block_based_table_factory(&blocks);
    options.set_compression_type(DBCompressionType::None);
    options.set_write_buffer_size(match column {
        Column::Pages | Column::Pending => PAGES_BUFFER,
        _ => SMALL_BUFFER,
    });
    options.set_max_write_buffer_number(3);
    options.set_target_file_size_base(FILE_BYTES);
    options.set_max_bytes_for_level_base(4 * FILE_BYTES);
    options.set_level_compaction_dynamic_level_bytes(true);
    options
}

fn opening_error(dir: &Path, error: &rocksdb::Error) -> StoreError {
    match error.kind() {
        // Of a store that was made: its file CURRENT or a column is gone.
        ErrorKind::InvalidArgument | ErrorKind::NotFound => {
            StoreError::Damaged { dir: dir.to_owned(), what: first_line(error) }
        }
        // Another file is.
        ErrorKind::IOError if first_line(error).contains("No such file or directory") => {
            StoreError::Damaged { dir: dir.to_owned(), what: first_line(error) }
        }
        _ => engine_error(dir, error),
    }
}

fn engine_error(dir: &Path, error: &rocksdb::Error) -> StoreError {
    let (dir, reason) = (dir.to_owned(), first_line(error));
    // RocksDB tells the cause in words only; these are its own and the system's.
    if reason.contains("No space left on device") || reason.contains("Disk quota exceeded") {
        StoreError::NoSpace { dir }
    } else if error.kind() == ErrorKind::Corruption {
        StoreError::Damaged { dir, what: reason }
    } else {
        StoreError::Engine { dir, reason }
    }
}

fn first_line(error: &rocksdb::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
