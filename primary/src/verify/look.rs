//! Looking at a memory or a disk: what it holds, as a list, and whether another holds what a list says.

use colo_common::{BLOCK_SIZE, Block, Gfn, PAGE_SIZE, Point};
use colo_proto::message::{MAX_VERIFY_RANGES, PageDigest, Verified, Verify, VerifyRange};
use colo_vmm::memory::Page;
use colo_vmm::page_batch::is_zero;
use colo_vmm::{Disk, GuestMemory};
use std::io;
use std::ops::Range;

use super::Order;

/// A memory or a disk, by numbers of its pages or blocks.
pub trait Source {
    /// The first run from `from` on that may hold something; all before it is zero.
    ///
    /// # Errors
    /// It cannot be read.
    fn next_data(&mut self, from: u64) -> io::Result<Option<Range<u64>>>;

    /// The digest of a page or block; nothing if it is zero.
    ///
    /// # Errors
    /// It cannot be read.
    fn digest(&mut self, at: u64) -> io::Result<Option<PageDigest>>;
}

/// Guest memory.
pub struct MemorySource<'a>(pub &'a GuestMemory);

impl Source for MemorySource<'_> {
    fn next_data(&mut self, from: u64) -> io::Result<Option<Range<u64>>> {
        let next = self.0.next_populated(Gfn(from)).map_err(io::Error::other)?;
        Ok(next.map(|(first, count)| first.0..first.0 + count))
    }

    fn digest(&mut self, at: u64) -> io::Result<Option<PageDigest>> {
        let mut page = [0; PAGE_SIZE];
        self.0.read_page(Gfn(at), &mut page).map_err(io::Error::other)?;
        Ok(digest(&page))
    }
}

/// A guest's disk.
pub struct DiskSource<'a>(pub &'a dyn Disk);

impl Source for DiskSource<'_> {
    fn next_data(&mut self, from: u64) -> io::Result<Option<Range<u64>>> {
        Ok(self.0.next_data(Block(from))?.map(|run| run.start.0..run.end.0))
    }

    fn digest(&mut self, at: u64) -> io::Result<Option<PageDigest>> {
        let mut block = [0; BLOCK_SIZE];
        self.0.read(Block(at).offset(), &mut block)?;
        Ok(digest(&block))
    }
}

fn digest(page: &Page) -> Option<PageDigest> {
    (!is_zero(page)).then(|| PageDigest::of(page))
}

/// Half of what a message may have: leaving out what was written makes more ranges of them.
const MAX_RANGES: usize = MAX_VERIFY_RANGES / 2;

/// Reads what was ordered, or the first part of it.
///
/// # Errors
/// It cannot be read.
pub fn look(order: &Order, source: &mut impl Source) -> io::Result<Verify> {
    let first = order.spans.first().map_or(0, |span| span.0);
    let mut list = List { ranges: Vec::new(), at: first, left: order.most };
    for &(start, count) in &order.spans {
        list.skip(start - list.at);
        if !list.span(start + count, source)? {
            break;
        }
    }
    Ok(Verify { part: order.part, first, ranges: list.ranges })
}

/// A list that is being made.
struct List {
    ranges: Vec<VerifyRange>,
    at: u64,
    left: u64,
}

impl List {
    /// Reads up to `end`; false if that was enough.
    fn span(&mut self, end: u64, source: &mut impl Source) -> io::Result<bool> {
        while self.at < end {
            let data =
                source.next_data(self.at)?.map_or(end..end, |run| run.start.min(end)..run.end.min(end));
            self.zeros(data.start - self.at);
            for at in data {
                if self.left == 0 || self.ranges.len() >= MAX_RANGES {
                    return Ok(false);
                }
                match source.digest(at)? {
                    Some(digest) => self.one(digest),
                    None => self.zeros(1),
                }
                // One that is zero was read as well.
                self.left -= 1;
            }
        }
        Ok(true)
    }

    fn skip(&mut self, count: u64) {
        if count > 0 {
            self.ranges.push(VerifyRange::Skip(count));
            self.at += count;
        }
    }

    fn zeros(&mut self, count: u64) {
        self.at += count;
        match self.ranges.last_mut() {
            _ if count == 0 => {}
            Some(VerifyRange::Zero(before)) => *before += count,
            _ => self.ranges.push(VerifyRange::Zero(count)),
        }
    }

    fn one(&mut self, digest: PageDigest) {
        self.at += 1;
        match self.ranges.last_mut() {
            Some(VerifyRange::Each(digests)) => digests.push(digest),
            _ => self.ranges.push(VerifyRange::Each(vec![digest])),
        }
    }
}

/// Whether `source`, which is at `point`, holds what a list says.
///
/// # Errors
/// It cannot be read.
pub fn compare(point: Point, list: &Verify, source: &mut impl Source) -> io::Result<Verified> {
    let (mut found, mut at) = (Verified::new(point, list.part), list.first);
    for range in &list.ranges {
        let end = at + range.count();
        match range {
            VerifyRange::Skip(_) => {}
            VerifyRange::Zero(count) => {
                found.compared += count;
                while let Some(data) = source.next_data(at)?.filter(|data| data.start < end) {
                    for place in data.start..data.end.min(end) {
                        if source.digest(place)?.is_some() {
                            found.differs(place);
                        }
                    }
                    at = data.end.min(end);
                }
            }
            VerifyRange::Each(digests) => {
                found.compared += range.count();
                for (place, told) in (at..).zip(digests) {
                    if source.digest(place)?.as_ref() != Some(told) {
                        found.differs(place);
                    }
                }
            }
        }
        at = end;
    }
    Ok(found)
}
