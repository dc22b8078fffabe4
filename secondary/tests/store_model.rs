//! The store against a model, in RocksDB and in memory: random calls, reopened and crashed in between.

mod fault_disk;
mod store_script;

use colo_secondary::store::{MemoryDisk, Store, StoreError};
use fault_disk::FaultDisk;
use std::sync::Arc;
use store_script::{BATCH, Copy, DISK_BYTES, Rng, State, draw, observe, open, run, send_disk_again, vm};

/// What the model knows after a restart: the pages of an inconsistent copy are what they are.
fn settle(found: State, allowed: &[State], seed: u64) -> State {
    let state = allowed.iter().find(|state| state.allows(&found));
    let state = state.unwrap_or_else(|| panic!("seed {seed}: found {found:?}, allowed {allowed:?}"));
    let mut state = state.clone();
    if state.copy == Copy::Inconsistent {
        state.pages = found.pages;
    }
    state
}

fn open_in_memory(disk: &MemoryDisk, file: &FaultDisk) -> Result<Store, StoreError> {
    let mut store = Store::open_in_memory(disk, &vm())?;
    store.attach_disk(Arc::new(file.open()))?;
    Ok(store)
}

#[test]
fn in_rocksdb_a_restart_shows_what_was_done() {
    for seed in 0..6 {
        let dir = tempfile::tempdir().unwrap();
        let (mut rng, mut state) = (Rng(seed), State::default());
        let mut store = open(dir.path()).unwrap();
        for _ in 0..120 {
            store.limit_batches(BATCH);
            let step = draw(&mut rng, &state);
            run(&mut store, &state, &step).unwrap_or_else(|error| panic!("seed {seed}: {step:?}: {error}"));
            state = state.after(&step);
            if rng.below(8) == 0 {
                drop(store);
                store = open(dir.path()).unwrap();
                send_disk_again(&mut store, &state);
            }
            if rng.below(3) == 0 {
                let found = observe(&mut store).unwrap();
                assert!(
                    state.allows(&found),
                    "seed {seed}: after {step:?} found {found:?}, wanted {state:?}"
                );
                assert_eq!(found.pages, state.pages, "seed {seed}: after {step:?}");
            }
        }
    }
}

#[test]
fn in_memory_a_crash_anywhere_shows_the_state_before_or_after() {
    let (mut crashes, mut landed, mut pending) = (0, 0, 0);
    for seed in 0..400 {
        let (mut rng, mut state, disk) = (Rng(seed), State::default(), MemoryDisk::new());
        let file = FaultDisk::new(DISK_BYTES);
        let mut store = open_in_memory(&disk, &file).unwrap();
        for _ in 0..60 {
            store.limit_batches(BATCH);
            let step = draw(&mut rng, &state);
            if rng.below(5) == 0 {
                disk.die_after(rng.below(4));
            }
            let done = run(&mut store, &state, &step);
            let after = state.after(&step);
            if done.is_ok() && rng.below(10) != 0 {
                state = after;
                continue;
            }
            drop(store);
            disk.crash(rng.next());
            file.crash(&mut |end| rng.below(end));
            crashes += 1;
            store = open_in_memory(&disk, &file).unwrap();
            let found = observe(&mut store).unwrap();
            let allowed = if done.is_ok() { vec![after.clone()] } else { vec![state.clone(), after.clone()] };
            landed += usize::from(done.is_err() && after != state && after.allows(&found));
            pending += usize::from(done.is_err() && matches!(step, store_script::Step::Persist { .. }));
            state = settle(found, &allowed, seed);
            send_disk_again(&mut store, &state);
        }
    }
    println!("{crashes} crashes, {landed} of them after the last write, {pending} in a mark");
    assert!(crashes > 1000 && landed > 50 && pending > 500, "{crashes} {landed} {pending}");
}
