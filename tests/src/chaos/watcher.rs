//! Reads the register all the time: every entry that was seen, and when.

use anyhow::{Context, ensure};
use colo_common::VmId;
use colo_common::arbiter::Arbiter;
use colo_common::register::{Entry, Value};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Between two looks.
const POLL: Duration = Duration::from_millis(10);

/// An entry, and when it was seen first.
pub type Seen = (Instant, Entry);

/// The thread that reads; it ends with this value.
pub struct Watcher {
    seen: Arc<Mutex<Vec<Seen>>>,
    ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    /// Begins.
    ///
    /// # Errors
    /// There is no thread left.
    pub fn start(arbiter: Arc<dyn Arbiter>, vm: VmId) -> anyhow::Result<Self> {
        let (seen, ending) = (Arc::<Mutex<Vec<Seen>>>::default(), Arc::<AtomicBool>::default());
        let (into, end) = (Arc::clone(&seen), Arc::clone(&ending));
        let thread = std::thread::Builder::new().name("watcher".to_owned()).spawn(move || {
            while !end.load(Ordering::SeqCst) {
                if let Ok(Some(entry)) = arbiter.read(&vm) {
                    let mut seen = into.lock().unwrap_or_else(PoisonError::into_inner);
                    if seen.last().is_none_or(|(_, last)| *last != entry) {
                        seen.push((Instant::now(), entry));
                    }
                }
                std::thread::sleep(POLL);
            }
        });
        Ok(Self { seen, ending, thread: Some(thread.context("a thread")?) })
    }

    /// Everything so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The newest.
    pub fn last(&self) -> Option<Entry> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).last().map(|(_, entry)| entry.clone())
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::SeqCst);
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            tracing::error!("the register's watcher had panicked");
        }
    }
}

/// One entry for each term, in order, each a change that the rules allow on the one before, where that was seen.
///
/// # Errors
/// The first two that are no history.
pub fn check_chain(seen: &[Seen]) -> anyhow::Result<()> {
    for pair in seen.windows(2) {
        let [(_, before), (_, after)] = pair else { continue };
        ensure!(after.term > before.term, "the register went from {before} to {after}");
        let next = before.term.next() == after.term;
        ensure!(!next || may_follow(&before.value, &after.value), "{after} cannot follow {before}");
    }
    Ok(())
}

fn may_follow(before: &Value, after: &Value) -> bool {
    let runner = before.runner();
    match (before, after) {
        (Value::Paired { secondary, .. }, Value::Solo { node, .. }) => node == runner || node == secondary,
        // The same process or a new one, or handed back: another node, which ran before it.
        (Value::Solo { .. }, Value::Solo { .. }) => true,
        (Value::Solo { .. }, Value::Paired { primary, .. }) => primary == runner,
        (Value::Paired { .. }, Value::Paired { .. }) => false,
        (Value::Stopped { .. }, Value::Solo { node, .. }) => node == runner,
        (_, Value::Stopped { node, .. }) => node == runner,
        (Value::Stopped { .. }, Value::Paired { .. }) => false,
    }
}

/// How long the register named no pair, from `since` on; what it was at `since` counts.
pub fn unprotected(seen: &[Seen], since: Instant) -> Duration {
    let mut total = Duration::ZERO;
    for (n, (at, entry)) in seen.iter().enumerate() {
        let until = seen.get(n + 1).map_or_else(Instant::now, |(next, _)| *next);
        if !matches!(entry.value, Value::Paired { .. }) {
            total += until.saturating_duration_since((*at).max(since));
        }
    }
    total
}

/// The nodes that ran the guest from `since` on, each turn once, and first the one that ran it then.
pub fn runners(seen: &[Seen], since: Instant) -> Vec<String> {
    let from = seen.iter().rposition(|(at, _)| *at <= since).unwrap_or(0);
    let mut runners: Vec<String> = seen[from..].iter().map(|(_, e)| e.value.runner().to_string()).collect();
    runners.dedup();
    runners
}

#[cfg(test)]
mod tests {
    use super::{Seen, check_chain, runners, unprotected};
    use colo_common::register::{Entry, Value};
    use colo_common::{Incarnation, ProposalId, ReplicaId, Term};
    use std::time::{Duration, Instant};

    fn solo(node: &str) -> Value {
        Value::Solo { node: node.parse().unwrap(), incarnation: Incarnation::draw() }
    }

    fn paired(primary: &str, secondary: &str) -> Value {
        let (primary, secondary) = (primary.parse().unwrap(), secondary.parse().unwrap());
        Value::Paired { primary, secondary, replica: ReplicaId::draw() }
    }

    fn history(start: Instant, values: Vec<(u64, Value)>) -> Vec<Seen> {
        let entry = |(term, value)| Entry { term: Term(term), proposal: ProposalId::draw(), value };
        let second = |n: u32| start + Duration::from_secs(n.into());
        (0..).zip(values).map(|(n, value)| (second(n), entry(value))).collect()
    }

    #[test]
    fn terms_ascend_by_changes_that_are_allowed() {
        let now = Instant::now();
        let good = [(1, solo("a")), (2, paired("a", "b")), (3, solo("b")), (4, paired("b", "c"))];
        let seen = history(now, good.to_vec());
        check_chain(&seen).unwrap();
        assert_eq!(runners(&seen, now + Duration::from_millis(1500)), ["a", "b"]);
        assert_eq!(unprotected(&seen, now + Duration::from_millis(500)), Duration::from_millis(1500));
        for bad in [
            vec![(2, paired("a", "b")), (3, solo("c"))],
            vec![(2, paired("a", "b")), (2, solo("b"))],
            vec![(2, solo("a")), (3, paired("b", "a"))],
            vec![(2, paired("a", "b")), (3, paired("a", "c"))],
        ] {
            check_chain(&history(now, bad)).unwrap_err();
        }
        check_chain(&history(now, vec![(2, paired("a", "b")), (4, paired("a", "c"))])).unwrap();
    }
}
