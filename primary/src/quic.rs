//! Makes links over gRPC (to agree on the guest) and QUIC (for everything after that), and serves them: the sender of
//! the way of a page.

use colo_common::Point;
use colo_common::telemetry::node_span;
use colo_proto::frame::{Frame, Kind, VmTag};
use colo_proto::message::{Control, Goodbye, Hello, Purpose as WirePurpose, Refusal, TermChanged, Yield};
use colo_proto::version::Versions;
use colo_vmm::PagePool;
use crossbeam_channel::Sender;
use quinn::{Connection, RecvStream, SendStream};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tracing::Instrument;

use crate::encode::{Encoder, PageCount};
use crate::heartbeat::{Pulse, Rhythm, Watch};
use crate::link::{
    Answer, Ask, Connector, HandBack, LinkEnd, LinkEvent, LinkHandle, Outgoing, Purpose, Request, Urgent,
    Welcomed,
};
use crate::node::Event;
use crate::node::status::Marks;
use crate::pairing::{PairingClient, PairingError};
use crate::replicator::{Ack, Offer};
use crate::transfer::Transfer;
use crate::wire::{WireError, read_control, write_control, write_frame};

/// How long a secondary may take to answer while a link is made.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Bytes of a copy after which the node is told of them: often enough to see them grow, and seldom for its inbox.
const COPIED_STEP: u64 = 16 << 20;
/// Name that every node's certificate has.
pub const NODE_NAME: &str = "node.colo.internal";

/// Makes links to secondaries.
#[derive(Clone)]
pub struct QuicConnector {
    runtime: Handle,
    endpoint: quinn::Endpoint,
    pairing: PairingClient,
    watch: Watch,
    /// Ends the newest attempt when it is dropped: what is tried no more must not get between the next attempt and the
    /// secondary.
    attempt: Arc<Mutex<Option<oneshot::Sender<()>>>>,
}

impl QuicConnector {
    /// Links go out from `endpoint`, which has this node's certificate.
    pub fn new(runtime: Handle, endpoint: quinn::Endpoint, pairing: PairingClient, rhythm: Rhythm) -> Self {
        Self { runtime, endpoint, pairing, watch: Watch::new(rhythm), attempt: Arc::default() }
    }
}

impl Connector for QuicConnector {
    fn connect(&self, request: Request, outbox: Sender<Event>) {
        let this = self.clone();
        let (goes_on, given_up) = oneshot::channel();
        *self.attempt.lock().unwrap_or_else(PoisonError::into_inner) = Some(goes_on);
        let linking = async move {
            let number = request.number;
            let Some(ended) = this.link(request, &outbox, given_up).await else { return };
            let event = match ended {
                Ok(why) => LinkEvent::Down(why),
                Err(Failed::Down(why)) => LinkEvent::Down(why),
                Err(Failed::Refused(why)) => LinkEvent::Refused(why),
                Err(Failed::NotReady(why)) => LinkEvent::NotReady(why),
            };
            tell(&outbox, number, event);
        };
        self.runtime.spawn(linking.instrument(node_span()));
    }

    fn offer_hand_back(&self, address: String, offer: HandBack, outbox: Sender<Event>) {
        let pairing = self.pairing.clone();
        let offering = async move {
            match pairing.offer_hand_back(&address, &offer).await {
                Ok(()) => {}
                Err(PairingError::Runs(why)) => drop(outbox.send(Event::Superseded(why))),
                Err(e) => tracing::debug!("the guest cannot be offered back: {e}"),
            }
        };
        self.runtime.spawn(offering.instrument(node_span()));
    }
}

/// Why there is no link.
enum Failed {
    Down(String),
    Refused(String),
    NotReady(String),
}

impl From<WireError> for Failed {
    fn from(error: WireError) -> Self {
        Self::Down(error.to_string())
    }
}

fn tell(outbox: &Sender<Event>, number: u64, event: LinkEvent) {
    // The inbox has room for all that can be on its way; a node that has ended needs to know nothing.
    drop(outbox.send(Event::Link(number, event)));
}

/// A link that nobody serves yet.
struct Made {
    connection: Connection,
    say: SendStream,
    hear: RecvStream,
    welcomed: Welcomed,
    end: LinkEnd,
}

/// Both directions of the control stream and what they are about.
struct Link {
    number: u64,
    vm: VmTag,
    outbox: Sender<Event>,
    pool: PagePool,
}

impl QuicConnector {
    /// Makes a link and serves it; answers why it ended, or nothing if it was `given_up` while it was made.
    async fn link(
        &self,
        request: Request,
        outbox: &Sender<Event>,
        given_up: oneshot::Receiver<()>,
    ) -> Option<Result<String, Failed>> {
        let made = tokio::select! {
            made = self.agree_and_make(&request) => made,
            _ = given_up => return None,
        };
        Some(match made {
            Ok(made) => Ok(self.serve(made, &request, outbox).await),
            Err(failed) => Err(failed),
        })
    }

    async fn agree_and_make(&self, request: &Request) -> Result<Made, Failed> {
        // Has limits of its own: boot files may be large.
        let paired = self.pairing.pair(request).await.map_err(|e| match e {
            PairingError::Refused(why) => Failed::Refused(why),
            other => Failed::Down(other.to_string()),
        })?;
        let making = self.make(request, paired.address);
        let made = tokio::time::timeout(HANDSHAKE_LIMIT, making).await;
        made.map_err(|_| Failed::Down(format!("{} does not answer", request.address)))?
    }

    async fn serve(&self, made: Made, request: &Request, outbox: &Sender<Event>) -> String {
        let Made { connection, say, hear, welcomed, end } = made;
        let vm = VmTag::of(&request.vm);
        let link = Link { number: request.number, vm, outbox: outbox.clone(), pool: PagePool::default() };
        let pulse = Arc::clone(&welcomed.pulse);
        tell(outbox, request.number, LinkEvent::Up(Box::new(welcomed)));
        let LinkEnd { outgoing, urgent, mut closed } = end;
        let (digests_out, digests_in) = mpsc::channel(4);
        let tip = request.tip;
        let why = tokio::select! {
            why = self.watch.beat(&connection, vm, request.term, &pulse) => why,
            why = link.hear(hear) => why,
            why = link.say(say, urgent, digests_in) => why,
            why = link.send(&connection, outgoing, digests_out, tip) => why,
            _ = closed.wait_for(|closed| *closed) => "this node dropped it".to_owned(),
        };
        connection.close(0_u32.into(), b"");
        why
    }

    async fn make(&self, request: &Request, address: SocketAddr) -> Result<Made, Failed> {
        let connection = self.dial(address).await.map_err(Failed::Down)?;
        let pulse = Arc::new(Pulse::new(&connection));
        let lost = |e: quinn::ConnectionError| Failed::Down(format!("the connection is lost: {e}"));
        let (mut say, mut hear) = connection.open_bi().await.map_err(lost)?;
        let vm = VmTag::of(&request.vm);
        let purpose = match request.purpose {
            Purpose::Seed => WirePurpose::Seed,
            Purpose::Link(replica) => WirePurpose::Link { replica },
        };
        let hello = Hello {
            versions: Versions::OURS,
            node: request.node.clone(),
            incarnation: request.incarnation,
            vm: request.vm.clone(),
            term: request.term,
            spec_digest: request.spec_digest,
            purpose,
        };
        write_control(&mut say, vm, &hello).await?;
        let welcome = match read_control(&mut hear, vm, &PagePool::default()).await? {
            Control::Welcome(welcome) => welcome,
            Control::Refused(refused) => {
                let why = refused.detail.to_string();
                let begins = refused.reason == Refusal::NotReady;
                return Err(if begins { Failed::NotReady(why) } else { Failed::Refused(why) });
            }
            other => return Err(Failed::Down(format!("the secondary answered {other:?} to a hello"))),
        };
        let (link, end) = LinkHandle::new();
        let offer = Offer {
            replica: welcome.replica,
            staged: welcome.staged.or(welcome.stale),
            bases: welcome.bases,
            history: welcome.history,
        };
        let max_epoch_bytes = welcome.max_epoch_bytes;
        pulse.hear();
        let address = connection.remote_address();
        let welcomed = Welcomed { link, node: welcome.node, offer, max_epoch_bytes, address, pulse };
        Ok(Made { connection, say, hear, welcomed, end })
    }

    async fn dial(&self, address: SocketAddr) -> Result<Connection, String> {
        let connecting = self.endpoint.connect(address, NODE_NAME).map_err(|e| e.to_string())?;
        connecting.await.map_err(|e| format!("no QUIC connection to {address}: {e}"))
    }
}

impl Link {
    fn tell(&self, event: LinkEvent) {
        tell(&self.outbox, self.number, event);
    }

    async fn hear(&self, mut stream: RecvStream) -> String {
        loop {
            let message = match read_control(&mut stream, self.vm, &self.pool).await {
                Ok(message) => message,
                Err(e) => return e.to_string(),
            };
            match message {
                Control::Ack(ack) => {
                    let (point, replica, term) = (ack.point, ack.replica, ack.term);
                    self.tell(LinkEvent::Ack(Ack { point, replica, term }));
                }
                Control::Progress(progress) => self.tell(LinkEvent::Progress(Marks {
                    staged: progress.staged,
                    applied: progress.applied,
                    persisted: progress.persisted,
                    backlog_bytes: progress.backlog_bytes,
                })),
                Control::RangeDigests(digests) => self.tell(LinkEvent::Answer(Answer::Pages(digests))),
                Control::BlockDigests(digests) => self.tell(LinkEvent::Answer(Answer::Blocks(digests))),
                Control::Diverged(diverged) => self.tell(LinkEvent::Answer(Answer::Diverged(diverged))),
                Control::Verified(verified) => self.tell(LinkEvent::Verified(verified)),
                Control::Refused(refused) => {
                    self.tell(LinkEvent::Refused(refused.detail.to_string()));
                    return refused.detail.to_string();
                }
                Control::Goodbye(_) => return "the secondary said goodbye".to_owned(),
                other => return format!("the secondary said {other:?}, which is not its part"),
            }
        }
    }

    async fn say(
        &self,
        mut stream: SendStream,
        mut urgent: mpsc::UnboundedReceiver<Urgent>,
        mut digests: mpsc::Receiver<Ask>,
    ) -> String {
        loop {
            let said = tokio::select! {
                Some(ask) = digests.recv() => match ask {
                    Ask::Pages(request) => write_control(&mut stream, self.vm, &request).await,
                    Ask::Blocks(request) => write_control(&mut stream, self.vm, &request).await,
                },
                word = urgent.recv() => match word {
                    Some(Urgent::Term(term)) => write_control(&mut stream, self.vm, &TermChanged { term }).await,
                    Some(Urgent::Yield { failed }) => write_control(&mut stream, self.vm, &Yield { failed }).await,
                    None => {
                        drop(write_control(&mut stream, self.vm, &Goodbye).await);
                        return "this node dropped it".to_owned();
                    }
                },
            };
            if let Err(e) = said {
                return e.to_string();
            }
        }
    }

    /// The stream of transfers.
    async fn send(
        &self,
        connection: &Connection,
        mut outgoing: mpsc::Receiver<Outgoing>,
        digests: mpsc::Sender<Ask>,
        tip: Point,
    ) -> String {
        let mut stream = match connection.open_uni().await {
            Ok(stream) => stream,
            Err(e) => return format!("the connection is lost: {e}"),
        };
        let mut encoder = Encoder::new(self.vm, tip);
        // Of a copy, and not told yet.
        let mut copied = 0;
        while let Some(next) = outgoing.recv().await {
            let transfer = match next {
                Outgoing::Transfer(transfer) => transfer,
                Outgoing::Barrier(done) => {
                    self.tell(LinkEvent::Copied(std::mem::take(&mut copied)));
                    // Whoever waits has left only if the seed was given up.
                    let _ = done.send(());
                    continue;
                }
                Outgoing::Digests(ask) => {
                    let _ = digests.send(ask).await;
                    continue;
                }
            };
            let point = match &transfer {
                Transfer::Epoch(epoch) => Some(epoch.point),
                _ => None,
            };
            // Encoding sums up every page: not on a thread that others wait for.
            let (encoded, pages) = tokio::task::block_in_place(|| encode(&mut encoder, transfer));
            let mut bytes = 0;
            for frame in &encoded {
                match write_frame(&mut stream, frame).await {
                    Ok(written) => bytes += written,
                    Err(e) => return e.to_string(),
                }
            }
            if let Some(point) = point {
                encoder = Encoder::new(self.vm, point);
                self.tell(LinkEvent::Sent { point, bytes, pages });
            } else {
                copied += content(&encoded);
            }
            if copied > COPIED_STEP {
                self.tell(LinkEvent::Copied(std::mem::take(&mut copied)));
            }
        }
        // Whoever drops the link says so on the control stream; the transfers end with the connection.
        std::future::pending().await
    }
}

/// Bytes of pages and blocks in these frames.
fn content(frames: &[Frame]) -> u64 {
    let carries = |frame: &&Frame| matches!(frame.header().kind, Kind::Pages | Kind::Blocks);
    frames.iter().filter(carries).map(|frame| frame.body().len() as u64).sum()
}

/// The frames of a transfer, and the pages in it if it is an epoch.
fn encode(encoder: &mut Encoder, transfer: Transfer) -> (Vec<Frame>, PageCount) {
    let (mut frames, mut pages) = (Vec::new(), PageCount::default());
    match transfer {
        Transfer::SeedBegin { mode, history } => frames.push(encoder.seed(mode, history)),
        Transfer::SeedPages(batch) => encoder.pages(batch, |frame| frames.push(frame)),
        Transfer::SeedZeros(runs) => encoder.zeros(&runs, |frame| frames.push(frame)),
        Transfer::SeedBlocks(writes) => encoder.blocks(&writes, |frame| frames.push(frame)),
        Transfer::Epoch(epoch) => pages = encoder.epoch(*epoch, |frame| frames.push(frame)),
        Transfer::Verify(verify) => frames.push(encoder.verify(&verify)),
    }
    (frames, pages)
}

/// The settings of a QUIC endpoint that is good for epochs: large windows, datagrams, and no patience with a dead path
/// beyond what the heartbeats have.
pub fn transport() -> quinn::TransportConfig {
    let mut transport = quinn::TransportConfig::default();
    let window = quinn::VarInt::from_u32(64 << 20);
    transport.stream_receive_window(window);
    transport.receive_window(window);
    // What is written and not acked by QUIC: an epoch waits behind it.
    transport.send_window(16 << 20);
    transport.datagram_receive_buffer_size(Some(64 << 10));
    transport.datagram_send_buffer_size(64 << 10);
    transport.max_concurrent_bidi_streams(4_u32.into());
    transport.max_concurrent_uni_streams(4_u32.into());
    transport.max_idle_timeout(Some(quinn::VarInt::from_u32(30_000).into()));
    transport
}

/// A client endpoint on any port.
///
/// # Errors
/// No socket can be had, or the TLS settings do not fit QUIC.
pub fn client_endpoint(tls: Arc<rustls::ClientConfig>, local: SocketAddr) -> anyhow::Result<quinn::Endpoint> {
    let mut endpoint = quinn::Endpoint::client(local)?;
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls)?;
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(Arc::new(transport()));
    endpoint.set_default_client_config(config);
    Ok(endpoint)
}
