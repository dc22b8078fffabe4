//! The scrub: reads everything and compares it with its checksums while the copy goes on from mark to mark, a step at
//! a time, so that a damaged page is found while the primary still has it.

use colo_common::Gfn;
use std::ops::ControlFlow;
use std::thread;
use std::time::{Duration, Instant};

use super::checksums::Checksums;
use super::format::decode_page;
use super::mark::MAX_BATCH;
use super::{Store, StoreError};

/// Damaged pages that are listed; more are counted. With so many the disk is to be replaced anyway.
pub const MAX_LISTED: usize = 1024;

/// How far a scrub has come, and what it found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scrub {
    /// The next page to look at.
    next: Gfn,
    /// Pages that were read and are as written.
    pub pages: u64,
    /// Bytes that were read.
    pub bytes: u64,
    /// Pages that are missing or not as written, ascending, the first [`MAX_LISTED`] of them.
    pub damaged: Vec<Gfn>,
    /// How many those are in all.
    pub damaged_pages: u64,
    /// Whether the machine state is damaged.
    pub damaged_state: bool,
}

impl Default for Scrub {
    fn default() -> Self {
        Self { next: Gfn(0), pages: 0, bytes: 0, damaged: Vec::new(), damaged_pages: 0, damaged_state: false }
    }
}

impl Scrub {
    /// Whether everything that was read is as written.
    pub fn is_clean(&self) -> bool {
        self.damaged_pages == 0 && !self.damaged_state
    }

    fn found_damaged(&mut self, gfn: Gfn) {
        self.damaged_pages += 1;
        if self.damaged.len() < MAX_LISTED {
            self.damaged.push(gfn);
        }
    }

    /// All pages before this one were looked at.
    fn reached(&mut self, gfn: Gfn) -> Option<()> {
        self.next = Gfn(gfn.0.checked_add(1)?);
        Some(())
    }
}

impl Store {
    /// Reads and checks everything of a whole copy, at most `bytes_per_second` of it, and does not stop at what is damaged. `progress`
    /// is called after every few MiB and may break it off. Missing pages are found once the image was loaded or
    /// written by this process: before, nobody knows of them.
    ///
    /// # Errors
    /// There is no whole copy.
    pub fn scrub(
        &mut self,
        bytes_per_second: u64,
        mut progress: impl FnMut(&Scrub) -> ControlFlow<()>,
    ) -> Result<Scrub, StoreError> {
        let (mut scrub, start) = (Scrub::default(), Instant::now());
        while self.scrub_step(&mut scrub, MAX_BATCH as u64)? && progress(&scrub).is_continue() {
            let due = Duration::from_secs_f64(scrub.bytes as f64 / bytes_per_second.max(1) as f64);
            thread::sleep(due.saturating_sub(start.elapsed()));
        }
        Ok(scrub)
    }

    /// Goes on with a scrub by some `bytes`; answers whether there is more. Marks may come between two steps.
    ///
    /// # Errors
    /// As [`scrub`](Self::scrub).
    pub fn scrub_step(&mut self, scrub: &mut Scrub, bytes: u64) -> Result<bool, StoreError> {
        if self.whole().is_none() {
            return Err(self.out_of_place("be scrubbed"));
        }
        if scrub.next == Gfn(0) {
            scrub.damaged_state = self.state().is_err();
        }
        Ok(self.scrub_pages(scrub, bytes).is_some())
    }

    /// Compares the stored pages with the checksums; nothing when all were looked at.
    fn scrub_pages(&self, scrub: &mut Scrub, bytes: u64) -> Option<()> {
        let unknown = Checksums::default();
        let sums = self.checksums.as_ref().unwrap_or(&unknown);
        let end = scrub.bytes.saturating_add(bytes);
        let mut image = self.image(scrub.next);
        while scrub.bytes < end {
            let found = match image.next() {
                Some(Ok(found)) => Some(found),
                None => None,
                Some(Err(_)) => {
                    // What lies there cannot be read at all: the next page that should be there, and on behind it.
                    let lost = sums.next(scrub.next).unwrap_or(scrub.next);
                    scrub.found_damaged(lost);
                    scrub.reached(lost)?;
                    self.checksums.as_ref()?;
                    image = self.image(scrub.next);
                    continue;
                }
            };
            let here = found.as_ref().map(|(gfn, _)| *gfn);
            while let Some(lost) = sums.next(scrub.next).filter(|&lost| here.is_none_or(|here| lost < here)) {
                scrub.found_damaged(lost);
                scrub.reached(lost)?;
            }
            let (gfn, value) = found?;
            scrub.bytes += value.len() as u64;
            match decode_page(gfn, &value) {
                Some((_, sum)) if self.checksums.is_none() || sum == sums.of(gfn) => scrub.pages += 1,
                _ => scrub.found_damaged(gfn),
            }
            scrub.reached(gfn)?;
        }
        Some(())
    }
}
