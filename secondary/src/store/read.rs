//! Reading back: the image in order, a page, the machine state, all verified.

use colo_common::Gfn;
use colo_common::limits::MAX_MACHINE_STATE;
use colo_vmm::memory::Page;
use std::iter::Peekable;
use xxhash_rust::xxh3::xxh3_64;

use super::checksums::Checksums;
use super::engine::{Batch, Change, Column, Durability, KeyValue};
use super::format::{
    EpochPart, Kind, MetaCopy, decode_number, decode_page, decode_pending_key, epoch_key, number_key,
};
use super::{Store, StoreError};

/// Keys and values, ascending.
pub(super) type Entries<'a> = Box<dyn Iterator<Item = Result<KeyValue, StoreError>> + 'a>;

impl Store {
    /// Hands out every page that is not zero, ascending, each verified, and at the end verifies that they are the
    /// image of the point: what was handed out before an error is worth nothing.
    ///
    /// # Errors
    /// There is no whole copy, a page is damaged, pages are missing, or the device fails.
    pub fn load(&mut self, mut each: impl FnMut(Gfn, &Page)) -> Result<(), StoreError> {
        let (Some(whole), Some(record)) = (self.whole(), self.record) else {
            return Err(self.out_of_place("load an image"));
        };
        let point = whole.point;
        let mut sums = Checksums::default();
        for entry in self.image(Gfn(0)) {
            let (gfn, value) = entry?;
            let (page, sum) = decode_page(gfn, &value).ok_or_else(|| self.damaged_page(gfn))?;
            sums.set(gfn, sum);
            each(gfn, page);
        }
        if (sums.pages(), sums.digest()) != (record.pages, record.digest) {
            let (expected, found) = (record.pages, sums.pages());
            return Err(StoreError::DamagedImage { dir: self.dir.clone(), point, expected, found });
        }
        self.checksums = Some(sums);
        Ok(())
    }

    /// Hands out the pages that an inconsistent copy starts from, ascending. Damaged ones are removed, so that what
    /// was handed out is what is stored; answers how many those were.
    ///
    /// # Errors
    /// The copy is not inconsistent, or the device fails.
    pub fn load_base(&mut self, mut each: impl FnMut(Gfn, &Page)) -> Result<u64, StoreError> {
        if self.meta.copy != MetaCopy::Inconsistent {
            return Err(self.out_of_place("load what a new copy starts from"));
        }
        let (mut sums, mut batch, mut removed) = (Checksums::default(), Batch::default(), 0);
        for entry in self.engine.scan(Column::Pages, &[]) {
            let (key, value) = entry?;
            let page = decode_number(&key).and_then(|gfn| Some((Gfn(gfn), decode_page(Gfn(gfn), &value)?)));
            match page {
                Some((gfn, (page, sum))) => {
                    sums.set(gfn, sum);
                    each(gfn, page);
                }
                None => {
                    batch.push(Change::Delete(Column::Pages, key.into_vec()));
                    removed += 1;
                }
            }
        }
        if !batch.is_empty() {
            self.write(&batch, Durability::Unsynced)?;
        }
        self.checksums = Some(sums);
        Ok(removed)
    }

    /// The machine state of the point.
    ///
    /// # Errors
    /// There is no whole copy, the state is damaged, or the device fails.
    pub fn state(&self) -> Result<Vec<u8>, StoreError> {
        let (Some(whole), Some(record)) = (self.whole(), self.record) else {
            return Err(self.out_of_place("give a machine state"));
        };
        let state = self.engine.get(Column::Epochs, &epoch_key(whole.point, EpochPart::State))?;
        state
            .filter(|state| state.len() as u64 == record.state_bytes && state.len() <= MAX_MACHINE_STATE)
            .filter(|state| xxh3_64(state) == record.state_checksum)
            .ok_or_else(|| self.damaged("its machine state"))
    }

    /// Reads all pages once if their checksums are not known yet.
    pub(super) fn know_checksums(&mut self) -> Result<(), StoreError> {
        match (&self.checksums, &self.meta.copy) {
            (Some(_), _) => Ok(()),
            (None, MetaCopy::Whole(_)) => self.load(|_, _| ()),
            (None, _) => self.load_base(|_, _| ()).map(|_| ()),
        }
    }

    /// The stored pages from a gfn on, ascending: of `pages`, and before it what is adopted of `pending`.
    pub(super) fn image(&self, from: Gfn) -> Image<'_> {
        Image {
            pages: of_gfns(self.engine.scan(Column::Pages, &number_key(from.0)), decode_number).peekable(),
            pending: of_gfns(self.adopted_from(Kind::Page, from.0), |key| {
                decode_pending_key(key).map(|(_, _, gfn)| gfn)
            })
            .peekable(),
        }
    }

    pub(super) fn damaged_page(&self, gfn: Gfn) -> StoreError {
        StoreError::DamagedPage { dir: self.dir.clone(), gfn }
    }
}

/// Entries by gfn.
type Numbered<'a> = Box<dyn Iterator<Item = Result<(u64, Box<[u8]>), StoreError>> + 'a>;

/// Keys that are none are left out: the page that is missing then shows in the image's digest.
fn of_gfns<'a>(entries: Entries<'a>, gfn: impl Fn(&[u8]) -> Option<u64> + 'a) -> Numbered<'a> {
    Box::new(entries.filter_map(move |entry| match entry {
        Ok((key, value)) => gfn(&key).map(|gfn| Ok((gfn, value))),
        Err(error) => Some(Err(error)),
    }))
}

/// See [`Store::image`].
pub(super) struct Image<'a> {
    pages: Peekable<Numbered<'a>>,
    pending: Peekable<Numbered<'a>>,
}

impl Iterator for Image<'_> {
    type Item = Result<(Gfn, Box<[u8]>), StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            // An error sorts before every page, so that it is told at once.
            let key = |entry: &Result<(u64, Box<[u8]>), StoreError>| entry.as_ref().ok().map(|(gfn, _)| *gfn);
            let (page, pending) = (self.pages.peek().map(key), self.pending.peek().map(key));
            let Some(newer) = pending.filter(|newer| page.is_none_or(|older| *newer <= older)) else {
                return Some(self.pages.next()?.map(|(gfn, value)| (Gfn(gfn), value)));
            };
            if page == Some(newer) && newer.is_some() {
                self.pages.next();
            }
            match self.pending.next()? {
                // An empty value says that the page is zero.
                Ok((_, value)) if value.is_empty() => {}
                entry => return Some(entry.map(|(gfn, value)| (Gfn(gfn), value))),
            }
        }
    }
}
