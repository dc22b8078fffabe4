//! The network card, and what the other plain devices do.

use colo_common::limits::MAX_EPOCH_FRAMES;
use std::time::Duration;

use super::driver::{DATA, NEXT, Rig, SIZE, WRITE};
use super::{CONSOLE_SLOT, NET_SLOT, RNG_SLOT};
use crate::egress::OutputItem;
use crate::guest::GuestEvent;

const VERSION_1: u64 = 1 << 32;
const MRG_RXBUF: u64 = 1 << 15;
const CSUM: u64 = 1;

fn send(rig: &Rig, number: u16, len: u32) {
    let index = number % SIZE;
    rig.descriptor(NET_SLOT, 1, index, (DATA, len, 0, 0));
    rig.offer(NET_SLOT, 1, number, index);
}

#[test]
fn what_the_guest_sends_is_held_in_order_with_a_tidy_header() {
    let rig = Rig::new();
    rig.start(NET_SLOT, VERSION_1, 2);
    rig.put(DATA, &[0xee; 12]);
    rig.put(DATA + 12, b"hello");
    send(&rig, 0, 17);
    rig.wait_used(NET_SLOT, 1, 1);
    assert_eq!(rig.events.next(Duration::ZERO), Some(GuestEvent::Output));
    let frame = [[0; 12].as_slice(), b"hello"].concat();
    let held = |rig: &Rig| rig.egress.take().items;
    assert_eq!(held(&rig), [OutputItem::Frame { slot: NET_SLOT, bytes: frame }]);
    rig.start(NET_SLOT, VERSION_1 | CSUM, 2);
    send(&rig, 0, 17);
    let mut frame = [[0xee; 12].as_slice(), b"hello"].concat();
    frame[10..12].fill(0);
    assert_eq!(held(&rig), [OutputItem::Frame { slot: NET_SLOT, bytes: frame }]);
}

#[test]
fn a_full_hold_keeps_frames_in_the_queue_until_the_cut() {
    let rig = Rig::new();
    rig.start(NET_SLOT, VERSION_1, 2);
    for number in 0..MAX_EPOCH_FRAMES as u16 {
        send(&rig, number, 60);
        rig.wait_used(NET_SLOT, 1, number + 1);
    }
    let number = MAX_EPOCH_FRAMES as u16;
    send(&rig, number, 60);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rig.used(NET_SLOT, 1), number, "it waits");
    let told: Vec<_> = std::iter::from_fn(|| rig.events.next(Duration::ZERO)).collect();
    assert!(told.contains(&GuestEvent::OutputFull), "{told:?}");
    rig.virtio.pause();
    assert_eq!(rig.egress.take().items.len(), MAX_EPOCH_FRAMES);
    rig.virtio.resume();
    rig.wait_used(NET_SLOT, 1, number + 1);
    assert_eq!(rig.egress.take().items.len(), 1);
}

#[test]
fn a_frame_for_the_guest_takes_as_many_buffers_as_it_needs() {
    let rig = Rig::new();
    rig.start(NET_SLOT, VERSION_1 | MRG_RXBUF, 2);
    let frame: Vec<u8> = (0..212_u8).collect();
    rig.wire.send(&frame).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rig.used(NET_SLOT, 0), 0, "there is no buffer");
    for number in 0..3 {
        let at = DATA + u64::from(number) * 0x100;
        rig.descriptor(NET_SLOT, 0, number, (at, 100, WRITE, 0));
        rig.offer(NET_SLOT, 0, number, number);
    }
    rig.wait_used(NET_SLOT, 0, 3);
    let mut expected = frame.clone();
    expected[10..12].copy_from_slice(&[3, 0]);
    let parts = [(0, 100), (0x100, 100), (0x200, 12)];
    let given: Vec<u8> = parts.iter().flat_map(|&(at, len)| rig.get(DATA + at, len)).collect();
    assert_eq!(given, expected);
    assert_eq!([0, 1, 2].map(|n| rig.used_entry(NET_SLOT, 0, n).1), [100, 100, 12]);
    // Without mergeable buffers, one has to hold it all; others wait for a frame that fits.
    rig.start(NET_SLOT, VERSION_1, 2);
    rig.descriptor(NET_SLOT, 0, 0, (DATA, 100, WRITE, 0));
    rig.offer(NET_SLOT, 0, 0, 0);
    rig.wire.send(&frame).unwrap();
    rig.wire.send(&frame[..80]).unwrap();
    rig.wait_used(NET_SLOT, 0, 1);
    assert_eq!(rig.used_entry(NET_SLOT, 0, 0), (0, 80));
}

#[test]
fn the_config_space_says_who_it_is() {
    let rig = Rig::new();
    let mut mac = [0; 8];
    rig.virtio.read(NET_SLOT as usize, 0x100, &mut mac);
    assert_eq!(mac, [2, 0, 0, 0x12, 0x34, 0x56, 1, 0]);
    assert_eq!([0, 1, 2, 3].map(|slot| rig.read(slot, 8)), [1, 2, 4, 3]);
    assert_eq!((rig.read(0, 0), rig.read(0, 4)), (0x7472_6976, 2));
}

#[test]
fn randomness_is_given_and_the_console_is_heard() {
    let rig = Rig::new();
    rig.start(RNG_SLOT, VERSION_1, 1);
    rig.descriptor(RNG_SLOT, 0, 0, (DATA, 64, WRITE, 0));
    rig.offer(RNG_SLOT, 0, 0, 0);
    rig.wait_used(RNG_SLOT, 0, 1);
    assert_eq!(rig.used_entry(RNG_SLOT, 0, 0), (0, 64));
    assert_ne!(rig.get(DATA, 64), [0; 64]);
    rig.start(CONSOLE_SLOT, VERSION_1, 2);
    rig.put(DATA, b"hello ");
    rig.put(DATA + 0x100, b"world");
    rig.descriptor(CONSOLE_SLOT, 1, 0, (DATA, 6, NEXT, 1));
    rig.descriptor(CONSOLE_SLOT, 1, 1, (DATA + 0x100, 5, 0, 0));
    rig.offer(CONSOLE_SLOT, 1, 0, 0);
    rig.wait_used(CONSOLE_SLOT, 1, 1);
    assert_eq!(rig.egress.take().console(), b"hello world");
}
