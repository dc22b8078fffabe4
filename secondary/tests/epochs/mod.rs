//! Epochs as the persist thread takes them, made without a runner.
#![allow(dead_code, reason = "each test uses a part of it")]

use colo_common::history::point;
use colo_common::{BLOCK_SIZE, Block, History, ReplicaId};
use colo_proto::pages::{Content, Run, RunTable};
use colo_secondary::persist::ToStore;
use colo_secondary::staging::{Measures, StagedBlocks, StagedEpoch};
use colo_vmm::synthetic::{SyntheticConfig, SyntheticGuest};
use colo_vmm::{BootFile, BootSource, DirtySet, GuestSpec, MachineState, ProtectedGuest};
use std::sync::Arc;

/// A machine that has said nothing, and its spec's digest.
pub(crate) fn machine() -> (MachineState, u64) {
    let image = BootFile { path: "image".into(), bytes: vec![0x90].into() };
    let spec = GuestSpec::new("web", 4 << 20, BootSource::Flat { image, address: 1 << 16 });
    let mut guest = SyntheticGuest::new(spec.clone(), SyntheticConfig::default()).unwrap();
    guest.boot().unwrap();
    let mut dirty = DirtySet::new(guest.memory().layout().frame_limit());
    guest.resume().unwrap();
    (guest.cut(&mut dirty).unwrap().state, spec.digest())
}

pub(crate) fn data(first: u64, count: u32) -> Run<Block> {
    Run { first: Block(first), count, content: Content::Data }
}

pub(crate) fn zero(first: u64, count: u32) -> Run<Block> {
    Run { first: Block(first), count, content: Content::Zero }
}

/// The epoch 1.`at`, which wrote these blocks.
pub(crate) fn staged(state: &MachineState, at: u64, runs: Vec<Run<Block>>, fill: u8) -> ToStore {
    let mut history = History::default();
    history.extend(point(1, at));
    let bytes = vec![fill; RunTable::data(&runs) as usize * BLOCK_SIZE];
    let epoch = StagedEpoch {
        point: point(1, at),
        base: (at > 1).then(|| point(1, at - 1)),
        history,
        parts: Vec::new(),
        blocks: vec![StagedBlocks::new(runs, bytes.into())],
        state: state.clone(),
        output: Default::default(),
        released: state.output,
        promotions: 0,
        bytes: 0,
        measures: Measures::default(),
    };
    ToStore { epoch: Arc::new(epoch), held: Arc::default(), replica: ReplicaId(7) }
}
