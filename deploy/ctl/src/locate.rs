//! Asks all nodes at once what they do, and finds the one that a command is meant for.

use colo_common::config::Endpoint as Address;
use colo_common::register::{Entry, Value};
use colo_proto::v1::{Role, StatusReply, StatusRequest};
use tokio::task::JoinSet;

use crate::connect::{Node, Nodes, QUESTION_LIMIT};
use crate::error::CtlError;
use crate::format::clean;
use crate::words;

/// What was found at one address.
pub(crate) struct Sight {
    /// Where.
    pub(crate) address: Address,
    /// The node and its account of itself, or why there is none.
    pub(crate) found: Result<(Node, StatusReply), CtlError>,
}

/// Which node a command is meant for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// The one that runs the guest.
    Runner,
    /// The one that follows.
    Follower,
}

impl Wanted {
    fn words(self) -> &'static str {
        match self {
            Self::Runner => "runs the guest",
            Self::Follower => "follows",
        }
    }
}

/// Asks every node, in the order of their addresses.
pub(crate) async fn survey(nodes: &Nodes) -> Vec<Sight> {
    let mut asked = JoinSet::new();
    for (place, address) in nodes.addresses().iter().cloned().enumerate() {
        let nodes = nodes.clone();
        asked.spawn(async move { (place, ask(&nodes, address).await) });
    }
    let mut sights = asked.join_all().await;
    sights.sort_by_key(|&(place, _)| place);
    sights.into_iter().map(|(_, sight)| sight).collect()
}

async fn ask(nodes: &Nodes, address: Address) -> Sight {
    let found = async {
        let node = nodes.connect(&address).await?;
        let mut client = node.client.clone();
        let status = node.answer(QUESTION_LIMIT, client.status(StatusRequest {})).await?;
        Ok((node, status))
    };
    Sight { found: found.await, address }
}

/// The term in which a node runs the guest: its role says that it does, and the register that it knows names it. A node
/// that has only just started has not read the register.
pub(crate) fn runs_in(status: &StatusReply) -> Option<u64> {
    let entry = Entry::try_from(status.register.as_ref()?).ok()?;
    let named = !matches!(entry.value, Value::Stopped { .. }) && entry.value.runner().as_str() == status.node;
    (words::runs(status.role) && named).then_some(entry.term.0)
}

/// The node that runs the guest. One that has not heard yet that it lost its term may say so too: the newest counts.
pub(crate) fn runner(sights: &[Sight]) -> Option<(&Node, &StatusReply, u64)> {
    let answers = sights.iter().filter_map(|sight| sight.found.as_ref().ok());
    let runners = answers.filter_map(|(node, status)| Some((node, status, runs_in(status)?)));
    runners.max_by_key(|&(_, _, term)| term)
}

/// Why nobody runs the guest any more, if the newest register that a node knows says so.
pub(crate) fn stopped(sights: &[Sight]) -> Option<String> {
    let answers = sights.iter().filter_map(|sight| sight.found.as_ref().ok());
    let entries = answers.filter_map(|(_, status)| Entry::try_from(status.register.as_ref()?).ok());
    let newest = entries.max_by_key(|entry| entry.term)?;
    matches!(newest.value, Value::Stopped { .. }).then(|| newest.to_string())
}

/// A command must not find a vm of its own choice. A spare is of none.
///
/// # Errors
/// The nodes are of several vms.
pub(crate) fn of_one_vm(sights: &[Sight]) -> Result<(), CtlError> {
    let bound = |(_, status): &&(Node, StatusReply)| !status.vm.is_empty();
    let answers = || sights.iter().filter_map(|sight| sight.found.as_ref().ok()).filter(bound);
    let several = answers().zip(answers().skip(1)).any(|((_, one), (_, next))| one.vm != next.vm);
    let found = answers().map(|(node, status)| {
        format!("{} at {} of {}", clean(&status.node), node.address, clean(&status.vm))
    });
    if several { Err(CtlError::SeveralVms { found: found.collect() }) } else { Ok(()) }
}

/// Connects to the node that a command is meant for. The operator's word goes before ours: if one node alone is named,
/// it is that one, and it may refuse.
pub(crate) async fn pick(nodes: &Nodes, wanted: Wanted) -> Result<Node, CtlError> {
    if let [only] = nodes.addresses() {
        return nodes.connect(only).await;
    }
    let sights = survey(nodes).await;
    of_one_vm(&sights)?;
    let node = match wanted {
        Wanted::Runner => runner(&sights).map(|(node, _, _)| node.clone()),
        Wanted::Follower => follower(&sights)?,
    };
    node.ok_or_else(|| nobody(&sights, wanted, nodes.is_secured()))
}

/// One that holds a whole copy goes before those that do not.
fn follower(sights: &[Sight]) -> Result<Option<Node>, CtlError> {
    let answers = sights.iter().filter_map(|sight| sight.found.as_ref().ok());
    let follow: Vec<_> = answers.filter(|(_, status)| words::follows(status.role)).collect();
    let whole: Vec<_> =
        follow.iter().copied().filter(|(_, status)| status.role == Role::Following as i32).collect();
    match if whole.is_empty() { follow } else { whole }[..] {
        [] => Ok(None),
        [(node, _)] => Ok(Some(node.clone())),
        ref several => Err(CtlError::Several {
            wanted: "follow",
            found: several.iter().map(|(node, status)| does(&node.address, status)).collect(),
        }),
    }
}

/// Why no node was found.
pub(crate) fn nobody(sights: &[Sight], wanted: Wanted, tls: bool) -> CtlError {
    let found = sights.iter().map(|Sight { address, found }| match found {
        Ok((_, status)) => does(address, status),
        Err(e) => format!("{address} does not answer ({})", e.brief()),
    });
    let found: Vec<String> = found.collect();
    if sights.iter().all(|sight| sight.found.is_err()) {
        let found = sights.iter().filter_map(|sight| {
            sight.found.as_ref().err().map(|e| format!("{} ({})", sight.address, e.brief()))
        });
        return CtlError::NoneAnswers { found: found.collect(), tls };
    }
    CtlError::Nobody { wanted: wanted.words(), found }
}

fn does(address: &Address, status: &StatusReply) -> String {
    format!("{} at {address} is {}", clean(&status.node), words::role(status.role))
}

#[cfg(test)]
mod tests {
    use super::runs_in;
    use colo_common::register::{Entry, StopReason, Value};
    use colo_common::{Incarnation, ProposalId, Term};
    use colo_proto::v1::{Role, StatusReply};

    fn status(role: Role, value: Option<Value>) -> StatusReply {
        let entry = value.map(|value| Entry { term: Term(3), proposal: ProposalId(1), value });
        StatusReply {
            node: "a".to_owned(),
            role: role.into(),
            register: entry.as_ref().map(Into::into),
            ..Default::default()
        }
    }

    #[test]
    fn a_runner_is_one_that_the_register_names() {
        let solo = |node: &str| Value::Solo { node: node.parse().unwrap(), incarnation: Incarnation(1) };
        let stopped = Value::Stopped { node: "a".parse().unwrap(), reason: StopReason::Operator };
        assert_eq!(runs_in(&status(Role::Alone, Some(solo("a")))), Some(3));
        assert_eq!(runs_in(&status(Role::Alone, Some(solo("b")))), None, "another runs it");
        assert_eq!(runs_in(&status(Role::Following, Some(solo("a")))), None);
        assert_eq!(runs_in(&status(Role::Alone, None)), None, "it has only just started");
        assert_eq!(runs_in(&status(Role::Alone, Some(stopped))), None);
    }
}
