//! The log itself: what may be written, what may leave, and the claim that is safe.

use colo_common::{Block, Epoch, Point, VmId};
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::choice::{Cleaning, choose};
use super::claim::Claim;
use super::extents::{Extents, count_of, extents_of};
use super::file::{self, IntentError, Slots};
use super::tracks::Tracks;

/// Extents named together where a disk is written in sequence, so that it does not wait for a sync in each.
const AHEAD: u64 = 8;

/// Rounds of the cleaner after which the claim names a newer point even if nothing leaves it: what was changed since that
/// point is sent to a copy that comes back, needed or not. A sync of the log is less than a round of anything else.
const POINT_ROUNDS: u32 = 30;

/// What is written to the file, by one at a time.
struct Writer {
    slots: Slots,
    /// Known to be safe.
    claim: Claim,
    /// The round of the cleaner in which it was written last; none while its point is that of the beginning, which may be
    /// older than anything that another node knows.
    written: Option<u32>,
}

/// What there is to tell of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IntentStatus {
    /// Extents that it names.
    pub extents: u64,
    /// The point of its claim.
    pub point: Point,
    /// How often it was written.
    pub writes: u64,
    /// How often it could not be: as often, something of the guest's failed.
    pub failures: u64,
}

/// See [`intent`](super).
pub struct IntentLog {
    disk_bytes: u64,
    /// A bit for each extent that every claim names which a crash may leave: writes into it need nothing.
    free: Vec<AtomicU64>,
    tracks: Tracks,
    /// The epoch that what is recorded now is in.
    open: AtomicU64,
    acked: Mutex<Point>,
    /// Of the cleaner.
    round: AtomicU32,
    writer: Mutex<Writer>,
    writes: AtomicU64,
    failures: AtomicU64,
}

impl IntentLog {
    /// Makes the log of a disk that holds, safely, just what it holds at `point`, which the other node has acked or from
    /// which this one runs on. Replaces any that there is.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn create(path: &Path, disk_bytes: u64, vm: &VmId, point: Point) -> Result<Self, IntentError> {
        let claim = Claim { vm: vm.clone(), point, extents: Extents::none(disk_bytes) };
        Ok(Self::new(file::create(path, &claim)?, claim, point.epoch.next()))
    }

    /// Goes on with the log of a runner that has ended: the same vm runs on with the same disk, of which `open` is the
    /// first epoch now. Nothing if there is no log.
    ///
    /// # Errors
    /// It cannot be read or opened, is damaged, or is another disk's.
    pub fn resume(path: &Path, disk_bytes: u64, vm: &VmId, open: Epoch) -> Result<Option<Self>, IntentError> {
        let Some((claim, sequence, slot)) = file::read(path)? else { return Ok(None) };
        if claim.vm != *vm || claim.extents.disk_bytes() != disk_bytes {
            return Err(IntentError::Other {
                path: path.to_owned(),
                found_vm: claim.vm.to_string(),
                found_bytes: claim.extents.disk_bytes(),
                vm: vm.to_string(),
                bytes: disk_bytes,
            });
        }
        Ok(Some(Self::new(file::open(path, sequence, slot)?, claim, open)))
    }

    /// What the log of a runner that has ended claims; nothing if there is no log.
    ///
    /// # Errors
    /// It cannot be read, or is damaged.
    pub fn read(path: &Path) -> Result<Option<Claim>, IntentError> {
        Ok(file::read(path)?.map(|(claim, ..)| claim))
    }

    /// Removes a log for good: before the image becomes something that it knows nothing of.
    ///
    /// # Errors
    /// The system refuses.
    pub fn remove(path: &Path) -> Result<(), IntentError> {
        file::remove(path)
    }

    pub(super) fn new(slots: Slots, claim: Claim, open: Epoch) -> Self {
        let disk_bytes = claim.extents.disk_bytes();
        // Whatever the file says, what it names is not yet acked.
        let open = open.max(claim.point.epoch.next());
        let tracks = Tracks::new(disk_bytes);
        for extent in claim.extents.numbers() {
            // Nobody knows when it was written.
            tracks.begin(extent..extent + 1, 0);
            tracks.end(extent..extent + 1, open);
        }
        Self {
            disk_bytes,
            free: claim.extents.words().iter().map(|word| AtomicU64::new(*word)).collect(),
            tracks,
            open: AtomicU64::new(open.0),
            acked: Mutex::new(claim.point),
            round: AtomicU32::new(0),
            writer: Mutex::new(Writer { slots, claim, written: None }),
            writes: AtomicU64::new(0),
            failures: AtomicU64::new(0),
        }
    }

    /// Bytes of the disk that it is of.
    pub fn disk_bytes(&self) -> u64 {
        self.disk_bytes
    }

    /// From now on writes are recorded in `epoch`, or in a later one. Called before the cut that closes the epoch before
    /// it: what that cut still records counts for the later one then, which does no harm.
    pub fn set_open_epoch(&self, epoch: Epoch) {
        self.open.fetch_max(epoch.0, Ordering::SeqCst);
    }

    /// The secondary has acked this point, and with it everything before.
    ///
    /// # Panics
    /// Its epoch is still open: an own bug.
    pub fn acked(&self, point: Point) {
        let open = self.open.load(Ordering::SeqCst);
        assert!(point.epoch.0 < open, "{point} is acked, and epoch {open} is open");
        let mut acked = lock(&self.acked);
        *acked = point.max(*acked);
    }

    /// A request that changes these blocks is begun; ended once by [`change_recorded`](Self::change_recorded). Never waits.
    pub fn change_begins(&self, blocks: &Range<Block>) {
        self.tracks.begin(extents_of(blocks), self.round.load(Ordering::Relaxed));
    }

    /// What that request did is in the open epoch, or it did nothing.
    pub fn change_recorded(&self, blocks: &Range<Block>) {
        self.tracks.end(extents_of(blocks), Epoch(self.open.load(Ordering::SeqCst)));
    }

    /// Has the log name these blocks before something is written there by a request that has begun. Waits for a sync if
    /// it does not name them yet.
    ///
    /// # Errors
    /// They are not within the disk, or the log cannot be written: then nothing may be written there.
    pub fn before_write(&self, blocks: &Range<Block>) -> io::Result<()> {
        let extents = extents_of(blocks);
        if extents.end > count_of(self.disk_bytes) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the range is not within the disk"));
        }
        if extents.clone().all(|extent| self.is_free(extent)) { Ok(()) } else { self.name(extents) }
    }

    fn is_free(&self, extent: u64) -> bool {
        self.free[(extent / 64) as usize].load(Ordering::SeqCst) >> (extent % 64) & 1 == 1
    }

    fn name(&self, extents: Range<u64>) -> io::Result<()> {
        let mut writer = self.writer();
        if extents.clone().all(|extent| self.is_free(extent)) {
            return Ok(());
        }
        let mut claim = writer.claim.clone();
        // What no claim has named was not written since the beginning, or since it was synced: it is as in any acked point.
        claim.point = claim.point.max(*lock(&self.acked));
        extents.clone().for_each(|extent| claim.extents.insert(extent));
        if extents.start > 0 && self.is_free(extents.start - 1) {
            let round = self.round.load(Ordering::Relaxed);
            for extent in extents.end..(extents.end + AHEAD).min(count_of(self.disk_bytes)) {
                claim.extents.insert(extent);
                self.tracks.touch(extent, round);
            }
        }
        self.write(&mut writer, claim)?;
        for (free, word) in self.free.iter().zip(writer.claim.extents.words()) {
            free.fetch_or(*word, Ordering::SeqCst);
        }
        Ok(())
    }

    fn write(&self, writer: &mut Writer, claim: Claim) -> io::Result<()> {
        if let Err(error) = writer.slots.write(&claim) {
            let failures = self.failures.fetch_add(1, Ordering::Relaxed) + 1;
            if failures.is_power_of_two() {
                tracing::error!(
                    failures,
                    "the disk's intent log cannot be written: {error}; until it can, the guest's writes into parts of its disk fail that it does not name"
                );
            }
            return Err(error);
        }
        self.writes.fetch_add(1, Ordering::Relaxed);
        if claim.point > writer.claim.point {
            writer.written = Some(self.round.load(Ordering::Relaxed));
        }
        writer.claim = claim;
        Ok(())
    }

    /// A round of the cleaner in which nothing leaves: now and then the claim names a newer point. The image need not be
    /// synced for that.
    ///
    /// # Errors
    /// The log cannot be written.
    pub fn advance(&self, cleaning: &Cleaning) -> io::Result<()> {
        let mut writer = self.writer();
        let round = self.round.load(Ordering::Relaxed);
        let is_young = writer.written.is_some_and(|at| round.wrapping_sub(at) < POINT_ROUNDS);
        if is_young || cleaning.point <= writer.claim.point {
            return Ok(());
        }
        let claim = Claim { point: cleaning.point, ..writer.claim.clone() };
        self.write(&mut writer, claim)
    }

    /// A round of the cleaner begins: what may leave the log if the image is synced now. With `all`, also what was used
    /// a moment ago.
    pub fn begin_cleaning(&self, all: bool) -> Cleaning {
        let round = self.round.fetch_add(1, Ordering::Relaxed) + 1;
        // Before the image is synced, and so is the look at who writes: what comes later was not synced.
        let point = *lock(&self.acked);
        let named = self.writer().claim.extents.clone();
        let within = named.numbers().filter(|extent| self.tracks.is_within(*extent, point.epoch));
        let mut aged: Vec<(u32, u64)> =
            within.map(|extent| (self.tracks.age(extent, round), extent)).collect();
        if !all {
            choose(&mut aged, named.len());
        }
        Cleaning { point, extents: aged.into_iter().map(|(_, extent)| extent).collect() }
    }

    /// The image was synced since the round began: writes a claim without what nobody has written into meanwhile. How
    /// many extents have left.
    ///
    /// # Errors
    /// The log cannot be written.
    pub fn finish_cleaning(&self, cleaning: &Cleaning) -> io::Result<u64> {
        let mut writer = self.writer();
        let (mut claim, mut left) = (writer.claim.clone(), 0);
        for &extent in &cleaning.extents {
            let (word, bit) = (&self.free[(extent / 64) as usize], 1 << (extent % 64));
            // Whoever begins a request says so and then looks for this bit; here it is the other way round. So one of
            // the two sees the other: the request finds the bit gone and waits for the lock, or it is found here.
            let was_free = word.fetch_and(!bit, Ordering::SeqCst) & bit != 0;
            if self.tracks.is_within(extent, cleaning.point.epoch) {
                claim.extents.remove(extent);
                left += 1;
            } else if was_free {
                word.fetch_or(bit, Ordering::SeqCst);
            }
        }
        if left > 0 {
            claim.point = claim.point.max(cleaning.point);
            self.write(&mut writer, claim)?;
        }
        Ok(left)
    }

    /// The newest acked point, and the extents that may hold something else than the disk does there: of a disk that
    /// nobody writes any more. Unlike a [claim](Self::read), this is not safe from a loss of power.
    pub fn remains(&self) -> (Point, Extents) {
        let acked = self.begin_cleaning(true);
        let mut extents = self.writer().claim.extents.clone();
        acked.extents.iter().for_each(|extent| extents.remove(*extent));
        (acked.point, extents)
    }

    /// What there is to tell.
    pub fn status(&self) -> IntentStatus {
        let writer = self.writer();
        IntentStatus {
            extents: writer.claim.extents.len(),
            point: writer.claim.point,
            writes: self.writes.load(Ordering::Relaxed),
            failures: self.failures.load(Ordering::Relaxed),
        }
    }

    fn writer(&self) -> MutexGuard<'_, Writer> {
        lock(&self.writer)
    }
}

/// Nothing in here panics half-way.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl std::fmt::Debug for IntentLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IntentLog({:?})", self.status())
    }
}
