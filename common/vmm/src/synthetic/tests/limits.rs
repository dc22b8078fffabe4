//! States and configurations that are refused.

use super::super::disk::Request;
use super::super::{Program, SyntheticConfig, SyntheticError, SyntheticGuest, SyntheticState, Tracking};
use super::{cut, guest, ring_spec, running};
use crate::egress::OutputPosition;
use crate::guest::GuestError;
use crate::guest::ProtectedGuest;
use crate::state::{Body, MachineState, StateError};
use colo_common::limits::MAX_CONSOLE_INPUT;

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
    let changes: [fn(&mut SyntheticState); 19] = [
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
        |s| s.program.blocks = 1,
        |s| s.program.write_steps = 0,
        |s| s.vcpus[0].disk_round = 0,
        |s| s.vcpus[0].disk_position = 1,
        |s| s.requests = vec![Request { block: 0, round: 1, link: 1, ends: 1 }],
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
