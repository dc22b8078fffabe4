//! Copies of guest pages, packed into memory that is used again: what a checkpoint copies out of the guest while it
//! stands still, and what a secondary receives into.
//!
//! Pages lie at page boundaries: copying between addresses that differ in their lowest twelve bits is three to five
//! times slower than between those that do not.

use colo_common::{Gfn, PAGE_SIZE};
use std::sync::{Arc, Mutex, PoisonError};
use vm_memory::{Bytes, GuestAddress};

use crate::memory::{GuestMemory, MemoryError, Page};

/// A page at a page boundary.
#[derive(Clone, Copy)]
#[repr(C, align(4096))]
struct Aligned(Page);

const _: () = assert!(size_of::<Aligned>() == PAGE_SIZE && align_of::<Aligned>() == PAGE_SIZE);

/// Pages kept for later at most: 256 MiB, the largest epoch by default.
const MAX_KEPT_PAGES: usize = 65_536;

/// Buffers that are used again instead of being given back: fresh memory costs a fault per page, in the pause.
#[derive(Clone, Default)]
pub struct PagePool {
    free: Arc<Mutex<Vec<Vec<Aligned>>>>,
}

impl PagePool {
    /// A buffer of `pages` pages, whose content is whatever was there before.
    pub fn take(&self, pages: usize) -> PageBuffer {
        let mut free = self.free();
        // The smallest that is large enough, else the largest, which then grows.
        let fitting = free.iter().enumerate().filter(|(_, buffer)| buffer.capacity() >= pages);
        let best = fitting.min_by_key(|(_, buffer)| buffer.capacity()).map(|(at, _)| at);
        let mut pages_of = match best {
            Some(at) => free.swap_remove(at),
            None => free.pop().unwrap_or_default(),
        };
        drop(free);
        pages_of.resize(pages, Aligned([0; PAGE_SIZE]));
        PageBuffer { pages: pages_of, pool: self.clone() }
    }

    fn give_back(&self, pages: Vec<Aligned>) {
        let mut free = self.free();
        let kept: usize = free.iter().map(Vec::capacity).sum();
        if kept + pages.capacity() <= MAX_KEPT_PAGES {
            free.push(pages);
        }
    }

    fn free(&self) -> std::sync::MutexGuard<'_, Vec<Vec<Aligned>>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for PagePool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PagePool({} buffers)", self.free().len())
    }
}

/// Page-aligned memory that goes back to its pool when dropped.
pub struct PageBuffer {
    pages: Vec<Aligned>,
    pool: PagePool,
}

impl PageBuffer {
    /// Number of pages.
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// One page.
    pub fn page(&self, at: usize) -> &Page {
        &self.pages[at].0
    }

    /// All bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `Aligned` is a `repr(C)` array of bytes without padding (asserted above), so `len` of them are as
        // many initialised bytes, borrowed as long as `self`.
        unsafe { std::slice::from_raw_parts(self.pages.as_ptr().cast(), self.pages.len() * PAGE_SIZE) }
    }

    /// All bytes, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let len = self.pages.len() * PAGE_SIZE;
        // SAFETY: as in `bytes`; any bytes are valid ones, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.pages.as_mut_ptr().cast(), len) }
    }
}

impl AsRef<[u8]> for PageBuffer {
    fn as_ref(&self) -> &[u8] {
        self.bytes()
    }
}

impl Drop for PageBuffer {
    fn drop(&mut self) {
        self.pool.give_back(std::mem::take(&mut self.pages));
    }
}

impl std::fmt::Debug for PageBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PageBuffer({} pages)", self.len())
    }
}

/// Pages and the frames they are of: runs in ascending order, their bytes in the same order.
#[derive(Debug)]
pub struct PageBatch {
    runs: Vec<(Gfn, u64)>,
    buffer: PageBuffer,
}

impl PageBatch {
    /// Copies the frames of `runs` (first frame, frames; ascending, apart) out of guest memory.
    ///
    /// # Errors
    /// A frame is not guest memory.
    pub fn copy(memory: &GuestMemory, runs: Vec<(Gfn, u64)>, pool: &PagePool) -> Result<Self, MemoryError> {
        let pages: u64 = runs.iter().map(|&(_, count)| count).sum();
        let mut buffer = pool.take(usize::try_from(pages).expect("a batch fits memory"));
        let mut rest = buffer.bytes_mut();
        for &(first, count) in &runs {
            let (these, after) = rest.split_at_mut(count as usize * PAGE_SIZE);
            memory.read_frames(first, these)?;
            rest = after;
        }
        Ok(Self { runs, buffer })
    }

    /// Takes pages that were received.
    ///
    /// # Panics
    /// `buffer` has not one page for each frame of `runs`: an own bug.
    pub fn new(runs: Vec<(Gfn, u64)>, buffer: PageBuffer) -> Self {
        let pages: u64 = runs.iter().map(|&(_, count)| count).sum();
        assert_eq!(pages, buffer.len() as u64, "one page for each frame");
        Self { runs, buffer }
    }

    /// Number of pages.
    pub fn len(&self) -> usize {
        self.buffer.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// (first frame, frames), ascending.
    pub fn runs(&self) -> &[(Gfn, u64)] {
        &self.runs
    }

    /// The pages with their frames, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (Gfn, &Page)> {
        let frames = self.runs.iter().flat_map(|&(first, count)| (first.0..first.0 + count).map(Gfn));
        frames.zip(self.buffer.pages.iter().map(|page| &page.0))
    }

    /// The bytes of all pages, in order.
    pub fn bytes(&self) -> &[u8] {
        self.buffer.bytes()
    }

    /// The runs, and the pages in one buffer.
    pub fn into_parts(self) -> (Vec<(Gfn, u64)>, PageBuffer) {
        (self.runs, self.buffer)
    }

    /// Writes the pages into guest memory.
    ///
    /// # Errors
    /// A frame is not guest memory; check before with [`GuestMemory::check_frame`].
    pub fn write_to(&self, memory: &GuestMemory) -> Result<(), MemoryError> {
        let mut rest = self.bytes();
        for &(first, count) in &self.runs {
            let (these, after) = rest.split_at(count as usize * PAGE_SIZE);
            memory.write_frames(first, these)?;
            rest = after;
        }
        Ok(())
    }
}

impl GuestMemory {
    /// Copies neighbouring frames out, as many as `bytes` holds. While the guest runs, the copy may be torn; a page
    /// that is written meanwhile is reported dirty again.
    ///
    /// # Errors
    /// A frame is not RAM.
    pub fn read_frames(&self, first: Gfn, bytes: &mut [u8]) -> Result<(), MemoryError> {
        let refused = MemoryError::NoSuchFrame(first);
        let Some(at) = first.0.checked_mul(PAGE_SIZE as u64) else { return Err(refused) };
        self.ram().read_slice(bytes, GuestAddress(at)).map_err(|_| refused)
    }

    /// Copies neighbouring frames in; a device write like any other, so tracked while tracking is on.
    ///
    /// # Errors
    /// A frame is not RAM.
    pub fn write_frames(&self, first: Gfn, bytes: &[u8]) -> Result<(), MemoryError> {
        let refused = MemoryError::NoSuchFrame(first);
        let Some(at) = first.0.checked_mul(PAGE_SIZE as u64) else { return Err(refused) };
        self.ram().write_slice(bytes, GuestAddress(at)).map_err(|_| refused)
    }
}

/// Whether a page holds nothing but zeros.
pub fn is_zero(page: &Page) -> bool {
    // Most pages that are not zero show it in their first words; the rest goes sixteen bytes at a time.
    page[..32] == [0; 32] && page.as_chunks::<16>().0.iter().all(|chunk| u128::from_ne_bytes(*chunk) == 0)
}

#[cfg(test)]
mod tests {
    use super::{PageBatch, PagePool, is_zero};
    use crate::memory::GuestMemory;
    use colo_common::{Gfn, PAGE_SIZE};

    #[test]
    fn pages_are_copied_out_and_in_by_runs() {
        let (from, to) = (GuestMemory::new(1 << 20).unwrap(), GuestMemory::new(1 << 20).unwrap());
        for gfn in [3, 4, 5, 90] {
            from.write_page(Gfn(gfn), &[gfn as u8; PAGE_SIZE]).unwrap();
        }
        let pool = PagePool::default();
        let runs = vec![(Gfn(3), 3), (Gfn(90), 1)];
        let batch = PageBatch::copy(&from, runs, &pool).unwrap();
        assert_eq!(batch.bytes().as_ptr() as usize % PAGE_SIZE, 0);
        let firsts: Vec<_> = batch.iter().map(|(gfn, page)| (gfn.0, page[7])).collect();
        assert_eq!(firsts, [(3, 3), (4, 4), (5, 5), (90, 90)]);
        batch.write_to(&to).unwrap();
        assert_eq!(from.digest().unwrap(), to.digest().unwrap());
        assert!(PageBatch::copy(&from, vec![(Gfn(255), 2)], &pool).is_err(), "the last frame is 255");
        assert!(PageBatch::copy(&from, vec![(Gfn(u64::MAX), 1)], &pool).is_err());
    }

    #[test]
    fn buffers_are_used_again() {
        let pool = PagePool::default();
        let first = pool.take(10);
        let at = first.bytes().as_ptr();
        drop(first);
        let second = pool.take(4);
        assert_eq!((second.bytes().as_ptr(), second.len()), (at, 4));
        assert_ne!(pool.take(4).bytes().as_ptr(), at);
    }

    #[test]
    fn a_page_is_zero_or_not() {
        let mut page = [0; PAGE_SIZE];
        assert!(is_zero(&page));
        for at in [0, 31, 32, 2000, PAGE_SIZE - 1] {
            page[at] = 1;
            assert!(!is_zero(&page), "{at}");
            page[at] = 0;
        }
    }
}
