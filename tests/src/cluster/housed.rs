//! Nodes on hosts of a lab, each with a network of its own: they are reached there, and with certificates.

use anyhow::{Context, ensure};
use colo_common::arbiter::Arbiter;
use colo_common::tls::{Identity, NODE_NAME, OPERATOR_NAME, Role};
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use tonic::transport::{Certificate, ClientTlsConfig};

use super::admin::Admin;
use super::config::Ports;
use super::{Cluster, free_port, process};
use crate::etcd::authority::{self, Authority};
use crate::lab::hosts::Host;

/// Ports of a node that has a host for itself.
const CONTROL: u16 = 7701;
const QUIC: u16 = 7702;

/// Writes the certificates of a cluster into a new directory: what `[tls]` names, and an operator's.
///
/// # Errors
/// They cannot be written.
pub fn issue_certificates(directory: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let authority = Authority::new("a cluster's authority")?;
    for (stem, name) in [("node", NODE_NAME), ("operator", OPERATOR_NAME)] {
        authority.write(&directory.join(stem), &[name.to_owned()], authority::NOW)?;
    }
    std::fs::rename(directory.join("node.ca"), directory.join("ca.pem")).context("the authority's file")
}

impl Cluster {
    /// Has a node that was never started live on a host of a lab.
    ///
    /// # Errors
    /// No descriptor is left, or the cluster has no certificates, without which nodes listen on loopback alone.
    pub fn house(&mut self, host: &Host) -> anyhow::Result<()> {
        ensure!(self.options.tls.is_some(), "nodes on hosts of their own need Options::tls");
        self.hosts.insert(host.name.clone(), host.try_clone()?);
        Ok(())
    }

    /// Starts a node again that was killed, by the command line that it was started with first.
    ///
    /// # Errors
    /// It runs, or was never started.
    pub fn restart(&mut self, node: &str) -> anyhow::Result<()> {
        let program = if self.is_primary(node)? { "colo-primary" } else { "colo-secondary" };
        let mut command = Command::new(process::program(program)?);
        command.arg("start").arg("--config").arg(self.config_of(node));
        command.env("COLO_DEV_TLS", self.directory().join("tls"));
        self.start(node, command, false)
    }

    /// Who holds the register.
    pub fn arbiter(&self) -> Arc<dyn Arbiter> {
        Arc::clone(&self.arbiter)
    }

    /// Where runners find a node's control plane.
    ///
    /// # Errors
    /// There is no such node.
    pub fn address_of(&self, node: &str) -> anyhow::Result<SocketAddr> {
        Ok(self.admin(node)?.address())
    }

    pub(super) fn ports_of(&self, node: &str) -> anyhow::Result<Ports> {
        let (admin, quic) = match self.hosts.get(node) {
            Some(host) => ((host.address, CONTROL).into(), (host.address, QUIC).into()),
            None => (free_port()?, free_port()?),
        };
        Ok(Ports { admin, quic, advertised: None })
    }

    pub(super) fn admin_at(&self, address: SocketAddr) -> anyhow::Result<Admin> {
        let runtime = self.runtime.handle().clone();
        let Some(directory) = &self.options.tls else { return Ok(Admin::new(runtime, address)) };
        let identity = Identity::load(directory, Role::Operator)?;
        let pem = identity.pem();
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&pem.ca))
            .identity(tonic::transport::Identity::from_pem(&pem.certificate, &pem.key))
            .domain_name(NODE_NAME);
        Ok(Admin::with_tls(runtime, address, tls))
    }
}
