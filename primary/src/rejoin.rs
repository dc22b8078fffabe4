//! What a copy is sent to be whole again: decided from what it says of itself, both histories, and how far back this
//! node knows what was changed. Pure.
//!
//! ```text
//!   history of the runner   ----------C------------------- tip       table: what was changed after `known`
//!   history of the copy     ----------C------P                       the copy names what it has beyond C
//! ```
//!
//! The common point C decides: what the runner changed since, and what the copy has beyond it, is sent. Where one of the
//! two does not know that, digests tell, never a guess.

use colo_common::{Epoch, History, Point};
use colo_proto::message::{Base, SeedMode, SeedPart};

use crate::last_changed::Known;
use crate::replicator::Offer;

/// Why more than what was written since is sent or compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Why {
    /// The operator wants it all.
    #[error("the operator asked for it in full")]
    Asked,
    /// The secondary holds nothing of it.
    #[error("the secondary has nothing of it")]
    Nothing,
    /// The secondary does not know which point it holds.
    #[error("the secondary does not know which point it holds, as after a copy that was cut off")]
    NoBase,
    /// This node did not track what was written.
    #[error("this node does not know what was written when")]
    NotTracked,
    /// The histories have no point in common.
    #[error("its history has nothing in common with the guest's, from {at} on")]
    OtherHistory {
        /// What it holds.
        at: Point,
    },
    /// It goes back further than this node's tables do.
    #[error("it holds {at}, and this node knows what was written since {known} only")]
    TooOld {
        /// The common point.
        at: Point,
        /// Of the oldest change that is known.
        known: Epoch,
    },
    /// It went on by itself, and does not know what it wrote since the common point.
    #[error("it went on after {at}, and knows what it wrote since {known} only")]
    WentOn {
        /// The common point.
        at: Point,
        /// Of the oldest change that it knows.
        known: Epoch,
    },
}

/// How a copy is made whole, and why more is sent than was written since, of memory and of disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// What is sent.
    pub mode: SeedMode,
    /// Why that much of the memory.
    pub memory: Option<Why>,
    /// Why that much of the disk.
    pub disk: Option<Why>,
}

impl Plan {
    /// The same in words; empty if only what was written is sent. `forgot`: why this node's tables begin so late.
    pub fn reasons(&self, has_disk: bool, forgot: Option<&str>) -> String {
        let said = |why: Why| match (why, forgot) {
            (Why::TooOld { .. } | Why::NotTracked, Some(forgot)) => format!("{why} ({forgot})"),
            _ => why.to_string(),
        };
        match (self.memory, self.disk.filter(|_| has_disk)) {
            (None, None) => String::new(),
            (Some(memory), Some(disk)) if memory == disk => format!("memory and disk: {}", said(memory)),
            (Some(memory), Some(disk)) => format!("memory: {}; disk: {}", said(memory), said(disk)),
            (Some(memory), None) => format!("memory: {}", said(memory)),
            (None, Some(disk)) => format!("disk: {}", said(disk)),
        }
    }
}

/// How a copy is made whole. `full`: the operator wants everything sent.
pub fn plan(mine: &History, known: Known, offer: &Offer, full: bool) -> Plan {
    if full {
        return Plan { mode: SeedMode::FULL, memory: Some(Why::Asked), disk: Some(Why::Asked) };
    }
    let since = |known, base: Option<Base>| common(mine, known, base, &offer.history);
    let (memory, why_memory) = match (since(known.memory, offer.bases.memory), offer.staged) {
        (Ok(point), _) => (SeedPart::Since(point), None),
        (Err(why), Some(_)) => (SeedPart::Differing, Some(why)),
        (Err(_), None) => (SeedPart::All, Some(Why::Nothing)),
    };
    let (disk, why_disk) = match since(known.disk, offer.bases.disk) {
        Ok(point) => (SeedPart::Since(point), None),
        Err(why) => (SeedPart::Differing, Some(why)),
    };
    Plan { mode: SeedMode { memory, disk }, memory: why_memory, disk: why_disk }
}

/// The newest point that both have, if both know what they changed since.
fn common(mine: &History, known: Option<Epoch>, base: Option<Base>, theirs: &History) -> Result<Point, Why> {
    let base = base.ok_or(Why::NoBase)?;
    let known = known.ok_or(Why::NotTracked)?;
    let common = if mine.contains(base.point) { Some(base.point) } else { mine.common_point(theirs) };
    let at = common.filter(|point| *point <= base.point).ok_or(Why::OtherHistory { at: base.point })?;
    if at.epoch < known {
        return Err(Why::TooOld { at, known });
    }
    if at.epoch < base.from {
        return Err(Why::WentOn { at, known: base.from });
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::{Plan, Why};
    use crate::last_changed::Known;
    use crate::replicator::Offer;
    use colo_common::history::{History, point};
    use colo_common::{Epoch, Point};
    use colo_proto::message::{Base, Bases, SeedMode, SeedPart};

    fn plan(mine: &History, known: Known, offer: &Offer, full: bool) -> SeedMode {
        super::plan(mine, known, offer, full).mode
    }

    fn history(points: &[(u64, u64)]) -> History {
        History::from_points(points.iter().map(|&(t, e)| point(t, e)).collect()).unwrap()
    }

    fn knows(epoch: u64) -> Known {
        Known { memory: Some(Epoch(epoch)), disk: Some(Epoch(epoch)) }
    }

    fn offer(bases: Bases, theirs: &[(u64, u64)]) -> Offer {
        let staged = bases.memory.map(|base| base.point);
        Offer { replica: None, staged, bases, history: history(theirs) }
    }

    fn since(at: Point) -> SeedMode {
        SeedMode::since(at)
    }

    #[test]
    fn a_copy_on_this_history_is_sent_what_came_after_it() {
        let mine = history(&[(1, 10), (3, 40)]);
        let behind = offer(Bases::at(point(3, 20)), &[(1, 10), (3, 20)]);
        assert_eq!(plan(&mine, knows(10), &behind, false), since(point(3, 20)));
        assert_eq!(plan(&mine, knows(20), &behind, false), since(point(3, 20)));
        assert_eq!(plan(&mine, knows(21), &behind, false), SeedMode::DIFFERING, "not so far back");
        assert_eq!(plan(&mine, Known::default(), &behind, false), SeedMode::DIFFERING);
        assert_eq!(plan(&mine, knows(10), &behind, true), SeedMode::FULL);
    }

    #[test]
    fn one_that_went_on_by_itself_goes_back_to_the_common_point_if_it_can() {
        let mine = history(&[(1, 10), (3, 40)]);
        let far = |from| {
            let base = Some(Base { point: point(1, 14), from: Epoch(from) });
            offer(Bases { memory: base, disk: base }, &[(1, 14)])
        };
        assert_eq!(plan(&mine, knows(5), &far(9), false), since(point(1, 10)));
        assert_eq!(plan(&mine, knows(5), &far(11), false), SeedMode::DIFFERING);
        assert_eq!(plan(&mine, knows(11), &far(9), false), SeedMode::DIFFERING);
        let stranger = offer(Bases::at(point(2, 4)), &[(2, 4)]);
        assert_eq!(plan(&mine, knows(0), &stranger, false), SeedMode::DIFFERING, "nothing in common");
    }

    #[test]
    fn memory_and_disk_are_judged_apart() {
        let mine = history(&[(1, 40)]);
        let disk = Bases { memory: None, disk: Some(Base::at(point(1, 30))) };
        let wanted = SeedMode { memory: SeedPart::All, disk: SeedPart::Since(point(1, 30)) };
        assert_eq!(plan(&mine, knows(9), &offer(disk, &[(1, 30)]), false), wanted);
        assert_eq!(plan(&mine, knows(9), &Offer::default(), false), SeedMode::FULL);
        let known = Known { memory: Some(Epoch(9)), disk: None };
        let both = offer(Bases::at(point(1, 30)), &[(1, 30)]);
        let wanted = SeedMode { memory: SeedPart::Since(point(1, 30)), disk: SeedPart::Differing };
        assert_eq!(plan(&mine, known, &both, false), wanted);
    }

    #[test]
    fn it_says_why_more_is_sent_than_was_written() {
        let mine = history(&[(1, 10), (3, 40)]);
        let why = |known, offer: &Offer| {
            let Plan { memory, disk, .. } = super::plan(&mine, known, offer, false);
            assert!(memory == disk || memory == Some(Why::Nothing), "{memory:?}, {disk:?}");
            disk
        };
        let at = |term, epoch| offer(Bases::at(point(term, epoch)), &[(term, epoch)]);
        assert_eq!(why(knows(10), &at(3, 20)), None);
        assert_eq!(why(knows(21), &at(3, 20)), Some(Why::TooOld { at: point(3, 20), known: Epoch(21) }));
        assert_eq!(why(Known::default(), &at(3, 20)), Some(Why::NotTracked));
        assert_eq!(why(knows(0), &at(2, 4)), Some(Why::OtherHistory { at: point(2, 4) }));
        assert_eq!(why(knows(0), &Offer::default()), Some(Why::NoBase));
        let base = Some(Base { point: point(1, 14), from: Epoch(12) });
        let far = offer(Bases { memory: base, disk: base }, &[(1, 14)]);
        assert_eq!(why(knows(0), &far), Some(Why::WentOn { at: point(1, 10), known: Epoch(12) }));
        let Plan { memory, disk, .. } = super::plan(&mine, knows(0), &at(3, 20), true);
        assert_eq!((memory, disk), (Some(Why::Asked), Some(Why::Asked)));
        let empty = super::plan(&mine, knows(0), &Offer::default(), false);
        assert_eq!(empty.memory, Some(Why::Nothing));
        let words = |plan: Plan, disk| plan.reasons(disk, Some("it was away too long"));
        assert_eq!(
            words(empty, true),
            "memory: the secondary has nothing of it; disk: the secondary does not know which point it holds, as after a \
             copy that was cut off"
        );
        assert_eq!(words(empty, false), "memory: the secondary has nothing of it");
        let late = super::plan(&mine, knows(21), &at(3, 20), false);
        assert_eq!(
            words(late, true),
            "memory and disk: it holds 3.20, and this node knows what was written since epoch 21 only (it was away too long)"
        );
        let quick = super::plan(&mine, knows(9), &at(3, 20), false);
        assert_eq!(words(quick, true), "");
    }
}
