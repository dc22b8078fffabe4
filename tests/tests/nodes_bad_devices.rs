//! TAP interfaces and disk images that cannot be had, or are not what they were: a clear error with the remedy before any
//! guest runs, or a pairing that is refused with the reason in the runner's status; nothing is damaged, and once it is
//! put right the nodes are as good as before.

use anyhow::{Context, ensure};
use colo_proto::v1::Role;
use colo_tests::cluster::config::{Guest, Options};
use colo_tests::cluster::{Cluster, process, scenario};
use colo_tests::images::{Images, kvm_usable};
use colo_tests::lab::{self, Lab, tap_of};
use colo_vmm::disk::FileDisk;
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

/// What the guest does: writes to some pages, for ever.
const LINE: &str = "base=0x400000 pages=64 mode=user delay=100000";
/// Bytes of the guest's disk.
const DISK: u64 = 1 << 20;

/// A small guest with a card and a disk, on a network with these nodes; b's acks mean the disk, so that its copy outlives
/// its process.
fn in_lab(nodes: &[&str], play: impl FnOnce(&mut Cluster) -> anyhow::Result<()>) {
    if !kvm_usable() || !lab::usable() {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let disk = place.path().join("disk.img");
    sized(&disk, DISK).unwrap();
    let guest = Guest::bare(&Images::find().unwrap(), "dirty.elf", LINE).unwrap();
    let options = Options { disk: Some(disk), network: true, ack: "disk", ..Options::new(guest) };
    let _lab = Lab::enter(nodes).unwrap();
    scenario(options, play).unwrap();
}

/// Makes an image file, or changes its size.
fn sized(path: &Path, bytes: u64) -> anyhow::Result<()> {
    let file = File::options().write(true).create(true).truncate(false).open(path)?;
    Ok(file.set_len(bytes)?)
}

/// A configuration without one of its sections.
fn without(text: &str, section: &str) -> String {
    let Some((head, tail)) = text.split_once(&format!("[{section}]\n")) else {
        panic!("no {section} in {text}")
    };
    let rest = tail.find("\n[").map_or("", |at| &tail[at + 1..]);
    format!("{head}{rest}")
}

/// The same command as a process that may not touch interfaces, though its user is root.
fn without_net_admin(command: &Command) -> Command {
    let mut limited = Command::new("setpriv");
    limited.arg("--bounding-set=-net_admin").arg(command.get_program()).args(command.get_args());
    limited.envs(command.get_envs().filter_map(|(key, value)| Some((key, value?))));
    limited
}

#[test]
fn a_tap_that_may_not_be_had() {
    in_lab(&["a", "b"], |cluster| {
        for (node, primary) in [("a", true), ("b", false)] {
            // One that root has made for everybody can be had; one that has to be made cannot.
            let (path, command) = cluster.prepare(node, primary, None)?;
            fs::write(&path, fs::read_to_string(&path)?.replace(&tap_of(node), "tap-new"))?;
            let wanted = &["no permission for the interface tap-new", "CAP_NET_ADMIN", "ip tuntap add"];
            cluster.refuses(node, without_net_admin(&command), wanted)?;
        }
        ensure!(cluster.register()?.is_none(), "something was started");
        Ok(())
    });
}

#[test]
fn a_tap_in_use() {
    in_lab(&["a", "b", "c"], |cluster| {
        cluster.start_secondary("b")?;
        cluster.start_primary("a", Some("b"))?;
        cluster.until_paired("a")?;
        // The runner's, and the one that its follower holds ready. A node that was to follow leaves a store behind, so
        // it comes last.
        for (holder, primary) in [("a", true), ("b", true), ("a", false), ("b", false)] {
            let tap = tap_of(holder);
            let edit = |text: String| text.replace(&tap_of("c"), &tap);
            let wanted = &["in use by another process", &tap, "end the other one, or name another interface"];
            cluster.is_refused("c", primary, edit, wanted).with_context(|| format!("{tap}, {primary}"))?;
        }
        ensure!(cluster.status("a").is_some_and(|status| status.role() == Role::Paired), "a is not paired");
        Ok(())
    });
}

#[test]
fn an_image_that_cannot_be_a_new_guests_disk() {
    in_lab(&["a"], |cluster| {
        let image = cluster.image_of("a");
        let missing = |text| {
            fs::remove_file(&image).unwrap();
            text
        };
        cluster.is_refused(
            "a",
            true,
            missing,
            &["a.disk", "cannot open the disk image", "check the path"],
        )?;
        let cut_short = |text| {
            sized(&image, DISK - 1).unwrap();
            text
        };
        cluster.is_refused("a", true, cut_short, &["a.disk", "1048575 bytes", "truncate -s"])?;
        sized(&image, DISK)?;
        let held = FileDisk::open(&image, false)?;
        cluster.is_refused(
            "a",
            true,
            |text| text,
            &["a.disk", "locked by another process", "end the other one"],
        )?;
        drop(held);
        ensure!(cluster.register()?.is_none(), "something was started");
        cluster.start_primary("a", None)?;
        cluster.until_solo("a")
    });
}

/// A node that holds a copy whose disk, or whose configuration, is not what it was: it does not start, and its copy is
/// there when that is put right.
#[test]
fn an_image_that_is_not_the_copys() {
    in_lab(&["a", "b"], |cluster| {
        cluster.start_secondary("b")?;
        cluster.start_primary("a", Some("b"))?;
        cluster.until_paired("a")?;
        ["a", "b"].into_iter().try_for_each(|node| cluster.kill(node).map(drop))?;
        let (image, aside) = (cluster.image_of("b"), cluster.directory().join("aside"));
        fs::rename(&image, &aside)?;
        cluster.is_refused(
            "b",
            false,
            |text| text,
            &["b.disk", "cannot open the disk image", "check the path"],
        )?;
        ensure!(!image.exists(), "it was made anew, and the copy needs what it held");
        fs::rename(&aside, &image)?;
        let smaller = &["b.disk", "1044480 bytes", "1048576", "cut short", "Name the right file"];
        sized(&image, DISK - 4096)?;
        cluster.is_refused("b", false, |text| text, smaller)?;
        sized(&image, DISK - 1)?;
        cluster.is_refused("b", false, |text| text, &["b.disk", "1048575 bytes", "truncate -s"])?;
        sized(&image, DISK)?;
        let held = FileDisk::open(&image, false)?;
        cluster.is_refused(
            "b",
            false,
            |text| text,
            &["b.disk", "locked by another process", "end the other one"],
        )?;
        drop(held);
        let no_disk = |text: String| without(&text, "disk");
        cluster.is_refused("b", false, no_disk, &["has a disk of 1048576 bytes", "add [disk]"])?;
        let no_tap = |text: String| without(&text, "network");
        cluster.is_refused("b", false, no_tap, &["has a network card", "name one in [network]"])?;
        cluster.start_secondary("b")?;
        cluster.until_solo("b")
    });
}

/// Starts b as `edit` wants it; the runner's status, and coloctl, then say why it does not take the guest.
fn is_not_paired(
    cluster: &mut Cluster,
    edit: impl FnOnce(String) -> String,
    wanted: &[&str],
) -> anyhow::Result<()> {
    let (path, command) = cluster.prepare("b", false, None)?;
    fs::write(&path, edit(fs::read_to_string(&path)?))?;
    cluster.start("b", command, false)?;
    let error = cluster.until(&format!("a to say {wanted:?}"), || {
        let error = cluster.status("a").context("a does not answer")?.last_error;
        Ok(error.contains(wanted[0]).then_some(error))
    })?;
    ensure!(error.lines().count() == 1, "not one line: {error}");
    let said = coloctl_status(cluster, "a")?;
    for part in wanted {
        ensure!(error.contains(part), "it does not say {part:?}: {error}");
        ensure!(said.contains(part), "coloctl does not say {part:?}: {said}");
    }
    let role = cluster.status("a").context("a does not answer")?.role();
    ensure!(role == Role::Alone, "a is {role:?}");
    cluster.kill("b").map(drop)
}

fn coloctl_status(cluster: &Cluster, node: &str) -> anyhow::Result<String> {
    let mut command = Command::new(process::program("coloctl")?);
    let address = cluster.admin(node)?.address().to_string();
    let output = command.args(["--node", &address, "status"]).output()?;
    ensure!(output.status.success(), "coloctl: {}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}

#[test]
fn a_node_without_room_for_the_guests_devices() {
    in_lab(&["a", "b"], |cluster| {
        cluster.start_primary("a", Some("b"))?;
        cluster.until_solo("a")?;
        let image = cluster.image_of("b");
        let no_disk = |text: String| without(&text, "disk");
        is_not_paired(cluster, no_disk, &["has a disk of 1048576 bytes", "add [disk] with path"])?;
        let no_tap = |text: String| without(&text, "network");
        is_not_paired(cluster, no_tap, &["has a network card", "name one in [network]"])?;
        sized(&image, DISK * 2)?;
        let other = &["b.disk", "2097152 bytes", "the guest's disk has 1048576", "Name the right file"];
        is_not_paired(cluster, |text| text, other)?;
        fs::remove_file(&image)?;
        sized(&image, DISK)?;
        let held = FileDisk::open(&image, false)?;
        is_not_paired(cluster, |text| text, &["locked by another process", "b.disk", "end the other one"])?;
        drop(held);
        cluster.start_secondary("b")?;
        cluster.until_paired("a")
    });
}
