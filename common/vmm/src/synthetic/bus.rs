//! How the vCPUs of a synthetic guest reach its memory.
//!
//! KVM does not tell the VMM what its vCPUs write, it logs it. So stores of vCPUs must not go through
//! [`GuestMemory::ram`], which would mark them as the VMM's own; they go through a second mapping of the same
//! memfd, after the tracker has logged them. Our device and the loader use the first one, as everywhere.

use colo_common::{Gfn, PAGE_SIZE};
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::tracker::Tracker;
use crate::memory::{GuestMemory, MemoryError, Page};
use crate::sigbus;

/// Guest memory as the vCPUs see it.
pub(super) struct CpuView {
    /// Before the mappings, so that it is dropped before they are.
    _guards: Vec<sigbus::Guard>,
    mapping: GuestMemoryMmap<()>,
    memory: Arc<GuestMemory>,
    /// Frames of the lower of the two ranges of RAM, and the first frame of the upper one.
    low_frames: u64,
    high_first: u64,
    /// Frames from one page of the program to the next.
    spread: u64,
}

impl CpuView {
    pub(super) fn new(memory: &Arc<GuestMemory>) -> Result<Self, MemoryError> {
        let bytes = memory.layout().bytes();
        let regions = memory.ram().iter();
        let ranges: Vec<_> =
            regions.map(|r| (r.start_addr(), r.len() as usize, r.file_offset().cloned())).collect();
        let mapping = GuestMemoryMmap::from_ranges_with_files(ranges)
            .map_err(|e| MemoryError::Map { bytes, reason: e.to_string() })?;
        let guard = |r: &vm_memory::GuestRegionMmap<()>| sigbus::Guard::new(r.as_ptr() as usize, r.size());
        let mut ranges = memory.layout().ranges();
        let low_frames = ranges.next().map_or(0, |(_, len)| len / PAGE_SIZE as u64);
        let high_first = ranges.next().map_or(0, |(start, _)| Gfn::containing(start).0);
        Ok(Self {
            _guards: mapping.iter().map(guard).collect(),
            mapping,
            memory: Arc::clone(memory),
            low_frames,
            high_first,
            spread: 1,
        })
    }

    /// Sets how far apart the program's pages are, in frames.
    pub(super) fn set_spread(&mut self, spread: u32) {
        self.spread = u64::from(spread);
    }

    /// The frame of the program's page `page`.
    pub(super) fn frame(&self, page: u32) -> Gfn {
        let frame = u64::from(page) * self.spread;
        Gfn(frame.checked_sub(self.low_frames).map_or(frame, |above| self.high_first + above))
    }

    /// A page as it is.
    pub(super) fn read(&self, page: u32, content: &mut Page) {
        let address = GuestAddress(self.frame(page).address());
        self.mapping.read_slice(content, address).expect("the program's pages are RAM");
    }

    /// The first words of a page.
    pub(super) fn read_words<const N: usize>(&self, page: u32) -> [u64; N] {
        let address = self.frame(page).address();
        let word = |at: usize| self.mapping.read_obj::<u64>(GuestAddress(address + at as u64 * 8));
        std::array::from_fn(|at| u64::from_le(word(at).expect("the program's pages are RAM")))
    }

    /// A store of a vCPU: logged, then made.
    pub(super) fn store(&self, tracker: &mut Tracker, vcpu: u32, page: u32, word: u64, bytes: &[u8]) {
        let gfn = self.frame(page);
        tracker.log(vcpu, gfn);
        let address = GuestAddress(gfn.address() + word * 8);
        self.mapping.write_slice(bytes, address).expect("the program's pages are RAM");
    }

    /// A store of the VMM: of the loader, or of the console's device.
    pub(super) fn device_store(&self, page: u32, bytes: &[u8]) {
        let address = GuestAddress(self.frame(page).address());
        self.memory.ram().write_slice(bytes, address).expect("the program's pages are RAM");
    }
}

/// Words as a little-endian guest stores them.
pub(super) fn bytes_of(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
