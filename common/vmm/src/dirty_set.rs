//! A set of guest frames that costs what is in it, not what the guest has: the dirty set of an epoch.
//!
//! Two levels: an index with one small number per 16 MiB of guest memory, of which only touched parts ever
//! become resident, and one 4096-bit chunk for each 16 MiB that holds a frame of the set. Clearing and
//! iterating visit the chunks in use and nothing else.

use colo_common::Gfn;

/// Frames of one chunk: 16 MiB of guest memory in 512 bytes of bits.
const CHUNK_FRAMES: u64 = 4096;
const WORDS: usize = (CHUNK_FRAMES / 64) as usize;
const _: () = assert!(WORDS == 64, "`Chunk::used` has a bit for each word");

#[derive(Clone)]
struct Chunk {
    number: u32,
    /// Which words are not 0.
    used: u64,
    words: [u64; WORDS],
}

impl Chunk {
    /// Adds bits to a word; tells which are new.
    fn add(&mut self, word: usize, bits: u64) -> u64 {
        let new = bits & !self.words[word];
        self.words[word] |= bits;
        self.used |= u64::from(bits != 0) << word;
        new
    }

    /// The words that are not 0, ascending: (first frame, bits).
    fn used_words(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let first = u64::from(self.number) * CHUNK_FRAMES;
        Bits(self.used).map(move |word| (first + word * 64, self.words[word as usize]))
    }
}

/// Frames dirtied since some instant; ordered, without duplicates.
#[derive(Clone)]
pub struct DirtySet {
    frames: u64,
    /// Per chunk of the guest: its place in `chunks` plus one, or 0.
    index: Vec<u32>,
    chunks: Vec<Chunk>,
    len: u64,
}

impl DirtySet {
    /// An empty set for frames below `frames`. The index is allocated zeroed and stays untouched until used.
    pub fn new(frames: u64) -> Self {
        let chunks = usize::try_from(frames.div_ceil(CHUNK_FRAMES)).expect("frames fit the address space");
        Self { frames, index: vec![0; chunks], chunks: Vec::new(), len: 0 }
    }

    /// The exclusive upper bound of the frames that it can hold.
    pub fn frames(&self) -> u64 {
        self.frames
    }

    /// Number of frames in the set.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds a frame; tells whether it is new.
    ///
    /// # Panics
    /// `gfn` is not below [`frames`](Self::frames): whoever takes numbers from outside checks them first.
    pub fn insert(&mut self, gfn: Gfn) -> bool {
        assert!(gfn.0 < self.frames, "{gfn} is not below {:#x}", self.frames);
        let (number, bit) = (gfn.0 / CHUNK_FRAMES, gfn.0 % CHUNK_FRAMES);
        let new = self.chunk_mut(number as usize).add((bit / 64) as usize, 1 << (bit % 64)) != 0;
        self.len += u64::from(new);
        new
    }

    /// Adds `count` frames from `first` on.
    ///
    /// # Panics
    /// As [`insert`](Self::insert).
    pub fn insert_range(&mut self, first: Gfn, count: u64) {
        for gfn in first.0..first.0 + count {
            self.insert(Gfn(gfn));
        }
    }

    /// Adds the frames `first + i` for every set bit `i` of `bits`.
    ///
    /// # Panics
    /// As [`insert`](Self::insert), and if `first` is not a multiple of 64.
    pub fn insert_word(&mut self, first: Gfn, bits: u64) {
        assert!(first.0.is_multiple_of(64), "{first} does not begin a word");
        if bits == 0 {
            return;
        }
        let last = first.0 + u64::from(63 - bits.leading_zeros());
        assert!(last < self.frames, "{} is not below {:#x}", Gfn(last), self.frames);
        let place = ((first.0 % CHUNK_FRAMES) / 64) as usize;
        let new = self.chunk_mut((first.0 / CHUNK_FRAMES) as usize).add(place, bits);
        self.len += u64::from(new.count_ones());
    }

    /// Takes a frame out; tells whether it was in.
    pub fn remove(&mut self, gfn: Gfn) -> bool {
        let place = self.index.get((gfn.0 / CHUNK_FRAMES) as usize).copied().unwrap_or(0);
        let Some(chunk) = place.checked_sub(1).map(|place| &mut self.chunks[place as usize]) else {
            return false;
        };
        let (word, bit) = ((gfn.0 % CHUNK_FRAMES / 64) as usize, 1 << (gfn.0 % 64));
        let had = chunk.words[word] & bit != 0;
        chunk.words[word] &= !bit;
        chunk.used &= !(u64::from(chunk.words[word] == 0) << word);
        self.len -= u64::from(had);
        had
    }

    /// Whether the frame is in the set.
    pub fn contains(&self, gfn: Gfn) -> bool {
        let place = self.index.get((gfn.0 / CHUNK_FRAMES) as usize).copied().unwrap_or(0);
        let bit = gfn.0 % CHUNK_FRAMES;
        place != 0 && self.chunks[place as usize - 1].words[(bit / 64) as usize] & (1 << (bit % 64)) != 0
    }

    /// The first frame of the set from `from` on.
    pub fn next(&self, from: Gfn) -> Option<Gfn> {
        let first = usize::try_from(from.0 / CHUNK_FRAMES).ok()?;
        let places = self.index.get(first..)?.iter().filter(|&&place| place != 0);
        let mut words = places.flat_map(|&place| self.chunks[place as usize - 1].used_words());
        words.find_map(|(at, bits)| {
            let before = from.0.saturating_sub(at);
            let bits = if before < 64 { bits & (u64::MAX << before) } else { 0 };
            (bits != 0).then(|| Gfn(at + u64::from(bits.trailing_zeros())))
        })
    }

    /// Adds everything that `other` holds.
    ///
    /// # Panics
    /// `other` holds a frame that this set cannot.
    pub fn union_with(&mut self, other: &Self) {
        for chunk in &other.chunks {
            for (first, bits) in chunk.used_words() {
                self.insert_word(Gfn(first), bits);
            }
        }
    }

    /// Removes every frame; keeps the memory of the chunks for the next epoch.
    pub fn clear(&mut self) {
        for chunk in &self.chunks {
            self.index[chunk.number as usize] = 0;
        }
        self.chunks.clear();
        self.len = 0;
    }

    /// The frames in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = Gfn> + '_ {
        let mut order: Vec<&Chunk> = self.chunks.iter().collect();
        order.sort_unstable_by_key(|chunk| chunk.number);
        let words = order.into_iter().flat_map(Chunk::used_words);
        words.flat_map(|(first, bits)| Bits(bits).map(move |bit| Gfn(first + bit)))
    }

    /// The frames by words, in no order: the frame of bit 0, and the bits, which are not 0.
    pub(crate) fn words(&self) -> impl Iterator<Item = (Gfn, u64)> + '_ {
        self.chunks.iter().flat_map(Chunk::used_words).map(|(first, bits)| (Gfn(first), bits))
    }

    /// Maximal runs of neighbouring frames, ascending: (first frame, number of frames).
    pub fn runs(&self) -> impl Iterator<Item = (Gfn, u64)> + '_ {
        let mut frames = self.iter().peekable();
        std::iter::from_fn(move || {
            let first = frames.next()?;
            let mut count = 1;
            while frames.next_if_eq(&Gfn(first.0 + count)).is_some() {
                count += 1;
            }
            Some((first, count))
        })
    }

    fn chunk_mut(&mut self, number: usize) -> &mut Chunk {
        let place = self.index[number] as usize;
        if place != 0 {
            return &mut self.chunks[place - 1];
        }
        self.chunks.push(Chunk { number: number as u32, used: 0, words: [0; WORDS] });
        self.index[number] = self.chunks.len() as u32;
        self.chunks.last_mut().expect("one was pushed above")
    }
}

impl std::fmt::Debug for DirtySet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DirtySet({} of {} frames)", self.len, self.frames)
    }
}

/// The numbers of the set bits of a word, ascending.
pub(crate) struct Bits(pub(crate) u64);

impl Iterator for Bits {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        if self.0 == 0 {
            return None;
        }
        let bit = u64::from(self.0.trailing_zeros());
        self.0 &= self.0 - 1;
        Some(bit)
    }
}

#[cfg(test)]
mod tests {
    use super::DirtySet;
    use colo_common::Gfn;
    use proptest::prelude::{Strategy, any, prop_assert, prop_assert_eq, prop_oneof, proptest};
    use std::collections::BTreeSet;

    #[derive(Clone, Debug)]
    enum Op {
        Insert(u64),
        Range(u64, u64),
        Word(u64, u64),
        Union(Vec<u64>),
        Remove(u64),
        Clear,
    }

    const FRAMES: u64 = 1 << 28;

    fn frame() -> impl Strategy<Value = u64> {
        prop_oneof![0..FRAMES, 0..10_000u64, (FRAMES - 5000)..FRAMES]
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            8 => frame().prop_map(Op::Insert),
            2 => (frame(), 0..200u64).prop_map(|(f, n)| Op::Range(f, n.min(FRAMES - f))),
            3 => (0..FRAMES / 64, any::<u64>()).prop_map(|(w, b)| Op::Word(w * 64, b)),
            2 => proptest::collection::vec(frame(), 0..40).prop_map(Op::Union),
            3 => frame().prop_map(Op::Remove),
            1 => proptest::strategy::Just(Op::Clear),
        ]
    }

    proptest! {
        #[test]
        fn behaves_as_an_ordered_set(ops in proptest::collection::vec(op(), 0..60), probes in proptest::collection::vec(frame(), 20)) {
            let mut set = DirtySet::new(FRAMES);
            let mut model = BTreeSet::new();
            for op in ops {
                match op {
                    Op::Insert(f) => prop_assert_eq!(set.insert(Gfn(f)), model.insert(f)),
                    Op::Range(f, n) => { set.insert_range(Gfn(f), n); model.extend(f..f + n); }
                    Op::Word(f, bits) => {
                        set.insert_word(Gfn(f), bits);
                        model.extend((0..64).filter(|b| bits >> b & 1 == 1).map(|b| f + b));
                    }
                    Op::Union(frames) => {
                        let mut other = DirtySet::new(FRAMES);
                        for f in frames { other.insert(Gfn(f)); model.insert(f); }
                        set.union_with(&other);
                    }
                    Op::Remove(f) => prop_assert_eq!(set.remove(Gfn(f)), model.remove(&f)),
                    Op::Clear => { set.clear(); model.clear(); }
                }
            }
            prop_assert_eq!(set.len(), model.len() as u64);
            prop_assert!(set.iter().map(|g| g.0).eq(model.iter().copied()));
            let from_runs = set.runs().flat_map(|(first, n)| first.0..first.0 + n);
            prop_assert!(from_runs.eq(model.iter().copied()));
            for f in probes {
                prop_assert_eq!(set.contains(Gfn(f)), model.contains(&f));
                prop_assert_eq!(set.next(Gfn(f)).map(|g| g.0), model.range(f..).next().copied());
            }
        }
    }

    #[test]
    fn runs_are_maximal_across_chunks() {
        let mut set = DirtySet::new(20_000);
        set.insert_range(Gfn(4090), 20);
        set.insert(Gfn(9000));
        assert_eq!(set.runs().collect::<Vec<_>>(), [(Gfn(4090), 20), (Gfn(9000), 1)]);
    }

    #[test]
    #[should_panic(expected = "is not below")]
    fn a_frame_beyond_the_guest_is_an_own_bug() {
        DirtySet::new(100).insert(Gfn(100));
    }
}
