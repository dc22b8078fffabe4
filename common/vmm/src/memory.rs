//! Guest memory: one sparse memfd, mapped where the machine's address map has RAM. The first step of the
//! way of a page.
//!
//! Nothing here costs time or memory in proportion to memory that the guest never touched: the mapping is
//! not reserved, populated ranges are found by seeking for data, and writes of our own devices are kept in a
//! [`DirtySet`] instead of a flat bitmap. Every write that goes through [`GuestMemory::ram`] is marked by
//! `vm-memory` itself (KVM does not log writes of this process), so a device cannot forget it.

use colo_common::limits::MAX_SLOT_BYTES;
use colo_common::{Gfn, PAGE_SIZE};
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap};
use vmm_sys_util::seek_hole::SeekHole;
use vmm_sys_util::write_zeroes::PunchHole;
use xxhash_rust::xxh3::xxh3_128_with_seed;

use crate::arch::x86_64::layout::{HIGH_RAM_START, HOLE_START};
use crate::dirty_set::DirtySet;
use crate::{inherit, sigbus};

/// Guest RAM as devices and loaders see it: writes through it are in the next dirty set.
pub type GuestRam = GuestMemoryMmap<DeviceWrites>;

/// The unit in which `stat` counts.
const STAT_BLOCK: u64 = 512;

/// One page of bytes.
pub type Page = [u8; PAGE_SIZE];

/// Why guest memory could not be made or read.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The memfd cannot be made or sized.
    #[error(
        "cannot create guest memory of {bytes} bytes: {source}; lower the guest's memory or raise the limit on file size (ulimit -f)"
    )]
    Create {
        /// Bytes asked for.
        bytes: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The address space of this process has no room.
    #[error(
        "cannot map guest memory of {bytes} bytes: {reason}; lower the guest's memory or raise the limit on address space (ulimit -v)"
    )]
    Map {
        /// Bytes asked for.
        bytes: u64,
        /// What the mapping layer said.
        reason: String,
    },
    /// A file that was handed over and is not memory of this size.
    #[error("the guest memory that was handed over has {found} bytes, and the guest has {bytes}")]
    OtherSize {
        /// Bytes of the guest.
        bytes: u64,
        /// Bytes of the file.
        found: u64,
    },
    /// A frame outside guest RAM.
    #[error("{0} is not guest memory")]
    NoSuchFrame(Gfn),
    /// The host does not take memory back.
    #[error("cannot give guest memory back to the host: {0}")]
    Discard(#[source] io::Error),
    /// The populated ranges cannot be read from the memfd.
    #[error("cannot look for populated guest memory: {0}")]
    Seek(#[source] io::Error),
}

/// A contiguous part of RAM and the KVM memory slot that maps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// KVM's slot number.
    pub id: u32,
    /// First frame.
    pub first: Gfn,
    /// Frames in the slot.
    pub frames: u64,
}

/// Where RAM of a given size lies, and the slots that KVM gets. Part of what both nodes must agree on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryLayout {
    bytes: u64,
    slots: Vec<Slot>,
}

impl MemoryLayout {
    /// The layout for `bytes` of RAM: low RAM up to the device hole, the rest above 4 GiB.
    pub fn new(bytes: u64) -> Self {
        let mut slots = Vec::new();
        for (start, len) in ram_ranges(bytes) {
            for offset in (0..len).step_by(MAX_SLOT_BYTES as usize) {
                let frames = (len - offset).min(MAX_SLOT_BYTES) / PAGE_SIZE as u64;
                slots.push(Slot { id: slots.len() as u32, first: Gfn::containing(start + offset), frames });
            }
        }
        Self { bytes, slots }
    }

    /// Bytes of RAM.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Ranges of RAM: (guest-physical start, bytes), ascending.
    pub fn ranges(&self) -> impl Iterator<Item = (u64, u64)> {
        ram_ranges(self.bytes)
    }

    /// KVM memory slots, ascending.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Frames below this number may be RAM; the size of a [`DirtySet`] for this guest.
    pub fn frame_limit(&self) -> u64 {
        self.slots.last().map_or(0, |slot| slot.first.0 + slot.frames)
    }

    /// The frame at `offset` pages in a slot; nothing if there is no such slot or page.
    pub fn frame_of(&self, slot: u32, offset: u64) -> Option<Gfn> {
        let slot = self.slots.get(slot as usize)?;
        (offset < slot.frames).then(|| Gfn(slot.first.0 + offset))
    }
}

fn ram_ranges(bytes: u64) -> impl Iterator<Item = (u64, u64)> {
    let low = bytes.min(HOLE_START);
    [(0, low), (HIGH_RAM_START, bytes - low)].into_iter().filter(|&(_, len)| len > 0)
}

/// The memory of one guest; unmapped when dropped.
pub struct GuestMemory {
    /// Dropped before the mapping that it speaks of.
    _guard: Vec<sigbus::Guard>,
    ram: GuestRam,
    file: Arc<File>,
    layout: MemoryLayout,
    writes: Arc<WriteLog>,
}

impl GuestMemory {
    /// Makes `bytes` of zeroed memory that costs nothing until touched.
    ///
    /// # Errors
    /// The system refuses the memfd or the mapping.
    pub fn new(bytes: u64) -> Result<Self, MemoryError> {
        Self::map(memfd(bytes).map_err(|source| MemoryError::Create { bytes, source })?, bytes)
    }

    /// Takes memory that another process image left with all that is in it: the file of [`file`](Self::file).
    ///
    /// # Errors
    /// The file has another size, or the system refuses the mapping.
    pub fn adopt(file: File, bytes: u64) -> Result<Self, MemoryError> {
        let found = file.metadata().map_err(|source| MemoryError::Create { bytes, source })?.len();
        if found != bytes {
            return Err(MemoryError::OtherSize { bytes, found });
        }
        Self::map(file, bytes)
    }

    fn map(file: File, bytes: u64) -> Result<Self, MemoryError> {
        let layout = MemoryLayout::new(bytes);
        let file = Arc::new(file);
        let writes = Arc::new(WriteLog {
            enabled: AtomicBool::new(false),
            set: Mutex::new(DirtySet::new(layout.frame_limit())),
        });
        let failed = |reason: String| MemoryError::Map { bytes, reason };
        let (mut regions, mut offset) = (Vec::new(), 0);
        for (start, len) in layout.ranges() {
            let log = DeviceWrites { log: Arc::clone(&writes), base: start };
            let mapping = MmapRegionBuilder::new_with_bitmap(len as usize, log)
                .with_file_offset(FileOffset::from_arc(Arc::clone(&file), offset))
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
                .build()
                .map_err(|e| failed(e.to_string()))?;
            offset += len;
            let region = GuestRegionMmap::new(mapping, GuestAddress(start));
            regions.push(region.ok_or_else(|| failed("the address map overflows".to_owned()))?);
        }
        let _guard = regions.iter().map(|r| sigbus::Guard::new(r.as_ptr() as usize, r.size())).collect();
        let ram = GuestRam::from_regions(regions).map_err(|e| failed(e.to_string()))?;
        Ok(Self { _guard, ram, file, layout, writes })
    }

    /// What the memory is kept in: to be [adopted](Self::adopt) by the process image that takes this one's place.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The RAM for devices and loaders; writes through it are tracked while tracking is on.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Where the RAM lies.
    pub fn layout(&self) -> &MemoryLayout {
        &self.layout
    }

    /// The address in this process of a slot's first byte, for KVM.
    pub fn host_address(&self, slot: &Slot) -> u64 {
        let at = self.ram.get_host_address(GuestAddress(slot.first.address()));
        at.expect("slots lie inside the RAM they were made from") as u64
    }

    /// Whether the frame is RAM.
    ///
    /// # Errors
    /// It is not.
    pub fn check_frame(&self, gfn: Gfn) -> Result<(), MemoryError> {
        let page = address_of(gfn)?;
        if self.ram.address_in_range(page) { Ok(()) } else { Err(MemoryError::NoSuchFrame(gfn)) }
    }

    /// Copies a page out. While the guest runs, the copy may be torn; a page that is written meanwhile is
    /// reported dirty again.
    ///
    /// # Errors
    /// The frame is not RAM.
    pub fn read_page(&self, gfn: Gfn, page: &mut Page) -> Result<(), MemoryError> {
        let read = self.ram.read_slice(page, address_of(gfn)?);
        read.map_err(|_| MemoryError::NoSuchFrame(gfn))
    }

    /// Copies a page in; a device write like any other, so tracked while tracking is on.
    ///
    /// # Errors
    /// The frame is not RAM.
    pub fn write_page(&self, gfn: Gfn, page: &Page) -> Result<(), MemoryError> {
        let written = self.ram.write_slice(page, address_of(gfn)?);
        written.map_err(|_| MemoryError::NoSuchFrame(gfn))
    }

    /// Gives the whole content back to the host: all zero afterwards, and no longer populated. Not tracked, so
    /// only for memory whose writes are not.
    ///
    /// # Errors
    /// The host refuses to punch the hole.
    pub fn discard_all(&self) -> Result<(), MemoryError> {
        assert!(!self.writes.enabled.load(Ordering::SeqCst), "a tracked guest's memory cannot be discarded");
        let mut file = self.file.try_clone().map_err(MemoryError::Discard)?;
        file.punch_hole(0, self.layout.bytes).map_err(MemoryError::Discard)
    }

    /// Gives the memory of some frames back to the host: they are zero afterwards, and no longer populated. Not
    /// tracked, so only for memory whose writes are not.
    ///
    /// # Errors
    /// A frame is not RAM, or the host refuses to punch the hole.
    pub fn discard_frames(&self, first: Gfn, frames: u64) -> Result<(), MemoryError> {
        let end = first.0.saturating_add(frames);
        let (mut before, mut left) = (0, frames);
        let mut file = self.file.try_clone().map_err(MemoryError::Discard)?;
        for slot in self.layout.slots() {
            let (from, to) = (first.0.max(slot.first.0), end.min(slot.first.0 + slot.frames));
            if from < to {
                let offset = (before + from - slot.first.0) * PAGE_SIZE as u64;
                file.punch_hole(offset, (to - from) * PAGE_SIZE as u64).map_err(MemoryError::Discard)?;
                left -= to - from;
            }
            before += slot.frames;
        }
        if left == 0 { Ok(()) } else { Err(MemoryError::NoSuchFrame(first)) }
    }

    /// Frames that have memory behind them; all others are zero. (first frame, number), ascending.
    ///
    /// # Errors
    /// The memfd cannot be searched.
    pub fn populated(&self) -> Result<Vec<(Gfn, u64)>, MemoryError> {
        let mut file = self.file.try_clone().map_err(MemoryError::Seek)?;
        let (mut runs, mut at) = (Vec::new(), 0);
        while let Some(data) = file.seek_data(at).map_err(MemoryError::Seek)? {
            let end = file.seek_hole(data).map_err(MemoryError::Seek)?.unwrap_or(self.layout.bytes);
            self.push_file_range(data, end, &mut runs);
            at = end;
        }
        Ok(runs)
    }

    /// The first run of frames from `from` on that have memory behind them: (first frame, number).
    ///
    /// # Errors
    /// The memfd cannot be searched.
    pub fn next_populated(&self, from: Gfn) -> Result<Option<(Gfn, u64)>, MemoryError> {
        let (page, mut before) = (PAGE_SIZE as u64, 0);
        let mut file = self.file.try_clone().map_err(MemoryError::Seek)?;
        for (address, len) in self.layout.ranges() {
            let (first, end) = (address / page, (address + len) / page);
            if from.0 < end {
                let at = before + (from.0.max(first) - first) * page;
                let data = file.seek_data(at).map_err(MemoryError::Seek)?.filter(|&data| data < before + len);
                if let Some(data) = data {
                    let hole = file.seek_hole(data).map_err(MemoryError::Seek)?.unwrap_or(self.layout.bytes);
                    let count = (hole.min(before + len) - data).div_ceil(page);
                    return Ok(Some((Gfn(first + (data - before) / page), count)));
                }
            }
            before += len;
        }
        Ok(None)
    }

    /// Bytes of it that have memory behind them, as the host counts them: at once, whatever the guest's size.
    ///
    /// # Errors
    /// The memfd cannot be asked.
    pub fn populated_bytes(&self) -> Result<u64, MemoryError> {
        let blocks = self.file.metadata().map_err(MemoryError::Seek)?.blocks();
        Ok(blocks.saturating_mul(STAT_BLOCK))
    }

    /// Digest of the content: equal for equal memory whatever is populated, since zero pages do not count.
    ///
    /// # Errors
    /// The memfd cannot be searched.
    pub fn digest(&self) -> Result<u128, MemoryError> {
        let (mut page, mut sum) = ([0; PAGE_SIZE], 0_u128);
        for (first, frames) in self.populated()? {
            for gfn in (first.0..first.0 + frames).map(Gfn) {
                self.read_page(gfn, &mut page)?;
                if page != [0; PAGE_SIZE] {
                    sum = sum.wrapping_add(xxh3_128_with_seed(&page, gfn.0));
                }
            }
        }
        Ok(sum)
    }

    /// Starts or stops remembering the frames that this process writes; stopping forgets them.
    pub fn track_writes(&self, on: bool) {
        self.writes.enabled.store(on, Ordering::SeqCst);
        if !on {
            self.writes.set().clear();
        }
    }

    /// Moves the frames that this process has written since the last call into `dirty`.
    pub fn take_writes(&self, dirty: &mut DirtySet) {
        let mut set = self.writes.set();
        dirty.union_with(&set);
        set.clear();
    }

    /// A range of the file may lie across the hole of the address map.
    fn push_file_range(&self, start: u64, end: u64, runs: &mut Vec<(Gfn, u64)>) {
        let mut file_start = 0;
        for (address, len) in self.layout.ranges() {
            let (from, to) = (start.max(file_start), end.min(file_start + len));
            if from < to {
                let first = Gfn::containing(address + (from - file_start));
                runs.push((first, (to - from).div_ceil(PAGE_SIZE as u64)));
            }
            file_start += len;
        }
    }
}

impl std::fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GuestMemory({} bytes)", self.layout.bytes)
    }
}

/// A frame's number may come from a peer: it may have no address at all.
fn address_of(gfn: Gfn) -> Result<GuestAddress, MemoryError> {
    gfn.0.checked_mul(PAGE_SIZE as u64).map(GuestAddress).ok_or(MemoryError::NoSuchFrame(gfn))
}

fn memfd(bytes: u64) -> io::Result<File> {
    if file_size_limit()? < bytes {
        // The system would not refuse but kill this process (SIGXFSZ).
        return Err(io::Error::from_raw_os_error(libc::EFBIG));
    }
    let file = inherit::nameless(c"colo-guest")?;
    file.set_len(bytes)?;
    Ok(file)
}

/// How long a file of this process may become, in bytes.
fn file_size_limit() -> io::Result<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the call writes one `rlimit`, and `limit` is one.
    if unsafe { libc::getrlimit(libc::RLIMIT_FSIZE, &raw mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(limit.rlim_cur)
}

struct WriteLog {
    enabled: AtomicBool,
    set: Mutex<DirtySet>,
}

impl WriteLog {
    fn set(&self) -> std::sync::MutexGuard<'_, DirtySet> {
        // A panic cannot leave the set half changed in a way that loses a frame.
        self.set.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Marks what this process writes into guest RAM; `vm-memory` calls it after every write.
#[derive(Clone)]
pub struct DeviceWrites {
    log: Arc<WriteLog>,
    /// Guest-physical address that offset 0 stands for.
    base: u64,
}

impl std::fmt::Debug for DeviceWrites {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DeviceWrites(from {:#x})", self.base)
    }
}

impl WithBitmapSlice<'_> for DeviceWrites {
    type S = Self;
}

impl BitmapSlice for DeviceWrites {}

impl Bitmap for DeviceWrites {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 || !self.log.enabled.load(Ordering::Relaxed) {
            return;
        }
        let first = self.base + offset as u64;
        let (first, last) = (Gfn::containing(first), Gfn::containing(first + len as u64 - 1));
        self.log.set().insert_range(first, last.0 - first.0 + 1);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.log.set().contains(Gfn::containing(self.base + offset as u64))
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self { log: Arc::clone(&self.log), base: self.base + offset as u64 }
    }
}

#[cfg(test)]
mod tests {
    use super::{GuestMemory, MemoryError, MemoryLayout};
    use crate::arch::x86_64::layout::{HIGH_RAM_START, HOLE_START};
    use crate::dirty_set::DirtySet;
    use colo_common::limits::{MAX_GUEST_MEMORY, MAX_SLOT_BYTES};
    use colo_common::{Gfn, PAGE_SIZE};
    use vm_memory::{Bytes, GuestAddress};

    const ONES: [u8; PAGE_SIZE] = [1; PAGE_SIZE];

    #[test]
    fn layout_splits_at_the_hole_and_at_the_slot_size() {
        let layout = MemoryLayout::new(MAX_GUEST_MEMORY);
        let slots = layout.slots();
        assert_eq!(slots[0].frames * PAGE_SIZE as u64, HOLE_START);
        assert_eq!(slots[1].first, Gfn::containing(HIGH_RAM_START));
        assert_eq!(slots[1].frames * PAGE_SIZE as u64, MAX_SLOT_BYTES);
        assert_eq!(slots.iter().map(|s| s.frames).sum::<u64>() * PAGE_SIZE as u64, MAX_GUEST_MEMORY);
        assert_eq!(layout.frame_of(1, 5), Some(Gfn::containing(HIGH_RAM_START + 5 * PAGE_SIZE as u64)));
        assert_eq!(layout.frame_of(0, slots[0].frames), None);
        assert_eq!(layout.frame_of(99, 0), None);
    }

    #[test]
    fn writes_are_remembered_by_frame_once_tracking_is_on() {
        let memory = GuestMemory::new(8 << 30).unwrap();
        let mut dirty = DirtySet::new(memory.layout().frame_limit());
        memory.ram().write_obj(1_u64, GuestAddress(0x1000)).unwrap();
        memory.track_writes(true);
        memory.ram().write_slice(&[7; 16], GuestAddress(0x2ff8)).unwrap();
        memory.write_page(Gfn::containing(HIGH_RAM_START), &ONES).unwrap();
        memory.take_writes(&mut dirty);
        let frames: Vec<u64> = dirty.iter().map(|g| g.0).collect();
        assert_eq!(frames, [2, 3, HIGH_RAM_START / PAGE_SIZE as u64]);
        dirty.clear();
        memory.take_writes(&mut dirty);
        assert!(dirty.is_empty());
    }

    #[test]
    fn populated_ranges_skip_what_was_never_touched_and_cross_the_hole() {
        let memory = GuestMemory::new(MAX_GUEST_MEMORY).unwrap();
        let last_low = Gfn(HOLE_START / PAGE_SIZE as u64 - 1);
        let high = Gfn::containing(HIGH_RAM_START);
        for gfn in [Gfn(3), last_low, high, Gfn(high.0 + 1), Gfn(memory.layout().frame_limit() - 1)] {
            memory.write_page(gfn, &ONES).unwrap();
        }
        let top = Gfn(memory.layout().frame_limit() - 1);
        assert_eq!(memory.populated().unwrap(), [(Gfn(3), 1), (last_low, 1), (high, 2), (top, 1)]);
        let (mut found, mut at) = (Vec::new(), Gfn(0));
        while let Some((first, count)) = memory.next_populated(at).unwrap() {
            found.push((first, count));
            at = Gfn(first.0 + count);
        }
        assert_eq!(found, memory.populated().unwrap());
        assert_eq!(memory.next_populated(Gfn(HOLE_START / PAGE_SIZE as u64)).unwrap(), Some((high, 2)));
        assert_eq!(memory.next_populated(Gfn(u64::MAX)).unwrap(), None);
        assert_eq!(memory.populated_bytes().unwrap(), 5 * PAGE_SIZE as u64);
        assert!(memory.write_page(Gfn(HOLE_START / PAGE_SIZE as u64), &ONES).is_err());
    }

    #[test]
    fn a_frame_that_is_none_is_refused_whatever_its_number() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        for gfn in [1 << 8, 1 << 40, (1 << 52) - 1, 1 << 52, u64::MAX].map(Gfn) {
            assert!(matches!(memory.check_frame(gfn), Err(MemoryError::NoSuchFrame(n)) if n == gfn));
            assert!(matches!(memory.read_page(gfn, &mut [0; PAGE_SIZE]), Err(MemoryError::NoSuchFrame(_))));
            assert!(matches!(memory.write_page(gfn, &ONES), Err(MemoryError::NoSuchFrame(_))));
        }
    }

    #[test]
    fn the_digest_sees_content_and_place_but_not_what_is_populated() {
        let (a, b) = (GuestMemory::new(1 << 30).unwrap(), GuestMemory::new(1 << 30).unwrap());
        a.write_page(Gfn(5), &ONES).unwrap();
        b.write_page(Gfn(5), &ONES).unwrap();
        b.write_page(Gfn(77), &[0; PAGE_SIZE]).unwrap();
        assert_eq!(a.digest().unwrap(), b.digest().unwrap());
        b.write_page(Gfn(5), &[0; PAGE_SIZE]).unwrap();
        b.write_page(Gfn(6), &ONES).unwrap();
        assert_ne!(a.digest().unwrap(), b.digest().unwrap());
        b.discard_all().unwrap();
        assert_eq!(b.digest().unwrap(), 0);
        assert!(b.populated().unwrap().is_empty());
    }
}
