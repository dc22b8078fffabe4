//! Seeded simulation of the replication with real data: the very parts that the nodes are made of, driven in one thread
//! over virtual time, with every fault that design.md section 2 is about. What the nodes add to the parts are threads,
//! sockets and clocks; the drivers here take their place, step by step.
//!
//! `COLO_SIM_SEEDS` says how many seeds are run, `COLO_SEED` repeats one with its trace.

#[path = "simulation/common.rs"]
mod common;
#[path = "simulation/cutting.rs"]
mod cutting;
#[path = "simulation/faults.rs"]
mod faults;
#[path = "simulation/follower.rs"]
mod follower;
#[path = "simulation/following.rs"]
mod following;
#[path = "simulation/image_file.rs"]
mod image_file;
#[path = "simulation/intent.rs"]
mod intent;
#[path = "simulation/joining.rs"]
mod joining;
#[path = "simulation/net.rs"]
mod net;
#[path = "simulation/outside.rs"]
mod outside;
#[path = "simulation/persister.rs"]
mod persister;
#[path = "simulation/plan.rs"]
mod plan;
#[path = "simulation/promoting.rs"]
mod promoting;
#[path = "simulation/runner.rs"]
mod runner;
#[path = "simulation/seeding.rs"]
mod seeding;
#[path = "simulation/switching.rs"]
mod switching;
#[path = "simulation/world.rs"]
mod world;

use common::{Counts, trace};
use plan::Mutations;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, Once};
use std::time::Instant;
use world::run;

/// Seeds of a run of the tests.
const SEEDS: u64 = 3000;
/// Seeds that break a rule with what was wrong once (a mutation below brings each back), and no more.
const PINNED: [(u64, &str); 6] = [
    (
        13,
        "word of a newer term overtook an epoch, which was refused with its output taken: the promotion panicked",
    ),
    (20, "failed epochs came together to one larger than the secondary takes, for ever"),
    (3, "digests were asked for before word of the seed had come, and never answered"),
    (234, "digests for a link that was gone went to the next one, and told of an image that was no more"),
    (88, "a failed guest that nobody followed any more was left lying"),
    (
        797,
        "writes to the disk did not count until the cut, whose epoch was too large then: protected and given up, for ever",
    ),
];
/// How often that many seeds must have seen each at least: else little was tried.
const LEAST: [(&str, u64); 47] = [
    ("acks", 80_000),
    ("applied", 60_000),
    ("blocks folded", 20_000),
    ("blocks folded under a guest", 500),
    ("blocks seeded", 60_000),
    ("boots", 60),
    ("bytes released", 10_000_000),
    ("copies whole", 2_000),
    ("corruptions", 50),
    ("crashes in a promotion", 80),
    ("crashes of a follower", 1_500),
    ("crashes of a runner", 500),
    ("deaths in a write", 250),
    ("disk promises", 150),
    ("ended protected", 1_500),
    ("ended stopped", 120),
    ("epochs given up", 500),
    ("failed epochs", 1_000),
    ("frozen processes", 800),
    ("full stores", 100),
    ("garbled frames", 60),
    ("guest failures", 40),
    ("hand-backs", 10),
    ("joins", 2_000),
    ("late proposals", 200),
    ("links broken", 700),
    ("links doubled", 1_000),
    ("messages lost", 15_000),
    ("one-way partitions", 400),
    ("outages", 300),
    ("paired", 2_000),
    ("partitions", 300),
    ("pauses", 250),
    ("policy changes", 700),
    ("power buttons", 20),
    ("promotes by the operator", 500),
    ("promotions", 300),
    ("protects by the operator", 400),
    ("proposals lost", 60),
    ("relinks", 600),
    ("resets", 250),
    ("resyncs", 800),
    ("resyncs of what was written", 400),
    ("rests", 60),
    ("ring overruns", 30),
    ("stores read back", 500),
    ("writes to the disk shipped", 100_000),
];
/// Seeds in which the policy changes often.
const POLICY_SEEDS: u64 = 1500;
/// Seeds until a rule that was left out must have been noticed.
const MUTATED_SEEDS: u64 = 9000;
/// Cores of a small test machine.
const THREADS: usize = 2;

/// Threads whose panics are told with the seed.
const SIMULATED: &str = "simulated";

/// A panic in a seed is what is looked for: not to be printed where it happens.
fn quiet() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if std::thread::current().name() != Some(SIMULATED) {
                before(panic);
            }
        }));
    });
}

/// Runs a seed; a panic is a broken rule as well.
fn outcome(seed: u64, mutations: Mutations) -> (Option<String>, Counts) {
    match catch_unwind(AssertUnwindSafe(|| run(seed, mutations, false))) {
        Ok(outcome) => (outcome.broken, outcome.counts),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("?");
            (Some(format!("a panic: {text}")), Counts::default())
        }
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

/// Seeds from `first` on, until one breaks a rule. Answers it, how many were run, and what happened in them.
fn search(first: u64, seeds: u64, mutations: Mutations) -> (Option<(u64, String)>, u64, Counts) {
    let (next, found) = (AtomicU64::new(first), Mutex::new(None::<(u64, String)>));
    let all = Mutex::new(Counts::default());
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            let search = || {
                while found.lock().expect("no panic").is_none() {
                    let seed = next.fetch_add(1, Ordering::SeqCst);
                    if seed >= first + seeds {
                        return;
                    }
                    let (broken, counts) = outcome(seed, mutations);
                    all.lock().expect("no panic").merge(&counts);
                    if let Some(why) = broken {
                        found.lock().expect("no panic").get_or_insert((seed, why));
                    }
                }
            };
            let thread = std::thread::Builder::new().name(SIMULATED.to_owned());
            thread.spawn_scoped(scope, search).expect("a thread");
        }
    });
    let ran = next.load(Ordering::SeqCst).min(first + seeds) - first;
    (found.into_inner().expect("no panic"), ran, all.into_inner().expect("no panic"))
}

/// A seed with the last steps that led to what it broke.
fn retrace(seed: u64, why: &str, mutations: Mutations) -> String {
    // It may end in a panic again.
    drop(catch_unwind(AssertUnwindSafe(|| run(seed, mutations, true))));
    format!("seed {seed}: {why}\n{}", trace())
}

#[test]
fn no_rule_is_broken_whatever_goes_wrong() {
    quiet();
    if let Some(seed) = number("COLO_SEED") {
        let (broken, counts) = outcome(seed, Mutations::default());
        println!(
            "{}\n{counts:?}",
            retrace(seed, broken.as_deref().unwrap_or("no rule broken"), Mutations::default())
        );
        return assert_eq!(broken, None);
    }
    let (seeds, begin) = (number("COLO_SIM_SEEDS").unwrap_or(SEEDS), Instant::now());
    let first = number("COLO_SIM_FIRST").unwrap_or(0);
    let (found, ran, counts) = search(first, seeds, Mutations::default());
    let rate = ran as f64 / begin.elapsed().as_secs_f64();
    println!("{ran} seeds, {rate:.0} a second");
    for (what, times) in &counts.0 {
        println!("{times:10} {what}");
    }
    if let Some((seed, why)) = found {
        panic!("{}", retrace(seed, &why, Mutations::default()));
    }
    if ran >= SEEDS {
        for (what, least) in LEAST {
            assert!(counts.of(what) >= least, "only {} {what} in {ran} seeds", counts.of(what));
        }
    }
}

#[test]
fn what_was_found_once_stays_mended() {
    quiet();
    for (seed, what) in PINNED {
        if let (Some(why), _) = outcome(seed, Mutations::default()) {
            panic!("{what}\n{}", retrace(seed, &why, Mutations::default()));
        }
    }
}

/// Rules that only matter while the policy changes.
const POLICIES: [&str; 2] = ["keep_id_on_switch", "memory_acks_until_stored"];

/// A rule that only matters when a guest fails.
const FAILURES: &str = "failed_guest_left";

/// Each rule left out is noticed.
fn is_noticed(name: &str, mutations: Mutations) -> String {
    quiet();
    let begin = Instant::now();
    let (found, ran, _) = search(0, number("COLO_SIM_SEEDS").unwrap_or(MUTATED_SEEDS), mutations);
    let (seed, why) = found.unwrap_or_else(|| panic!("{name} went unnoticed in {ran} seeds"));
    format!("{name}: seed {seed} of {ran}, {:.1} s: {why}", begin.elapsed().as_secs_f64())
}

macro_rules! noticed {
    ($($name:ident: $($part:ident).+;)*) => {$(
        #[test]
        fn $name() {
            let mut mutations = Mutations::default();
            mutations.$($part).+ = true;
            mutations.often_other_policy = POLICIES.contains(&stringify!($name));
            mutations.often_failing = stringify!($name) == FAILURES;
            println!("{}", is_noticed(stringify!($name), mutations));
        }
    )*};
}

/// Nothing is wrong where only the policy changes often, so that what a mutation breaks there is its own doing.
#[test]
fn no_rule_is_broken_while_the_policy_changes() {
    quiet();
    let mutations = Mutations { often_other_policy: true, ..Mutations::default() };
    let failing = Mutations { often_failing: true, ..Mutations::default() };
    if let (Some((seed, why)), ..) = search(0, POLICY_SEEDS, failing) {
        panic!("{}", retrace(seed, &why, failing));
    }
    let first = number("COLO_SIM_FIRST").unwrap_or(0);
    let (found, ran, counts) = search(first, POLICY_SEEDS, mutations);
    println!("{ran} seeds, {} changes of policy", counts.of("policy changes"));
    if let Some((seed, why)) = found {
        panic!("{}", retrace(seed, &why, mutations));
    }
}

// Left to the model in `register_model`: `store_id_early` (the persist thread takes its orders one after the other, so
// the store has what was staged before), `promote_any_replica` and `seed_keeps_active` (the nodes ask for a whole copy,
// and the store forgets `active`, beside the rule), `start_for_another` (the nodes have no such command), and
// `take_any_hand_back` (needs a chain of three that no seed within reach has).
noticed! {
    release_while_pairing: runner.release_while_pairing;
    hold_from_proposal: runner.hold_from_proposal;
    void_join_counts: runner.void_join_counts;
    drop_carried: runner.drop_carried;
    release_on_proposal: runner.release_on_proposal;
    release_unlinked: runner.release_unlinked;
    old_value_is_refusal: runner.old_value_is_refusal;
    refused_changes_nothing: runner.refused_changes_nothing;
    resync_any_copy: runner.resync_any_copy;
    solo_forgets_flight: runner.solo_forgets_flight;
    ack_before_sync: follower.ack_before_sync;
    promote_stopped: follower.promote_stopped;
    never_silent: follower.never_silent;
    store_id_under_memory: follower.store_id_under_memory;
    keep_id_on_switch: follower.keep_id_on_switch;
    memory_acks_until_stored: follower.memory_acks_until_stored;
    boot_inactive: follower.boot_inactive;
    boot_for_another: follower.boot_for_another;
    hand_back_active: follower.hand_back_active;
    ack_before_staged: ack_before_staged;
    apply_out_of_order: apply_out_of_order;
    release_before_ack: release_before_ack;
    promotion_leaves_store: promotion_leaves_store;
    term_overtakes: term_overtakes;
    epochs_too_large: epochs_too_large;
    early_digests_dropped: early_digests_dropped;
    digests_to_any_link: digests_to_any_link;
    failed_guest_left: failed_guest_left;
    kept_blocks_uncounted: kept_blocks_uncounted;
    failed_blocks_dropped: failed_blocks_dropped;
    blocks_stored_late: blocks_stored_late;
    skipped_blocks_dropped: skipped_blocks_dropped;
    file_never_synced: file_never_synced;
}
