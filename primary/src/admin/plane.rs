//! What a control plane answers from, and its way to the node behind it.

use colo_common::membership::Membership;
use colo_common::register::Entry;
use colo_common::{Incarnation, NodeId, VmId};
use colo_proto::v1;
use crossbeam_channel::Sender;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use super::console::Typists;
use super::reason::{Reason, WhyNot};
use crate::console::Console;
use crate::drain::Drain;
use crate::node::status::{Board, Policy, Role};
use crate::node::{Command, CommandError, Event};

/// How often a long call looks whether it is done.
pub(super) const POLL: Duration = Duration::from_millis(20);
/// How long a promotion or a stop may take before the caller is told to look at the status.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// The operator's word to run the guest.
#[derive(Debug)]
pub struct Order {
    /// Whatever the register says.
    pub force: bool,
    /// Told why it does not come to that.
    pub reply: oneshot::Sender<WhyNot>,
}

/// By which entry of the register a node is taken for fenced, or why it is not.
pub type FenceAnswer = Result<Entry, WhyNot>;

/// What a follower can be asked.
pub trait FollowerControl: Send + Sync {
    /// To run the guest.
    fn promote(&self, order: Order);
    /// To take the operator's word that `node` does not run the guest.
    fn confirm_fenced(&self, node: NodeId, reply: oneshot::Sender<FenceAnswer>);
    /// To take over without an operator's word, or not to; told when that is so.
    fn set_failover(&self, auto: bool, reply: oneshot::Sender<()>);
    /// That acks shall mean disk (true) or memory; told what they mean from now on.
    fn set_disk_policy(&self, disk: bool, reply: oneshot::Sender<Policy>);
    /// To end; told when nothing can keep it from that any more.
    fn leave(&self, reply: oneshot::Sender<()>);
}

/// What the process is at the moment.
#[derive(Clone)]
pub enum Part {
    /// It runs the guest.
    Runner(Sender<Event>),
    /// It follows.
    Follower(Arc<dyn FollowerControl>),
    /// It is bound to no vm. Here it is asked to end, and tells when it does.
    Spare(mpsc::Sender<oneshot::Sender<()>>),
    /// Neither yet, or not any more.
    None,
}

/// What a control plane answers from.
pub struct Plane {
    /// The vm; none of a spare.
    pub vm: Option<VmId>,
    /// The node.
    pub node: NodeId,
    /// The process.
    pub incarnation: Incarnation,
    /// The account.
    pub board: Board,
    /// The console.
    pub console: Console,
    /// Who types at the console.
    pub(super) typists: Typists,
    part: RwLock<Part>,
    membership: OnceLock<Arc<dyn Membership>>,
    drain: OnceLock<Drain>,
    started: Instant,
}

impl Plane {
    /// A control plane with no part yet.
    pub fn new(
        vm: Option<VmId>,
        node: NodeId,
        incarnation: Incarnation,
        board: Board,
        console: Console,
    ) -> Arc<Self> {
        let (part, started, typists) = (RwLock::new(Part::None), Instant::now(), Typists::default());
        let (membership, drain) = (OnceLock::new(), OnceLock::new());
        Arc::new(Self { vm, node, incarnation, board, console, typists, part, membership, drain, started })
    }

    /// The process has this part from now on.
    pub fn set_part(&self, part: Part) {
        *self.part.write().unwrap_or_else(PoisonError::into_inner) = part;
    }

    /// The cluster is listed by this; the first that is given stays.
    pub fn keep_membership(&self, membership: Arc<dyn Membership>) {
        drop(self.membership.set(membership));
    }

    /// Where it says that the node is being emptied; the first that is given stays.
    pub fn keep_drain(&self, drain: Drain) {
        drop(self.drain.set(drain));
    }

    pub(super) fn drain(&self) -> Option<&Drain> {
        self.drain.get()
    }

    pub(super) fn membership(&self) -> Option<&Arc<dyn Membership>> {
        self.membership.get()
    }

    /// How long the process has run.
    pub(crate) fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    pub(super) fn part(&self) -> Part {
        self.part.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Where to send what only a runner can do.
    pub(super) fn runner(&self) -> Result<Sender<Event>, Status> {
        match self.part() {
            Part::Runner(outbox) => Ok(outbox),
            _ => Err(self.not_here("runs the guest")),
        }
    }

    /// The vm that this is about.
    ///
    /// # Errors
    /// There is none: the node is a spare.
    pub(super) fn bound(&self) -> Result<&VmId, Status> {
        self.vm.as_ref().ok_or_else(|| {
            let text = format!(
                "this node ({}) is a spare, bound to no vm: ask a node of the vm (`coloctl nodes` lists them)",
                self.node
            );
            Reason::Unbound.about(text, &[("node", self.node.to_string())])
        })
    }

    pub(super) fn not_here(&self, what: &str) -> Status {
        let vm = match self.bound() {
            Ok(vm) => vm.to_string(),
            Err(unbound) => return unbound,
        };
        let status = self.board.status();
        let register = status.register.map(|entry| entry.value.to_string());
        let where_ = register.as_ref().map_or_else(
            || "the register is not known".to_owned(),
            |value| format!("the register says: {value}"),
        );
        let text = format!("this node ({}) is not the one that {what}; {where_}", self.node);
        let more = [("node", Some(self.node.to_string())), ("vm", Some(vm)), ("register", register)];
        let more: Vec<_> = more.into_iter().filter_map(|(key, value)| Some((key, value?))).collect();
        Reason::OtherNode.about(text, &more)
    }

    pub(super) async fn command(
        &self,
        make: impl FnOnce(oneshot::Sender<Result<(), CommandError>>) -> Command,
    ) -> Result<(), Status> {
        let (reply, answer) = oneshot::channel();
        let gone = || Reason::Unavailable.status("the node is ending; look at the other node");
        self.runner()?.send(Event::Command(make(reply))).map_err(|_| gone())?;
        match tokio::time::timeout(PATIENCE, answer).await {
            Ok(Ok(Ok(()))) => Ok(()),
            Ok(Ok(Err(e @ CommandError::Aborted(_)))) => Err(Reason::GivenUp.status(e.to_string())),
            Ok(Ok(Err(e))) => Err(Reason::NotNow.status(e.to_string())),
            Ok(Err(_)) => Err(gone()),
            Err(_) => Err(Reason::NoAnswer.status("the node takes long; look at its status")),
        }
    }

    /// Has this process end its part in the vm, whichever that is by the time it hears of it: it may be taking the guest
    /// over now, and must not run it after this was answered.
    pub(super) async fn leave(
        &self,
        runner: impl Fn(oneshot::Sender<Result<(), CommandError>>) -> Command,
    ) -> Result<(), Status> {
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            let (reply, answer) = oneshot::channel();
            match self.part() {
                Part::Runner(_) => return self.command(&runner).await,
                Part::Follower(control) => control.leave(reply),
                Part::Spare(ends) => drop(ends.try_send(reply)),
                Part::None => drop(reply),
            }
            match tokio::time::timeout_at(until.into(), answer).await {
                Ok(Ok(())) => return Ok(()),
                // It was not heard: the part has changed, or changes now.
                Ok(Err(_)) => tokio::time::sleep(POLL).await,
                Err(_) => break,
            }
        }
        Err(Reason::NoAnswer.status("this node has not said that it ends; look at its status"))
    }

    /// Waits until the node has this role.
    pub(super) async fn until(&self, wanted: Role) -> Result<(), Status> {
        let started = Instant::now();
        loop {
            let status = self.board.status();
            match status.role {
                role if role == wanted => return Ok(()),
                Role::Lost | Role::Stopped => {
                    return Err(Reason::GivenUp.status(self.not_here("runs the guest any more").message()));
                }
                _ => {}
            }
            if started.elapsed() > PATIENCE {
                let why = status.arbiter_silent.map(|why| format!(" (the arbiter does not answer: {why})"));
                let why = why.unwrap_or_default();
                return Err(Reason::NoAnswer.status(format!("it takes long; look at the node's status{why}")));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    pub(super) fn register(&self) -> Option<v1::RegisterEntry> {
        self.board.status().register.as_ref().map(v1::RegisterEntry::from)
    }
}

#[cfg(test)]
mod tests {
    use super::{FenceAnswer, FollowerControl, Order, Part, Plane, Policy};
    use crate::console::Console;
    use crate::node::status::Board;
    use crate::node::{Command, Event};
    use colo_common::{Incarnation, NodeId};
    use std::sync::Arc;
    use std::time::Duration;
    use tokio::sync::{mpsc, oneshot};
    use tonic::Code;
    use tonic_types::StatusExt;

    /// Takes the guest over: nobody reads its inbox any more.
    struct Promoting;

    impl FollowerControl for Promoting {
        fn promote(&self, _: Order) {}
        fn confirm_fenced(&self, _: NodeId, _: oneshot::Sender<FenceAnswer>) {}
        fn set_failover(&self, _: bool, _: oneshot::Sender<()>) {}
        fn set_disk_policy(&self, _: bool, _: oneshot::Sender<Policy>) {}
        fn leave(&self, _: oneshot::Sender<()>) {}
    }

    #[tokio::test]
    async fn a_follower_that_takes_over_is_not_said_to_have_left() {
        let (vm, node) = ("web".parse().unwrap(), "a".parse().unwrap());
        let plane = Plane::new(Some(vm), node, Incarnation(1), Board::default(), Console::default());
        plane.set_part(Part::Follower(Arc::new(Promoting)));
        let asked = Arc::clone(&plane);
        let leaving = tokio::spawn(async move { asked.leave(|reply| Command::Fence { reply }).await });
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!leaving.is_finished(), "nobody has said that it leaves");
        let (outbox, inbox) = crossbeam_channel::unbounded();
        plane.set_part(Part::Runner(outbox));
        let runner = tokio::task::spawn_blocking(move || inbox.recv_timeout(Duration::from_secs(10)));
        match runner.await.unwrap().unwrap() {
            Event::Command(Command::Fence { reply }) => reply.send(Ok(())).unwrap(),
            other => panic!("the runner was told {other:?}"),
        }
        leaving.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_spare_has_nothing_of_a_vm_and_can_be_ended() {
        let node = "s".parse().unwrap();
        let plane = Plane::new(None, node, Incarnation(1), Board::default(), Console::default());
        let (ends, mut ended) = mpsc::channel(1);
        plane.set_part(Part::Spare(ends));
        let refused = plane.command(|reply| Command::Switchover { reply: Some(reply) }).await.unwrap_err();
        let reason = refused.get_details_error_info().unwrap().reason;
        assert_eq!((refused.code(), reason.as_str()), (Code::FailedPrecondition, "UNBOUND"), "{refused}");
        let asked = Arc::clone(&plane);
        let leaving = tokio::spawn(async move { asked.leave(|reply| Command::Fence { reply }).await });
        ended.recv().await.unwrap().send(()).unwrap();
        leaving.await.unwrap().unwrap();
    }
}
