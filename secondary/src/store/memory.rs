//! A store's medium in memory, for the simulation: it forgets in a crash what was not synced.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::engine::{Batch, Change, Column, Durability, PageStore, Scan};
use super::error::StoreError;

/// The medium: outlives the process that is simulated. Clones are the same medium.
#[derive(Clone, Debug, Default)]
pub struct MemoryDisk(Arc<Mutex<Medium>>);

#[derive(Debug, Default)]
struct Medium {
    /// What a crash leaves for certain.
    synced: Content,
    /// What was written after that.
    unsynced: Vec<Batch>,
    /// Both together: what is read.
    now: Content,
    /// Counts the crashes; a process of before one can do nothing more.
    life: u64,
    full: bool,
    /// Writes until the process dies.
    dies_after: Option<u64>,
}

#[derive(Clone, Debug, Default)]
struct Content([BTreeMap<Vec<u8>, Vec<u8>>; Column::ALL.len()]);

impl Content {
    fn apply(&mut self, batch: &Batch) {
        for change in batch.changes() {
            match change {
                Change::Put(column, key, value) => {
                    self.0[*column as usize].insert(key.clone(), value.clone());
                }
                Change::Delete(column, key) => {
                    self.0[*column as usize].remove(key);
                }
                Change::Clear(column) => self.0[*column as usize].clear(),
            }
        }
    }
}

impl MemoryDisk {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// The machine crashes: of the batches that were not synced only the first few are left, as many as `seed` says.
    /// Whoever had the medium open can no longer write to it.
    pub fn crash(&self, seed: u64) {
        let mut medium = self.medium();
        let batches = std::mem::take(&mut medium.unsynced);
        let kept = seed as usize % (batches.len() + 1);
        batches[..kept].iter().for_each(|batch| medium.synced.apply(batch));
        medium.now = medium.synced.clone();
        medium.life += 1;
        medium.dies_after = None;
    }

    /// The process dies in the write after the next `writes`: it and all later ones fail, and whether it is found after
    /// the [`crash`](Self::crash) is left to that one's seed.
    pub fn die_after(&self, writes: u64) {
        self.medium().dies_after = Some(writes);
    }

    /// Makes every write fail from now on for want of space, or succeed again.
    pub fn set_full(&self, full: bool) {
        self.medium().full = full;
    }

    /// Flips a bit of a stored value; answers whether there is such a value.
    pub fn flip_bit(&self, column: Column, key: &[u8], bit: usize) -> bool {
        let mut medium = self.medium();
        let mut flipped = false;
        let Medium { synced, now, .. } = &mut *medium;
        for content in [synced, now] {
            let value = content.0[column as usize].get_mut(key);
            if let Some(byte) = value.and_then(|value| value.get_mut(bit / 8)) {
                *byte ^= 1 << (bit % 8);
                flipped = true;
            }
        }
        flipped
    }

    /// Opens it for one process.
    pub(super) fn open(&self) -> MemoryStore {
        MemoryStore { disk: self.clone(), life: self.medium().life }
    }

    fn medium(&self) -> MutexGuard<'_, Medium> {
        // Batches are applied whole before the lock is given up, also by a thread that panics.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A process' hold on the medium.
#[derive(Debug)]
pub(super) struct MemoryStore {
    disk: MemoryDisk,
    life: u64,
}

/// Stands for the directory in messages.
pub(super) fn no_dir() -> PathBuf {
    PathBuf::from("memory")
}

impl PageStore for MemoryStore {
    fn write(&self, batch: &Batch, durability: Durability) -> Result<(), StoreError> {
        let mut medium = self.disk.medium();
        if medium.life != self.life {
            return Err(StoreError::Broken { dir: no_dir() });
        }
        if medium.full {
            return Err(StoreError::NoSpace { dir: no_dir() });
        }
        match &mut medium.dies_after {
            Some(0) => {
                medium.unsynced.push(batch.clone());
                medium.life += 1;
                return Err(StoreError::Broken { dir: no_dir() });
            }
            Some(left) => *left -= 1,
            None => {}
        }
        medium.now.apply(batch);
        medium.unsynced.push(batch.clone());
        if durability == Durability::Synced {
            let batches = std::mem::take(&mut medium.unsynced);
            batches.iter().for_each(|batch| medium.synced.apply(batch));
        }
        Ok(())
    }

    fn get(&self, column: Column, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.disk.medium().now.0[column as usize].get(key).cloned())
    }

    fn scan(&self, column: Column, from: &[u8]) -> Scan<'_> {
        let medium = self.disk.medium();
        let found = medium.now.0[column as usize].range(from.to_vec()..);
        let found: Vec<_> =
            found.map(|(key, value)| Ok((key.clone().into(), value.clone().into()))).collect();
        Box::new(found.into_iter())
    }

    fn keep_aside(&self) -> Result<bool, StoreError> {
        Ok(false)
    }

    fn has_room(&self) -> bool {
        true
    }

    fn drop_aside(&self) -> Result<(), StoreError> {
        Ok(())
    }

    fn reclaim(&self, _column: Column) -> Result<(), StoreError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::MemoryDisk;
    use crate::store::engine::{Batch, Change, Column, Durability, PageStore};

    fn put(key: u8) -> Batch {
        let mut batch = Batch::default();
        batch.push(Change::Put(Column::Pages, vec![key], vec![key]));
        batch
    }

    #[test]
    fn a_crash_leaves_the_synced_batches_and_a_prefix_of_the_rest() {
        let mut lost = 0;
        for seed in 0..16 {
            let disk = MemoryDisk::new();
            let store = disk.open();
            for key in 0..6 {
                let durability = if key == 2 { Durability::Synced } else { Durability::Unsynced };
                store.write(&put(key), durability).unwrap();
            }
            disk.crash(seed);
            assert!(store.write(&put(9), Durability::Synced).is_err(), "a dead process writes");
            let left: Vec<u8> =
                disk.open().scan(Column::Pages, &[]).map(|entry| entry.unwrap().0[0]).collect();
            assert!(
                (3..=6).contains(&left.len()) && left.iter().copied().eq(0..left.len() as u8),
                "{left:?}"
            );
            lost += usize::from(left.len() < 6);
        }
        assert!(lost > 4, "crashes lose nothing");
    }
}
