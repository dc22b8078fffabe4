//! Real nodes as processes on loopback, with everything that they need in one directory of their own: configurations,
//! certificates, the register's files, logs. Tests and the demo kill, freeze and cut them off, and judge by the
//! control planes, the register and what was let out.

pub mod admin;
pub mod between;
pub mod config;
pub mod disks;
pub mod housed;
pub mod ledger;
pub mod link;
pub mod process;
mod refusal;
mod scenario;
mod wait;

use anyhow::{Context, ensure};
use colo_common::VmId;
use colo_common::arbiter::{self, Arbiter};
use colo_common::config::ArbiterConfig;
use colo_common::register::Entry;
use colo_proto::v1::{Role, StatusReply, SwitchoverReply};
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

use crate::lab::hosts::Host;
use admin::Admin;
use config::{Options, Ports};
use ledger::Ledger;
use link::Link;
use process::Process;
pub use scenario::scenario;
pub use wait::{PATIENCE, is_solo_of, runs};

/// The vm of every cluster.
const VM: &str = "demo";

/// A place where a node can run; it outlives its processes.
struct Place {
    ports: Ports,
    admin: Admin,
    link: Option<Link>,
    process: Option<Process>,
    /// Reads the console of the process.
    reader: Option<JoinHandle<()>>,
    /// The console's file begins with the guest's first byte: only that of the node that started the guest.
    file_from_start: bool,
    /// It was configured to start the guest, and not to follow.
    primary: bool,
    /// It was configured to be bound to no vm.
    spare: bool,
}

/// The nodes of one vm.
pub struct Cluster {
    /// How nodes are configured from now on.
    pub options: Options,
    directory: PathBuf,
    places: BTreeMap<String, Place>,
    /// Of nodes that do not run on this one.
    hosts: BTreeMap<String, Host>,
    ledger: Arc<Mutex<Ledger>>,
    arbiter: Arc<dyn Arbiter>,
    vm: VmId,
    runtime: Runtime,
    kept: bool,
}

impl Cluster {
    /// Makes the directory; no node runs yet.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn new(options: Options) -> anyhow::Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let directory = std::env::temp_dir().join(format!("colo-{}-{number}", std::process::id()));
        let registers = directory.join("arbiter");
        std::fs::create_dir_all(&registers)
            .with_context(|| format!("cannot make {}", registers.display()))?;
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(2).thread_name("cluster").enable_all().build()?;
        let in_files = ArbiterConfig::in_directory(&registers);
        Ok(Self {
            arbiter: arbiter::open(options.arbiter.as_ref().unwrap_or(&in_files))?,
            options,
            directory,
            places: BTreeMap::new(),
            hosts: BTreeMap::new(),
            ledger: Arc::default(),
            vm: VM.parse()?,
            runtime,
            kept: false,
        })
    }

    /// Where everything is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The vm's name.
    pub fn vm(&self) -> &VmId {
        &self.vm
    }

    /// Runs the harness' own tasks.
    pub fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// Leaves the directory where it is.
    pub fn keep(&mut self) {
        self.kept = true;
    }

    /// The configuration file of a node, and the command that starts it: what [`start_primary`](Self::start_primary)
    /// and [`start_secondary`](Self::start_secondary) use, for tests that change it first.
    ///
    /// # Errors
    /// The program is not built, or no port can be had.
    pub fn prepare(
        &mut self,
        node: &str,
        primary: bool,
        secondary: Option<&str>,
    ) -> anyhow::Result<(PathBuf, Command)> {
        let to = secondary.map(|name| self.way_to(name)).transpose()?;
        let ports = self.place(node)?.ports;
        let (program, text) = if primary {
            ("colo-primary", config::primary(&self.options, VM, node, ports, to))
        } else {
            ("colo-secondary", config::secondary(&self.options, VM, node, ports))
        };
        if primary && let Some(image) = &self.options.disk {
            copy_disk(image, &self.directory.join(config::disk_of(node)))?;
        }
        let place = self.place(node)?;
        (place.primary, place.spare) = (primary, false);
        let path = self.config_of(node);
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        let mut command = Command::new(process::program(program)?);
        command.arg("start").arg("--config").arg(&path).env("COLO_DEV_TLS", self.directory.join("tls"));
        Ok((path, command))
    }

    /// Starts the guest on a node, to be protected by another if one is named.
    ///
    /// # Errors
    /// The process cannot be started.
    pub fn start_primary(&mut self, node: &str, secondary: Option<&str>) -> anyhow::Result<()> {
        let (_, command) = self.prepare(node, true, secondary)?;
        let fresh = self.ledger().end() == 0;
        self.start(node, command, fresh)
    }

    /// Starts a node that follows.
    ///
    /// # Errors
    /// The process cannot be started.
    pub fn start_secondary(&mut self, node: &str) -> anyhow::Result<()> {
        let (_, command) = self.prepare(node, false, None)?;
        self.start(node, command, false)
    }

    /// Starts a node that is bound to no vm.
    ///
    /// # Errors
    /// The process cannot be started.
    pub fn start_spare(&mut self, node: &str) -> anyhow::Result<()> {
        let (path, command) = self.prepare(node, false, None)?;
        let text = std::fs::read_to_string(&path)?;
        let unbound: Vec<&str> = text.lines().filter(|line| !line.starts_with("vm = ")).collect();
        std::fs::write(&path, unbound.join("\n"))?;
        self.place(node)?.spare = true;
        self.start(node, command, false)
    }

    /// Starts what [`prepare`](Self::prepare) gave.
    ///
    /// # Errors
    /// The process cannot be started, or the last one of the node still runs.
    pub fn start(&mut self, node: &str, mut command: Command, file_from_start: bool) -> anyhow::Result<()> {
        let log = self.log_of(node);
        let ledger = Arc::clone(&self.ledger);
        let place = self.places.get_mut(node).context("no such node")?;
        if let Some(mut old) = place.process.take() {
            ensure!(old.status()?.is_some(), "{node} still runs");
        }
        self.hosts.get(node).map_or(Ok(()), |host| host.house(&mut command))?;
        place.process = Some(Process::start(&mut command, &log)?);
        place.file_from_start = file_from_start;
        let client = place.admin.client()?;
        if let Some(reader) =
            place.reader.replace(self.runtime.spawn(admin::follow_console(client, node.to_owned(), ledger)))
        {
            reader.abort();
        }
        Ok(())
    }

    /// Kills a node as a loss of its host would; everything that it had let out is in the ledger then.
    ///
    /// # Errors
    /// It had ended by itself.
    pub fn kill(&mut self, node: &str) -> anyhow::Result<Instant> {
        let killed = self.process(node)?.kill().with_context(|| format!("killing {node}"))?;
        self.take_file(node)?;
        Ok(killed)
    }

    /// Freezes a node, or lets it go on (SIGSTOP, SIGCONT), or asks it to end (SIGTERM).
    ///
    /// # Errors
    /// It is not there.
    pub fn signal(&mut self, node: &str, signal: i32) -> anyhow::Result<()> {
        self.process(node)?.signal(signal)
    }

    /// Whether a node that runs the guest and loses it goes on in the same process, as a follower: then nobody need start
    /// it again.
    pub fn goes_on_as_follower(&self, node: &str) -> bool {
        self.options.standby || self.places.get(node).is_some_and(|place| !place.primary)
    }

    /// Waits for the end of a node's process.
    ///
    /// # Errors
    /// It does not end.
    pub fn ended(&mut self, node: &str) -> anyhow::Result<ExitStatus> {
        let status = self.process(node)?.ended(PATIENCE).with_context(|| format!("the end of {node}"))?;
        self.take_file(node)?;
        Ok(status)
    }

    /// Moves the guest from `runner` to its secondary.
    ///
    /// # Errors
    /// It does not move.
    pub fn switch_over(&mut self, runner: &str) -> anyhow::Result<SwitchoverReply> {
        self.take_file(runner)?;
        let reply = self.admin(runner)?.switchover()?;
        // What it says from now on is added to the same file.
        self.places.get_mut(runner).context("no such node")?.file_from_start = false;
        Ok(reply)
    }

    /// Empties a node, whose guest moves if it runs it.
    ///
    /// # Errors
    /// It says no.
    pub fn drain(&mut self, node: &str) -> anyhow::Result<()> {
        self.take_file(node)?;
        self.admin(node)?.drain(true)?;
        self.places.get_mut(node).context("no such node")?.file_from_start = false;
        Ok(())
    }

    /// The process of a node.
    ///
    /// # Errors
    /// None was started.
    pub fn process(&mut self, node: &str) -> anyhow::Result<&mut Process> {
        let place = self.places.get_mut(node).with_context(|| format!("{node} was never started"))?;
        place.process.as_mut().with_context(|| format!("{node} was never started"))
    }

    /// Everything that the processes of a node have logged.
    pub fn log(&self, node: &str) -> String {
        String::from_utf8_lossy(&std::fs::read(self.log_of(node)).unwrap_or_default()).into_owned()
    }

    /// The control plane of a node.
    ///
    /// # Errors
    /// There is no such node.
    pub fn admin(&self, node: &str) -> anyhow::Result<&Admin> {
        Ok(&self.places.get(node).with_context(|| format!("there is no node {node}"))?.admin)
    }

    /// The way to a secondary.
    ///
    /// # Errors
    /// The cluster has no links, or there is no such node.
    pub fn link(&self, secondary: &str) -> anyhow::Result<&Link> {
        let place = self.places.get(secondary).with_context(|| format!("there is no node {secondary}"))?;
        place.link.as_ref().context("the cluster was made without links")
    }

    /// Where `node` keeps its copy and its files.
    pub fn directory_of(&self, node: &str) -> PathBuf {
        self.directory.join(node)
    }

    /// The configuration file of `node`.
    pub fn config_of(&self, node: &str) -> PathBuf {
        self.directory.join(format!("{node}.toml"))
    }

    /// Whether `node` was last configured to start the guest, and not to follow.
    ///
    /// # Errors
    /// There is no such node.
    pub fn is_primary(&self, node: &str) -> anyhow::Result<bool> {
        Ok(self.places.get(node).with_context(|| format!("there is no node {node}"))?.primary)
    }

    /// Whether `node` was last configured to be bound to no vm.
    pub fn is_spare(&self, node: &str) -> bool {
        self.places.get(node).is_some_and(|place| place.spare)
    }

    /// What a node says about itself; nothing if it does not answer.
    pub fn status(&self, node: &str) -> Option<StatusReply> {
        self.admin(node).ok()?.status().ok()
    }

    /// The register.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn register(&self) -> anyhow::Result<Option<Entry>> {
        Ok(self.arbiter.read(&self.vm)?)
    }

    /// The released console.
    pub fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has `runner` protect its vm by `secondary`, whatever came before, and waits until that is so.
    ///
    /// # Errors
    /// It cannot.
    pub fn protect(&mut self, runner: &str, secondary: &str) -> anyhow::Result<()> {
        self.protect_by(runner, secondary, false)
    }

    /// The same, and the copy is sent in full, whatever the secondary has.
    ///
    /// # Errors
    /// It cannot.
    pub fn protect_in_full(&mut self, runner: &str, secondary: &str) -> anyhow::Result<()> {
        self.protect_by(runner, secondary, true)
    }

    fn protect_by(&mut self, runner: &str, secondary: &str, full: bool) -> anyhow::Result<()> {
        let address = self.way_to(secondary)?;
        // Before it has read the register it takes nobody.
        self.until(&format!("{secondary} to know the register"), || {
            Ok(self.status(secondary).and_then(|status| status.register).map(drop))
        })?;
        let asked = self.admin(runner)?.protect(address, full);
        let role = self.status(runner).map(|status| status.role());
        // The runner may have found it by itself meanwhile: then it says that it needs nobody.
        let found = [Role::Seeding, Role::Joining, Role::Pairing, Role::Paired].map(Some).contains(&role);
        asked.or_else(|e| if found { Ok(()) } else { Err(e) })?;
        self.until_paired(runner)
    }

    /// What the node that started the guest wrote before it was killed was out, whoever had read it by then.
    fn take_file(&mut self, node: &str) -> anyhow::Result<()> {
        let from_start = self.places.get(node).is_some_and(|place| place.file_from_start);
        if from_start {
            let path = self.directory.join(format!("{node}.console"));
            let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            self.ledger().take(node, 0, &bytes);
        }
        Ok(())
    }

    fn log_of(&self, node: &str) -> PathBuf {
        self.directory.join(format!("{node}.log"))
    }

    /// Where a runner reaches `secondary`.
    fn way_to(&mut self, secondary: &str) -> anyhow::Result<SocketAddr> {
        let place = self.place(secondary)?;
        Ok(place.link.as_ref().map_or(place.ports.admin, |link| link.control))
    }

    fn place(&mut self, node: &str) -> anyhow::Result<&mut Place> {
        if !self.places.contains_key(node) {
            let mut ports = self.ports_of(node)?;
            let runtime = self.runtime.handle();
            let link =
                self.options.links.then(|| Link::open(runtime, ports.admin, ports.quic)).transpose()?;
            ports.advertised = link.as_ref().map(|link| link.datagrams.port());
            let admin = self.admin_at(ports.admin)?;
            let place = Place {
                ports,
                admin,
                link,
                process: None,
                reader: None,
                file_from_start: false,
                primary: false,
                spare: false,
            };
            self.places.insert(node.to_owned(), place);
        }
        self.places.get_mut(node).context("a place that was just made")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.places.values_mut().for_each(|place| place.process = None);
        if !self.kept {
            // A directory that stays behind harms nobody.
            let _ = std::fs::remove_dir_all(&self.directory);
        }
    }
}

/// A free port, for TCP and UDP alike. Below those that the system hands out by itself, so that no connection of
/// somebody's takes it before it is used, and each port once in a process.
fn free_port() -> anyhow::Result<SocketAddr> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    const FIRST: u16 = 12_000;
    const PORTS: u16 = 20_000;
    let start = (std::process::id() % u32::from(PORTS)) as u16;
    for _ in 0..PORTS {
        let offset = (u32::from(start) + u32::from(NEXT.fetch_add(1, Ordering::Relaxed))) % u32::from(PORTS);
        let port = FIRST + offset as u16;
        let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, port));
        if tcp.is_ok() && UdpSocket::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return Ok(SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
        }
    }
    anyhow::bail!("no free port between {FIRST} and {}", FIRST + PORTS)
}

/// A disk of a guest's own, holes and all; one that is there stays.
fn copy_disk(image: &Path, to: &Path) -> anyhow::Result<()> {
    if to.exists() {
        return Ok(());
    }
    let copied = Command::new("cp").args(["--sparse=always", "--reflink=auto"]).arg(image).arg(to).status();
    let copied = copied.context("cannot run cp")?;
    anyhow::ensure!(copied.success(), "cannot copy {} to {}", image.display(), to.display());
    Ok(())
}
