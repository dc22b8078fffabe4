//! Memory equality: a guest's memory rebuilt from the dirty sets of successive cuts alone is the guest's memory,
//! over thousands of cuts, with either tracker, through resets in place and with sets collected on the way.

use colo_tests::images::{Images, kvm_usable};
use colo_tests::rig::Rig;
use colo_tests::seed::Seed;
use colo_vmm::{GuestSpec, ProtectedGuest, Tracked, TrackerKind};
use std::time::Duration;

const CUTS: u64 = 2000;
/// A digest of all memory after so many cuts.
const COMPARE_EVERY: u64 = 25;
/// A reset in place after so many.
const RESET_EVERY: u64 = 400;

#[expect(clippy::print_stderr, reason = "how hard the test was")]
fn equal_over_thousands_of_cuts(name: &str, vcpus: u32, tracker: TrackerKind, line: &str) {
    if !kvm_usable() {
        return;
    }
    let mut seed = Seed::from_env(2000);
    let spec = Images::find().unwrap().bare(name, vcpus, 32 << 20, line).unwrap();
    let mut rig = Rig::boot(GuestSpec { tracker, ..spec }).unwrap();
    let mut pages = 0;
    for cut in 1..=CUTS {
        assert_eq!(rig.run(Duration::from_micros(seed.below(3000))).unwrap(), None, "{}", rig.tail());
        for _ in 0..seed.below(3) {
            assert_eq!(rig.collect().unwrap(), Tracked::Complete);
        }
        pages += rig.cut().unwrap().pages;
        if cut % COMPARE_EVERY == 0 {
            rig.check_image().unwrap();
        }
        // What a reset writes comes with the next cut.
        if cut % RESET_EVERY == RESET_EVERY / 2 {
            rig.guest().reset().unwrap();
        }
    }
    rig.check_image().unwrap();
    eprintln!("{name}, {vcpus} vCPUs, {tracker:?}: {CUTS} cuts, {pages} dirty pages, {} losses", rig.losses);
    assert!(pages > CUTS, "a guest that wrote too little to show anything");
    assert_eq!(rig.losses, 0);
}

#[test]
fn with_rings_and_user_mode_writes() {
    let line = "pages=512 pattern=rand mode=user cpus=1";
    equal_over_thousands_of_cuts("dirty.elf", 1, TrackerKind::default(), line);
}

#[test]
fn with_rings_and_kernel_mode_writes_on_two_vcpus() {
    let line = "pages=512 pattern=rand mode=kernel cpus=2";
    equal_over_thousands_of_cuts("dirty.elf", 2, TrackerKind::default(), line);
}

#[test]
fn with_the_bitmap() {
    let line = "pages=512 pattern=rand mode=user cpus=1";
    equal_over_thousands_of_cuts("dirty.elf", 1, TrackerKind::Bitmap, line);
}

#[test]
fn with_rings_and_a_guest_that_computes() {
    let line = "rounds=1000000 seed=9 cpus=2 io=1";
    equal_over_thousands_of_cuts("compute.elf", 2, TrackerKind::default(), line);
}

#[test]
fn with_the_bitmap_and_a_guest_that_computes() {
    let line = "rounds=1000000 seed=9 cpus=2 io=1";
    equal_over_thousands_of_cuts("compute.elf", 2, TrackerKind::Bitmap, line);
}

/// What the guest writes unprotected is neither tracked nor expected to be, so the image begins anew after it; and
/// every page that became writable meanwhile must be protected again.
#[test]
fn through_protection_that_is_switched_off_and_on() {
    if !kvm_usable() {
        return;
    }
    let mut seed = Seed::from_env(2001);
    for tracker in [TrackerKind::default(), TrackerKind::Bitmap] {
        let line = "pages=512 pattern=rand mode=user cpus=2";
        let spec = Images::find().unwrap().bare("dirty.elf", 2, 32 << 20, line).unwrap();
        let mut rig = Rig::boot(GuestSpec { tracker, ..spec }).unwrap();
        let mut pages = 0;
        for _ in 0..100 {
            for _ in 0..seed.below(4) {
                assert_eq!(rig.run(Duration::from_micros(seed.below(4000))).unwrap(), None);
                pages += rig.cut().unwrap().pages;
            }
            rig.check_image().unwrap();
            rig.guest().unprotect().unwrap();
            let runs = seed.below(2) == 0;
            if runs {
                assert_eq!(rig.run(Duration::from_micros(seed.below(4000))).unwrap(), None);
                assert_eq!(rig.cut().unwrap().pages, 0, "pages were tracked without protection");
            }
            rig.guest().protect().unwrap();
            if runs {
                rig.copy_everything().unwrap();
            }
        }
        rig.check_image().unwrap();
        assert!(pages > 1000, "{tracker:?}: a guest that wrote {pages} pages shows nothing");
        assert_eq!(rig.losses, 0);
    }
}
