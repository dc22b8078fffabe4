//! What pages held when they were last reported: the measure of whether a tracker told everything.
//!
//! A page is read whenever a collect or a cut reports it, as a builder of epochs would. If writes are reported
//! without fail, every page of the stopped guest holds exactly what was read of it last.

use anyhow::ensure;
use colo_common::{Gfn, PAGE_SIZE};
use colo_tests::dirtier::{CONTROL, Dirtier};
use colo_tests::rig::Rig;
use colo_vmm::memory::Page;
use std::collections::HashMap;
use std::ops::RangeInclusive;

/// One watched page.
struct Watched {
    last_read: Box<Page>,
    /// Whether it was reported since the cut before.
    reported: bool,
}

/// The watched pages of one guest.
pub(crate) struct Held {
    pages: HashMap<Gfn, Watched>,
    /// Words of a page that the guest writes numbers into.
    words: usize,
}

/// What the pages of a working set show at a cut.
#[derive(Default)]
pub(crate) struct Shown {
    /// Pages that are not as they were read last: lost writes.
    pub(crate) lost: Vec<Gfn>,
    /// Pages that were reported since the cut before.
    pub(crate) reported: u64,
    /// Of these, pages that hold no number of this epoch: reported for a write that is yet to come, or for one
    /// of a number that a vCPU had read before the last cut.
    pub(crate) early: u64,
}

impl Held {
    /// Reads the working set and the control page of a stopped guest.
    pub(crate) fn new(rig: &Rig, dirtier: &Dirtier) -> anyhow::Result<Self> {
        let words = if dirtier.fill { PAGE_SIZE / 8 } else { dirtier.cpus as usize };
        let mut held = Self { pages: HashMap::new(), words };
        for gfn in dirtier.frames().chain([CONTROL]) {
            held.pages.insert(gfn, Watched { last_read: read(rig, gfn)?, reported: false });
        }
        Ok(held)
    }

    /// Reads what the last collect or cut has reported.
    pub(crate) fn take_reported(&mut self, rig: &Rig) -> anyhow::Result<()> {
        for gfn in rig.reported().iter() {
            if let Some(page) = self.pages.get_mut(&gfn) {
                *page = Watched { last_read: read(rig, gfn)?, reported: true };
            }
        }
        Ok(())
    }

    /// Compares with the stopped guest, whose last reports were taken, and begins the next epoch. `numbers` are
    /// those that the guest was given since the last cut.
    ///
    /// # Errors
    /// A page holds a number that the guest cannot know yet.
    pub(crate) fn close(&mut self, rig: &Rig, numbers: RangeInclusive<u64>) -> anyhow::Result<Shown> {
        let mut shown = Shown::default();
        for (&gfn, page) in &mut self.pages {
            let now = read(rig, gfn)?;
            if now != page.last_read {
                shown.lost.push(gfn);
            }
            if gfn != CONTROL {
                let newest = words(&now, self.words).max().unwrap_or(0);
                ensure!(newest <= *numbers.end(), "{gfn} holds {newest} in the epoch of {numbers:?}");
                shown.reported += u64::from(page.reported);
                shown.early += u64::from(page.reported && newest < *numbers.start());
            }
            *page = Watched { last_read: now, reported: false };
        }
        Ok(shown)
    }
}

fn read(rig: &Rig, gfn: Gfn) -> anyhow::Result<Box<Page>> {
    let mut page = Box::new([0; PAGE_SIZE]);
    rig.guest_memory().read_page(gfn, &mut page)?;
    Ok(page)
}

fn words(page: &Page, count: usize) -> impl Iterator<Item = u64> + '_ {
    page.chunks_exact(8).take(count).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")))
}
