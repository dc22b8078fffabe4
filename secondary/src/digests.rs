//! Puts digests of a copy's pages, or of its disk's blocks, into messages that are not too large.

use colo_proto::message::{DigestRange, MAX_DIGEST_RANGES, MAX_DIGESTS, PageDigest, RangeDigests};
use colo_proto::pages::Place;

/// Collects digests of pages or blocks that follow each other.
pub(crate) struct Collector<N> {
    first: N,
    at: u64,
    ranges: Vec<DigestRange>,
    digests: usize,
}

impl<N: Place> Collector<N> {
    /// Begins at `first`.
    pub(crate) fn new(first: N) -> Self {
        Self { first, at: first.number(), ranges: Vec::new(), digests: 0 }
    }

    /// The number of what comes next.
    pub(crate) fn at(&self) -> u64 {
        self.at
    }

    /// The next `count` are zero.
    pub(crate) fn zeros(&mut self, count: u64, send: &mut impl FnMut(RangeDigests<N>)) {
        if count == 0 {
            return;
        }
        self.at += count;
        if let Some(DigestRange::Zero { count: before }) = self.ranges.last_mut() {
            *before += count;
            return;
        }
        self.ranges.push(DigestRange::Zero { count });
        self.flush_if_full(send);
    }

    /// The next one has this digest.
    pub(crate) fn one(&mut self, digest: PageDigest, send: &mut impl FnMut(RangeDigests<N>)) {
        self.at += 1;
        self.digests += 1;
        match self.ranges.last_mut() {
            Some(DigestRange::Each(each)) => each.push(digest),
            _ => self.ranges.push(DigestRange::Each(vec![digest])),
        }
        self.flush_if_full(send);
    }

    fn flush_if_full(&mut self, send: &mut impl FnMut(RangeDigests<N>)) {
        if self.digests == MAX_DIGESTS || self.ranges.len() == MAX_DIGEST_RANGES {
            self.flush(send);
        }
    }

    /// Sends what is left.
    pub(crate) fn flush(&mut self, send: &mut impl FnMut(RangeDigests<N>)) {
        if !self.ranges.is_empty() {
            send(RangeDigests { first: self.first, ranges: std::mem::take(&mut self.ranges) });
        }
        (self.first, self.digests) = (N::at(self.at), 0);
    }
}
