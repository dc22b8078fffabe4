//! When each page of a guest, or block of its disk, was dirty last: what a copy that comes back at an older point lacks.
//!
//! ```text
//!   cut of epoch E: mark(dirty set, E)        copy at epoch C comes back: since(C) = all that was dirty after C
//! ```
//!
//! Epochs are kept as 32-bit numbers that count from the epoch at which the table began, 4 to 8 bytes for a page that was
//! dirty, in chunks that are made on first use. A chunk of which all has the same epoch, as after a large discard, has one
//! number. The table has a bound; past it, it forgets everything and says so, and then digests decide.

mod chunk;

use colo_common::{Block, Epoch, Gfn};

use crate::block_set::BlockSet;
use crate::dirty_set::DirtySet;
use chunk::{CHUNK_ENTRIES, Chunk, WORDS};

/// Bytes of a table at most: at worst it knows 128 GiB of pages that were dirty. A guest that dirties more between two
/// copies is compared by digests.
pub const MOST_BYTES: usize = 256 << 20;

/// How far back a table looks once epochs no longer fit 32 bits: 1.7 years of 40 epochs a second.
const REBASED: u64 = 1 << 31;

/// The newest epoch in which each page was dirty.
pub struct LastDirty {
    entries: u64,
    /// What is not in the table was not dirty after this one; nothing if the table knows nothing.
    base: Option<Epoch>,
    /// Per chunk of the guest: its place in `chunks` plus one, or 0.
    index: Vec<u32>,
    chunks: Vec<Chunk>,
    /// Bytes that the chunks have beside themselves.
    beside: usize,
    most_bytes: usize,
}

impl LastDirty {
    /// A table that knows nothing, for frames below `frames`.
    pub fn new(frames: u64) -> Self {
        Self::with_bound(frames, MOST_BYTES)
    }

    /// The same with a bound of its own, in bytes.
    pub fn with_bound(frames: u64, most_bytes: usize) -> Self {
        let chunks = usize::try_from(frames.div_ceil(CHUNK_ENTRIES)).expect("frames fit the address space");
        Self {
            entries: frames,
            base: None,
            index: vec![0; chunks],
            chunks: Vec::new(),
            beside: 0,
            most_bytes,
        }
    }

    /// From now on it knows all that is dirty after `epoch`, and nothing of what was before.
    pub fn begin(&mut self, epoch: Epoch) {
        self.forget();
        self.base = Some(epoch);
    }

    /// Knows nothing any more: something was dirty that it was not told of.
    pub fn forget(&mut self) {
        self.chunks.iter().for_each(|chunk| self.index[chunk.number as usize] = 0);
        (self.base, self.chunks, self.beside) = (None, Vec::new(), 0);
    }

    /// The epoch after which it knows everything; nothing if it knows nothing.
    pub fn known_from(&self) -> Option<Epoch> {
        self.base
    }

    /// Bytes that its chunks take.
    pub fn bytes(&self) -> usize {
        self.chunks.len() * size_of::<Chunk>() + self.beside
    }

    /// These pages were dirty in `epoch`.
    ///
    /// # Panics
    /// One of them is not below the table's `frames`, or the epoch is not after [`known_from`](Self::known_from).
    pub fn mark(&mut self, set: &DirtySet, epoch: Epoch) {
        let Some(value) = self.value(epoch) else { return };
        for (first, bits) in set.words() {
            let last = first.0 + u64::from(63 - bits.leading_zeros());
            assert!(last < self.entries, "{} is not below {:#x}", Gfn(last), self.entries);
            let word = (first.0 % CHUNK_ENTRIES / 64) as usize;
            self.change(first.0 / CHUNK_ENTRIES, |chunk| chunk.mark_word(word, bits, value));
        }
        self.check_bound();
    }

    /// `count` pages from `first` on were dirty in `epoch`. Costs what their chunks cost.
    ///
    /// # Panics
    /// As [`mark`](Self::mark).
    pub fn mark_run(&mut self, first: Gfn, count: u64, epoch: Epoch) {
        let Some(value) = self.value(epoch) else { return };
        let (mut at, end) = (first.0, first.0 + count);
        assert!(end <= self.entries, "{} is not below {:#x}", Gfn(end - 1), self.entries);
        while at < end {
            let here = at % CHUNK_ENTRIES;
            let upto = (here + (end - at)).min(CHUNK_ENTRIES);
            self.change(at / CHUNK_ENTRIES, |chunk| chunk.mark_part(here..upto, value));
            at += upto - here;
            // A run may be as long as a disk.
            if self.check_bound() {
                return;
            }
        }
    }

    /// All that was dirty after `epoch`; nothing if that is not known.
    pub fn since(&self, epoch: Epoch) -> Option<DirtySet> {
        let base = self.base.filter(|base| *base <= epoch)?;
        let mut set = DirtySet::new(self.entries);
        let Ok(than) = u32::try_from(epoch.0 - base.0) else { return Some(set) };
        for chunk in self.chunks.iter().filter(|chunk| chunk.newest > than) {
            let first = u64::from(chunk.number) * CHUNK_ENTRIES;
            for word in 0..WORDS {
                let at = first + word as u64 * 64;
                // The last chunk may go beyond the guest.
                let within = self.entries.saturating_sub(at);
                let mask = if within < 64 { (1 << within) - 1 } else { u64::MAX };
                set.insert_word(Gfn(at), chunk.newer(word, than) & mask);
            }
        }
        Some(set)
    }

    /// What is kept for an epoch; nothing if nothing is kept.
    fn value(&mut self, epoch: Epoch) -> Option<u32> {
        let base = self.base?;
        assert!(epoch > base, "{epoch} is not after {base}");
        if let Ok(value) = u32::try_from(epoch.0 - base.0) {
            return Some(value);
        }
        let new = Epoch(epoch.0 - REBASED);
        let by = u32::try_from(new.0 - base.0).unwrap_or(u32::MAX);
        self.chunks.iter_mut().for_each(|chunk| chunk.rebase(by));
        self.base = Some(new);
        Some(REBASED as u32)
    }

    /// Whether it had to forget everything, because it has become too large.
    fn check_bound(&mut self) -> bool {
        let bytes = self.bytes();
        if bytes <= self.most_bytes {
            return false;
        }
        tracing::warn!(
            bytes,
            "too much was dirty at times too different to be kept: a copy that comes back is compared by digests"
        );
        self.forget();
        true
    }

    fn change(&mut self, number: u64, change: impl FnOnce(&mut Chunk)) {
        let place = &mut self.index[number as usize];
        if *place == 0 {
            self.chunks.push(Chunk::new(number as u32));
            *place = self.chunks.len() as u32;
        }
        let chunk = &mut self.chunks[*place as usize - 1];
        let before = chunk.bytes();
        change(chunk);
        self.beside = self.beside + chunk.bytes() - before;
    }
}

impl std::fmt::Debug for LastDirty {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LastDirty(from {:?}, {} chunks)", self.base, self.chunks.len())
    }
}

/// The newest epoch in which each block of a disk was dirty: a [`LastDirty`] that counts blocks.
#[derive(Debug)]
pub struct LastDirtyBlocks(LastDirty);

impl LastDirtyBlocks {
    /// A table that knows nothing, for blocks below number `blocks`.
    pub fn new(blocks: u64) -> Self {
        Self(LastDirty::new(blocks))
    }

    /// As [`LastDirty::begin`].
    pub fn begin(&mut self, epoch: Epoch) {
        self.0.begin(epoch);
    }

    /// As [`LastDirty::forget`].
    pub fn forget(&mut self) {
        self.0.forget();
    }

    /// As [`LastDirty::known_from`].
    pub fn known_from(&self) -> Option<Epoch> {
        self.0.known_from()
    }

    /// As [`LastDirty::bytes`].
    pub fn bytes(&self) -> usize {
        self.0.bytes()
    }

    /// These blocks were dirty in `epoch`.
    ///
    /// # Panics
    /// As [`LastDirty::mark`].
    pub fn mark(&mut self, set: &BlockSet, epoch: Epoch) {
        self.0.mark(set.as_dirty_set(), epoch);
    }

    /// `count` blocks from `first` on were dirty in `epoch`.
    ///
    /// # Panics
    /// As [`LastDirty::mark`].
    pub fn mark_run(&mut self, first: Block, count: u64, epoch: Epoch) {
        self.0.mark_run(Gfn(first.0), count, epoch);
    }

    /// All that was dirty after `epoch`; nothing if that is not known.
    pub fn since(&self, epoch: Epoch) -> Option<BlockSet> {
        self.0.since(epoch).map(BlockSet::from_dirty_set)
    }
}

#[cfg(test)]
mod tests;
