//! Serves links: one QUIC connection of a runner at a time. Frames are read, checked and staged here; what is whole goes
//! to the node. Reading stops while the node holds as much as its memory budget allows, so the runner is slowed by QUIC
//! itself.

use colo_common::{Incarnation, NodeId, Point, Term, VmId};
use colo_primary::heartbeat::{Pulse, Watch};
use colo_primary::wire::{WireError, read_control, read_frame, write_control};
use colo_proto::frame::VmTag;
use colo_proto::message::{
    Ack, BlockDigestRequest, BlockDigests, Control, DigestRequest, Diverged, Goodbye, Hello, MAX_VERIFY_BODY,
    Progress, RangeDigests, Refusal, Refused, SeedMode, Verified, Verify, Welcome, Yield,
};
use colo_vmm::arch::x86_64::processor::GuestCpu;
use colo_vmm::{GuestMemory, PagePool};
use crossbeam_channel::Sender;
use quinn::{Connection, RecvStream, SendStream};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tracing::Instrument;

use crate::node::Event;
use crate::staging::{StagedBlocks, StagedEpoch, StagedPart, Staging, Step};

/// How long a runner may take to say what it wants.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// The unit in which the memory budget is counted.
const UNIT: u64 = 4096;

/// Room for epochs that are staged and not yet done with.
#[derive(Clone, Debug)]
pub struct Budget {
    units: Arc<Semaphore>,
    all: u32,
}

impl Budget {
    /// Room for so many bytes.
    pub fn new(bytes: u64) -> Self {
        let all = u32::try_from(bytes / UNIT).unwrap_or(u32::MAX).clamp(1, 1 << 28);
        Self { units: Arc::new(Semaphore::new(all as usize)), all }
    }

    /// Bytes that are in use.
    pub fn used(&self) -> u64 {
        (u64::from(self.all) - self.units.available_permits() as u64) * UNIT
    }

    async fn take(&self, bytes: u64) -> Option<OwnedSemaphorePermit> {
        // One epoch always finds room in the end, whatever its size.
        let units = u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX).min(self.all);
        Arc::clone(&self.units).acquire_many_owned(units).await.ok()
    }
}

/// What the node says to a runner.
#[derive(Debug)]
pub enum Say {
    /// An ack.
    Ack(Ack),
    /// How far it is.
    Progress(Progress),
    /// Digests that were asked for.
    Digests(RangeDigests),
    /// Digests of the disk that were asked for.
    BlockDigests(BlockDigests),
    /// Where the copy may hold something else than the points that the seed begins from.
    Diverged(Diverged),
    /// Whether the copy holds what it was told of the guest.
    Verified(Verified),
    /// The link is over, and why.
    Refused(Refused),
}

/// A runner that wants a link.
pub struct Caller {
    /// Names the link in events.
    pub number: u64,
    /// What it said.
    pub hello: Hello,
    /// The other end of the connection.
    pub address: SocketAddr,
    /// What heartbeats find.
    pub pulse: Arc<Pulse>,
    /// Where the node's words go; the link ends when it is dropped.
    pub say: mpsc::UnboundedSender<Say>,
    /// The node's answer.
    pub reply: oneshot::Sender<Result<Agreed, Refused>>,
}

/// What a link needs to know of the guest.
pub struct Agreed {
    /// The answer to send.
    pub welcome: Welcome,
    /// The guest's memory: frames are checked against it.
    pub memory: Arc<GuestMemory>,
    /// Blocks of its disk; 0 without one.
    pub disk_blocks: u64,
    /// Digest of its spec.
    pub spec_digest: u64,
    /// Its processor; nothing for a guest in software.
    pub cpu: Option<GuestCpu>,
}

/// What a link tells.
pub enum LinkEvent {
    /// A seed begins; pages follow once the node has answered.
    SeedBegin {
        /// All or what differs.
        mode: SeedMode,
        /// Whether the pages may come.
        reply: oneshot::Sender<bool>,
    },
    /// A part of a seed.
    SeedPages(StagedPart, OwnedSemaphorePermit),
    /// Blocks of a seed.
    SeedBlocks(StagedBlocks, OwnedSemaphorePermit),
    /// A whole epoch.
    Epoch(Box<StagedEpoch>, OwnedSemaphorePermit),
    /// What the guest has at this point, and the room that it takes.
    Verify(Point, Verify, OwnedSemaphorePermit),
    /// The runner's term is newer.
    Term(Term),
    /// Digests are wanted.
    Digests(DigestRequest),
    /// Digests of the disk are wanted.
    BlockDigests(BlockDigestRequest),
    /// The runner's guest does not run any more: take over.
    Yield(Yield),
    /// Nothing follows.
    Down(String),
}

/// What a server of links needs.
#[derive(Clone)]
pub struct Receiver {
    /// The vm.
    pub vm: VmId,
    /// This node.
    pub node: NodeId,
    /// This process.
    pub incarnation: Incarnation,
    /// Heartbeats.
    pub watch: Watch,
    /// Room for epochs.
    pub budget: Budget,
    /// The node.
    pub outbox: Sender<Event>,
}

impl Receiver {
    /// Serves connections until the endpoint is closed.
    pub async fn serve(self, endpoint: quinn::Endpoint) {
        let mut number = 0;
        while let Some(incoming) = endpoint.accept().await {
            number += 1;
            let this = self.clone();
            let serving = async move {
                match incoming.await {
                    Ok(connection) => {
                        let why = this.connection(number, &connection).await;
                        tracing::debug!(vm = %this.vm, "link {number} ended: {why}");
                        connection.close(0_u32.into(), b"");
                    }
                    Err(e) => tracing::warn!(vm = %this.vm, "a connection was not made: {e}"),
                }
            };
            tokio::spawn(serving.in_current_span());
        }
    }

    async fn connection(&self, number: u64, connection: &Connection) -> String {
        let vm = VmTag::of(&self.vm);
        let pulse = Arc::new(Pulse::new(connection));
        let opening = self.open(number, connection, vm, &pulse);
        let opened = match tokio::time::timeout(HANDSHAKE_LIMIT, opening).await {
            Ok(Ok(opened)) => opened,
            // The node may have taken the link already.
            Ok(Err(why)) => return self.down(number, why).await,
            Err(_) => return self.down(number, "the runner does not say what it wants".to_owned()).await,
        };
        let Opened { say, hear, words, agreed, term } = opened;
        pulse.hear();
        let why = tokio::select! {
            why = self.watch.beat(connection, vm, term, &pulse) => why,
            why = self.hear(number, hear, vm) => why,
            why = speak(say, words, vm) => why,
            why = self.receive(number, connection, vm, &agreed) => why,
        };
        self.down(number, why).await
    }

    async fn down(&self, number: u64, why: String) -> String {
        self.tell(number, LinkEvent::Down(why.clone())).await;
        why
    }

    /// Hello and its answer.
    async fn open(
        &self,
        number: u64,
        connection: &Connection,
        vm: VmTag,
        pulse: &Arc<Pulse>,
    ) -> Result<Opened, String> {
        let (mut say, mut hear) = connection.accept_bi().await.map_err(|e| e.to_string())?;
        let hello = match read_control(&mut hear, vm, &PagePool::default()).await {
            Ok(Control::Hello(hello)) => hello,
            Ok(other) => return Err(format!("{other:?} instead of a hello")),
            Err(e) => return Err(e.to_string()),
        };
        let (words_in, words) = mpsc::unbounded_channel();
        let (reply, answer) = oneshot::channel();
        let term = hello.term;
        let (address, pulse) = (connection.remote_address(), Arc::clone(pulse));
        let caller = Caller { number, hello, address, pulse, say: words_in, reply };
        self.send(Event::Caller(Box::new(caller))).await;
        match answer.await {
            Ok(Ok(agreed)) => {
                write_control(&mut say, vm, &agreed.welcome).await.map_err(|e| e.to_string())?;
                Ok(Opened { say, hear, words, agreed, term })
            }
            Ok(Err(refused)) => {
                let why = refused.detail.to_string();
                // Waits until the runner has read it, or is gone.
                let _ = write_control(&mut say, vm, &refused).await;
                let _ = say.finish();
                let _ = tokio::time::timeout(HANDSHAKE_LIMIT, say.stopped()).await;
                Err(why)
            }
            Err(_) => Err("the node has ended".to_owned()),
        }
    }

    async fn hear(&self, number: u64, mut stream: RecvStream, vm: VmTag) -> String {
        let pool = PagePool::default();
        loop {
            let message = match read_control(&mut stream, vm, &pool).await {
                Ok(message) => message,
                Err(e) => return e.to_string(),
            };
            let event = match message {
                Control::TermChanged(changed) => LinkEvent::Term(changed.term),
                Control::DigestRequest(request) => LinkEvent::Digests(request),
                Control::BlockDigestRequest(request) => LinkEvent::BlockDigests(request),
                Control::Yield(word) => LinkEvent::Yield(word),
                // The end of the connection says the same, once all that was sent before it is read.
                Control::Goodbye(Goodbye) => continue,
                other => return format!("the runner said {other:?}, which is not its part"),
            };
            self.tell(number, event).await;
        }
    }

    /// The stream of transfers.
    async fn receive(&self, number: u64, connection: &Connection, vm: VmTag, agreed: &Agreed) -> String {
        let mut stream = match connection.accept_uni().await {
            Ok(stream) => stream,
            Err(e) => return format!("the connection is lost: {e}"),
        };
        let memory = &*agreed.memory;
        let limit = memory.layout().frame_limit();
        let staging = Staging::new(limit, agreed.welcome.max_epoch_bytes, agreed.spec_digest);
        let mut staging = staging.with_cpu(agreed.cpu.clone()).with_disk(agreed.disk_blocks);
        let pool = PagePool::default();
        loop {
            let frame = match read_frame(&mut stream, vm, &pool).await {
                Ok(Some(frame)) => frame,
                Ok(None) => return WireError::Closed.to_string(),
                Err(e) => return e.to_string(),
            };
            let arrived = Instant::now();
            let event = match staging.frame(&frame, memory) {
                Ok(Step::More) => continue,
                Ok(Step::Whole(mut epoch)) => {
                    epoch.measures.arrived = Some(arrived);
                    Step::Whole(epoch)
                }
                Ok(step) => step,
                Err(e) => return format!("what came cannot be staged: {e}"),
            };
            if let Err(why) = self.staged(number, event).await {
                return why;
            }
        }
    }

    async fn staged(&self, number: u64, step: Step) -> Result<(), String> {
        match step {
            Step::More => {}
            Step::Seed(mode) => {
                let (reply, answer) = oneshot::channel();
                self.tell(number, LinkEvent::SeedBegin { mode, reply }).await;
                if !matches!(answer.await, Ok(true)) {
                    return Err("the seed was not taken".to_owned());
                }
            }
            Step::SeedPages(part) => {
                let bytes = part.pages.as_ref().map_or(0, |pages| pages.bytes()) + UNIT;
                let Some(room) = self.budget.take(bytes).await else {
                    return Err("the node has ended".to_owned());
                };
                self.tell(number, LinkEvent::SeedPages(part, room)).await;
            }
            Step::SeedBlocks(part) => {
                let Some(room) = self.budget.take(part.bytes() + UNIT).await else {
                    return Err("the node has ended".to_owned());
                };
                self.tell(number, LinkEvent::SeedBlocks(part, room)).await;
            }
            Step::Whole(epoch) => {
                let Some(room) = self.budget.take(epoch.bytes).await else {
                    return Err("the node has ended".to_owned());
                };
                self.tell(number, LinkEvent::Epoch(epoch, room)).await;
            }
            Step::Verify(point, list) => {
                let Some(room) = self.budget.take(MAX_VERIFY_BODY as u64).await else {
                    return Err("the node has ended".to_owned());
                };
                self.tell(number, LinkEvent::Verify(point, list, room)).await;
            }
        }
        Ok(())
    }

    async fn tell(&self, number: u64, event: LinkEvent) {
        self.send(Event::Link(number, event)).await;
    }

    /// The node's inbox is bounded; waiting for it slows this link, which is as it should be.
    async fn send(&self, event: Event) {
        let outbox = self.outbox.clone();
        if let Err(crossbeam_channel::TrySendError::Full(event)) = outbox.try_send(event) {
            let _ = tokio::task::spawn_blocking(move || drop(outbox.send(event))).await;
        }
    }
}

struct Opened {
    say: SendStream,
    hear: RecvStream,
    words: mpsc::UnboundedReceiver<Say>,
    agreed: Agreed,
    term: Term,
}

async fn speak(mut stream: SendStream, mut words: mpsc::UnboundedReceiver<Say>, vm: VmTag) -> String {
    while let Some(word) = words.recv().await {
        let said = match &word {
            Say::Ack(ack) => write_control(&mut stream, vm, ack).await,
            Say::Progress(progress) => write_control(&mut stream, vm, progress).await,
            Say::Digests(digests) => write_control(&mut stream, vm, digests).await,
            Say::BlockDigests(digests) => write_control(&mut stream, vm, digests).await,
            Say::Diverged(diverged) => write_control(&mut stream, vm, diverged).await,
            Say::Verified(verified) => write_control(&mut stream, vm, verified).await,
            Say::Refused(refused) => write_control(&mut stream, vm, refused).await,
        };
        if let Err(e) = said {
            return e.to_string();
        }
        if let Say::Refused(refused) = word {
            let _ = stream.finish();
            let _ = tokio::time::timeout(Duration::from_secs(1), stream.stopped()).await;
            return refused.detail.to_string();
        }
    }
    let _ = write_control(&mut stream, vm, &Goodbye).await;
    "this node dropped it".to_owned()
}

/// A refusal in the words of an error.
pub fn refused(reason: Refusal, detail: &str) -> Refused {
    Refused { reason, detail: colo_proto::message::Detail::new(detail) }
}
