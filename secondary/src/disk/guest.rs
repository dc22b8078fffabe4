//! The disk as the guest's device has it once the guest runs here, and as anybody reads it: overlay and file as one.

use colo_common::{BLOCK_SIZE, Block};
use colo_vmm::disk::Disk;
use std::io::{self, ErrorKind};
use std::ops::Range;

use super::{Core, DiskImage};

/// A part of a block that is read or written.
struct Piece {
    block: Block,
    /// Within the block.
    within: Range<usize>,
    /// Within the caller's bytes.
    bytes: Range<usize>,
}

impl Disk for DiskImage {
    fn bytes(&self) -> u64 {
        self.core.base.bytes()
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let core = &*self.core;
        let pieces = core.pieces(offset, bytes.len())?;
        let state = core.lock();
        if !state.has_newer(blocks_of(offset, bytes.len() as u64)) {
            // No block gets an entry while it is read: marks are of a guest that runs elsewhere.
            drop(state);
            return core.base.read(offset, bytes);
        }
        for Piece { block, within, bytes: range } in pieces {
            let into = &mut bytes[range];
            match core.entry(&state, block)? {
                Some(page) => into.copy_from_slice(&page[within]),
                None => core.base.read(block.offset() + within.start as u64, into)?,
            }
        }
        Ok(())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let core = &*self.core;
        let pieces = core.pieces(offset, bytes.len())?;
        let mut state = core.lock();
        state.check_runs()?;
        if !state.has_newer(blocks_of(offset, bytes.len() as u64)) {
            drop(state);
            return core.base.write(offset, bytes);
        }
        for Piece { block, within, bytes: range } in pieces {
            let part = &bytes[range];
            match core.entry(&state, block)? {
                Some(mut page) => {
                    page[within].copy_from_slice(part);
                    core.base.write(block.offset(), &page[..])?;
                    state.supersede(block..Block(block.0 + 1));
                }
                None => core.base.write(block.offset() + within.start as u64, part)?,
            }
        }
        Ok(())
    }

    fn zero(&self, blocks: Range<Block>, unmap: bool) -> io::Result<()> {
        let core = &*self.core;
        if blocks.start > blocks.end || blocks.end.0 > core.blocks {
            return Err(io::Error::new(ErrorKind::InvalidInput, "the range is not within the disk"));
        }
        let mut state = core.lock();
        state.check_runs()?;
        if !state.has_newer(blocks.clone()) {
            drop(state);
            return core.base.zero(blocks, unmap);
        }
        core.base.zero(blocks.clone(), unmap)?;
        state.supersede(blocks);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.core.settle()
    }

    fn next_data(&self, from: Block) -> io::Result<Option<Range<Block>>> {
        let state = self.core.lock();
        let file = self.core.base.next_data(from)?;
        let Some(first) = state.next_entry(from) else { return Ok(file) };
        match file {
            Some(file) if file.start <= first => Ok(Some(file)),
            _ => Ok(Some(first..state.end_of_entries(first))),
        }
    }
}

impl Core {
    fn pieces(&self, offset: u64, len: usize) -> io::Result<impl Iterator<Item = Piece> + use<>> {
        check_range(self.base.bytes(), offset, len as u64)?;
        let mut at = 0;
        Ok(std::iter::from_fn(move || {
            if at == len {
                return None;
            }
            let place = offset + at as u64;
            let start = (place % BLOCK_SIZE as u64) as usize;
            let bytes = (BLOCK_SIZE - start).min(len - at);
            let piece = Piece {
                block: Block::containing(place),
                within: start..start + bytes,
                bytes: at..at + bytes,
            };
            at += bytes;
            Some(piece)
        }))
    }
}

/// Blocks that these bytes are in.
fn blocks_of(offset: u64, len: u64) -> Range<Block> {
    Block::containing(offset)..Block((offset + len).div_ceil(BLOCK_SIZE as u64))
}

/// Whether a range is within a disk of `size` bytes.
fn check_range(size: u64, offset: u64, len: u64) -> io::Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(io::Error::new(ErrorKind::InvalidInput, "the range is not within the disk")),
    }
}
