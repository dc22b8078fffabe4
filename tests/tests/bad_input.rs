//! Input that nobody should give. Files that are no kernel, and a host that withholds something, end the process
//! with one line that names thing and remedy (`refusals.rs` has the rest of these); saved states that were damaged,
//! cut short or made up end in a [`StateError`], whatever is in them, and do no harm to the guest they were
//! offered to.

use colo_tests::images::{Images, Kernel, kvm_usable};
use colo_tests::rig::contains;
use colo_tests::seed::Seed;
use colo_tests::session::PATIENCE;
use colo_vmm::host::HostError;
use colo_vmm::state::StateError;
use colo_vmm::tracker::Cadence;
use colo_vmm::{DirtySet, GuestError, GuestMemory, GuestSpec, KvmGuest, MachineState, ProtectedGuest};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use xxhash_rust::xxh3::Xxh3;

/// Bytes before the body of an encoded state, and where its version and its checksum are (see `state.rs`).
const HEADER: usize = 24;
const VERSION: usize = 8;
const CHECKSUM: usize = 16;

fn colo_primary() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let program = test.parent().and_then(Path::parent).unwrap().join("colo-primary");
    assert!(program.exists(), "{} is not there: build the workspace first", program.display());
    program
}

/// Runs to its end what must end by itself.
fn finish(command: &mut Command) -> Output {
    // Colours and backtraces are the environment's; nothing here may wait for a guest that runs after all.
    command.env("NO_COLOR", "1").env("RUST_BACKTRACE", "0").env_remove("COLO_LOG").stdin(Stdio::null());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let started = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > PATIENCE {
            child.kill().unwrap();
            panic!("it does not end: {:?}", child.wait_with_output());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().unwrap()
}

/// Nothing but one line on standard error, with all of `parts` in it and nothing said twice.
#[track_caller]
fn check_refused(output: &Output, parts: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "not one line: {stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    for part in parts {
        assert!(stderr.contains(part), "no {part:?} in: {stderr}");
    }
    assert!(stderr.matches("os error").count() <= 1, "a cause is repeated: {stderr}");
    assert!(output.stdout.is_empty(), "something ran: {}", String::from_utf8_lossy(&output.stdout));
}

#[track_caller]
fn check_kernel(bytes: &[u8], parts: &[&str]) {
    let path = std::env::temp_dir().join(format!("colo-bad-kernel-{}", std::process::id()));
    fs::write(&path, bytes).unwrap();
    let output = finish(Command::new(colo_primary()).arg("run").arg("--kernel").arg(&path));
    fs::remove_file(&path).unwrap();
    check_refused(&output, &[&[path.to_str().unwrap()], parts].concat());
}

#[test]
fn kernels_cut_short_are_refused_before_they_run() {
    if !kvm_usable() {
        return;
    }
    let images = Images::find().unwrap();
    let bzimage = fs::read(images.kernel(Kernel::BzImage).unwrap()).unwrap();
    for len in [1000, 20_000, bzimage.len() / 2, bzimage.len() - 16] {
        check_kernel(&bzimage[..len], &["the file was cut short"]);
    }
    check_kernel(&bzimage[..0x205], &["is not a kernel that can be booted"]);
    let vmlinux = fs::read(images.kernel(Kernel::Up).unwrap()).unwrap();
    for len in [100, 10_000, vmlinux.len() / 2] {
        check_kernel(&vmlinux[..len], &["the file was cut short"]);
    }
}

#[test]
fn a_32_bit_elf_needs_a_multiboot_header() {
    if !kvm_usable() {
        return;
    }
    let images = Images::find().unwrap();
    let mut elf = fs::read(images.payload("lifecycle.elf").unwrap()).unwrap();
    let magic = 0x1bad_b002_u32.to_le_bytes();
    while let Some(at) = elf.windows(4).position(|word| word == magic) {
        elf[at] = 0;
    }
    check_kernel(&elf, &["is not a kernel that can be booted", "multiboot"]);
}

#[test]
fn a_cause_is_named_once() {
    if !kvm_usable() {
        return;
    }
    let output = finish(Command::new(colo_primary()).args(["run", "--kernel", "/nonexistent/vmlinux"]));
    check_refused(&output, &["cannot read kernel /nonexistent/vmlinux: No such file", "check the path"]);
}

/// A number that is none is clap's to refuse, with its own words and status.
#[test]
fn memory_in_broken_mebibytes_is_refused() {
    for value in ["1.5", "-1", "", "64M", "99999999999999999999"] {
        let value = format!("--memory={value}");
        let output = finish(Command::new(colo_primary()).args(["run", "--kernel", "/dev/null", &value]));
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(stderr.starts_with("error: ") && stderr.contains("'--memory <MEMORY>'"), "{stderr}");
    }
    let spec = |bytes| GuestSpec { memory_bytes: bytes, ..flat() };
    for bytes in [(16 << 20) + 1, 4095, (1 << 40) + 4096] {
        let error = spec(bytes).validate().unwrap_err().to_string();
        assert!(error.contains(&bytes.to_string()) && error.contains("choose another size"), "{error}");
    }
}

fn flat() -> GuestSpec {
    let image = colo_vmm::BootFile { path: PathBuf::from("hlt"), bytes: [0xf4].into() };
    GuestSpec::new("flat", 16 << 20, colo_vmm::BootSource::Flat { image, address: 0x10_0000 })
}

#[test]
fn an_answer_that_cannot_be_written_is_an_error() {
    if !kvm_usable() {
        return;
    }
    let script = "exec \"$0\" host >/dev/full";
    let output = finish(Command::new("sh").args(["-c", script]).arg(colo_primary()));
    check_refused(&output, &["cannot write the answer to standard output", "No space left"]);
}

#[test]
fn a_process_that_may_open_too_few_files_says_so() {
    if !kvm_usable() {
        return;
    }
    let script = "ulimit -n 5; exec \"$0\" run --flat 0x100000 --kernel \"$1\"";
    let flat = Images::find().unwrap().payload("flat.bin").unwrap();
    let output = finish(Command::new("sh").args(["-c", script]).arg(colo_primary()).arg(flat));
    check_refused(&output, &["Too many open files"]);
}

/// In a /dev of its own, whose kvm belongs to root alone, and as a user who is nobody. Copied to where anybody
/// may read it.
#[test]
fn a_user_without_permission_is_told_the_group() {
    if !kvm_usable() {
        return;
    }
    let script = "cp \"$0\" \"$1\" && mount -t tmpfs none /dev && mknod -m 600 /dev/kvm c 10 232 && \
                  exec setpriv --reuid 65534 --regid 65534 --clear-groups \"$1\" host";
    let copy = std::env::temp_dir().join(format!("colo-primary-{}", std::process::id()));
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", script]).arg(colo_primary()).arg(&copy);
    let output = finish(&mut command);
    drop(fs::remove_file(&copy));
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    if ["unshare:", "mount:", "mknod:", "setpriv:"].iter().any(|tool| stderr.contains(tool)) {
        println!("skipped: no other user, or no mount namespace, can be had here: {stderr}");
        return;
    }
    check_refused(&output, &["no permission to open /dev/kvm", "join the group"]);
}

/// Its check is tested beside it, with every capability; here is what an operator reads.
#[test]
fn a_missing_capability_is_named_with_its_purpose_and_remedy() {
    let error = HostError::Missing { capability: "KVM_CAP_X", purpose: "to save a guest" };
    assert_eq!(
        error.to_string(),
        "this host's KVM lacks KVM_CAP_X, which Colo needs to save a guest: use a newer kernel or another host"
    );
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
