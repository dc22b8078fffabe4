//! A length that lies costs nothing: no decoder makes room for more than what came and what the limits allow.

mod samples;

use colo_common::Gfn;
use colo_common::limits::MAX_HISTORY;
use colo_proto::frame::MAX_BODY;
use colo_proto::message::{
    BlockDigests, EpochBegin, Hello, MAX_DIGEST_RANGES, MAX_DIGESTS, MAX_OUTPUT_ITEMS, Message, MessageError,
    Output, RangeDigests, Refused, SeedBegin,
};
use colo_proto::pages::{MAX_RUNS, MAX_TABLE, RunTable};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// The system's allocator, with the bytes in use and their peak.
struct Counting;

static USED: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is handed to the system's allocator as it is; counting touches no memory of it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let used = USED.fetch_add(layout.size(), Ordering::SeqCst) + layout.size();
        PEAK.fetch_max(used, Ordering::SeqCst);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        USED.fetch_sub(layout.size(), Ordering::SeqCst);
        // SAFETY: the caller keeps the contract of `dealloc`, and all memory came from the system's allocator.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes that `work` held at most beyond what was held before it.
fn peak(work: impl FnOnce()) -> usize {
    let before = USED.load(Ordering::SeqCst);
    PEAK.store(before, Ordering::SeqCst);
    work();
    PEAK.load(Ordering::SeqCst) - before
}

fn refused<M: Message>(body: &[u8], most: usize) {
    let held = peak(|| {
        let error = M::decode(body).err().unwrap_or_else(|| panic!("a lying {} was taken", M::KIND));
        assert!(!matches!(error, MessageError::TooLong { .. }), "{error}");
    });
    assert!(held <= most, "a lying {} of {} bytes took {held} bytes", M::KIND, body.len());
}

/// The largest lengths that a varint can name, in front of bytes that go on.
fn lying(head: &[u8], rest: usize) -> Vec<Vec<u8>> {
    let lengths = [u64::MAX, u64::from(u32::MAX), 1 << 40, 1 << 21];
    let varints = lengths.map(|length| postcard::to_stdvec(&length).unwrap());
    let tail = [vec![], vec![0; rest]];
    let bodies = varints.iter().flat_map(|varint| tail.iter().map(|tail| [head, varint, tail].concat()));
    bodies.collect()
}

/// One test, since the counts are of the whole process.
#[test]
fn a_length_that_lies_costs_nothing() {
    // A list grows by doubling, and the old room is there while the new is filled: so three times its size.
    let history = 3 * (MAX_HISTORY + 1) * 16 + 4096;
    for body in lying(&[0], 50_000) {
        refused::<SeedBegin>(&body, history);
        refused::<EpochBegin>(&body, history);
    }
    let items = 3 * (MAX_OUTPUT_ITEMS + 1) * 48;
    for body in lying(&[], MAX_BODY - 16) {
        refused::<Output>(&body, items);
    }
    // One console item, one frame, of a length that lies.
    for body in lying(&[1, 0], 1000).into_iter().chain(lying(&[1, 1, 0], 1000)) {
        refused::<Output>(&body, 4096);
    }
    let ranges = 3 * (MAX_DIGEST_RANGES + 1) * 32 + 3 * (MAX_DIGESTS + 1) * 16 + 4096;
    for body in lying(&[0], 60_000).into_iter().chain(lying(&[0, 1, 1], 60_000)) {
        refused::<RangeDigests>(&body, ranges);
        refused::<BlockDigests>(&body, ranges);
    }
    for body in lying(&[1], 1000).into_iter().chain(lying(&[1, 1], 1000)) {
        refused::<Refused>(&body, 4096);
        refused::<Hello>(&body, 4096);
    }
    let table = vec![0xff; 4 * MAX_TABLE];
    assert!(peak(|| assert!(RunTable::decode::<Gfn>(&table, u64::MAX).is_err())) < 4096);
    let most = peak(|| drop(RunTable::decode::<Gfn>(&RunTable::encode(&samples::runs()), 1 << 40)));
    assert!(most <= MAX_RUNS * 24, "{most}");
}
