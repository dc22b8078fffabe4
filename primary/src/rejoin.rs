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

/// How a copy is made whole. `full`: the operator wants everything sent.
pub fn plan(mine: &History, known: Known, offer: &Offer, full: bool) -> SeedMode {
    if full {
        return SeedMode::FULL;
    }
    let since = |known, base: Option<Base>| base.and_then(|base| common(mine, known, base, &offer.history));
    let memory = match (since(known.memory, offer.bases.memory), offer.staged) {
        (Some(point), _) => SeedPart::Since(point),
        (None, Some(_)) => SeedPart::Differing,
        (None, None) => SeedPart::All,
    };
    let disk = since(known.disk, offer.bases.disk).map_or(SeedPart::Differing, SeedPart::Since);
    SeedMode { memory, disk }
}

/// The newest point that both have, if both know what they changed since.
fn common(mine: &History, known: Option<Epoch>, base: Base, theirs: &History) -> Option<Point> {
    let known = known?;
    let point = if mine.contains(base.point) { base.point } else { mine.common_point(theirs)? };
    let reached = point <= base.point && point.epoch >= base.from && point.epoch >= known;
    reached.then_some(point)
}

#[cfg(test)]
mod tests {
    use super::plan;
    use crate::last_changed::Known;
    use crate::replicator::Offer;
    use colo_common::history::{History, point};
    use colo_common::{Epoch, Point};
    use colo_proto::message::{Base, Bases, SeedMode, SeedPart};

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
}
