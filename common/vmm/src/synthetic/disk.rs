//! The disk of a synthetic guest: the device between its program and a [`Disk`].
//!
//! ```text
//!   program --submit--> state.requests --(some step, the host's doing)--> Disk
//!                           |
//!                           +--(the step that was drawn for it)--> DiskLog, and the guest may read the block again
//! ```
//!
//! A write ends at a step that the program draws, so what the guest says does not depend on its host. When it reaches the
//! [`Disk`] in between does, as with I/O threads: a cut finds writes that have not ended, on the disk or not yet. They
//! are part of the state, and whoever restores it does them again. As with the real device, a write is in the log when
//! it ends and not before.

use bytes::Bytes;
use colo_common::{BLOCK_SIZE, Block, PAGE_SIZE};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use xxhash_rust::xxh3::Xxh3;

use super::chain::mix;
use super::pages::{Fill, Sweep};
use crate::block_set::BlockSet;
use crate::devices::{DiskLog, DiskTracking};
use crate::disk::{Disk, DiskContent, DiskDelta, DiskWrite};
use crate::memory::Page;

/// Writes that have not ended, at most: with more, the guest does without its disk for a step.
pub(super) const MAX_REQUESTS: usize = 8;
/// Of so many looks at a write that has not ended, one finds that the host has made it.
const EARLY: u64 = 3;

const _: () = assert!(BLOCK_SIZE == PAGE_SIZE, "a block holds what a page holds");

/// A write that has not ended; its bytes follow from its numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Request {
    pub(super) block: u32,
    pub(super) round: u64,
    pub(super) link: u64,
    /// The step that finds it ended.
    pub(super) ends: u64,
}

impl Request {
    /// What it writes.
    fn write(&self, seed: u64, words: u32) -> DiskWrite {
        let sweep = Sweep { seed, page: u64::from(self.block), words };
        let content = match sweep.fill(self.round, self.link) {
            Fill::Clear => DiskContent::Zeroes(1),
            Fill::Words { head, body_at, body, tail } => {
                let mut bytes = vec![0; BLOCK_SIZE];
                let mut put = |at: u64, word: u64| {
                    let at = at as usize * 8;
                    bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
                };
                (0..).zip(head).for_each(|(at, word)| put(at, word));
                (body_at..).zip(body).for_each(|(at, word)| put(at, word));
                put((BLOCK_SIZE / 8 - 1) as u64, tail);
                DiskContent::Bytes(Bytes::from(bytes))
            }
        };
        DiskWrite { first: Block(self.block.into()), content }
    }
}

/// What a program's writes are made from: its seed and the words of a body.
#[derive(Clone, Copy)]
pub(super) struct Filling {
    pub(super) seed: u64,
    pub(super) words: u32,
}

/// The device.
pub(super) struct BlockDevice {
    disk: Arc<dyn Disk>,
    log: DiskLog,
    /// Of the requests in the state, by place: it is on the disk already.
    made: Vec<bool>,
    /// State of the generator that the host's doings come from.
    host: u64,
}

impl BlockDevice {
    pub(super) fn new(disk: Arc<dyn Disk>, seed: u64) -> Self {
        let log = DiskLog::new(disk.bytes() / BLOCK_SIZE as u64);
        Self { disk, log, made: Vec::new(), host: seed }
    }

    /// Blocks of the disk.
    pub(super) fn blocks(&self) -> u64 {
        self.disk.bytes() / BLOCK_SIZE as u64
    }

    /// What there is at a block; a block that cannot be read is none that anybody wrote.
    pub(super) fn read(&self, block: u32) -> Page {
        let mut content = [0; BLOCK_SIZE];
        if let Err(e) = self.disk.read(Block(block.into()).offset(), &mut content) {
            tracing::error!("block {block} of the guest's disk cannot be read: {e}");
            content.fill(0xff);
        }
        content
    }

    pub(super) fn submit(&mut self, requests: &mut Vec<Request>, request: Request) {
        requests.push(request);
        self.made.push(false);
    }

    /// The host's doings before step `time`, and what has ended by then.
    pub(super) fn go_on(&mut self, requests: &mut Vec<Request>, filling: Filling, time: u64) {
        for (at, request) in requests.iter().enumerate() {
            self.host = mix(self.host, 0x6469_736b);
            if !self.made[at] && (request.ends <= time || self.host.is_multiple_of(EARLY)) {
                self.make(&request.write(filling.seed, filling.words));
                self.made[at] = true;
            }
        }
        let mut at = 0;
        while at < requests.len() {
            if requests[at].ends > time {
                at += 1;
                continue;
            }
            self.made.remove(at);
            self.record(requests.remove(at).write(filling.seed, filling.words));
        }
    }

    /// All writes end now: at a reset.
    pub(super) fn drain(&mut self, requests: &mut Vec<Request>, filling: Filling) {
        self.go_on(requests, filling, u64::MAX);
    }

    /// Another state's requests take the places of these. What of them is on the disk already is in the log; the rest
    /// is forgotten.
    pub(super) fn take_over(&mut self, old: &[Request], filling: Filling, requests: usize) {
        for (request, _) in old.iter().zip(&self.made).filter(|(_, made)| **made) {
            self.record(request.write(filling.seed, filling.words));
        }
        self.made = vec![false; requests];
    }

    /// The guest wants what it wrote to be safe. Whether the host can do that is not the program's business.
    pub(super) fn flush(&self) {
        if let Err(e) = self.disk.flush() {
            tracing::warn!("the guest's disk is not flushed: {e}");
        }
    }

    pub(super) fn track(&self, tracking: DiskTracking) {
        self.log.track(tracking);
    }

    pub(super) fn take(&self) -> DiskDelta {
        let (writes, blocks) = self.log.take();
        DiskDelta { writes, blocks }
    }

    pub(super) fn collect(&self) -> (BlockSet, usize) {
        self.log.collect()
    }

    /// What the disk holds once these writes have ended: the same wherever a state is restored, however far its host is
    /// with them.
    pub(super) fn digest(&self, requests: &[Request], filling: Filling, blocks: u32) -> u128 {
        let mut hash = Xxh3::new();
        for block in 0..blocks {
            let under_way = requests.iter().rfind(|request| request.block == block);
            match under_way.map(|request| request.write(filling.seed, filling.words).content) {
                Some(DiskContent::Bytes(bytes)) => hash.update(&bytes),
                Some(DiskContent::Zeroes(_)) => hash.update(&[0; BLOCK_SIZE]),
                None => hash.update(&self.read(block)),
            }
        }
        hash.digest128()
    }

    fn record(&self, write: DiskWrite) {
        let blocks = write.blocks();
        self.log.record(write);
        self.disk.change_recorded(blocks);
    }

    fn make(&self, write: &DiskWrite) {
        let blocks = write.blocks();
        self.disk.change_begins(blocks.clone());
        let made = match &write.content {
            DiskContent::Bytes(bytes) => self.disk.write(blocks.start.offset(), bytes),
            DiskContent::Zeroes(_) => self.disk.zero(blocks, true),
        };
        if let Err(e) = made {
            // The guest will find it.
            tracing::error!("{} of the guest's disk cannot be written: {e}", write.first);
        }
    }
}
