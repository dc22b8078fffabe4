//! What came of a fault, and which promises it broke.

use anyhow::Context;
use std::time::{Duration, Instant};

use super::plan::{Expected, Fault, Harm, Party};
use super::watcher::{Seen as Entry, check_chain, runners, unprotected};
use super::world::{Roles, World};
use crate::lab::speakers::turns;
use crate::lab::streams::Streams;
use crate::service::history::History;
use crate::service::linear::{Verdict, check};

/// What is known of a fault when it is over.
pub struct Step {
    pub(super) fault: Fault,
    roles: Roles,
    /// Just before it.
    pub(super) struck: Instant,
    pub(super) repaired: Instant,
    /// When the guest was protected and the third node waited again.
    pub(super) whole: Instant,
    pub(super) answered_before_repair: bool,
    /// From the fault to the suspicion, and from there to the first vCPU.
    pub(super) promotion: Option<(Duration, Duration)>,
    pub(super) history: Option<History>,
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The fault's name.
    pub fault: String,
    /// What was expected.
    pub expected: Expected,
    /// What happened, in words.
    pub outcome: String,
    /// Whether that is what was expected.
    pub is_expected: bool,
    /// Promises that were broken.
    pub violations: Vec<String>,
    /// What a node said of why nobody goes on.
    pub told: Option<String>,
    /// From the fault to the suspicion of the node that took over.
    pub detection: Option<Duration>,
    /// From the fault to the register's first change.
    pub register: Option<Duration>,
    /// From the suspicion to the first vCPU.
    pub promotion: Option<Duration>,
    /// Without a pair in the register.
    pub unprotected: Duration,
    /// The longest that no client got an answer.
    pub gap: Option<Duration>,
    /// Frames of a node whose part was over.
    pub late: usize,
}

impl Step {
    pub(super) fn new(fault: Fault, roles: Roles, struck: Instant) -> Self {
        Self {
            fault,
            roles,
            struck,
            repaired: struck,
            whole: struck,
            answered_before_repair: false,
            promotion: None,
            history: None,
        }
    }

    /// Entries since just before the fault; the first is the one that was there.
    fn entries(&self, seen: &[Entry]) -> Vec<Entry> {
        let from = seen.iter().rposition(|(at, _)| *at <= self.struck).unwrap_or(0);
        seen[from..].to_vec()
    }
}

/// Looks at everything that was recorded.
///
/// # Errors
/// Something was not recorded.
pub fn judge(world: &World, step: &Step) -> anyhow::Result<Seen> {
    let all = world.watcher.seen();
    let entries = step.entries(&all);
    let order = runners(&all, step.struck);
    let (mut violations, late) = listen(world, step, &order)?;
    violations.extend(check_chain(&all).err().map(|e| format!("the register: {e:#}")));
    violations.extend(world.cluster.ledger().check_history().err().map(|e| format!("the console: {e:#}")));
    let history = step.history.as_ref();
    violations.extend(history.into_iter().flat_map(broken));
    let expected = step.fault.expected();
    let (outcome, is_expected) = outcome(step, &entries, &order);
    let register = entries.get(1).map(|(at, _)| at.saturating_duration_since(step.struck));
    Ok(Seen {
        fault: step.fault.to_string(),
        expected,
        outcome,
        is_expected,
        violations,
        told: None,
        detection: step.promotion.map(|(detection, _)| detection),
        register,
        promotion: step.promotion.map(|(_, promotion)| promotion),
        unprotected: unprotected(&all, step.struck),
        gap: history.map(|history| history.longest_gap(history.at(step.struck)).length()),
        late,
    })
}

/// What happened, in words, and whether it is as expected.
fn outcome(step: &Step, entries: &[Entry], order: &[String]) -> (String, bool) {
    let Roles { primary, .. } = &step.roles;
    let untouched = entries.len() == 1;
    let stayed = order.last() == Some(primary);
    let what = match (untouched, stayed) {
        (true, _) => "went on, protected",
        (false, true) => "stayed",
        (false, false) => "moved",
    };
    let soon = step.answered_before_repair;
    let good = match step.fault.expected() {
        Expected::Untouched => untouched && soon,
        Expected::Stays => stayed && soon,
        Expected::Moves => !stayed && soon,
        Expected::Either => soon,
        Expected::Repaired => true,
        Expected::Nobody => untouched,
    };
    (format!("{what}{}", if soon { "" } else { ", after the repair" }), good)
}

/// What clients saw that no service does.
fn broken(history: &History) -> Vec<String> {
    let mut broken = Vec::new();
    let trouble = (history.resets, history.timeouts, history.refused.0);
    if trouble != (0, 0, 0) {
        broken.push(format!("clients' resets, timeouts and refusals: {trouble:?}"));
    }
    match check(&history.operations) {
        Verdict::Linearizable => {}
        Verdict::Broken(dead) => broken.push(format!("the clients' history is not linearizable: {dead}")),
        other => broken.push(format!("the clients' history is not decided: {other:?}")),
    }
    broken
}

/// Who spoke for the guest, and what: each in the register's order, and nobody another thing than was said. Late frames
/// of a node that stood still are counted: as on a slow network, they may come, and say nothing new.
fn listen(world: &World, step: &Step, order: &[String]) -> anyhow::Result<(Vec<String>, usize)> {
    let said = world.speakers.said().context("listening")?;
    let mut streams = Streams::default();
    said.iter().for_each(|(node, frame)| streams.take(node, frame));
    let mut violations = Vec::new();
    if let (count, Some(first)) = &streams.conflicts {
        violations.push(format!("{count} bytes that nodes let out conflict: {first}"));
    }
    if streams.resets > 0 {
        violations.push(format!("{} connections were broken off by the guest", streams.resets));
    }
    if streams.forgotten > 0 {
        violations.push(format!("{} bytes were not compared", streams.forgotten));
    }
    let spoke = turns(&said);
    let (mut at, mut late) = (0, 0);
    for turn in &spoke {
        match order[at..].iter().position(|node| *node == turn.node) {
            Some(further) => at += further,
            None => late += turn.frames,
        }
    }
    let froze = step.fault.harm(Party::Primary) == Some(Harm::Freeze);
    if late > 0 && !froze {
        violations.push(format!("{late} frames out of turn: the register says {order:?}, and {spoke:?}"));
    }
    Ok((violations, late))
}
