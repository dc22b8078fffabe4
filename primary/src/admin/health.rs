//! Whether a node does its part, judged by its account alone.

use colo_common::NodeId;
use colo_common::register::Value;
use colo_proto::v1::HealthReply;
use std::time::{Duration, Instant};

use super::Plane;
use crate::drain::Drain;
use crate::node::status::{Role, Status};

/// An arbiter that was asked each second and has not answered for so long does not answer.
const ARBITER_PATIENCE: Duration = Duration::from_secs(5);
/// How long an error is told as a problem.
const RECENT: Duration = Duration::from_secs(60);

impl Plane {
    /// The judgement on this node, as of now.
    pub(super) fn health(&self) -> HealthReply {
        let mut reply = of(&self.board.status(), &self.node, Instant::now());
        if reply.spare && self.drain().is_some_and(Drain::is_on) {
            let end = format!("`coloctl drain --end {}`", self.node);
            reply.problems.push(format!("this node is being emptied: no vm can claim it until {end}"));
        }
        reply
    }
}

/// The judgement on `node`, at `now`.
pub(crate) fn of(status: &Status, node: &NodeId, now: Instant) -> HealthReply {
    let mut problems = standing(status, node, now);
    let healthy = problems.is_empty();
    let protects = match status.role {
        Role::Paired => true,
        Role::Following => follows_in(status, node),
        _ => false,
    };
    let protected = protects && status.is_linked() && status.failure.is_none();
    // No illness of this node.
    problems.extend(status.nobody.clone().filter(|_| status.role.runs()));
    let recent = |at: &Instant| now.saturating_duration_since(*at) < RECENT;
    if let Some((error, at)) = status.error.as_ref().filter(|(_, at)| recent(at))
        && !problems.iter().any(|problem| problem.contains(error))
    {
        let age = now.saturating_duration_since(*at).as_secs();
        problems.push(format!("{age} s ago: {error}"));
    }
    HealthReply { healthy, protected, problems, spare: status.role == Role::Spare }
}

/// What keeps the node from its part for as long as it lasts.
fn standing(status: &Status, node: &NodeId, now: Instant) -> Vec<String> {
    let mut problems = Vec::new();
    match status.role {
        Role::Starting => problems.push("the node is starting".to_owned()),
        Role::Stopped => problems.push("the node's part is over".to_owned()),
        Role::Lost => problems.push("another node has the register; the guest is parked here".to_owned()),
        _ => {}
    }
    problems.extend(status.failure.clone());
    problems.extend(stranded(status, node));
    if status.failure.is_none()
        && let Some(why) = status.devices.disk.as_ref().and_then(|disk| disk.failure())
    {
        // A follower's is in its store's failure.
        problems.push(format!("the guest's disk has failed: {why}"));
    }
    let ms = |at: Instant| now.saturating_duration_since(at).as_millis();
    let wanted = match status.role {
        Role::Pairing | Role::Paired => true,
        Role::Following => follows_in(status, node),
        _ => false,
    };
    if wanted && !status.is_linked() {
        problems.push(status.link.as_ref().map_or_else(
            || "there is no link to the other node".to_owned(),
            |link| format!("there has been no link to {} for {} ms", link.peer, ms(link.since)),
        ));
    }
    let late = status.arbiter_answered.is_some_and(|at| now.saturating_duration_since(at) > ARBITER_PATIENCE);
    if status.role != Role::Stopped && (late || status.arbiter_silent.is_some()) {
        let since = status.arbiter_answered.map(|at| format!(" for {} ms", ms(at))).unwrap_or_default();
        let why = status.arbiter_silent.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
        // A spare has no register to read: it asks whether it is claimed.
        let who = if status.role == Role::Spare { "membership" } else { "arbiter" };
        problems.push(format!("the {who} has not answered{since}{why}"));
    }
    if !problems.is_empty()
        && let Some(holding) = holding(status)
    {
        problems.push(holding.to_owned());
    }
    problems
}

/// A vm that nobody may run, as far as this node knows: what it would take to run it here, and what that would lose.
fn stranded(status: &Status, node: &NodeId) -> Option<String> {
    if status.role != Role::Waiting || status.is_linked() {
        return None;
    }
    let value = &status.register.as_ref()?.value;
    let (who, ran_here, may) = match value {
        Value::Paired { primary, secondary, replica } if secondary == node => (
            primary,
            false,
            format!("only {primary}, or replica {replica}, which has ended with its process,"),
        ),
        Value::Paired { primary, secondary, .. } if primary == node => {
            (secondary, true, format!("only {secondary}, with its copy,"))
        }
        _ => return None,
    };
    let has = match (status.stale, status.stale_age()) {
        (Some(point), age) => {
            let age = age.map(|age| format!(", stored {} s ago", age.as_secs())).unwrap_or_default();
            format!("this node has {point}{age}, and what was let out after it would be lost")
        }
        (None, _) if ran_here && status.disk_of_runner => {
            "this node has its disk, as after a power cut".to_owned()
        }
        (None, _) => return Some(format!("{may} may run the guest, and this node has no whole point of it")),
    };
    Some(format!("{may} may run the guest; {has}: `coloctl promote --force` once {who} is fenced"))
}

/// The register names this node, with the copy that it holds.
fn follows_in(status: &Status, node: &NodeId) -> bool {
    let value = status.register.as_ref().map(|entry| &entry.value);
    matches!(value, Some(Value::Paired { secondary, replica, .. })
        if secondary == node && Some(*replica) == status.replica)
}

/// Why output is held longer than its epoch's ack; nothing if it is not.
pub(super) fn holding(status: &Status) -> Option<&'static str> {
    let silent = status.arbiter_silent.is_some();
    match status.role {
        Role::Joining => Some("output is held until the copy is whole and the register has answered"),
        Role::Pairing if silent => {
            Some("output is held until the arbiter, which is silent, answers for the pairing")
        }
        Role::Pairing => Some("output is held until the register has answered"),
        Role::Paired if status.proposing && silent => {
            Some("output is held until the arbiter, which is silent, lets this node run alone")
        }
        Role::Paired if status.proposing && !status.is_linked() => {
            Some("output is held until the register lets this node run alone")
        }
        Role::Paired if !status.is_linked() => {
            Some("the secondary is away: output is held until it is back or given up")
        }
        Role::Lost => Some("another node has the register"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::{ARBITER_PATIENCE, of};
    use crate::heartbeat::Pulse;
    use crate::node::status::{LinkState, Role, Status};
    use colo_common::history::point;
    use colo_common::register::{Entry, Value};
    use colo_common::{NodeId, ProposalId, ReplicaId, Term};
    use colo_proto::v1::HealthReply;
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    fn node(name: &str) -> NodeId {
        name.parse().unwrap()
    }

    /// A protected pair as a node of this role sees it.
    fn paired(role: Role) -> Status {
        let (primary, secondary, replica) = (node("a"), node("b"), ReplicaId(5));
        let value = Value::Paired { primary, secondary, replica };
        let peer = if role == Role::Following { "a" } else { "b" };
        let link = LinkState::new(node(peer), "127.0.0.1:1".parse().unwrap(), Arc::new(Pulse::default()));
        Status {
            role,
            register: Some(Entry { term: Term(2), proposal: ProposalId(1), value }),
            arbiter_answered: Some(Instant::now()),
            replica: Some(replica),
            link: Some(link),
            ..Status::default()
        }
    }

    fn judge(status: &Status) -> HealthReply {
        let me = if status.role == Role::Following { "b" } else { "a" };
        of(status, &node(me), Instant::now())
    }

    #[test]
    fn a_pair_that_does_its_part_is_healthy_and_protected() {
        for role in [Role::Paired, Role::Following] {
            let found = judge(&paired(role));
            assert_eq!(found, HealthReply { healthy: true, protected: true, ..HealthReply::default() });
        }
    }

    #[test]
    fn a_missing_link_a_failed_store_and_a_silent_arbiter_each_show() {
        for role in [Role::Paired, Role::Following] {
            let mut status = paired(role);
            status.link_stands(false);
            let found = judge(&status);
            assert!(
                !found.healthy && !found.protected && found.problems[0].contains("no link to"),
                "{found:?}"
            );

            let failed = Status { failure: Some("the store has failed: full".to_owned()), ..paired(role) };
            let found = judge(&failed);
            assert!(!found.healthy && !found.protected && found.problems == ["the store has failed: full"]);

            let mut silent = paired(role);
            silent.arbiter_silent = Some("no such directory".to_owned());
            let found = judge(&silent);
            assert!(!found.healthy && found.protected, "{found:?}");
            assert!(found.problems[0].ends_with("ms: no such directory"), "{found:?}");

            // One that hangs says nothing at all.
            let hangs = paired(role);
            let later = Instant::now() + ARBITER_PATIENCE + Duration::from_secs(1);
            assert!(!of(&hangs, &node(if role == Role::Paired { "a" } else { "b" }), later).healthy);
        }
    }

    #[test]
    fn output_that_waits_for_a_silent_arbiter_is_a_problem() {
        let mut status = paired(Role::Paired);
        status.link_stands(false);
        (status.proposing, status.arbiter_silent) = (true, Some("gone".to_owned()));
        let found = judge(&status);
        assert!(found.problems.iter().any(|problem| problem.contains("which is silent")), "{found:?}");
    }

    #[test]
    fn a_copy_that_the_register_does_not_name_protects_nothing_and_misses_nobody() {
        let mut status = paired(Role::Following);
        status.replica = Some(ReplicaId(6));
        status.link_stands(false);
        assert_eq!(judge(&status), HealthReply { healthy: true, ..HealthReply::default() });
    }

    #[test]
    fn a_vm_that_nobody_may_run_is_told_of_with_what_could_be_done() {
        let mut status = paired(Role::Waiting);
        (status.replica, status.link) = (None, None);
        let told = |status: &Status, name: &str| of(status, &node(name), Instant::now()).problems.join("; ");
        assert!(told(&status, "b").contains("no whole point"), "{}", told(&status, "b"));
        status.stale = Some(point(1, 7));
        let line = told(&status, "b");
        assert!(line.contains("1.7") && line.contains("once a is fenced"), "{line}");
        status.stale = None;
        assert!(told(&status, "a").contains("no whole point"), "{}", told(&status, "a"));
        status.disk_of_runner = true;
        let line = told(&status, "a");
        assert!(line.contains("its disk") && line.contains("once b is fenced"), "{line}");
        assert_eq!(told(&status, "c"), "");
    }

    #[test]
    fn a_spare_is_there_to_be_claimed_and_says_if_nobody_could() {
        let status =
            Status { role: Role::Spare, arbiter_answered: Some(Instant::now()), ..Status::default() };
        assert_eq!(judge(&status), HealthReply { healthy: true, spare: true, ..HealthReply::default() });
        let found = judge(&Status { arbiter_silent: Some("no such directory".to_owned()), ..status });
        assert!(
            !found.healthy && found.problems[0].starts_with("the membership has not answered"),
            "{found:?}"
        );
    }

    #[test]
    fn that_nobody_can_protect_the_vm_is_told_for_as_long_as_it_is_so() {
        let why = "nobody can protect it: no other node is there".to_owned();
        let alone = Status { nobody: Some(why.clone()), link: None, ..paired(Role::Alone) };
        let found = judge(&alone);
        assert!(found.healthy && found.problems == [why.clone()], "{found:?}");
        let told = Status { error: Some((why.clone(), Instant::now())), ..alone };
        assert_eq!(judge(&told).problems, [why], "once");
    }

    #[test]
    fn every_other_role_is_unprotected() {
        let ends = [Role::Starting, Role::Lost, Role::Stopped];
        let others = [Role::Alone, Role::Seeding, Role::Joining, Role::Waiting, Role::Receiving];
        for role in ends.into_iter().chain(others) {
            let found = judge(&paired(role));
            assert_eq!((found.healthy, found.protected), (!ends.contains(&role), false), "{role:?}");
        }
    }

    #[test]
    fn an_error_is_a_problem_for_a_minute_and_no_illness() {
        let mut status = paired(Role::Paired);
        status.error = Some(("the link to b is down: silent".to_owned(), Instant::now()));
        let found = judge(&status);
        assert!(found.healthy && found.problems.len() == 1, "{found:?}");
        let later = Instant::now() + Duration::from_secs(61);
        status.arbiter_answered = Some(later);
        assert!(of(&status, &node("a"), later).problems.is_empty());
    }
}
