//! What is encoded is decoded: messages with any values that they may have.

use colo_common::history::point;
use colo_common::{Block, Gfn, History, Incarnation, PAGE_SIZE, Point, ReplicaId, Term};
use colo_proto::message::{
    Ack, BlockDigests, DigestRange, EpochBegin, EpochEnd, Hello, MAX_POSITION, Message, Output, OutputItem,
    PageDigest, Position, Progress, Purpose, RangeDigests,
};
use colo_proto::version::Versions;
use proptest::prelude::{Strategy, any, prop_assert_eq, prop_oneof, proptest};
use std::fmt::Debug;

fn points() -> impl Strategy<Value = Point> {
    any::<(u64, u64)>().prop_map(|(term, epoch)| point(term, epoch))
}

fn histories() -> impl Strategy<Value = History> {
    proptest::collection::vec((1..u64::from(u32::MAX), any::<u32>()), 0..20).prop_map(|steps| {
        let (mut term, mut epoch) = (0, 0);
        let points = steps.into_iter().map(|(terms, epochs)| {
            (term, epoch) = (term + terms, epoch + u64::from(epochs));
            point(term, epoch)
        });
        History::from_points(points.collect()).unwrap()
    })
}

fn positions() -> impl Strategy<Value = Position> {
    (0..=MAX_POSITION, 0..=MAX_POSITION).prop_map(|(console, frames)| Position { console, frames })
}

fn items() -> impl Strategy<Value = OutputItem> {
    let bytes = || proptest::collection::vec(any::<u8>(), 0..300);
    let frame = (any::<u32>(), bytes()).prop_map(|(slot, bytes)| OutputItem::Frame { slot, bytes });
    prop_oneof![bytes().prop_map(OutputItem::Console), frame]
}

fn ranges() -> impl Strategy<Value = DigestRange> {
    let digests = proptest::collection::vec(any::<u8>().prop_map(|b| PageDigest::of(&[b; PAGE_SIZE])), 1..50);
    prop_oneof![
        (1..10_000_u64).prop_map(|count| DigestRange::Zero { count }),
        digests.prop_map(DigestRange::Each)
    ]
}

fn same<M: Message + PartialEq + Debug>(message: &M) -> Result<(), proptest::test_runner::TestCaseError> {
    let decoded = M::decode(&message.encode());
    prop_assert_eq!(decoded.as_ref(), Ok(message));
    Ok(())
}

proptest! {
    #[test]
    fn epochs(
        base in proptest::option::of(points()), history in histories(), output_start in positions(),
        released in positions(), console_input in 0..=MAX_POSITION, promotions: u32,
    ) {
        same(&EpochBegin { base, history, output_start, released, console_input, promotions })?;
    }

    #[test]
    fn ends(frames: u32, pages: (u64, u64), blocks: (u64, u64), state_bytes: u64, output_bytes: u64, digest: u128) {
        let ((data_pages, zero_pages), (data_blocks, zero_blocks)) = (pages, blocks);
        same(&EpochEnd {
            frames, data_pages, zero_pages, data_blocks, zero_blocks, state_bytes, output_bytes, digest,
        })?;
    }

    #[test]
    fn outputs(items in proptest::collection::vec(items(), 0..20)) {
        same(&Output { items })?;
    }

    #[test]
    fn digests(first in 0..1_u64 << 28, ranges in proptest::collection::vec(ranges(), 1..20)) {
        same(&BlockDigests { first: Block(first), ranges: ranges.clone() })?;
        same(&RangeDigests { first: Gfn(first), ranges })?;
    }

    #[test]
    fn control(
        a in points(), b in proptest::option::of(points()), id: u128, term: u64, min: u16, max: u16, backlog_bytes: u64,
        node in "[a-z0-9][a-z0-9._-]{0,63}", linked: bool,
    ) {
        same(&Ack { point: a, replica: ReplicaId(id), term: Term(term) })?;
        same(&Progress { staged: Some(a), applied: b, persisted: None, backlog_bytes })?;
        let purpose = if linked { Purpose::Link { replica: ReplicaId(id) } } else { Purpose::Seed };
        same(&Hello {
            versions: Versions { min, max }, node: node.parse().unwrap(), incarnation: Incarnation(!id),
            vm: node.parse().unwrap(), term: Term(term), spec_digest: !term, purpose,
        })?;
    }
}
