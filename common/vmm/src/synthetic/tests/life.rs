//! Boot, reset, input, output and events of a guest's life.

use super::super::{End, Program, Tracking};
use super::workload;
use super::{Transcript, copy_all, cut, dirty_for, guest_of, running};
use crate::egress::{OutputItem, OutputPosition};
use crate::guest::{GuestError, GuestEvent, Lifecycle, ProtectedGuest, ResetCause};
use crate::state::MachineState;
use colo_common::limits::{MAX_CONSOLE_INPUT, MAX_EPOCH_FRAMES};
use colo_common::{Gfn, PAGE_SIZE, Term};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

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
