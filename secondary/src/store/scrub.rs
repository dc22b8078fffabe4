//! The scrub: reads everything and compares it with its checksums while the copy goes on from mark to mark, a step at
//! a time, so that a damaged page is found while the primary still has it.

use colo_common::{Block, Gfn};
use std::ops::ControlFlow;
use std::thread;
use std::time::{Duration, Instant};

use super::checksums::Checksums;
use super::engine::Column;
use super::format::{Kind, decode_block, decode_number, decode_page, decode_pending_key, number_key};
use super::mark::MAX_BATCH;
use super::read::Entries;
use super::{Store, StoreError};

/// Damaged pages that are listed; more are counted. With so many the disk is to be replaced anyway.
pub const MAX_LISTED: usize = 1024;

/// How far a scrub has come, and what it found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scrub {
    /// What is looked at.
    stage: Stage,
    /// The next page to look at.
    next: Gfn,
    /// The next block of the disk to look at.
    next_block: u64,
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
    /// Blocks of the disk that the store has and that are as written.
    pub blocks: u64,
    /// How many of them are not.
    pub damaged_blocks: u64,
    /// The first of those, if it can be named.
    pub damaged_block: Option<Block>,
}

/// Goes on from the first to the last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Pages,
    /// Blocks of a mark that was too large for one batch.
    Pending,
    Disk,
}

impl Default for Scrub {
    fn default() -> Self {
        Self {
            stage: Stage::Pages,
            next: Gfn(0),
            next_block: 0,
            pages: 0,
            bytes: 0,
            damaged: Vec::new(),
            damaged_pages: 0,
            damaged_state: false,
            blocks: 0,
            damaged_blocks: 0,
            damaged_block: None,
        }
    }
}

impl Scrub {
    /// Whether everything that was read is as written.
    pub fn is_clean(&self) -> bool {
        self.damaged_pages == 0 && !self.damaged_state && self.damaged_blocks == 0
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
    /// Reads and checks everything of a whole copy, or what the store has of the disk of a guest that ran here, at most `bytes_per_second` of it, and does not stop at what is damaged. `progress`
    /// is called after every few MiB and may break it off. Missing pages are found once the image was loaded or
    /// written by this process: before, nobody knows of them.
    ///
    /// # Errors
    /// There is neither.
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
        if self.whole().is_none() && self.meta.active.is_none() {
            return Err(self.out_of_place("be scrubbed"));
        }
        let done = match scrub.stage {
            Stage::Pages if self.whole().is_none() => true,
            Stage::Pages => {
                if scrub.next == Gfn(0) {
                    scrub.damaged_state = self.state().is_err();
                }
                self.scrub_pages(scrub, bytes).is_none()
            }
            Stage::Pending => {
                let number = |key: &[u8]| decode_pending_key(key).map(|(_, _, number)| number);
                scrub_blocks(self.adopted_from(Kind::Block, scrub.next_block), number, scrub, bytes)
            }
            Stage::Disk => {
                let entries = self.engine.scan(Column::Disk, &number_key(scrub.next_block));
                scrub_blocks(entries, decode_number, scrub, bytes)
            }
        };
        if !done {
            return Ok(true);
        }
        scrub.next_block = 0;
        scrub.stage = match scrub.stage {
            Stage::Pages => Stage::Pending,
            Stage::Pending => Stage::Disk,
            Stage::Disk => return Ok(false),
        };
        Ok(true)
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

/// Checks entries of blocks; whether all were looked at.
fn scrub_blocks(
    entries: Entries<'_>,
    number: impl Fn(&[u8]) -> Option<u64>,
    scrub: &mut Scrub,
    bytes: u64,
) -> bool {
    let end = scrub.bytes.saturating_add(bytes);
    for entry in entries {
        let found = entry.ok().map(|(key, value)| (number(&key).map(Block), value));
        let block = found.as_ref().and_then(|(block, _)| *block);
        let value = found.as_ref().map_or(&[] as &[u8], |(_, value)| value);
        scrub.bytes += value.len() as u64;
        match block {
            Some(block) if decode_block(block, value).is_some() => scrub.blocks += 1,
            _ => {
                scrub.damaged_blocks += 1;
                scrub.damaged_block = scrub.damaged_block.or(block);
            }
        }
        match block.and_then(|block| block.0.checked_add(1)) {
            Some(next) => scrub.next_block = next,
            // What cannot be read, or has no number, leaves no place to go on from.
            None => return true,
        }
        if scrub.bytes >= end {
            return false;
        }
    }
    true
}
