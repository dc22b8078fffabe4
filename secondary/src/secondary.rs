//! `colo-secondary start`: follows a runner, and runs the guest when the register names it.

use anyhow::{Context, anyhow, bail};
use colo_common::arbiter::Arbiter;
use colo_common::config::{Ack, Failover, OnCrash, SecondaryConfig};
use colo_common::tls;
use colo_common::vmdir::VmDirectory;
use colo_common::{History, Incarnation};
use colo_primary::admin::{FollowerControl, Part, Plane};
use colo_primary::arbiter_worker::ArbiterWorker;
use colo_primary::console::Console;
use colo_primary::heartbeat::{Rhythm, Watch};
use colo_primary::node::status::{Board, Policy};
use colo_primary::primary::{ended, runtime};
use colo_primary::quic::transport;
use colo_primary::serve::{self, Runner, Security};
use colo_proto::v1::pairing_server::PairingServer;
use colo_vmm::tap::Tap;
use crossbeam_channel::Sender;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tonic::service::Routes;

use crate::node::{Event, Follower, Outcome, Parts, Settings, Tray};
use crate::pairing_service::PairingService;
use crate::persist::Persister;
use crate::receiver::{Budget, Receiver};
use crate::replica::{AckPolicy, Replica, Rules, Stored};
use crate::store::{Store, StoredCopy};

/// Events that may wait for the node; a full inbox slows the link.
const MAX_EVENTS: usize = 256;
/// Epochs that a runner may have in flight.
const WINDOW: u32 = 64;
/// A share of the memory budget that one epoch may take.
const EPOCH_SHARE: u64 = 4;
/// How long a node that starts with a copy waits for its runner, beside the usual suspicion.
const STARTUP_GRACE: Duration = Duration::from_secs(3);

/// How long a node that is ended on purpose waits for its runner to have heard of it.
const FAREWELL: Duration = Duration::from_millis(300);

/// Runs a secondary by its configuration; `again` starts a vm that was stopped on this node.
///
/// # Errors
/// Something is wrong with the configuration, the store or the network, or the guest cannot go on here.
pub fn start(path: &Path, again: bool) -> anyhow::Result<ExitCode> {
    let config = SecondaryConfig::load(path)?;
    let runtime = runtime()?;
    let directory = VmDirectory::open(&config.directory, &config.vm)?;
    let security = Security::load(config.tls.as_ref().map(|tls| tls.directory.as_path()))?;
    let arbiter = serve::arbiter(&config.arbiter)?;
    let starting = directory.runner()?.and_then(|known| known.starting);
    if starting.is_some() && !directory.store().exists() {
        let path = directory.path().display();
        bail!(
            "a start of the guest by colo-primary was cut off in {path}: start colo-primary again, which goes on with it"
        );
    }
    let store = Store::open(&directory.store(), &config.vm)?;
    let directory = Arc::new(directory);
    // A start again that was cut off is gone on with as the same process.
    let incarnation = starting.unwrap_or_else(Incarnation::draw);
    let (board, console) = (Board::default(), Console::default());
    let plane = Plane::new(config.vm.clone(), config.node.clone(), incarnation, board, console);
    let failover = format!(
        "failover = {:?}, promote_delay_ms = {}",
        config.replication.failover, config.replication.promote_delay_ms
    );
    let _audit = serve::keep_audit(&plane, &directory, failover);
    let (outbox, inbox) = crossbeam_channel::bounded(MAX_EVENTS);
    let budget = Budget::new(u64::from(config.replication.memory_budget_mib) << 20);
    let secondary = Secondary {
        config,
        again,
        directory,
        security,
        arbiter,
        plane,
        outbox,
        budget,
        runs: Arc::default(),
    };
    let endpoint = secondary.open_network(&runtime)?;
    let follower = secondary.follower(store, inbox, endpoint.local_addr()?.port())?;
    runtime.spawn(secondary.receiver().serve(endpoint.clone()));
    let outbox = secondary.outbox.clone();
    let signals = runtime.spawn(async move {
        if serve::ended().await.is_ok() {
            drop(outbox.send(Event::Leave));
        }
    });
    let (vm, listen) = (&secondary.config.vm, secondary.config.admin.listen);
    tracing::info!(%vm, node = %secondary.config.node, "waiting for a runner at {listen}");
    let outcome = follower.run();
    signals.abort();
    endpoint.close(0_u32.into(), b"");
    if matches!(outcome, Outcome::Left) {
        // The runner hears of it at once and need not wait for a silence.
        drop(runtime.block_on(async { tokio::time::timeout(FAREWELL, endpoint.wait_idle()).await }));
    }
    secondary.finish(outcome, &runtime)
}

/// A secondary's process.
struct Secondary {
    config: SecondaryConfig,
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
}

impl Secondary {
    /// The sockets, the control plane and the console's sinks.
    fn open_network(&self, runtime: &Runtime) -> anyhow::Result<quinn::Endpoint> {
        let config = &self.config;
        let boot_directory = self.directory.boot();
        std::fs::create_dir_all(&boot_directory)
            .with_context(|| format!("cannot create {}", boot_directory.display()))?;
        let control = Control { outbox: self.outbox.clone() };
        self.plane.set_part(Part::Follower(Arc::new(control)));
        let pairing = PairingService {
            vm: config.vm.clone(),
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
            serve::console_sinks(&self.plane.console, &config.console).await
        })?;
        Ok(endpoint)
    }

    /// The node, with what the store holds.
    fn follower(
        &self,
        mut store: Store,
        inbox: crossbeam_channel::Receiver<Event>,
        quic_port: u16,
    ) -> anyhow::Result<Follower> {
        let config = &self.config;
        let tell = self.outbox.clone();
        let worker = ArbiterWorker::start(Arc::clone(&self.arbiter), config.vm.clone(), move |found| {
            drop(tell.send(Event::Arbiter(found)));
        });
        let rules = Rules {
            policy: if config.replication.ack == Ack::Disk { AckPolicy::Disk } else { AckPolicy::Memory },
            boot_after_crash: config.on_crash == OnCrash::Boot,
        };
        let history = match store.summary().copy {
            StoredCopy::Whole(whole) => whole.history,
            _ => History::default(),
        };
        let mut replica = Replica::new(config.node.clone(), self.plane.incarnation, rules, stored(&store));
        replica.go_on_starting(self.directory.runner()?.is_some_and(|known| known.starting.is_some()));
        let settings = settings(config, quic_port, self.directory.boot());
        let mut loaded = crate::node::load(&mut store, &settings).map_err(|why| {
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
            vm: config.vm.clone(),
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
            vm: self.config.vm.clone(),
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

    /// What follows from the follower's end: mostly, running the guest.
    fn finish(self, outcome: Outcome, runtime: &Runtime) -> anyhow::Result<ExitCode> {
        let vm = self.config.vm.clone();
        match outcome {
            Outcome::Left => Ok(ExitCode::SUCCESS),
            Outcome::Failed(why) => bail!("{why}"),
            Outcome::Superseded(entry) => {
                tracing::info!(%vm, "there is nothing to follow any more: {entry}");
                Ok(ExitCode::SUCCESS)
            }
            Outcome::Run(beginning, promotion) => {
                let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
                tracing::warn!(%vm, node = %self.config.node, register_ms = ms(promotion.register),
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
                };
                let end = runner.run(*beginning, runtime.handle())?;
                Ok(ended(&vm, &end))
            }
        }
    }
}

fn settings(config: &SecondaryConfig, quic_port: u16, boot_directory: std::path::PathBuf) -> Settings {
    let follow = &config.replication;
    Settings {
        auto_failover: follow.failover == Failover::Auto,
        promote_delay: Duration::from_millis(follow.promote_delay_ms.into()),
        startup_grace: Duration::from_millis(u64::from(follow.suspect_after_ms)) + STARTUP_GRACE,
        max_epoch_bytes: (u64::from(follow.memory_budget_mib) << 20) / EPOCH_SHARE,
        window: WINDOW,
        quic_port: follow.advertise_port.map_or(quic_port, std::num::NonZeroU16::get),
        boot_directory,
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
    fn promote(&self, reply: oneshot::Sender<String>) {
        drop(self.outbox.send(Event::Promote(reply)));
    }

    fn set_disk_policy(&self, disk: bool, reply: oneshot::Sender<Policy>) {
        let policy = if disk { AckPolicy::Disk } else { AckPolicy::Memory };
        drop(self.outbox.send(Event::Policy(policy, reply)));
    }

    fn leave(&self) {
        drop(self.outbox.send(Event::Leave));
    }
}
