//! Bad input: what `colo-primary` is given or finds on the host and cannot use ends it with a status other than
//! zero and one clear line that names the thing and the remedy, before any guest runs.

use colo_tests::images::{Images, Kernel, kvm_usable};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

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

/// The one line that a refused run leaves on standard error.
#[track_caller]
fn refused(output: &Output, parts: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "it was not refused: {stderr}");
    assert!(output.status.code().is_some(), "it died of a signal: {stderr}");
    let lines: Vec<&str> = stderr.lines().filter(|line| line.contains("ERROR")).collect();
    assert_eq!(lines.len(), 1, "not one line: {stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    for part in parts {
        assert!(lines[0].contains(part), "{part:?} is not in: {stderr}");
    }
}

fn run(args: &[&str]) -> Output {
    Command::new(colo_primary()).env("COLO_LOG", "error").arg("run").args(args).output().unwrap()
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
    let cut_short = scratch.file("cut-short", &kernel[..kernel.len() / 2]);
    refused(&run(&["--kernel", &cut_short]), &[&cut_short, "cut short"]);
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
fn memory_that_the_host_does_not_have() {
    if !kvm_usable() {
        return;
    }
    let images = Images::find().unwrap();
    let kernel = images.kernel(Kernel::Up).unwrap().to_str().unwrap();
    refused(&run(&["--kernel", kernel, "--memory", "1048576"]), &["host memory", "overcommit"]);
    let script = format!("ulimit -v 2000000; exec \"$0\" run --kernel {kernel} --memory 4096");
    let limited = Command::new("sh").args(["-c", &script]).arg(colo_primary()).output().unwrap();
    refused(&limited, &["address space"]);
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
        eprintln!("skipped: no memory cgroup can be made here");
        return;
    };
    let script = format!(
        "echo $$ >{}/cgroup.procs && exec \"$0\" run --kernel {kernel} --memory 1024",
        group.display()
    );
    let limited = Command::new("sh").args(["-c", &script]).arg(colo_primary()).output().unwrap();
    fs::remove_dir(&group).unwrap();
    refused(&limited, &[limit, &name]);
}

#[test]
fn a_host_without_kvm() {
    let script = "mount -t tmpfs none /dev && exec \"$0\" host";
    let output = Command::new("unshare").args(["-m", "sh", "-c", script]).arg(colo_primary()).output();

    let made = output.as_ref().is_ok_and(|o| !String::from_utf8_lossy(&o.stderr).contains("unshare:"));
    if !made {
        eprintln!("skipped: no mount namespace can be made here");
        return;
    }
    refused(&output.unwrap(), &["/dev/kvm does not exist", "load the kvm module"]);
}

#[test]
fn a_user_who_may_not() {
    if !kvm_usable() {
        return;
    }
    let scratch = Scratch::new("nobody");
    let program = scratch.0.join("colo-primary");
    fs::copy(colo_primary(), &program).unwrap();
    let allowed: fs::Permissions = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&scratch.0, allowed).unwrap();
    let nobody = ["--reuid=65534", "--regid=65534", "--clear-groups"];
    let output = Command::new("setpriv").args(nobody).arg(&program).arg("host").output();
    let open_to_all = fs::metadata("/dev/kvm")
        .is_ok_and(|m| std::os::unix::fs::PermissionsExt::mode(&m.permissions()) & 6 == 6);
    match output {
        Ok(output) if !open_to_all && !String::from_utf8_lossy(&output.stderr).contains("setpriv") => {
            refused(&output, &["no permission to open /dev/kvm", "run as root or join the group"]);
        }
        _ => eprintln!("skipped: no other user can be had here, or /dev/kvm is open to all"),
    }
}
