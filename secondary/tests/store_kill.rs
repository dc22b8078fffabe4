//! The process that writes a store is killed at random instants, hundreds of times: what it had reported done is
//! there, and what it was doing is there or not. A thread of it folds the disk's overlay into its image file all the
//! time, so that the kills come in the middle of that too.

mod store_script;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};
use store_script::{BATCH, Copy, Folder, Rng, State, Step, observe, open, run, script};

const STEPS: usize = 400;
const KILLS: usize = 240;
/// Kills go on for this long at most on a slow machine; never fewer than [`FEWEST`].
const BUDGET: Duration = Duration::from_secs(60);
const FEWEST: usize = 60;

const DIR: &str = "COLO_TEST_STORE_DIR";
const FROM: &str = "COLO_TEST_STORE_FROM";
const SEED: &str = "COLO_TEST_STORE_SEED";

/// Not a test by itself: the process that is killed.
#[test]
fn writer() {
    let Ok(dir) = std::env::var(DIR) else { return };
    let number = |name| std::env::var(name).unwrap().parse::<u64>().unwrap();
    let (steps, states) = script(number(SEED), STEPS);
    let mut store = open(Path::new(&dir)).unwrap();
    store.limit_batches(BATCH);
    let _folder = Folder::start(&store, 3);
    let from = number(FROM) as usize;
    // The test harness has begun a line.
    println!();
    for (at, step) in steps.iter().enumerate().skip(from) {
        run(&mut store, &states[at], step).unwrap();
        println!("done {}", at + 1);
    }
}

fn spawn(dir: &Path, seed: u64, from: usize) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "writer", "--nocapture"])
        .env(DIR, dir)
        .env(SEED, seed.to_string())
        .env(FROM, from.to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Lets the writer do some steps and kills it; answers how many steps of the script it has reported.
fn run_and_kill(dir: &Path, seed: u64, from: usize, rng: &mut Rng) -> usize {
    let mut child = spawn(dir, seed, from);
    let (lines, reports) = mpsc::channel();
    let out = BufReader::new(child.stdout.take().unwrap());
    let reader = thread::spawn(move || {
        for line in out.lines().map_while(Result::ok) {
            if let Some(done) = line.strip_prefix("done ") {
                let _ = lines.send(done.parse::<usize>().unwrap());
            }
        }
    });
    let mut done = from;
    for _ in 0..rng.below(12) {
        match reports.recv() {
            Ok(reported) => done = reported,
            Err(_) => break,
        }
    }
    thread::sleep(Duration::from_micros(rng.below(3000)));
    let _ = child.kill();
    child.wait().unwrap();
    reader.join().unwrap();
    reports.try_iter().last().unwrap_or(done)
}

/// The step to go on from: a copy in the making is made anew.
fn resume_at(states: &[State], steps: &[Step], at: usize) -> usize {
    if states[at].copy != Copy::Inconsistent {
        return at;
    }
    let begun = (0..at).rev().find(|&step| matches!(steps[step], Step::BeginCopy { .. }));
    let begun = begun.expect("an inconsistent copy was begun");
    // A second beginning on top of the first needs the first one's pages too.
    if states[begun].copy == Copy::Inconsistent { resume_at(states, steps, begun) } else { begun }
}

#[test]
fn killed_at_any_instant_it_holds_what_was_done() {
    let (start, mut kills, mut in_flight) = (Instant::now(), 0, 0);
    for seed in 0.. {
        let dir = tempfile::tempdir().unwrap();
        let (steps, states) = script(seed, STEPS);
        let (mut rng, mut from) = (Rng(seed ^ 0xdead), 0);
        while from < STEPS {
            if kills == KILLS || (kills >= FEWEST && start.elapsed() > BUDGET) {
                println!("{kills} kills, {in_flight} steps landed unreported, {:?}", start.elapsed());
                assert!(in_flight > 0, "no kill came between a step and its report");
                return;
            }
            let done = run_and_kill(dir.path(), seed, from, &mut rng);
            kills += 1;
            let mut store = open(dir.path()).unwrap();
            let found = observe(&mut store).unwrap();
            let allowed = done..=(done + 1).min(STEPS);
            let at = allowed.clone().find(|&at| states[at].allows(&found));
            // What was begun again may be found as it was before that.
            let at = at.or_else(|| states[from].allows(&found).then_some(from).filter(|_| done == from));
            let at =
                at.unwrap_or_else(|| panic!("seed {seed}: found {found:?}, reported {done} from {from}"));
            in_flight += usize::from(at > done);
            from = resume_at(&states, &steps, at);
        }
    }
}
