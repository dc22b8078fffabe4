//! The copy is compared with the guest while both go on: nothing is found where nothing is wrong, whatever the guest
//! does; a page or block that was changed behind the secondary's back is, it alone, and made right again.

use anyhow::{Context, ensure};
use colo_common::{BLOCK_SIZE, PAGE_SIZE};
use colo_proto::v1::{AuditKind, EpochReport, Role, VerifiedPart, VerifyProgress, VerifyReplicaRequest};
use colo_tests::cluster::Cluster;
use colo_tests::cluster::config::{Guest, Options};
use colo_tests::cluster::scenario;
use colo_tests::images::{Images, Kernel, kvm_usable};
use colo_tests::seed::Seed;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::service::{boot, images, in_lab};
use super::{check_goes_on, pair, synthetic};

/// What guest memory is called among a process' files.
const MEMORY: &str = "/memfd:colo-guest (deleted)";
/// A page that is not written for so long is at rest.
const REST: Duration = Duration::from_millis(700);
/// Epochs of one look at the pauses, and how many looks with and without a comparison.
const EPOCHS: usize = 120;
const LOOKS: usize = 3;

/// All there is, at this many MiB a second.
fn all(rate_mib: u32) -> VerifyReplicaRequest {
    VerifyReplicaRequest { memory: false, disk: false, rate_mib }
}

fn verify(cluster: &Cluster, rate_mib: u32) -> anyhow::Result<VerifyProgress> {
    cluster.admin("a")?.verify(all(rate_mib))
}

/// The copy of the vm that `runner` runs is the same as the guest, memory and disk.
pub(super) fn check_same(cluster: &Cluster, runner: &str) -> anyhow::Result<()> {
    let found = cluster.admin(runner)?.verify(all(0))?;
    let parts: Vec<&VerifiedPart> = found.memory.iter().chain(&found.disk).collect();
    ensure!(!parts.is_empty(), "nothing was compared");
    let differs = parts.iter().find(|part| part.differing > 0 || part.compared == 0);
    ensure!(differs.is_none(), "the copy of {runner}'s guest: {differs:?}");
    Ok(())
}

fn memory(found: &VerifyProgress) -> anyhow::Result<&VerifiedPart> {
    found.memory.as_ref().context("no memory was compared")
}

/// Nothing differs, and everything is accounted for.
fn is_equal(part: &VerifiedPart) -> anyhow::Result<()> {
    let VerifiedPart { total, looked_at, compared, with_bytes, not_compared, differing, .. } = *part;
    ensure!((differing, looked_at, compared + not_compared) == (0, total, total), "{part:?}");
    ensure!(not_compared < total / 4, "{part:?}");
    tell(&format!("compared {compared} of {total}, {with_bytes} with bytes; not compared {not_compared}"));
    Ok(())
}

#[expect(clippy::print_stderr, reason = "figures")]
fn tell(what: &str) {
    eprintln!("{what}");
}

/// The guest memory of a node's process, by its own descriptor: whoever writes there is seen by nobody.
fn memory_of(cluster: &mut Cluster, node: &str) -> anyhow::Result<File> {
    let descriptors = format!("/proc/{}/fd", cluster.process(node)?.id());
    for entry in std::fs::read_dir(&descriptors)? {
        let path = entry?.path();
        if std::fs::read_link(&path).is_ok_and(|target| target.as_os_str() == MEMORY) {
            return Ok(OpenOptions::new().read(true).write(true).open(path)?);
        }
    }
    anyhow::bail!("{node} has no guest memory in {descriptors}")
}

fn read_all(file: &File) -> anyhow::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(file.metadata()?.len())?];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// Pages that are changed until one of them stays so: what is at rest may be written at any time.
const TRIES: u32 = 5;

/// Pieces of a page's or block's size that are not written, and hold something or are `empty`.
fn at_rest(file: &File, empty: bool) -> anyhow::Result<Vec<u64>> {
    let before = read_all(file)?;
    std::thread::sleep(REST);
    let after = read_all(file)?;
    let pieces = before.as_chunks::<PAGE_SIZE>().0.iter().zip(after.as_chunks::<PAGE_SIZE>().0);
    let still = pieces.enumerate().filter(|(_, (a, b))| a == b && a.iter().all(|&byte| byte == 0) == empty);
    Ok(still.map(|(at, _)| at as u64).collect())
}

/// One bit of a piece is another. Answers what the byte is now.
fn flip(file: &File, piece: u64, byte: u64) -> anyhow::Result<u8> {
    let (mut held, at) = ([0], piece * PAGE_SIZE as u64 + byte % PAGE_SIZE as u64);
    file.read_exact_at(&mut held, at)?;
    let flipped = held[0] ^ 0x10;
    file.write_all_at(&[flipped], at)?;
    Ok(flipped)
}

/// The runner gives the copy up and makes it whole again by digests; then it is the same.
fn until_made_whole(cluster: &Cluster, term: u64) -> anyhow::Result<()> {
    cluster.until("the copy to be whole again", || {
        let status = cluster.status("a").context("a does not answer")?;
        // Alone in the term after it, then paired again.
        let newer = status.register.as_ref().is_some_and(|entry| entry.term > term + 1);
        Ok((status.role() == Role::Paired && newer).then_some(()))
    })?;
    let status = cluster.status("a").context("a does not answer")?;
    let counters = status.counters.context("no counters")?;
    ensure!((counters.full_resyncs, counters.resyncs) == (1, 1), "{counters:?}");
    ensure!(status.last_error.contains("differs from the guest"), "{}", status.last_error);
    let trail = cluster.admin("a")?.audit()?;
    let noted = trail.iter().any(|entry| {
        entry.kind() == AuditKind::Verified && entry.what.contains("it is not trusted any more")
    });
    ensure!(noted, "{trail:?}");
    Ok(())
}

fn term(cluster: &Cluster) -> anyhow::Result<u64> {
    let status = cluster.status("a").context("a does not answer")?;
    Ok(status.register.context("no register")?.term)
}

/// Compares, changes one page of the copy that holds something or nothing, and compares until all is right again.
fn find_and_mend(cluster: &mut Cluster, seed: &mut Seed, empty: bool) -> anyhow::Result<()> {
    is_equal(memory(&verify(cluster, 0)?)?)?;
    let image = memory_of(cluster, "b")?;
    let before = term(cluster)?;
    for _ in 0..TRIES {
        let still = at_rest(&image, empty)?;
        ensure!(!still.is_empty(), "no page is at rest");
        let gfn = still[usize::try_from(seed.below(still.len() as u64))?];
        let byte = seed.below(PAGE_SIZE as u64);
        let flipped = flip(&image, gfn, byte)?;
        let found = verify(cluster, 0)?;
        let part = memory(&found)?;
        if (part.differing, &part.places) == (1, &vec![gfn]) {
            break;
        }
        // The guest may have written it meanwhile after all; then it is right again.
        let mut now = [0];
        image.read_exact_at(&mut now, gfn * PAGE_SIZE as u64 + byte)?;
        ensure!(part.differing == 0 && now[0] != flipped, "page {gfn:#x} was changed: {part:?}");
    }
    until_made_whole(cluster, before)?;
    is_equal(memory(&verify(cluster, 0)?)?)?;
    check_goes_on(cluster)
}

/// The guest in software writes all that it has in every epoch, so it is a page that it never had.
#[test]
fn a_page_that_the_guest_has_not_is_found_in_the_copy() {
    let mut seed = Seed::from_env(5501);
    scenario(synthetic(&mut seed), |cluster| {
        pair(cluster)?;
        find_and_mend(cluster, &mut seed, true)
    })
    .unwrap();
}

#[test]
fn a_comparison_is_refused_or_ends_with_words() {
    let mut seed = Seed::from_env(5502);
    scenario(synthetic(&mut seed), |cluster| {
        cluster.start_primary("a", None)?;
        cluster.until_role("a", Role::Alone)?;
        let refused = |cluster: &Cluster, node: &str, request, why: &str| {
            let error = cluster.admin(node)?.verify(request).err().context("it was not refused")?;
            ensure!(format!("{error:#}").contains(why), "{error:#}");
            anyhow::Ok(())
        };
        refused(cluster, "a", all(0), "the vm is not protected")?;
        cluster.start_secondary("b")?;
        cluster.protect("a", "b")?;
        refused(cluster, "b", all(0), "is not the one that runs the guest")?;
        let disk = VerifyReplicaRequest { memory: false, disk: true, rate_mib: 0 };
        refused(cluster, "a", disk, "the guest has no disk")?;
        let admin = cluster.admin("a")?.clone();
        let slow = std::thread::spawn(move || admin.verify(all(1)));
        cluster.until("a comparison to go on", || {
            Ok(cluster.log("a").contains("the copy is being compared").then_some(()))
        })?;
        refused(cluster, "a", all(1), "the copy is being compared already")?;
        cluster.kill("b")?;
        let ended = slow.join().map_err(|_| anyhow::anyhow!("the caller has panicked"))?;
        let why = format!("{:#}", ended.err().context("it did not end early")?);
        ensure!(why.contains("compared in part: the link to the secondary has ended"), "{why}");
        cluster.until_solo("a")?;
        check_goes_on(cluster)
    })
    .unwrap();
}

fn percentile(mut pauses: Vec<u64>, of_100: usize) -> u64 {
    pauses.sort_unstable();
    pauses[(pauses.len() - 1) * of_100 / 100]
}

fn pauses(reports: &[EpochReport]) -> impl Iterator<Item = u64> + '_ {
    reports.iter().filter_map(|report| report.pause.as_ref()).map(|pause| pause.total_us)
}

/// Pauses with and without a comparison, in turns, printed.
fn side_by_side(cluster: &Cluster, guest: &str) -> anyhow::Result<()> {
    let (mut without, mut with) = (Vec::new(), Vec::new());
    for _ in 0..LOOKS {
        let admin = cluster.admin("a")?;
        without.extend(pauses(&admin.watch(EPOCHS)?));
        let (on, other) = (AtomicBool::new(true), admin.clone());
        std::thread::scope(|scope| {
            let compares = scope.spawn(|| {
                let mut count = 0_u32;
                while on.load(Ordering::SeqCst) {
                    let found = other.verify(all(0))?;
                    ensure!(
                        found.memory.iter().chain(&found.disk).all(|part| part.differing == 0),
                        "{found:?}"
                    );
                    count += 1;
                }
                anyhow::Ok(count)
            });
            let reports = admin.watch(EPOCHS);
            on.store(false, Ordering::SeqCst);
            let count = compares.join().map_err(|_| anyhow::anyhow!("the caller has panicked"))??;
            ensure!(count > 0, "nothing was compared meanwhile");
            with.extend(pauses(&reports?));
            anyhow::Ok(())
        })?;
    }
    for (what, pauses) in [("without", without), ("with", with)] {
        let (p50, p99) = (percentile(pauses.clone(), 50), percentile(pauses.clone(), 99));
        tell(&format!(
            "pause {what} a comparison, {guest}: p50 {p50} us, p99 {p99} us, {} epochs",
            pauses.len()
        ));
    }
    Ok(())
}

#[test]
fn pauses_beside_a_comparison_and_a_wrong_page() {
    let mut seed = Seed::from_env(5503);
    scenario(synthetic(&mut seed), |cluster| {
        pair(cluster)?;
        side_by_side(cluster, "synthetic")?;
        check_goes_on(cluster)
    })
    .unwrap();
    if !kvm_usable() {
        return;
    }
    let guest = "pages=2048 touch=64 pattern=rand delay_us=2000 sleep=1 lines=0";
    let guest = Guest::linux(&Images::find().unwrap(), Kernel::Up, seed.below(1_000_000), guest).unwrap();
    scenario(Options::new(guest), |cluster| {
        cluster.start_secondary("b")?;
        cluster.start_primary("a", None)?;
        cluster.until_said("colo 00000001 ")?;
        cluster.protect("a", "b")?;
        side_by_side(cluster, "linux, random writes")?;
        find_and_mend(cluster, &mut seed, false)
    })
    .unwrap();
}

/// A disk at work: writes, discards and zeroes past every cache; then one block is changed behind the secondary's back.
#[test]
fn a_disk_at_work_is_compared_and_a_wrong_block_found() {
    let Some(images) = images() else { return };
    let mut seed = Seed::from_env(5504);
    let arguments = format!("mode=raw steps=100000 blocks=1024 seed={}", seed.below(1_000_000));
    let options = Options::service(&images, &arguments).unwrap();
    in_lab(&["a", "b"], options, |_, cluster| {
        cluster.start_secondary("b")?;
        boot(cluster, "a", "colo-disk 00000001 ok")?;
        cluster.protect("a", "b")?;
        for _ in 0..3 {
            let found = verify(cluster, 0)?;
            is_equal(memory(&found)?)?;
            is_equal(found.disk.as_ref().context("no disk was compared")?)?;
        }
        let image = OpenOptions::new().read(true).write(true).open(cluster.image_of("b"))?;
        // The guest works on the first of its blocks, or anywhere: one that is at rest and the same at both nodes.
        let (theirs, still) = (read_all(&File::open(cluster.image_of("a"))?)?, at_rest(&image, false)?);
        let ours = read_all(&image)?;
        let piece = |bytes: &[u8], at: u64| bytes[at as usize * BLOCK_SIZE..][..BLOCK_SIZE].to_vec();
        let block = still.into_iter().rev().find(|&at| piece(&ours, at) == piece(&theirs, at));
        let block = block.context("no block is at rest")?;
        let before = term(cluster)?;
        flip(&image, block, seed.below(BLOCK_SIZE as u64))?;
        let request = VerifyReplicaRequest { memory: false, disk: true, rate_mib: 0 };
        let found = cluster.admin("a")?.verify(request)?;
        let disk = found.disk.as_ref().context("no disk was compared")?;
        ensure!(
            found.memory.is_none() && (disk.differing, &disk.places) == (1, &vec![block]),
            "{block:#x}: {disk:?}"
        );
        until_made_whole(cluster, before)?;
        is_equal(cluster.admin("a")?.verify(request)?.disk.as_ref().context("no disk was compared")?)
    });
}
