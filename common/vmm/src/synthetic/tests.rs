//! The synthetic guest against itself, against a mirror that lives on dirty sets, and against the checker of
//! the Linux workload's console.

#[path = "../../../../deploy/guest/workload/chain.rs"]
#[allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    reason = "the workload's own file, of which this uses a part"
)]
mod workload;

use super::{End, Program, SyntheticConfig, SyntheticError, SyntheticGuest, SyntheticState, Tracking};
use crate::dirty_set::DirtySet;
use crate::egress::{Output, OutputItem, OutputPosition};
use crate::guest::{GuestError, GuestEvent, Lifecycle, ProtectedGuest, ResetCause, Tracked, TrackingLoss};
use crate::memory::GuestMemory;
use crate::spec::{BootFile, BootSource, GuestSpec, TrackerKind};
use crate::state::{Body, MachineState, StateError};
use colo_common::limits::{MAX_CONSOLE_INPUT, MAX_EPOCH_FRAMES};
use colo_common::{Gfn, PAGE_SIZE, Term};
use proptest::prelude::{
    Just, ProptestConfig, Strategy, any, prop_assert, prop_assert_eq, prop_oneof, proptest,
};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

const ENTRIES: u32 = 256;

fn spec(vcpus: u32, memory_bytes: u64, tracker: TrackerKind) -> GuestSpec {
    let image = BootFile { path: PathBuf::new(), bytes: Vec::new().into() };
    let spec = GuestSpec::new("test", memory_bytes, BootSource::Flat { image, address: 0 });
    GuestSpec { vcpus, tracker, ..spec }
}

fn ring_spec(vcpus: u32) -> GuestSpec {
    spec(vcpus, 4 << 20, TrackerKind::Ring { entries: 1024 })
}

/// Small rings that nobody but the test harvests.
fn bare_rings() -> Tracking {
    Tracking { ring_entries: Some(ENTRIES), harvest_every: 0, quarter: false, ..Tracking::default() }
}

fn guest(spec: GuestSpec, program: &Program, tracking: &Tracking) -> SyntheticGuest {
    let config = SyntheticConfig { program: program.clone(), tracking: tracking.clone() };
    SyntheticGuest::new(spec, config).unwrap()
}

fn guest_of(program: &Program) -> SyntheticGuest {
    guest(ring_spec(2), program, &Tracking::default())
}

fn running(program: &Program, tracking: &Tracking) -> SyntheticGuest {
    let mut guest = guest(ring_spec(2), program, tracking);
    guest.boot().unwrap();
    guest.resume().unwrap();
    guest
}

fn dirty_for(guest: &SyntheticGuest) -> DirtySet {
    DirtySet::new(guest.memory().layout().frame_limit())
}

fn cut(guest: &mut SyntheticGuest) -> crate::guest::Cut {
    let mut dirty = dirty_for(guest);
    guest.cut(&mut dirty).unwrap()
}

fn copy_all(from: &GuestMemory, to: &GuestMemory) {
    for (first, frames) in to.populated().unwrap() {
        (first.0..first.0 + frames).for_each(|gfn| to.write_page(Gfn(gfn), &[0; PAGE_SIZE]).unwrap());
    }
    let mut page = [0; PAGE_SIZE];
    for (first, frames) in from.populated().unwrap() {
        for gfn in (first.0..first.0 + frames).map(Gfn) {
            from.read_page(gfn, &mut page).unwrap();
            to.write_page(gfn, &page).unwrap();
        }
    }
}

/// Another node's copy of guest memory: takes what dirty sets name and nothing else.
struct Mirror {
    memory: GuestMemory,
    dirty: DirtySet,
}

impl Mirror {
    fn of(guest: &SyntheticGuest) -> Self {
        let memory = GuestMemory::new(guest.memory().layout().bytes()).unwrap();
        copy_all(guest.memory(), &memory);
        Self { memory, dirty: dirty_for(guest) }
    }

    /// Reads the pages of the dirty set, as an epoch builder does right after a collect or a cut.
    fn update(&mut self, guest: &SyntheticGuest) {
        let mut page = [0; PAGE_SIZE];
        for gfn in self.dirty.iter() {
            guest.memory().read_page(gfn, &mut page).unwrap();
            self.memory.write_page(gfn, &page).unwrap();
        }
        self.dirty.clear();
    }

    fn equals(&self, guest: &SyntheticGuest) -> bool {
        self.memory.digest().unwrap() == guest.memory().digest().unwrap()
    }
}

/// All output of a guest's life, joined over the cuts.
#[derive(Debug, Default, PartialEq, Eq)]
struct Transcript {
    end: OutputPosition,
    items: Vec<OutputItem>,
}

impl Transcript {
    fn add(&mut self, output: Output) {
        assert_eq!(output.start, self.end, "output is missing or came twice");
        for item in output.items {
            match (self.items.last_mut(), item) {
                (Some(OutputItem::Console(last)), OutputItem::Console(more)) => {
                    self.end.console += more.len() as u64;
                    last.extend(more);
                }
                (_, item) => {
                    match &item {
                        OutputItem::Console(bytes) => self.end.console += bytes.len() as u64,
                        OutputItem::Frame { .. } => self.end.frames += 1,
                    }
                    self.items.push(item);
                }
            }
        }
    }

    fn console(&self) -> String {
        let output = Output { start: OutputPosition::default(), items: self.items.clone() };
        String::from_utf8(output.console()).unwrap()
    }
}

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
        let body = Body::Synthetic(state);
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

#[test]
fn overruns_lose_writes_are_noticed_and_are_over_after_the_cut() {
    let (mut unknown, mut lost) = (0, 0);
    for seed in 0..40 {
        let program = Program { seed, pages: 900, writes: 16, ..Program::default() };
        let mut guest = running(&program, &Tracking { seed, overrun_per_mille: 500, ..bare_rings() });
        guest.protect().unwrap();
        let mut mirror = Mirror::of(&guest);
        for epoch in 0..12 {
            guest.advance(1 + epoch * 7);
            let said = loop {
                match guest.next_event(Duration::ZERO) {
                    Some(GuestEvent::TrackingLost(loss)) => break Some(loss),
                    Some(_) => (),
                    None => break None,
                }
            };
            let tracked = guest.cut(&mut mirror.dirty).unwrap().tracked;
            mirror.update(&guest);
            let equal = mirror.equals(&guest);
            match tracked {
                Tracked::Complete => assert!(equal && said.is_none(), "seed {seed} epoch {epoch}"),
                Tracked::Unknown(loss) => {
                    assert!(said.is_none_or(|said| said == loss));
                    unknown += 1;
                    lost += u32::from(!equal);
                    copy_all(guest.memory(), &mirror.memory);
                }
            }
            guest.resume().unwrap();
        }
    }
    assert!(unknown > 40 && lost > 40, "{unknown} unknown, {lost} with writes lost");
}

#[test]
fn a_loss_that_a_collect_finds_stays_until_the_cut() {
    let program = Program { pages: 900, writes: 16, ..Program::default() };
    let mut guest = running(&program, &Tracking { overrun_per_mille: 1000, ..bare_rings() });
    guest.protect().unwrap();
    let mut dirty = dirty_for(&guest);
    guest.advance(200);
    let lost = guest.collect(&mut dirty).unwrap();
    assert!(matches!(lost, Tracked::Unknown(TrackingLoss::RingOverrun { .. })));
    assert!(matches!(guest.next_event(Duration::ZERO), Some(GuestEvent::TrackingLost(_))));
    assert_eq!(guest.collect(&mut dirty).unwrap(), lost);
    assert_eq!(guest.next_event(Duration::ZERO), None);
    assert_eq!(guest.cut(&mut dirty).unwrap().tracked, lost);
    guest.resume().unwrap();
    assert_eq!(guest.cut(&mut dirty).unwrap().tracked, Tracked::Complete);
}

#[test]
fn a_full_ring_stops_the_guest_until_somebody_collects() {
    let program = Program { pages: 900, writes: 16, ..Program::default() };
    let mut guest = running(&program, &bare_rings());
    guest.protect().unwrap();
    let (mut mirror, mut steps) = (Mirror::of(&guest), 0);
    for _ in 0..20 {
        let taken = guest.advance(1000);
        assert!(taken > 0 && taken < 1000);
        assert_eq!((guest.advance(10), guest.next_event(Duration::ZERO)), (0, None));
        steps += taken;
        assert_eq!(guest.collect(&mut mirror.dirty).unwrap(), Tracked::Complete);
        mirror.update(&guest);
        assert!(mirror.equals(&guest));
    }
    assert_eq!(guest.time(), steps);
    // With vCPUs that harvest for themselves nothing ever stops.
    let mut guest = running(&program, &Tracking { ring_entries: Some(ENTRIES), ..Tracking::default() });
    guest.protect().unwrap();
    assert_eq!(guest.advance(1000), 1000);
}

#[test]
fn scattered_pages_reach_the_upper_range_of_memory() {
    let program = Program { pages: 128, spread: 8000, ..Program::default() };
    let bytes = 4 << 30;
    for kind in [TrackerKind::Bitmap, TrackerKind::default()] {
        let mut guest = guest(spec(3, bytes, kind), &program, &Tracking::default());
        guest.boot().unwrap();
        guest.protect().unwrap();
        let mut mirror = Mirror::of(&guest);
        guest.resume().unwrap();
        assert_eq!(guest.advance(500), 500);
        assert_eq!(guest.cut(&mut mirror.dirty).unwrap().tracked, Tracked::Complete);
        assert!(mirror.dirty.iter().any(|gfn| gfn.0 >= 1 << 20));
        mirror.update(&guest);
        assert!(mirror.equals(&guest));
    }
}

#[test]
fn the_console_passes_the_checker_of_the_workload() {
    let end = Some(End { steps: 400, ask: Lifecycle::DebugExit(7) });
    let program = Program { seed: 77, line_every: 3, end, ..Program::default() };
    let mut guest = running(&program, &Tracking::default());
    assert_eq!(guest.console_input(b"hello\nyou\r"), 10);
    assert_eq!(guest.advance(1000), 400);
    assert_eq!(guest.next_event(Duration::ZERO), Some(GuestEvent::Lifecycle(Lifecycle::DebugExit(7))));
    assert_eq!((guest.next_event(Duration::ZERO), guest.advance(5)), (None, 0));
    let cut = cut(&mut guest);
    assert_eq!((cut.state.pending, cut.state.console_input), (Some(Lifecycle::DebugExit(7)), 10));
    let mut checker = workload::Checker::from_start(77);
    checker.feed(&cut.output.console());
    assert_eq!(checker.verdict(), Ok(()));
    assert!(checker.is_done());
    let counts = checker.counts();
    assert!(counts.lines > 80 && counts.echoes == 2 && counts.foreign == 1, "{counts:?}");
    let text = String::from_utf8(cut.output.console()).unwrap();
    assert!(text.starts_with("synthetic guest: boot 1, 2 vCPUs, seed 77\n"));
    assert!(text.contains("\necho hello\necho you\n"));
}

#[test]
fn a_reset_starts_over_and_a_restored_guest_still_asks() {
    let end = Some(End { steps: 30, ask: Lifecycle::Reset(ResetCause::Port) });
    let program = Program { end, ..Program::default() };
    let mut guest = running(&program, &Tracking::default());
    let mut said = Transcript::default();
    for boot in 1..4 {
        assert_eq!(guest.advance(100), 30);
        let first = cut(&mut guest);
        said.add(first.output);
        let mut other = guest_of(&Program::default());
        copy_all(guest.memory(), other.memory());
        other.restore(&first.state).unwrap();
        other.resume().unwrap();
        let asked = other.next_event(Duration::ZERO);
        assert_eq!(asked, Some(GuestEvent::Lifecycle(Lifecycle::Reset(ResetCause::Port))));
        cut(&mut other);
        other.reset().unwrap();
        other.resume().unwrap();
        assert_eq!((other.next_event(Duration::ZERO), other.time()), (None, 0));
        guest = other;
        assert!(said.console().contains(&format!("boot {boot}, ")));
    }
}

#[test]
fn the_power_button_shuts_down_and_survives_a_cut() {
    let mut guest = running(&Program::default(), &Tracking::default());
    guest.advance(9);
    guest.power_button();
    let state = cut(&mut guest).state;
    guest.restore(&state).unwrap();
    guest.resume().unwrap();
    assert!(guest.advance(100) <= 2);
    assert_eq!(guest.next_event(Duration::ZERO), Some(GuestEvent::Lifecycle(Lifecycle::Shutdown)));
    assert!(String::from_utf8(guest.drain_output().console()).unwrap().contains("colo-done "));
}

#[test]
fn input_is_bounded_counted_and_kept_over_cuts_and_resets() {
    let mut guest = running(&Program { line_every: 0, ..Program::default() }, &Tracking::default());
    let bytes: Vec<u8> =
        (0..MAX_CONSOLE_INPUT + 50).map(|n| if n % 10 == 9 { b'\n' } else { b'x' }).collect();
    assert_eq!(guest.console_input(&bytes), MAX_CONSOLE_INPUT);
    assert_eq!(guest.console_input(b"more"), 0);
    guest.advance(1);
    assert_eq!(guest.console_input(b"more"), 0);
    guest.advance(4);
    let state = cut(&mut guest).state;
    guest.restore(&state).unwrap();
    guest.reset().unwrap();
    guest.resume().unwrap();
    assert!(guest.console_input(&bytes) > 0);
    assert!(guest.console_input_offset() > MAX_CONSOLE_INPUT as u64);
    guest.advance(1000);
    assert!(guest.state.input.is_empty());
    let long = [b'y'; 200];
    guest.drain_output();
    guest.console_input(&long);
    guest.advance(10);
    let echoed = String::from_utf8(guest.drain_output().console()).unwrap();
    let echoes: Vec<usize> = echoed.lines().filter(|l| l.starts_with("echo ")).map(str::len).collect();
    assert_eq!(echoes.iter().take(2).copied().collect::<Vec<_>>(), [80, 80]);
}

#[test]
fn full_output_stops_the_guest_and_loses_nothing() {
    let program = Program { frame_every: 1, line_every: 1, frame_bytes: 42, ..Program::default() };
    let mut guest = running(&program, &Tracking::default());
    let mut said = Transcript::default();
    for _ in 0..2 {
        let taken = guest.advance(u64::MAX);
        assert!(taken <= MAX_EPOCH_FRAMES as u64);
        assert_eq!(guest.next_event(Duration::ZERO), Some(GuestEvent::OutputFull));
        assert_eq!(guest.next_event(Duration::ZERO), None);
        said.add(guest.drain_output());
        guest.advance(u64::MAX);
        assert_eq!(guest.next_event(Duration::ZERO), Some(GuestEvent::OutputFull));
        said.add(cut(&mut guest).output);
        guest.resume().unwrap();
        assert_eq!(guest.next_event(Duration::ZERO), None);
    }
    let frames = said.items.iter().filter_map(|item| match item {
        OutputItem::Frame { bytes, .. } => Some(u64::from_be_bytes(bytes[26..34].try_into().unwrap())),
        OutputItem::Console(_) => None,
    });
    let numbers: Vec<u64> = frames.collect();
    assert_eq!(numbers, (1..=guest.time()).collect::<Vec<_>>());
    let mut checker = workload::Checker::from_start(program.seed);
    checker.feed(said.console().as_bytes());
    assert_eq!(checker.verdict(), Ok(()));
    assert_eq!(checker.counts().lines, guest.time());
}

#[test]
fn a_page_of_another_time_stops_the_guest_for_good() {
    let program = Program { pages: 40, ..Program::default() };
    let (mut noticed, pages) = (0, 40);
    for stale in 0..pages {
        let mut guest = running(&program, &Tracking::default());
        guest.console_input(b"abc");
        guest.advance(200);
        let (mut old, mut new) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
        guest.memory().read_page(Gfn(stale), &mut old).unwrap();
        guest.advance(100);
        guest.memory().read_page(Gfn(stale), &mut new).unwrap();
        guest.memory().write_page(Gfn(stale), &old).unwrap();
        let taken = guest.advance(300);
        if old == new {
            // The inbox is read once and then of no more use.
            assert_eq!(taken, 300);
            continue;
        }
        noticed += 1;
        let event = guest.next_event(Duration::ZERO);
        let text = format!("{event:?}");
        assert!(
            taken < 300 && text.contains("Failed") && text.contains("found memory at"),
            "{stale}: {text}"
        );
        let failed = cut(&mut guest);
        assert!(String::from_utf8(failed.output.console()).unwrap().contains("\ncolo-error memory at "));
        guest.restore(&failed.state).unwrap();
        guest.resume().unwrap();
        assert_eq!((guest.advance(1), guest.next_event(Duration::ZERO)), (0, event));
    }
    assert!(noticed >= pages - 3, "{noticed}");
}

#[test]
fn a_lost_device_write_is_noticed_too() {
    let mut guest = running(&Program::default(), &Tracking::default());
    guest.protect().unwrap();
    let mut mirror = Mirror::of(&guest);
    guest.console_input(b"some words\n");
    // vCPU 0 has just let the device deliver, and has not read it.
    guest.advance(1);
    let state = guest.cut(&mut mirror.dirty).unwrap().state;
    assert!(mirror.dirty.contains(Gfn(1)));
    mirror.update(&guest);
    mirror.memory.write_page(Gfn(1), &[0; PAGE_SIZE]).unwrap();
    copy_all(&mirror.memory, guest.memory());
    guest.restore(&state).unwrap();
    guest.resume().unwrap();
    guest.advance(3);
    assert!(matches!(guest.next_event(Duration::ZERO), Some(GuestEvent::Failed(_))));
}

#[test]
fn what_does_not_fit_the_guests_life_is_refused() {
    let mut guest = guest_of(&Program::default());
    let mut dirty = dirty_for(&guest);
    assert!(matches!(
        guest.cut(&mut dirty),
        Err(GuestError::WrongState { wanted: "cut", state: "neither booted nor restored" })
    ));
    assert!(matches!(guest.resume(), Err(GuestError::WrongState { .. })));
    assert_eq!((guest.advance(5), guest.next_event(Duration::from_secs(3600))), (0, None));
    guest.boot().unwrap();
    guest.resume().unwrap();
    guest.advance(5);
    let wrong = |result: Result<(), GuestError>| {
        matches!(result, Err(GuestError::WrongState { state: "running", .. }))
    };
    assert!(wrong(guest.boot()) && wrong(guest.reset()) && wrong(guest.resume()));
    let state = cut(&mut guest).state;
    guest.resume().unwrap();
    assert!(wrong(guest.restore(&state)));
}

/// A second boot would begin positions of input anew while those of output go on.
#[test]
fn a_guest_is_booted_once_and_reset_after_that() {
    let mut guest = guest_of(&Program::default());
    assert!(matches!(guest.reset(), Err(GuestError::WrongState { wanted: "reset", .. })));
    assert_eq!(guest.console_input(b"early\n"), 6);
    guest.boot().unwrap();
    assert_eq!(guest.console_input_offset(), 6);
    assert!(matches!(guest.boot(), Err(GuestError::WrongState { wanted: "boot", state: "stopped" })));
    guest.reset().unwrap();
    let state = {
        guest.resume().unwrap();
        cut(&mut guest).state
    };
    assert_eq!(state.console_input, 6);
    let mut other = guest_of(&Program::default());
    other.restore(&state).unwrap();
    assert!(matches!(other.boot(), Err(GuestError::WrongState { wanted: "boot", .. })));
}

/// A guest that is started anew says nothing at the offsets of the one before it, and takes no input of its.
#[test]
fn a_start_has_offsets_of_its_own() {
    let start = OutputPosition::at_start(Term(3));
    let mut guest = guest_of(&Program::default());
    let early = guest.count_from(start);
    assert!(matches!(early, Err(GuestError::WrongState { state: "neither booted nor restored", .. })));
    guest.boot().unwrap();
    guest.count_from(start).unwrap();
    assert!(matches!(guest.count_from(start), Err(GuestError::WrongState { state: "stopped", .. })));
    assert_eq!(guest.console_input(b"ls\n"), 3);
    guest.resume().unwrap();
    guest.advance(500);
    let crate::guest::Cut { state, output, .. } = cut(&mut guest);
    assert_eq!((output.start, state.console_input), (start, start.console + 3));
    assert_eq!(state.output.console, start.console + output.console().len() as u64);
    let mut other = guest_of(&Program::default());
    other.restore(&MachineState::decode(&state.encode()).unwrap()).unwrap();
    assert_eq!(other.console_input_offset(), start.console + 3);
    guest.reset().unwrap();
    guest.resume().unwrap();
    assert_eq!(cut(&mut guest).output.start, state.output);
}

#[test]
fn an_owner_of_several_sources_is_woken_for_each_event() {
    let program = Program { frame_every: 1, line_every: 1, ..Program::default() };
    let mut guest = running(&program, &Tracking::default());
    let woken = Arc::new(AtomicU32::new(0));
    let counter = Arc::clone(&woken);
    guest.on_event(Arc::new(move || {
        counter.fetch_add(1, Ordering::SeqCst);
    }));
    guest.advance(1);
    assert_eq!((woken.load(Ordering::SeqCst), guest.next_event(Duration::ZERO)), (0, None));
    guest.advance(u64::MAX);
    assert_eq!(guest.advance(1), 0);
    assert_eq!(woken.load(Ordering::SeqCst), 1, "once for one event");
    assert_eq!(guest.next_event(Duration::ZERO), Some(GuestEvent::OutputFull));
    assert_eq!(guest.next_event(Duration::ZERO), None);
    guest.drain_output();
    guest.power_button();
    guest.advance(u64::MAX);
    assert_eq!(woken.load(Ordering::SeqCst), 2);
    assert_eq!(guest.next_event(Duration::ZERO), Some(GuestEvent::Lifecycle(Lifecycle::Shutdown)));
    // It stands over the cut, so a resume tells it again.
    cut(&mut guest);
    guest.resume().unwrap();
    assert_eq!(woken.load(Ordering::SeqCst), 3);
    // Somebody new is told at once of what waits.
    let counter = Arc::clone(&woken);
    guest.on_event(Arc::new(move || {
        counter.fetch_add(100, Ordering::SeqCst);
    }));
    assert_eq!(woken.load(Ordering::SeqCst), 103);
    assert_eq!(guest.next_event(Duration::ZERO), Some(GuestEvent::Lifecycle(Lifecycle::Shutdown)));
}

#[test]
fn states_of_other_guests_are_refused() {
    let mut one = running(&Program::default(), &Tracking::default());
    one.advance(50);
    let state = cut(&mut one).state;
    let mut other = guest(ring_spec(3), &Program::default(), &Tracking::default());
    assert!(matches!(other.restore(&state), Err(GuestError::State(StateError::OtherSpec { .. }))));
    // Of the right spec by its word, but not in what it says.
    let lies = MachineState { spec: other.digest, ..state.clone() };
    assert!(matches!(other.restore(&lies), Err(GuestError::State(StateError::Malformed(_)))));
    let far = MachineState { output: OutputPosition { console: u64::MAX, frames: 0 }, ..state.clone() };
    assert!(matches!(one.restore(&far), Err(GuestError::State(StateError::Malformed(_)))));
    one.restore(&state).unwrap();
}

#[test]
fn every_part_of_a_state_has_its_limit() {
    let mut guest = running(&Program::default(), &Tracking::default());
    guest.advance(20);
    let good = cut(&mut guest).state;
    let Body::Synthetic(state) = &good.body else { panic!("not synthetic") };
    let changes: [fn(&mut SyntheticState); 14] = [
        |s| s.vcpus.clear(),
        |s| s.vcpus = vec![s.vcpus[0].clone(); 65],
        |s| s.boots = 0,
        |s| s.time = u64::MAX,
        |s| s.vcpus[1].round = 0,
        |s| s.vcpus[1].position = 128,
        |s| s.vcpus[0].steps = u64::MAX,
        |s| s.input = vec![0; MAX_CONSOLE_INPUT + 1],
        |s| s.unread = 513,
        |s| s.line = vec![0; 76],
        |s| s.program.pages = 3,
        |s| s.program.writes = 17,
        |s| s.program.frame_bytes = 1 << 30,
        |s| s.program.spread = u32::MAX,
    ];
    for (number, change) in changes.iter().enumerate() {
        let mut state = state.clone();
        change(&mut state);
        assert!(matches!(state.check_limits(), Err(StateError::Malformed(_))), "change {number}");
        let changed = MachineState { body: Body::Synthetic(state), ..good.clone() };
        assert!(matches!(MachineState::decode(&changed.encode()), Err(StateError::Malformed(_))));
    }
}

#[test]
fn configurations_out_of_range_are_refused_with_their_name() {
    let refused = |vcpus, program: Program, tracking: Tracking| match SyntheticGuest::new(
        ring_spec(vcpus),
        SyntheticConfig { program, tracking },
    ) {
        Err(SyntheticError::Config(text)) => text,
        other => panic!("{:?}", other.err()),
    };
    let (program, tracking) = (Program::default(), Tracking::default());
    assert!(refused(0, program.clone(), tracking.clone()).contains("0 vCPUs"));
    let few = Program { pages: 5, ..program.clone() };
    assert_eq!(refused(2, few, tracking.clone()), "pages is 5, not between 6 and 1024");
    let far = Program { spread: 9, ..program.clone() };
    assert_eq!(refused(2, far, tracking.clone()), "the last page is 1144, not between 1 and 1024");
    let odd = Tracking { ring_entries: Some(100), ..tracking.clone() };
    assert!(refused(2, program.clone(), odd).contains("power of two"));
    let little = Tracking { reserved: 8, ..tracking };
    assert!(refused(2, program, little).contains("8 reserved entries"));
}

#[test]
fn every_write_is_reported_once_and_a_duplicate_does_no_harm() {
    let program = Program { pages: 200, ..Program::default() };
    let mut plain = running(&program, &bare_rings());
    let mut doubled = running(&program, &Tracking { duplicate_per_mille: 400, ..bare_rings() });
    let (mut one, mut two) = (dirty_for(&plain), dirty_for(&doubled));
    for guest in [&mut plain, &mut doubled] {
        guest.protect().unwrap();
        assert_eq!(guest.advance(10), 10);
    }
    assert_eq!(plain.collect(&mut one).unwrap(), Tracked::Complete);
    assert_eq!(doubled.collect(&mut two).unwrap(), Tracked::Complete);
    assert!(one.len() > 10 && one.iter().eq(two.iter()));
    one.clear();
    assert_eq!(plain.collect(&mut one).unwrap(), Tracked::Complete);
    assert!(one.is_empty());
}
