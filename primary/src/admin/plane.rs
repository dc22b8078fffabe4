//! What a control plane answers from, and its way to the node behind it.

use colo_common::membership::Membership;
use colo_common::register::Entry;
use colo_common::{Incarnation, NodeId, VmId};
use colo_proto::v1;
use crossbeam_channel::Sender;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;
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
    /// To end.
    fn leave(&self);
}

/// What the process is at the moment.
#[derive(Clone)]
pub enum Part {
    /// It runs the guest.
    Runner(Sender<Event>),
    /// It follows.
    Follower(Arc<dyn FollowerControl>),
    /// Neither yet, or not any more.
    None,
}

/// What a control plane answers from.
pub struct Plane {
    /// The vm.
    pub vm: VmId,
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
        vm: VmId,
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

    pub(super) fn not_here(&self, what: &str) -> Status {
        let status = self.board.status();
        let register = status.register.map(|entry| entry.value.to_string());
        let where_ = register.as_ref().map_or_else(
            || "the register is not known".to_owned(),
            |value| format!("the register says: {value}"),
        );
        let text = format!("this node ({}) is not the one that {what}; {where_}", self.node);
        let more = [
            ("node", Some(self.node.to_string())),
            ("vm", Some(self.vm.to_string())),
            ("register", register),
        ];
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
