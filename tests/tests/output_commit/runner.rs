//! A node that runs the guest, with nothing but its output: `primary::node::Node` around the real parts.

use colo_common::Point;
use colo_common::register::{Proposal, Value};
use colo_primary::encode::Encoder;
use colo_primary::epoch::{SeedState, Stand, Turn, turn};
use colo_primary::release::Release;
use colo_primary::replicator::{Action, Entitled, Phase, Replicator};
use colo_primary::transfer::Epoch;
use colo_proto::frame::Frame;
use colo_vmm::egress::{Egress, Output, OutputPosition};
use colo_vmm::{PageBatch, PagePool};
use std::time::Instant;

use crate::fixture::{fixture, tag};
use crate::plan::Mutations;
use crate::world::{Outlet, World};

/// Epochs in flight.
const WINDOW: usize = 3;

/// What is known of the other end: `node::Peer`.
pub(crate) struct Peer {
    pub(crate) base: Option<Point>,
    pub(crate) resend_output: bool,
    pub(crate) encoder: Encoder,
}

/// `node::Node`.
pub(crate) struct Runner {
    pub(crate) replicator: Replicator<()>,
    pub(crate) peer: Option<Peer>,
    /// Proposed, and not answered yet.
    pub(crate) proposal: Option<Proposal>,
    pub(crate) over: bool,
    egress: Egress,
    release: Release,
    /// Cut, and not sent for want of room.
    standing: bool,
    parked: bool,
    next_out: OutputPosition,
    mutations: Mutations,
}

impl Runner {
    /// Runs on from `position` with this output held.
    pub(crate) fn new(
        replicator: Replicator<()>,
        release: Release,
        position: OutputPosition,
        mutations: Mutations,
    ) -> Self {
        let egress = Egress::default();
        egress.restore(position);
        Self {
            replicator,
            peer: None,
            proposal: None,
            over: false,
            egress,
            next_out: release.released(),
            release,
            standing: false,
            parked: false,
            mutations,
        }
    }

    fn runs(&self) -> bool {
        !self.standing && !self.parked && !self.over
    }

    pub(crate) fn say(&self, words: u8, world: &mut World) {
        if self.runs() {
            (0..words).for_each(|_| self.egress.push_console(&world.stamp().to_le_bytes()));
        }
    }

    /// A frame tells where it was made.
    pub(crate) fn send_frame(&self, world: &mut World) {
        if self.runs() {
            let OutputPosition { console, frames } = self.egress.position();
            let bytes = [world.stamp(), console, frames].map(u64::to_le_bytes).concat();
            self.egress.push_frame(0, bytes).expect("so little is never too much");
        }
    }

    /// `Node::cut` with `stop_guest`.
    pub(crate) fn cut(&mut self) {
        if self.runs() {
            let mut output = self.egress.take();
            let epoch = self.replicator.next_point().epoch;
            if self.mutations.order_swapped {
                output.items.reverse();
            }
            self.release.hold(epoch, output);
            self.standing = true;
        }
    }

    /// `Node::ship_if_possible`; answers the frames to be sent.
    pub(crate) fn ship_if_possible(&mut self, world: &mut World) -> Vec<Frame> {
        if !self.standing || self.parked || self.over {
            return Vec::new();
        }
        let has_room = self.replicator.is_linked() && self.replicator.in_flight() < WINDOW;
        let seed = SeedState { is_idle: true, waits_for_rest: false };
        let stand = Stand { is_sound: true, has_room, may_leave: true, seed };
        match turn(self.replicator.phase(), stand) {
            Turn::Number => {
                let (point, _, actions) = self.replicator.cut((), None, false);
                world.cut(point, self.egress.position());
                self.standing = false;
                self.act(actions, world);
                Vec::new()
            }
            Turn::Complete => self.ship(true, world),
            Turn::Ship => self.ship(false, world),
            Turn::Wait | Turn::GiveUp => Vec::new(),
        }
    }

    fn ship(&mut self, join: bool, world: &mut World) -> Vec<Frame> {
        self.standing = false;
        let (point, shipped, actions) = self.replicator.cut((), None, join);
        assert!(shipped, "{point} was to be sent in {:?}", self.replicator.phase());
        world.cut(point, self.egress.position());
        let mut state = fixture().state.clone();
        state.output = self.egress.position();
        let history = self.replicator.history().points().to_vec();
        let mut frames = Vec::new();
        if let Some(peer) = &mut self.peer {
            let again = std::mem::take(&mut peer.resend_output);
            let (all, own) = (self.release.all_held(), self.release.held_of(point.epoch));
            world.counts.add_many("output told again", u64::from(again && all != own && !join));
            let output = match self.mutations {
                Mutations { output_not_told_again: true, .. } => own,
                // As if it went with what failed: the place is right and the content is not.
                Mutations { failed_output_dropped: true, .. } if again => {
                    Output { start: all.start, items: own.items }
                }
                _ if again => all,
                _ => own,
            };
            let pages = PageBatch::copy(&fixture().memory, Vec::new(), &PagePool::default());
            let epoch = Epoch {
                point,
                base: peer.base.replace(point),
                history,
                pages: pages.expect("no page"),
                blocks: Vec::new(),
                state,
                output,
                released: self.release.released(),
                promotions: 0,
                cut_at: Instant::now(),
            };
            peer.encoder.epoch(epoch, |frame| frames.push(frame));
            peer.encoder = Encoder::new(tag(), point);
        }
        self.act(actions, world);
        frames
    }

    /// `Node::act`.
    pub(crate) fn act(&mut self, actions: Vec<Action<()>>, world: &mut World) {
        for action in actions {
            match action {
                Action::Propose(proposal) => self.proposal = Some(proposal),
                Action::Detach => self.peer = None,
                Action::Park => self.parked = true,
                Action::Unpark => (self.parked, self.standing) = (false, false),
                Action::End(_) => {
                    self.let_out(world);
                    self.over = true;
                }
                Action::MergeBack(()) | Action::Covered(..) | Action::ResetGuest => {}
            }
        }
    }

    /// `Node::let_out`.
    pub(crate) fn let_out(&mut self, world: &mut World) {
        let paired = match &self.replicator.register().value {
            Value::Paired { replica, .. } => Some(*replica),
            _ => None,
        };
        let mut entitled = self.replicator.entitled();
        if self.mutations.release_before_ack && paired.is_some() && !self.over {
            entitled = Entitled::All;
        }
        let (before, runs) = (self.release.released(), self.runs());
        let outlet = &mut Outlet { world, next: &mut self.next_out };
        self.release.let_out(entitled, outlet);
        if entitled == Entitled::All && runs {
            let epoch = self.replicator.next_point().epoch;
            let output = self.egress.take();
            self.release.hold(epoch, output);
            self.release.let_out(entitled, outlet);
        }
        let lost = matches!(self.replicator.phase(), Phase::Lost { .. } | Phase::Over);
        let released = self.release.released();
        if released != before {
            if lost {
                world.broken(|| "a node lets output out that has lost the register".to_owned());
            }
            if let Some(replica) = paired {
                world.check_acked(replica, released);
            }
        }
    }
}
