//! A part of the table: the epochs of neighbouring pages.

use std::ops::Range;

use crate::dirty_set::Bits;

/// Entries of one chunk: 2 MiB of guest memory. Larger ones would make marking a page slower, smaller ones the index larger.
pub(super) const CHUNK_ENTRIES: u64 = 512;
pub(super) const WORDS: usize = (CHUNK_ENTRIES / 64) as usize;

enum Values {
    /// All have this one; 0 if none was dirty since the base.
    Same(u32),
    Each(Box<Each>),
}

pub(super) struct Chunk {
    pub(super) number: u32,
    /// The greatest of its values.
    pub(super) newest: u32,
    values: Values,
}

impl Chunk {
    pub(super) fn new(number: u32) -> Self {
        Self { number, newest: 0, values: Values::Same(0) }
    }

    /// Bytes that it has beside itself.
    pub(super) fn bytes(&self) -> usize {
        match &self.values {
            Values::Same(_) => 0,
            Values::Each(each) => size_of::<Each>() + each.epochs.capacity() * size_of::<u32>(),
        }
    }

    fn each(&mut self) -> &mut Each {
        if let Values::Same(value) = self.values {
            let (dirty, epochs) = match value {
                0 => ([0; WORDS], Vec::new()),
                value => ([u64::MAX; WORDS], vec![value; CHUNK_ENTRIES as usize]),
            };
            self.values = Values::Each(Box::new(Each { dirty, epochs }));
        }
        match &mut self.values {
            Values::Each(each) => each,
            Values::Same(_) => unreachable!("it was replaced above"),
        }
    }

    /// A part of it is dirty. An epoch that comes late hides no newer one.
    pub(super) fn mark_part(&mut self, part: Range<u64>, value: u32) {
        if part == (0..CHUNK_ENTRIES) && value >= self.newest {
            self.values = Values::Same(value);
        } else {
            for word in part.start / 64..part.end.div_ceil(64) {
                let (from, to) = (part.start.max(word * 64), part.end.min(word * 64 + 64));
                let bits = u64::MAX >> (64 - (to - from)) << (from - word * 64);
                self.each().mark(word as usize, bits, value);
            }
        }
        self.newest = value.max(self.newest);
    }

    pub(super) fn mark_word(&mut self, word: usize, bits: u64, value: u32) {
        self.each().mark(word, bits, value);
        self.newest = value.max(self.newest);
    }

    /// The entries of a word that are newer than `than`, as bits.
    pub(super) fn newer(&self, word: usize, than: u32) -> u64 {
        match &self.values {
            Values::Same(value) => {
                if *value > than {
                    u64::MAX
                } else {
                    0
                }
            }
            Values::Each(each) => each.newer(word, than),
        }
    }

    /// Counts from a later base; what is not after it is forgotten.
    pub(super) fn rebase(&mut self, by: u32) {
        self.newest = self.newest.saturating_sub(by);
        match &mut self.values {
            Values::Same(value) => *value = value.saturating_sub(by),
            // An entry of 0 stays, as one that was not dirty.
            Values::Each(each) => {
                each.epochs.iter_mut().for_each(|entry| *entry = entry.saturating_sub(by));
            }
        }
    }
}

/// Entries of a chunk that were dirty, each with its epoch, counted from the base.
pub(super) struct Each {
    dirty: [u64; WORDS],
    /// One for each bit of `dirty`, in the same order.
    epochs: Vec<u32>,
}

impl Each {
    /// The place in `epochs` of the first entry of a word.
    fn place(&self, word: usize) -> usize {
        self.dirty[..word].iter().map(|bits| bits.count_ones() as usize).sum()
    }

    fn mark(&mut self, word: usize, bits: u64, value: u32) {
        let (at, before) = (self.place(word), self.dirty[word]);
        let all = before | bits;
        if all != before {
            self.make_room(word, at, all);
        }
        if all == bits {
            let entries = &mut self.epochs[at..at + all.count_ones() as usize];
            return entries.iter_mut().for_each(|entry| *entry = value.max(*entry));
        }
        for bit in Bits(bits) {
            let entry = &mut self.epochs[at + (all & ((1 << bit) - 1)).count_ones() as usize];
            *entry = value.max(*entry);
        }
    }

    /// Gives each entry of a word its place.
    fn make_room(&mut self, word: usize, at: usize, all: u64) {
        let (mut entries, mut count, mut from) = ([0; 64], 0, at);
        for bit in Bits(all) {
            if self.dirty[word] >> bit & 1 == 1 {
                entries[count] = self.epochs[from];
                from += 1;
            }
            count += 1;
        }
        drop(self.epochs.splice(at..from, entries[..count].iter().copied()));
        self.dirty[word] = all;
    }

    fn newer(&self, word: usize, than: u32) -> u64 {
        let at = self.place(word);
        let entries = Bits(self.dirty[word]).zip(&self.epochs[at..]);
        entries.fold(0, |bits, (bit, entry)| bits | u64::from(*entry > than) << bit)
    }
}
