//! A request to the disk: taken out of the guest, done on the disk, given back; and as it travels in a state.

use bytes::Bytes;
use colo_common::limits::{MAX_DISK_BYTES, MAX_DISK_REQUEST};
use colo_common::{BLOCK_SIZE, Block};
use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::io;
use std::ops::Range;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::super::queue::{Broken, Chain, Segments};
use crate::disk::{Disk, DiskContent, DiskWrite};
use crate::memory::GuestRam;
use crate::state::StateError;

/// Unit of a request's place on the disk, in bytes.
pub(super) const SECTOR: usize = 512;
pub(super) const SECTORS_PER_BLOCK: u64 = (BLOCK_SIZE / SECTOR) as u64;
/// Sectors of one discard or write-zeroes at most: if it fails, its blocks are in the epoch like those of a write.
pub(super) const MAX_ZERO_SECTORS: u32 = (MAX_DISK_REQUEST / SECTOR) as u32;

/// Bytes before the data: kind, reserved, sector.
const HEADER: usize = 16;
/// Bytes that describe a range to discard or to zero.
const RANGE: usize = 16;
/// Flag of a range: its room may be given back.
const UNMAP: u32 = 1;

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Operation {
    Read {
        into: Segments,
    },
    Write {
        data: Data,
    },
    /// Zero; a discard only as far as whole blocks go.
    Zero {
        bytes: u64,
        unmap: bool,
        discard: bool,
    },
    Flush,
    Identify {
        into: Segments,
    },
}

/// A request that was taken from the queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Request {
    /// Names its chain; none if the driver is gone.
    head: Option<u16>,
    /// Where its outcome goes: one byte.
    status: Segments,
    /// Where it begins on the disk, in bytes.
    offset: u64,
    operation: Operation,
}

/// How a request ended.
pub(super) struct Done {
    /// What was read.
    pub(super) result: io::Result<Vec<u8>>,
    /// Blocks that hold something else now.
    pub(super) writes: Vec<DiskWrite>,
    /// Blocks that may hold something else now.
    pub(super) unknown: Range<Block>,
}

impl Done {
    fn changing_nothing(result: io::Result<Vec<u8>>) -> Self {
        Self { result, writes: Vec::new(), unknown: Block(0)..Block(0) }
    }
}

/// A request that is not done.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) head: u16,
    pub(super) status: Segments,
    /// Nobody knows what it is; otherwise it is wrong.
    pub(super) unsupported: bool,
}

impl Request {
    /// Takes a request out of a chain, with the bytes to write.
    pub(super) fn parse(
        chain: Chain,
        ram: &GuestRam,
        sectors: u64,
        read_only: bool,
    ) -> Result<Result<Self, Refused>, Broken> {
        let Chain { head, mut readable, mut writable } = chain;
        let header = readable.take_front(HEADER).ok_or(Broken("a disk request without a header"))?;
        let header = header.read(ram, HEADER)?;
        let room =
            writable.len().checked_sub(1).ok_or(Broken("a disk request without room for its status"))?;
        let into = writable.take_front(room).ok_or(Broken("a disk request without room for its status"))?;
        let status = writable;
        let kind = u32::from_le_bytes(header[..4].try_into().expect("four bytes"));
        let sector = u64::from_le_bytes(header[8..].try_into().expect("eight bytes"));
        let refused = |status, unsupported| Ok(Err(Refused { head, status, unsupported }));
        if readable.len().max(into.len()) > MAX_DISK_REQUEST {
            return refused(status, false);
        }
        let (sector, operation) = match kind {
            VIRTIO_BLK_T_IN => (sector, Operation::Read { into }),
            VIRTIO_BLK_T_OUT => {
                let data = readable.read(ram, MAX_DISK_REQUEST)?;
                (sector, Operation::Write { data: Data(data.into()) })
            }
            VIRTIO_BLK_T_FLUSH => (0, Operation::Flush),
            VIRTIO_BLK_T_GET_ID => (0, Operation::Identify { into }),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                match zeroes(&readable.read(ram, MAX_DISK_REQUEST)?, kind == VIRTIO_BLK_T_DISCARD) {
                    Ok(range) => range,
                    Err(unsupported) => return refused(status, unsupported),
                }
            }
            _ => return refused(status, true),
        };
        let Some(offset) = sector.checked_mul(SECTOR as u64) else { return refused(status, false) };
        let request = Self { head: Some(head), status: status.clone(), offset, operation };
        if request.is_within(sectors) && !(read_only && request.changes()) {
            Ok(Ok(request))
        } else {
            refused(status, false)
        }
    }

    /// Whether a request of a state can be one of this guest's.
    pub(super) fn fits(&self, ram: &GuestRam, sectors: u64, read_only: bool) -> bool {
        let into = match &self.operation {
            Operation::Read { into } | Operation::Identify { into } => into.0.as_slice(),
            _ => &[],
        };
        let inside = into.iter().chain(&self.status.0).all(|segment| segment.is_ram(ram));
        inside && self.is_within(sectors) && !(read_only && self.changes())
    }

    /// The bounds of a request that was decoded.
    pub(super) fn check(&self) -> Result<(), StateError> {
        let len = match &self.operation {
            Operation::Read { into } | Operation::Identify { into } => into.len(),
            Operation::Write { data } => data.0.len(),
            Operation::Zero { bytes, .. } if *bytes > u64::from(MAX_ZERO_SECTORS) * SECTOR as u64 => {
                usize::MAX
            }
            Operation::Zero { .. } => 0,
            Operation::Flush => 0,
        };
        if len > MAX_DISK_REQUEST || self.status.len() > 1 {
            return Err(StateError::Malformed(format!("a disk request of {len} bytes")));
        }
        if self.offset.checked_add(self.len()).is_none_or(|end| end > MAX_DISK_BYTES) {
            return Err(StateError::Malformed(format!("a disk request at {:#x}", self.offset)));
        }
        Ok(())
    }

    /// Whole sectors, of the disk.
    fn is_within(&self, sectors: u64) -> bool {
        let len = self.len();
        len.is_multiple_of(SECTOR as u64)
            && self.offset.is_multiple_of(SECTOR as u64)
            && self.offset.checked_add(len).is_some_and(|end| end <= sectors * SECTOR as u64)
    }

    /// Bytes of the disk that it is about.
    fn len(&self) -> u64 {
        match &self.operation {
            Operation::Read { into } => into.len() as u64,
            Operation::Write { data } => data.0.len() as u64,
            Operation::Zero { bytes, .. } => *bytes,
            Operation::Flush | Operation::Identify { .. } => 0,
        }
    }

    /// What it counts for until it has ended, in bytes: a change as what it may bring into the epoch. Of a request that
    /// came from elsewhere only after [`check`](Self::check).
    pub(super) fn bytes(&self) -> usize {
        let Range { start, end } = self.blocks();
        match &self.operation {
            Operation::Read { into } => into.len(),
            Operation::Write { .. } | Operation::Zero { .. } => (end - start) as usize * BLOCK_SIZE,
            Operation::Flush | Operation::Identify { .. } => 0,
        }
    }

    fn changes(&self) -> bool {
        matches!(self.operation, Operation::Write { .. } | Operation::Zero { .. })
    }

    /// The blocks that it may change.
    pub(super) fn changed(&self) -> Range<Block> {
        let Range { start, end } = if self.changes() { self.blocks() } else { 0..0 };
        Block(start)..Block(end)
    }

    /// The blocks that it is about, also in part.
    fn blocks(&self) -> Range<u64> {
        let end = self.offset + self.len();
        Block::containing(self.offset).0..end.div_ceil(BLOCK_SIZE as u64)
    }

    /// Whether one of the two has to wait for the other.
    pub(super) fn conflicts_with(&self, other: &Self) -> bool {
        let (a, b) = (self.blocks(), other.blocks());
        (self.changes() || other.changes()) && a.start < b.end && b.start < a.end
    }

    pub(super) fn head(&self) -> u16 {
        self.head.unwrap_or(0)
    }

    pub(super) fn is_orphan(&self) -> bool {
        self.head.is_none()
    }

    /// Its driver is gone: nobody is told of its end.
    pub(super) fn orphan(&mut self) {
        self.head = None;
    }

    /// For messages.
    pub(super) fn name(&self) -> String {
        let what = match &self.operation {
            Operation::Read { .. } => "reading",
            Operation::Write { .. } => "writing",
            Operation::Zero { .. } => "zeroing",
            Operation::Flush => "making safe",
            Operation::Identify { .. } => "naming",
        };
        format!("{what} {} bytes at {:#x}", self.len(), self.offset)
    }

    /// Does it.
    pub(super) fn run(&self, disk: &dyn Disk) -> Done {
        match &self.operation {
            Operation::Read { into } => {
                let mut bytes = vec![0; into.len()];
                let read = disk.read(self.offset, &mut bytes);
                Done::changing_nothing(read.map(|()| bytes))
            }
            Operation::Write { data } => {
                let mut writes = Vec::new();
                let done = self.write(disk, &data.0, self.offset, &mut writes);
                self.outcome(done, writes)
            }
            Operation::Zero { bytes, unmap, discard } => {
                let mut writes = Vec::new();
                let done = self.zero(disk, *bytes, *unmap, *discard, &mut writes);
                self.outcome(done, writes)
            }
            Operation::Flush => Done::changing_nothing(disk.flush().map(|()| Vec::new())),
            Operation::Identify { .. } => Done::changing_nothing(Ok(Vec::new())),
        }
    }

    /// Writes whole blocks: what the guest left of the first and the last one is read before. No other request touches
    /// them meanwhile.
    fn write(
        &self,
        disk: &dyn Disk,
        data: &Bytes,
        offset: u64,
        writes: &mut Vec<DiskWrite>,
    ) -> io::Result<()> {
        if data.is_empty() {
            return Ok(());
        }
        let (first, end) = (Block::containing(offset), offset + data.len() as u64);
        let last = Block::containing(end - 1);
        let bytes = if offset == first.offset() && end.is_multiple_of(BLOCK_SIZE as u64) {
            data.clone()
        } else {
            let mut whole = vec![0; ((last.0 - first.0 + 1) as usize) * BLOCK_SIZE];
            disk.read(first.offset(), &mut whole[..BLOCK_SIZE])?;
            if last != first {
                let at = whole.len() - BLOCK_SIZE;
                disk.read(last.offset(), &mut whole[at..])?;
            }
            let from = (offset - first.offset()) as usize;
            whole[from..from + data.len()].copy_from_slice(data);
            whole.into()
        };
        disk.write(first.offset(), &bytes)?;
        writes.push(DiskWrite { first, content: DiskContent::Bytes(bytes) });
        Ok(())
    }

    fn zero(
        &self,
        disk: &dyn Disk,
        bytes: u64,
        unmap: bool,
        discard: bool,
        writes: &mut Vec<DiskWrite>,
    ) -> io::Result<()> {
        let end = self.offset + bytes;
        let first = Block(self.offset.div_ceil(BLOCK_SIZE as u64));
        let last = Block::containing(end);
        if first < last {
            disk.zero(first..last, unmap)?;
            writes.push(DiskWrite { first, content: DiskContent::Zeroes(last.0 - first.0) });
        }
        if discard {
            return Ok(());
        }
        // What lies before the first whole block and after the last one, or within one block.
        let edges = if first > last {
            [(self.offset, end), (end, end)]
        } else {
            [(self.offset, first.offset()), (last.offset(), end)]
        };
        for (from, to) in edges.into_iter().filter(|(from, to)| from < to) {
            let zeroes = Bytes::from(vec![0; (to - from) as usize]);
            self.write(disk, &zeroes, from, writes)?;
        }
        Ok(())
    }

    /// A write that failed may have changed some of its blocks, or parts of them.
    fn outcome(&self, done: io::Result<()>, writes: Vec<DiskWrite>) -> Done {
        match done {
            Ok(()) => Done { writes, ..Done::changing_nothing(Ok(Vec::new())) },
            Err(e) => {
                let Range { start, end } = self.blocks();
                Done { unknown: Block(start)..Block(end), ..Done::changing_nothing(Err(e)) }
            }
        }
    }

    /// Gives the driver what it asked for; answers the bytes that were written into the guest.
    pub(super) fn give(
        &self,
        ram: &GuestRam,
        read: &[u8],
        serial: &str,
        status: u8,
    ) -> Result<usize, Broken> {
        let given = match &self.operation {
            Operation::Read { into } => into.write(ram, read)?,
            Operation::Identify { into } => {
                let mut name = [0; VIRTIO_BLK_ID_BYTES as usize];
                name[..serial.len()].copy_from_slice(serial.as_bytes());
                into.write(ram, &name)?
            }
            _ => 0,
        };
        Ok(given + self.status.write(ram, &[status])?)
    }
}

/// The one range of a discard or write-zeroes, from its sector on; or whether nobody knows what it is.
fn zeroes(payload: &[u8], discard: bool) -> Result<(u64, Operation), bool> {
    let range: &[u8; RANGE] = payload.try_into().map_err(|_| false)?;
    let field = |at: usize| u32::from_le_bytes(range[at..at + 4].try_into().expect("four bytes"));
    let sector = u64::from_le_bytes(range[..8].try_into().expect("eight bytes"));
    let (sectors, flags) = (field(8), field(12));
    if flags & !UNMAP != 0 || (discard && flags != 0) {
        return Err(true);
    }
    if sectors == 0 || sectors > MAX_ZERO_SECTORS {
        return Err(false);
    }
    let bytes = u64::from(sectors) * SECTOR as u64;
    Ok((sector, Operation::Zero { bytes, unmap: discard || flags & UNMAP != 0, discard }))
}

/// Bytes to write; clones share them.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Data(Bytes);

impl Serialize for Data {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Data {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Piece;

        impl Visitor<'_> for Piece {
            type Value = Data;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "at most {MAX_DISK_REQUEST} bytes")
            }

            fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Data, E> {
                if bytes.len() > MAX_DISK_REQUEST {
                    return Err(E::invalid_length(bytes.len(), &self));
                }
                Ok(Data(Bytes::copy_from_slice(bytes)))
            }
        }

        deserializer.deserialize_bytes(Piece)
    }
}

#[cfg(test)]
mod tests {
    use super::super::BlockState;
    use super::{Operation, Request, Segments};

    #[test]
    fn a_request_beyond_every_disk_is_refused() {
        let zero = |offset, bytes| Request {
            head: Some(0),
            status: Segments(Vec::new()),
            offset,
            operation: Operation::Zero { bytes, unmap: false, discard: false },
        };
        for request in [zero(u64::MAX, 512), zero(1 << 60, 512), zero(512, u64::MAX), zero(0, u64::MAX)] {
            let state = BlockState { requests: vec![request.clone(), request] };
            let error = state.check_limits().expect_err("it is no disk's").to_string();
            assert!(error.contains("a disk request"), "{error}");
        }
        assert!(BlockState { requests: vec![zero(512, 512)] }.check_limits().is_ok());
    }
}
