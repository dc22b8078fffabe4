//! What a process that ran the guest leaves to the follower that takes its place in the same process by `exec`: the
//! guest's memory, and what is known of it. So a runner that lost its vm, or moved it on purpose, follows at once and is
//! sent what differs.
//!
//! Memory and description are files without a name; the new process image is told the number of the description.

use colo_common::limits::MAX_DISK_BYTES;
use colo_common::{BLOCK_SIZE, Block, Gfn, History, Point, VmId};
use colo_vmm::memory::MemoryError;
use colo_vmm::{BlockSet, DirtySet, GuestMemory, inherit};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::RawFd;
use std::sync::Arc;
use xxhash_rust::xxh3::xxh3_64;

/// Raised by every change of the encoding. Both ends are of one installation, but that may have been replaced meanwhile.
const FORMAT: u32 = 1;
/// Bytes of a description at most. One that is larger leaves out what is known of the memory: digests tell it then.
const MAX_BYTES: u64 = 64 << 20;
/// Bytes of the checksum behind it.
const SUM: usize = 8;

/// A guest's memory, and how it differs from a point that another node may know.
pub struct Handover {
    /// Whose it is.
    pub vm: VmId,
    /// Digest of the guest's description.
    pub spec_digest: u64,
    /// The memory.
    pub memory: Arc<GuestMemory>,
    /// The memory holds this point, but for `changed`. Nothing if that is not known.
    pub base: Option<Point>,
    /// Frames that may hold something else.
    pub changed: DirtySet,
    /// The point that the image of the disk holds, and blocks where it may hold something else. Nothing without a disk.
    pub disk: Option<(Point, BlockSet)>,
    /// The history that the points lie on.
    pub history: History,
}

/// Why nothing was handed over. The copy is compared by digests, or sent in full, then.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// The files.
    #[error("what the process before this one left cannot be read or written: {0}")]
    File(#[from] io::Error),
    /// The description.
    #[error("what the process before this one left is damaged: {0}")]
    Damaged(String),
    /// The memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// The point that the image holds, blocks of the disk, and runs of them that may hold something else.
type DiskLeft = (Point, u64, Vec<(u64, u64)>);

#[derive(Serialize, Deserialize)]
struct Description {
    format: u32,
    vm: VmId,
    spec_digest: u64,
    memory: RawFd,
    memory_bytes: u64,
    base: Option<Point>,
    changed: Vec<(u64, u64)>,
    disk: Option<DiskLeft>,
    history: Vec<Point>,
}

impl Handover {
    /// Has everything outlive this process image; answers the number that the next one is told. Nothing may write the
    /// memory any more.
    ///
    /// # Errors
    /// The system has no file to give.
    pub fn leave(&self) -> Result<RawFd, HandoverError> {
        let runs = self.changed.runs().map(|(first, count)| (first.0, count)).collect();
        let mut description = Description {
            format: FORMAT,
            vm: self.vm.clone(),
            spec_digest: self.spec_digest,
            memory: inherit::leave(self.memory.file())?,
            memory_bytes: self.memory.layout().bytes(),
            base: self.base,
            changed: runs,
            disk: self.disk.as_ref().map(|(point, blocks)| {
                let runs = blocks.runs().map(|(first, count)| (first.0, count)).collect();
                (*point, blocks.blocks(), runs)
            }),
            history: self.history.points().to_vec(),
        };
        let mut bytes = encode(&description)?;
        if bytes.len() as u64 > MAX_BYTES {
            (description.base, description.changed, description.disk) = (None, Vec::new(), None);
            bytes = encode(&description)?;
        }
        let mut file = inherit::nameless(c"colo-handover")?;
        file.write_all(&bytes)?;
        let fd = inherit::leave(&file)?;
        // Closed by the end of the process, or by whoever takes it.
        std::mem::forget(file);
        Ok(fd)
    }

    /// Takes what was left under this number.
    ///
    /// # Errors
    /// It is not there, or is not what a process of this version leaves.
    pub fn take(fd: RawFd) -> Result<Self, HandoverError> {
        let description = read(inherit::take(fd)?)?;
        let Description { vm, spec_digest, memory_bytes, base, .. } = description;
        let memory = GuestMemory::adopt(inherit::take(description.memory)?, memory_bytes)?;
        let mut changed = DirtySet::new(memory.layout().frame_limit());
        for (first, count) in description.changed {
            if first.checked_add(count).is_none_or(|end| end > changed.frames()) {
                return Err(HandoverError::Damaged(format!("frames from {first} are not the guest's")));
            }
            changed.insert_range(Gfn(first), count);
        }
        let disk = match description.disk {
            Some((point, blocks, runs)) => Some((point, block_set(blocks, runs)?)),
            None => None,
        };
        let history = History::from_points(description.history);
        let history = history.map_err(|e| HandoverError::Damaged(e.to_string()))?;
        Ok(Self { vm, spec_digest, memory: Arc::new(memory), base, changed, disk, history })
    }
}

fn block_set(blocks: u64, runs: Vec<(u64, u64)>) -> Result<BlockSet, HandoverError> {
    if blocks > MAX_DISK_BYTES / BLOCK_SIZE as u64 {
        return Err(HandoverError::Damaged(format!("no disk has {blocks} blocks")));
    }
    let mut set = BlockSet::new(blocks);
    for (first, count) in runs {
        if first.checked_add(count).is_none_or(|end| end > blocks) {
            return Err(HandoverError::Damaged(format!("blocks from {first} are not the disk's")));
        }
        set.insert_range(Block(first), count);
    }
    Ok(set)
}

fn encode(description: &Description) -> Result<Vec<u8>, HandoverError> {
    let mut bytes = postcard::to_stdvec(description).map_err(|e| HandoverError::Damaged(e.to_string()))?;
    bytes.extend(xxh3_64(&bytes).to_le_bytes());
    Ok(bytes)
}

fn read(mut file: File) -> Result<Description, HandoverError> {
    let damaged = |what: &str| HandoverError::Damaged(what.to_owned());
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    let (body, sum) = bytes.split_last_chunk::<SUM>().ok_or_else(|| damaged("it is too short"))?;
    if xxh3_64(body) != u64::from_le_bytes(*sum) {
        return Err(damaged("its checksum is wrong"));
    }
    let description: Description =
        postcard::from_bytes(body).map_err(|e| HandoverError::Damaged(e.to_string()))?;
    if description.format != FORMAT {
        return Err(damaged("it is of another version of Colo"));
    }
    Ok(description)
}

#[cfg(test)]
mod tests {
    use super::Handover;
    use colo_common::history::{History, point};
    use colo_common::{Block, Gfn};
    use colo_vmm::{BlockSet, DirtySet, GuestMemory};
    use std::sync::Arc;

    #[test]
    fn memory_and_what_is_known_of_it_pass_over() {
        let memory = Arc::new(GuestMemory::new(8 << 20).unwrap());
        memory.write_page(Gfn(5), &[7; 4096]).unwrap();
        let mut changed = DirtySet::new(memory.layout().frame_limit());
        changed.insert_range(Gfn(5), 3);
        let mut history = History::default();
        history.extend(point(2, 40));
        let (base, vm) = (Some(point(2, 38)), "web".parse().unwrap());
        let mut blocks = BlockSet::new(64);
        blocks.insert_range(Block(60), 4);
        let disk = Some((point(2, 37), blocks));
        let left = Handover { vm, spec_digest: 9, memory, base, changed, disk, history };
        let taken = {
            let fd = left.leave().unwrap();
            // As after an exec: nobody but the next one owns the memory's descriptor.
            let taken = Handover::take(fd).unwrap();
            std::mem::forget(left.memory);
            taken
        };
        assert_eq!((taken.vm.as_str(), taken.spec_digest, taken.base), ("web", 9, Some(point(2, 38))));
        assert_eq!(taken.changed.runs().collect::<Vec<_>>(), [(Gfn(5), 3)]);
        let (at, blocks) = taken.disk.unwrap();
        assert_eq!((at, blocks.runs().collect::<Vec<_>>()), (point(2, 37), vec![(Block(60), 4)]));
        assert_eq!(taken.history.tip(), Some(point(2, 40)));
        let mut page = [0; 4096];
        taken.memory.read_page(Gfn(5), &mut page).unwrap();
        assert_eq!(page, [7; 4096]);
    }
}
