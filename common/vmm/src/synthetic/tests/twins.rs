//! Any program under any sequence of steps, beside a twin that is neither moved nor tracked.

use super::super::{Program, SyntheticGuest, SyntheticState, Tracking};
use super::{Mirror, Transcript, copy_all, cut, guest, running, spec};
use crate::guest::{GuestError, ProtectedGuest, Tracked};
use crate::spec::TrackerKind;
use crate::state::{Body, MachineState, StateError};
use proptest::prelude::{
    Just, ProptestConfig, Strategy, any, prop_assert, prop_assert_eq, prop_oneof, proptest,
};
use std::time::Duration;

#[derive(Clone, Debug)]
enum Op {
    Advance(u64),
    Collect,
    Cut,
    /// Cut, move to another guest whose memory is the mirror's, go on there.
    Move,
    Reset,
    /// Unprotect, run unseen, protect again.
    Unseen(u64),
    Input(Vec<u8>),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        12 => (1..120_u64).prop_map(Op::Advance),
        4 => Just(Op::Collect),
        4 => Just(Op::Cut),
        2 => Just(Op::Move),
        1 => Just(Op::Reset),
        1 => (0..40_u64).prop_map(Op::Unseen),
        2 => proptest::collection::vec(prop_oneof![Just(b'\n'), b'a'..b'f'], 0..200).prop_map(Op::Input),
    ]
}

fn any_program() -> impl Strategy<Value = Program> {
    let numbers = (any::<u64>(), 24..700_u32, 1..=16_u32, 1..200_u32, 0..12_u32, 0..12_u32);
    numbers.prop_map(|(seed, pages, writes, words, line_every, frame_every)| Program {
        seed,
        pages,
        writes,
        words,
        line_every,
        frame_every,
        ..Program::default()
    })
}

fn any_tracking() -> impl Strategy<Value = Tracking> {
    let numbers = (any::<u64>(), prop_oneof![Just(128), Just(256), Just(1024)], any::<bool>());
    let faults = (
        0..100_u64,
        prop_oneof![2 => Just(0), 1 => 1..300_u32],
        prop_oneof![2 => Just(0), 1 => 1..=1000_u32],
    );
    (numbers, faults).prop_map(|((seed, entries, quarter), (every, duplicates, overruns))| Tracking {
        seed,
        ring_entries: Some(entries),
        harvest_every: every,
        quarter,
        duplicate_per_mille: duplicates,
        overrun_per_mille: overruns,
        ..Tracking::default()
    })
}

/// A protected guest, its mirror, and its twin: same program, other tracker, never moved nor tracked.
struct World {
    guest: SyntheticGuest,
    twin: SyntheticGuest,
    mirror: Mirror,
    said: Transcript,
    twin_said: Transcript,
    make: Box<dyn Fn() -> SyntheticGuest>,
}

impl World {
    fn new(vcpus: u32, program: Program, tracking: Tracking, bitmap: bool) -> Self {
        let kind = if bitmap { TrackerKind::Bitmap } else { TrackerKind::Ring { entries: 1024 } };
        let twin = guest(spec(vcpus, 4 << 20, TrackerKind::Bitmap), &program, &Tracking::default());
        let make = Box::new(move || guest(spec(vcpus, 4 << 20, kind), &program, &tracking));
        let mut world = Self {
            mirror: Mirror::of(&make()),
            guest: make(),
            twin,
            said: Transcript::default(),
            twin_said: Transcript::default(),
            make,
        };
        for guest in [&mut world.guest, &mut world.twin] {
            guest.boot().unwrap();
            guest.resume().unwrap();
        }
        world.guest.protect().unwrap();
        copy_all(world.guest.memory(), &world.mirror.memory);
        world
    }

    /// Cuts both, compares everything, and leaves both stopped.
    fn cut(&mut self) -> MachineState {
        let cut = self.guest.cut(&mut self.mirror.dirty).unwrap();
        let twin_cut = cut_twin(&mut self.twin);
        self.mirror.update(&self.guest);
        let bytes = cut.state.encode();
        assert_eq!(bytes, twin_cut.state.encode());
        assert_eq!(MachineState::decode(&bytes).unwrap().encode(), bytes);
        assert_eq!(self.guest.memory().digest().unwrap(), self.twin.memory().digest().unwrap());
        self.said.add(cut.output);
        self.twin_said.add(twin_cut.output);
        assert_eq!(self.said, self.twin_said);
        let complete = cut.tracked == Tracked::Complete;
        assert!(self.mirror.equals(&self.guest) || !complete, "a write was lost and nobody said so");
        if !complete {
            copy_all(self.guest.memory(), &self.mirror.memory);
        }
        cut.state
    }

    fn resume(&mut self) {
        self.guest.resume().unwrap();
        self.twin.resume().unwrap();
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Advance(steps) => {
                let taken = self.guest.advance(steps);
                assert_eq!(self.twin.advance(taken), taken);
            }
            Op::Collect => {
                let _ = self.guest.collect(&mut self.mirror.dirty).unwrap();
                self.mirror.update(&self.guest);
            }
            Op::Cut => {
                self.cut();
                self.resume();
            }
            Op::Move => {
                let state = self.cut();
                self.guest = (self.make)();
                copy_all(&self.mirror.memory, self.guest.memory());
                self.guest.restore(&state).unwrap();
                self.guest.protect().unwrap();
                self.resume();
            }
            Op::Reset => {
                self.cut();
                self.guest.reset().unwrap();
                self.twin.reset().unwrap();
                self.resume();
            }
            Op::Unseen(steps) => {
                self.guest.unprotect().unwrap();
                assert_eq!(self.guest.advance(steps), self.twin.advance(steps));
                self.guest.protect().unwrap();
                copy_all(self.guest.memory(), &self.mirror.memory);
            }
            Op::Input(bytes) => {
                assert_eq!(self.guest.console_input(&bytes), self.twin.console_input(&bytes));
                assert_eq!(self.guest.console_input_offset(), self.twin.console_input_offset());
            }
        }
    }
}

fn cut_twin(twin: &mut SyntheticGuest) -> crate::guest::Cut {
    let cut = cut(twin);
    assert_eq!(cut.tracked, Tracked::Complete);
    cut
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn a_guest_is_a_function_of_its_history_and_its_mirror_of_its_dirty_sets(
        vcpus in 1..5_u32,
        program in any_program(),
        tracking in any_tracking(),
        bitmap in prop_oneof![3 => Just(false), 1 => Just(true)],
        ops in proptest::collection::vec(op(), 1..50),
    ) {
        let mut world = World::new(vcpus, program, tracking, bitmap);
        ops.into_iter().for_each(|op| world.apply(op));
        world.cut();
        // After an unknown set, as after any other, tracking is exact.
        world.resume();
        let full = world.guest.advance(20);
        world.twin.advance(full);
        world.cut();
        prop_assert!(world.guest.state.failed.is_none());
    }

    #[test]
    fn no_state_makes_a_guest_panic(at in any::<u64>(), bits in 1..=255_u8, second in any::<u64>(), steps in 0..200_u64) {
        let mut guest = running(&Program::default(), &Tracking::default());
        guest.console_input(b"some input that was not read yet");
        guest.advance(steps);
        let cut = cut(&mut guest);
        let mut bytes = postcard::to_extend(&guest.state, Vec::new()).unwrap();
        let len = bytes.len() as u64;
        bytes[(at % len) as usize] ^= bits;
        bytes[(second % len) as usize] ^= 0x80;
        let Ok(state) = postcard::from_bytes::<SyntheticState>(&bytes) else { return Ok(()) };
        let limits = state.check_limits();
        let body = Body::Synthetic(Box::new(state));
        match guest.restore(&MachineState { body, ..cut.state }) {
            Ok(()) => {
                prop_assert_eq!(limits, Ok(()));
                guest.resume().unwrap();
                guest.advance(100);
                guest.next_event(Duration::ZERO);
            }
            Err(GuestError::State(StateError::Malformed(_))) => (),
            Err(other) => panic!("{other}"),
        }
    }
}
