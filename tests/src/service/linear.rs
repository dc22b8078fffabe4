//! Whether a history is linearizable: whether some order of its operations, one at a time, each at an instant between
//! its request and its reply, gives exactly the replies that were seen.
//!
//! Keys do not touch each other, so each is looked at alone (Herlihy and Wing: a history is linearizable if it is at
//! each object). For one key this is the search of Wing and Gong with the memory that Lowe gave it: a state of the search
//! is what has been put in order and what the key holds then, and none is tried twice. An operation without a reply may
//! be put anywhere after its request, or nowhere. Hard only in the number of operations that overlap, not in the length
//! of the history.

use std::collections::{BTreeMap, BinaryHeap, HashSet};
use std::fmt;
use std::rc::Rc;
use std::time::Duration;

use super::history::{Op, Operation};
use super::resp::Reply;

/// States of the search for one key, before it is given up: some hundred MiB. A history that is linearizable takes
/// about as many as it has operations.
const MAX_STATES: usize = 2_000_000;
/// Answered operations that are gone back before two unanswered ones in a row are tried: more than overlap.
const STEP_BACK: usize = 16;
/// Operations that a message shows.
const SHOWN: usize = 12;

/// What was found out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is.
    Linearizable,
    /// It is not.
    Broken(Dead),
    /// This key's operations without a reply overlap with too much to find out.
    TooHard(String),
}

/// Where the longest order that could be found ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dead {
    /// The key.
    pub key: String,
    /// How many operations were put in order, of all that had a reply.
    pub ordered: (usize, usize),
    /// What the key held then.
    pub holds: Option<Vec<u8>>,
    /// What had to come next, and could not.
    pub next: Vec<Operation>,
}

impl fmt::Display for Dead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (ordered, all) = self.ordered;
        let holds = self.holds.as_deref().map(String::from_utf8_lossy);
        write!(
            f,
            "{}: {ordered} of {all} operations can be put in order; then it holds {holds:?}, and none of",
            self.key
        )?;
        write!(f, " these can come next:")?;
        self.next.iter().try_for_each(|o| {
            let (from, reply) = (o.sent, o.reply.as_ref());
            write!(f, "\n  client {}, sent at {from:?}: {:?} -> {reply:?}", o.client, o.op)
        })
    }
}

/// Does `op` to a key that holds `value`, as Redis does.
pub(super) fn apply(value: &mut Option<Vec<u8>>, op: &Op) -> Reply {
    match op {
        Op::Get => Reply::Bulk(value.clone()),
        Op::Set(new) => {
            *value = Some(new.clone());
            Reply::Status("OK".to_owned())
        }
        Op::Incr => match value.as_deref().map_or(Some(0), number).map(|n| n.checked_add(1)) {
            Some(Some(next)) => {
                *value = Some(next.to_string().into_bytes());
                Reply::Integer(next)
            }
            Some(None) => Reply::Error("ERR increment or decrement would overflow".to_owned()),
            None => Reply::Error("ERR value is not an integer or out of range".to_owned()),
        },
        Op::Append(bytes) => {
            let value = value.get_or_insert_default();
            value.extend(bytes);
            Reply::Integer(i64::try_from(value.len()).unwrap_or(i64::MAX))
        }
    }
}

/// A number only as it would be printed: no sign, zero or space in front that is not needed.
fn number(bytes: &[u8]) -> Option<i64> {
    let number: i64 = std::str::from_utf8(bytes).ok()?.parse().ok()?;
    (number.to_string().as_bytes() == bytes).then_some(number)
}

/// Whether the reply is that of the model; the wording of errors is the service's own.
fn same(model: &Reply, seen: &Reply) -> bool {
    match (model, seen) {
        (Reply::Error(_), Reply::Error(seen)) => is_about_number(seen),
        (model, seen) => model == seen,
    }
}

fn is_about_number(error: &str) -> bool {
    error.contains("not an integer") || error.contains("overflow")
}

/// Looks at all keys; each held nothing at first.
pub fn check(operations: &[Operation]) -> Verdict {
    let mut keys: BTreeMap<&str, Vec<&Operation>> = BTreeMap::new();
    for operation in operations {
        let tells = match &operation.reply {
            // A service that refuses before it does anything: not ready, no room.
            Some((_, Reply::Error(text))) => is_about_number(text),
            Some(_) => true,
            None => operation.op != Op::Get,
        };
        if tells {
            keys.entry(&operation.key).or_default().push(operation);
        }
    }
    let verdicts = keys.into_iter().map(|(key, operations)| Search::new(key, operations).run());
    verdicts.into_iter().find(|verdict| *verdict != Verdict::Linearizable).unwrap_or(Verdict::Linearizable)
}

/// What has been put in order, and what the key holds after it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct State {
    /// All answered operations before this one.
    base: usize,
    /// Those of the answered ones from there on, ascending.
    beyond: Vec<usize>,
    /// Those of the unanswered ones, ascending.
    open: Vec<usize>,
    /// So many unanswered ones came last. If what follows hides what they did, they can as well be left out, and be had
    /// later: so that is not tried.
    unseen: usize,
    value: Option<Vec<u8>>,
}

struct Search<'a> {
    key: &'a str,
    /// Operations with a reply, and when it came, in the order of their requests.
    answered: Vec<(&'a Operation, Duration, &'a Reply)>,
    /// Those without, in that order too.
    open: Vec<&'a Operation>,
    seen: HashSet<Rc<State>>,
}

impl<'a> Search<'a> {
    fn new(key: &'a str, mut operations: Vec<&'a Operation>) -> Self {
        operations.sort_by_key(|operation| operation.sent);
        let (mut answered, mut open) = (Vec::new(), Vec::new());
        for operation in operations {
            match &operation.reply {
                Some((at, reply)) => answered.push((operation, *at, reply)),
                None => open.push(operation),
            }
        }
        Self { key, answered, open, seen: HashSet::new() }
    }

    /// Goes deeper first. Unanswered operations are tried only where no order of the answered ones gets on: so they cost
    /// nothing where they did not happen.
    fn run(mut self) -> Verdict {
        let start = State { base: 0, beyond: Vec::new(), open: Vec::new(), unseen: 0, value: None };
        let mut best = Rc::new(start.clone());
        let (mut stack, mut stuck) = (vec![Rc::new(start)], BinaryHeap::new());
        loop {
            while let Some(state) = stack.pop() {
                if state.base == self.answered.len() {
                    return Verdict::Linearizable;
                }
                if state.ordered() > best.ordered() {
                    best = Rc::clone(&state);
                }
                self.take(self.by_answered(&state), &mut stack);
                stuck.push((state.promise(), state));
            }
            match stuck.pop() {
                None => return Verdict::Broken(self.dead(&best)),
                Some(_) if self.seen.len() > MAX_STATES => return Verdict::TooHard(self.key.to_owned()),
                Some((_, state)) => self.take(self.by_open(&state), &mut stack),
            }
        }
    }

    /// Those that are new are to be tried.
    fn take(&mut self, states: Vec<State>, stack: &mut Vec<Rc<State>>) {
        for state in states.into_iter().map(Rc::new) {
            if self.seen.insert(Rc::clone(&state)) {
                stack.push(state);
            }
        }
    }

    /// Answered operations that may come next, and until when one must have: the first reply of any that is not in order
    /// yet. What was sent after that came later than that one.
    fn candidates(&self, state: &State) -> (Vec<usize>, Duration) {
        let mut until = Duration::MAX;
        let mut candidates = Vec::new();
        for (index, (operation, at, _)) in self.answered.iter().enumerate().skip(state.base) {
            if operation.sent > until {
                break;
            }
            if state.beyond.binary_search(&index).is_err() {
                until = until.min(*at);
                candidates.push(index);
            }
        }
        (candidates, until)
    }

    /// With one answered operation more; the most promising last, that with the earliest reply.
    fn by_answered(&self, state: &State) -> Vec<State> {
        let (mut candidates, _) = self.candidates(state);
        candidates.sort_by_key(|index| std::cmp::Reverse(self.answered[*index].1));
        let mut next = Vec::new();
        for index in candidates {
            let (operation, _, seen) = self.answered[index];
            let mut value = state.value.clone();
            let hides = state.unseen > 0 && operation.hides();
            if !hides && same(&apply(&mut value, &operation.op), seen) {
                next.push(state.with(index, value));
            }
        }
        next
    }

    /// With one more of those without a reply. What it would have been answered is nobody's business. Of equal ones the
    /// first sent will do: wherever another can be put, it can.
    fn by_open(&self, state: &State) -> Vec<State> {
        let (_, until) = self.candidates(state);
        let (mut next, mut tried) = (Vec::new(), HashSet::new());
        for (index, operation) in self.open.iter().enumerate().take_while(|(_, open)| open.sent <= until) {
            let Err(at) = state.open.binary_search(&index) else { continue };
            let mut after = State { unseen: state.unseen + 1, ..state.clone() };
            let _ = apply(&mut after.value, &operation.op);
            after.open.insert(at, index);
            let hides = state.unseen > 0 && operation.hides();
            if !hides && tried.insert(&operation.op) && after.value != state.value {
                next.push(after);
            }
        }
        next
    }

    fn dead(&self, best: &State) -> Dead {
        let (candidates, _) = self.candidates(best);
        let next = candidates.iter().take(SHOWN).map(|index| self.answered[*index].0.clone()).collect();
        let ordered = (best.ordered(), self.answered.len());
        Dead { key: self.key.to_owned(), ordered, holds: best.value.clone(), next }
    }
}

impl State {
    /// How many answered operations are in order.
    fn ordered(&self) -> usize {
        self.base + self.beyond.len()
    }

    /// Where to go on first when stuck: far on, but rather a little further back than with one unanswered operation after
    /// the other.
    fn promise(&self) -> isize {
        self.ordered() as isize - (self.unseen * STEP_BACK) as isize
    }

    /// With one more of the answered ones.
    fn with(&self, index: usize, value: Option<Vec<u8>>) -> Self {
        let mut after = Self { value, unseen: 0, ..self.clone() };
        if let Err(at) = after.beyond.binary_search(&index) {
            after.beyond.insert(at, index);
        }
        let run = after.beyond.iter().enumerate().take_while(|(n, index)| after.base + n == **index).count();
        after.beyond.drain(..run);
        after.base += run;
        after
    }
}

#[cfg(test)]
mod tests;
