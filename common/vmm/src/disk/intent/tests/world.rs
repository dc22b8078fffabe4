//! One world: a guest with a disk, a runner, what its secondary has acked, and crashes after which the runner goes on
//! with the same disk.

use colo_common::history::point;
use colo_common::{Block, Epoch, Point};
use std::sync::Arc;

use super::twins::{Content, Image, Medium, page, set};
use crate::disk::Disk;
use crate::disk::intent::claim::Claim;
use crate::disk::intent::extents::Extents;
use crate::disk::intent::file::Slots;
use crate::disk::intent::log::IntentLog;
use crate::disk::intent::{EXTENT_BYTES, LoggedDisk};

const EXTENTS: u64 = 7;
const BLOCKS: u64 = EXTENTS * EXTENT_BYTES / 4096;
/// Lives of a runner, and steps of each.
const LIVES: u64 = 3;
const STEPS: u64 = 100;

/// A way to break the promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lie {
    /// The log is not synced before the first write into an extent.
    NoSyncBeforeWrite,
    /// What the secondary has not acked counts as acked.
    NoAck,
    /// The image is not synced before extents leave the log.
    NoImageSync,
    /// What is acked is looked up after the image was synced, not before.
    AckedAfterSync,
    /// That a sync which the guest asked for has failed is forgotten.
    FailedSyncForgotten,
    /// The device does not say when requests begin and are recorded: a write counts for the epoch in which its bytes are
    /// in the file.
    CountedWhenWritten,
}

impl Lie {
    pub(super) const ALL: [Self; 6] = [
        Self::NoSyncBeforeWrite,
        Self::NoAck,
        Self::NoImageSync,
        Self::AckedAfterSync,
        Self::FailedSyncForgotten,
        Self::CountedWhenWritten,
    ];
}

/// A disk whose log is in memory.
pub(super) fn logged(image: &Image, medium: &Medium, from: Point) -> LoggedDisk {
    let claim = Claim { vm: "web".parse().unwrap(), point: from, extents: Extents::none(image.bytes()) };
    medium.make(&claim);
    let slots = Slots::new(Box::new(medium.clone()), 1, 1);
    LoggedDisk::new(Arc::new(image.clone()), IntentLog::new(slots, claim, from.epoch.next()))
}

/// A request of the guest.
struct Request {
    first: u64,
    count: u64,
    /// 0 for zeroes.
    tag: u64,
    /// It was given to the disk, and may have failed.
    done: bool,
}

pub(super) struct World {
    rng: u64,
    lie: Option<Lie>,
    image: Image,
    medium: Medium,
    disk: LoggedDisk,
    requests: Vec<Request>,
    /// What was recorded.
    recorded: Content,
    /// Of each epoch that was cut: the disk at its end.
    cuts: Vec<Content>,
    acked: u64,
    pub(super) broken: Option<String>,
    pub(super) crashes_with_nothing_named: u64,
    pub(super) crashes_ahead: u64,
    pub(super) left: u64,
    pub(super) failed_writes: u64,
}

impl World {
    pub(super) fn run(seed: u64, lie: Option<Lie>) -> Self {
        let (image, medium) = (Image::new(BLOCKS * 4096), Medium::default());
        let disk = logged(&image, &medium, point(1, 0));
        if lie == Some(Lie::NoSyncBeforeWrite) {
            medium.lie();
        }
        let mut world = Self {
            rng: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            lie,
            image,
            medium,
            disk,
            requests: Vec::new(),
            recorded: Content::new(),
            cuts: vec![Content::new()],
            acked: 0,
            broken: None,
            crashes_with_nothing_named: 0,
            crashes_ahead: 0,
            left: 0,
            failed_writes: 0,
        };
        for _ in 0..LIVES {
            for _ in 0..world.below(STEPS) {
                world.step();
            }
            world.crash();
            if world.broken.is_some() {
                break;
            }
        }
        world
    }

    fn below(&mut self, end: u64) -> u64 {
        self.rng ^= self.rng << 13;
        self.rng ^= self.rng >> 7;
        self.rng ^= self.rng << 17;
        (self.rng >> 11) % end
    }

    fn step(&mut self) {
        match self.below(20) {
            0..=4 => self.begin(),
            5..=8 => self.write(),
            9..=11 => self.record(),
            12..=13 => self.cut(),
            14..=15 => self.ack(),
            16..=17 => self.clean(),
            18 => self.flush(),
            _ => match self.below(16) {
                0 => self.image.fail_sync(),
                1 => {
                    let calls = self.below(3);
                    self.medium.fail_in(Some(calls));
                }
                _ => {}
            },
        }
    }

    /// Some other thread's doings, in the middle of the cleaner's.
    fn meanwhile(&mut self, most: u64) {
        for _ in 0..self.below(most) {
            match self.below(16) {
                0..=2 => self.begin(),
                3..=5 => self.write(),
                6..=8 => self.record(),
                9..=11 => self.cut(),
                12..=14 => self.ack(),
                _ => self.flush(),
            }
        }
    }

    fn begin(&mut self) {
        // Near the ends of extents, so that some requests are in two.
        let (extent, at, count) = (self.below(EXTENTS), self.below(4), 1 + self.below(3));
        let first = ((extent + 1) * 256 + at).saturating_sub(3).min(BLOCKS - count);
        let conflicts = |r: &Request| r.first < first + count && first < r.first + r.count;
        if self.requests.len() < 4 && !self.requests.iter().any(conflicts) {
            let tag = if self.below(5) == 0 { 0 } else { 1 + self.below(1 << 40) };
            self.requests.push(Request { first, count, tag, done: false });
            if self.lie != Some(Lie::CountedWhenWritten) {
                self.disk.change_begins(Block(first)..Block(first + count));
            }
        }
    }

    /// A thread of the disk does one of the requests.
    fn write(&mut self) {
        let Some(request) = self.requests.iter_mut().find(|request| !request.done) else { return };
        request.done = true;
        let blocks = Block(request.first)..Block(request.first + request.count);
        let written = match request.tag {
            0 => self.disk.zero(blocks, true),
            tag => self.disk.write(blocks.start.offset(), &page(tag).repeat(request.count as usize)),
        };
        self.failed_writes += u64::from(written.is_err());
    }

    /// One that is done is found by the device, which tells the epoch: of one that has failed what the disk holds now.
    fn record(&mut self) {
        let done = self.requests.iter().filter(|request| request.done).count() as u64;
        if done == 0 {
            return;
        }
        let nth = self.below(done) as usize;
        let (at, _) = self.requests.iter().enumerate().filter(|(_, request)| request.done).nth(nth).unwrap();
        let Request { first, count, .. } = self.requests.remove(at);
        let now = self.image.content();
        for block in first..first + count {
            set(&mut self.recorded, block, now.get(&block).copied().unwrap_or(0));
        }
        if self.lie != Some(Lie::CountedWhenWritten) {
            self.disk.change_recorded(Block(first)..Block(first + count));
        }
    }

    fn cut(&mut self) {
        self.disk.log().set_open_epoch(Epoch(self.cuts.len() as u64 + 1));
        // The cut may find some more that are done.
        for _ in 0..self.below(3) {
            self.record();
        }
        self.cuts.push(self.recorded.clone());
    }

    fn newest(&self) -> u64 {
        self.cuts.len() as u64 - 1
    }

    fn ack(&mut self) {
        let upto = self.newest() - self.acked;
        if upto > 0 {
            self.acked += 1 + self.below(upto);
        }
        let told = if self.lie == Some(Lie::NoAck) { self.newest() } else { self.acked };
        self.disk.log().acked(point(1, told));
    }

    fn clean(&mut self) {
        if self.below(3) == 0 {
            let left = if self.below(2) == 0 { self.disk.clean_all() } else { self.disk.clean() };
            self.left += left.unwrap_or(0);
            return;
        }
        if self.lie == Some(Lie::AckedAfterSync) {
            let synced = self.disk.sync();
            self.meanwhile(20);
            if synced.is_ok() && !self.disk.has_lost() {
                self.left +=
                    self.disk.log().finish_cleaning(&self.disk.log().begin_cleaning(true)).unwrap_or(0);
            }
            return;
        }
        let cleaning = self.disk.log().begin_cleaning(true);
        self.meanwhile(6);
        if self.lie != Some(Lie::NoImageSync) && self.disk.sync().is_err() {
            return;
        }
        self.meanwhile(6);
        if self.lie == Some(Lie::FailedSyncForgotten) || !self.disk.has_lost() {
            self.left += self.disk.log().finish_cleaning(&cleaning).unwrap_or(0);
        }
    }

    fn flush(&mut self) {
        // A guest is told, and goes on.
        let _ = self.disk.flush();
    }

    /// Checks what is left, and goes on with it as a runner that starts again.
    fn crash(&mut self) {
        let mut rng = self.rng;
        let mut below = |end: u64| {
            rng = rng.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            (rng >> 33) % end
        };
        self.image.crash(&mut below);
        let Some((claim, sequence, slot)) = self.medium.crash(&mut below) else {
            self.broken = Some("there is no claim".to_owned());
            return;
        };
        self.rng ^= rng | 1;
        let image = self.image.content();
        self.broken = self.check(&claim, &image);
        self.crashes_with_nothing_named += u64::from(claim.extents.is_empty());
        self.crashes_ahead += u64::from(image != self.cuts[self.acked as usize]);
        // The disk is what is left of it; all that was under way is gone.
        self.requests.clear();
        self.recorded = image;
        let open = Epoch(self.newest() + 1);
        let slots = Slots::new(Box::new(self.medium.clone()), sequence, slot);
        self.disk = LoggedDisk::new(Arc::new(self.image.clone()), IntentLog::new(slots, claim, open));
    }

    fn check(&self, claim: &Claim, image: &Content) -> Option<String> {
        let from = claim.point.epoch.0;
        if from > self.acked {
            return Some(format!("it claims epoch {from}, and {} is acked", self.acked));
        }
        // The other node runs on from some epoch that is not older than what it has acked, nor than the claim.
        for (epoch, disk) in self.cuts.iter().enumerate().skip(from as usize) {
            let differs = |block: &&u64| image.get(block) != disk.get(block);
            let hidden = |block: &&u64| !claim.extents.contains(Block(**block));
            if let Some(block) = image.keys().chain(disk.keys()).filter(differs).find(hidden) {
                return Some(format!("block {block} is not that of epoch {epoch}: {claim:?}"));
            }
        }
        None
    }
}
