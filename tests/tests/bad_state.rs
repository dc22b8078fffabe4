//! Saved states that were damaged, cut short or made up end in a [`StateError`], whatever is in them, and do no
//! harm to the guest they were offered to.

use colo_tests::images::{Images, kvm_usable};
use colo_tests::rig::contains;
use colo_tests::seed::Seed;
use colo_tests::session::PATIENCE;
use colo_vmm::state::StateError;
use colo_vmm::tracker::Cadence;
use colo_vmm::{
    BootFile, BootSource, DirtySet, GuestError, GuestMemory, GuestSpec, KvmGuest, MachineState,
    ProtectedGuest,
};
use std::sync::Arc;
use std::time::{Duration, Instant};
use xxhash_rust::xxh3::Xxh3;

/// Bytes before the body of an encoded state, and where its version and its checksum are (see `state.rs`).
const HEADER: usize = 24;
const VERSION: usize = 8;
const CHECKSUM: usize = 16;

fn flat() -> GuestSpec {
    let image = BootFile { path: "hlt".into(), bytes: [0xf4].into() };
    GuestSpec::new("flat", 16 << 20, BootSource::Flat { image, address: 0x10_0000 })
}

/// The state of a guest that has devices, timers and input under way, with its spec and memory.
fn real_state() -> (GuestSpec, Arc<GuestMemory>, Vec<u8>) {
    let images = Images::find().unwrap();
    let spec = images.bare("lifecycle.elf", 1, 16 << 20, "echo=1 irq=1").unwrap();
    let mut guest = KvmGuest::new(spec.clone()).unwrap();
    guest.boot().unwrap();
    guest.resume().unwrap();
    wait_for(&mut guest, b"echo ready\n");
    let mut unused = DirtySet::new(guest.memory().layout().frame_limit());
    let cut = guest.cut(&mut unused).unwrap();
    (spec, Arc::clone(guest.memory()), cut.state.encode())
}

fn wait_for(guest: &mut KvmGuest, text: &[u8]) {
    let (started, mut console) = (Instant::now(), Vec::new());
    while !contains(&console, text) {
        assert!(started.elapsed() < PATIENCE, "{}", String::from_utf8_lossy(&console));
        assert_eq!(guest.next_event(Duration::from_millis(5)), None);
        console.extend(guest.drain_output().console());
    }
}

/// Why `bytes` are no state.
#[track_caller]
fn refusal(bytes: &[u8], what: &str) -> StateError {
    let error = MachineState::decode(bytes).map(drop).expect_err(what);
    let text = error.to_string();
    assert!(text.contains("machine state"), "{what}: {text}");
    error
}

#[test]
fn a_damaged_state_is_refused_wherever_the_damage_is() {
    if !kvm_usable() {
        return;
    }
    let (.., good) = real_state();
    MachineState::decode(&good).unwrap();
    println!("a state of {} bytes", good.len());
    let mut bytes = good.clone();
    for bit in 0..8 * good.len() {
        bytes[bit / 8] ^= 1 << (bit % 8);
        refusal(&bytes, &format!("bit {bit}"));
        bytes[bit / 8] = good[bit / 8];
    }
    for len in 0..good.len() {
        let error = refusal(&good[..len], &format!("the first {len} bytes"));
        let expected = if len < HEADER { HEADER } else { good.len() };
        assert_eq!(error, StateError::Truncated { found: len, expected });
    }
    let longer = [&good[..], &[0; 7]].concat();
    assert_eq!(refusal(&longer, "7 bytes more"), StateError::Trailing(7));
    for version in [0_u32, 1000, u32::MAX] {
        let mut other = good.clone();
        other[VERSION..VERSION + 4].copy_from_slice(&version.to_le_bytes());
        for other in [other.clone(), seal(other)] {
            let error = refusal(&other, "another version");
            assert_eq!(error, StateError::Version { found: version });
            assert!(error.to_string().contains("run the same version on both nodes"), "{error}");
        }
    }
}

/// Makes the checksum right.
fn seal(mut bytes: Vec<u8>) -> Vec<u8> {
    let mut hasher = Xxh3::new();
    hasher.update(&bytes[..CHECKSUM]);
    hasher.update(&bytes[HEADER..]);
    bytes[CHECKSUM..HEADER].copy_from_slice(&hasher.digest().to_le_bytes());
    bytes
}

#[test]
fn a_state_of_another_spec_is_refused_and_the_guest_can_still_boot() {
    if !kvm_usable() {
        return;
    }
    let (spec, _, good) = real_state();
    let state = MachineState::decode(&good).unwrap();
    let larger = GuestSpec { memory_bytes: 32 << 20, ..spec.clone() };
    let more_cpus = GuestSpec { vcpus: 2, ..spec.clone() };
    let other_slots = GuestSpec { virtio_slots: 1, ..spec };
    for other in [larger, more_cpus, other_slots, flat()] {
        let mut guest = KvmGuest::new(other).unwrap();
        let Err(GuestError::State(error)) = guest.restore(&state) else { panic!("it was taken") };
        assert!(matches!(error, StateError::OtherSpec { .. }), "{error}");
        assert!(error.to_string().contains("must be the same"), "{error}");
        guest.boot().unwrap();
    }
}

/// Changes one to three bytes of the body, half of the time near its start, where the registers are.
fn hostile(good: &[u8], seed: &mut Seed) -> Vec<u8> {
    let mut bytes = good.to_vec();
    for _ in 0..=seed.below(3) {
        let end = if seed.below(2) == 0 { 1500.min(good.len()) } else { good.len() };
        let at = HEADER + seed.below((end - HEADER) as u64) as usize;
        bytes[at] = match seed.below(4) {
            0 => 0,
            1 => 0xff,
            2 => bytes[at] ^ 1 << seed.below(8),
            _ => seed.next_u64() as u8,
        };
    }
    seal(bytes)
}

/// With a right checksum only the content speaks against it: refused by us, refused by KVM, or taken; and after all
/// that, the good state is taken by the last such guest, which then runs.
#[test]
fn a_made_up_state_does_no_harm() {
    if !kvm_usable() {
        return;
    }
    let mut seed = Seed::from_env(11);
    let (spec, memory, good) = real_state();
    assert_eq!(seal(good.clone()), good, "the layout of the header is known");
    let build = || KvmGuest::with_memory(spec.clone(), Arc::clone(&memory), Cadence::default()).unwrap();
    let (mut guest, mut malformed, mut refused, mut taken) = (build(), 0, 0, 0);
    for _ in 0..600 {
        let state = match MachineState::decode(&hostile(&good, &mut seed)) {
            Ok(state) => state,
            Err(error) => {
                assert!(matches!(error, StateError::Malformed(_)), "{error}");
                malformed += 1;
                continue;
            }
        };
        match guest.restore(&state) {
            Ok(()) => taken += 1,
            Err(error) => {
                assert!(matches!(error, GuestError::State(_)), "{error}");
                assert!(error.to_string().len() > 20, "{error}");
                refused += 1;
                // Its machine is half of one state and half of another.
                guest = build();
            }
        }
    }
    println!("{malformed} malformed, {refused} refused by KVM or the spec, {taken} taken");
    assert!(malformed > 0 && refused > 0 && taken > 0);
    guest.restore(&MachineState::decode(&good).unwrap()).unwrap();
    guest.resume().unwrap();
    assert_eq!(guest.console_input(b"still there\n"), 12);
    wait_for(&mut guest, b"echo still there\n");
}
