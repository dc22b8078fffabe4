//! The table against a map, and its bounds.

use super::chunk::{CHUNK_ENTRIES, Chunk, Each};
use super::{LastDirty, LastDirtyBlocks, REBASED};
use crate::block_set::BlockSet;
use crate::dirty_set::DirtySet;
use colo_common::{Block, Epoch, Gfn};
use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop_assert_eq, prop_oneof, proptest};
use std::collections::BTreeMap;

/// No multiple of a chunk or a word.
const FRAMES: u64 = (1 << 28) - 37;

#[derive(Clone, Debug)]
enum Step {
    Mark(Vec<u64>),
    Run(u64, u64),
    /// The next epoch comes after so many.
    Pass(u64),
    /// The next mark is of an epoch this much older.
    Late(u64),
    Begin,
    Forget,
}

fn frame() -> impl Strategy<Value = u64> {
    prop_oneof![0..FRAMES, 0..3000_u64, (FRAMES - 1500)..FRAMES]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => proptest::collection::vec(frame(), 0..40).prop_map(Step::Mark),
        6 => (frame(), 0..2500_u64).prop_map(|(first, count)| Step::Run(first, count.min(FRAMES - first))),
        6 => (1..4_u64).prop_map(Step::Pass),
        1 => (REBASED / 2..REBASED * 3).prop_map(Step::Pass),
        1 => (1..3_u64).prop_map(Step::Late),
        1 => Just(Step::Begin),
        1 => Just(Step::Forget),
    ];
    proptest::collection::vec(step, 0..50)
}

fn set(frames: &[u64]) -> DirtySet {
    let mut set = DirtySet::new(FRAMES);
    for frame in frames {
        set.insert(Gfn(*frame));
    }
    set
}

/// What the table should know.
#[derive(Default)]
struct Model {
    from: Option<u64>,
    last: BTreeMap<u64, u64>,
}

impl Model {
    fn mark(&mut self, frames: impl Iterator<Item = u64>, epoch: u64) {
        if self.from.is_some() {
            for frame in frames {
                let last = self.last.entry(frame).or_default();
                *last = epoch.max(*last);
            }
        }
    }

    fn begin(&mut self, from: Option<u64>) {
        (self.from, self.last) = (from, BTreeMap::new());
    }

    fn since(&self, epoch: u64) -> Option<Vec<u64>> {
        let newer = |(frame, last): (&u64, &u64)| (*last > epoch).then_some(*frame);
        self.from.filter(|from| *from <= epoch).map(|_| self.last.iter().filter_map(newer).collect())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn it_knows_what_a_map_knows(steps in steps(), probes in proptest::collection::vec(any::<u16>(), 8)) {
        let (mut table, mut model, mut epoch, mut late) = (LastDirty::new(FRAMES), Model::default(), 5, 0);
        for step in steps {
            let marked = (epoch - late).max(model.from.map_or(0, |from| from + 1));
            match step {
                Step::Mark(frames) => {
                    table.mark(&set(&frames), Epoch(marked));
                    model.mark(frames.into_iter(), marked);
                }
                Step::Run(first, count) => {
                    table.mark_run(Gfn(first), count, Epoch(marked));
                    model.mark(first..first + count, marked);
                }
                Step::Pass(epochs) => (epoch, late) = (epoch + epochs, 0),
                Step::Late(by) => late = by,
                Step::Begin => {
                    table.begin(Epoch(epoch));
                    model.begin(Some(epoch));
                    (epoch, late) = (epoch + 1, 0);
                }
                Step::Forget => {
                    table.forget();
                    model.begin(None);
                }
            }
            // Epochs too far back may be forgotten, and nothing after them.
            if let (Some(known), Some(from)) = (table.known_from(), model.from.as_mut()) {
                prop_assert_eq!(known.0 > *from, *from + u64::from(u32::MAX) < known.0 + REBASED);
                *from = known.0;
                model.last.retain(|_, last| *last > known.0);
            }
            prop_assert_eq!(table.known_from().map(|from| from.0), model.from);
        }
        let near = probes.iter().map(|probe| (epoch + 2).saturating_sub(u64::from(probe % 64)));
        let from = model.from.unwrap_or(0);
        for at in near.chain([from, from.saturating_sub(1), epoch, u64::MAX]) {
            let found = table.since(Epoch(at)).map(|set| set.iter().map(|gfn| gfn.0).collect());
            prop_assert_eq!(found, model.since(at), "since {}", at);
        }
    }
}

#[test]
fn what_is_dirty_everywhere_at_once_costs_little() {
    let mut disk = LastDirtyBlocks::new(1 << 28);
    disk.begin(Epoch(7));
    disk.mark_run(Block(0), 1 << 28, Epoch(8));
    assert!(disk.bytes() <= (1 << 28) / CHUNK_ENTRIES as usize * 32, "{} bytes", disk.bytes());
    disk.mark_run(Block(1000), 2, Epoch(9));
    let mut set = BlockSet::new(1 << 28);
    set.insert(Block(5));
    disk.mark(&set, Epoch(9));
    assert_eq!(
        disk.since(Epoch(8)).unwrap().iter().map(|block| block.0).collect::<Vec<_>>(),
        [5, 1000, 1001]
    );
    assert_eq!(disk.since(Epoch(7)).unwrap().len(), 1 << 28);
    assert!(disk.since(Epoch(6)).is_none());
    disk.forget();
    assert_eq!((disk.bytes(), disk.known_from()), (0, None));
}

#[test]
fn past_its_bound_it_knows_nothing_and_says_so() {
    // The least that a vector takes is 4 of them.
    let room = 8 * (size_of::<Chunk>() + size_of::<Each>() + 16);
    let mut table = LastDirty::with_bound(FRAMES, room);
    table.begin(Epoch(1));
    let apart: Vec<u64> = (0..8).map(|n| n * CHUNK_ENTRIES).collect();
    table.mark(&set(&apart), Epoch(2));
    assert_eq!((table.bytes(), table.since(Epoch(1)).unwrap().len()), (room, 8));
    table.mark(&set(&[9 * CHUNK_ENTRIES]), Epoch(3));
    assert_eq!((table.bytes(), table.known_from()), (0, None));
    assert!(table.since(Epoch(3)).is_none());
    // What comes after is of no use without a new beginning.
    table.mark(&set(&apart), Epoch(4));
    assert!(table.since(Epoch(3)).is_none());
    table.begin(Epoch(4));
    table.mark_run(Gfn(1), FRAMES - 1, Epoch(5));
    assert_eq!(table.known_from(), None);
}

#[test]
#[should_panic(expected = "gfn 0x64 is not below 0x64")]
fn a_frame_beyond_the_guest_is_an_own_bug() {
    let mut table = LastDirty::new(100);
    table.begin(Epoch(0));
    table.mark_run(Gfn(99), 2, Epoch(1));
}
