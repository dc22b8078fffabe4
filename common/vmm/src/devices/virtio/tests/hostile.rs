//! Drivers that break the rules: the device says so and works again after a reset, and nothing else happens.

use proptest::prelude::*;

use super::driver::{DATA, MEMORY, NEXT, Rig, SIZE, WRITE};
use super::{CONSOLE_SLOT, DISK_SLOT, NET_SLOT, RNG_SLOT};

const VERSION_1: u64 = 1 << 32;
const INDIRECT: u16 = 4;
const INDIRECT_DESC: u64 = 1 << 28;

/// Every queue with something to take, and how many its device has.
const QUEUES: [(u32, u32, u32); 6] = [
    (NET_SLOT, 0, 2),
    (NET_SLOT, 1, 2),
    (DISK_SLOT, 0, 1),
    (RNG_SLOT, 0, 1),
    (CONSOLE_SLOT, 0, 2),
    (CONSOLE_SLOT, 1, 2),
];

/// A good request to the disk, after everything.
fn works(rig: &Rig) {
    rig.start(DISK_SLOT, VERSION_1, 1);
    rig.put(DATA, &[0; 16]);
    rig.descriptor(DISK_SLOT, 0, 0, (DATA, 16, NEXT, 1));
    rig.descriptor(DISK_SLOT, 0, 1, (DATA + 0x1000, 512, NEXT | WRITE, 2));
    rig.descriptor(DISK_SLOT, 0, 2, (DATA + 0x2000, 1, WRITE, 0));
    rig.offer(DISK_SLOT, 0, 0, 0);
    rig.wait_used(DISK_SLOT, 0, 1);
    assert!(!rig.is_broken(DISK_SLOT));
}

#[test]
fn chains_that_make_no_sense_stop_the_device_until_it_is_reset() {
    let rig = Rig::new();
    let frame_for_nobody = [0; 60];
    let bad: [&[(u64, u32, u16, u16)]; 7] = [
        // A loop; an index that is none; memory that is none, in part and by overflow; a way out before the way in.
        &[(DATA, 16, NEXT, 0)],
        &[(DATA, 16, NEXT, SIZE)],
        &[(MEMORY - 8, 16, 0, 0)],
        &[(u64::MAX - 8, 16, WRITE, 0)],
        &[(0xd000_0000, 16, 0, 0)],
        &[(DATA, 16, WRITE | NEXT, 1), (DATA, 16, 0, 0)],
        // A table of no whole descriptors.
        &[(DATA, 17, INDIRECT, 0)],
    ];
    for (slot, queue, queues) in QUEUES {
        for chain in bad {
            rig.start(slot, VERSION_1 | INDIRECT_DESC, queues);
            for (index, descriptor) in (0..).zip(chain) {
                rig.descriptor(slot, queue, index, *descriptor);
            }
            if (slot, queue) == (NET_SLOT, 0) {
                rig.wire.send(&frame_for_nobody).unwrap();
            }
            rig.offer(slot, queue, 0, 0);
            // Nobody types, so the console's queue for that is never looked at.
            if (slot, queue) != (CONSOLE_SLOT, 0) {
                rig.wait(|| rig.is_broken(slot));
            }
            assert_eq!(rig.used(slot, queue), 0);
        }
        rig.write(slot, 0x70, 0);
        assert!(!rig.is_broken(slot));
    }
    works(&rig);
}

#[test]
fn rings_that_make_no_sense_stop_the_device_or_are_refused() {
    let rig = Rig::new();
    for (slot, queue, queues) in QUEUES {
        rig.start(slot, VERSION_1, queues);
        // More chains than the queue has entries.
        rig.put(Rig::queue(slot, queue) + 0x1002, &(SIZE + 1).to_le_bytes());
        if (slot, queue) == (NET_SLOT, 0) {
            rig.wire.send(&[0; 60]).unwrap();
        }
        rig.write(slot, 0x50, queue);
        if (slot, queue) != (CONSOLE_SLOT, 0) {
            rig.wait(|| rig.is_broken(slot));
        }
        // Rings outside of memory are none.
        rig.write(slot, 0x70, 0);
        rig.write(slot, 0x70, 3);
        rig.write(slot, 0x30, queue);
        for at in [MEMORY - 16, !0xfff_u64, 0xd000_0000] {
            rig.write(slot, 0x44, 0);
            for register in [0x80, 0x90, 0xa0] {
                rig.write(slot, register, at as u32);
                rig.write(slot, register + 4, (at >> 32) as u32);
            }
            rig.write(slot, 0x44, 1);
            assert_eq!(rig.read(slot, 0x44), 0, "{at:#x}");
        }
    }
    works(&rig);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let rig = Rig::new();
    for features in [0, VERSION_1 | 1 << 60, 1 << 28] {
        rig.write(DISK_SLOT, 0x70, 0);
        rig.write(DISK_SLOT, 0x70, 3);
        for (half, value) in [features as u32, (features >> 32) as u32].into_iter().enumerate() {
            rig.write(DISK_SLOT, 0x24, half as u32);
            rig.write(DISK_SLOT, 0x20, value);
        }
        rig.write(DISK_SLOT, 0x70, 11);
        assert_eq!(rig.read(DISK_SLOT, 0x70), 3, "{features:#x}");
        rig.write(DISK_SLOT, 0x70, 15);
        assert_eq!(rig.read(DISK_SLOT, 0x70), 3, "nor does it start without them");
    }
    works(&rig);
}

/// Bytes of a descriptor that are near something that means something.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![
        4 => DATA..DATA + 0x4000,
        1 => Just(MEMORY - 4),
        1 => 0_u64..MEMORY,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![4 => 0_u32..600, 1 => Just(16), 1 => Just(1), 1 => any::<u32>()];
    (address, len, 0_u16..8, prop_oneof![6 => 0..SIZE, 1 => any::<u16>()])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn nothing_that_a_driver_does_breaks_more_than_its_device(
        rounds in proptest::collection::vec(
            (
                0..QUEUES.len(),
                proptest::collection::vec(descriptor(), SIZE as usize),
                proptest::collection::vec(any::<u8>(), 0..600),
                proptest::collection::vec((0_u32..0x110, any::<u32>()), 0..4),
                0_u16..SIZE,
                any::<bool>(),
            ),
            1..12,
        ),
    ) {
        let rig = Rig::new();
        let mut numbers = [0_u16; QUEUES.len()];
        for (which, descriptors, data, registers, head, fresh) in rounds {
            let (slot, queue, queues) = QUEUES[which];
            if fresh || rig.is_broken(slot) || rig.read(slot, 0x70) != 15 {
                rig.start(slot, VERSION_1 | INDIRECT_DESC, queues);
                for (at, number) in numbers.iter_mut().enumerate() {
                    if QUEUES[at].0 == slot { *number = 0; }
                }
            }
            rig.put(DATA, &data);
            for (index, descriptor) in (0..).zip(descriptors) {
                rig.descriptor(slot, queue, index, descriptor);
            }
            for (register, value) in registers {
                rig.write(slot, register & !3, value);
            }
            let _ = rig.wire.send(&data);
            rig.offer(slot, queue, numbers[which], head);
            numbers[which] = numbers[which].wrapping_add(1);
            rig.egress.take();
        }
        rig.virtio.pause();
        let state = rig.virtio.save();
        state.iter().flatten().for_each(|slot| slot.check_limits().unwrap());
        let bytes = postcard::to_stdvec(&state).unwrap();
        prop_assert_eq!(postcard::from_bytes::<Vec<Option<super::SlotState>>>(&bytes).unwrap(), state.clone());
        rig.virtio.restore(&state).unwrap();
        rig.virtio.resume();
        works(&rig);
    }

    #[test]
    fn a_changed_state_is_refused_or_harmless(
        changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let rig = Rig::new();
        for (slot, _, queues) in QUEUES {
            rig.start(slot, VERSION_1, queues);
        }
        rig.virtio.pause();
        let mut bytes = postcard::to_stdvec(&rig.virtio.save()).unwrap();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok(state) = postcard::from_bytes::<Vec<Option<super::SlotState>>>(&bytes) {
            let sound = state.iter().flatten().all(|slot| slot.check_limits().is_ok());
            // A part of it may have been taken when the rest is refused.
            let _ = sound && rig.virtio.restore(&state).is_ok();
        }
        rig.virtio.resume();
        works(&rig);
    }
}
