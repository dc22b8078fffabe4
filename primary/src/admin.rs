//! The control plane of a node: answers from the account that the node keeps of itself, and passes the operator's words
//! on to it. Served by whichever role the process has; a promotion changes the role behind it. A spare has one too, which
//! knows of no vm.

mod cluster;
mod console;
mod convert;
mod fencing;
pub(crate) mod health;
mod listing;
mod plane;
mod reason;
mod verify;

use colo_proto::v1::admin_server::Admin;
use colo_proto::v1::{
    self, AuditEntry, ConfirmFencedReply, ConfirmFencedRequest, ConsoleInput, DrainReply, DrainRequest,
    EpochReport, Event as Happening, EventsRequest, FenceReply, FenceRequest, HealthReply, HealthRequest,
    ListAuditRequest, ListClusterReply, ListClusterRequest, PauseReplicationReply, PauseReplicationRequest,
    PromoteReply, PromoteRequest, ProtectProgress, ProtectRequest, ResumeReplicationReply,
    ResumeReplicationRequest, SetAckPolicyReply, SetAckPolicyRequest, SetFailoverReply, SetFailoverRequest,
    StatusReply, StatusRequest, StopReply, StopRequest, SwitchoverReply, SwitchoverRequest, VerifyProgress,
    VerifyReplicaRequest, WatchRequest,
};
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::node::status::Role;
use crate::node::{Command, Event};
pub(crate) use convert::role;
pub use plane::{FenceAnswer, FollowerControl, Order, Part, Plane};
use plane::{PATIENCE, POLL};
pub use reason::{Reason, WhyNot};

/// How long a guest may take to power itself off.
const MAX_GRACE: Duration = Duration::from_secs(3600);
/// How long the answer to a change of policy waits for it to take effect.
const POLICY_PATIENCE: Duration = Duration::from_millis(200);

/// The service.
#[derive(Clone)]
pub struct AdminService(pub Arc<Plane>);

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Admin for AdminService {
    type WatchStream = Answers<EpochReport>;
    type ConsoleStream = Answers<v1::ConsoleOutput>;
    type ProtectStream = Answers<ProtectProgress>;
    type ListAuditStream = Answers<AuditEntry>;
    type EventsStream = Answers<Happening>;
    type VerifyReplicaStream = Answers<VerifyProgress>;

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusReply>, Status> {
        Ok(Response::new(convert::status(&self.0)))
    }

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        self.0.bound()?;
        let mut reports = self.0.board.watch();
        let (out, answers) = mpsc::channel(16);
        tokio::spawn(async move {
            let mut missed = 0;
            loop {
                match reports.recv().await {
                    Ok(report) => {
                        let report = convert::report(&report, std::mem::take(&mut missed));
                        if out.send(Ok(report)).await.is_err() {
                            return;
                        }
                    }
                    Err(broadcast::error::RecvError::Lagged(count)) => missed += count,
                    Err(broadcast::error::RecvError::Closed) => return,
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn console(
        &self,
        request: Request<Streaming<ConsoleInput>>,
    ) -> Result<Response<Self::ConsoleStream>, Status> {
        let answers = console::attach(Arc::clone(&self.0), request.into_inner()).await?;
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn protect(
        &self,
        request: Request<ProtectRequest>,
    ) -> Result<Response<Self::ProtectStream>, Status> {
        // Refused at once where no secondary is wanted; what the secondary says comes later.
        self.0.runner()?;
        let how = if request.get_ref().full { ", in full" } else { "" };
        self.0.asked(&request, format!("protect by {}{how}", request.get_ref().address), "");
        let ProtectRequest { address, full } = request.into_inner();
        let plane = Arc::clone(&self.0);
        let (out, answers) = mpsc::channel(16);
        tokio::spawn(async move {
            if let Err(status) = protect(&plane, address, full, &out).await {
                // Whoever asked may have left.
                let _ = out.send(Err(status)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn pause_replication(
        &self,
        request: Request<PauseReplicationRequest>,
    ) -> Result<Response<PauseReplicationReply>, Status> {
        self.0.asked(&request, "pause replication".to_owned(), "");
        self.0.command(|reply| Command::Pause { reply }).await?;
        self.0.until(Role::Alone).await?;
        Ok(Response::new(PauseReplicationReply { register: self.0.register() }))
    }

    async fn resume_replication(
        &self,
        request: Request<ResumeReplicationRequest>,
    ) -> Result<Response<ResumeReplicationReply>, Status> {
        self.0.asked(&request, "resume replication".to_owned(), "");
        self.0.command(|reply| Command::Resume { reply }).await?;
        Ok(Response::new(ResumeReplicationReply {}))
    }

    async fn switchover(
        &self,
        request: Request<SwitchoverRequest>,
    ) -> Result<Response<SwitchoverReply>, Status> {
        self.0.asked(&request, "switchover".to_owned(), "");
        let started = Instant::now();
        self.0.command(|reply| Command::Switchover { reply: Some(reply) }).await?;
        let elapsed_ms = convert::ms(started.elapsed());
        Ok(Response::new(SwitchoverReply { register: self.0.register(), elapsed_ms }))
    }

    async fn verify_replica(
        &self,
        request: Request<VerifyReplicaRequest>,
    ) -> Result<Response<Self::VerifyReplicaStream>, Status> {
        self.0.asked(&request, verify::words(request.get_ref()), "");
        let answers = verify::begin(&self.0, request.into_inner()).await?;
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn promote(&self, request: Request<PromoteRequest>) -> Result<Response<PromoteReply>, Status> {
        let force = request.get_ref().force;
        fencing::check_reason(&request.get_ref().reason, force)?;
        let what = if force { "promote by force" } else { "promote" };
        self.0.asked(&request, what.to_owned(), &request.get_ref().reason);
        let Part::Follower(control) = self.0.part() else {
            return Err(self.0.not_here("follows"));
        };
        let started = Instant::now();
        let (reply, mut why_not) = oneshot::channel();
        control.promote(Order { force, reply });
        let runs = |role: Role| {
            !matches!(
                role,
                Role::Starting | Role::Waiting | Role::Following | Role::Receiving | Role::Promoting
            )
        };
        while !runs(self.0.board.status().role) {
            if let Ok(why) = why_not.try_recv() {
                return Err(why.into());
            }
            if started.elapsed() > PATIENCE {
                return Err(Reason::NoAnswer.status("the promotion takes long; look at the node's status"));
            }
            tokio::time::sleep(POLL).await;
        }
        let status = self.0.board.status();
        let promotion = status.promotion.filter(|_| status.role.runs());
        let Some((promoted, ran)) = promotion.and_then(|promoted| Some((promoted, promoted.ran?))) else {
            return Err(Reason::GivenUp.status(self.0.not_here("runs the guest").message()));
        };
        Ok(Response::new(PromoteReply {
            register: self.0.register(),
            point: promoted.point.map(v1::Point::from),
            elapsed_ms: convert::ms(ran.saturating_duration_since(started)),
        }))
    }

    async fn fence(&self, request: Request<FenceRequest>) -> Result<Response<FenceReply>, Status> {
        self.0.fence(request).await.map(Response::new)
    }

    async fn confirm_fenced(
        &self,
        request: Request<ConfirmFencedRequest>,
    ) -> Result<Response<ConfirmFencedReply>, Status> {
        self.0.confirm_fenced(request).await.map(Response::new)
    }

    async fn set_failover(
        &self,
        request: Request<SetFailoverRequest>,
    ) -> Result<Response<SetFailoverReply>, Status> {
        self.0.set_failover(request).await.map(Response::new)
    }

    async fn drain(&self, request: Request<DrainRequest>) -> Result<Response<DrainReply>, Status> {
        self.0.empty_node(request).await.map(Response::new)
    }

    async fn stop(&self, request: Request<StopRequest>) -> Result<Response<StopReply>, Status> {
        let what =
            if request.get_ref().scope() == v1::stop_request::Scope::Vm { "the vm" } else { "this node" };
        self.0.asked(&request, format!("stop {what}"), "");
        let request = request.into_inner();
        match v1::stop_request::Scope::try_from(request.scope) {
            Ok(v1::stop_request::Scope::Vm) => {
                if request.grace_ms > 0 {
                    let _ = self.0.runner()?.send(Event::Command(Command::PowerButton));
                    let until = Instant::now() + Duration::from_millis(request.grace_ms).min(MAX_GRACE);
                    while self.0.board.status().role != Role::Stopped && Instant::now() < until {
                        tokio::time::sleep(POLL).await;
                    }
                }
                if self.0.board.status().role != Role::Stopped {
                    self.0.command(|reply| Command::Stop { reply }).await?;
                    self.0.until(Role::Stopped).await?;
                }
            }
            Ok(v1::stop_request::Scope::Node) => {
                self.0.leave(|reply| Command::Leave { reply: Some(reply) }).await?;
            }
            _ => return Err(Reason::BadRequest.status("say what is to stop: the vm, or this node")),
        }
        Ok(Response::new(StopReply { register: self.0.register() }))
    }

    async fn health(&self, _: Request<HealthRequest>) -> Result<Response<HealthReply>, Status> {
        Ok(Response::new(self.0.health()))
    }

    async fn set_ack_policy(
        &self,
        request: Request<SetAckPolicyRequest>,
    ) -> Result<Response<SetAckPolicyReply>, Status> {
        let Part::Follower(control) = self.0.part() else { return Err(self.0.not_here("follows")) };
        let wanted = v1::AckPolicy::try_from(request.get_ref().policy);
        let disk = match wanted {
            Ok(v1::AckPolicy::Disk) => true,
            Ok(v1::AckPolicy::Memory) => false,
            _ => return Err(Reason::BadRequest.status("say what an ack shall mean: memory or disk")),
        };
        self.0.asked(&request, format!("acks shall mean {}", if disk { "disk" } else { "memory" }), "");
        let (reply, answer) = oneshot::channel();
        control.set_disk_policy(disk, reply);
        let gone = |_| Reason::Unavailable.status("the node is ending; look at the other node");
        let mut now = answer.await.map_err(gone)?;
        let until = Instant::now() + POLICY_PATIENCE;
        while now.pending && Instant::now() < until {
            tokio::time::sleep(POLL).await;
            now = self.0.board.status().policy.unwrap_or(now);
        }
        Ok(Response::new(SetAckPolicyReply { policy: convert::policy(now).into(), pending: now.pending }))
    }

    async fn list_audit(
        &self,
        request: Request<ListAuditRequest>,
    ) -> Result<Response<Self::ListAuditStream>, Status> {
        let entries = self.0.list_audit(request.into_inner())?;
        Ok(Response::new(Box::pin(ReceiverStream::new(entries))))
    }

    async fn list_cluster(
        &self,
        _: Request<ListClusterRequest>,
    ) -> Result<Response<ListClusterReply>, Status> {
        Ok(Response::new(self.0.list_cluster().await?))
    }

    async fn events(&self, _: Request<EventsRequest>) -> Result<Response<Self::EventsStream>, Status> {
        Ok(Response::new(Box::pin(ReceiverStream::new(self.0.events()))))
    }
}

/// Asks for protection and tells how far it is, until the vm is paired.
async fn protect(
    plane: &Plane,
    address: String,
    full: bool,
    out: &mpsc::Sender<Result<ProtectProgress, Status>>,
) -> Result<(), Status> {
    let started = Instant::now();
    let asked = address.clone();
    let agreed = plane.command(|reply| Command::Protect { address: asked, full, reply });
    tokio::pin!(agreed);
    loop {
        tokio::select! {
            agreed = &mut agreed => break agreed?,
            () = tokio::time::sleep(POLL * 5) => {
                let progress = convert::agreeing(started.elapsed());
                if out.send(Ok(progress)).await.is_err() {
                    return Ok(());
                }
            }
        }
    }
    loop {
        let status = plane.board.status();
        if !status.role.runs() || status.role == Role::Alone {
            let why = status.error.map_or_else(|| "it was given up".to_owned(), |(why, _)| why);
            return Err(Reason::GivenUp.status(format!("no protection by {address}: {why}")));
        }
        let progress = convert::progress(&status, started.elapsed());
        if out.send(Ok(progress)).await.is_err() || status.role == Role::Paired {
            return Ok(());
        }
        tokio::time::sleep(POLL * 5).await;
    }
}
