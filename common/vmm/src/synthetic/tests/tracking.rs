//! What dirty sets name, and how a loss is noticed.

use super::super::{Program, Tracking};
use super::{ENTRIES, Mirror, bare_rings, copy_all, dirty_for, guest, running, spec};
use crate::guest::{GuestEvent, ProtectedGuest, Tracked, TrackingLoss};
use crate::spec::TrackerKind;
use colo_common::{Gfn, PAGE_SIZE};
use std::time::Duration;

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
