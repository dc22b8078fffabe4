//! A process that writes to a disk with an intent log is killed at random instants: what is left of the image is what the
//! log claims.

mod intent_script;

use intent_script::{Rng, TOLD, check, run};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const STEPS: usize = 4000;
const KILLS: u64 = 200;
/// Kills go on for this long at most on a slow machine; never fewer than [`FEWEST`].
const BUDGET: Duration = Duration::from_secs(30);
const FEWEST: u64 = 40;

const DIR: &str = "COLO_TEST_INTENT_DIR";
const SEED: &str = "COLO_TEST_INTENT_SEED";

/// Not a test by itself: the process that is killed.
#[test]
fn runner() {
    let (Ok(dir), Ok(seed)) = (std::env::var(DIR), std::env::var(SEED)) else { return };
    run(Path::new(&dir), seed.parse().unwrap(), STEPS);
}

fn run_and_kill(dir: &Path, seed: u64, rng: &mut Rng) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "runner"])
        .env(DIR, dir)
        .env(SEED, seed.to_string())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    while !dir.join(TOLD).exists() && begun.elapsed() < BUDGET {
        thread::sleep(Duration::from_micros(200));
    }
    thread::sleep(Duration::from_micros(rng.below(60_000)));
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn whenever_it_is_killed_the_image_is_what_the_log_claims() {
    let (mut rng, begun) = (Rng(7), Instant::now());
    let (mut kills, mut named, mut ahead, mut cleaned) = (0, 0, 0, 0);
    while kills < KILLS && (begun.elapsed() < BUDGET || kills < FEWEST) {
        let dir = tempfile::tempdir().unwrap();
        run_and_kill(dir.path(), kills, &mut rng);
        let told = std::fs::read(dir.path().join(TOLD)).unwrap();
        let told: Vec<u64> = told.as_chunks::<8>().0.iter().map(|told| u64::from_le_bytes(*told)).collect();
        let seen = check(dir.path(), kills, STEPS, &told).unwrap();
        named += u64::from(seen.named);
        ahead += u64::from(seen.ahead);
        cleaned += u64::from(seen.epoch > 0);
        kills += 1;
    }
    println!(
        "{kills} kills: {named} with extents named, {ahead} with the image ahead, {cleaned} after a round of the cleaner"
    );
    assert!(ahead > kills / 4 && cleaned > kills / 4, "{ahead} ahead, {cleaned} cleaned, of {kills}");
}
