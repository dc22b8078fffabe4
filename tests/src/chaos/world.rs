//! What chaos happens to: three nodes and three members of etcd, each on a host of its own, one guest with a service that
//! is protected, and clients outside. One node starts the guest, one follows its vm, the third is a spare; later each is what
//! it was made by what happened to it.

use anyhow::{Context, bail, ensure};
use colo_common::config::ArbiterConfig;
use colo_common::membership::{self, Membership, NodeRole};
use colo_common::register::Value;
use colo_common::{Incarnation, Mac};
use colo_proto::v1::{Role, StatusReply};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::watcher::Watcher;
use crate::cluster::config::Options;
use crate::cluster::housed::issue_certificates;
use crate::cluster::{Cluster, runs};
use crate::etcd::EtcdCluster;
use crate::images::Images;
use crate::lab::hosts::Host;
use crate::lab::speakers::Speakers;
use crate::lab::{GUEST, Lab};
use crate::service::Dial;

/// The nodes: the first boots the guest, the second protects it first, the third is bound to no vm.
pub const NODES: [&str; 3] = ["a", "b", "c"];
/// The hosts of etcd's members.
pub const MEMBERS: [&str; 3] = ["m0", "m1", "m2"];
/// How the guest ends when it is told to power off: its kernel has no ACPI to do it by.
const END: &str = "end=exit:0";
/// How long a guest may take to boot to its service: 21 s on an idle host, some minutes with
/// all cores busy.
const BOOT: Duration = Duration::from_secs(900);
/// How long anything else may take: far longer than any step takes on a host that others load as well.
pub const PATIENCE: Duration = Duration::from_secs(90);
/// Between two looks.
pub const POLL: Duration = Duration::from_millis(20);
/// Port of the service.
const PORT: u16 = 6379;

/// The whole.
pub struct World {
    /// The nodes.
    pub cluster: Cluster,
    /// The members.
    pub etcd: EtcdCluster,
    /// Reads the register all the time.
    pub watcher: Watcher,
    /// Who speaks for the guest.
    pub speakers: Speakers,
    /// Networks; they end last.
    pub lab: Lab,
    /// Who is there, as the nodes say.
    membership: Arc<dyn Membership>,
    /// The process of the spare that was there when the guest was last protected, and those that were killed: their records
    /// stay for a while.
    spare: Option<(String, Incarnation)>,
    dead: Vec<Incarnation>,
    kept: bool,
}

/// Who does what for the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roles {
    /// Runs it.
    pub primary: String,
    /// Holds its copy.
    pub secondary: String,
    /// Neither.
    pub spare: String,
}

impl World {
    /// Builds it, and boots the guest at the first node, protected by the second.
    ///
    /// # Errors
    /// Something does not come up.
    pub fn begin(images: &Images) -> anyhow::Result<Self> {
        let mut world = Self::build(images)?;
        match world.boot() {
            Ok(()) => Ok(world),
            Err(e) => Err(world.explain(&e)),
        }
    }

    fn build(images: &Images) -> anyhow::Result<Self> {
        let mut lab = Lab::enter(&[])?;
        for (name, node) in NODES.map(|node| (node, true)).into_iter().chain(MEMBERS.map(|m| (m, false))) {
            lab.add_host(name, node)?;
        }
        let mut options = Options { standby: true, ..Options::service(images, END)? };
        // What a configuration has that says nothing about it.
        (options.heartbeat_ms, options.suspect_after_ms, options.promote_delay_ms) = (50, 500, 250);
        // Etcd must be there before a cluster can be made, and its files belong beside the cluster's.
        let directory = std::env::temp_dir().join(format!("colo-chaos-{}-{}", std::process::id(), number()));
        let (tls, etcd) = (directory.join("tls"), directory.join("etcd"));
        std::fs::create_dir_all(&etcd).with_context(|| format!("cannot make {}", etcd.display()))?;
        issue_certificates(&tls)?;
        let hosts = MEMBERS.map(|member| lab.host(member).and_then(Host::try_clone));
        let etcd = EtcdCluster::start_on(&etcd, hosts.into_iter().collect::<anyhow::Result<_>>()?)?;
        let arbiter: ArbiterConfig = etcd.config();
        let membership = membership::open(&arbiter)?;
        (options.arbiter, options.tls) = (Some(arbiter), Some(tls));
        let mut cluster = Cluster::new(options)?;
        let mut speakers = Speakers::new(Mac::of(cluster.vm()));
        for node in NODES {
            cluster.house(lab.host(node)?)?;
            speakers.listen(&lab, node)?;
        }
        let watcher = Watcher::start(cluster.arbiter(), cluster.vm().clone())?;
        let (spare, dead) = (None, Vec::new());
        Ok(Self { cluster, etcd, watcher, speakers, lab, membership, spare, dead, kept: false })
    }

    fn boot(&mut self) -> anyhow::Result<()> {
        self.cluster.start_secondary(NODES[1])?;
        self.cluster.start_spare(NODES[2])?;
        // The file of its console does not begin with the guest's first byte any more once it has followed another node.
        let (_, command) = self.cluster.prepare(NODES[0], true, None)?;
        self.cluster.start(NODES[0], command, false)?;
        let ready = |world: &Self| {
            let ready = crate::session::find(world.cluster.ledger().bytes(), b"colo-service ready");
            Ok(ready.map(drop))
        };
        self.until_within(BOOT, "the service to answer", ready)?;
        self.cluster.protect(NODES[0], NODES[1])?;
        self.until_whole()
    }

    /// A way to the service.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn dial(&self) -> anyhow::Result<Dial> {
        self.lab.dial(&format!("{GUEST}:{PORT}"), PATIENCE)
    }

    /// Who does what.
    ///
    /// # Errors
    /// The guest is not protected.
    pub fn roles(&self) -> anyhow::Result<Roles> {
        let entry = self.cluster.register()?.context("no register")?;
        let Value::Paired { primary, secondary, .. } = &entry.value else { bail!("the register: {entry}") };
        let (primary, secondary) = (primary.to_string(), secondary.to_string());
        let spare = NODES.into_iter().find(|node| *node != primary && *node != secondary);
        Ok(Roles { primary, secondary, spare: spare.context("no spare")?.to_owned() })
    }

    /// Waits until the guest is protected and the third node is ready to.
    ///
    /// # Errors
    /// It does not come to that.
    pub fn until_whole(&mut self) -> anyhow::Result<()> {
        self.until_protected()?;
        self.spare = self.until("the third node to wait for its turn", |world| {
            let Ok(Roles { spare, .. }) = world.roles() else { return Ok(None) };
            Ok(match world.cluster.status(&spare) {
                Some(status) if status.role() != Role::Spare => waits(&status).then_some(None),
                _ => world.spare_process(&spare).map(|process| Some((spare, process))),
            })
        })?;
        Ok(())
    }

    /// The process of a node that says that it is bound to no vm.
    fn spare_process(&self, node: &str) -> Option<Incarnation> {
        let is = |process: &Incarnation| !self.dead.contains(process);
        let nodes = self.membership.nodes().ok()?.into_iter();
        let mut spares =
            nodes.filter(|record| record.role == NodeRole::Spare && record.node.as_str() == node);
        spares.next().map(|record| record.incarnation).filter(is)
    }

    /// This node's process is about to be killed.
    pub(super) fn note_end(&mut self, node: &str) {
        let spare = self.spare.take_if(|(name, _)| name == node);
        self.dead.extend(spare.map(|(_, process)| process));
    }

    /// Waits for the end of a node whose vm is stopped: one that is bound to it no more goes on as a spare.
    ///
    /// # Errors
    /// It does not end, or with a failure.
    pub(super) fn end_follower(&mut self, node: &str) -> anyhow::Result<()> {
        if self.cluster.is_spare(node) {
            let what = format!("{node} to be a spare again");
            self.until(&what, |world| Ok(world.spare_process(node)))?;
            self.cluster.signal(node, libc::SIGTERM)?;
        }
        let status = self.cluster.ended(node)?;
        ensure!(status.success(), "{node} ended with {status}");
        Ok(())
    }

    /// Waits until the guest is protected.
    ///
    /// # Errors
    /// It does not come to that.
    pub fn until_protected(&mut self) -> anyhow::Result<()> {
        self.until("the guest to be protected", |world| {
            let paired = world.roles().ok().and_then(|roles| world.cluster.status(&roles.primary));
            Ok(paired.filter(|status| status.role() == Role::Paired).map(drop))
        })
    }

    /// Waits until the guest is protected by this node.
    ///
    /// # Errors
    /// It does not come to that.
    pub fn until_protected_by(&mut self, node: &str) -> anyhow::Result<()> {
        self.until(&format!("{node} to be found and to protect the guest"), |world| {
            let roles = world.roles().ok().filter(|roles| roles.secondary == node);
            let paired = roles.and_then(|roles| world.cluster.status(&roles.primary));
            Ok(paired.filter(|status| status.role() == Role::Paired).map(drop))
        })
    }

    /// The node that runs the guest, as it says itself.
    pub fn runner(&self) -> Option<String> {
        let is = |node: &&str| self.cluster.status(node).is_some_and(|status| runs(status.role()));
        NODES.into_iter().find(is).map(str::to_owned)
    }

    /// Waits until a condition gives something.
    ///
    /// # Errors
    /// It fails, or gives nothing in time.
    pub fn until<T>(
        &mut self,
        what: &str,
        look: impl FnMut(&Self) -> anyhow::Result<Option<T>>,
    ) -> anyhow::Result<T> {
        self.until_within(PATIENCE, what, look)
    }

    fn until_within<T>(
        &mut self,
        limit: Duration,
        what: &str,
        mut look: impl FnMut(&Self) -> anyhow::Result<Option<T>>,
    ) -> anyhow::Result<T> {
        let started = Instant::now();
        loop {
            if let Some(found) = look(self).with_context(|| format!("waiting for {what}"))? {
                return Ok(found);
            }
            ensure!(started.elapsed() < limit, "waited {limit:?} for {what}");
            std::thread::sleep(POLL);
        }
    }

    /// What failed, with the logs, which are kept.
    pub fn explain(&mut self, error: &anyhow::Error) -> anyhow::Error {
        self.cluster.keep();
        self.kept = true;
        anyhow::anyhow!("{error:#}\n{}", self.cluster.logs())
    }

    /// Directory of everything but the nodes' files.
    fn directory(&self) -> Option<&Path> {
        self.cluster.options.tls.as_deref().and_then(Path::parent)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(directory) = self.directory().filter(|_| !self.kept) {
            // A directory that stays behind harms nobody.
            let _ = std::fs::remove_dir_all(directory);
        }
    }
}

/// Whether a node that is bound to the vm has nobody to follow: it may still hold a whole copy of a time before.
fn waits(status: &StatusReply) -> bool {
    let idle = matches!(status.role(), Role::Waiting | Role::Following);
    let linked = status.link.as_ref().is_some_and(|link| link.connected);
    idle && !linked && status.register.is_some()
}

fn number() -> u32 {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    NUMBER.fetch_add(1, Ordering::Relaxed)
}
