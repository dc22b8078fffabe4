//! The link to a secondary, from the runner's side: one QUIC connection with a control stream both ways, one stream of
//! transfers, and heartbeats. What it is told and what it finds goes through channels of owned values; the node never
//! waits for the network.

use colo_common::{Incarnation, NodeId, Point, Term, VmId};
use colo_proto::message::{
    BlockDigestRequest, BlockDigests, DigestRequest, Diverged, RangeDigests, Verified,
};
use colo_vmm::arch::x86_64::processor::GuestCpu;
use colo_vmm::{BootFile, WireSpec};
use crossbeam_channel::Sender;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::sync::{mpsc, watch};

use crate::encode::PageCount;
use crate::heartbeat::Pulse;
use crate::node::Event;
use crate::node::status::Marks;
pub use crate::replicator::Purpose;
use crate::replicator::{Ack, Offer};
use crate::transfer::Transfer;

/// Transfers that wait to be encoded: epochs within the window, and chunks of a seed, 1 MiB each.
const MAX_WAITING: usize = 64;

/// A link that is wanted.
#[derive(Clone, Debug)]
pub struct Request {
    /// Names it in events.
    pub number: u64,
    /// The secondary's control plane.
    pub address: String,
    /// The vm.
    pub vm: VmId,
    /// This node.
    pub node: NodeId,
    /// This process.
    pub incarnation: Incarnation,
    /// The register's term.
    pub term: Term,
    /// The newest cut.
    pub tip: Point,
    /// The guest.
    pub spec: WireSpec,
    /// Digest of its spec, as machine states have it.
    pub spec_digest: u64,
    /// Its processor; nothing for a guest in software.
    pub cpu: Option<GuestCpu>,
    /// What it boots from.
    pub boot_files: Vec<BootFile>,
    /// What for.
    pub purpose: Purpose,
}

/// A guest that was kept when the register went to another.
#[derive(Clone, Debug)]
pub struct HandBack {
    /// The vm.
    pub vm: VmId,
    /// This node.
    pub node: NodeId,
    /// This process.
    pub incarnation: Incarnation,
    /// The term that it lost to.
    pub lost_to: Term,
}

/// A secondary that took the link.
#[derive(Debug)]
pub struct Welcomed {
    /// The link.
    pub link: LinkHandle,
    /// The secondary.
    pub node: NodeId,
    /// What it holds.
    pub offer: Offer,
    /// Bytes of pages in an epoch that it takes.
    pub max_epoch_bytes: u64,
    /// The other end of the connection.
    pub address: SocketAddr,
    /// What heartbeats find.
    pub pulse: Arc<Pulse>,
}

/// What a link tells.
#[derive(Debug)]
pub enum LinkEvent {
    /// The secondary took it.
    Up(Box<Welcomed>),
    /// The secondary did not take it, or not any more.
    Refused(String),
    /// The secondary has only begun: it is to be asked again soon.
    NotReady(String),
    /// It is of no more use. Nothing follows.
    Down(String),
    /// An ack.
    Ack(Ack),
    /// How far the secondary is.
    Progress(Marks),
    /// What a seed has asked for.
    Answer(Answer),
    /// Whether the copy holds what it was told of the guest.
    Verified(Verified),
    /// So many bytes of a copy's pages and blocks are written.
    Copied(u64),
    /// An epoch's frames are written.
    Sent {
        /// The epoch.
        point: Point,
        /// Bytes of its frames.
        bytes: u64,
        /// Pages in it.
        pages: PageCount,
    },
}

/// What the secondary says of its copy while it is made whole.
#[derive(Debug)]
pub enum Answer {
    /// Digests of memory.
    Pages(RangeDigests),
    /// Digests of the disk.
    Blocks(BlockDigests),
    /// Where it may hold something else than the points that the seed begins from.
    Diverged(Diverged),
}

/// A question for digests.
#[derive(Clone, Copy, Debug)]
pub enum Ask {
    /// Of memory.
    Pages(DigestRequest),
    /// Of the disk.
    Blocks(BlockDigestRequest),
}

/// Makes links.
pub trait Connector: Send + Sync {
    /// Begins to make a link; what becomes of it is told to `outbox`. One that is still being made is given up, and nothing
    /// more is told of it.
    fn connect(&self, request: Request, outbox: Sender<Event>);

    /// Offers the node at `address` to run on what this node lost to it; if that node runs the guest,
    /// [`Event::Superseded`] is told to `outbox`.
    fn offer_hand_back(&self, address: String, offer: HandBack, outbox: Sender<Event>);
}

/// What goes to the secondary.
#[derive(Debug)]
pub enum Outgoing {
    /// In order, on the stream of transfers.
    Transfer(Transfer),
    /// On the control stream.
    Digests(Ask),
    /// Answered when everything before it is written.
    Barrier(Sender<()>),
}

/// The node's end of a link.
#[derive(Clone, Debug)]
pub struct LinkHandle {
    outgoing: mpsc::Sender<Outgoing>,
    urgent: mpsc::UnboundedSender<Urgent>,
    closed: Arc<watch::Sender<bool>>,
}

/// Few and small: a change of term, a yield.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgent {
    /// The register was changed in this node's favour.
    Term(Term),
    /// Take over: this node's guest failed, or is to move.
    Yield {
        /// It failed.
        failed: bool,
    },
}

/// The link's end of it.
#[derive(Debug)]
pub struct LinkEnd {
    /// What to send.
    pub outgoing: mpsc::Receiver<Outgoing>,
    /// What to say at once.
    pub urgent: mpsc::UnboundedReceiver<Urgent>,
    /// True once the node has dropped the link.
    pub closed: watch::Receiver<bool>,
}

impl LinkHandle {
    /// Both ends.
    pub fn new() -> (Self, LinkEnd) {
        let (outgoing, to_send) = mpsc::channel(MAX_WAITING);
        let (urgent, to_say) = mpsc::unbounded_channel();
        let (closed, is_closed) = watch::channel(false);
        let end = LinkEnd { outgoing: to_send, urgent: to_say, closed: is_closed };
        (Self { outgoing, urgent, closed: Arc::new(closed) }, end)
    }

    /// Sends without waiting.
    ///
    /// # Errors
    /// The link is down, or far behind.
    pub fn send(&self, transfer: Transfer) -> Result<(), String> {
        let sent = self.outgoing.try_send(Outgoing::Transfer(transfer));
        sent.map_err(|e| match e {
            mpsc::error::TrySendError::Full(_) => "the link is too far behind".to_owned(),
            mpsc::error::TrySendError::Closed(_) => "the link is down".to_owned(),
        })
    }

    /// Sends, and waits for room: not for the thread that owns the guest.
    ///
    /// # Errors
    /// The link is down.
    pub fn send_waiting(&self, transfer: Transfer) -> Result<(), String> {
        self.outgoing.blocking_send(Outgoing::Transfer(transfer)).map_err(|_| "the link is down".to_owned())
    }

    /// Waits until everything that was sent before is written.
    ///
    /// # Errors
    /// The link is down.
    pub fn drain(&self) -> Result<(), String> {
        let down = || "the link is down".to_owned();
        let (done, wait) = crossbeam_channel::bounded(1);
        self.outgoing.blocking_send(Outgoing::Barrier(done)).map_err(|_| down())?;
        wait.recv().map_err(|_| down())
    }

    /// Asks for digests, and waits for room.
    ///
    /// # Errors
    /// The link is down.
    pub fn request_digests(&self, ask: Ask) -> Result<(), String> {
        self.outgoing.blocking_send(Outgoing::Digests(ask)).map_err(|_| "the link is down".to_owned())
    }

    /// Tells the secondary of a newer term.
    pub fn send_term(&self, term: Term) {
        let _ = self.urgent.send(Urgent::Term(term));
    }

    /// Tells the secondary to take over, since the guest `failed` here or is to move.
    pub fn send_yield(&self, failed: bool) {
        let _ = self.urgent.send(Urgent::Yield { failed });
    }

    /// Ends the link, whoever else still holds it.
    pub fn close(&self) {
        self.closed.send_replace(true);
    }
}
