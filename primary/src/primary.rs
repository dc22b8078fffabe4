//! `colo-primary start`: starts a guest as the register allows, and runs it to its end.

use anyhow::{Context, bail};
use colo_common::arbiter::Arbiter;
use colo_common::config::{OnCrash, PrimaryConfig};
use colo_common::membership::Membership;
use colo_common::register::{Answer, Entry, Proposal, Value};
use colo_common::vmdir::{Runner as Known, VmDirectory};
use colo_common::{BLOCK_SIZE, Epoch, History, Incarnation, NodeId, Point, Term, VmId, telemetry};
use colo_vmm::egress::OutputPosition;
use colo_vmm::spec::NetSpec;
use colo_vmm::tap::Tap;
use colo_vmm::{Disk, GuestKind, GuestMemory, ProtectedGuest, WireSpec, admission};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tonic::service::Routes;

use crate::admin::Plane;
use crate::backends;
use crate::console::Console;
use crate::drain::Drain;
use crate::guest_config::{account, describe};
use crate::last_changed::LastChanged;
use crate::metrics::Endpoint;
use crate::node::Beginning;
use crate::node::status::{Board, Devices};
use crate::outlet::{Network, Outlet};
use crate::presence::{Presence, Who};
use crate::release::Release;
use crate::replicator::{End, Replicator};
use crate::runner_disk::RunnerDisk;
use crate::serve::{self, Ended, Runner, Security};
use crate::standby::Standby;
use crate::start::{Allowed, NotStarted, decide};

/// The status of a process whose vm is another's now.
pub const SUPERSEDED: u8 = 4;
/// Between two tries at an arbiter that does not answer.
const RETRY: Duration = Duration::from_millis(200);

/// Runs a primary by its configuration.
///
/// # Errors
/// Nothing may be started here, or the guest cannot go on.
pub fn start(path: &Path, again: bool) -> anyhow::Result<ExitCode> {
    let config = PrimaryConfig::load(path)?;
    telemetry::init(&config.log);
    let _node = telemetry::enter_node(&config.vm, &config.node);
    let metrics = Endpoint::bind(&config.metrics)?;
    let runtime = runtime()?;
    let directory = VmDirectory::open(&config.directory, &config.vm)?;
    let standby = config.standby.as_ref().map(|_| Standby {
        config: path.to_owned(),
        of_primary: true,
        bind: None,
        boot_directory: directory.boot(),
    });
    if directory.store().exists() {
        if let Some(standby) = &standby {
            return Err(standby.become_secondary(None));
        }
        let path = directory.path().display();
        bail!(
            "{path} holds the store of a secondary: start colo-secondary with it, add [standby], or give this node another directory"
        );
    }
    let security = Security::load(config.tls.as_ref().map(|tls| tls.directory.as_path()))?;
    let arbiter = serve::arbiter(&config.arbiter)?;
    let mut machine = Machine::build(&config, &directory)?;
    let known = directory.runner()?;
    // A start that was cut off is gone on with as the same process.
    let incarnation = known.and_then(|known| known.starting).unwrap_or_else(Incarnation::draw);
    let (board, console) = (Board::default(), Console::default());
    let plane = Plane::new(Some(config.vm.clone()), config.node.clone(), incarnation, board, console.clone());
    let _audit = serve::keep_audit(
        &plane,
        &directory,
        serve::policies(&config.replication, config.on_stop, config.on_crash, config.max_promotions),
    );
    plane.board.describe(machine.account(), Arc::clone(machine.guest.memory()));
    plane.board.attach(std::mem::take(&mut machine.devices));
    // The sockets first: a port in use must not cost a term.
    runtime.block_on(async {
        serve::control_plane(config.admin.listen, &security, Arc::clone(&plane), Routes::default()).await?;
        metrics.map_or(Ok(()), |metrics| metrics.serve(&plane))?;
        serve::console_sinks(&console, &config.console).await
    })?;
    let allowed = Allowed { boot_after_crash: config.on_crash == OnCrash::Boot, start_again: again };
    let asked = ask(&*arbiter, &directory, (&config.node, incarnation), known, allowed);
    let (entry, was_protected) = asked.map_err(|why| follow_instead(standby.as_ref(), why))?;
    // Before a vCPU runs: a crash from here on finds that this node ran the guest.
    let beginning = machine.begin(&config, incarnation, entry.clone(), console)?;
    let beginning = Beginning { was_protected, ..beginning };
    directory.set_runner(Known { seen: entry.term, active: Some(entry.term), starting: None })?;
    tracing::info!(vm = %config.vm, node = %config.node, "the guest runs: {entry}");
    let (membership, presence) = announce(&config, &plane)?;
    let runner = Runner {
        plane,
        arbiter,
        replication: config.replication,
        max_promotions: config.max_promotions,
        on_stop: config.on_stop,
        security,
        own_address: config.admin.listen,
        advertised: config.admin.address(),
        standby,
        membership,
        presence,
        signals: serve::EndSignals::of(runtime.handle())?,
    };
    let end = runner.run(beginning, runtime.handle())?;
    Ok(ended(&config.vm, end))
}

/// The guest, booted and not started, and what is behind its devices.
struct Machine {
    guest: Box<dyn ProtectedGuest>,
    spec: WireSpec,
    kind: GuestKind,
    disk: Option<Arc<RunnerDisk>>,
    /// Whether the guest may write to it.
    writes: bool,
    network: Option<(NetSpec, Arc<Tap>)>,
    devices: Devices,
}

impl Machine {
    fn build(config: &PrimaryConfig, directory: &VmDirectory) -> anyhow::Result<Self> {
        let mut opened = backends::open(&config.vm, config.network.as_ref(), config.disk.as_ref())?;
        let image = opened.backends.disk.take();
        let disk = image.map(|image| Arc::new(RunnerDisk::new(image, directory.intent())));
        opened.backends.disk = disk.clone().map(|disk| disk as Arc<dyn Disk>);
        let writes = opened.disk.as_ref().is_some_and(|disk| !disk.read_only);
        let network = opened.net.zip(opened.backends.tap.clone());
        let (full, kind) = describe(config.vm.as_str(), &config.guest, (opened.net, opened.disk))?;
        admission::check(&full)?;
        let memory = Arc::new(GuestMemory::new(full.memory_bytes)?);
        let spec = WireSpec::new(&full, kind.clone());
        let mut guest = kind.build(full, memory, &opened.backends)?;
        guest.boot()?;
        Ok(Self { guest, spec, kind, disk, writes, network, devices: opened.devices })
    }

    fn account(&self) -> colo_proto::v1::Guest {
        account(self.guest.spec(), &self.kind)
    }

    /// The register names this process by `entry`: what a node begins with.
    fn begin(
        self,
        config: &PrimaryConfig,
        incarnation: Incarnation,
        entry: Entry,
        console: Console,
    ) -> anyhow::Result<Beginning> {
        let Self { mut guest, spec, disk, writes, network, .. } = self;
        if let Some(disk) = disk.as_ref().filter(|_| writes) {
            disk.begin(&config.vm, Point { term: entry.term, epoch: Epoch(0) })?;
        }
        let blocks = disk.as_ref().map_or(0, |disk| disk.bytes() / BLOCK_SIZE as u64);
        let last_changed = LastChanged::none(guest.memory().layout().frame_limit(), blocks);
        let begins = OutputPosition::at_start(entry.term);
        guest.count_from(begins)?;
        console.begin_at(begins.console);
        let outlet = Outlet::new(console, network.map(|(net, tap)| Network::new(tap, net.mac, [])));
        Ok(Beginning {
            vm: config.vm.clone(),
            me: config.node.clone(),
            incarnation,
            guest,
            spec,
            replicator: Replicator::new(config.node.clone(), incarnation, entry, History::default()),
            release: Release::new(begins),
            disk,
            outlet,
            moved: false,
            was_protected: false,
            promotions: 0,
            former: None,
            planned: false,
            last_changed,
        })
    }
}

/// A vm that is another's, or that this node cannot start, may be followed.
fn follow_instead(standby: Option<&Standby>, why: anyhow::Error) -> anyhow::Error {
    match (standby, why.downcast_ref::<NotStarted>()) {
        (Some(standby), Some(NotStarted::NotOurs(entry) | NotStarted::NothingToRun(entry))) => {
            tracing::warn!("the register says: {entry}; this node follows");
            standby.become_secondary(None)
        }
        _ => why,
    }
}

/// Says to the cluster that this process lives.
fn announce(config: &PrimaryConfig, plane: &Plane) -> anyhow::Result<(Arc<dyn Membership>, Presence)> {
    let membership = serve::membership(&config.arbiter)?;
    plane.keep_drain(Drain::of(&config.directory));
    plane.keep_membership(Arc::clone(&membership));
    let who = Who {
        node: config.node.clone(),
        incarnation: plane.incarnation,
        address: config.admin.address(),
        directory: config.directory.clone(),
    };
    let presence =
        Presence::start(Arc::clone(&membership), who, Some(config.vm.clone()), plane.board.clone(), None);
    Ok((membership, presence.context("no thread for the membership")?))
}

/// Lists the audit trail of a primary that does not run.
///
/// # Errors
/// It runs, or has kept none.
pub fn audit(path: &Path, last: Option<u64>) -> anyhow::Result<ExitCode> {
    let config = PrimaryConfig::load(path)?;
    telemetry::init(&config.log);
    crate::audit::print(&VmDirectory::open(&config.directory, &config.vm)?, last)
}

/// The runtime of a node: the network and the control plane, nothing of the guest.
///
/// # Errors
/// No threads can be had.
pub fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(2).thread_name("network").enable_all();
    builder.build().context("no threads for the network; raise the limit on processes (ulimit -u)")
}

/// Says how a runner ended, and with which status.
pub fn ended(vm: &VmId, Ended { end, moved }: Ended) -> ExitCode {
    match end {
        End::Stopped(reason) => {
            tracing::info!(%vm, "the vm is stopped: {reason}");
            ExitCode::SUCCESS
        }
        End::Superseded(Some(entry)) if moved => {
            tracing::info!(%vm, "the guest has moved, and this process ends as it was told: {entry}");
            ExitCode::SUCCESS
        }
        End::Superseded(Some(entry)) => {
            tracing::warn!(%vm, "this node's part is over; the register says: {entry}");
            ExitCode::from(SUPERSEDED)
        }
        End::Superseded(None) => {
            tracing::warn!(%vm, "this node leaves the vm");
            ExitCode::from(SUPERSEDED)
        }
    }
}

fn read(arbiter: &dyn Arbiter, vm: &VmId) -> anyhow::Result<Option<Entry>> {
    arbiter.read(vm).context("nothing is started without the arbiter's word")
}

/// Asks for the register, if that is allowed. The start is noted before, for the next process if this one is cut off.
fn ask(
    arbiter: &dyn Arbiter,
    directory: &VmDirectory,
    (node, incarnation): (&NodeId, Incarnation),
    known: Option<Known>,
    allowed: Allowed,
) -> anyhow::Result<(Entry, bool)> {
    let vm = directory.vm();
    let found = read(arbiter, vm)?;
    let was_protected = found.as_ref().is_some_and(|entry| matches!(entry.value, Value::Paired { .. }));
    let proposal = match decide(node, incarnation, found.as_ref(), known, allowed) {
        Ok(proposal) => proposal,
        Err(refusal) => {
            forget_start(directory, known, found.as_ref())?;
            return Err(refusal.into());
        }
    };
    let known = known.unwrap_or_default();
    let seen = known.seen.max(found.map_or(Term(0), |entry| entry.term));
    // Before it is asked for: a crash from here on finds that this start ran nothing.
    directory.set_runner(Known { seen, starting: Some(incarnation), ..known })?;
    match propose(arbiter, vm, &proposal) {
        Ok(entry) => Ok((entry, was_protected)),
        Err(entry) => {
            directory.set_runner(Known { seen, starting: None, ..known })?;
            bail!("nothing is started: the register has changed and says: {entry}")
        }
    }
}

/// A start that was cut off and can never be granted any more, since the register has moved on, is noted no longer: this
/// node may follow.
fn forget_start(directory: &VmDirectory, known: Option<Known>, found: Option<&Entry>) -> anyhow::Result<()> {
    if let (Some(known), Some(entry)) = (known, found)
        && known.starting.is_some()
        && entry.term > known.seen
    {
        directory.set_runner(Known { seen: entry.term, starting: None, ..known })?;
    }
    Ok(())
}

/// Repeats the proposal until it is answered: an outcome that is not known may still come true. If it is refused,
/// answers what is there instead. A register that was there and is gone is no answer.
fn propose(arbiter: &dyn Arbiter, vm: &VmId, proposal: &Proposal) -> Result<Entry, Entry> {
    loop {
        match arbiter.propose(vm, proposal) {
            Ok(Answer::Applied(entry)) => return Ok(entry),
            Ok(Answer::Refused(Some(found))) => return Err(found),
            Ok(Answer::Refused(None)) => {
                tracing::warn!(%vm, "the arbiter has no register of this vm any more, trying again: restore it");
                std::thread::sleep(RETRY);
            }
            Err(e) => {
                tracing::warn!(%vm, "the arbiter does not answer, trying again: {e}");
                std::thread::sleep(RETRY);
            }
        }
    }
}
