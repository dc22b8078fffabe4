//! The runner's side of the protocol, without input or output: what may be let out, what is proposed to the
//! register, which dirty sets are kept until an ack. The node feeds it events and does the [`Action`]s it answers.
//!
//! ```text
//!            seed              J cut               J acked: propose        granted
//!   Alone ---------> Seeding ---------> Joining -------------------> Pairing -------> Paired
//!     ^ ^               |                  |                            |               |
//!     | +---------------+------------------+  link lost: J is void      | refused       | secondary lost, pause:
//!     |                                                                 v               | propose Solo
//!     +------------------------------------------------------------------ granted ------+
//!                                                                       |               |
//!        hand-back: the register names this process again               v               v  refused
//!   Alone <---------------------------------------------------------- Lost <------------+
//! ```
//!
//! Rules (design, section 2) and where they are: what may go out, [`entitled`](Replicator::entitled); dirty sets
//! kept until the ack, [`Flight`]; proposals repeated until found applied or refused, `pending`; what is void, what
//! is held and what is let go at a change of the register, `adopt` and `lose`.

mod words;

use colo_common::history::History;
use colo_common::register::{Answer, Entry, Proposal, StopReason, Value};
use colo_common::{Epoch, Incarnation, NodeId, Point, ProposalId};
use std::collections::VecDeque;

pub use words::{Ack, Action, Carried, End, Entitled, Mutation, Offer, PeerError, Phase, Purpose, Request};

/// A cut epoch that is not acked.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Flight<C> {
    point: Point,
    carried: C,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Pair,
    Solo,
    Stop(StopReason),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Pending {
    proposal: Proposal,
    kind: Kind,
}

/// The runner of a vm.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Replicator<C> {
    me: NodeId,
    incarnation: Incarnation,
    /// The newest entry that this node knows; it names this node as the runner unless the phase is `Lost` or `Over`.
    register: Entry,
    phase: Phase,
    /// Whether epochs can be sent.
    linked: bool,
    /// A proposal of unknown outcome. There is one at a time.
    pending: Option<Pending>,
    /// A stop that waits for the answer to another proposal.
    stop_wanted: Option<StopReason>,
    /// Nothing after this epoch is let out while the register says `Solo`.
    hold: Option<Epoch>,
    /// The newest point that the named replica has acked in this term.
    acked: Option<Point>,
    /// The newest point acked by this copy in any term: what was carried up to it is kept no longer. In `Alone`, the
    /// open dirty set has everything that was written since.
    covered: Option<Point>,
    /// What `covered` was when the vm was lost: what was written since is in the open dirty set.
    parted: Option<Point>,
    flight: VecDeque<Flight<C>>,
    /// The newest cut.
    tip: Epoch,
    history: History,
    /// What the guest asked for in the newest epoch.
    request: Option<(Epoch, Request)>,
    mutation: Mutation,
}

impl<C: Carried> Replicator<C> {
    /// The runner that `register` names, as `Solo` of this very process, at the end of `history`.
    ///
    /// # Panics
    /// The register names somebody else: an own bug.
    pub fn new(me: NodeId, incarnation: Incarnation, register: Entry, history: History) -> Self {
        assert!(register.value.is_solo_of(&me, incarnation), "{register} does not name {me} {incarnation}");
        let tip = history.tip().map_or(Epoch(0), |point| point.epoch);
        Self {
            me,
            incarnation,
            register,
            phase: Phase::Alone,
            linked: false,
            pending: None,
            stop_wanted: None,
            hold: None,
            acked: None,
            covered: None,
            parted: None,
            flight: VecDeque::new(),
            tip,
            history,
            request: None,
            mutation: Mutation::default(),
        }
    }

    /// Leaves rules out, for tests.
    pub fn mutate(&mut self, mutation: Mutation) {
        self.mutation = mutation;
    }

    /// Where the protection stands.
    pub fn phase(&self) -> &Phase {
        &self.phase
    }

    /// The newest entry of the register that this node knows.
    pub fn register(&self) -> &Entry {
        &self.register
    }

    /// All points that were cut here or before.
    pub fn history(&self) -> &History {
        &self.history
    }

    /// The newest acked point of this term.
    pub fn acked(&self) -> Option<Point> {
        self.acked
    }

    /// The newest point that the copy has acked, in any term.
    pub fn covered(&self) -> Option<Point> {
        self.covered
    }

    /// The newest point of this node's guest that a copy elsewhere has acked, once the vm was lost.
    pub fn parted(&self) -> Option<Point> {
        self.parted
    }

    /// Epochs that are cut and not acked.
    pub fn in_flight(&self) -> usize {
        self.flight.len()
    }

    /// Whether epochs can be sent now.
    pub fn is_linked(&self) -> bool {
        self.linked
    }

    /// Whether a proposal waits for its answer.
    pub fn is_proposing(&self) -> bool {
        self.pending.is_some()
    }

    /// The point of the next cut.
    pub fn next_point(&self) -> Point {
        Point { term: self.register.term, epoch: self.tip.next() }
    }

    /// Rule 1: how far output may go out.
    pub fn entitled(&self) -> Entitled {
        match (&self.phase, &self.register.value) {
            (Phase::Lost { .. } | Phase::Over, _) | (_, Value::Stopped { .. }) => Entitled::Nothing,
            (_, Value::Solo { .. }) => match self.hold {
                Some(join) if !self.mutation.release_while_pairing => Entitled::UpTo(join),
                _ => Entitled::All,
            },
            (_, Value::Paired { .. }) => {
                let proposed = matches!(&self.pending, Some(Pending { kind: Kind::Solo, .. }));
                let early = self.mutation.release_on_proposal && proposed;
                if early || (self.mutation.release_unlinked && !self.linked) {
                    return Entitled::All;
                }
                self.acked.map_or(Entitled::Nothing, |point| Entitled::UpTo(point.epoch))
            }
        }
    }

    /// The link that is missing while nobody is connected.
    pub fn wanted_link(&self) -> Option<Purpose> {
        match &self.phase {
            Phase::Alone if self.pending.is_none() => Some(Purpose::Seed),
            Phase::Paired { replica, .. } => Some(Purpose::Link(*replica)),
            _ => None,
        }
    }

    /// Begins to protect: the base copy goes to `peer` from now on. The guest's writes must be tracked already.
    ///
    /// # Errors
    /// Not from here.
    pub fn seed(&mut self, peer: NodeId) -> Result<(), PeerError> {
        match (&self.phase, &self.pending, self.stop_wanted) {
            (Phase::Alone, None, None) => {
                self.phase = Phase::Seeding { peer };
                self.covered = None;
                self.linked = true;
                Ok(())
            }
            (Phase::Alone, ..) => Err(PeerError::NotNow("a change of the register is being proposed")),
            (Phase::Lost { .. } | Phase::Over, ..) => {
                Err(PeerError::NotNow("this node does not run the guest"))
            }
            _ => Err(PeerError::NotNow("another secondary has it")),
        }
    }

    /// The guest was cut. While seeding, `join` makes this J: the epoch that makes the copy whole; what the others
    /// carry comes back. The epoch is to be sent if the answer says so.
    ///
    /// # Panics
    /// The guest is not to be cut in this phase: an own bug.
    pub fn cut(&mut self, carried: C, request: Option<Request>, join: bool) -> (Point, bool, Vec<Action<C>>) {
        let point = self.next_point();
        self.tip = point.epoch;
        self.history.extend(point);
        self.request = request.map(|request| (point.epoch, request));
        let mut actions = Vec::new();
        let ship = match &self.phase {
            Phase::Alone => false,
            Phase::Seeding { peer } if join => {
                self.phase = Phase::Joining { peer: peer.clone(), join: point };
                self.hold = Some(point.epoch).filter(|_| !self.mutation.hold_from_proposal);
                true
            }
            Phase::Seeding { .. } => {
                self.merge_back(carried, &mut actions);
                return (point, false, self.settled(actions));
            }
            Phase::Joining { .. } | Phase::Pairing { .. } | Phase::Paired { .. } => {
                if !self.linked {
                    // It cannot arrive; the first epoch on the next link carries it.
                    self.merge_back(carried, &mut actions);
                    return (point, false, self.settled(actions));
                }
                true
            }
            Phase::Lost { .. } | Phase::Over => panic!("a guest that is not this node's to run was cut"),
        };
        if ship {
            self.flight.push_back(Flight { point, carried });
        }
        (point, ship, self.settled(actions))
    }

    /// An ack came by the link that is in use.
    ///
    /// # Errors
    /// It cannot be; drop the link.
    pub fn ack(&mut self, ack: Ack) -> Result<Vec<Action<C>>, PeerError> {
        if !self.linked || ack.term != self.register.term {
            // Of a term that is over: the replica will ack again when it has heard of this one.
            return Ok(Vec::new());
        }
        if !self.history.contains(ack.point) {
            return Err(PeerError::UnknownPoint(ack.point));
        }
        match self.phase.clone() {
            Phase::Joining { peer, join } if ack.point >= join => {
                let mut actions = self.drop_flight(ack.point);
                if self.mutation.hold_from_proposal {
                    self.hold = Some(self.tip);
                }
                let value =
                    Value::Paired { primary: self.me.clone(), secondary: peer.clone(), replica: ack.replica };
                self.phase = Phase::Pairing { peer, join };
                actions.push(self.propose(Kind::Pair, value));
                Ok(actions)
            }
            Phase::Paired { replica, .. } if replica == ack.replica => {
                let actions = self.drop_flight(ack.point);
                self.acked = self.acked.max(Some(ack.point));
                Ok(self.settled(actions))
            }
            Phase::Paired { replica, .. } => {
                let offered =
                    Offer { replica: Some(ack.replica), staged: Some(ack.point), ..Offer::default() };
                Err(PeerError::OtherReplica { offered: Box::new(offered), named: replica })
            }
            _ => Ok(Vec::new()),
        }
    }

    /// The link to the secondary is gone.
    pub fn link_lost(&mut self) -> Vec<Action<C>> {
        match self.phase {
            Phase::Seeding { .. } | Phase::Joining { .. } => {
                let actions = self.void_join();
                self.settled(actions)
            }
            Phase::Pairing { .. } | Phase::Paired { .. } => {
                self.linked = false;
                self.fail_flight()
            }
            Phase::Alone | Phase::Lost { .. } | Phase::Over => Vec::new(),
        }
    }

    /// The secondary is there again, with what it offers; answers the point that the next epoch is based on.
    ///
    /// # Errors
    /// It is not the replica that the register names, or holds what is not of this history.
    pub fn relink(&mut self, peer: &NodeId, offer: &Offer) -> Result<Point, PeerError> {
        match &self.phase {
            Phase::Paired { peer: named, replica } => match (offer.replica, offer.staged) {
                // Less than it has acked: what it lacks was forgotten here.
                (Some(offered), Some(staged))
                    if offered == *replica && peer == named && Some(staged) >= self.covered =>
                {
                    if !self.history.contains(staged) {
                        return Err(PeerError::UnknownPoint(staged));
                    }
                    self.linked = true;
                    Ok(staged)
                }
                _ => Err(PeerError::OtherReplica { offered: Box::new(offer.clone()), named: *replica }),
            },
            Phase::Pairing { .. } => Err(PeerError::NotNow("the register has not answered yet")),
            _ => Err(PeerError::NotNow("the vm is not protected")),
        }
    }

    /// The secondary is taken for dead, or protection is to end: proposes to run alone. What is held goes out once
    /// that is granted. While a seed runs, it is given up.
    pub fn go_solo(&mut self) -> Vec<Action<C>> {
        match self.phase {
            Phase::Joining { .. } if self.mutation.void_join_counts => {
                self.hold = None;
                Vec::new()
            }
            Phase::Seeding { .. } | Phase::Joining { .. } => {
                let mut actions = self.void_join();
                actions.push(Action::Detach);
                self.settled(actions)
            }
            Phase::Paired { .. } if self.pending.is_none() => vec![self.propose_solo()],
            _ => Vec::new(),
        }
    }

    /// The vm is to stop for good; vCPUs are stopped already. A seed is given up.
    pub fn stop(&mut self, reason: StopReason) -> Vec<Action<C>> {
        let mut actions = Vec::new();
        match self.phase {
            Phase::Over => return actions,
            Phase::Lost { .. } => {
                // If the guest is handed back, it is not to run on.
                self.stop_wanted = Some(reason);
                return actions;
            }
            _ if self.pending.is_some() => {
                self.stop_wanted = Some(reason);
                return actions;
            }
            Phase::Seeding { .. } | Phase::Joining { .. } => {
                // Else the ack of J would propose a second thing at a time.
                actions.extend(self.void_join());
                actions.push(Action::Detach);
            }
            Phase::Alone | Phase::Pairing { .. } | Phase::Paired { .. } => {}
        }
        let value = Value::Stopped { node: self.me.clone(), reason };
        actions.push(self.propose(Kind::Stop(reason), value));
        actions
    }

    /// The arbiter answered the proposal `id`. (No answer: send it again.)
    pub fn answer(&mut self, id: ProposalId, answer: Answer) -> Vec<Action<C>> {
        match self.pending.take_if(|pending| pending.proposal.id == id) {
            None => Vec::new(),
            Some(pending) => match answer {
                Answer::Applied(entry) => self.adopt(pending.kind, entry),
                Answer::Refused(_) if self.mutation.refused_changes_nothing => {
                    self.phase = Phase::Alone;
                    self.hold = None;
                    Vec::new()
                }
                Answer::Refused(found) => self.obey(found, Some(pending.kind)),
            },
        }
    }

    /// The node that this one lost to runs the guest: what was kept for it is of no more use.
    pub fn give_up(&mut self) -> Vec<Action<C>> {
        match &self.phase {
            Phase::Lost { to } => {
                let to = to.clone();
                self.end(to)
            }
            _ => Vec::new(),
        }
    }

    /// The register was read. Tells nothing about a proposal of unknown outcome.
    pub fn observe(&mut self, found: Option<Entry>) -> Vec<Action<C>> {
        if self.mutation.old_value_is_refusal && found.as_ref() == Some(&self.register) {
            return self.believe_old_value();
        }
        let Some(entry) = found.filter(|_| self.pending.is_none()) else { return Vec::new() };
        match &self.phase {
            Phase::Over => Vec::new(),
            Phase::Lost { to } if entry.term <= to.term => Vec::new(),
            Phase::Lost { to } => {
                let mine = entry.value.is_solo_of(&self.me, self.incarnation);
                let next = entry.term == to.term.next() || self.mutation.take_any_hand_back;
                if mine && next { self.take_back(entry) } else { self.end(entry) }
            }
            _ if entry.term <= self.register.term => Vec::new(),
            _ => self.obey(Some(entry), None),
        }
    }

    /// Whether the guest's own request may be carried out, and what follows from that.
    fn settle(&mut self) -> Vec<Action<C>> {
        let Some((epoch, request)) = self.request else { return Vec::new() };
        let out = match self.entitled() {
            Entitled::All => true,
            Entitled::UpTo(limit) => limit >= epoch,
            Entitled::Nothing => false,
        };
        if !out {
            return Vec::new();
        }
        self.request = None;
        match request {
            Request::Reset => vec![Action::ResetGuest],
            Request::End => self.stop(StopReason::PowerOff),
        }
    }

    fn settled(&mut self, mut actions: Vec<Action<C>>) -> Vec<Action<C>> {
        actions.extend(self.settle());
        actions
    }

    /// J is void: the next try needs a new cut, and what was held for it may go.
    fn void_join(&mut self) -> Vec<Action<C>> {
        self.phase = Phase::Alone;
        self.linked = false;
        self.hold = None;
        // The copy is inconsistent, but may be made whole by what it lacks.
        self.covered = None;
        self.fail_flight()
    }

    fn drop_flight(&mut self, acked: Point) -> Vec<Action<C>> {
        self.covered = self.covered.max(Some(acked));
        let mut actions = Vec::new();
        while let Some(flight) = self.flight.pop_front_if(|flight| flight.point <= acked) {
            if !flight.carried.is_empty() {
                actions.push(Action::Covered(flight.point, flight.carried));
            }
        }
        actions
    }

    /// Rule 3: what was in flight is of the next epoch.
    fn fail_flight(&mut self) -> Vec<Action<C>> {
        let mut actions = Vec::new();
        let mut carried = self.flight.drain(..).map(|flight| flight.carried);
        if let Some(mut all) = carried.next() {
            carried.for_each(|more| all.merge(more));
            self.merge_back(all, &mut actions);
        }
        actions
    }

    fn merge_back(&self, carried: C, actions: &mut Vec<Action<C>>) {
        if !carried.is_empty() && !self.mutation.drop_carried {
            actions.push(Action::MergeBack(carried));
        }
    }

    fn propose(&mut self, kind: Kind, value: Value) -> Action<C> {
        assert!(self.pending.is_none(), "two proposals at a time");
        let id = ProposalId::of(self.incarnation, self.register.term);
        let proposal = Proposal { id, expected: Some(self.register.clone()), value };
        self.pending = Some(Pending { proposal: proposal.clone(), kind });
        Action::Propose(proposal)
    }

    fn propose_solo(&mut self) -> Action<C> {
        let value = Value::Solo { node: self.me.clone(), incarnation: self.incarnation };
        self.propose(Kind::Solo, value)
    }

    /// The register holds what this node proposed.
    fn adopt(&mut self, kind: Kind, entry: Entry) -> Vec<Action<C>> {
        let peer = match &self.phase {
            Phase::Pairing { peer, .. } => Some(peer.clone()),
            _ => None,
        };
        self.register = entry;
        self.acked = None;
        self.hold = None;
        let mut actions = match (kind, &self.register.value, peer) {
            (Kind::Pair, Value::Paired { replica, .. }, Some(peer)) => {
                self.phase = Phase::Paired { peer, replica: *replica };
                Vec::new()
            }
            (Kind::Solo, Value::Solo { .. }, _) => {
                // Whoever followed may come back: what its copy lacks is kept.
                self.phase = Phase::Alone;
                self.linked = false;
                if self.mutation.solo_forgets_flight {
                    self.flight.clear();
                }
                let mut actions = self.fail_flight();
                actions.push(Action::Detach);
                actions
            }
            (Kind::Stop(reason), Value::Stopped { .. }, _) => {
                self.phase = Phase::Over;
                self.linked = false;
                vec![Action::Detach, Action::End(End::Stopped(reason))]
            }
            (kind, value, _) => panic!("{kind:?} was proposed and {value} applied"),
        };
        if let Some(reason) = self.stop_wanted.take() {
            actions.extend(self.stop(reason));
        }
        actions.extend(self.settle());
        actions
    }

    /// Another's word stands in the register: never the role before.
    fn obey(&mut self, found: Option<Entry>, refused: Option<Kind>) -> Vec<Action<C>> {
        let pairing = refused == Some(Kind::Pair);
        if let Some(Kind::Stop(reason)) = refused {
            self.stop_wanted.get_or_insert(reason);
        }
        let Some(entry) = found else { return self.lose(None, false) };
        // The own Paired may have been applied and overtaken: then this node ran in the term after the one it knows.
        let before = self.register.term.next() == entry.term
            || (pairing && self.register.term.next().next() == entry.term)
            || self.mutation.take_any_hand_back;
        let keep = before && matches!(entry.value, Value::Solo { .. });
        self.lose(Some(entry), keep)
    }

    fn lose(&mut self, to: Option<Entry>, keep: bool) -> Vec<Action<C>> {
        self.linked = false;
        self.parted = self.covered.take();
        self.hold = None;
        self.acked = None;
        let mut actions = vec![Action::Park, Action::Detach];
        // Nobody is sent it by this node any more, but it tells where this node's memory differs from that point.
        actions.extend(self.fail_flight());
        match to {
            // What the guest or the operator asked for stands, in case of a hand-back.
            Some(to) if keep => self.phase = Phase::Lost { to },
            to => {
                self.phase = Phase::Over;
                actions.push(Action::End(End::Superseded(to)));
            }
        }
        actions
    }

    fn take_back(&mut self, entry: Entry) -> Vec<Action<C>> {
        self.register = entry;
        self.phase = Phase::Alone;
        let asked = match self.stop_wanted.take() {
            Some(reason) => self.stop(reason),
            None => self.settle(),
        };
        let mut actions = Vec::new();
        if self.pending.is_none() {
            actions.push(Action::Unpark);
        }
        actions.extend(asked);
        actions
    }

    fn end(&mut self, entry: Entry) -> Vec<Action<C>> {
        self.phase = Phase::Over;
        vec![Action::End(End::Superseded(Some(entry)))]
    }

    /// A mutation, never done: the request may still land.
    fn believe_old_value(&mut self) -> Vec<Action<C>> {
        self.pending = None;
        if matches!(self.phase, Phase::Pairing { .. }) { self.void_join() } else { Vec::new() }
    }
}

#[cfg(test)]
mod tests;
