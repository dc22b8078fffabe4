//! Seeded simulation of the replication with real data: the very parts that the nodes are made of, driven in one thread
//! over virtual time, with every fault that design.md section 2 is about. What the nodes add to the parts are threads,
//! sockets and clocks; the drivers here take their place, step by step.
//!
//! `COLO_SIM_SEEDS` says how many seeds are run, `COLO_SIM_FIRST` from which on, and `COLO_SEED` repeats one with its
//! trace. With `COLO_SIM_SECONDS` seeds are run until that time is over, also after one broke a rule: `make soak`.

#[path = "simulation/asked.rs"]
mod asked;
#[path = "simulation/calamities.rs"]
mod calamities;
#[path = "simulation/cluster.rs"]
mod cluster;
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
#[path = "simulation/healing.rs"]
mod healing;
#[path = "simulation/image_file.rs"]
mod image_file;
#[path = "simulation/intent.rs"]
mod intent;
#[path = "simulation/joining.rs"]
mod joining;
#[path = "simulation/net.rs"]
mod net;
#[path = "simulation/operating.rs"]
mod operating;
#[path = "simulation/outside.rs"]
mod outside;
#[path = "simulation/persister.rs"]
mod persister;
#[path = "simulation/plan.rs"]
mod plan;
#[path = "simulation/presence.rs"]
mod presence;
#[path = "simulation/promoting.rs"]
mod promoting;
#[path = "simulation/runner.rs"]
mod runner;
#[path = "simulation/seeding.rs"]
mod seeding;
#[path = "simulation/spares.rs"]
mod spares;
#[path = "simulation/switching.rs"]
mod switching;
#[path = "simulation/world.rs"]
mod world;

use common::{Counts, trace};
use plan::Mutations;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, Once};
use std::time::{Duration, Instant};
use world::Ran;

/// Seeds of a run of the tests.
const SEEDS: u64 = 3000;
/// Seeds that break a rule with what was wrong once, which a mutation brings back, and no more.
const PINNED: [(u64, Run, Mutate, &str); 6] = [
    (
        1,
        world::run,
        |wrong| wrong.term_overtakes = true,
        "word of a newer term overtook an epoch, which was refused with its output taken: the promotion panicked",
    ),
    (
        59,
        world::run,
        |wrong| wrong.epochs_too_large = true,
        "failed epochs came together to one larger than the secondary takes, for ever",
    ),
    (
        9,
        world::run,
        |wrong| wrong.early_digests_dropped = true,
        "digests were asked for before word of the seed had come, and never answered",
    ),
    (
        876,
        world::run,
        |wrong| wrong.digests_to_any_link = true,
        "digests for a link that was gone went to the next one, and told of an image that was no more",
    ),
    (
        794,
        world::run,
        |wrong| wrong.failed_guest_left = true,
        "a failed guest that nobody followed any more was left lying",
    ),
    (
        797,
        world::run,
        |wrong| wrong.kept_blocks_uncounted = true,
        "writes to the disk did not count until the cut, whose epoch was too large then: protected and given up, for ever",
    ),
];
/// Brings a fault back.
type Mutate = fn(&mut Mutations);
/// How often that many seeds must have seen each at least: else little was tried.
const LEAST: [(&str, u64); 53] = [
    ("acks", 68_000),
    ("applied", 49_000),
    ("blocks folded", 89_000),
    ("blocks folded under a guest", 910),
    ("blocks seeded", 84_000),
    ("boots", 58),
    ("bytes released", 16_000_000),
    ("copies whole", 2_300),
    ("corruptions", 61),
    ("crashes in a promotion", 94),
    ("crashes of a follower", 1_900),
    ("crashes of a runner", 640),
    ("deaths in a write", 320),
    ("disk promises", 120),
    ("ended protected", 1_100),
    ("ended stopped", 150),
    ("epochs given up", 1_400),
    ("failed epochs", 1_300),
    ("frozen processes", 1_100),
    ("full stores", 130),
    ("garbled frames", 110),
    ("guest failures", 60),
    ("hand-backs", 17),
    ("joins", 2_400),
    ("late proposals", 250),
    ("links that came too early", 500),
    ("links broken", 1_000),
    ("links doubled", 2_000),
    ("memory handed over", 220),
    ("messages lost", 25_000),
    ("one-way partitions", 460),
    ("outages", 430),
    ("paired", 2_600),
    ("partitions", 390),
    ("pauses", 270),
    ("policy changes", 950),
    ("power buttons", 27),
    ("promotes by the operator", 650),
    ("promotions", 490),
    ("proposals lost", 79),
    ("protects by the operator", 280),
    ("relinks", 580),
    ("resets", 340),
    ("rests", 82),
    ("resyncs", 890),
    ("resyncs of what was written", 610),
    ("ring overruns", 160),
    ("runners that follow", 220),
    ("stores read back", 510),
    ("switchovers", 180),
    ("switchovers fenced", 8),
    ("switchovers given up", 58),
    ("writes to the disk shipped", 130_000),
];
/// The same of clusters.
const CLUSTER_SEEDS: u64 = 1200;
const CLUSTER_LEAST: [(&str, u64); 58] = [
    ("acks", 92_000),
    ("boots by force", 30),
    ("candidates that failed", 790),
    ("claims refused", 330),
    ("claims without an answer", 530),
    ("clock jumps", 970),
    ("copies whole", 3_000),
    ("crashes in a promotion", 200),
    ("crashes of a spare", 330),
    ("disk promises", 190),
    ("drains", 520),
    ("drains ended", 520),
    ("ended protected", 950),
    ("ended stopped", 200),
    ("failovers set to auto", 70),
    ("failovers set to manual", 240),
    ("forces by the operator", 170),
    ("forces refused beside a runner", 37),
    ("forces refused for want of a fence", 14),
    ("guests told to leave a node", 57),
    ("hand-backs", 25),
    ("healed by a node that came back", 460),
    ("healed by a spare", 1_100),
    ("hosts cut off from all", 87),
    ("hosts cut off from the arbiter", 180),
    ("hosts frozen", 490),
    ("hosts that died", 1_400),
    ("late words to the membership", 1_800),
    ("leases of the living run out", 250),
    ("links that came too early", 970),
    ("memory handed over", 380),
    ("nodes confirmed to be fenced", 120),
    ("nodes fenced", 120),
    ("one-way partitions", 170),
    ("outages", 210),
    ("partitions", 160),
    ("pauses", 430),
    ("policy changes", 660),
    ("promotes by the operator", 510),
    ("promotions", 950),
    ("promotions by force", 100),
    ("promotions that give acked output up", 20),
    ("protects by the operator", 110),
    ("resyncs", 460),
    ("resyncs of what was written", 270),
    ("runners fenced", 65),
    ("secondaries replaced", 81),
    ("slow disks", 760),
    ("spares bound", 1_500),
    ("spares claimed", 1_700),
    ("spares that go on where they left off", 800),
    ("spares that let go", 110),
    ("spares that nobody followed", 4),
    ("stops by the operator", 55),
    ("switchovers", 380),
    ("switchovers fenced", 16),
    ("switchovers given up", 60),
    ("vms brought back by force", 45),
];
/// Seeds in which the policy changes often.
const POLICY_SEEDS: u64 = 1500;
/// Seeds until a rule that was left out must have been noticed.
const MUTATED_SEEDS: u64 = 9000;
/// Cores of a small test machine.
const THREADS: usize = 2;
/// Seeds that break a rule until a long run ends: more of them say nothing new.
const TOLD: usize = 20;

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

/// What a seed is run by: one vm and its nodes, or a cluster.
type Run = fn(u64, Mutations, bool) -> Ran;

/// Runs a seed; a panic is a broken rule as well.
fn outcome(run: Run, seed: u64, mutations: Mutations) -> (Option<String>, Counts) {
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

/// Which seeds are run.
struct Extent {
    first: u64,
    seeds: u64,
    until: Option<Instant>,
    /// No more once so many have broken a rule.
    enough: usize,
}

impl Extent {
    fn until_one_breaks(first: u64, seeds: u64) -> Self {
        Self { first, seeds, until: None, enough: 1 }
    }

    fn of_environment(most: u64) -> Self {
        let first = number("COLO_SIM_FIRST").unwrap_or(0);
        let time = number("COLO_SIM_SECONDS").map(Duration::from_secs);
        let seeds = number("COLO_SIM_SEEDS").unwrap_or(if time.is_some() { u64::MAX - first } else { most });
        let until = time.map(|time| Instant::now() + time);
        Self { first, seeds, until, enough: if time.is_some() { TOLD } else { 1 } }
    }
}

/// What came of some seeds.
#[derive(Default)]
struct Found {
    broken: Vec<(u64, String)>,
    ran: u64,
    counts: Counts,
}

/// Runs seeds, on all threads.
fn search(run: Run, extent: &Extent, mutations: Mutations) -> Found {
    let (next, found) = (AtomicU64::new(extent.first), Mutex::new(Found::default()));
    let last = extent.first.saturating_add(extent.seeds);
    let is_over = || extent.until.is_some_and(|until| Instant::now() > until);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            let search = || {
                while !is_over() && found.lock().expect("no panic").broken.len() < extent.enough {
                    let seed = next.fetch_add(1, Ordering::SeqCst);
                    if seed >= last {
                        return;
                    }
                    let (broken, counts) = outcome(run, seed, mutations);
                    let mut found = found.lock().expect("no panic");
                    found.ran += 1;
                    found.counts.merge(&counts);
                    found.broken.extend(broken.map(|why| (seed, why)));
                }
            };
            let thread = std::thread::Builder::new().name(SIMULATED.to_owned());
            thread.spawn_scoped(scope, search).expect("a thread");
        }
    });
    found.into_inner().expect("no panic")
}

/// A seed with the last steps that led to what it broke.
fn retrace(run: Run, seed: u64, why: &str, mutations: Mutations) -> String {
    // It may end in a panic again.
    drop(catch_unwind(AssertUnwindSafe(|| run(seed, mutations, true))));
    format!("seed {seed}: {why}\n{}", trace())
}

/// Runs `most` seeds, or as the environment says, and wants `least` of what happens in that many.
#[expect(clippy::print_stdout, reason = "what was tried is told with the test")]
fn all_hold(run: Run, most: u64, least: &[(&str, u64)]) {
    quiet();
    if let Some(seed) = number("COLO_SEED") {
        let (broken, counts) = outcome(run, seed, Mutations::default());
        println!(
            "{}\n{counts:?}",
            retrace(run, seed, broken.as_deref().unwrap_or("no rule broken"), Mutations::default())
        );
        return assert_eq!(broken, None);
    }
    let (extent, begin) = (Extent::of_environment(most), Instant::now());
    let Found { broken, ran, counts } = search(run, &extent, Mutations::default());
    let rate = ran as f64 / begin.elapsed().as_secs_f64();
    println!("{ran} seeds from {} on, {rate:.0} a second, {} broke a rule", extent.first, broken.len());
    for (what, times) in &counts.0 {
        println!("{times:10} {what}");
    }
    for (seed, why) in broken.iter().skip(1) {
        println!("seed {seed}: {why}");
    }
    if let Some((seed, why)) = broken.first() {
        panic!("{}", retrace(run, *seed, why, Mutations::default()));
    }
    if ran >= most && extent.first == 0 {
        for &(what, least) in least {
            assert!(counts.of(what) >= least, "only {} {what} in {ran} seeds", counts.of(what));
        }
    }
}

#[test]
fn no_rule_is_broken_whatever_goes_wrong() {
    all_hold(world::run, SEEDS, &LEAST);
}

#[test]
fn a_cluster_heals_whatever_goes_wrong() {
    all_hold(cluster::run, CLUSTER_SEEDS, &CLUSTER_LEAST);
}

#[test]
fn what_was_found_once_stays_mended() {
    quiet();
    for (seed, run, bring_back, what) in PINNED {
        let mut wrong = Mutations::default();
        bring_back(&mut wrong);
        let around = Mutations { often_failing: wrong.failed_guest_left, ..Mutations::default() };
        let one = Extent::until_one_breaks(seed, 1);
        if let Some((_, why)) = search(run, &one, around).broken.first() {
            panic!("{what}\n{}", retrace(run, seed, why, around));
        }
        wrong.often_failing = around.often_failing;
        let broken = search(run, &one, wrong).broken;
        assert!(!broken.is_empty(), "seed {seed} does not show any more: {what}");
    }
}

/// Rules that only matter while the policy changes.
const POLICIES: [&str; 2] = ["keep_id_on_switch", "memory_acks_until_stored"];

/// A rule that only matters when a guest fails.
const FAILURES: &str = "failed_guest_left";

/// Each rule left out is noticed.
fn is_noticed(name: &str, run: Run, mutations: Mutations) -> String {
    quiet();
    let begin = Instant::now();
    let seeds = number("COLO_SIM_SEEDS").unwrap_or(MUTATED_SEEDS);
    let Found { broken, ran, .. } = search(run, &Extent::until_one_breaks(0, seeds), mutations);
    let (seed, why) = broken.first().unwrap_or_else(|| panic!("{name} went unnoticed in {ran} seeds"));
    format!("{name}: seed {seed} of {ran}, {:.1} s: {why}", begin.elapsed().as_secs_f64())
}

macro_rules! noticed {
    ($run:expr; $($name:ident: $($part:ident).+;)*) => {$(
        #[test]
        fn $name() {
            let mut mutations = Mutations::default();
            mutations.$($part).+ = true;
            mutations.often_other_policy = POLICIES.contains(&stringify!($name));
            mutations.often_failing = stringify!($name) == FAILURES;
            println!("{}", is_noticed(stringify!($name), $run, mutations));
        }
    )*};
}

/// Nothing is wrong where only the policy changes often, so that what a mutation breaks there is its own doing.
#[test]
fn no_rule_is_broken_while_the_policy_changes() {
    quiet();
    let mutations = Mutations { often_other_policy: true, ..Mutations::default() };
    let failing = Mutations { often_failing: true, ..Mutations::default() };
    for mutations in [failing, mutations] {
        let extent = Extent::until_one_breaks(number("COLO_SIM_FIRST").unwrap_or(0), POLICY_SEEDS);
        let Found { broken, ran, counts } = search(world::run, &extent, mutations);
        println!("{ran} seeds, {} changes of policy", counts.of("policy changes"));
        if let Some((seed, why)) = broken.first() {
            panic!("{}", retrace(world::run, *seed, why, mutations));
        }
    }
}

// Left to the model in `register_model`: `store_id_early` (the persist thread takes its orders one after the other, so
// the store has what was staged before), `promote_any_replica` and `seed_keeps_active` (the nodes ask for a whole copy,
// and the store forgets `active`, beside the rule), `start_for_another` (the nodes have no such command), and
// `take_any_hand_back` (needs a chain of three that no seed within reach has).
noticed! { world::run;
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

// What a cluster adds.
noticed! { cluster::run;
    nobody_heals: nobody_heals;
    endless_patience: endless_patience;
    spares_stay: spares_stay;
    endless_leases: endless_leases;
    force_unfenced: follower.force_unfenced;
}
