//! A node's control plane without a node: answers what it is told to, and can be killed.

// Each file of tests uses a part of it.
#![allow(dead_code, missing_docs, unreachable_pub)]

pub mod run;

use colo_common::register::{Entry, StopReason, Value};
use colo_common::{Incarnation, ProposalId, ReplicaId, Term};
use colo_proto::v1::admin_server::{Admin, AdminServer};
use colo_proto::v1::{self, console_attach, console_input, console_output};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::{Server, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};

const TICK: Duration = Duration::from_millis(5);

/// What a fake node says and has heard.
#[derive(Default)]
pub struct State {
    pub status: v1::StatusReply,
    pub health: v1::HealthReply,
    /// What it answers to commands, if it refuses them.
    pub refusal: Option<Status>,
    pub steps: Vec<Result<v1::ProtectProgress, Status>>,
    pub comparison: Vec<Result<v1::VerifyProgress, Status>>,
    pub reports: Vec<v1::EpochReport>,
    /// Released console output from `kept_from` on.
    pub output: Vec<u8>,
    pub kept_from: u64,
    /// It begins so many bytes earlier than it is asked to.
    pub early: u64,
    /// What the guest has read from `input_from` on.
    pub input: Vec<u8>,
    pub input_from: u64,
    pub input_done: u64,
    /// Every message of input, as it came.
    pub typed: Vec<(u64, Vec<u8>)>,
    pub attached: Vec<v1::ConsoleAttach>,
    pub asked: Vec<String>,
    /// The audit trail, and what happens.
    pub audit: Vec<v1::AuditEntry>,
    pub events: Vec<v1::Event>,
    /// Processes of the cluster, beside a spare.
    pub nodes: Vec<v1::ClusterNode>,
}

/// A fake node; dropped, it dies with all its connections.
pub struct Fake {
    pub address: SocketAddr,
    state: Arc<Mutex<State>>,
    runtime: Option<Runtime>,
}

impl Fake {
    /// One that speaks in the clear.
    pub fn start(status: v1::StatusReply) -> Self {
        Self::secured(status, None)
    }

    pub fn secured(status: v1::StatusReply, tls: Option<ServerTlsConfig>) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let state = Arc::new(Mutex::new(State { status, ..Default::default() }));
        let service = AdminServer::new(Service(Arc::clone(&state)));
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let mut server = Server::builder();
        if let Some(tls) = tls {
            server = server.tls_config(tls).unwrap();
        }
        runtime.spawn(server.add_service(service).serve_with_incoming(TcpListenerStream::new(listener)));
        Self { address, state, runtime: Some(runtime) }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        // Waits for the sockets to be closed: whoever calls it next must find nobody.
        self.runtime.take().unwrap().shutdown_timeout(Duration::from_secs(10));
    }
}

pub fn solo(node: &str, term: u64) -> v1::RegisterEntry {
    let value = Value::Solo { node: node.parse().unwrap(), incarnation: Incarnation(7) };
    entry(term, value)
}

pub fn paired(primary: &str, secondary: &str, term: u64) -> v1::RegisterEntry {
    let (primary, secondary) = (primary.parse().unwrap(), secondary.parse().unwrap());
    entry(term, Value::Paired { primary, secondary, replica: ReplicaId(0xabc) })
}

pub fn stopped(node: &str, term: u64) -> v1::RegisterEntry {
    entry(term, Value::Stopped { node: node.parse().unwrap(), reason: StopReason::PowerOff })
}

fn entry(term: u64, value: Value) -> v1::RegisterEntry {
    v1::RegisterEntry::from(&Entry { term: Term(term), proposal: ProposalId(9), value })
}

pub fn status(node: &str, role: v1::Role, register: v1::RegisterEntry) -> v1::StatusReply {
    v1::StatusReply {
        node: node.to_owned(),
        vm: "demo".to_owned(),
        version: "0.1.0".to_owned(),
        protocol: 1,
        role: role.into(),
        register: Some(register),
        ..Default::default()
    }
}

struct Service(Arc<Mutex<State>>);

impl Service {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    fn command(&self, what: String) -> Result<Option<v1::RegisterEntry>, Status> {
        let mut state = self.state();
        state.asked.push(what);
        state.refusal.clone().map_or_else(|| Ok(state.status.register.clone()), Err)
    }
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Admin for Service {
    type WatchStream = Answers<v1::EpochReport>;
    type ConsoleStream = Answers<v1::ConsoleOutput>;
    type ProtectStream = Answers<v1::ProtectProgress>;
    type ListAuditStream = Answers<v1::AuditEntry>;
    type EventsStream = Answers<v1::Event>;
    type VerifyReplicaStream = Answers<v1::VerifyProgress>;

    async fn status(&self, _: Request<v1::StatusRequest>) -> Result<Response<v1::StatusReply>, Status> {
        Ok(Response::new(self.state().status.clone()))
    }

    async fn watch(&self, _: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let reports = self.state().reports.clone().into_iter().map(Ok);
        Ok(Response::new(Box::pin(tokio_stream::iter(reports))))
    }

    async fn console(
        &self,
        request: Request<Streaming<v1::ConsoleInput>>,
    ) -> Result<Response<Self::ConsoleStream>, Status> {
        let mut input = request.into_inner();
        let first = input.message().await?.and_then(|first| first.message);
        let Some(console_input::Message::Attach(attach)) = first else {
            return Err(Status::invalid_argument("no attach"));
        };
        let (out, answers) = mpsc::channel(16);
        self.command("console".to_owned())?;
        tokio::spawn(show(Arc::clone(&self.0), out.clone(), attach));
        tokio::spawn(take(Arc::clone(&self.0), out, input));
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn protect(
        &self,
        request: Request<v1::ProtectRequest>,
    ) -> Result<Response<Self::ProtectStream>, Status> {
        let v1::ProtectRequest { address, full } = request.into_inner();
        self.command(format!("protect {address}{}", if full { " in full" } else { "" }))?;
        let steps = self.state().steps.clone();
        Ok(Response::new(Box::pin(tokio_stream::iter(steps))))
    }

    async fn pause_replication(
        &self,
        _: Request<v1::PauseReplicationRequest>,
    ) -> Result<Response<v1::PauseReplicationReply>, Status> {
        let register = self.command("pause".to_owned())?;
        Ok(Response::new(v1::PauseReplicationReply { register }))
    }

    async fn resume_replication(
        &self,
        _: Request<v1::ResumeReplicationRequest>,
    ) -> Result<Response<v1::ResumeReplicationReply>, Status> {
        self.command("resume".to_owned())?;
        Ok(Response::new(v1::ResumeReplicationReply {}))
    }

    async fn switchover(
        &self,
        _: Request<v1::SwitchoverRequest>,
    ) -> Result<Response<v1::SwitchoverReply>, Status> {
        let register = self.command("switchover".to_owned())?;
        Ok(Response::new(v1::SwitchoverReply { register, elapsed_ms: 48 }))
    }

    async fn verify_replica(
        &self,
        request: Request<v1::VerifyReplicaRequest>,
    ) -> Result<Response<Self::VerifyReplicaStream>, Status> {
        let v1::VerifyReplicaRequest { memory, disk, rate_mib } = request.into_inner();
        self.command(format!("verify {memory} {disk} {rate_mib}"))?;
        let steps = self.state().comparison.clone();
        Ok(Response::new(Box::pin(tokio_stream::iter(steps))))
    }

    async fn promote(
        &self,
        request: Request<v1::PromoteRequest>,
    ) -> Result<Response<v1::PromoteReply>, Status> {
        let v1::PromoteRequest { force, reason } = request.into_inner();
        let register = self.command(format!("promote {force} {reason}").trim_end().to_owned())?;
        let point = Some(v1::Point { term: 2, epoch: 44 });
        Ok(Response::new(v1::PromoteReply { register, point, elapsed_ms: 26 }))
    }

    async fn fence(&self, request: Request<v1::FenceRequest>) -> Result<Response<v1::FenceReply>, Status> {
        let register = self.command(format!("fence {}", request.into_inner().reason))?;
        Ok(Response::new(v1::FenceReply { node: self.state().status.node.clone(), register }))
    }

    async fn confirm_fenced(
        &self,
        request: Request<v1::ConfirmFencedRequest>,
    ) -> Result<Response<v1::ConfirmFencedReply>, Status> {
        let v1::ConfirmFencedRequest { node, reason } = request.into_inner();
        let register = self.command(format!("confirm {node} {reason}"))?;
        Ok(Response::new(v1::ConfirmFencedReply { register }))
    }

    async fn set_failover(
        &self,
        request: Request<v1::SetFailoverRequest>,
    ) -> Result<Response<v1::SetFailoverReply>, Status> {
        let policy = request.into_inner().policy;
        self.command(format!("failover {policy}"))?;
        Ok(Response::new(v1::SetFailoverReply { policy }))
    }

    async fn drain(&self, request: Request<v1::DrainRequest>) -> Result<Response<v1::DrainReply>, Status> {
        let v1::DrainRequest { drain, reason } = request.into_inner();
        self.command(format!("drain {drain} {reason}").trim_end().to_owned())?;
        // A guest that runs there moves to b.
        let mut state = self.state();
        if state.nodes.iter().any(|node| node.role() == v1::NodeRole::Runner) {
            state.nodes.iter_mut().for_each(|node| node.role = v1::NodeRole::Waiting.into());
            state.status.register = Some(solo("b", 3));
        }
        Ok(Response::new(v1::DrainReply { role: v1::Role::Waiting.into() }))
    }

    async fn stop(&self, request: Request<v1::StopRequest>) -> Result<Response<v1::StopReply>, Status> {
        let v1::StopRequest { scope, grace_ms } = request.into_inner();
        let register = self.command(format!("stop {scope} {grace_ms}"))?;
        Ok(Response::new(v1::StopReply { register }))
    }

    async fn health(&self, _: Request<v1::HealthRequest>) -> Result<Response<v1::HealthReply>, Status> {
        Ok(Response::new(self.state().health.clone()))
    }

    async fn set_ack_policy(
        &self,
        request: Request<v1::SetAckPolicyRequest>,
    ) -> Result<Response<v1::SetAckPolicyReply>, Status> {
        let policy = request.into_inner().policy;
        self.command(format!("policy {policy}"))?;
        Ok(Response::new(v1::SetAckPolicyReply { policy, pending: true }))
    }

    async fn list_audit(
        &self,
        request: Request<v1::ListAuditRequest>,
    ) -> Result<Response<Self::ListAuditStream>, Status> {
        let v1::ListAuditRequest { start, follow } = request.into_inner();
        self.command(format!("audit {start:?} {follow}"))?;
        let entries = self.state().audit.clone().into_iter().map(Ok);
        Ok(Response::new(Box::pin(tokio_stream::iter(entries))))
    }

    async fn list_cluster(
        &self,
        _: Request<v1::ListClusterRequest>,
    ) -> Result<Response<v1::ListClusterReply>, Status> {
        self.command("cluster".to_owned())?;
        let register = self.state().status.register.clone();
        let vms = vec![v1::ClusterVm { vm: "web".to_owned(), register }];
        let spare = v1::ClusterNode {
            node: "s".to_owned(),
            address: "10.0.0.3:7701".to_owned(),
            role: v1::NodeRole::Spare.into(),
            memory_free_bytes: 8 << 30,
            ..v1::ClusterNode::default()
        };
        let mut nodes = vec![spare];
        nodes.extend(self.state().nodes.iter().cloned());
        Ok(Response::new(v1::ListClusterReply { vms, nodes }))
    }

    async fn events(&self, _: Request<v1::EventsRequest>) -> Result<Response<Self::EventsStream>, Status> {
        self.command("events".to_owned())?;
        let events = self.state().events.clone().into_iter().map(Ok);
        Ok(Response::new(Box::pin(tokio_stream::iter(events))))
    }
}

/// Sends the console from where it was asked for, or a little before.
async fn show(
    state: Arc<Mutex<State>>,
    out: mpsc::Sender<Result<v1::ConsoleOutput, Status>>,
    attach: v1::ConsoleAttach,
) {
    let mut waiting = Vec::new();
    let mut offset = {
        let mut state = state.lock().unwrap();
        let end = state.kept_from + state.output.len() as u64;
        let wanted = match attach.start.as_ref() {
            Some(&console_attach::Start::From(from)) => from,
            Some(&console_attach::Start::Tail(bytes)) => end.saturating_sub(bytes),
            None => end,
        };
        state.attached.push(attach);
        let output_offset = wanted.saturating_sub(state.early);
        let input_offset = state.input_from + state.input.len() as u64;
        waiting.push(console_output::Message::Attached(v1::ConsoleAttached { output_offset, input_offset }));
        output_offset
    };
    let mut done = 0;
    loop {
        {
            let state = state.lock().unwrap();
            if offset < state.kept_from {
                let gap = v1::ConsoleGap { from: offset, to: state.kept_from };
                waiting.push(console_output::Message::Gap(gap));
                offset = state.kept_from;
            }
            let skip = usize::try_from(offset - state.kept_from).unwrap();
            if let Some(bytes) = state.output.get(skip..).filter(|bytes| !bytes.is_empty()) {
                waiting.push(console_output::Message::Output(v1::ConsoleBytes {
                    offset,
                    bytes: bytes.to_vec(),
                }));
                offset += bytes.len() as u64;
            }
            if state.input_done > done {
                done = state.input_done;
                waiting.push(console_output::Message::InputDone(done));
            }
        }
        for message in waiting.drain(..) {
            if out.send(Ok(v1::ConsoleOutput { message: Some(message) })).await.is_err() {
                return;
            }
        }
        tokio::time::sleep(TICK).await;
    }
}

/// Takes input as a node does: at the end of what the guest has, and tells where that is.
async fn take(
    state: Arc<Mutex<State>>,
    out: mpsc::Sender<Result<v1::ConsoleOutput, Status>>,
    mut input: Streaming<v1::ConsoleInput>,
) {
    let mut count = 0;
    while let Ok(Some(v1::ConsoleInput { message })) = input.message().await {
        let Some(console_input::Message::Input(v1::ConsoleBytes { offset, bytes })) = message else { return };
        count += bytes.len() as u64;
        let end = {
            let mut state = state.lock().unwrap();
            state.input.extend(&bytes);
            state.typed.push((offset, bytes));
            state.input_from + state.input.len() as u64
        };
        let taken = console_output::Message::Taken(v1::ConsoleTaken { count, offset: end });
        if out.send(Ok(v1::ConsoleOutput { message: Some(taken) })).await.is_err() {
            return;
        }
    }
}
