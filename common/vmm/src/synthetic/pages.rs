//! What the swept pages of a synthetic guest hold, and how the guest tells that one is wrong.
//!
//! A vCPU goes over its share of the pages in rounds, each round in an order of its own, and visits every page
//! once in a round. So it knows without any table which round a page is of, and an older version of it, a torn
//! one, or one of another guest does not go unnoticed. A page has
//! - word 0: the round that wrote it;
//! - word 1: its link, a hash of the link before it and of what the vCPU drew: the page's whole history;
//! - word 2: the page's number;
//! - somewhere in between, as the link says: so many words of body, made from the link;
//! - the last word: a hash of the three words of the head.
//!
//! In some rounds a page is cleared instead.

use colo_common::PAGE_SIZE;

use super::chain::mix;
use crate::memory::Page;

const WORDS: u64 = (PAGE_SIZE / 8) as u64;
const HEAD: u64 = 3;
/// One visit in so many clears the page.
const CLEARED: u64 = 16;

/// A word that is not what it should be: its place, what is there and what should be.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Wrong {
    pub(super) word: u64,
    pub(super) found: u64,
    pub(super) expected: u64,
}

/// What a visit writes: pieces of the page, by word.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fill {
    Clear,
    Words { head: [u64; 3], body_at: u64, body: Vec<u64>, tail: u64 },
}

/// A page of the sweep, by number, and the guest that it belongs to.
#[derive(Clone, Copy)]
pub(super) struct Sweep {
    pub(super) seed: u64,
    pub(super) page: u64,
    pub(super) words: u32,
}

impl Sweep {
    /// Checks the page as `round` left it; round 0 is before the first visit and may be anything.
    /// Returns its link.
    pub(super) fn check(&self, round: u64, content: &Page) -> Result<u64, Wrong> {
        let word = |at: u64| {
            let at = (at * 8) as usize;
            u64::from_le_bytes(content[at..at + 8].try_into().expect("eight bytes of a page"))
        };
        let check = |at: u64, expected: u64| {
            let found = word(at);
            if found == expected { Ok(()) } else { Err(Wrong { word: at, found, expected }) }
        };
        if round == 0 {
            return Ok(0);
        }
        match self.fill(round, word(1)) {
            Fill::Clear => (0..WORDS).try_for_each(|at| check(at, 0)).map(|()| 0),
            Fill::Words { head, body_at, body, tail } => {
                (0..).zip(head).try_for_each(|(at, expected)| check(at, expected))?;
                check(WORDS - 1, tail)?;
                (body_at..).zip(body).try_for_each(|(at, expected)| check(at, expected))?;
                Ok(head[1])
            }
        }
    }

    /// What `round` writes, given the page's new link.
    pub(super) fn fill(&self, round: u64, link: u64) -> Fill {
        if mix(mix(self.seed, self.page), round).is_multiple_of(CLEARED) {
            return Fill::Clear;
        }
        let words = u64::from(self.words);
        let body_at = HEAD + link % (WORDS - HEAD - words);
        let body = (body_at..body_at + words).map(|at| mix(link, at)).collect();
        Fill::Words { head: [round, link, self.page], body_at, body, tail: mix(mix(round, link), self.page) }
    }
}

/// The `position`-th of `count` pages in `round`: one behind the other in odd rounds, scattered in even ones.
pub(super) fn order(seed: u64, round: u64, position: u64, count: u64) -> u64 {
    let draw = mix(seed, round);
    let mut stride = if round.is_multiple_of(2) { 1 + draw % count } else { 1 };
    // Only a stride without a common factor visits all; 1 is one, so the search ends.
    while common_factor(stride, count) != 1 {
        stride = stride % count + 1;
    }
    ((draw >> 32) % count + position * stride) % count
}

fn common_factor(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

#[cfg(test)]
mod tests {
    use super::{Fill, Sweep, Wrong, order};
    use crate::synthetic::config::MAX_WORDS;
    use colo_common::PAGE_SIZE;
    use std::collections::BTreeSet;

    fn apply(fill: &Fill, page: &mut [u8; PAGE_SIZE]) {
        let mut put = |at: u64, word: u64| page[at as usize * 8..][..8].copy_from_slice(&word.to_le_bytes());
        match fill {
            Fill::Clear => *page = [0; PAGE_SIZE],
            Fill::Words { head, body_at, body, tail } => {
                (0..).zip(head).for_each(|(at, &word)| put(at, word));
                (*body_at..).zip(body).for_each(|(at, &word)| put(at, word));
                put(511, *tail);
            }
        }
    }

    #[test]
    fn every_round_visits_every_page_once() {
        for count in [1, 2, 3, 12, 97, 360] {
            for round in 1..20 {
                let seen: BTreeSet<u64> =
                    (0..count).map(|position| order(5, round, position, count)).collect();
                assert_eq!((seen.len() as u64, seen.last()), (count, Some(&(count - 1))));
            }
        }
    }

    #[test]
    fn a_page_is_good_in_its_round_and_in_no_other() {
        for words in [1, 8, MAX_WORDS] {
            let sweep = Sweep { seed: 3, page: 40, words };
            let (mut page, mut cleared) = ([0xee; PAGE_SIZE], 0);
            assert_eq!(sweep.check(0, &page), Ok(0));
            for round in 1..200 {
                let link = round * 77;
                let fill = sweep.fill(round, link);
                let clear = fill == Fill::Clear;
                cleared += u32::from(clear);
                apply(&fill, &mut page);
                assert_eq!(sweep.check(round, &page), Ok(if clear { 0 } else { link }));
                if !clear {
                    sweep.check(round + 1, &page).unwrap_err();
                    Sweep { page: 41, ..sweep }.check(round, &page).unwrap_err();
                    let mut torn = page;
                    torn[PAGE_SIZE / 2..].fill(0);
                    assert_eq!(sweep.check(round, &torn).unwrap_err().word, 511);
                }
            }
            assert!((2..40).contains(&cleared));
        }
    }

    #[test]
    fn a_changed_word_of_the_body_is_named() {
        let sweep = Sweep { seed: 3, page: 40, words: 8 };
        let fill = sweep.fill(1, 9);
        let Fill::Words { body_at, .. } = fill else { panic!("another round, please") };
        let mut page = [0; PAGE_SIZE];
        apply(&fill, &mut page);
        page[(body_at as usize + 2) * 8] ^= 1;
        let Wrong { word, found, expected } = sweep.check(1, &page).unwrap_err();
        assert_eq!((word, found ^ expected), (body_at + 2, 1));
    }
}
