//! Output commit as a property: frames and console bytes in one order, from the guest's `egress` over release and
//! replicator of a runner to the replica and the held output of a follower, and on through promotions. Whatever the order
//! of output, cuts, acks, lost links, crashes and promotions: what each node lets out is in order, all of it together is
//! of one history, and nothing of an epoch that nobody holds is in it.
//!
//! The simulation has the same rules among all others. Here is nothing but output, so that far more of it is tried, and
//! what breaks a rule comes out short.

#[path = "output_commit/cluster.rs"]
mod cluster;
#[path = "output_commit/fixture.rs"]
mod fixture;
#[path = "output_commit/follower.rs"]
mod follower;
#[path = "output_commit/plan.rs"]
mod plan;
#[path = "output_commit/runner.rs"]
mod runner;
#[path = "output_commit/world.rs"]
mod world;

use cluster::Cluster;
use colo_secondary::replica::AckPolicy;
use plan::{Counts, Mutations, Op};
use proptest::collection::vec;
use proptest::prelude::{Just, Strategy, any, prop_oneof};
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};
use std::cell::RefCell;

/// Interleavings of a run of the test.
const CASES: u32 = 12_000;
/// Interleavings in which a rule that was left out must be noticed.
const MUTATED_CASES: u32 = 3000;
/// Steps of an interleaving at most: enough for two promotions with all that leads to them.
const STEPS: usize = 400;
/// How often that many interleavings must have seen each at least: else little was tried.
const LEAST: [(&str, u64); 9] = [
    ("bytes let out", 1_000_000),
    ("epochs acked", 20_000),
    ("frames let out", 40_000),
    ("let out again", 1_000),
    ("links made again", 1_000),
    ("output told again", 1_000),
    ("promotions", 1_000),
    ("second promotions", 100),
    ("stores read back", 100),
];

fn op() -> impl Strategy<Value = Op> {
    let node = 0..2_usize;
    prop_oneof![
        6 => (1..4_u8).prop_map(Op::Say),
        6 => Just(Op::Send),
        8 => Just(Op::Cut),
        4 => (1..4_u8).prop_map(Op::Deliver),
        4 => (1..4_u8).prop_map(Op::Hear),
        2 => Just(Op::Persist),
        3 => Just(Op::Connect),
        2 => Just(Op::Disconnect),
        3 => (node.clone(), any::<bool>()).prop_map(|(node, answered)| Op::Arbiter { node, answered }),
        1 => node.clone().prop_map(Op::GoSolo),
        1 => node.clone().prop_map(Op::Promote),
        1 => node.clone().prop_map(Op::Crash),
        5 => node.clone().prop_map(Op::Start),
        2 => node.prop_map(Op::Observe),
        6 => Just(Op::Settle),
    ]
}

fn policy() -> impl Strategy<Value = AckPolicy> {
    prop_oneof![Just(AckPolicy::Memory), Just(AckPolicy::Disk)]
}

/// Runs interleavings until one breaks a rule.
fn search(cases: u32, mutations: Mutations) -> (Result<(), String>, Counts) {
    let shrinks = if mutations == Mutations::default() { 20_000 } else { 0 };
    let config = Config { cases, failure_persistence: None, max_shrink_iters: shrinks, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let all = RefCell::new(Counts::default());
    let found = runner.run(&(policy(), vec(op(), 1..STEPS)), |(policy, ops)| {
        let mut cluster = Cluster::new(policy, mutations);
        let done = ops.into_iter().try_for_each(|op| cluster.step(op));
        all.borrow_mut().merge(&cluster.counts());
        done.map_err(TestCaseError::fail)
    });
    (found.map_err(|e| e.to_string()), all.into_inner())
}

#[test]
fn what_is_let_out_is_one_history_in_order_and_acked() {
    let (found, counts) = search(CASES, Mutations::default());
    for (what, times) in counts.all() {
        println!("{times:10} {what}");
    }
    found.unwrap_or_else(|why| panic!("{why}"));
    for (what, least) in LEAST {
        assert!(counts.of(what) >= least, "only {} {what}", counts.of(what));
    }
}

macro_rules! noticed {
    ($($name:ident;)*) => {$(
        #[test]
        fn $name() {
            let mutations = Mutations { $name: true, ..Mutations::default() };
            let (found, _) = search(MUTATED_CASES, mutations);
            let why = found.expect_err("it went unnoticed");
            println!("{}: {}", stringify!($name), why.lines().next().unwrap_or_default());
        }
    )*};
}

noticed! {
    release_before_ack;
    output_not_told_again;
    order_swapped;
    failed_output_dropped;
    held_output_dropped;
    held_output_not_cut_off;
}
