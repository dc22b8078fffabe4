//! The follower's side of the protocol, without input or output: what it acks, when it may run the guest, and what
//! it does with what it finds at its start. The node feeds it events and does the [`Action`]s it answers.
//!
//! ```text
//!                    seed                     whole (new replica id)
//!   Nothing/Stale ----------> Inconsistent ------------------------> Whole <--- staged, applied, persisted
//!        ^                        ^                                    |
//!        |                        +----------- seed -------------------+
//!        |                                                             | promote: silent for good, then propose
//!        +--- restart under `memory`                                   v
//!                                                                    (Run: a replicator takes over)
//! ```
//!
//! Rules (design, section 2) and where they are: which acks are given, [`ackable`](Replica::ackable); who may
//! promote, [`promote`](Replica::promote); what a start may do, [`observe`](Replica::observe); when a change of the
//! ack policy takes effect, `policy`.

mod force;
mod policy;
mod words;

use colo_common::register::{Answer, Entry, Proposal, Value};
use colo_common::{Incarnation, NodeId, Point, ProposalId, ReplicaId, Term};
use colo_primary::replicator::Ack;

pub use force::{Fences, others};
pub use words::{AckPolicy, Action, Copy, Mutation, NotMine, Refusal, Rules, Start, Stored};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    /// The point that it had when it went silent; what is staged since is newer.
    Promote(Point),
    Boot,
    HandBack,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Pending {
    proposal: Proposal,
    kind: Kind,
}

/// The runner that this node follows.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Source {
    runner: NodeId,
    term: Term,
}

/// A follower of a vm.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Replica {
    me: NodeId,
    incarnation: Incarnation,
    rules: Rules,
    /// The newest term that this node has heard of; runners of older ones are turned away.
    fence: Term,
    /// In this term and all before it, it never acks again.
    silent: Term,
    copy: Copy,
    active: bool,
    /// The operator has had the guest started again under this incarnation, and nothing has run since.
    starting: bool,
    source: Option<Source>,
    pending: Option<Pending>,
    /// A policy that is being changed to.
    changing: Option<AckPolicy>,
    /// The store was told to hold or to forget the replica id of this copy, and has not said that it did.
    ordered: bool,
    /// The newest point acked.
    acked: Option<Point>,
    mutation: Mutation,
}

impl Replica {
    /// A follower with what its store holds. If that has a replica id and the policy is `memory`, it acks as under
    /// `disk` until the id is erased: else a later start could show an id that has acked more than the store has.
    pub fn new(me: NodeId, incarnation: Incarnation, rules: Rules, stored: Stored) -> Self {
        let copy = match stored.whole {
            None => Copy::Nothing,
            Some((point, Some(replica))) => {
                Copy::Whole { replica, staged: point, persisted: Some(point), named: true }
            }
            Some((point, None)) => Copy::Stale { point },
        };
        let named = matches!(copy, Copy::Whole { .. });
        let changing = Some(rules.policy).filter(|policy| named && *policy == AckPolicy::Memory);
        let policy = if changing.is_some() { AckPolicy::Disk } else { rules.policy };
        Self {
            me,
            incarnation,
            rules: Rules { policy, ..rules },
            fence: Term(0),
            silent: Term(0),
            copy,
            active: stored.active,
            starting: false,
            source: None,
            pending: None,
            changing,
            ordered: false,
            acked: None,
            mutation: Mutation::default(),
        }
    }

    /// Leaves rules out, for tests.
    pub fn mutate(&mut self, mutation: Mutation) {
        self.mutation = mutation;
    }

    /// What it holds.
    pub fn copy(&self) -> &Copy {
        &self.copy
    }

    /// The newest term it has heard of.
    pub fn fence(&self) -> Term {
        self.fence
    }

    /// Whether it ran the guest when it crashed, and nobody's copy has replaced what it has.
    pub fn is_active(&self) -> bool {
        self.active
    }

    /// Whether a guest that this node ran when it crashed is booted anew.
    pub fn boots_after_crash(&self) -> bool {
        self.rules.boot_after_crash
    }

    /// Whether a proposal waits for its answer.
    pub fn is_proposing(&self) -> bool {
        self.pending.is_some()
    }

    /// The node that it follows.
    pub fn source(&self) -> Option<&NodeId> {
        self.source.as_ref().map(|source| &source.runner)
    }

    /// What an ack means now; a change takes effect when that is safe.
    pub fn policy(&self) -> AckPolicy {
        self.rules.policy
    }

    /// The newest point that it has acked.
    pub fn acked(&self) -> Option<Point> {
        self.acked
    }

    /// The register was read (linearizably), at the start or later: what it lets this node do by itself. Later, since
    /// a request of this node's dead process may land after the start.
    pub fn observe(&mut self, found: Option<&Entry>) -> Vec<Action> {
        let Some(entry) = found.filter(|_| self.pending.is_none()) else { return Vec::new() };
        self.fence = self.fence.max(entry.term);
        match &entry.value {
            // A dead process of this very node holds it: nothing runs before this process does.
            Value::Solo { node, incarnation } if *node == self.me && *incarnation != self.incarnation => {
                self.take_over(entry)
            }
            // Granted to the start that this one goes on with.
            Value::Solo { node, .. } if *node == self.me && self.starting && self.active => {
                vec![self.propose(Kind::Boot, entry)]
            }
            Value::Solo { .. } if self.mutation.boot_for_another && self.active => {
                vec![self.propose(Kind::Boot, entry)]
            }
            _ => Vec::new(),
        }
    }

    /// The register names a dead process of this node.
    fn take_over(&mut self, entry: &Entry) -> Vec<Action> {
        let boots = self.rules.boot_after_crash;
        match self.copy {
            _ if self.active && boots => vec![self.propose(Kind::Boot, entry)],
            _ if self.active => Vec::new(),
            // It crashed between its promote's proposal and its first vCPU: the same again.
            Copy::Whole { staged, .. } => vec![self.propose(Kind::Promote(staged), entry)],
            _ if self.mutation.boot_inactive && boots => vec![self.propose(Kind::Boot, entry)],
            _ => Vec::new(),
        }
    }

    /// The operator starts a stopped vm again; only the node that ran it last can. Before the proposal is sent, the
    /// vm's directory must say, synced, that this incarnation is starting. The word counts until the register refuses:
    /// it is not said again to another value.
    ///
    /// # Errors
    /// It is not this node's to start.
    pub fn start_again(&mut self, found: Option<&Entry>) -> Result<Vec<Action>, NotMine> {
        let entry = found.ok_or(NotMine::Absent)?;
        if self.pending.is_some() {
            return Err(NotMine::Proposing);
        }
        let any = self.mutation.start_for_another;
        let mine =
            matches!(&entry.value, Value::Stopped { node, .. } if any || *node == self.me) && self.active;
        if !mine {
            return Err(NotMine::Register(entry.clone()));
        }
        self.starting = true;
        Ok(vec![self.propose(Kind::Boot, entry)])
    }

    /// A start again under this very incarnation was cut off before anything ran: if it was granted, it goes on.
    pub fn go_on_starting(&mut self, goes_on: bool) {
        self.starting = goes_on;
    }

    /// Whether a start again goes on.
    pub fn is_starting(&self) -> bool {
        self.starting
    }

    /// A runner begins to seed or resync: from here on the copy cannot be promoted. The store must be marked so, and
    /// `active` erased, synced, before a page is taken.
    ///
    /// # Errors
    /// The runner is turned away.
    pub fn accept_seed(&mut self, runner: &NodeId, term: Term) -> Result<(), Refusal> {
        self.check_runner(term)?;
        self.copy = Copy::Inconsistent;
        self.active &= self.mutation.seed_keeps_active;
        self.starting = false;
        self.acked = None;
        self.ordered = false;
        // No copy, no acks: any policy will do.
        self.rules.policy = self.changing.take().unwrap_or(self.rules.policy);
        self.follow(runner, term);
        Ok(())
    }

    /// The runner of a protected vm is there again. Answers what is to be acked at once.
    ///
    /// # Errors
    /// The runner is turned away.
    pub fn accept_link(
        &mut self,
        runner: &NodeId,
        term: Term,
        wanted: ReplicaId,
    ) -> Result<Vec<Action>, Refusal> {
        self.check_runner(term)?;
        match self.copy {
            Copy::Whole { replica, .. } if replica == wanted => {
                self.follow(runner, term);
                let mut actions = self.ack();
                actions.extend(self.step_policy());
                Ok(actions)
            }
            _ => Err(Refusal::NotThisReplica { wanted }),
        }
    }

    /// The runner's term is newer than when it came: `Paired` was granted.
    ///
    /// # Errors
    /// The runner is turned away.
    pub fn hear_term(&mut self, term: Term) -> Result<Vec<Action>, Refusal> {
        if term < self.fence {
            return Err(Refusal::Fenced { offered: term, known: self.fence });
        }
        self.fence = term;
        match &mut self.source {
            Some(source) if source.term < term => {
                source.term = term;
                Ok(self.ack())
            }
            _ => Ok(Vec::new()),
        }
    }

    /// The epoch that makes a seeded copy whole is staged; `replica` was drawn for it.
    ///
    /// # Errors
    /// No seed was going on.
    pub fn whole(&mut self, point: Point, replica: ReplicaId) -> Result<Vec<Action>, Refusal> {
        if self.copy != Copy::Inconsistent || self.source.is_none() {
            return Err(Refusal::OutOfPlace(point));
        }
        self.copy = Copy::Whole { replica, staged: point, persisted: None, named: false };
        let mut actions = Vec::new();
        if self.rules.policy == AckPolicy::Disk || self.mutation.store_id_under_memory {
            // Takes effect with or after the mark of the same point: an id is only of use beside a whole copy.
            self.ordered = true;
            actions.push(Action::StoreId(replica));
        }
        actions.extend(self.ack());
        Ok(actions)
    }

    /// An epoch that follows the staged point is staged whole and verified.
    ///
    /// # Errors
    /// There is no whole copy that it could follow.
    pub fn staged(&mut self, point: Point) -> Result<Vec<Action>, Refusal> {
        match &mut self.copy {
            Copy::Whole { staged, .. } if *staged < point && self.source.is_some() => {
                *staged = point;
                Ok(self.ack())
            }
            _ => Err(Refusal::OutOfPlace(point)),
        }
    }

    /// The store holds this point of the copy that is named by `of`, synced.
    pub fn persisted(&mut self, of: ReplicaId, point: Point) -> Vec<Action> {
        match &mut self.copy {
            Copy::Whole { replica, persisted, .. } if *replica == of => {
                *persisted = (*persisted).max(Some(point));
            }
            _ => return Vec::new(),
        }
        let mut actions = self.step_policy();
        if self.rules.policy == AckPolicy::Disk {
            actions.extend(self.ack());
        }
        actions
    }

    /// The link to the runner is gone.
    pub fn link_lost(&mut self) {
        self.source = None;
    }

    /// The runner is taken for dead, or the operator asks: the register, just read, decides.
    ///
    /// # Errors
    /// Why this node does not take over.
    pub fn promote(&mut self, found: Option<&Entry>) -> Result<Vec<Action>, NotMine> {
        let entry = found.ok_or(NotMine::Absent)?;
        if self.pending.is_some() {
            return Err(NotMine::Proposing);
        }
        self.fence = self.fence.max(entry.term);
        let held = match self.copy {
            Copy::Whole { replica, staged, .. } => (Some(replica), staged),
            Copy::Stale { point } if self.mutation.promote_any_replica => (None, point),
            _ => return Err(NotMine::NoCopy),
        };
        match (&entry.value, held) {
            (Value::Paired { secondary, replica, .. }, (held, staged)) if *secondary == self.me => match held
            {
                Some(held) if held != *replica && !self.mutation.promote_any_replica => {
                    Err(NotMine::OtherReplica { named: *replica, held })
                }
                _ => Ok(vec![self.propose(Kind::Promote(staged), entry)]),
            },
            (Value::Stopped { .. }, (_, staged)) if self.mutation.promote_stopped => {
                Ok(vec![self.propose(Kind::Promote(staged), entry)])
            }
            _ => Err(NotMine::Register(entry.clone())),
        }
    }

    /// The node that this one's dead process took the guest from has kept it: gives the register back to it, if this
    /// node has nothing to run from.
    ///
    /// # Errors
    /// It has, or the register does not say that it is this node's to give.
    pub fn hand_back(
        &mut self,
        found: Option<&Entry>,
        runner: &NodeId,
        process: Incarnation,
        lost_to: Term,
    ) -> Result<Vec<Action>, NotMine> {
        let entry = found.ok_or(NotMine::Absent)?;
        if self.pending.is_some() {
            return Err(NotMine::Proposing);
        }
        let dead = matches!(&entry.value, Value::Solo { node, incarnation }
            if *node == self.me && *incarnation != self.incarnation);
        let ran = self.active && !self.mutation.hand_back_active;
        let empty = !ran && !matches!(self.copy, Copy::Whole { .. });
        if !dead || !empty || entry.term != lost_to {
            return Err(NotMine::Register(entry.clone()));
        }
        self.fence = self.fence.max(entry.term);
        let value = Value::Solo { node: runner.clone(), incarnation: process };
        Ok(vec![self.propose_value(Kind::HandBack, entry, value)])
    }

    /// The arbiter answered the proposal `id`. (No answer: send it again.)
    pub fn answer(&mut self, id: ProposalId, answer: Answer) -> Vec<Action> {
        let Some(pending) = self.pending.take_if(|pending| pending.proposal.id == id) else {
            return Vec::new();
        };
        match (answer, pending.kind) {
            (Answer::Applied(entry), Kind::Promote(had)) => {
                vec![Action::Run(Start::Promote(self.run_from(had)), entry)]
            }
            (Answer::Applied(entry), Kind::Boot) => vec![Action::Run(Start::Boot, entry)],
            (Answer::Applied(entry), Kind::HandBack) => {
                self.fence = self.fence.max(entry.term);
                Vec::new()
            }
            // Obey what stands there; a request of this node's dead process may have made it.
            (Answer::Refused(found), _) => {
                self.starting = false;
                self.observe(found.as_ref())
            }
        }
    }

    /// The newest whole staged point, not older than the one that this node had when it went silent.
    fn run_from(&self, had: Point) -> Point {
        match self.copy {
            Copy::Whole { staged, .. } if !self.mutation.never_silent => {
                assert!(had <= staged, "{had} was staged and now {staged} is the newest");
                staged
            }
            _ => had,
        }
    }

    /// The newest point that may be acked, as the policy has it.
    pub fn ackable(&self) -> Option<Ack> {
        let source = self.source.as_ref()?;
        if source.term <= self.silent && !self.mutation.never_silent {
            return None;
        }
        let Copy::Whole { replica, staged, persisted, named } = self.copy else { return None };
        let point = match self.rules.policy {
            AckPolicy::Disk if !self.mutation.ack_before_sync => persisted.filter(|_| named)?,
            _ => staged,
        };
        Some(Ack { point, replica, term: source.term })
    }

    fn ack(&mut self) -> Vec<Action> {
        let Some(ack) = self.ackable() else { return Vec::new() };
        self.acked = self.acked.max(Some(ack.point));
        vec![Action::Ack(ack)]
    }

    /// Whether a runner of this term may come at all.
    ///
    /// # Errors
    /// It is turned away.
    pub fn check_runner(&self, term: Term) -> Result<(), Refusal> {
        if self.pending.is_some() {
            return Err(Refusal::Promoting);
        }
        let known = self.fence.max(self.silent.next());
        let fenced = term < self.fence || (term <= self.silent && !self.mutation.never_silent);
        if fenced { Err(Refusal::Fenced { offered: term, known }) } else { Ok(()) }
    }

    fn follow(&mut self, runner: &NodeId, term: Term) {
        self.fence = self.fence.max(term);
        self.source = Some(Source { runner: runner.clone(), term });
    }

    fn propose(&mut self, kind: Kind, entry: &Entry) -> Action {
        let value = Value::Solo { node: self.me.clone(), incarnation: self.incarnation };
        self.propose_value(kind, entry, value)
    }

    /// Silence comes first: an ack after this would let out what the point to run from may lack.
    fn propose_value(&mut self, kind: Kind, entry: &Entry, value: Value) -> Action {
        self.silent = self.silent.max(entry.term);
        let id = ProposalId::of(self.incarnation, entry.term);
        let proposal = Proposal { id, expected: Some(entry.clone()), value };
        self.pending = Some(Pending { proposal: proposal.clone(), kind });
        Action::Propose(proposal)
    }
}

#[cfg(test)]
mod tests;
