//! Histories that a right service made pass, and those of services that forget, lag or answer out of order do not; where
//! a history is short, another implementation has to agree.

use proptest::prelude::*;
use stateright::semantics::{ConsistencyTester, LinearizabilityTester, SequentialSpec};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::super::history::{Op, Operation};
use super::super::resp::Reply;
use super::{Verdict, apply, check, number, same};
use crate::seed::Seed;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn ok() -> Reply {
    Reply::Status("OK".to_owned())
}

fn holds(text: &str) -> Reply {
    Reply::Bulk(Some(text.as_bytes().to_vec()))
}

fn set(text: &str) -> Op {
    Op::Set(text.as_bytes().to_vec())
}

/// What client, from when until when, and how it was answered.
fn did(client: u32, from: u64, until: u64, op: Op, reply: Reply) -> Operation {
    Operation { client, key: "k".to_owned(), op, sent: ms(from), reply: Some((ms(until), reply)) }
}

fn unanswered(client: u32, from: u64, op: Op) -> Operation {
    Operation { client, key: "k".to_owned(), op, sent: ms(from), reply: None }
}

fn good(operations: &[Operation]) {
    assert_eq!(check(operations), Verdict::Linearizable);
}

fn broken(operations: &[Operation]) -> String {
    match check(operations) {
        Verdict::Broken(dead) => dead.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_acknowledged_write_that_is_lost_is_found() {
    let before = [did(0, 0, 1, set("1"), ok()), did(0, 2, 3, set("2"), ok())];
    good(&[&before[..], &[did(0, 4, 5, Op::Get, holds("2"))]].concat());
    let said = broken(&[&before[..], &[did(0, 4, 5, Op::Get, holds("1"))]].concat());
    assert!(said.contains("2 of 3") && said.contains("\"2\""), "{said}");
    broken(&[&before[..], &[did(0, 4, 5, Op::Get, Reply::Bulk(None))]].concat());
}

#[test]
fn reads_beside_a_write_may_see_it_or_not_but_never_go_back() {
    let write = did(0, 0, 10, set("1"), ok());
    let (old, new) = (Reply::Bulk(None), holds("1"));
    good(&[write.clone(), did(1, 1, 2, Op::Get, old.clone()), did(2, 3, 4, Op::Get, new.clone())]);
    good(&[write.clone(), did(1, 1, 4, Op::Get, old.clone()), did(2, 3, 5, Op::Get, new.clone())]);
    good(&[write.clone(), did(1, 1, 4, Op::Get, new.clone()), did(2, 3, 5, Op::Get, old.clone())]);
    broken(&[write.clone(), did(1, 1, 2, Op::Get, new), did(2, 3, 4, Op::Get, old.clone())]);
    broken(&[write, did(1, 11, 12, Op::Get, old)]);
}

#[test]
fn a_write_without_a_reply_may_happen_late_or_never_but_once() {
    let start = [did(0, 0, 1, set("0"), ok()), unanswered(1, 2, Op::Incr)];
    let read = |from, text| did(0, from, from + 1, Op::Get, holds(text));
    good(&[&start[..], &[read(3, "0"), read(5, "0")]].concat());
    good(&[&start[..], &[read(3, "0"), read(5, "1")]].concat());
    broken(&[&start[..], &[read(3, "0"), read(5, "2")]].concat());
    broken(&[&start[..], &[read(3, "1"), read(5, "0")]].concat());
    let early = [did(0, 0, 1, set("0"), ok()), did(0, 2, 3, Op::Get, holds("1")), unanswered(1, 4, Op::Incr)];
    broken(&early);
}

#[test]
fn keys_are_looked_at_each_by_itself() {
    let mut other = did(0, 2, 3, Op::Get, Reply::Bulk(None));
    other.key = "other".to_owned();
    let mine = [did(0, 0, 1, set("1"), ok()), other.clone()];
    good(&mine);
    other.reply = Some((ms(3), holds("1")));
    assert!(broken(&[mine[0].clone(), other]).starts_with("other: 0 of 1"));
}

#[test]
fn replies_out_of_order_are_found() {
    let append =
        |client, from, until, len| did(client, from, until, Op::Append(b"a".to_vec()), Reply::Integer(len));
    good(&[append(0, 0, 3, 2), append(1, 1, 2, 1)]);
    broken(&[append(0, 0, 1, 2), append(1, 2, 3, 1)]);
    broken(&[append(0, 0, 3, 1), append(1, 1, 2, 1)]);
}

#[test]
fn counting_is_the_service_s() {
    for (text, wanted) in [("0", Some(0)), ("-7", Some(-7)), ("9223372036854775807", Some(i64::MAX))] {
        assert_eq!(number(text.as_bytes()), wanted);
    }
    for text in ["", "00", "+1", "-0", " 1", "1 ", "9223372036854775808", "x", "\u{661}"] {
        assert_eq!(number(text.as_bytes()), None, "{text:?}");
    }
    let not_a_number = Reply::Error("ERR value is not an integer or out of range".to_owned());
    good(&[did(0, 0, 1, set("x"), ok()), did(0, 2, 3, Op::Incr, not_a_number.clone())]);
    broken(&[did(0, 0, 1, set("1"), ok()), did(0, 2, 3, Op::Incr, not_a_number)]);
    good(&[did(0, 0, 1, Op::Incr, Reply::Integer(1))]);
    // One that was refused for another reason did nothing.
    let refused = Reply::Error("LOADING the data set".to_owned());
    good(&[did(0, 0, 1, set("1"), refused), did(0, 2, 3, Op::Get, Reply::Bulk(None))]);
}

/// Operations after which a stale read cannot be taken for one that was beside a change.
const OVERLAP: usize = 6;

/// What a service does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wrong {
    Nothing,
    /// It goes back to an earlier state once, as after a failover to a copy that lagged.
    GoesBack,
    /// One read is answered by what was there some time before.
    StaleRead,
    /// Two replies are exchanged.
    Swapped,
}

/// A history as a service makes it that does each operation at one instant between request and reply: clients one after
/// another at random times, some replies lost, of which some operations never happened. No two times are equal.
fn make(seed: &mut Seed, clients: u32, operations: u32, wrong: Wrong) -> Vec<Operation> {
    make_with(seed, clients, operations, wrong, 12)
}

/// One reply of so many is lost.
fn make_with(seed: &mut Seed, clients: u32, operations: u32, wrong: Wrong, one_of: u64) -> Vec<Operation> {
    // Request, instant, reply, client, op.
    let mut plan = Vec::new();
    let mut free: BTreeMap<u32, u64> = (0..clients).map(|client| (client, 0)).collect();
    let mut times = BTreeSet::new();
    let mut time = |seed: &mut Seed, from: u64, spread: u64| {
        let mut at = from + 1 + seed.below(spread);
        while !times.insert(at) {
            at += 1;
        }
        at
    };
    let mut fresh = clients;
    for number in 0..operations {
        let client = *free.keys().nth(seed.below(u64::from(clients)) as usize).unwrap();
        let from = time(seed, free[&client], 20);
        let at = time(seed, from, 40);
        let until = time(seed, at, 40);
        let op = match seed.below(8) {
            0..3 => Op::Get,
            3..6 => set(&(1000 * (number + 1)).to_string()),
            6 => Op::Incr,
            _ => Op::Append(b"7".to_vec()),
        };
        free.remove(&client);
        let lost = seed.below(one_of) == 0;
        // Who lost a reply goes on as another client.
        free.insert(if lost { fresh } else { client }, until);
        fresh += u32::from(lost);
        plan.push((from, at, (!lost).then_some(until), client, op));
    }
    answer(seed, plan, wrong)
}

type Planned = (u64, u64, Option<u64>, u32, Op);

fn answer(seed: &mut Seed, mut plan: Vec<Planned>, wrong: Wrong) -> Vec<Operation> {
    plan.sort_by_key(|(_, at, ..)| *at);
    let goes_back = seed.below(plan.len() as u64) as usize;
    let stale = plan.iter().skip(goes_back).position(|planned| planned.4 == Op::Get);
    let stale = stale.map(|more| goes_back + more);
    let (mut value, mut states) = (None, vec![None]);
    let mut history = Vec::new();
    for (number, (from, _, until, client, op)) in plan.into_iter().enumerate() {
        if wrong == Wrong::GoesBack && number == goes_back {
            let back = 1 + seed.below(4) as usize;
            value = states[states.len().saturating_sub(1 + back)].clone();
        }
        let mut reply = None;
        // One without a reply may not have happened.
        if until.is_some() || seed.below(2) == 0 {
            reply = Some(apply(&mut value, &op));
        }
        if wrong == Wrong::StaleRead && stale == Some(number) {
            let other = states.iter().rev().skip(OVERLAP).find(|state| **state != value);
            reply = Some(Reply::Bulk(other.cloned().flatten()));
        }
        states.push(value.clone());
        let reply = until.map(ms).zip(reply);
        history.push(Operation { client, key: "k".to_owned(), op, sent: ms(from), reply });
    }
    if wrong == Wrong::Swapped {
        swap(seed, &mut history);
    }
    history
}

fn swap(seed: &mut Seed, history: &mut [Operation]) {
    let mut pick = || seed.below(history.len() as u64) as usize;
    let (a, b) = (pick(), pick());
    let of = |n: usize| history[n].reply.as_ref().map(|(_, reply)| reply.clone());
    let (first, second) = (of(a), of(b));
    for (n, other) in [(a, second), (b, first)] {
        if let (Some((_, reply)), Some(other)) = (&mut history[n].reply, other) {
            *reply = other;
        }
    }
}

/// The same register for the other implementation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Register(Option<Vec<u8>>);

impl SequentialSpec for Register {
    type Op = Op;
    type Ret = Reply;

    fn invoke(&mut self, op: &Op) -> Reply {
        apply(&mut self.0, op)
    }

    fn is_valid_step(&mut self, op: &Op, ret: &Reply) -> bool {
        same(&self.invoke(op), ret)
    }
}

fn other_says(history: &[Operation]) -> bool {
    let mut events = Vec::new();
    for operation in history {
        events.push((operation.sent, operation, None));
        events.extend(operation.reply.as_ref().map(|(at, reply)| (*at, operation, Some(reply))));
    }
    events.sort_by_key(|(at, ..)| *at);
    let mut tester = LinearizabilityTester::new(Register::default());
    for (_, operation, reply) in events {
        match reply {
            None => tester.on_invoke(operation.client, operation.op.clone()).unwrap(),
            Some(reply) => tester.on_return(operation.client, reply.clone()).unwrap(),
        };
    }
    tester.is_consistent()
}

fn says(history: &[Operation]) -> bool {
    match check(history) {
        Verdict::Linearizable => true,
        Verdict::Broken(_) => false,
        Verdict::TooHard(key) => panic!("{key} is too hard"),
    }
}

fn any_wrong() -> impl Strategy<Value = Wrong> {
    prop_oneof![Just(Wrong::Nothing), Just(Wrong::GoesBack), Just(Wrong::StaleRead), Just(Wrong::Swapped)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn what_a_right_service_did_is_linearizable(seed in any::<u64>(), clients in 1_u32..6) {
        let history = make(&mut Seed::new(seed), clients, 300, Wrong::Nothing);
        prop_assert_eq!(check(&history), Verdict::Linearizable);
    }

    #[test]
    fn another_implementation_agrees(seed in any::<u64>(), clients in 1_u32..4, wrong in any_wrong()) {
        let history = make(&mut Seed::new(seed), clients, 9, wrong);
        prop_assert_eq!(says(&history), other_says(&history), "{:?}", history);
    }

    /// With one client and no lost reply every order is fixed, so that any wrong value must show.
    #[test]
    fn a_value_that_was_not_there_is_always_found(seed in any::<u64>(), operations in 2_usize..60) {
        let mut seed = Seed::new(seed);
        let mut history = make(&mut seed, 1, 60, Wrong::Nothing);
        history.truncate(operations);
        history.retain(|operation| operation.reply.is_some());
        let last = Duration::from_secs(3600);
        history.push(Operation { sent: last, ..did(0, 0, 0, Op::Get, holds("never written")) });
        history.last_mut().unwrap().reply.as_mut().unwrap().0 = last * 2;
        prop_assert!(!says(&history));
    }
}

/// How many of these seeds' histories of a service that is wrong in this way are found out.
fn found(wrong: Wrong, runs: u64) -> u64 {
    (0..runs).filter(|seed| !says(&make(&mut Seed::new(*seed), 3, 100, wrong))).count() as u64
}

#[test]
fn services_that_are_wrong_are_found_out() {
    // Not every time: a write that is lost may be overwritten before anybody reads, or nobody was told of it.
    for (wrong, at_least) in [(Wrong::GoesBack, 30), (Wrong::StaleRead, 60), (Wrong::Swapped, 60)] {
        let found = found(wrong, 100);
        assert!(found >= at_least, "{wrong:?}: {found} of 100");
    }
}

/// As long as a history of fault tests: time in proportion to its length, and open operations do no harm.
#[test]
fn long_histories_with_many_unanswered_operations_are_no_trouble() {
    let history = make_with(&mut Seed::new(1), 8, 10_000, Wrong::Nothing, 100);
    assert!(history.iter().filter(|operation| operation.reply.is_none()).count() > 80);
    good(&history);
}
