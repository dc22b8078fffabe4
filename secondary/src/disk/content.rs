//! A disk's content as a whole: its digest, the digests of its blocks, and a plain image file of it.

use colo_common::{BLOCK_SIZE, Block};
use colo_proto::message::{BlockDigestRequest, BlockDigests, PageDigest};
use colo_vmm::disk::Disk;
use colo_vmm::memory::Page;
use colo_vmm::page_batch::is_zero;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use xxhash_rust::xxh3::Xxh3;

use crate::digests::Collector;

/// XXH3-128 over the disk's size (u64, little endian) and, ascending, the number and the bytes of each block that is not
/// zero: what is not there counts as much as zeroes that were written.
///
/// # Errors
/// The disk cannot be read.
pub fn content_digest(disk: &dyn Disk) -> io::Result<u128> {
    let mut hash = Xxh3::new();
    hash.update(&disk.bytes().to_le_bytes());
    each_block(disk, Block(0)..Block(u64::MAX), |block, page| {
        hash.update(&block.0.to_le_bytes());
        hash.update(page);
        Ok(())
    })?;
    Ok(hash.digest128())
}

/// Tells what a range of blocks holds; those beyond the disk's end are zero.
///
/// # Errors
/// The disk cannot be read.
pub fn block_digests(
    disk: &dyn Disk,
    request: BlockDigestRequest,
    mut send: impl FnMut(BlockDigests),
) -> io::Result<()> {
    let end = Block(request.first.0.saturating_add(request.count));
    let mut message = Collector::new(request.first);
    each_block(disk, request.first..end, |block, page| {
        message.zeros(block.0 - message.at(), &mut send);
        message.one(PageDigest::of(page), &mut send);
        Ok(())
    })?;
    message.zeros(end.0 - message.at(), &mut send);
    message.flush(&mut send);
    Ok(())
}

/// Writes the content into a new file, with holes where it is zero, and syncs it and its name.
///
/// # Errors
/// There is a file of that name, or it cannot be written; then it is removed again.
pub fn export(disk: &dyn Disk, path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    let filled = fill(disk, &file).and_then(|()| {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
    });
    if filled.is_err() {
        // The error is told; a file that is left would only look like an export.
        drop(std::fs::remove_file(path));
    }
    filled
}

fn fill(disk: &dyn Disk, file: &File) -> io::Result<()> {
    file.set_len(disk.bytes())?;
    each_block(disk, Block(0)..Block(u64::MAX), |block, page| file.write_all_at(page, block.offset()))?;
    file.sync_all()
}

/// Hands out each block of a range that is not zero, ascending.
fn each_block(
    disk: &dyn Disk,
    range: Range<Block>,
    mut each: impl FnMut(Block, &Page) -> io::Result<()>,
) -> io::Result<()> {
    let mut at = range.start;
    while let Some(found) = disk.next_data(at)?.filter(|found| found.start < range.end) {
        for block in (found.start.0..found.end.0.min(range.end.0)).map(Block) {
            let mut page = [0; BLOCK_SIZE];
            disk.read(block.offset(), &mut page)?;
            if !is_zero(&page) {
                each(block, &page)?;
            }
        }
        at = found.end;
    }
    Ok(())
}
