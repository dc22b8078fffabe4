//! The power goes while a store is written and the disk's overlay is folded into its image file: whatever the device kept of what was not synced, the store opens at a real
//! point, not older than the last step that was done.

mod replay;
#[path = "../../../secondary/tests/store_script/mod.rs"]
mod store_script;

use replay::{Files, records};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use store_script::{BATCH, Copy, Folder, Rng, State, observe, open, run, script};

const SEEDS: u64 = 4;
const STEPS: usize = 160;
const CUTS: usize = 60;
/// Steps between two openings: a start writes too.
const REOPEN: u64 = 25;

const ROOT: &str = "COLO_POWERCUT_ROOT";
const LOG: &str = "COLO_POWERCUT_LOG";
const SEED: &str = "COLO_TEST_STORE_SEED";

/// Not a test by itself: the process whose files are recorded.
#[test]
fn writer() {
    let (Ok(root), Ok(seed)) = (std::env::var(ROOT), std::env::var(SEED)) else { return };
    let (root, seed) = (PathBuf::from(root), seed.parse().unwrap());
    let (steps, states) = script(seed, STEPS);
    let (mut done, mut rng) = (File::create(root.join("done")).unwrap(), Rng(seed));
    let mut store = open(&root).unwrap();
    let mut folder = Folder::start(&store, 3);
    for (at, step) in steps.iter().enumerate() {
        store.limit_batches(BATCH);
        run(&mut store, &states[at], step).unwrap();
        done.write_all(&(at as u64 + 1).to_le_bytes()).unwrap();
        if rng.below(REOPEN) == 0 {
            drop((folder, store));
            store = open(&root).unwrap();
            folder = Folder::start(&store, 3);
        }
    }
}

fn record(root: &Path, log: &Path, seed: u64) -> Vec<u8> {
    let exe = std::env::current_exe().unwrap();
    let shim = exe.parent().unwrap().join("libcolo_powercut.so");
    assert!(shim.exists(), "cargo builds {} beside this test", shim.display());
    let ran = Command::new(&exe)
        .args(["--exact", "writer"])
        .env("LD_PRELOAD", shim)
        .env(ROOT, root)
        .env(LOG, log)
        .env(SEED, seed.to_string())
        .output()
        .unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stdout));
    fs::read(log).unwrap()
}

/// The cut's files hold the state of `done` steps or of the next.
fn check(dir: &Path, states: &[State], done: usize, seed: u64, cut: usize) -> bool {
    let opened = open(dir);
    let mut store = opened.unwrap_or_else(|error| panic!("seed {seed}, cut at {cut}, {done} done: {error}"));
    let found = observe(&mut store);
    let found = found.unwrap_or_else(|error| panic!("seed {seed}, cut at {cut}, {done} done: {error}"));
    let next = (done + 1).min(states.len() - 1);
    let at = (done..=next).find(|&at| states[at].allows(&found));
    assert!(
        at.is_some(),
        "seed {seed}, cut at {cut}, {done} done: {found:?}, wanted {:?}",
        &states[done..=next]
    );
    at != Some(done)
}

#[test]
fn whatever_a_power_cut_leaves_is_a_point_not_older_than_the_last_done() {
    let (mut newer, mut whole) = (0, 0);
    for seed in 0..SEEDS {
        let dir = tempfile::tempdir().unwrap();
        let (root, log) = (dir.path().join("root"), dir.path().join("log"));
        fs::create_dir(&root).unwrap();
        let log = record(&root, &log, seed);
        let (records, states) = (records(&log), script(seed, STEPS).1);
        let (mut files, mut rng, mut done) = (Files::new(&root), Rng(seed), 0);
        let mut cuts: Vec<usize> = (0..CUTS).map(|_| rng.below(records.len() as u64) as usize).collect();
        cuts.sort_unstable();
        for (at, record) in records.iter().enumerate() {
            for _ in cuts.iter().filter(|&&cut| cut == at) {
                let cut = dir.path().join("cut");
                files.cut(&mut |end| rng.below(end), &cut);
                newer += usize::from(check(&cut, &states, done, seed, at));
                whole += usize::from(matches!(states[done].copy, Copy::Whole { .. }));
                fs::remove_dir_all(&cut).unwrap();
            }
            if let Some(bytes) = files.step(record, "done") {
                done = u64::from_le_bytes(bytes.try_into().unwrap()) as usize;
            }
        }
        assert_eq!(done, STEPS, "the record is not complete");
    }
    println!(
        "{} cuts, {whole} of a whole copy, {newer} of them kept a step that was not done",
        SEEDS as usize * CUTS
    );
    assert!(newer > 0 && whole > CUTS, "the cuts are all of one kind: {newer} {whole}");
}
