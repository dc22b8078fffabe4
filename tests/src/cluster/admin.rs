//! Calls of a node's control plane, each with a limit: in the clear on loopback, or as an operator with a certificate.

use anyhow::{Context, anyhow};
use colo_proto::v1::admin_client::AdminClient;
use colo_proto::v1::{
    self, ConsoleAttach, ConsoleInput, ConsoleOutput, console_attach, console_input, console_output,
};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::runtime::Handle;
use tonic::transport::{Channel, ClientTlsConfig, Endpoint};
use tonic::{Response, Status};
use tonic_types::StatusExt;

use super::ledger::Ledger;

/// How long a call may take that only looks.
const LOOK_LIMIT: Duration = Duration::from_secs(5);
/// How long one may take that changes something.
const CALL_LIMIT: Duration = Duration::from_secs(60);
/// Between two tries to attach to the console of a node that is not up yet.
const RETRY: Duration = Duration::from_millis(20);

/// A node's control plane.
#[derive(Clone, Debug)]
pub struct Admin {
    runtime: Handle,
    address: SocketAddr,
    tls: Option<ClientTlsConfig>,
}

impl Admin {
    /// The control plane at `address`.
    pub fn new(runtime: Handle, address: SocketAddr) -> Self {
        Self { runtime, address, tls: None }
    }

    /// The same with the operator's certificate of a cluster.
    pub fn with_tls(runtime: Handle, address: SocketAddr, tls: ClientTlsConfig) -> Self {
        Self { runtime, address, tls: Some(tls) }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What the node says about itself.
    ///
    /// # Errors
    /// It does not answer.
    pub fn status(&self) -> anyhow::Result<v1::StatusReply> {
        self.call(LOOK_LIMIT, |mut client| async move { client.status(v1::StatusRequest {}).await })
    }

    /// Whether the node does its part.
    ///
    /// # Errors
    /// It does not answer.
    pub fn health(&self) -> anyhow::Result<v1::HealthReply> {
        self.call(LOOK_LIMIT, |mut client| async move { client.health(v1::HealthRequest {}).await })
    }

    /// So many reports of epochs from now on.
    ///
    /// # Errors
    /// They do not come.
    pub fn watch(&self, count: usize) -> anyhow::Result<Vec<v1::EpochReport>> {
        self.call(CALL_LIMIT, |mut client| async move {
            let mut reports = client.watch(v1::WatchRequest {}).await?.into_inner();
            let mut seen = Vec::new();
            while seen.len() < count {
                let ended = || Status::unavailable("the reports end");
                seen.push(reports.message().await?.ok_or_else(ended)?);
            }
            Ok(Response::new(seen))
        })
    }

    /// The whole audit trail.
    ///
    /// # Errors
    /// It keeps none, or does not answer.
    pub fn audit(&self) -> anyhow::Result<Vec<v1::AuditEntry>> {
        self.call(LOOK_LIMIT, |mut client| async move {
            let request = v1::ListAuditRequest { start: None, follow: false };
            let mut entries = client.list_audit(request).await?.into_inner();
            let mut all = Vec::new();
            while let Some(entry) = entries.message().await? {
                all.push(entry);
            }
            Ok(Response::new(all))
        })
    }

    /// Collects everything that happens at the node from now on.
    ///
    /// # Errors
    /// It does not answer.
    pub fn listen(&self) -> anyhow::Result<Arc<Mutex<Vec<v1::Event>>>> {
        let mut events =
            self.call(LOOK_LIMIT, |mut client| async move { client.events(v1::EventsRequest {}).await })?;
        let heard: Arc<Mutex<Vec<v1::Event>>> = Arc::default();
        let hears = Arc::clone(&heard);
        self.runtime.spawn(async move {
            while let Ok(Some(event)) = events.message().await {
                hears.lock().unwrap_or_else(PoisonError::into_inner).push(event);
            }
        });
        Ok(heard)
    }

    /// Changes what a follower's acks mean.
    ///
    /// # Errors
    /// It says no.
    pub fn set_policy(&self, policy: v1::AckPolicy) -> anyhow::Result<v1::SetAckPolicyReply> {
        let request = v1::SetAckPolicyRequest { policy: policy.into() };
        self.call(CALL_LIMIT, |mut client| async move { client.set_ack_policy(request).await })
    }

    /// Attaches to the console, types `parts` without a look at what comes back, and waits until all of it was taken.
    /// Answers where the guest's input ended after each part.
    ///
    /// # Errors
    /// It says no, or does not take it.
    pub fn type_in(&self, parts: Vec<Vec<u8>>) -> anyhow::Result<Vec<v1::ConsoleTaken>> {
        let all: u64 = parts.iter().map(|part| part.len() as u64).sum();
        let start = Some(console_attach::Start::Tail(0));
        let attach = ConsoleAttach { start, read_only: false, typist: Vec::new() };
        let first = console_input::Message::Attach(attach);
        let typed = parts
            .into_iter()
            .map(|bytes| console_input::Message::Input(v1::ConsoleBytes { offset: 0, bytes }));
        let messages: Vec<ConsoleInput> =
            [first].into_iter().chain(typed).map(|message| ConsoleInput { message: Some(message) }).collect();
        self.call(CALL_LIMIT, |mut client| async move {
            let mut console = client.console(tokio_stream::iter(messages)).await?.into_inner();
            let mut taken: Vec<v1::ConsoleTaken> = Vec::new();
            while taken.last().is_none_or(|last| last.count < all) {
                let ended = || Status::unavailable("the console ends");
                let message = console.message().await?.ok_or_else(ended)?.message;
                if let Some(console_output::Message::Taken(part)) = message {
                    taken.push(part);
                }
            }
            Ok(Response::new(taken))
        })
    }

    /// Has a runner protect its vm by the secondary at `address`, and waits until it is paired.
    ///
    /// # Errors
    /// It says no, or takes too long.
    pub fn protect(&self, address: SocketAddr, full: bool) -> anyhow::Result<()> {
        let request = v1::ProtectRequest { address: address.to_string(), full };
        self.call(CALL_LIMIT, |mut client| async move {
            let mut progress = client.protect(request).await?.into_inner();
            while progress.message().await?.is_some() {}
            Ok(Response::new(()))
        })
    }

    /// Moves the guest to its secondary; asked of the runner.
    ///
    /// # Errors
    /// It says no.
    pub fn switchover(&self) -> anyhow::Result<v1::SwitchoverReply> {
        let request = v1::SwitchoverRequest {};
        self.call(CALL_LIMIT, |mut client| async move { client.switchover(request).await })
    }

    /// Compares a runner's copy with its guest, and answers what was found.
    ///
    /// # Errors
    /// It says no, or ends early; both in its words.
    pub fn verify(&self, request: v1::VerifyReplicaRequest) -> anyhow::Result<v1::VerifyProgress> {
        self.call(CALL_LIMIT, |mut client| async move {
            let mut steps = client.verify_replica(request).await?.into_inner();
            loop {
                let ended = || Status::unavailable("the progress ends");
                let step = steps.message().await?.ok_or_else(ended)?;
                if step.done {
                    return Ok(Response::new(step));
                }
            }
        })
    }

    /// Has a secondary run the guest.
    ///
    /// # Errors
    /// It says no.
    pub fn promote(&self) -> anyhow::Result<v1::PromoteReply> {
        let request = v1::PromoteRequest { force: false, reason: String::new() };
        self.call(CALL_LIMIT, |mut client| async move { client.promote(request).await })
    }

    /// Has it run the guest from what it has, whatever the register says.
    ///
    /// # Errors
    /// It says no.
    pub fn promote_by_force(&self, reason: &str) -> anyhow::Result<v1::PromoteReply> {
        let request = v1::PromoteRequest { force: true, reason: reason.to_owned() };
        self.call(CALL_LIMIT, |mut client| async move { client.promote(request).await })
    }

    /// Has it stop at once.
    ///
    /// # Errors
    /// It says no.
    pub fn fence(&self, reason: &str) -> anyhow::Result<v1::FenceReply> {
        let request = v1::FenceRequest { reason: reason.to_owned(), node: String::new() };
        self.call(CALL_LIMIT, |mut client| async move { client.fence(request).await })
    }

    /// Says to it that `node` does not run the guest.
    ///
    /// # Errors
    /// It says no.
    pub fn confirm_fenced(&self, node: &str, reason: &str) -> anyhow::Result<v1::ConfirmFencedReply> {
        let request = v1::ConfirmFencedRequest { node: node.to_owned(), reason: reason.to_owned() };
        self.call(CALL_LIMIT, |mut client| async move { client.confirm_fenced(request).await })
    }

    /// Says who decides on a failover.
    ///
    /// # Errors
    /// It says no.
    pub fn set_failover(&self, policy: v1::FailoverPolicy) -> anyhow::Result<()> {
        let request = v1::SetFailoverRequest { policy: policy.into() };
        self.call(CALL_LIMIT, |mut client| async move { client.set_failover(request).await })?;
        Ok(())
    }

    /// Empties its node, or ends that.
    ///
    /// # Errors
    /// It says no.
    pub fn drain(&self, drain: bool) -> anyhow::Result<()> {
        let request = v1::DrainRequest { drain, reason: "a test".to_owned() };
        self.call(CALL_LIMIT, |mut client| async move { client.drain(request).await })?;
        Ok(())
    }

    /// Goes on without protection.
    ///
    /// # Errors
    /// It says no.
    pub fn pause_replication(&self) -> anyhow::Result<()> {
        let request = v1::PauseReplicationRequest {};
        self.call(CALL_LIMIT, |mut client| async move { client.pause_replication(request).await })?;
        Ok(())
    }

    /// Protects again by the same secondary.
    ///
    /// # Errors
    /// It says no.
    pub fn resume_replication(&self) -> anyhow::Result<()> {
        let request = v1::ResumeReplicationRequest {};
        self.call(CALL_LIMIT, |mut client| async move { client.resume_replication(request).await })?;
        Ok(())
    }

    /// Stops the vm for good.
    ///
    /// # Errors
    /// It says no.
    pub fn stop(&self) -> anyhow::Result<()> {
        let scope = v1::stop_request::Scope::Vm.into();
        let request = v1::StopRequest { scope, grace_ms: 0 };
        self.call(CALL_LIMIT, |mut client| async move { client.stop(request).await })?;
        Ok(())
    }

    /// Ends this node's process.
    ///
    /// # Errors
    /// It says no.
    pub fn stop_node(&self) -> anyhow::Result<()> {
        let scope = v1::stop_request::Scope::Node.into();
        let request = v1::StopRequest { scope, grace_ms: 0 };
        self.call(CALL_LIMIT, |mut client| async move { client.stop(request).await })?;
        Ok(())
    }

    /// A client that connects when it is used.
    ///
    /// # Errors
    /// The address makes no sense.
    pub fn client(&self) -> anyhow::Result<AdminClient<Channel>> {
        let _entered = self.runtime.enter();
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let mut endpoint = Endpoint::from_shared(format!("{scheme}://{}", self.address))?;
        if let Some(tls) = &self.tls {
            endpoint = endpoint.tls_config(tls.clone())?;
        }
        Ok(AdminClient::new(endpoint.connect_timeout(LOOK_LIMIT).connect_lazy()))
    }

    fn call<T, F>(&self, limit: Duration, call: impl FnOnce(AdminClient<Channel>) -> F) -> anyhow::Result<T>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let answer = call(self.client()?);
        let answer = self.runtime.block_on(async { tokio::time::timeout(limit, answer).await });
        let answer = answer.with_context(|| format!("{} does not answer in {limit:?}", self.address))?;
        answer.map(Response::into_inner).map_err(|status| {
            let reason = status.get_details_error_info().map(|info| format!(" [{}]", info.reason));
            anyhow!("{}: {}{}", self.address, status.message(), reason.unwrap_or_default())
        })
    }
}

/// Puts everything that a node lets out into the ledger, from as soon as it is up until it is gone.
pub(super) async fn follow_console(client: AdminClient<Channel>, node: String, ledger: Arc<Mutex<Ledger>>) {
    let mut next = 0;
    loop {
        if let Err(status) = read_console(client.clone(), &node, &ledger, &mut next).await {
            tracing::debug!("the console of {node}: {status}");
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn read_console(
    mut client: AdminClient<Channel>,
    node: &str,
    ledger: &Mutex<Ledger>,
    next: &mut u64,
) -> Result<(), Status> {
    let attach = ConsoleAttach {
        read_only: true,
        start: Some(console_attach::Start::From(*next)),
        typist: Vec::new(),
    };
    let first = ConsoleInput { message: Some(console_input::Message::Attach(attach)) };
    let mut console = client.console(tokio_stream::once(first)).await?.into_inner();
    while let Some(ConsoleOutput { message }) = console.message().await? {
        if let Some(console_output::Message::Output(output)) = message {
            *next = output.offset + output.bytes.len() as u64;
            let mut ledger = ledger.lock().unwrap_or_else(PoisonError::into_inner);
            ledger.take(node, output.offset, &output.bytes);
        }
    }
    Ok(())
}
