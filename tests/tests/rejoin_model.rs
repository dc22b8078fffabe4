//! A copy that comes back is sent what differs: never less, and hardly more. The parts that know what differs
//! (`secondary::rejoin`, `primary::rejoin`, `primary::last_changed`, histories) in thousands of small worlds whose memory
//! and disk are arrays, so that after each copy both can be compared.
//!
//! `COLO_REJOIN_WORLDS` says how many worlds are run, `COLO_SEED` repeats one.

#[path = "rejoin_model/copy.rs"]
mod copy;
#[path = "rejoin_model/runner.rs"]
mod runner;
#[path = "rejoin_model/world.rs"]
mod world;

use std::collections::BTreeMap;
use world::{Sums, World};

/// Worlds of a run of the tests.
const WORLDS: u64 = 20_000;
/// Each way of coming back must have been tried so often.
const LEAST: u64 = 300;

#[test]
fn what_is_sent_is_never_short() {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let (first, worlds) = match number("COLO_SEED") {
        Some(seed) => (seed, 1),
        None => (0, number("COLO_REJOIN_WORLDS").unwrap_or(WORLDS)),
    };
    let mut all: BTreeMap<String, Sums> = BTreeMap::new();
    let mut epoch = copy::empty_epoch();
    for seed in first..first + worlds {
        let mut world = World::new(seed, epoch);
        if let Err(why) = world.play() {
            panic!("world {seed}: {why}");
        }
        epoch = world.epoch;
        for (way, sums) in world.sums {
            all.entry(way).or_default().add(sums);
        }
    }
    println!(
        "{:44} {:>8} {:>10} {:>10} {:>10}",
        "how it came back: memory, disk", "copies", "of all", "differ", "sent"
    );
    for (way, sums) in &all {
        println!("{way:44} {:>8} {:>10} {:>10} {:>10}", sums.copies, sums.all, sums.differ, sums.sent);
    }
    if worlds >= WORLDS {
        for way in ["Since, Since", "Since, Differing", "Differing, Since", "All, Since", "All, Differing"] {
            let copies = all.get(way).map_or(0, |sums| sums.copies);
            assert!(copies >= LEAST, "only {copies} copies were {way}");
        }
    }
}
