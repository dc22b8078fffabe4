//! What the store needs of the thing that keeps its bytes: ordered keys in columns, atomic batches, a sync. Two do
//! it: RocksDB, and a memory that forgets in a crash what was not synced.

use super::error::StoreError;

/// A set of keys of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Column {
    /// What the store is and which point it holds.
    Meta,
    /// Per persisted point its digest and machine state.
    Epochs,
    /// The image.
    Pages,
    /// Blocks of the disk that are newer than its image file.
    Disk,
    /// What a mark brings that is too large for one batch.
    Pending,
    /// What operators and roles did.
    Audit,
}

impl Column {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Meta, Self::Epochs, Self::Pages, Self::Disk, Self::Pending, Self::Audit];

    /// Its name on disk.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Meta => "meta",
            Self::Epochs => "epochs",
            Self::Pages => "pages",
            Self::Disk => "disk",
            Self::Pending => "pending",
            Self::Audit => "audit",
        }
    }
}

/// One change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Sets a key.
    Put(Column, Vec<u8>, Vec<u8>),
    /// Removes a key, if it is there.
    Delete(Column, Vec<u8>),
    /// Removes every key of a column.
    Clear(Column),
}

/// Changes that happen together or not at all, in this order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    changes: Vec<Change>,
    bytes: usize,
}

impl Batch {
    /// Adds a change.
    pub fn push(&mut self, change: Change) {
        self.bytes += size_of::<Change>();
        self.bytes += match &change {
            Change::Put(_, key, value) => key.len() + value.len(),
            Change::Delete(_, key) => key.len(),
            Change::Clear(_) => 0,
        };
        self.changes.push(change);
    }

    /// The changes in their order.
    pub fn changes(&self) -> &[Change] {
        &self.changes
    }

    /// Bytes that it takes in memory, about.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }
}

/// Whether a write may be lost in a crash of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// It may, with all that were written after it; never without those.
    Unsynced,
    /// It is on the medium when the call returns, and all that were written before it.
    Synced,
}

/// A key and its value.
pub type KeyValue = (Box<[u8]>, Box<[u8]>);

/// Keys and values, ascending.
pub type Scan<'a> = Box<dyn Iterator<Item = Result<KeyValue, StoreError>> + 'a>;

/// Keeps ordered bytes. A crash leaves the synced batches and a prefix of those after them, each whole.
pub trait PageStore: Send + Sync {
    /// Does all changes of the batch, or none.
    ///
    /// # Errors
    /// The medium is full or fails; whether the batch is found at the next opening is then open.
    fn write(&self, batch: &Batch, durability: Durability) -> Result<(), StoreError>;

    /// The value of a key.
    ///
    /// # Errors
    /// It cannot be read.
    fn get(&self, column: Column, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError>;

    /// Everything of a column from a key on, as it is now. The values are not verified: the store's own checksums
    /// do that, and can name what is damaged.
    fn scan(&self, column: Column, from: &[u8]) -> Scan<'_>;

    /// Keeps everything aside as it is now, if there is room for that; answers whether.
    ///
    /// # Errors
    /// The medium fails.
    fn keep_aside(&self) -> Result<bool, StoreError>;

    /// Whether there is room for keeping what is aside beside what is here.
    fn has_room(&self) -> bool;

    /// Forgets what was kept aside, if anything was.
    ///
    /// # Errors
    /// The medium fails.
    fn drop_aside(&self) -> Result<(), StoreError>;

    /// Gives the room of a column that was cleared back to the medium. May take long.
    ///
    /// # Errors
    /// The medium fails.
    fn reclaim(&self, column: Column) -> Result<(), StoreError>;
}
