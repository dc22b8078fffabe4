//! The guest's virtio devices, driven by Linux: its drivers find them, and what they do is right and in the dirty set.

use colo_tests::images::{Images, Kernel, kvm_usable};
use colo_tests::session::Session;
use colo_vmm::disk::FileDisk;
use colo_vmm::spec::{DiskSpec, VirtioSpec};
use colo_vmm::{Backends, Disk, GuestSpec};
use std::sync::Arc;

const MIB: u64 = 1 << 20;

/// A guest with a disk of `mib` and everything that needs nothing of the host.
fn with_disk(spec: GuestSpec, mib: u64) -> GuestSpec {
    let disk = DiskSpec { bytes: mib * MIB, read_only: false, serial: "colo-0042".to_owned() };
    let virtio = VirtioSpec { disk: Some(disk), rng: true, on_command_line: true, ..VirtioSpec::default() };
    GuestSpec { virtio, ..spec }
}

#[test]
fn linux_finds_its_disk_and_its_randomness() {
    if !kvm_usable() {
        return;
    }
    let images = Images::find().unwrap();
    let place = tempfile::tempdir().unwrap();
    let disk = Arc::new(FileDisk::open_sized(&place.path().join("disk.img"), 64 * MIB, true).unwrap());
    // This kernel has no sysfs.
    let script = "cat /proc/partitions; dd if=/dev/hwrng bs=64 count=1 2>/dev/null | wc -c; \
                  dd if=/dev/urandom of=/tmp/a bs=64k count=8 2>/dev/null; dd if=/tmp/a of=/dev/vda bs=64k seek=3 conv=fsync; \
                  echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/vda of=/tmp/b bs=64k skip=3 count=8; cmp /tmp/a /tmp/b && echo same; \
                  md5sum /tmp/a";
    let spec = with_disk(images.busybox(Kernel::Up, 1, &format!("sh -c \"{script}\"")).unwrap(), 64);
    let backends = Backends { disk: Some(disk.clone()), ..Backends::default() };
    let mut session = Session::start_on(spec, &backends).unwrap();
    let said = session.until("/tmp/a\r\n").unwrap();
    println!("{said}");
    let lines: Vec<Vec<&str>> = said.lines().map(|line| line.split_whitespace().collect()).collect();
    let has = |words: &[&str]| lines.iter().any(|line| line.ends_with(words));
    assert!(has(&["65536", "vda"]), "a disk of 64 MiB: {said}");
    assert!(has(&["64"]), "bytes of randomness: {said}");
    assert!(said.contains("same"), "{said}");
    let mut bytes = vec![0; 8 << 16];
    disk.read(3 << 16, &mut bytes).unwrap();
    assert!(bytes.iter().any(|&byte| byte != 0));
}
