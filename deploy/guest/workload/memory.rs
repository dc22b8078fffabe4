// SPDX-License-Identifier: Apache-2.0
//! The working set: pages that are dirtied in user mode, and checked before every rewrite.
//!
//! A touched page holds a few words that are a function of (seed, page, step of the last touch, word). The steps are
//! kept in an array of their own, so a page that fell back to an older state, or forward, or into another page's
//! place, does not match. The digest of what was found goes into every line of the console.

use crate::chain::mix;
use crate::sys;
use std::io;

/// 4 KiB pages, as 64-bit words.
const PAGE_WORDS: usize = 512;

/// Which pages a step touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pattern {
    /// One after the other, round and round.
    Sequential,
    /// Drawn anew each time, the same for the same seed.
    Random,
}

/// A page that does not hold what it was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mismatch {
    pub(crate) page: u64,
    pub(crate) word: usize,
    pub(crate) touched_in_step: u64,
    pub(crate) expected: u64,
    pub(crate) found: u64,
}

/// One thread's slice of the working set. Pages are counted over all slices, so that no two hold equal values.
pub(crate) struct Slice {
    seed: u64,
    pattern: Pattern,
    first_page: u64,
    pages: &'static mut [[u64; PAGE_WORDS]],
    /// Step of each page's last touch; 0 for a page that was never touched and still holds zeros.
    touched: &'static mut [u64],
    words: usize,
    /// Where `Sequential` goes on, and what `Random` draws from.
    next: usize,
    draw: u64,
}

impl Slice {
    /// `words` words in each page are written, spread evenly.
    pub(crate) fn new(
        seed: u64,
        pattern: Pattern,
        first_page: u64,
        count: usize,
        words: usize,
    ) -> io::Result<Self> {
        assert!((1..=PAGE_WORDS).contains(&words), "the arguments were checked");
        let pages = sys::map_zeroed(count.max(1) * PAGE_WORDS * 8)?;
        let touched = sys::map_zeroed(count.max(1) * 8)?;
        Ok(Self {
            seed,
            pattern,
            first_page,
            // SAFETY: a fresh mapping of that many pages, page-aligned, zeroed, never unmapped, known to nobody else.
            pages: unsafe { std::slice::from_raw_parts_mut(pages.cast(), count) },
            // SAFETY: as above, with one word for each page.
            touched: unsafe { std::slice::from_raw_parts_mut(touched.cast(), count) },
            words,
            next: 0,
            draw: mix(seed, first_page),
        })
    }

    /// Dirties `count` pages and returns a digest of what they held before.
    pub(crate) fn touch(&mut self, step: u64, count: usize) -> Result<u64, Mismatch> {
        let mut digest = 0;
        if self.pages.is_empty() {
            return Ok(digest);
        }
        for _ in 0..count {
            let index = self.pick();
            digest = self.rewrite(index, step, digest)?;
        }
        Ok(digest)
    }

    /// Reads every page that was ever touched.
    pub(crate) fn verify_all(&self) -> Result<(), Mismatch> {
        for (index, (page, &touched)) in self.pages.iter().zip(self.touched.iter()).enumerate() {
            // A page that was never touched is not read either: reading would populate it.
            for word in (0..self.words).filter(|_| touched != 0) {
                self.verify(index, word, touched, page[self.place(word)])?;
            }
        }
        Ok(())
    }

    fn pick(&mut self) -> usize {
        match self.pattern {
            Pattern::Sequential => {
                let index = self.next;
                self.next = (index + 1) % self.pages.len();
                index
            }
            Pattern::Random => {
                self.draw = mix(self.draw, 1);
                // The high half of a product maps a 64-bit draw to the range without a division.
                ((u128::from(self.draw) * self.pages.len() as u128) >> 64) as usize
            }
        }
    }

    /// What was found is known only after the new value stands: one exchange touches the page once, where a read
    /// before the write would fault on a fresh page twice.
    fn rewrite(&mut self, index: usize, step: u64, mut digest: u64) -> Result<u64, Mismatch> {
        let touched = self.touched[index];
        for word in 0..self.words {
            let new = self.value(index, step, word);
            let place = self.place(word);
            let found = std::mem::replace(&mut self.pages[index][place], new);
            self.verify(index, word, touched, found)?;
            digest = mix(digest, found);
        }
        self.touched[index] = step;
        Ok(digest)
    }

    fn verify(&self, index: usize, word: usize, touched: u64, found: u64) -> Result<(), Mismatch> {
        let expected = if touched == 0 { 0 } else { self.value(index, touched, word) };
        if found == expected {
            return Ok(());
        }
        let page = self.first_page + index as u64;
        Err(Mismatch { page, word, touched_in_step: touched, expected, found })
    }

    fn value(&self, index: usize, step: u64, word: usize) -> u64 {
        let page = self.first_page + index as u64;
        // One mix for all: page and word share a word of input without meeting.
        mix(self.seed ^ step, (page << 9) | word as u64)
    }

    fn place(&self, word: usize) -> usize {
        word * PAGE_WORDS / self.words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice(pattern: Pattern, pages: usize, words: usize) -> Slice {
        Slice::new(7, pattern, 100, pages, words).unwrap()
    }

    #[test]
    fn what_was_written_is_found_again() {
        for pattern in [Pattern::Sequential, Pattern::Random] {
            for words in [1, 3, 8, PAGE_WORDS] {
                let mut slice = slice(pattern, 10, words);
                for step in 1..50 {
                    slice.touch(step, 7).unwrap();
                }
                slice.verify_all().unwrap();
            }
        }
    }

    #[test]
    fn the_digest_is_of_what_was_found() {
        let mut one = slice(Pattern::Sequential, 4, 1);
        let mut two = slice(Pattern::Sequential, 4, 1);
        // Fresh pages all hold zeros, whatever the step writes.
        assert_eq!(one.touch(1, 4), two.touch(9, 4));
        assert_ne!(one.touch(10, 4), two.touch(10, 4));
    }

    #[test]
    fn an_old_page_is_a_mismatch_when_touched_and_at_the_end() {
        let mut slice = slice(Pattern::Sequential, 3, 2);
        slice.touch(1, 3).unwrap();
        let old = slice.pages[1];
        slice.touch(2, 3).unwrap();
        slice.pages[1] = old;
        let found = slice.verify_all().unwrap_err();
        assert_eq!((found.page, found.word, found.touched_in_step), (101, 0, 2));
        assert_eq!(slice.touch(3, 3).unwrap_err(), found);
    }

    #[test]
    fn half_an_old_page_is_a_mismatch() {
        let mut slice = slice(Pattern::Sequential, 1, 4);
        slice.touch(1, 1).unwrap();
        let old = slice.pages[0];
        slice.touch(2, 1).unwrap();
        slice.pages[0][256..].copy_from_slice(&old[256..]);
        assert_eq!(slice.verify_all().unwrap_err().word, 2);
    }

    #[test]
    fn random_reaches_all_pages_and_no_other() {
        let mut slice = slice(Pattern::Random, 5, 1);
        slice.touch(1, 200).unwrap();
        assert!(slice.touched.iter().all(|&step| step == 1));
    }
}
