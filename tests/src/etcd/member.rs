//! One member: its process, its ports, what it is told.

use anyhow::Context;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::Path;
use std::process::Command;

use crate::cluster::process::Process;
use crate::lab::hosts::Host;

/// The program, as Debian's etcd-server installs it.
pub(super) const PROGRAM: &str = "etcd";
/// What etcd is told of its own time: a leader tells its members that it lives, a member without one stands for election.
const HEARTBEAT_MS: u32 = 50;
const ELECTION_MS: u32 = 500;
/// Ports of a member that has a host for itself.
const PORTS: (u16, u16) = (2379, 2380);

/// One member.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) name: String,
    pub(super) client: SocketAddr,
    pub(super) peer: SocketAddr,
    pub(super) process: Option<Process>,
    pub(super) frozen: bool,
    /// Where its process runs, if not here.
    host: Option<Host>,
}

impl Member {
    pub(super) fn at(n: usize, address: IpAddr) -> anyhow::Result<Self> {
        // Both are held until both are known, so that they differ.
        let (client, peer) = (TcpListener::bind((address, 0))?, TcpListener::bind((address, 0))?);
        Ok(Self {
            name: format!("m{n}"),
            client: client.local_addr()?,
            peer: peer.local_addr()?,
            process: None,
            frozen: false,
            host: None,
        })
    }

    pub(super) fn on(n: usize, host: Host) -> Self {
        let [client, peer] = [PORTS.0, PORTS.1].map(|port| SocketAddr::from((host.address, port)));
        Self { name: format!("m{n}"), client, peer, process: None, frozen: false, host: Some(host) }
    }

    pub(super) fn signal(&self, signal: libc::c_int) -> anyhow::Result<()> {
        self.process.as_ref().context("the member does not run")?.signal(signal)
    }

    /// Starts it with its data in `directory`, and certificates from `tls`.
    pub(super) fn launch(
        &mut self,
        directory: &Path,
        [initial, state, scheme]: &[&str; 3],
        tls: Option<&Path>,
    ) -> anyhow::Result<()> {
        let (client, peer) = (format!("{scheme}://{}", self.client), format!("{scheme}://{}", self.peer));
        let mut command = Command::new(PROGRAM);
        command
            .args(["--name", &self.name, "--initial-cluster", initial, "--initial-cluster-state", state])
            .args(["--initial-cluster-token", "colo-test", "--logger", "zap", "--log-outputs", "stderr"])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .arg(format!("--heartbeat-interval={HEARTBEAT_MS}"))
            .arg(format!("--election-timeout={ELECTION_MS}"))
            .arg("--data-dir")
            .arg(directory.join(&self.name));
        if let Some(tls) = tls {
            for (kind, file) in [("", "member"), ("peer-", "peer")] {
                command.arg(format!("--{kind}client-cert-auth"));
                for (flag, end) in [("cert-file", "pem"), ("key-file", "key"), ("trusted-ca-file", "ca")] {
                    command.arg(format!("--{kind}{flag}")).arg(tls.join(format!("{file}.{end}")));
                }
            }
        }
        self.host.as_ref().map_or(Ok(()), |host| host.house(&mut command))?;
        let process = Process::start(&mut command, &directory.join(format!("{}.log", self.name)))?;
        (self.process, self.frozen) = (Some(process), false);
        Ok(())
    }
}
