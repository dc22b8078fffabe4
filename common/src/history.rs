//! A history: which epoch is the last that counts in each term. Two copies of a vm agree up to their common point.

use serde::{Deserialize, Serialize};

use crate::ids::{Epoch, Point, Term};
use crate::limits::MAX_HISTORY;

/// Terms of a vm, ascending, each with the last epoch of it that counts; the newest term is still open.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct History(Vec<Point>);

/// A history that cannot be one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HistoryError {
    /// Terms or epochs that go back.
    #[error("the history goes back from {0} to {1}")]
    Backwards(Point, Point),
    /// Longer than any vm lives.
    #[error("the history has {0} terms, more than {MAX_HISTORY}")]
    TooLong(usize),
}

impl History {
    /// Takes points that may come from a peer or a disk.
    ///
    /// # Errors
    /// They do not ascend, or are too many.
    pub fn from_points(points: Vec<Point>) -> Result<Self, HistoryError> {
        if points.len() > MAX_HISTORY {
            return Err(HistoryError::TooLong(points.len()));
        }
        for pair in points.windows(2) {
            if pair[0].term >= pair[1].term || pair[0].epoch > pair[1].epoch {
                return Err(HistoryError::Backwards(pair[0], pair[1]));
            }
        }
        Ok(Self(points))
    }

    /// Per term its last epoch, ascending.
    pub fn points(&self) -> &[Point] {
        &self.0
    }

    /// The newest point.
    pub fn tip(&self) -> Option<Point> {
        self.0.last().copied()
    }

    /// Goes on to `point`. Beyond [`MAX_HISTORY`] terms the oldest is forgotten: copies that are so far apart are
    /// compared by digests anyway.
    ///
    /// # Panics
    /// The point is older than the tip: an own bug, since a history only grows.
    pub fn extend(&mut self, point: Point) {
        match self.0.last_mut() {
            Some(last) if last.term == point.term => {
                assert!(last.epoch <= point.epoch, "{point} after {last}");
                last.epoch = point.epoch;
            }
            Some(last) => {
                assert!(last.term < point.term && last.epoch <= point.epoch, "{point} after {last}");
                self.0.push(point);
            }
            None => self.0.push(point),
        }
        if self.0.len() > MAX_HISTORY {
            self.0.remove(0);
        }
    }

    /// Whether the point lies on this history.
    pub fn contains(&self, point: Point) -> bool {
        let at = self.0.partition_point(|last| last.term < point.term);
        let after = at.checked_sub(1).map(|before| self.0[before].epoch);
        self.0.get(at).is_some_and(|last| {
            last.term == point.term
                && point.epoch <= last.epoch
                && after.is_none_or(|epoch| epoch <= point.epoch)
        })
    }

    /// Cuts everything after `point` off.
    pub fn truncate(&mut self, point: Point) {
        self.0.retain(|last| last.term <= point.term);
        if let Some(last) = self.0.last_mut().filter(|last| last.term == point.term) {
            last.epoch = last.epoch.min(point.epoch);
        }
    }

    /// The newest point on both histories.
    pub fn common_point(&self, other: &Self) -> Option<Point> {
        let shared = self.0.iter().rev().find_map(|mine| {
            let theirs = other.0.iter().find(|theirs| theirs.term == mine.term)?;
            Some(Point { term: mine.term, epoch: mine.epoch.min(theirs.epoch) })
        })?;
        (self.contains(shared) && other.contains(shared)).then_some(shared)
    }
}

/// Short for `Point { term: Term(term), epoch: Epoch(epoch) }`.
pub const fn point(term: u64, epoch: u64) -> Point {
    Point { term: Term(term), epoch: Epoch(epoch) }
}

#[cfg(test)]
mod tests {
    use super::{History, HistoryError, point};
    use crate::limits::MAX_HISTORY;

    fn history(points: &[(u64, u64)]) -> History {
        History::from_points(points.iter().map(|&(t, e)| point(t, e)).collect()).unwrap()
    }

    #[test]
    fn points_lie_on_it_or_not() {
        let h = history(&[(1, 10), (3, 20), (4, 20)]);
        for on in [(1, 0), (1, 10), (3, 11), (3, 10), (3, 20), (4, 20)] {
            assert!(h.contains(point(on.0, on.1)), "{on:?}");
        }
        for off in [(1, 11), (2, 12), (3, 9), (3, 21), (4, 21), (4, 19), (5, 20)] {
            assert!(!h.contains(point(off.0, off.1)), "{off:?}");
        }
    }

    #[test]
    fn two_copies_agree_up_to_their_common_point() {
        let ours = history(&[(1, 10), (3, 20), (4, 31)]);
        assert_eq!(ours.common_point(&history(&[(1, 10), (3, 25)])), Some(point(3, 20)));
        assert_eq!(ours.common_point(&history(&[(1, 12)])), Some(point(1, 10)));
        assert_eq!(ours.common_point(&history(&[(1, 10), (3, 20), (4, 22)])), Some(point(4, 22)));
        assert_eq!(ours.common_point(&history(&[(2, 5)])), None);
        assert_eq!(ours.common_point(&History::default()), None);
        // A fork by two runners: terms 4 and 5 both follow 3, so the last common term decides.
        assert_eq!(ours.common_point(&history(&[(1, 10), (3, 18), (5, 40)])), Some(point(3, 18)));
    }

    #[test]
    fn it_grows_and_is_cut_but_never_goes_back() {
        let mut h = History::default();
        for p in [point(1, 1), point(1, 5), point(2, 5), point(2, 9)] {
            h.extend(p);
        }
        assert_eq!(h.points(), [point(1, 5), point(2, 9)]);
        h.truncate(point(2, 7));
        assert_eq!(h.tip(), Some(point(2, 7)));
        h.truncate(point(1, 3));
        assert_eq!(h.points(), [point(1, 3)]);
        let back = History::from_points(vec![point(2, 5), point(1, 6)]);
        assert_eq!(back, Err(HistoryError::Backwards(point(2, 5), point(1, 6))));
        assert!(History::from_points(vec![point(1, 5), point(2, 4)]).is_err());
        (0..MAX_HISTORY as u64 + 10).for_each(|n| h.extend(point(10 + n, 10)));
        assert_eq!(h.points().len(), MAX_HISTORY);
    }
}
