//! Bad input: what `colo-primary` is given or finds on the host and cannot use ends it with a status other than
//! zero and one clear line that names the thing and the remedy, before any guest runs.

use colo_tests::images::{Images, Kernel, kvm_usable};
use colo_tests::session::PATIENCE;
use colo_vmm::host::HostError;
use colo_vmm::{BootFile, BootSource, GuestSpec};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Beside the test programs: the workspace is built before its tests run.
fn colo_primary() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let program = test.parent().and_then(Path::parent).unwrap().join("colo-primary");
    assert!(program.exists(), "{} is not there: build the workspace first", program.display());
    program
}

/// A folder of this test's own, removed when dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("colo-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        // Other users may read it too.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        Self(path)
    }

    fn file(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.0.join(name);
        fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

/// Runs to its end what must end by itself.
fn finish(command: &mut Command) -> Output {
    // Colours and backtraces are the environment's; nothing here may wait for a guest that runs after all.
    command
        .env("NO_COLOR", "1")
        .env("RUST_BACKTRACE", "0")
        .env_remove("COLO_LOG")
        .env_remove("RUST_LOG")
        .stdin(Stdio::null());
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
fn refused(output: &Output, parts: &[&str]) {
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

fn run(args: &[&str]) -> Output {
    finish(Command::new(colo_primary()).arg("run").args(args))
}

/// Runs a shell script whose `$0` is the program.
fn script(text: &str) -> Output {
    finish(Command::new("sh").args(["-c", text]).arg(colo_primary()))
}

#[test]
fn kernels_that_are_none() {
    if !kvm_usable() {
        return;
    }
    let images = Images::find().unwrap();
    let scratch = Scratch::new("kernels");
    let kernel = fs::read(images.kernel(Kernel::Up).unwrap()).unwrap();
    let empty = scratch.file("empty", b"");
    let text = scratch.file("text", b"#!/bin/sh\necho hello\n");
    let noise: Vec<u8> = (0..100_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let noise = scratch.file("noise", &noise);
    for path in [&empty, &text, &noise] {
        refused(&run(&["--kernel", path]), &[path, "is not a kernel"]);
    }
    let mut arm = kernel;
    arm[18] = 0xb7;
    let arm = scratch.file("arm", &arm);
    refused(&run(&["--kernel", &arm]), &[&arm]);
    let missing = scratch.0.join("nothing").to_str().unwrap().to_owned();
    refused(&run(&["--kernel", &missing]), &["cannot read kernel", &missing, "check the path"]);
    refused(&run(&["--kernel", scratch.0.to_str().unwrap()]), &["cannot read kernel", "check the path"]);
}

#[test]
fn images_that_do_not_fit() {
    if !kvm_usable() {
        return;
    }
    let images = Images::find().unwrap();
    let scratch = Scratch::new("fit");
    let kernel = images.kernel(Kernel::Up).unwrap().to_str().unwrap();
    let large = scratch.file("initramfs", &vec![0; 60 << 20]);
    let output = run(&["--kernel", kernel, "--initrd", &large, "--memory", "64"]);
    refused(&output, &["initramfs", "memory"]);
    refused(&run(&["--kernel", kernel, "--memory", "4"]), &["memory"]);
    let flat = images.payload("flat.bin").unwrap();
    let output = run(&["--kernel", flat.to_str().unwrap(), "--flat", "0xc0000000"]);
    refused(&output, &["flat.bin"]);
    let long = "x".repeat(5000);
    refused(&run(&["--kernel", kernel, "--cmdline", &long]), &["command line", "5000"]);
}

#[test]
fn numbers_out_of_their_range() {
    if !kvm_usable() {
        return;
    }
    let images = Images::find().unwrap();
    let kernel = images.kernel(Kernel::Up).unwrap().to_str().unwrap();
    let with = |more: &[&str]| run(&[&["--kernel", kernel], more].concat());
    refused(&with(&["--memory", "0"]), &["memory", "choose another size"]);
    refused(&with(&["--memory", "1048577"]), &["memory", "choose another size"]);
    refused(&with(&["--memory", "18446744073709551615"]), &["--memory is too large"]);
    refused(&with(&["--cpus", "0"]), &["0 vCPUs", "1 to 64"]);
    refused(&with(&["--cpus", "65"]), &["65 vCPUs", "1 to 64"]);
    refused(&with(&["--ring-entries", "1000"]), &["1000 entries", "power of two"]);
    refused(&with(&["--ring-entries", "131072"]), &["131072 entries", "power of two"]);
    let output = with(&["--cpu-model", "wrong"]);
    assert_eq!(output.status.code(), Some(2), "clap refuses what is no model");
}

#[test]
fn kernels_cut_short_are_refused_before_they_run() {
    if !kvm_usable() {
        return;
    }
    let images = Images::find().unwrap();
    let scratch = Scratch::new("cut-short");
    let check = |bytes: &[u8], part: &str| {
        let path = scratch.file("kernel", bytes);
        refused(&run(&["--kernel", &path]), &[&path, part]);
    };
    let bzimage = fs::read(images.kernel(Kernel::BzImage).unwrap()).unwrap();
    for len in [1000, 20_000, bzimage.len() / 2, bzimage.len() - 16] {
        check(&bzimage[..len], "the file was cut short");
    }
    check(&bzimage[..0x205], "is not a kernel that can be booted");
    let vmlinux = fs::read(images.kernel(Kernel::Up).unwrap()).unwrap();
    for len in [100, 10_000, vmlinux.len() / 2] {
        check(&vmlinux[..len], "the file was cut short");
    }
}

#[test]
fn a_32_bit_elf_needs_a_multiboot_header() {
    if !kvm_usable() {
        return;
    }
    let images = Images::find().unwrap();
    let scratch = Scratch::new("elf");
    let mut elf = fs::read(images.payload("lifecycle.elf").unwrap()).unwrap();
    let magic = 0x1bad_b002_u32.to_le_bytes();
    while let Some(at) = elf.windows(4).position(|word| word == magic) {
        elf[at] = 0;
    }
    let path = scratch.file("kernel", &elf);
    refused(&run(&["--kernel", &path]), &[&path, "is not a kernel that can be booted", "multiboot"]);
}

/// A number that is none is clap's to refuse, with its own words and status.
#[test]
fn memory_in_broken_mebibytes_is_refused() {
    for value in ["1.5", "-1", "", "64M", "99999999999999999999"] {
        let value = format!("--memory={value}");
        let output = run(&["--kernel", "/dev/null", &value]);
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
    let image = BootFile { path: "hlt".into(), bytes: [0xf4].into() };
    GuestSpec::new("flat", 16 << 20, BootSource::Flat { image, address: 0x10_0000 })
}

#[test]
fn memory_that_the_host_does_not_have() {
    if !kvm_usable() {
        return;
    }
    let images = Images::find().unwrap();
    let kernel = images.kernel(Kernel::Up).unwrap().to_str().unwrap();
    refused(&run(&["--kernel", kernel, "--memory", "1048576"]), &["host memory", "overcommit"]);
    let limited = |limit: &str| {
        script(&format!("ulimit {limit}; exec \"$0\" run --kernel {kernel} --memory 4096 --overcommit"))
    };
    refused(&limited("-v 2000000"), &["address space", "lower the guest's memory or raise that limit"]);
    refused(&limited("-f 1000000"), &["4294967296 bytes", "File too large", "ulimit -f"]);
}

#[test]
fn a_cgroup_that_is_too_small() {
    if !kvm_usable() {
        return;
    }
    let images = Images::find().unwrap();
    let kernel = images.kernel(Kernel::Up).unwrap().to_str().unwrap();
    let name = format!("colo-test-{}", std::process::id());
    let v1 = Path::new("/sys/fs/cgroup/memory").join(&name);
    let v2 = Path::new("/sys/fs/cgroup").join(&name);
    let made = [(v1, "memory.limit_in_bytes"), (v2, "memory.max")].into_iter().find(|(group, limit)| {
        fs::create_dir(group).is_ok() && fs::write(group.join(limit), "300000000").is_ok() || {
            drop(fs::remove_dir(group));
            false
        }
    });
    let Some((group, limit)) = made else {
        println!("skipped: no memory cgroup can be made here");
        return;
    };
    let in_group = format!(
        "echo $$ >{}/cgroup.procs && exec \"$0\" run --kernel {kernel} --memory 1024",
        group.display()
    );
    let limited = script(&in_group);
    fs::remove_dir(&group).unwrap();
    refused(&limited, &[limit, &name]);
}

#[test]
fn a_host_without_kvm() {
    let output = script("unshare -m sh -c 'mount -t tmpfs none /dev && exec \"$0\" host' \"$0\"");
    if let Some(why) = failed_tool(&output) {
        println!("skipped: no mount namespace can be made here: {why}");
        return;
    }
    refused(&output, &["/dev/kvm does not exist", "load the kvm module"]);
}

#[test]
fn an_answer_that_cannot_be_written_is_an_error() {
    if !kvm_usable() {
        return;
    }
    let output = script("exec \"$0\" host >/dev/full");
    refused(&output, &["cannot write the answer to standard output", "No space left"]);
}

#[test]
fn a_process_that_may_open_too_few_files_says_so() {
    if !kvm_usable() {
        return;
    }
    let flat = Images::find().unwrap().payload("flat.bin").unwrap();
    let run = format!("exec \"$0\" run --flat 0x100000 --kernel {}", flat.display());
    for limit in 4..7 {
        let output = script(&format!("ulimit -n {limit}; {run}"));
        refused(&output, &["Too many open files", "raise the limit on open files (ulimit -n)"]);
    }
}

/// Without a timer a vCPU would harvest its ring too late, so there is no guest without one.
#[test]
fn a_process_that_may_have_no_timer_says_so() {
    if !kvm_usable() {
        return;
    }
    let flat = Images::find().unwrap().payload("flat.bin").unwrap();
    let run = format!("run --flat 0x100000 --kernel {}", flat.display());
    let output = script(&format!("exec prlimit --sigpending=0 \"$0\" {run}"));
    refused(&output, &["vCPU 0", "raise the limit on pending signals (ulimit -i)"]);
}

/// Whatever a test guest ends itself with, it does not pass for an end of Colo's own.
#[test]
fn a_guest_that_ends_itself_has_a_status_of_its_own() {
    if !kvm_usable() {
        return;
    }
    let scratch = Scratch::new("debug-exit");
    for (value, status) in [(0, 0), (1, 3), (86, 3), (101, 3), (255, 3)] {
        // mov eax, value; out 0xf4, eax; jmp to itself
        let program = scratch.file("ends", &[0xb8, value, 0, 0, 0, 0xe7, 0xf4, 0xeb, 0xfe]);
        let output = run(&["--kernel", &program, "--flat", "0x100000", "--memory", "4"]);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(status), "{value}: {stderr}");
        assert!(stderr.contains(&format!("value={value}")), "{stderr}");
    }
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
    let scratch = Scratch::new("nobody");
    let copy = scratch.0.join("colo-primary");
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", script]).arg(colo_primary()).arg(&copy);
    let output = finish(&mut command);
    if let Some(why) = failed_tool(&output) {
        println!("skipped: no other user, or no mount namespace, can be had here: {why}");
        return;
    }
    refused(&output, &["no permission to open /dev/kvm", "run as root or join the group"]);
}

/// What a tool that a test needs has said against it.
fn failed_tool(output: &Output) -> Option<String> {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    ["unshare:", "mount:", "mknod:", "setpriv:"].iter().any(|tool| stderr.contains(tool)).then_some(stderr)
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
