//! The power goes while a runner writes to a disk with an intent log: whatever the device kept of what was not synced, the
//! image is what the log claims.

#[path = "../../../common/vmm/tests/intent_script/mod.rs"]
mod intent_script;
mod replay;

use intent_script::{Rng, TOLD, check, run};
use replay::{Files, records};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const SEEDS: u64 = 4;
const STEPS: usize = 400;
const CUTS: usize = 150;

const ROOT: &str = "COLO_POWERCUT_ROOT";
const LOG: &str = "COLO_POWERCUT_LOG";
const SEED: &str = "COLO_TEST_INTENT_SEED";

/// Not a test by itself: the process whose files are recorded.
#[test]
fn runner() {
    let (Ok(root), Ok(seed)) = (std::env::var(ROOT), std::env::var(SEED)) else { return };
    run(&PathBuf::from(root), seed.parse().unwrap(), STEPS);
}

fn record(root: &Path, log: &Path, seed: u64) -> Vec<u8> {
    let exe = std::env::current_exe().unwrap();
    let shim = exe.parent().unwrap().join("libcolo_powercut.so");
    assert!(shim.exists(), "cargo builds {} beside this test", shim.display());
    let ran = Command::new(&exe)
        .args(["--exact", "runner"])
        .env("LD_PRELOAD", shim)
        .env(ROOT, root)
        .env(LOG, log)
        .env(SEED, seed.to_string())
        .output()
        .unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stdout));
    fs::read(log).unwrap()
}

#[test]
fn whatever_a_power_cut_leaves_the_image_is_what_the_log_claims() {
    let (mut checked, mut ahead, mut cleaned) = (0, 0, 0);
    for seed in 0..SEEDS {
        let dir = tempfile::tempdir().unwrap();
        let (root, log) = (dir.path().join("root"), dir.path().join("log"));
        fs::create_dir(&root).unwrap();
        let log = record(&root, &log, seed);
        let records = records(&log);
        let (mut files, mut rng, mut told) = (Files::new(&root), Rng(seed), Vec::new());
        let mut cuts: Vec<usize> = (0..CUTS).map(|_| rng.below(records.len() as u64) as usize).collect();
        cuts.sort_unstable();
        for (at, record) in records.iter().enumerate() {
            for _ in cuts.iter().filter(|&&cut| cut == at) {
                let cut = dir.path().join("cut");
                files.cut(&mut |end| rng.below(end), &cut);
                if let Some(seen) = check(&cut, seed, STEPS, &told) {
                    checked += 1;
                    ahead += usize::from(seen.ahead);
                    cleaned += usize::from(seen.epoch > 0);
                }
                fs::remove_dir_all(&cut).unwrap();
            }
            if let Some(bytes) = files.step(record, TOLD) {
                told.push(u64::from_le_bytes(bytes.try_into().unwrap()));
            }
        }
    }
    println!("{checked} power cuts: {ahead} with the image ahead, {cleaned} after a round of the cleaner");
    assert!(ahead > checked / 4 && cleaned > checked / 4 && checked > CUTS, "{checked} {ahead} {cleaned}");
}
