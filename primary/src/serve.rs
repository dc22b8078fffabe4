//! What both binaries do around a node: the sockets, the control plane, the console's sinks, signals, and running a
//! guest to its end.

use anyhow::{Context, anyhow};
use colo_common::arbiter::Arbiter;
use colo_common::config::{
    ConsoleConfig, Endpoint, OnCrash, OnSecondaryLoss, OnStop, ReplicationConfig, Reprotect,
};
use colo_common::membership::Membership;
use colo_common::register::{Entry, Value};
use colo_common::tls::{self, Identity};
use colo_common::vmdir::VmDirectory;
use colo_proto::PROTOCOL_VERSION;
use colo_proto::v1::admin_server::AdminServer;
use colo_proto::v1::{AuditEntry, AuditKind};
use crossbeam_channel::{Receiver, Sender};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Certificate, ClientTlsConfig, Server, ServerTlsConfig};
use tonic::{Request, Status};
use tracing::Instrument;

use crate::admin::{AdminService, Part, Plane};
use crate::arbiter_worker::ArbiterWorker;
use crate::audit::Audit;
use crate::console::Console;
use crate::heal::Needs;
use crate::heal_worker::{HealWorker, Patient};
use crate::heartbeat::Rhythm;
use crate::node::status::Role;
use crate::node::{Beginning, Command, Event, Node, NodeError, Settings};
use crate::pairing::PairingClient;
use crate::presence::Presence;
use crate::quic::{QuicConnector, client_endpoint};
use crate::replicator::End;
use crate::standby::Standby;

/// How long the control plane lives on after the node: some of its looks at the status, and a reply.
const LAST_ANSWERS: Duration = Duration::from_secs(1);
/// The same where the process goes on to follow: each moment of it the vm is without protection.
const LAST_REPLY: Duration = Duration::from_millis(100);
/// Events that may wait for a node: more than acks, answers and commands can ever be.
const MAX_EVENTS: usize = 4096;

/// The certificates of a node and where they count.
pub struct Security {
    identity: Identity,
    /// Without a directory of certificates, the control plane is in the clear, on loopback only.
    control_plane: bool,
}

impl Security {
    /// Loads the node's certificate, or makes one for development.
    ///
    /// # Errors
    /// A file is missing or wrong.
    pub fn load(directory: Option<&Path>) -> anyhow::Result<Self> {
        let identity = tls::identity(directory, tls::Role::Node)?;
        Ok(Self { identity, control_plane: directory.is_some() })
    }

    /// The identity.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// How to call other control planes.
    pub fn client(&self) -> Option<ClientTlsConfig> {
        let pem = self.identity.pem();
        self.control_plane.then(|| {
            ClientTlsConfig::new()
                .ca_certificate(Certificate::from_pem(&pem.ca))
                .identity(tonic::transport::Identity::from_pem(&pem.certificate, &pem.key))
                .domain_name(tls::NODE_NAME)
        })
    }

    fn server(&self) -> Option<ServerTlsConfig> {
        let pem = self.identity.pem();
        self.control_plane.then(|| {
            ServerTlsConfig::new()
                .identity(tonic::transport::Identity::from_pem(&pem.certificate, &pem.key))
                .client_ca_root(Certificate::from_pem(&pem.ca))
        })
    }
}

/// What a runner decides by itself, in words, for the audit trail.
pub fn policies(
    replication: &ReplicationConfig,
    on_stop: OnStop,
    on_crash: OnCrash,
    max_promotions: u32,
) -> String {
    let ReplicationConfig { on_secondary_loss, reprotect, .. } = replication;
    format!(
        "on_secondary_loss = {on_secondary_loss:?}, reprotect = {reprotect:?}, on_stop = {on_stop:?}, \
         on_crash = {on_crash:?}, max_promotions = {max_promotions}"
    )
}

/// Begins the audit trail of this process, which ends with the answer, and notes by which `policy` it decides.
#[must_use]
pub fn keep_audit(plane: &Plane, directory: &VmDirectory, policy: String) -> AuditEnd {
    let board = plane.board.clone();
    let told = move |entry: &AuditEntry| board.noted(entry);
    let audit = Audit::open(&directory.audit(), plane.node.clone(), plane.incarnation, told);
    plane.board.keep_audit(audit.clone());
    plane.board.note(AuditKind::FailoverPolicy, policy.to_lowercase(), String::new(), String::new());
    AuditEnd(audit)
}

/// Closes the audit trail when it is dropped, whichever way the process ends.
pub struct AuditEnd(Audit);

impl Drop for AuditEnd {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Serves the control plane, with `more` services beside it.
///
/// # Errors
/// The port is in use, or TLS cannot be set up.
pub async fn control_plane(
    listen: SocketAddr,
    security: &Security,
    plane: Arc<Plane>,
    more: tonic::service::Routes,
) -> anyhow::Result<()> {
    let listener = TcpListener::bind(listen).await.with_context(|| {
        format!("cannot listen on {listen} (admin.listen): is another node using it? choose another port")
    })?;
    let mut server = Server::builder();
    if let Some(tls) = security.server() {
        server = server.tls_config(tls).context("TLS of the control plane cannot be set up")?;
    }
    let secured = security.control_plane;
    let check = move |request: Request<()>| if secured { operators_only(request) } else { Ok(request) };
    let routes = more.add_service(AdminServer::with_interceptor(AdminService(plane), check));
    let served = server.add_routes(routes).serve_with_incoming(TcpListenerStream::new(listener));
    let serving = async move {
        if let Err(e) = served.await {
            tracing::error!("the control plane has ended: {e}");
        }
    };
    tokio::spawn(serving.in_current_span());
    Ok(())
}

/// The control plane steers a vm: that is for operators, not for the other nodes of the authority.
fn operators_only(request: Request<()>) -> Result<Request<()>, Status> {
    let certificates = request.peer_certs();
    let first = certificates.as_ref().and_then(|certificates| certificates.first());
    match first.map(tls::peer_role) {
        Some(Ok(tls::Role::Operator)) => Ok(request),
        Some(Ok(tls::Role::Node)) => {
            Err(Status::permission_denied("only operators may do that: use an operator's certificate"))
        }
        Some(Err(e)) => Err(Status::permission_denied(e.to_string())),
        None => Err(Status::unauthenticated("a certificate is needed")),
    }
}

/// Writes what is let out to the configured sinks.
///
/// # Errors
/// A sink cannot be opened.
pub async fn console_sinks(console: &Console, config: &ConsoleConfig) -> anyhow::Result<()> {
    if let Some(path) = &config.file {
        let file = tokio::fs::OpenOptions::new().create(true).append(true).open(path).await;
        let file = file.with_context(|| format!("cannot open the console's file {}", path.display()))?;
        let writing = write_console(console.clone(), file, path.display().to_string());
        tokio::spawn(writing.in_current_span());
    }
    if let Some(link) = &config.pty {
        let master = crate::pty::open(link)
            .with_context(|| format!("cannot make the console's pty {}", link.display()))?;
        let (file, name) = (tokio::fs::File::from_std(master), link.display().to_string());
        tokio::spawn(write_console(console.clone(), file, name).in_current_span());
    }
    Ok(())
}

async fn write_console(console: Console, mut file: tokio::fs::File, name: String) {
    use tokio::io::AsyncWriteExt;
    let (mut offset, mut ends) = (console.end(), console.watch());
    loop {
        ends.mark_unchanged();
        while let Some(chunk) = console.read(offset) {
            offset = chunk.offset + chunk.bytes.len() as u64;
            let written = async {
                file.write_all(&chunk.bytes).await?;
                file.flush().await
            };
            if let Err(e) = written.await {
                tracing::warn!("the console cannot be written to {name}: {e}");
            }
        }
        if ends.changed().await.is_err() {
            return;
        }
    }
}

/// What it takes to run a guest on this node.
pub struct Runner {
    /// The control plane.
    pub plane: Arc<Plane>,
    /// The arbiter.
    pub arbiter: Arc<dyn Arbiter>,
    /// The settings.
    pub replication: ReplicationConfig,
    /// Promotions in a row that a failing guest is worth.
    pub max_promotions: u32,
    /// What a signal to end does.
    pub on_stop: OnStop,
    /// Those.
    pub signals: EndSignals,
    /// Certificates.
    pub security: Security,
    /// Where the control plane listens.
    pub own_address: SocketAddr,
    /// As others reach it.
    pub advertised: Endpoint,
    /// What the process becomes when another node has the vm; nothing if it ends.
    pub standby: Option<Standby>,
    /// Who else is there.
    pub membership: Arc<dyn Membership>,
    /// What this process says of itself there, until it ends.
    pub presence: Presence,
}

/// How a runner has ended.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Its part.
    pub end: End,
    /// A signal asked for just this: the guest has moved to its secondary.
    pub moved: bool,
}

impl Runner {
    /// Runs the guest until this node's part is over. Blocks. If the process is to go on as a secondary, it does not come
    /// back.
    ///
    /// # Errors
    /// The guest cannot go on here, or the process not as a secondary.
    pub fn run(self, beginning: Beginning, runtime: &Handle) -> anyhow::Result<Ended> {
        let (outbox, inbox): (Sender<Event>, Receiver<Event>) = crossbeam_channel::bounded(MAX_EVENTS);
        let (tell, vm) = (outbox.clone(), beginning.vm.clone());
        let worker = ArbiterWorker::start(self.arbiter, beginning.vm.clone(), move |found| {
            drop(tell.send(Event::Arbiter(found)));
        })
        .map_err(NodeError::Thread)?;
        let rhythm = Rhythm {
            interval: Duration::from_millis(self.replication.heartbeat_ms.into()),
            suspect_after: Duration::from_millis(self.replication.suspect_after_ms.into()),
        };
        let any = match self.own_address {
            SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
            SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
        };
        let endpoint = {
            let _entered = runtime.enter();
            client_endpoint(tls::client_config(self.security.identity())?, any)?
        };
        let pairing = PairingClient::new(self.security.client(), self.advertised.to_string());
        let connector = Arc::new(QuicConnector::new(runtime.clone(), endpoint, pairing, rhythm));
        let settings = Settings {
            interval: Duration::from_millis(self.replication.interval_ms.into()),
            window: self.replication.window as usize,
            max_epoch_bytes: u64::from(self.replication.max_epoch_mib) << 20,
            solo_on_loss: self.replication.on_secondary_loss == OnSecondaryLoss::Solo,
            secondary: self.replication.secondary.as_ref().map(ToString::to_string),
            max_promotions: self.max_promotions,
            reprotect: self.replication.reprotect == Reprotect::Auto,
        };
        let ends = Arc::new(AtomicBool::new(false));
        runtime.spawn(on_signal(self.signals, self.on_stop, outbox.clone(), Arc::clone(&ends)));
        let board = self.plane.board.clone();
        let needs = Needs {
            memory: beginning.spec.memory_bytes(),
            disk: beginning.spec.virtio().disk.as_ref().map_or(0, |disk| disk.bytes),
            hypervisor: beginning.spec.kind.name().to_owned(),
            protocol: PROTOCOL_VERSION.into(),
        };
        let (me, incarnation, tell) = (beginning.me.clone(), beginning.incarnation, outbox.clone());
        let patient = Patient { vm: vm.clone(), node: me, incarnation, needs };
        let healer = HealWorker::start(self.membership, patient, move |advice| {
            drop(tell.send(Event::Advice(advice)));
        });
        let node = Node::new(beginning, settings, worker, connector, (outbox.clone(), inbox), board.clone());
        let node = node.healed_by(healer.map_err(NodeError::Thread)?);
        self.plane.set_part(Part::Runner(outbox));
        let ended = node.run();
        self.plane.set_part(Part::None);
        board.change(|status| {
            (status.role, status.running) = (Role::Stopped, false);
            status.failure = ended.as_ref().err().map(ToString::to_string);
        });
        if let (Ok((End::Superseded(Some(entry)), remains)), Some(standby)) = (&ended, &self.standby)
            && !matches!(entry.value, Value::Stopped { .. })
            && !ends.load(Ordering::SeqCst)
        {
            tracing::warn!(vm = %vm, "another node has the vm: {entry}; this one follows");
            std::thread::sleep(LAST_REPLY);
            // The next process image says of itself what it is.
            drop(self.presence);
            return Err(standby.follow(&vm, remains));
        }
        // Whoever asked for the end is told by the control plane, which ends with the process.
        std::thread::sleep(LAST_ANSWERS);
        let (end, asked) = (ended?.0, ends.load(Ordering::SeqCst));
        let moves = asked && self.on_stop == OnStop::Switchover;
        let runs_elsewhere = |entry: &Entry| !matches!(entry.value, Value::Stopped { .. });
        let moved = moves && matches!(&end, End::Superseded(Some(entry)) if runs_elsewhere(entry));
        Ok(Ended { end, moved })
    }
}

/// A signal to end does what the configuration says; the second one after a switchover that failed stops the vm.
async fn on_signal(mut signals: EndSignals, on_stop: OnStop, outbox: Sender<Event>, ends: Arc<AtomicBool>) {
    let stop = || Command::Stop { reply: tokio::sync::oneshot::channel().0 };
    signals.next().await;
    ends.store(true, Ordering::SeqCst);
    let command = match on_stop {
        OnStop::Stop => stop(),
        OnStop::Leave => Command::Leave { reply: None },
        OnStop::Switchover => {
            let (reply, answer) = tokio::sync::oneshot::channel();
            drop(outbox.send(Event::Command(Command::Switchover { reply: Some(reply) })));
            if !matches!(answer.await, Ok(Err(_))) {
                return;
            }
            tracing::warn!("the guest runs on here; another signal to end stops the vm");
            ends.store(false, Ordering::SeqCst);
            signals.next().await;
            stop()
        }
    };
    drop(outbox.send(Event::Command(command)));
}

/// Waits for SIGTERM or SIGINT.
///
/// # Errors
/// Signals cannot be handled.
pub async fn ended() -> std::io::Result<()> {
    EndSignals::of(&Handle::current())?.next().await;
    Ok(())
}

/// SIGTERM and SIGINT from when it is made: one that comes before anybody waits is found then.
#[derive(Debug)]
pub struct EndSignals {
    term: Signal,
    int: Signal,
}

impl EndSignals {
    /// From now on.
    ///
    /// # Errors
    /// Signals cannot be handled.
    pub fn of(runtime: &Handle) -> std::io::Result<Self> {
        let _entered = runtime.enter();
        Ok(Self { term: signal(SignalKind::terminate())?, int: signal(SignalKind::interrupt())? })
    }

    /// Waits for one.
    pub async fn next(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
        }
    }
}

/// The membership beside it.
///
/// # Errors
/// Its directory is missing, or a certificate cannot be used.
pub fn membership(config: &colo_common::config::ArbiterConfig) -> anyhow::Result<Arc<dyn Membership>> {
    colo_common::membership::open(config).map_err(|e| anyhow!("{e}"))
}

/// The arbiter that a configuration names.
///
/// # Errors
/// Its directory is missing, or a certificate cannot be used.
pub fn arbiter(config: &colo_common::config::ArbiterConfig) -> anyhow::Result<Arc<dyn Arbiter>> {
    colo_common::arbiter::open(config).map_err(|e| anyhow!("{e}"))
}
