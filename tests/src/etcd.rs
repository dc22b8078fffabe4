//! A real etcd cluster on this host: some members, each a process with a directory and ports of its own, that can be
//! killed, frozen, wiped, added and removed.
//!
//! Elections are fast (heartbeats of 50 ms), so that a test sees many. The cluster ends with the thread that started it.

pub mod authority;
pub mod calls;
mod member;
pub mod swallow;

use anyhow::{Context, ensure};
use colo_common::config::{ArbiterConfig, EtcdEndpoint};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use authority::Authority;
use calls::Calls;
use member::{Member, PROGRAM};

use crate::lab::hosts::Host;

/// Until a cluster answers: an election, on a host that others load as well.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often that is looked at.
const POLL: Duration = Duration::from_millis(20);

/// Whether etcd can be had here; prints why not, for tests that are then passed over.
#[expect(clippy::print_stderr, reason = "a skipped test says so")]
pub fn usable() -> bool {
    let version = Command::new(PROGRAM).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    match version {
        Ok(status) if status.success() => true,
        Ok(status) => {
            eprintln!("skipped: etcd --version ends with {status}");
            false
        }
        Err(e) => {
            eprintln!("skipped: no etcd here ({e}): apt-get install etcd-server");
            false
        }
    }
}

/// What a node's `[arbiter]` says of etcd, as lines of its configuration file.
pub fn lines(config: &ArbiterConfig) -> String {
    let endpoints: Vec<String> = config.endpoints.iter().flatten().map(ToString::to_string).collect();
    let mut lines = format!("kind = \"etcd\"\nendpoints = {endpoints:?}\n");
    for (key, path) in [("ca", &config.ca), ("certificate", &config.certificate), ("key", &config.key)] {
        if let Some(path) = path {
            lines += &format!("{key} = \"{}\"\n", path.display());
        }
    }
    lines
}

/// A cluster of etcd members.
#[derive(Debug)]
pub struct EtcdCluster {
    directory: PathBuf,
    members: Vec<Member>,
    /// Of a cluster with TLS.
    authority: Option<Authority>,
    calls: Calls,
}

impl EtcdCluster {
    /// Three members on loopback, in the clear.
    ///
    /// # Errors
    /// They do not come to answer.
    pub fn start(directory: &Path) -> anyhow::Result<Self> {
        Self::start_at(directory, &[Ipv4Addr::LOCALHOST.into(); 3], false)
    }

    /// The same with TLS towards clients and between members; clients must show a certificate of the same authority.
    ///
    /// # Errors
    /// They do not come to answer.
    pub fn start_with_tls(directory: &Path) -> anyhow::Result<Self> {
        Self::start_at(directory, &[Ipv4Addr::LOCALHOST.into(); 3], true)
    }

    /// A member at each of these addresses of this host, with free ports.
    ///
    /// # Errors
    /// They do not come to answer.
    pub fn start_at(directory: &Path, addresses: &[IpAddr], tls: bool) -> anyhow::Result<Self> {
        let members = addresses.iter().enumerate().map(|(n, address)| Member::at(n, *address));
        Self::begin(directory, members.collect::<anyhow::Result<_>>()?, tls)
    }

    /// A member on each of these hosts of a lab, with TLS.
    ///
    /// # Errors
    /// They do not come to answer.
    pub fn start_on(directory: &Path, hosts: Vec<Host>) -> anyhow::Result<Self> {
        let members = hosts.into_iter().enumerate().map(|(n, host)| Member::on(n, host));
        Self::begin(directory, members.collect(), true)
    }

    fn begin(directory: &Path, members: Vec<Member>, tls: bool) -> anyhow::Result<Self> {
        let authority = tls.then(|| Authority::new("test authority")).transpose()?;
        let calls = Calls::new()?;
        let mut cluster = Self { directory: directory.to_owned(), members, authority, calls };
        if let Some(authority) = &cluster.authority {
            let mut names: Vec<String> =
                cluster.members.iter().map(|member| member.client.ip().to_string()).collect();
            names.push("localhost".to_owned());
            for file in ["member", "peer"] {
                authority.write(&directory.join(file), &names, authority::NOW)?;
            }
            authority.write(&directory.join("client"), &["client".to_owned()], authority::NOW)?;
        }
        let all = cluster.initial(0..cluster.len());
        for n in 0..cluster.len() {
            cluster.launch(n, &all, "new")?;
        }
        cluster.until_healthy()?;
        Ok(cluster)
    }

    /// How many members there ever were, removed ones included.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Where clients find a member.
    pub fn endpoint(&self, member: usize) -> EtcdEndpoint {
        let text = format!("{}://{}", self.scheme(), self.members[member].client);
        text.parse().expect("a socket's address is an address")
    }

    /// Where clients find a member, as a socket's address.
    pub fn address(&self, member: usize) -> SocketAddr {
        self.members[member].client
    }

    /// What a node's `[arbiter]` says; see [`lines`] for the text.
    pub fn config(&self) -> ArbiterConfig {
        let mut config = ArbiterConfig::in_etcd((0..self.len()).map(|n| self.endpoint(n)).collect());
        if self.authority.is_some() {
            let file = |name: &str| Some(self.directory.join(name));
            (config.ca, config.certificate, config.key) =
                (file("client.ca"), file("client.pem"), file("client.key"));
        }
        config
    }

    /// Its authority, if it has TLS.
    pub fn authority(&self) -> Option<&Authority> {
        self.authority.as_ref()
    }

    /// Calls to members, past Colo's own client.
    pub fn calls(&self) -> &Calls {
        &self.calls
    }

    /// Kills a member, as a loss of its host would. Its data stays.
    ///
    /// # Errors
    /// It does not run.
    pub fn kill(&mut self, member: usize) -> anyhow::Result<()> {
        let member = &mut self.members[member];
        member.process.take().context("the member does not run")?.kill()?;
        member.frozen = false;
        Ok(())
    }

    /// Stops a member where it is (SIGSTOP): its sockets stay open.
    ///
    /// # Errors
    /// It does not run.
    pub fn freeze(&mut self, member: usize) -> anyhow::Result<()> {
        self.members[member].signal(libc::SIGSTOP)?;
        self.members[member].frozen = true;
        Ok(())
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// It does not run.
    pub fn thaw(&mut self, member: usize) -> anyhow::Result<()> {
        self.members[member].signal(libc::SIGCONT)?;
        self.members[member].frozen = false;
        Ok(())
    }

    /// Starts a member that was killed, with its data.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn restart(&mut self, member: usize) -> anyhow::Result<()> {
        let all = self.initial(0..self.len());
        self.launch(member, &all, "existing")
    }

    /// Removes the data of a member that was killed.
    ///
    /// # Errors
    /// It runs, or the files cannot be removed.
    pub fn wipe(&mut self, member: usize) -> anyhow::Result<()> {
        ensure!(self.members[member].process.is_none(), "the member runs: kill it first");
        std::fs::remove_dir_all(self.data(member)).context("cannot remove the member's data")
    }

    /// Starts all members anew without any data: a cluster with the same id that has forgotten everything.
    ///
    /// # Errors
    /// They do not come to answer.
    pub fn wipe_all(&mut self) -> anyhow::Result<()> {
        for n in 0..self.len() {
            self.kill(n)?;
            self.wipe(n)?;
        }
        let all = self.initial(0..self.len());
        for n in 0..self.len() {
            self.launch(n, &all, "new")?;
        }
        self.until_healthy()
    }

    /// Starts a wiped member as a cluster of its own: what a stale list of endpoints may lead to.
    ///
    /// # Errors
    /// It does not come to answer.
    pub fn launch_alone(&mut self, member: usize) -> anyhow::Result<()> {
        let alone = self.initial(std::iter::once(member));
        self.launch(member, &alone, "new")?;
        self.until("a cluster of its own", |cluster| cluster.answers(member))
    }

    /// Adds a member on loopback; says which it is.
    ///
    /// # Errors
    /// The cluster does not take it.
    pub fn add(&mut self) -> anyhow::Result<usize> {
        let new = self.len();
        self.members.push(Member::at(new, Ipv4Addr::LOCALHOST.into())?);
        let peer = format!("{}://{}", self.scheme(), self.members[new].peer);
        let by = self.running().next().context("no member runs")?;
        // etcd takes one only when all others have been connected for five seconds.
        self.until("a member to be taken in", |cluster| {
            cluster.target(by).is_ok_and(|target| cluster.calls.member_add(&target, &peer).is_ok())
        })?;
        let all = self.initial(self.running().chain([new]).collect::<Vec<_>>());
        self.launch(new, &all, "existing")?;
        self.until("the new member to answer", |cluster| cluster.answers(new))?;
        Ok(new)
    }

    /// Takes a running member out of the cluster, by the word of another one, and ends its process.
    ///
    /// # Errors
    /// The cluster does not do it.
    pub fn remove(&mut self, member: usize) -> anyhow::Result<()> {
        let id = self.calls.status(&self.target(member)?)?.member;
        let by = self.running().find(|n| *n != member).context("no other member runs")?;
        self.calls.member_remove(&self.target(by)?, id)?;
        // It ends by itself, or not at once.
        self.members[member].process = None;
        Ok(())
    }

    /// The member that leads, as the others see it.
    ///
    /// # Errors
    /// There is none for long.
    pub fn leader(&self) -> anyhow::Result<usize> {
        let mut found = None;
        self.until("a leader", |cluster| {
            let statuses = cluster.running().filter_map(|n| {
                let status = cluster.calls.status(&cluster.target(n).ok()?).ok()?;
                Some((n, status))
            });
            let statuses: Vec<_> = statuses.collect();
            let leads = statuses.iter().find(|(_, status)| status.leader == status.member);
            let of_most = |id| statuses.iter().filter(|(_, status)| status.leader == id).count() * 2;
            found = leads.filter(|(_, s)| of_most(s.member) > statuses.len()).map(|(n, _)| *n);
            found.is_some()
        })?;
        found.context("no leader")
    }

    /// A running member's address and certificates, for [`Calls`].
    ///
    /// # Errors
    /// Its certificates cannot be read.
    pub fn target(&self, member: usize) -> anyhow::Result<calls::Target> {
        calls::Target::new(&self.endpoint(member).to_string(), &self.config())
    }

    /// Members that run and are not frozen.
    pub fn running(&self) -> impl Iterator<Item = usize> + '_ {
        let lives = |(n, member): (usize, &Member)| (member.process.is_some() && !member.frozen).then_some(n);
        self.members.iter().enumerate().filter_map(lives)
    }

    /// Waits until every running member answers reads that need a majority.
    ///
    /// # Errors
    /// They do not.
    pub fn until_healthy(&self) -> anyhow::Result<()> {
        self.until("all members to answer", |cluster| cluster.running().all(|n| cluster.answers(n)))
    }

    fn answers(&self, member: usize) -> bool {
        self.target(member).is_ok_and(|target| self.calls.get(&target, "/health").is_ok())
    }

    fn until(&self, what: &str, mut look: impl FnMut(&Self) -> bool) -> anyhow::Result<()> {
        let started = Instant::now();
        while !look(self) {
            let tails = || {
                let logs = self.members.iter().filter_map(|member| Some(member.process.as_ref()?.tail()));
                logs.collect::<Vec<_>>().join("\n")
            };
            ensure!(started.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}; logs end:\n{}", tails());
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    fn scheme(&self) -> &'static str {
        if self.authority.is_some() { "https" } else { "http" }
    }

    fn data(&self, member: usize) -> PathBuf {
        self.directory.join(&self.members[member].name)
    }

    /// `--initial-cluster` of these members.
    fn initial(&self, members: impl IntoIterator<Item = usize>) -> String {
        let one = |n: usize| format!("{}={}://{}", self.members[n].name, self.scheme(), self.members[n].peer);
        members.into_iter().map(one).collect::<Vec<_>>().join(",")
    }

    fn launch(&mut self, member: usize, initial: &str, state: &str) -> anyhow::Result<()> {
        let (scheme, has_tls) = (self.scheme(), self.authority.is_some());
        let tls = has_tls.then_some(self.directory.as_path());
        self.members[member].launch(&self.directory, &[initial, state, scheme], tls)
    }
}
