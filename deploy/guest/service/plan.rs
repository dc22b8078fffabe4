// SPDX-License-Identifier: Apache-2.0
//! What the disk exerciser does, step by step, and what each block must hold: a function of its seed alone. No I/O and
//! no dependencies but the chain's hash, so that whoever reads the console can work the lines out beforehand.
//!
//! ```text
//! colo-disk 00000012 ok write at=17 count=4 chain=5d0c8a6b11f2e397
//! ```
//!
//! The chain is a hash over all steps so far: what was done where, and for a read the versions of the blocks that were
//! found. A line that was lost, repeated or made from older memory breaks it.

use crate::chain::mix;
use std::ops::Range;

/// Bytes of a block.
pub const BLOCK_BYTES: usize = 4096;
/// Blocks of one file where the exerciser works on files; no step reaches from one into the next.
pub const SPAN_BLOCKS: u64 = 256;
/// Blocks of one step at most: 256 KiB.
pub const STEP_BLOCKS_MAX: u64 = 64;

/// What a block must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Anything: never written, or discarded.
    Open,
    /// Zeros.
    Zero,
    /// What the step of this number wrote.
    Written(u64),
}

/// What a step does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Writes a new version.
    Write,
    /// Reads and compares.
    Read,
    /// Makes all that was written durable.
    Sync,
    /// Gives the blocks back.
    Discard,
    /// Makes them zero.
    Zero,
}

impl Action {
    /// Its word on the console.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Write => "write",
            Self::Read => "read",
            Self::Sync => "sync",
            Self::Discard => "discard",
            Self::Zero => "zero",
        }
    }
}

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Counts from 1.
    pub number: u64,
    /// What is done.
    pub action: Action,
    /// With which blocks.
    pub blocks: Range<u64>,
}

/// The steps and the state of every block.
#[derive(Clone, Debug)]
pub struct Plan {
    seed: u64,
    random: u64,
    number: u64,
    chain: u64,
    discard: Option<Content>,
    blocks: Vec<Content>,
}

impl Plan {
    /// A plan over blocks that all hold `first`. What a discarded block holds is up to the target; `None` is for a
    /// target that cannot discard.
    #[must_use]
    pub fn new(seed: u64, blocks: usize, first: Content, discard: Option<Content>) -> Self {
        let chain = mix(0x636f_6c6f_6469_736b, seed);
        Self { seed, random: mix(chain, 1), number: 0, chain, discard, blocks: vec![first; blocks] }
    }

    /// Draws the next step. It changes nothing yet: a read is compared with what the blocks hold before.
    pub fn next_step(&mut self) -> Step {
        let action = match self.draw(20) {
            0..9 => Action::Write,
            9..15 => Action::Read,
            15..18 => Action::Sync,
            18 if self.discard.is_some() => Action::Discard,
            _ => Action::Zero,
        };
        let start = self.draw(self.blocks.len() as u64);
        let count = 1 + self.draw(STEP_BLOCKS_MAX);
        let span_end = (start / SPAN_BLOCKS + 1) * SPAN_BLOCKS;
        let end = (start + count).min(span_end).min(self.blocks.len() as u64);
        self.number += 1;
        let blocks = if action == Action::Sync { 0..0 } else { start..end };
        Step { number: self.number, action, blocks }
    }

    /// Takes the step that was done into account; its line.
    pub fn done(&mut self, step: &Step) -> String {
        let range = step.blocks.start as usize..step.blocks.end as usize;
        let words = [step.number, step.action as u64, step.blocks.start, step.blocks.end];
        let mut chain = words.into_iter().fold(self.chain, mix);
        let after = match step.action {
            Action::Write => Some(Content::Written(step.number)),
            Action::Zero => Some(Content::Zero),
            Action::Discard => self.discard,
            Action::Sync => None,
            Action::Read => {
                let versions = self.blocks[range.clone()].iter().map(|content| match content {
                    Content::Open => u64::MAX,
                    Content::Zero => 0,
                    Content::Written(number) => *number,
                });
                chain = versions.fold(chain, mix);
                None
            }
        };
        if let Some(after) = after {
            self.blocks[range].fill(after);
        }
        self.chain = chain;
        let Step { number, action, blocks } = step;
        let (name, at, count) = (action.name(), blocks.start, blocks.end - blocks.start);
        format!("colo-disk {number:08} ok {name} at={at} count={count} chain={chain:016x}")
    }

    /// The line after the last step.
    #[must_use]
    pub fn last_line(&self) -> String {
        format!("colo-disk done steps={} chain={:016x}", self.number, self.chain)
    }

    /// How many blocks there are.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.blocks.len() as u64
    }

    /// Fills a buffer with what a write of these blocks in step `number` writes.
    pub fn fill(&self, number: u64, blocks: &Range<u64>, buffer: &mut [u8]) {
        for (block, bytes) in blocks.clone().zip(buffer.chunks_exact_mut(BLOCK_BYTES)) {
            let base = self.base(block, number);
            for (bytes, at) in bytes.as_chunks_mut().0.iter_mut().zip(0..) {
                *bytes = mix(base, at).to_le_bytes();
            }
        }
    }

    /// Compares what was read with what the blocks must hold.
    ///
    /// # Errors
    /// The first word that differs.
    pub fn check(&self, blocks: &Range<u64>, buffer: &[u8]) -> Result<(), Difference> {
        for (block, bytes) in blocks.clone().zip(buffer.chunks_exact(BLOCK_BYTES)) {
            let content = self.blocks[block as usize];
            let base = match content {
                Content::Open => continue,
                Content::Zero => None,
                Content::Written(number) => Some(self.base(block, number)),
            };
            for (bytes, word) in bytes.as_chunks().0.iter().zip(0..) {
                let expected = base.map_or(0, |base| mix(base, word));
                let found = u64::from_le_bytes(*bytes);
                if found != expected {
                    return Err(Difference { block, content, word, expected, found });
                }
            }
        }
        Ok(())
    }

    fn base(&self, block: u64, number: u64) -> u64 {
        mix(mix(self.seed, block), number)
    }

    /// A number below the bound. The slight preference for small ones does not matter.
    fn draw(&mut self, bound: u64) -> u64 {
        self.random = mix(self.random, 2);
        (self.random >> 16) % bound
    }
}

/// A block that does not hold what it must.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Difference {
    block: u64,
    content: Content,
    word: u64,
    expected: u64,
    found: u64,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { block, content, word, expected, found } = self;
        write!(f, "block={block} word={word} expected={expected:016x} found={found:016x}")?;
        match content {
            Content::Written(number) => write!(f, " written_in_step={number}"),
            _ => write!(f, " zeroed"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Carries a plan out on memory.
    fn run(seed: u64, steps: u64) -> (Vec<String>, Plan, Vec<u8>) {
        let count = 300;
        let mut disk = vec![7; count * BLOCK_BYTES];
        let mut plan = Plan::new(seed, count, Content::Open, Some(Content::Open));
        let mut lines = Vec::new();
        for _ in 0..steps {
            let step = plan.next_step();
            let bytes = step.blocks.start as usize * BLOCK_BYTES..step.blocks.end as usize * BLOCK_BYTES;
            match step.action {
                Action::Write => plan.fill(step.number, &step.blocks, &mut disk[bytes]),
                Action::Read => plan.check(&step.blocks, &disk[bytes]).unwrap(),
                Action::Zero => disk[bytes].fill(0),
                Action::Discard => disk[bytes].fill(step.number as u8),
                Action::Sync => {}
            }
            lines.push(plan.done(&step));
        }
        (lines, plan, disk)
    }

    #[test]
    fn a_seed_is_a_plan() {
        let (lines, plan, disk) = run(1, 500);
        assert_eq!(lines, run(1, 500).0);
        assert_ne!(lines, run(2, 500).0);
        assert!(plan.check(&(0..plan.blocks()), &disk).is_ok());
        for word in ["write", "read", "sync", "discard", "zero"] {
            assert!(lines.iter().any(|line| line.contains(&format!(" ok {word} at="))), "{word}");
        }
    }

    #[test]
    fn steps_stay_in_their_span() {
        let mut plan = Plan::new(3, 300, Content::Zero, None);
        for _ in 0..2000 {
            let step = plan.next_step();
            assert_ne!(step.action, Action::Discard, "the target cannot");
            let (start, end) = (step.blocks.start, step.blocks.end);
            assert!(end <= 300 && end - start <= STEP_BLOCKS_MAX);
            assert_eq!(start / SPAN_BLOCKS, end.saturating_sub(1) / SPAN_BLOCKS);
        }
    }

    #[test]
    fn a_wrong_word_is_found() {
        let (_, plan, mut disk) = run(1, 500);
        let block = plan.blocks.iter().position(|content| matches!(content, Content::Written(_))).unwrap();
        disk[block * BLOCK_BYTES + 47] ^= 1 << 7;
        let found = plan.check(&(0..plan.blocks()), &disk).unwrap_err();
        assert_eq!((found.block, found.word), (block as u64, 5));
    }

    #[test]
    fn a_step_left_out_breaks_the_chain() {
        let mut whole = Plan::new(1, 300, Content::Zero, None);
        let mut short = whole.clone();
        let (first, second) = (whole.next_step(), whole.next_step());
        whole.done(&first);
        assert_ne!(whole.done(&second), short.done(&second));
    }
}
