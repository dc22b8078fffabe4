//! The console: input by offset, which is echoed right however often the guest is cut and replaced in between,
//! input and output far beyond what is held at once, and not a byte of either lost or repeated.

use colo_common::limits::{MAX_CONSOLE_INPUT, MAX_EPOCH_CONSOLE};
use colo_tests::chain::Checker;
use colo_tests::images::{Images, Kernel, kvm_usable};
use colo_tests::rig::Rig;
use colo_tests::seed::Seed;
use colo_tests::session::PATIENCE;
use colo_vmm::guest::GuestEvent;
use colo_vmm::{BootFile, BootSource, DirtySet, GuestSpec, KvmGuest, ProtectedGuest, Tracked};
use std::path::PathBuf;
use std::time::{Duration, Instant};

const EPOCH: Duration = Duration::from_millis(25);
const LOAD_ADDRESS: u64 = 0x10_0000;

/// Sends every byte of input straight back, by polling; never loses one that the machine gives it.
const ECHO: [u8; 17] = [
    0x66, 0xba, 0xfd, 0x03, // 0: mov dx, 0x3fd
    0xec, // 4: in al, dx
    0xa8, 0x01, // 5: test al, 1
    0x74, 0xf7, // 7: jz 0
    0xb2, 0xf8, // 9: mov dl, 0xf8
    0xec, // 11: in al, dx
    0xee, // 12: out dx, al
    0xeb, 0xf1, // 13: jmp 0
    0xeb, 0xfe, // 15: jmp 15
];

/// Says 0, 1, ... 255, 0, ... without end, a byte with each instruction.
const FLOOD: [u8; 11] = [
    0x66, 0xba, 0xf8, 0x03, // 0: mov dx, 0x3f8
    0x30, 0xc0, // 4: xor al, al
    0xee, // 6: out dx, al
    0xfe, 0xc0, // 7: inc al
    0xeb, 0xfb, // 9: jmp 6
];

fn program(name: &str, code: &[u8]) -> GuestSpec {
    let image = BootFile { path: PathBuf::from(name), bytes: code.into() };
    GuestSpec::new(name, 4 << 20, BootSource::Flat { image, address: LOAD_ADDRESS })
}

/// Cuts, carries the guest on in a new VM and offers what it was not given yet.
fn replace(rig: &mut Rig) {
    let taken = rig.cut().unwrap();
    assert_eq!(taken.cut.state.console_input, rig.guest().console_input_offset());
    rig.replace(&taken.cut.state).unwrap();
    assert_eq!(taken.cut.state.console_input, rig.guest().console_input_offset());
}

/// Each line is typed while the guest runs; then it is cut and goes on elsewhere, before it can have answered or
/// just as it does.
#[test]
fn linux_echoes_input_across_replacements() {
    if !kvm_usable() {
        return;
    }
    let images = Images::find().unwrap();
    let line = "pages=32 touch=4 lines=0 delay_us=20000 sleep=1 echo=1";
    let mut rig = Rig::boot(images.linux(Kernel::Up, 1, line).unwrap()).unwrap();
    rig.run_until("colo 00000002 ", 0, PATIENCE).unwrap();
    let (mut offset, mut from) = (0, rig.console().len());
    for round in 0..6 {
        let text = format!("round {round} {}\n", "x".repeat(10 * round));
        // In two pieces, and the guest may be anywhere in between.
        let (first, second) = text.as_bytes().split_at(text.len() / 2);
        for piece in [first, second] {
            rig.resume().unwrap();
            assert_eq!(rig.guest().console_input_offset(), offset);
            assert_eq!(rig.guest().console_input(piece), piece.len());
            offset += piece.len() as u64;
            rig.run(Duration::from_millis(7 * round as u64)).unwrap();
            replace(&mut rig);
        }
        // The terminal sends a line feed as two bytes.
        rig.run_until(&format!("echo {}\r\n", text.trim_end_matches('\n')), from, PATIENCE).unwrap();
        from = rig.console().len();
    }
    assert_eq!(rig.guest().console_input_offset(), offset);
    let mut checker = Checker::from_start(1);
    checker.feed(rig.console());
    checker.verdict().unwrap_or_else(|fault| panic!("{fault}; console ends:\n{}", rig.tail()));
    assert_eq!(checker.counts().echoes, 6);
}

/// By interrupts, in a guest that sleeps between them. It keeps 4096 bytes at most, so no more are on the way.
#[test]
fn a_sleeping_guest_is_woken_by_input() {
    if !kvm_usable() {
        return;
    }
    let images = Images::find().unwrap();
    let mut rig = Rig::boot(images.bare("lifecycle.elf", 1, 16 << 20, "echo=1 irq=1").unwrap()).unwrap();
    rig.run_until("echo ready\n", 0, PATIENCE).unwrap();
    let mut expected = String::from_utf8_lossy(rig.console()).into_owned();
    for round in 0..8 {
        let lines: Vec<_> = (0..10).map(|n| format!("line {round}.{n} {}", "-".repeat(n * n))).collect();
        let typed = lines.join("\n") + "\n";
        rig.resume().unwrap();
        assert_eq!(rig.guest().console_input(typed.as_bytes()), typed.len());
        rig.run(Duration::from_millis(round)).unwrap();
        replace(&mut rig);
        lines.iter().for_each(|line| expected += &format!("echo {line}\n"));
        rig.run_until(lines.last().unwrap(), 0, PATIENCE).unwrap();
    }
    rig.resume().unwrap();
    assert_eq!(rig.guest().console_input(b"quit\n"), 5);
    rig.run_until("echo done\n", 0, PATIENCE).unwrap();
    assert_eq!(String::from_utf8_lossy(rig.console()), expected + "echo done\n");
}

/// Twice what is held at once, offered in pieces of any size as the guest makes room, with replacements on
/// the way; the offset always tells how much was taken.
#[test]
fn input_beyond_the_limit_waits_and_nothing_is_lost() {
    if !kvm_usable() {
        return;
    }
    let mut seed = Seed::from_env(7);
    let input: Vec<u8> = (0..MAX_CONSOLE_INPUT + (24 << 10)).map(|_| seed.next_u64() as u8).collect();
    let mut rig = Rig::boot(program("echo", &ECHO)).unwrap();
    // Nobody reads yet: the limit holds, and the rest is refused. The 16550's own 64 bytes come on top.
    let mut taken = rig.guest().console_input(&input);
    assert_eq!(taken, MAX_CONSOLE_INPUT);
    taken += rig.guest().console_input(&input[taken..]);
    assert!(taken <= MAX_CONSOLE_INPUT + 64, "{taken} bytes");
    assert_eq!(rig.guest().console_input(&input[taken..]), 0);
    let (started, mut replaced) = (Instant::now(), 0);
    while rig.console().len() < input.len() {
        assert!(started.elapsed() < PATIENCE, "{} bytes after {PATIENCE:?}", rig.console().len());
        assert_eq!(rig.run(EPOCH).unwrap(), None);
        let most = taken + (seed.below(4096) as usize).min(input.len() - taken);
        taken += rig.guest().console_input(&input[taken..most]);
        assert_eq!(rig.guest().console_input_offset(), taken as u64);
        if rig.console().len() >= (replaced + 1) * input.len() / 6 {
            replace(&mut rig);
            replaced += 1;
        } else {
            rig.cut().unwrap();
        }
    }
    let wrong = rig.console().iter().zip(&input).position(|(a, b)| a != b);
    assert_eq!((wrong, rig.console().len(), replaced), (None, input.len(), 5));
}

/// What the console had taken in when the guest was reset is there for its next life, in order.
#[test]
fn input_that_was_not_read_outlives_a_reset() {
    if !kvm_usable() {
        return;
    }
    let input: Vec<u8> = (0..150).collect();
    let mut rig = Rig::boot(program("echo", &ECHO)).unwrap();
    assert_eq!(rig.guest().console_input(&input), input.len());
    rig.guest().reset().unwrap();
    assert_eq!(rig.guest().console_input_offset(), input.len() as u64);
    let started = Instant::now();
    while rig.console().len() < input.len() && started.elapsed() < PATIENCE / 10 {
        assert_eq!(rig.run(EPOCH).unwrap(), None);
        rig.cut().unwrap();
    }
    assert_eq!(rig.console(), input);
}

/// Checks that `console` goes on counting where `next` is due, and moves that on.
fn check_count(console: &[u8], next: &mut u8, what: &str) {
    for (at, &byte) in console.iter().enumerate() {
        assert_eq!(byte, *next, "{what}: byte {at}");
        *next = next.wrapping_add(1);
    }
}

/// The vCPU that fills an epoch waits for the cut; the next guest goes on with the very next byte, and so does
/// one whose output is taken without a cut.
#[test]
fn a_flood_of_output_waits_for_the_cut() {
    if !kvm_usable() {
        return;
    }
    let spec = program("flood", &FLOOD);
    let mut guest = KvmGuest::new(spec.clone()).unwrap();
    guest.boot().unwrap();
    guest.resume().unwrap();
    assert_eq!(guest.next_event(PATIENCE), Some(GuestEvent::OutputFull));
    // It is not told twice, and nothing more is made, however long the cut takes to come.
    assert_eq!(guest.next_event(Duration::from_millis(300)), None);
    let (mut due, mut total) = (0, 0);
    let mut dirty = DirtySet::new(guest.memory().layout().frame_limit());
    let cut = guest.cut(&mut dirty).unwrap();
    assert_eq!(cut.tracked, Tracked::Complete);
    let full = cut.output.console();
    assert!((MAX_EPOCH_CONSOLE..=MAX_EPOCH_CONSOLE + 1).contains(&full.len()), "{} bytes", full.len());
    check_count(&full, &mut due, "the full epoch");
    total += full.len() as u64;

    // In place, then in a new VM.
    let mut last = cut.state;
    for round in 0..4 {
        if round == 2 {
            let memory = std::sync::Arc::clone(guest.memory());
            drop(guest);
            guest =
                KvmGuest::with_memory(spec.clone(), memory, colo_vmm::tracker::Cadence::default()).unwrap();
            guest.restore(&last).unwrap();
        }
        guest.resume().unwrap();
        assert_eq!(guest.next_event(EPOCH), None);
        let drained = guest.drain_output();
        assert_eq!(drained.start.console, total, "round {round}");
        assert_eq!(guest.next_event(EPOCH), None);
        let cut = guest.cut(&mut dirty).unwrap();
        let console = [drained.console(), cut.output.console()].concat();
        assert!(!console.is_empty(), "round {round}: it does not go on");
        check_count(&console, &mut due, &format!("round {round}"));
        total += console.len() as u64;
        assert_eq!(cut.state.output.console, total);
        last = cut.state;
    }
}
