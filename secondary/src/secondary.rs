//! `colo-secondary start`: follows a runner, and runs the guest when the register names it.

use anyhow::{Context, anyhow, bail};
use colo_common::arbiter::Arbiter;
use colo_common::config::{Ack, Failover, OnCrash, SecondaryConfig};
use colo_common::membership::{Claim, Membership};
use colo_common::tls;
use colo_common::vmdir::VmDirectory;
use colo_common::{Gfn, History, Incarnation, NodeId, VmId, telemetry};
use colo_primary::admin::{FenceAnswer, FollowerControl, Order, Part, Plane};
use colo_primary::arbiter_worker::ArbiterWorker;
use colo_primary::console::Console;
use colo_primary::drain::Drain;
use colo_primary::handover::Handover;
use colo_primary::heartbeat::{Rhythm, Watch};
use colo_primary::metrics::Endpoint;
use colo_primary::node::status::{Board, Policy};
use colo_primary::presence::{Presence, Who};
use colo_primary::primary::{ended, runtime};
use colo_primary::quic::transport;
use colo_primary::serve::{self, Runner, Security};
use colo_primary::standby::Standby;
use colo_proto::v1::pairing_server::PairingServer;
use colo_vmm::page_batch::is_zero;
use colo_vmm::tap::Tap;
use colo_vmm::{PageBatch, PagePool};
use crossbeam_channel::Sender;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tonic::service::Routes;
use tracing::Instrument;

use crate::boot_upload;
use crate::node::{Event, Follower, Outcome, Parts, Settings, Tray};
use crate::pairing_service::PairingService;
use crate::persist::Persister;
use crate::receiver::{Budget, Receiver};
use crate::replica::{AckPolicy, Replica, Rules, Stored};
use crate::spare::{self, Bound};
use crate::store::{Base, PageContent, Store, StoredCopy};

/// Events that may wait for the node; a full inbox slows the link.
const MAX_EVENTS: usize = 256;
/// Epochs that a runner may have in flight.
const WINDOW: u32 = 64;
/// A share of the memory budget that one epoch may take.
const EPOCH_SHARE: u64 = 4;
/// How long a node that starts with a copy waits for its runner, beside the usual suspicion.
const STARTUP_GRACE: Duration = Duration::from_secs(3);

/// Pages of memory that was handed over, copied and stored at once.
const STORED_AT_ONCE: u64 = 256;
/// How long a node that is ended on purpose waits for its runner to have heard of it.
const FAREWELL: Duration = Duration::from_millis(300);

/// How a secondary is started.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Start a vm again that was stopped on this node.
    pub again: bool,
    /// The configuration is a primary's.
    pub of_primary: bool,
    /// The number of what the process that ran the guest left.
    pub handover: Option<i32>,
    /// The vm that a spare was bound to before.
    pub bind: Option<VmId>,
}

/// Runs a secondary by its configuration.
///
/// # Errors
/// Something is wrong with the configuration, the store or the network, or the guest cannot go on here.
pub fn start(path: &Path, options: Options) -> anyhow::Result<ExitCode> {
    let Options { again, of_primary, .. } = options;
    let config = if of_primary { SecondaryConfig::load_standby(path)? } else { SecondaryConfig::load(path)? };
    telemetry::init(&config.log);
    let metrics = Endpoint::bind(&config.metrics)?;
    let runtime = runtime()?;
    let security = Security::load(config.tls.as_ref().map(|tls| tls.directory.as_path()))?;
    let arbiter = serve::arbiter(&config.arbiter)?;
    let (membership, drawn) = (serve::membership(&config.arbiter)?, Incarnation::draw());
    let is_spare = config.vm.is_none();
    // The node's own, whichever vm it is bound to: what is said there holds for all of them.
    let home = config.directory.clone();
    let who = Who {
        node: config.node.clone(),
        incarnation: drawn,
        address: config.admin.address(),
        directory: home,
    };
    let bound = match config.vm.clone().or(options.bind) {
        Some(vm) => Some(Bound { vm, registered: None, claim: None }),
        None => {
            let served_by = (&security, metrics.as_ref());
            spare::bind(&config, &who, &*arbiter, &membership, served_by, &runtime)?
        }
    };
    let Some(Bound { vm, registered, claim }) = bound else { return Ok(ExitCode::SUCCESS) };
    let config = config.bound_to(&vm);
    let _node = telemetry::enter_node(&vm, &config.node);
    let left = options.handover.and_then(|fd| take_over(fd, &vm));
    let (directory, starting) = open_directory(&config, &vm)?;
    let store = Store::open(&directory.store(), &vm)?;
    let directory = Arc::new(directory);
    let bind = is_spare.then(|| vm.clone());
    let standby = Standby { config: path.to_owned(), of_primary, bind, boot_directory: directory.boot() };
    // A start again that was cut off is gone on with as the same process.
    let incarnation = starting.unwrap_or(drawn);
    let (board, console) = (Board::default(), Console::default());
    let plane = Plane::new(Some(vm.clone()), config.node.clone(), incarnation, board, console);
    let failover = format!(
        "failover = {:?}, promote_delay_ms = {}, ack = {:?}; promoted: {}",
        config.replication.failover,
        config.replication.promote_delay_ms,
        config.replication.ack,
        serve::policies(&config.promoted, config.on_stop, config.on_crash, config.max_promotions)
    );
    let _audit = serve::keep_audit(&plane, &directory, failover);
    let (outbox, inbox) = crossbeam_channel::bounded(MAX_EVENTS);
    let budget = Budget::new(u64::from(config.replication.memory_budget_mib) << 20);
    let who = Who { incarnation, ..who };
    plane.keep_membership(Arc::clone(&membership));
    plane.keep_drain(Drain::of(&who.directory));
    let presence =
        Presence::start(Arc::clone(&membership), who, Some(vm.clone()), plane.board.clone(), registered)
            .context("no thread for the membership")?;
    let secondary = Secondary {
        config,
        vm,
        membership,
        presence,
        claim,
        again,
        directory,
        security,
        arbiter,
        plane,
        outbox,
        budget,
        runs: Arc::default(),
        standby,
    };
    secondary.serve((store, left), inbox, metrics, &runtime)
}

/// The vm's directory, and the process that began a start of its guest there and was cut off.
fn open_directory(config: &SecondaryConfig, vm: &VmId) -> anyhow::Result<(VmDirectory, Option<Incarnation>)> {
    let directory = VmDirectory::open(&config.directory, vm)?;
    let starting = directory.runner()?.and_then(|known| known.starting);
    if starting.is_some() && !directory.store().exists() {
        let path = directory.path().display();
        bail!(
            "a start of the guest by colo-primary was cut off in {path}: start colo-primary again, which goes on with it"
        );
    }
    Ok((directory, starting))
}

/// A secondary's process.
struct Secondary {
    config: SecondaryConfig,
    vm: VmId,
    /// Who else is there.
    membership: Arc<dyn Membership>,
    /// What this process says of itself there.
    presence: Presence,
    /// By which a spare was bound.
    claim: Option<Claim>,
    /// The operator's word to start a stopped vm.
    again: bool,
    directory: Arc<VmDirectory>,
    security: Security,
    arbiter: Arc<dyn Arbiter>,
    plane: Arc<Plane>,
    outbox: Sender<Event>,
    /// Room for epochs; the receiver fills it, the node empties it.
    budget: Budget,
    /// Set once the guest is this process' own.
    runs: Arc<AtomicBool>,
    /// What it becomes again when it has run the guest and another node has it.
    standby: Standby,
}

impl Secondary {
    /// Follows until something ends it.
    fn serve(
        self,
        copy: (Store, Option<Handover>),
        inbox: crossbeam_channel::Receiver<Event>,
        metrics: Option<Endpoint>,
        runtime: &Runtime,
    ) -> anyhow::Result<ExitCode> {
        let endpoint = self.open_network(runtime, metrics)?;
        let follower = self.follower(copy, inbox, endpoint.local_addr()?.port())?;
        runtime.spawn(self.receiver().serve(endpoint.clone()).instrument(telemetry::node_span()));
        let outbox = self.outbox.clone();
        // For the case that one comes while this node takes the guest over: the runner finds it.
        let signals_kept = serve::EndSignals::of(runtime.handle())?;
        let signals = runtime.spawn(async move {
            if serve::ended().await.is_ok() {
                drop(outbox.send(Event::Leave(None)));
            }
        });
        let (vm, listen) = (&self.vm, self.config.admin.listen);
        tracing::info!(%vm, node = %self.config.node, "waiting for a runner at {listen}");
        let outcome = follower.run();
        signals.abort();
        endpoint.close(0_u32.into(), b"");
        if matches!(outcome, Outcome::Left) {
            // The runner hears of it at once and need not wait for a silence.
            drop(runtime.block_on(async { tokio::time::timeout(FAREWELL, endpoint.wait_idle()).await }));
        }
        self.finish(outcome, signals_kept, runtime)
    }

    /// The sockets, the control plane and the console's sinks.
    fn open_network(&self, runtime: &Runtime, metrics: Option<Endpoint>) -> anyhow::Result<quinn::Endpoint> {
        let config = &self.config;
        let boot_directory = self.directory.boot();
        std::fs::create_dir_all(&boot_directory)
            .and_then(|()| boot_upload::sweep(&boot_directory))
            .with_context(|| format!("cannot create or tidy {}", boot_directory.display()))?;
        let control = Control { outbox: self.outbox.clone() };
        self.plane.set_part(Part::Follower(Arc::new(control)));
        let pairing = PairingService {
            vm: self.vm.clone(),
            node: config.node.clone(),
            incarnation: self.plane.incarnation,
            outbox: self.outbox.clone(),
            boot_directory,
            runs: Arc::clone(&self.runs),
            secured: config.tls.is_some(),
        };
        let endpoint = {
            let _entered = runtime.enter();
            endpoint(config, &self.security)?
        };
        runtime.block_on(async {
            let (listen, routes) = (config.admin.listen, Routes::new(PairingServer::new(pairing)));
            serve::control_plane(listen, &self.security, Arc::clone(&self.plane), routes).await?;
            metrics.map_or(Ok(()), |metrics| metrics.serve(&self.plane))?;
            serve::console_sinks(&self.plane.console, &config.console).await
        })?;
        Ok(endpoint)
    }

    /// The node, with what the store holds.
    fn follower(
        &self,
        (mut store, left): (Store, Option<Handover>),
        inbox: crossbeam_channel::Receiver<Event>,
        quic_port: u16,
    ) -> anyhow::Result<Follower> {
        let config = &self.config;
        let tell = self.outbox.clone();
        let worker = ArbiterWorker::start(Arc::clone(&self.arbiter), self.vm.clone(), move |found| {
            drop(tell.send(Event::Arbiter(found)));
        });
        let rules = Rules {
            policy: if config.replication.ack == Ack::Disk { AckPolicy::Disk } else { AckPolicy::Memory },
            boot_after_crash: config.on_crash == OnCrash::Boot,
        };
        let (history, stored_at) = match store.summary().copy {
            StoredCopy::Whole(whole) => (whole.history, Some(whole.persisted)),
            _ => (History::default(), None),
        };
        let mut replica = Replica::new(config.node.clone(), self.plane.incarnation, rules, stored(&store));
        replica.go_on_starting(self.directory.runner()?.is_some_and(|known| known.starting.is_some()));
        let mut settings = settings(config, quic_port, &self.directory);
        settings.claimed = self.claim.is_some();
        settings.spare = self.standby.bind.is_some();
        let left = left.and_then(|left| keep_left(&mut store, left));
        let mut loaded = crate::node::load(&mut store, &settings, left).map_err(|why| {
            let path = self.directory.path().display();
            anyhow!("the copy in {path} cannot be used: {why}; remove the directory, and this node will be seeded anew")
        })?;
        if let Some(loaded) = &mut loaded {
            loaded.open_disk(&mut store, &settings)?;
        }
        let tray = Tray::new(self.outbox.clone());
        let tell = tray.clone();
        let persister = Persister::start(store, move |persisted| tell.persisted(persisted));
        let parts = Parts {
            vm: self.vm.clone(),
            me: config.node.clone(),
            incarnation: self.plane.incarnation,
            replica,
            again: self.again,
            history,
            persister: persister.context("no thread for the store")?,
            tap: self.open_tap()?,
            console: self.plane.console.clone(),
            budget: self.budget.clone(),
            arbiter: worker.context("no thread for the arbiter")?,
            tray,
            directory: Arc::clone(&self.directory),
            board: self.plane.board.clone(),
        };
        parts.board.change(|status| status.stale_at = stored_at);
        let mut follower = Follower::new(parts, settings, (self.outbox.clone(), inbox));
        follower.take_loaded(loaded)?;
        Ok(follower)
    }

    /// The TAP, its carrier off, so that nobody outside sees it before this node runs the guest.
    fn open_tap(&self) -> anyhow::Result<Option<Arc<Tap>>> {
        let network = self.config.network.as_ref();
        Ok(network.map(|network| Tap::open(&network.tap)).transpose()?.map(Arc::new))
    }

    fn receiver(&self) -> Receiver {
        let follow = &self.config.replication;
        Receiver {
            vm: self.vm.clone(),
            node: self.config.node.clone(),
            incarnation: self.plane.incarnation,
            watch: Watch::new(Rhythm {
                interval: Duration::from_millis(follow.heartbeat_ms.into()),
                suspect_after: Duration::from_millis(follow.suspect_after_ms.into()),
            }),
            budget: self.budget.clone(),
            outbox: self.outbox.clone(),
        }
    }

    /// A node that was bound to the vm by a claim alone is there for others again; any other one ends.
    fn be_spare_again(self) -> anyhow::Result<ExitCode> {
        if self.standby.bind.is_none() {
            return Ok(ExitCode::SUCCESS);
        }
        if let Some(claim) = &self.claim
            && let Err(e) = self.membership.release(claim)
        {
            // It ends with this node's record, next.
            tracing::warn!(vm = %self.vm, "the claim cannot be given up: {e}");
        }
        drop(self.presence);
        Err(Standby { bind: None, ..self.standby }.become_secondary(None))
    }

    /// What follows from the follower's end: mostly, running the guest.
    fn finish(
        self,
        outcome: Outcome,
        signals: serve::EndSignals,
        runtime: &Runtime,
    ) -> anyhow::Result<ExitCode> {
        let vm = self.vm.clone();
        match outcome {
            Outcome::Left => Ok(ExitCode::SUCCESS),
            Outcome::Failed(why) => bail!("{why}"),
            Outcome::Superseded(entry) => {
                tracing::info!(%vm, "there is nothing to follow any more: {entry}");
                self.be_spare_again()
            }
            Outcome::Unfollowed => {
                tracing::warn!(%vm, "no runner needs this spare: it has not come, or another node follows");
                self.be_spare_again()
            }
            Outcome::Run(beginning, promotion) => {
                let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
                let term = beginning.replicator.register().term;
                tracing::warn!(%vm, node = %self.config.node, term = term.0, register_ms = ms(promotion.register),
                    apply_ms = ms(promotion.apply), store_ms = ms(promotion.store),
                    restore_ms = ms(promotion.restore), total_ms = ms(promotion.total), "this node runs the guest now");
                self.runs.store(true, Ordering::SeqCst);
                let runner = Runner {
                    plane: self.plane,
                    arbiter: self.arbiter,
                    replication: self.config.promoted,
                    max_promotions: self.config.max_promotions,
                    on_stop: self.config.on_stop,
                    security: self.security,
                    own_address: self.config.admin.listen,
                    advertised: self.config.admin.address(),
                    standby: Some(self.standby),
                    membership: self.membership,
                    presence: self.presence,
                    signals,
                };
                let end = runner.run(*beginning, runtime.handle())?;
                Ok(ended(&vm, end))
            }
        }
    }
}

/// What the process before this one left; without it, the copy is compared by digests or sent.
fn take_over(fd: i32, vm: &VmId) -> Option<Handover> {
    let left = Handover::take(fd).map_err(|e| e.to_string());
    let left = left.and_then(|left| {
        let other = format!("it is of the vm {}", left.vm);
        (left.vm == *vm).then_some(left).ok_or(other)
    });
    left.inspect_err(|why| tracing::warn!(%vm, "the guest's memory was not handed over: {why}")).ok()
}

/// Memory that was handed over becomes the base of a copy: the store has its pages from then on, as if a seed had broken
/// off. What the store held before is older.
fn keep_left(store: &mut Store, left: Handover) -> Option<Handover> {
    let keep = |store: &mut Store| -> Result<(), String> {
        store.begin_copy(Base::Empty).map_err(|e| e.to_string())?;
        let pool = PagePool::default();
        for (first, count) in left.memory.populated().map_err(|e| e.to_string())? {
            for at in (0..count).step_by(STORED_AT_ONCE as usize) {
                let run = (Gfn(first.0 + at), STORED_AT_ONCE.min(count - at));
                let batch = PageBatch::copy(&left.memory, vec![run], &pool).map_err(|e| e.to_string())?;
                let pages = batch.iter().filter(|(_, page)| !is_zero(page));
                let pages = pages.map(|(gfn, page)| (gfn, PageContent::Bytes(page)));
                store.write_pages(pages).map_err(|e| e.to_string())?;
            }
        }
        Ok(())
    };
    let started = Instant::now();
    match keep(store) {
        Ok(()) => {
            tracing::info!(vm = %left.vm, ms = started.elapsed().as_millis(), "the memory that was handed over is stored");
            Some(left)
        }
        Err(why) => {
            tracing::warn!(vm = %left.vm, "the memory that was handed over cannot be stored: {why}");
            None
        }
    }
}

fn settings(config: &SecondaryConfig, quic_port: u16, directory: &VmDirectory) -> Settings {
    let follow = &config.replication;
    Settings {
        auto_failover: follow.failover == Failover::Auto,
        promote_delay: Duration::from_millis(follow.promote_delay_ms.into()),
        startup_grace: Duration::from_millis(u64::from(follow.suspect_after_ms)) + STARTUP_GRACE,
        max_epoch_bytes: (u64::from(follow.memory_budget_mib) << 20) / EPOCH_SHARE,
        window: WINDOW,
        quic_port: follow.advertise_port.map_or(quic_port, std::num::NonZeroU16::get),
        boot_directory: directory.boot(),
        intent: directory.intent(),
        claimed: false,
        spare: false,
        disk: config.disk.as_ref().map(|disk| disk.path.clone()),
    }
}

fn stored(store: &Store) -> Stored {
    let summary = store.summary();
    let whole = match summary.copy {
        StoredCopy::Whole(whole) => Some((whole.point, whole.replica)),
        _ => None,
    };
    Stored { active: summary.active.is_some(), whole }
}

fn endpoint(config: &SecondaryConfig, security: &Security) -> anyhow::Result<quinn::Endpoint> {
    let listen = config.replication.listen;
    let crypto = quinn::crypto::rustls::QuicServerConfig::try_from(tls::server_config(security.identity())?)?;
    let mut server = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    server.transport_config(Arc::new(transport()));
    quinn::Endpoint::server(server, listen).with_context(|| {
        format!("cannot listen on {listen}/udp (replication.listen): is another node using it? choose another port")
    })
}

/// The control plane's way to the follower.
struct Control {
    outbox: Sender<Event>,
}

impl FollowerControl for Control {
    fn promote(&self, order: Order) {
        drop(self.outbox.send(Event::Promote(order)));
    }

    fn confirm_fenced(&self, node: NodeId, reply: oneshot::Sender<FenceAnswer>) {
        drop(self.outbox.send(Event::ConfirmFenced(node, reply)));
    }

    fn set_failover(&self, auto: bool, reply: oneshot::Sender<()>) {
        drop(self.outbox.send(Event::Failover(auto, reply)));
    }

    fn set_disk_policy(&self, disk: bool, reply: oneshot::Sender<Policy>) {
        let policy = if disk { AckPolicy::Disk } else { AckPolicy::Memory };
        drop(self.outbox.send(Event::Policy(policy, reply)));
    }

    fn leave(&self, reply: oneshot::Sender<()>) {
        drop(self.outbox.send(Event::Leave(Some(reply))));
    }
}
