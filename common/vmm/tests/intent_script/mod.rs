//! What a runner does to its disk, from a seed: writes, cuts and acks, with a cleaner beside it; and whether what a crash
//! has left of image and log is what the log claims.
#![allow(dead_code, reason = "each test uses a part of it")]

use colo_common::history::point;
use colo_common::{BLOCK_SIZE, Block, Epoch, VmId};
use colo_vmm::disk::intent::{EXTENT_BYTES, IntentLog, LoggedDisk};
use colo_vmm::disk::{Disk, FileDisk};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

const EXTENTS: u64 = 6;
const BYTES: u64 = EXTENTS * EXTENT_BYTES;
/// Where the runner tells what it has cut and what was acked.
pub(crate) const TOLD: &str = "told";
const IMAGE: &str = "disk.img";
const LOG: &str = "intent";

pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (self.0 >> 33) % end
    }
}

pub(crate) enum Step {
    /// First block, blocks, their number; 0 for zeroes.
    Write(u64, u64, u64),
    Cut,
    Ack(u64),
    Flush,
}

/// By block, its number.
type Content = BTreeMap<u64, u64>;

/// The steps, and the disk at the end of each epoch.
pub(crate) fn script(seed: u64, length: usize) -> (Vec<Step>, Vec<Content>) {
    let mut rng = Rng(seed);
    let (mut steps, mut disk, mut cuts, mut acked) = (Vec::new(), Content::new(), vec![Content::new()], 0);
    for at in 0..length as u64 {
        let newest = cuts.len() as u64 - 1;
        steps.push(match rng.below(12) {
            0 | 1 => {
                cuts.push(disk.clone());
                Step::Cut
            }
            2 | 3 if acked < newest => {
                acked += 1 + rng.below(newest - acked);
                Step::Ack(acked)
            }
            4 => Step::Flush,
            _ => {
                let count = 1 + rng.below(3);
                let first = (rng.below(EXTENTS + 1) * 256 + rng.below(2)).saturating_sub(2);
                let first = first.min(EXTENTS * 256 - count);
                let tag = if rng.below(6) == 0 { 0 } else { at + 1 };
                for block in first..first + count {
                    disk.insert(block, tag);
                }
                Step::Write(first, count, tag)
            }
        });
    }
    (steps, cuts)
}

/// Does it all; told are epochs: twice their number when cut, and one more before it counts as acked.
pub(crate) fn run(dir: &Path, seed: u64, length: usize) {
    let image = Arc::new(FileDisk::open_sized(&dir.join(IMAGE), BYTES, true).unwrap());
    let vm: VmId = "web".parse().unwrap();
    let log = IntentLog::create(&dir.join(LOG), BYTES, &vm, point(1, 0)).unwrap();
    let disk = Arc::new(LoggedDisk::new(image, log));
    let (mut told, mut epoch, done) = (File::create(dir.join(TOLD)).unwrap(), 1, AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                disk.clean_all().unwrap();
                thread::sleep(Duration::from_micros(300));
            }
        });
        for step in script(seed, length).0 {
            match step {
                Step::Write(first, count, tag) => write(&disk, Block(first)..Block(first + count), tag),
                Step::Cut => {
                    epoch += 1;
                    disk.log().set_open_epoch(Epoch(epoch));
                    told.write_all(&((epoch - 1) * 2).to_le_bytes()).unwrap();
                }
                Step::Ack(acked) => {
                    told.write_all(&(acked * 2 + 1).to_le_bytes()).unwrap();
                    disk.log().acked(point(1, acked));
                }
                Step::Flush => disk.flush().unwrap(),
            }
        }
        done.store(true, Ordering::Relaxed);
    });
}

fn write(disk: &LoggedDisk, blocks: std::ops::Range<Block>, tag: u64) {
    disk.change_begins(blocks.clone());
    if tag == 0 {
        disk.zero(blocks.clone(), true).unwrap();
    } else {
        let bytes = tag.to_le_bytes().repeat((blocks.end.0 - blocks.start.0) as usize * BLOCK_SIZE / 8);
        disk.write(blocks.start.offset(), &bytes).unwrap();
    }
    disk.change_recorded(blocks);
}

/// What a check has seen.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// The log names something.
    pub(crate) named: bool,
    /// The image is not the disk at the claim's point.
    pub(crate) ahead: bool,
    /// The claim's epoch.
    pub(crate) epoch: u64,
}

/// Checks what is in the directory; nothing if the crash came before there was a log.
pub(crate) fn check(dir: &Path, seed: u64, length: usize, told: &[u64]) -> Option<Seen> {
    let claim = IntentLog::read(&dir.join(LOG)).unwrap()?;
    let image = FileDisk::open(&dir.join(IMAGE), true).unwrap();
    let cuts = script(seed, length).1;
    let touched: BTreeSet<u64> = cuts.iter().flat_map(|cut| cut.keys().copied()).collect();
    let from = claim.point.epoch.0;
    let acked = told.iter().filter(|told| **told % 2 == 1).map(|told| told / 2).max().unwrap_or(0);
    let newest = told.iter().filter(|told| **told % 2 == 0).map(|told| told / 2).max().unwrap_or(0);
    assert!(from <= acked, "seed {seed}: epoch {from} is claimed, {acked} acked");
    let mut seen = Seen { named: !claim.extents.is_empty(), ahead: false, epoch: from };
    for block in touched {
        let mut page = [0; BLOCK_SIZE];
        image.read(Block(block).offset(), &mut page).unwrap();
        let tag = u64::from_le_bytes(page[..8].try_into().unwrap());
        let at = |epoch: u64| cuts[epoch as usize].get(&block).copied().unwrap_or(0);
        seen.ahead |= tag != at(from);
        for epoch in from..=newest.max(from) {
            assert!(
                tag == at(epoch) || claim.extents.contains(Block(block)),
                "seed {seed}: block {block} is {tag}, in epoch {epoch} it was {}: {claim:?}",
                at(epoch)
            );
        }
    }
    Some(seen)
}
