//! One message of each kind, with every field set to something of its own.

// Each test file uses some of them.
#![allow(dead_code)]

use colo_common::history::point;
use colo_common::{Block, Epoch, Gfn, History, Incarnation, PAGE_SIZE, ReplicaId, Term};
use colo_proto::message::{
    Ack, Base, Bases, BlockDigestRequest, BlockDigests, Detail, DigestRange, DigestRequest, Diverged,
    EpochBegin, EpochEnd, Hello, Output, OutputItem, PageDigest, Position, Progress, Purpose, RangeDigests,
    Refusal, Refused, SeedBegin, SeedMode, SeedPart, TermChanged, Verified, Verify, VerifyPart, VerifyRange,
    Welcome, Yield,
};
use colo_proto::pages::{Content, Run};
use colo_proto::version::Versions;

const ID: u128 = 0x0011_2233_4455_6677_8899_aabb_ccdd_eeff;

pub(crate) fn runs() -> Vec<Run> {
    vec![
        Run { first: Gfn(5), count: 2, content: Content::Data },
        Run { first: Gfn(7), count: 0x10203, content: Content::Zero },
        Run { first: Gfn(0xf_0000), count: 1, content: Content::Data },
    ]
}

pub(crate) fn history() -> History {
    History::from_points(vec![point(1, 10), point(3, 1000)]).unwrap()
}

pub(crate) fn seed_begin() -> SeedBegin {
    let mode = SeedMode { memory: SeedPart::Since(point(3, 998)), disk: SeedPart::Differing };
    SeedBegin { mode, history: history() }
}

pub(crate) fn epoch_begin() -> EpochBegin {
    EpochBegin {
        base: Some(point(3, 999)),
        history: history(),
        output_start: Position { console: 70_000, frames: 12 },
        released: Position { console: 69_000, frames: 11 },
        console_input: 42,
        promotions: 1,
    }
}

pub(crate) fn output() -> Output {
    let frame = OutputItem::Frame { slot: 1, bytes: vec![0xaa, 0xbb, 0xcc] };
    Output { items: vec![OutputItem::Console(b"hello\n".to_vec()), frame] }
}

pub(crate) fn epoch_end() -> EpochEnd {
    EpochEnd {
        frames: 12,
        data_pages: 300,
        zero_pages: 4,
        data_blocks: 130,
        zero_blocks: 5,
        state_bytes: 20_000,
        output_bytes: 9,
        digest: ID,
    }
}

pub(crate) fn hellos() -> [Hello; 2] {
    let hello = |purpose| Hello {
        versions: Versions { min: 1, max: 1 },
        node: "a".parse().unwrap(),
        incarnation: Incarnation(ID),
        vm: "demo".parse().unwrap(),
        term: Term(3),
        spec_digest: 0x0123_4567_89ab_cdef,
        purpose,
    };
    [hello(Purpose::Seed), hello(Purpose::Link { replica: ReplicaId(!ID) })]
}

pub(crate) fn welcome() -> Welcome {
    Welcome {
        version: 3,
        node: "b".parse().unwrap(),
        incarnation: Incarnation(ID),
        replica: Some(ReplicaId(7)),
        staged: Some(point(3, 998)),
        stale: None,
        max_epoch_bytes: 256 << 20,
        window: 4,
        bases: Bases {
            memory: Some(Base { point: point(3, 998), from: Epoch(900) }),
            disk: Some(Base::at(point(1, 9))),
        },
        history: history(),
    }
}

pub(crate) fn refusals() -> [Refused; 11] {
    [
        Refusal::Version { versions: Versions { min: 2, max: 300 } },
        Refusal::OtherVm,
        Refusal::NotPaired,
        Refusal::Fenced { known: Term(9) },
        Refusal::Promoting,
        Refusal::NotThisReplica,
        Refusal::Busy,
        Refusal::OutOfPlace,
        Refusal::Damaged,
        Refusal::Failed,
        Refusal::NotReady,
    ]
    .map(|reason| Refused { reason, detail: Detail::new("why") })
}

pub(crate) fn ack() -> Ack {
    Ack { point: point(3, 1000), replica: ReplicaId(7), term: Term(4) }
}

pub(crate) fn progress() -> Progress {
    Progress {
        staged: Some(point(3, 1000)),
        applied: Some(point(3, 999)),
        persisted: None,
        backlog_bytes: 1 << 20,
    }
}

pub(crate) fn term_changed() -> TermChanged {
    TermChanged { term: Term(4) }
}

pub(crate) fn digest_request() -> DigestRequest {
    DigestRequest { first: Gfn(0x100), count: 4096 }
}

pub(crate) fn range_digests() -> RangeDigests {
    let digests = [[1; PAGE_SIZE], [2; PAGE_SIZE]].map(|page| PageDigest::of(&page)).to_vec();
    RangeDigests {
        first: Gfn(0x100),
        ranges: vec![DigestRange::Zero { count: 5 }, DigestRange::Each(digests)],
    }
}

pub(crate) fn block_digest_request() -> BlockDigestRequest {
    BlockDigestRequest { first: Block(0x200), count: 8192 }
}

pub(crate) fn block_digests() -> BlockDigests {
    BlockDigests { first: Block(0x200), ranges: range_digests().ranges }
}

pub(crate) fn block_runs() -> Vec<Run<Block>> {
    vec![
        Run { first: Block(1), count: 1, content: Content::Zero },
        Run { first: Block(0x1_0000_0000), count: 1, content: Content::Data },
    ]
}

pub(crate) fn diverged() -> Diverged {
    Diverged { pages: vec![(Gfn(0x100), 3)], blocks: vec![(Block(0x8000_0000), 256)], last: true }
}

pub(crate) fn verify() -> Verify {
    let digests = [[1; PAGE_SIZE], [2; PAGE_SIZE]].map(|page| PageDigest::of(&page)).to_vec();
    let ranges = vec![VerifyRange::Skip(3), VerifyRange::Zero(0x1_0000), VerifyRange::Each(digests)];
    Verify { part: VerifyPart::Memory, first: 0x100, ranges }
}

pub(crate) fn verified() -> Verified {
    let (compared, differing, places) = (0x1_0002, 2, vec![0x103, 0x1_0104]);
    Verified { point: point(3, 1000), part: VerifyPart::Disk, compared, differing, places }
}

pub(crate) fn yields() -> Yield {
    Yield { failed: true }
}
