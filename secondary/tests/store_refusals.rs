//! Stores that cannot be used, each told by an error of its own that names the directory and the remedy: damaged ones,
//! another vm's, another version's, one in use, and a full disk.

mod store_script;

use colo_common::history::point;
use colo_common::{Block, Gfn, History, PAGE_SIZE, Point, ReplicaId, Term};
use colo_secondary::store::{
    Base, BlockRun, Mark, MemoryDisk, PageContent, Store, StoreError, StoredCopy, engine::Column,
};
use colo_vmm::disk::{Disk, FileDisk};
use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;
use store_script::{DISK_BYTES, Rng, open, run, script, vm};

/// The machine state of `whole_store`.
const STATE: &[u8] = b"the state of a machine";

fn mark_at<'a>(at: Point, history: &'a History) -> Mark<'a> {
    Mark { point: at, history, state: STATE, blocks: &[], now: SystemTime::UNIX_EPOCH }
}

fn history_to(at: Point) -> History {
    let mut history = History::default();
    history.extend(at);
    history
}

fn page_of(gfn: u64) -> Box<[u8; PAGE_SIZE]> {
    let mut page = Box::new([0; PAGE_SIZE]);
    page.as_chunks_mut().0.fill(0xc010_0000_0000_0000_u64.wrapping_add(gfn).to_le_bytes());
    page
}

/// Makes the store whole at 1.1 with pages 0 to `pages`.
fn fill(store: &mut Store, pages: u64) {
    let bytes: Vec<_> = (0..pages).map(page_of).collect();
    let contents = bytes.iter().enumerate().map(|(gfn, page)| (Gfn(gfn as u64), PageContent::Bytes(page)));
    store.see_term(Term(1)).unwrap();
    store.begin_copy(Base::Empty).unwrap();
    store.write_pages(contents).unwrap();
    let at = point(1, 1);
    store.complete(mark_at(at, &history_to(at)), Some(ReplicaId(1))).unwrap();
}

/// A store in a directory, with everything in RocksDB's table files: the log is replayed into them at an opening.
fn whole_store(dir: &Path, pages: u64) {
    fill(&mut Store::open(dir, &vm()).unwrap(), pages);
    drop(Store::open(dir, &vm()).unwrap());
}

fn files_of(dir: &Path, suffix: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir.join("current")).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = entries.filter(|path| path.to_str().unwrap().contains(suffix)).collect();
    files.sort();
    files
}

fn flip(file: &Path, byte: usize, bit: usize) {
    let mut bytes = fs::read(file).unwrap();
    bytes[byte] ^= 1 << bit;
    fs::write(file, bytes).unwrap();
}

fn one_line(error: &StoreError, dir: &Path, says: &[&str]) {
    let text = error.to_string();
    let all = says.iter().chain([&dir.to_str().unwrap()]).all(|part| text.contains(part));
    assert!(all && !text.contains('\n'), "{text:?} lacks one of {says:?}");
}

#[test]
fn a_flipped_bit_in_a_page_names_the_page() {
    let dir = tempfile::tempdir().unwrap();
    whole_store(dir.path(), 64);
    let tag = page_of(37);
    let (file, at) = files_of(dir.path(), ".sst")
        .into_iter()
        .find_map(|file| {
            let bytes = fs::read(&file).unwrap();
            let at = bytes.windows(64).position(|window| window == &tag[..64])?;
            Some((file, at))
        })
        .expect("pages are stored as they are");
    flip(&file, at + 1000, 3);
    let mut store = Store::open(dir.path(), &vm()).unwrap();
    let error = store.load(|_, _| ()).unwrap_err();
    assert!(matches!(error, StoreError::DamagedPage { gfn: Gfn(37), .. }), "{error}");
    one_line(&error, dir.path(), &["gfn 0x25", "resynced"]);
    let scrub = store.scrub(u64::MAX, |_| ControlFlow::Continue(())).unwrap();
    assert_eq!((scrub.damaged, scrub.pages, scrub.damaged_state), (vec![Gfn(37)], 63, false));
    // The next copy starts from what is left.
    store.begin_copy(Base::Stored).unwrap();
    let mut left = 0;
    assert_eq!(store.load_base(|_, _| left += 1).unwrap(), 1);
    assert_eq!(left, 63);
}

#[test]
fn no_flipped_bit_shows_another_image() {
    let dir = tempfile::tempdir().unwrap();
    let original = dir.path().join("original");
    whole_store(&original, 40);
    let wanted = observe_whole(&original).unwrap();
    let (mut rng, mut told, mut kinds) = (Rng(1), 0, BTreeMap::new());
    let mut targets = files_of(&original, ".sst");
    targets.extend(files_of(&original, "CURRENT"));
    targets.push(original.join("vm"));
    for round in 0..160 {
        let copy = dir.path().join("copy");
        let copied = Command::new("cp").arg("-r").args([&original, &copy]).status().unwrap();
        assert!(copied.success());
        if round == 0 {
            assert!(observe_whole(&copy).unwrap() == wanted, "a copy as it is");
        }
        let file = &targets[rng.below(targets.len() as u64) as usize];
        let file = copy.join(file.strip_prefix(&original).unwrap());
        let bytes = fs::metadata(&file).unwrap().len();
        flip(&file, rng.below(bytes) as usize, rng.below(8) as usize);
        match observe_whole(&copy) {
            Ok(found) => assert!(found == wanted, "round {round}: {} shows another image", file.display()),
            Err(error) => {
                told += 1;
                *kinds.entry(format!("{error:?}").split(' ').next().unwrap().to_owned()).or_insert(0) += 1;
                assert!(!error.to_string().contains('\n'), "{error:?}");
            }
        }
        fs::remove_dir_all(&copy).unwrap();
    }
    println!("{told} of 160 flipped bits were told, the others changed nothing: {kinds:?}");
    assert!(told > 40, "{told}");
}

/// What a store says and holds: its summary, its pages and its machine state.
type Whole = (StoredCopy, Vec<(u64, Box<[u8; PAGE_SIZE]>)>, Vec<u8>);

fn observe_whole(dir: &Path) -> Result<Whole, StoreError> {
    let (mut store, mut pages) = (Store::open(dir, &vm())?, Vec::new());
    store.load(|gfn, page| pages.push((gfn.0, Box::new(*page))))?;
    let state = store.state()?;
    Ok((store.summary().copy, pages, state))
}

#[test]
fn missing_files_are_damage_and_not_a_new_store() {
    for gone in ["CURRENT", "MANIFEST", ".sst"] {
        let dir = tempfile::tempdir().unwrap();
        whole_store(dir.path(), 8);
        files_of(dir.path(), gone).iter().for_each(|file| fs::remove_file(file).unwrap());
        let error = Store::open(dir.path(), &vm()).unwrap_err();
        assert!(matches!(error, StoreError::Damaged { .. }), "without {gone}: {error}");
        one_line(&error, dir.path(), &["damaged", "move the directory away"]);
    }
    let dir = tempfile::tempdir().unwrap();
    whole_store(dir.path(), 8);
    fs::remove_dir_all(dir.path().join("current")).unwrap();
    assert!(matches!(Store::open(dir.path(), &vm()), Err(StoreError::Damaged { .. })));
}

#[test]
fn a_scrub_goes_on_behind_what_is_damaged() {
    let disk = MemoryDisk::new();
    let mut store = Store::open_in_memory(&disk, &vm()).unwrap();
    fill(&mut store, 32);
    let clean = store.scrub(u64::MAX, |_| ControlFlow::Continue(())).unwrap();
    assert!(clean.is_clean() && clean.pages == 32, "{clean:?}");
    for (gfn, bit) in [(3_u64, 9 * 8 + 5), (30, 0)] {
        assert!(disk.flip_bit(Column::Pages, &gfn.to_be_bytes(), bit));
    }
    let scrub = store.scrub(u64::MAX, |_| ControlFlow::Continue(())).unwrap();
    assert_eq!((scrub.damaged, scrub.damaged_pages, scrub.pages), (vec![Gfn(3), Gfn(30)], 2, 30));
    assert!(matches!(store.load(|_, _| ()), Err(StoreError::DamagedPage { gfn: Gfn(3), .. })));
}

#[test]
fn of_another_vm_another_version_or_in_use() {
    let dir = tempfile::tempdir().unwrap();
    whole_store(dir.path(), 4);
    let error = Store::open(dir.path(), &"other".parse().unwrap()).unwrap_err();
    one_line(&error, dir.path(), &["of vm scripted, not of other", "a directory of its own"]);
    let held = Store::open(dir.path(), &vm()).unwrap();
    one_line(&Store::open(dir.path(), &vm()).unwrap_err(), dir.path(), &["in use by another process"]);
    drop(held);
    for version in ["1", "3"] {
        fs::write(dir.path().join("vm"), format!("colo-store {version} scripted\n")).unwrap();
        let error = Store::open(dir.path(), &vm()).unwrap_err();
        let found = format!("format version {version}");
        one_line(&error, dir.path(), &[&found, "reads version 2", "run the version that wrote it"]);
    }
    fs::write(dir.path().join("vm"), "colo-store 2 scripted\n").unwrap();
    assert_eq!(observe_whole(dir.path()).unwrap().1.len(), 4, "a refusal changes nothing");
    // Without the marker it is still known whose it is.
    fs::remove_file(dir.path().join("vm")).unwrap();
    assert!(matches!(Store::open(dir.path(), &"other".parse().unwrap()), Err(StoreError::OtherVm { .. })));
    assert_eq!(observe_whole(dir.path()).unwrap().1.len(), 4);
}

/// A store with a whole copy of a guest with a disk, one block of which is in the overlay.
fn with_disk(dir: &Path) -> PathBuf {
    let image = dir.join("disk.img");
    let mut store = Store::open(&dir.join("store"), &vm()).unwrap();
    store.open_disk(&image, DISK_BYTES).unwrap();
    fill(&mut store, 4);
    let (at, page) = (point(1, 2), page_of(1));
    let history = history_to(at);
    let blocks = [BlockRun::data(Block(2), &page[..])];
    store.persist([], Mark { blocks: &blocks, ..mark_at(at, &history) }).unwrap();
    image
}

fn disk_refused(dir: &Path, image: &Path, bytes: u64, says: &[&str]) {
    let mut store = Store::open(&dir.join("store"), &vm()).unwrap();
    let text = store.open_disk(image, bytes).unwrap_err().to_string();
    assert!(
        says.iter().all(|part| text.contains(part)) && !text.contains('\n'),
        "{text:?} lacks one of {says:?}"
    );
}

#[test]
fn an_image_file_that_is_not_the_disk_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let image = with_disk(dir.path());
    let name = image.to_str().unwrap();
    disk_refused(
        dir.path(),
        &image,
        2 * DISK_BYTES,
        &["a copy with a disk of 65536 bytes", "move the directory away"],
    );
    let held = FileDisk::open(&image, false).unwrap();
    disk_refused(dir.path(), &image, DISK_BYTES, &[name, "locked by another process"]);
    drop(held);
    fs::File::options().write(true).open(&image).unwrap().set_len(DISK_BYTES - 4096).unwrap();
    disk_refused(dir.path(), &image, DISK_BYTES, &[name, "has 61440 bytes", "65536", "cut short"]);
    fs::File::options().write(true).open(&image).unwrap().set_len(DISK_BYTES).unwrap();
    fs::rename(&image, dir.path().join("elsewhere")).unwrap();
    disk_refused(dir.path(), &image, DISK_BYTES, &[name, "cannot open", "check the path"]);
    assert!(!image.exists(), "none is made where there was one");
    fs::rename(dir.path().join("elsewhere"), &image).unwrap();
    let mut store = Store::open(&dir.path().join("store"), &vm()).unwrap();
    let disk = store.open_disk(&image, DISK_BYTES).unwrap();
    let mut found = [0; PAGE_SIZE];
    disk.read(Block(2).offset(), &mut found).unwrap();
    assert_eq!(found, *page_of(1));
    // The guest ran here: still none is made.
    store.activate(Term(2), &[]).unwrap();
    drop((store, disk));
    fs::remove_file(&image).unwrap();
    disk_refused(dir.path(), &image, DISK_BYTES, &["cannot open"]);
    // A copy in the making needs none.
    let mut store = Store::open(&dir.path().join("store"), &vm()).unwrap();
    store.begin_copy(Base::Empty).unwrap();
    store.open_disk(&image, DISK_BYTES).unwrap();
}

#[test]
fn blocks_without_a_place_are_refused() {
    let disk = MemoryDisk::new();
    let mut store = Store::open_in_memory(&disk, &vm()).unwrap();
    store.begin_copy(Base::Empty).unwrap();
    let error = store.write_blocks([BlockRun::zeros(Block(0), 1)]).unwrap_err();
    one_line(&error, Path::new("memory"), &["no place for block 0x0", "has 0 blocks"]);
    let place = tempfile::tempdir().unwrap();
    store.open_disk(&place.path().join("disk.img"), DISK_BYTES).unwrap();
    let error = store.write_blocks([BlockRun::zeros(Block(10), 7)]).unwrap_err();
    one_line(&error, Path::new("memory"), &["no place for block 0x10", "has 16 blocks"]);
    let refused = store.disk().unwrap().write(0, &[0; 512]).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::PermissionDenied, "the guest runs elsewhere");
}

#[test]
fn a_damaged_block_is_found_and_named() {
    let (disk, place) = (MemoryDisk::new(), tempfile::tempdir().unwrap());
    let image = place.path().join("disk.img");
    let mut store = Store::open_in_memory(&disk, &vm()).unwrap();
    store.open_disk(&image, DISK_BYTES).unwrap();
    fill(&mut store, 4);
    let (at, page) = (point(1, 2), page_of(1));
    let (history, blocks) = (history_to(at), [BlockRun::data(Block(2), &page[..])]);
    store.persist([], Mark { blocks: &blocks, ..mark_at(at, &history) }).unwrap();
    let clean = store.scrub(u64::MAX, |_| ControlFlow::Continue(())).unwrap();
    assert!(clean.is_clean() && (clean.pages, clean.blocks) == (4, 1), "{clean:?}");
    assert!(disk.flip_bit(Column::Disk, &2_u64.to_be_bytes(), 777));
    let scrub = store.scrub(u64::MAX, |_| ControlFlow::Continue(())).unwrap();
    assert_eq!((scrub.damaged_blocks, scrub.damaged_block, scrub.is_clean()), (1, Some(Block(2)), false));
    assert!(store.disk().unwrap().fold(9).is_err(), "nothing damaged goes into the file");
    let error = store.open_disk(&image, DISK_BYTES).unwrap_err();
    one_line(&error, Path::new("memory"), &["block 0x2 of the guest's disk", "resynced"]);
    // As a base for a new copy, which compares by digests, the rest is good enough.
    store.begin_copy(Base::Stored).unwrap();
    assert_eq!(store.open_disk(&image, DISK_BYTES).unwrap().overlay_blocks(), 0);
}

#[test]
fn a_mark_goes_forward() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::open(dir.path(), &vm()).unwrap();
    assert_eq!((store.summary().term, store.summary().copy), (None, StoredCopy::None));
    fill(&mut store, 2);
    let at = point(1, 1);
    let error = store.persist([], mark_at(at, &history_to(at))).unwrap_err();
    one_line(&error, dir.path(), &["at point 1.1", "go on to 1.1"]);
    let error = store.write_pages([]).unwrap_err();
    one_line(&error, dir.path(), &["cannot take pages", "whole at 1.1"]);
}

#[test]
fn the_previous_copy_is_kept_until_the_new_one_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let previous = dir.path().join("previous");
    let mut store = Store::open(dir.path(), &vm()).unwrap();
    fill(&mut store, 8);
    store.begin_copy(Base::Empty).unwrap();
    assert_eq!(
        (store.summary().previous, store.summary().copy),
        (Some(point(1, 1)), StoredCopy::Inconsistent)
    );
    drop(store);
    let mut store = Store::open(dir.path(), &vm()).unwrap();
    assert!(store.summary().previous.is_some() && previous.join("CURRENT").exists());
    let at = point(1, 5);
    store.complete(mark_at(at, &history_to(at)), None).unwrap();
    assert!(store.summary().previous.is_none() && !previous.exists());
    // What a crash before the first write, or after the last, leaves is removed.
    drop(store);
    fs::create_dir_all(previous.join("x")).unwrap();
    fs::create_dir_all(dir.path().join("previous.tmp")).unwrap();
    drop(Store::open(dir.path(), &vm()).unwrap());
    assert!(!previous.exists() && !dir.path().join("previous.tmp").exists());
}

/// A small file system of its own, if the system lets us have one.
struct Small(tempfile::TempDir);

impl Small {
    fn mount(size: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let size = format!("size={size}");
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &size, "colo-test"]).arg(dir.path()).output();
        let mounted = mounted.is_ok_and(|output| output.status.success());
        mounted.then_some(Self(dir))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_disk_is_told_and_damages_nothing() {
    let Some(small) = Small::mount("48m") else {
        println!("skipped: a small tmpfs cannot be mounted here (it needs root)");
        return;
    };
    let dir = small.0.path().join("store");
    let (steps, states) = script(2, 40);
    let mut store = open(small.0.path()).unwrap();
    let mut at = 0;
    while !matches!(states[at].copy, store_script::Copy::Whole { .. }) {
        run(&mut store, &states[at], &steps[at]).unwrap();
        at += 1;
    }
    let store_script::Copy::Whole { point: start, history, .. } = &states[at].copy else { unreachable!() };
    let (mut rng, mut reached, mut history) = (Rng(7), *start, history.clone());
    let error = loop {
        let next = Point { epoch: reached.epoch.next(), ..reached };
        history.extend(next);
        let pages: Vec<_> = (0..512).map(|_| (Gfn(100 + rng.below(100_000)), page_of(rng.next()))).collect();
        let pages = pages.iter().map(|(gfn, page)| (*gfn, PageContent::Bytes(page)));
        match store.persist(pages, mark_at(next, &history)) {
            Ok(()) => reached = next,
            Err(error) => break error,
        }
        assert!(reached.epoch.0 < start.epoch.0 + 100, "200 MiB fit into 48 MiB");
    };
    assert!(matches!(error, StoreError::NoSpace { .. }), "{error}");
    one_line(&error, &dir, &["no space left", "free some", "what was acked is safe"]);
    let broken = store.see_term(Term(99)).unwrap_err();
    one_line(&broken, &dir, &["open it again"]);
    drop(store);
    more_space(&small);
    let mut store = Store::open(&dir, &vm()).unwrap();
    let StoredCopy::Whole(whole) = store.summary().copy else { panic!("the copy is gone") };
    assert!(whole.point == reached || whole.point.epoch == reached.epoch.next(), "{} {reached}", whole.point);
    store.load(|_, _| ()).unwrap();
    assert_eq!(store.state().unwrap(), STATE);
}

fn more_space(small: &Small) {
    let grown = Command::new("mount").args(["-o", "remount,size=256m"]).arg(small.0.path()).status();
    assert!(grown.unwrap().success());
}

#[test]
fn a_full_disk_in_memory_is_told_too() {
    let disk = MemoryDisk::new();
    let mut store = Store::open_in_memory(&disk, &vm()).unwrap();
    fill(&mut store, 4);
    disk.set_full(true);
    assert!(matches!(store.see_term(Term(9)), Err(StoreError::NoSpace { .. })));
    assert!(matches!(store.see_term(Term(9)), Err(StoreError::Broken { .. })));
    disk.set_full(false);
    disk.crash(0);
    let mut store = Store::open_in_memory(&disk, &vm()).unwrap();
    let mut pages = 0;
    store.load(|_, _| pages += 1).unwrap();
    assert_eq!(pages, 4);
    assert_eq!(store.summary().term, Some(Term(1)));
}
