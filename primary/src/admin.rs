//! The control plane of a node: answers from the account that the node keeps of itself, and passes the operator's words
//! on to it. Served by whichever role the process has; a promotion changes the role behind it.

mod console;
mod convert;

use colo_common::{Incarnation, NodeId, VmId};
use colo_proto::v1::admin_server::Admin;
use colo_proto::v1::{
    self, ConsoleInput, EpochReport, HealthReply, HealthRequest, PauseReplicationReply,
    PauseReplicationRequest, PromoteReply, PromoteRequest, ProtectProgress, ProtectRequest,
    ResumeReplicationReply, ResumeReplicationRequest, SetAckPolicyReply, SetAckPolicyRequest, StatusReply,
    StatusRequest, StopReply, StopRequest, WatchRequest,
};
use crossbeam_channel::Sender;
use std::pin::Pin;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::console::Console;
use crate::node::status::{Board, Role};
use crate::node::{Command, Event};

/// How often a long call looks whether it is done.
const POLL: Duration = Duration::from_millis(20);
/// How long a promotion or a stop may take before the caller is told to look at the status.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long a guest may take to power itself off.
const MAX_GRACE: Duration = Duration::from_secs(3600);

/// What a follower can be asked.
pub trait FollowerControl: Send + Sync {
    /// To run the guest; told why not.
    fn promote(&self, reply: oneshot::Sender<String>);
    /// That acks shall mean disk (true) or memory.
    fn set_disk_policy(&self, disk: bool);
    /// Whether acks mean disk.
    fn is_disk_policy(&self) -> bool;
    /// To end.
    fn leave(&self);
}

/// What the process is at the moment.
#[derive(Clone)]
pub enum Part {
    /// It runs the guest.
    Runner(Sender<Event>),
    /// It follows.
    Follower(Arc<dyn FollowerControl>),
    /// Neither yet, or not any more.
    None,
}

/// What a control plane answers from.
pub struct Plane {
    /// The vm.
    pub vm: VmId,
    /// The node.
    pub node: NodeId,
    /// The process.
    pub incarnation: Incarnation,
    /// The account.
    pub board: Board,
    /// The console.
    pub console: Console,
    /// The guest, once it is known.
    pub guest: RwLock<Option<v1::Guest>>,
    part: RwLock<Part>,
    started: Instant,
}

impl Plane {
    /// A control plane with no part yet.
    pub fn new(
        vm: VmId,
        node: NodeId,
        incarnation: Incarnation,
        board: Board,
        console: Console,
    ) -> Arc<Self> {
        let (part, guest, started) = (RwLock::new(Part::None), RwLock::new(None), Instant::now());
        Arc::new(Self { vm, node, incarnation, board, console, guest, part, started })
    }

    /// The process has this part from now on.
    pub fn set_part(&self, part: Part) {
        *self.part.write().unwrap_or_else(PoisonError::into_inner) = part;
    }

    /// Describes the guest.
    pub fn set_guest(&self, guest: v1::Guest) {
        *self.guest.write().unwrap_or_else(PoisonError::into_inner) = Some(guest);
    }

    fn part(&self) -> Part {
        self.part.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Where to send what only a runner can do.
    fn runner(&self) -> Result<Sender<Event>, Status> {
        match self.part() {
            Part::Runner(outbox) => Ok(outbox),
            _ => Err(self.not_here("runs the guest")),
        }
    }

    fn not_here(&self, what: &str) -> Status {
        let status = self.board.status();
        let where_ = status.register.map_or_else(
            || "the register is not known".to_owned(),
            |entry| format!("the register says: {}", entry.value),
        );
        Status::failed_precondition(format!("this node ({}) is not the one that {what}; {where_}", self.node))
    }

    async fn command(
        &self,
        make: impl FnOnce(oneshot::Sender<Result<(), crate::node::CommandError>>) -> Command,
    ) -> Result<(), Status> {
        let (reply, answer) = oneshot::channel();
        let gone = || Status::unavailable("the node is ending; look at the other node");
        self.runner()?.send(Event::Command(make(reply))).map_err(|_| gone())?;
        match tokio::time::timeout(PATIENCE, answer).await {
            Ok(Ok(Ok(()))) => Ok(()),
            Ok(Ok(Err(e))) => Err(Status::failed_precondition(e.to_string())),
            Ok(Err(_)) => Err(gone()),
            Err(_) => Err(Status::deadline_exceeded("the node takes long; look at its status")),
        }
    }

    /// Waits until the account says so.
    async fn until(&self, done: impl Fn(&crate::node::status::Status) -> bool) -> Result<(), Status> {
        let started = Instant::now();
        while !done(&self.board.status()) {
            if started.elapsed() > PATIENCE {
                return Err(Status::deadline_exceeded("it takes long; look at the node's status"));
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    fn register(&self) -> Option<v1::RegisterEntry> {
        self.board.status().register.as_ref().map(v1::RegisterEntry::from)
    }
}

/// The service.
#[derive(Clone)]
pub struct AdminService(pub Arc<Plane>);

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Admin for AdminService {
    type WatchStream = Answers<EpochReport>;
    type ConsoleStream = Answers<v1::ConsoleOutput>;
    type ProtectStream = Answers<ProtectProgress>;

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusReply>, Status> {
        let mut reply = convert::status(&self.0, self.0.started.elapsed());
        if let Part::Follower(control) = self.0.part() {
            let policy = if control.is_disk_policy() { v1::AckPolicy::Disk } else { v1::AckPolicy::Memory };
            reply.ack_policy = policy.into();
        }
        Ok(Response::new(reply))
    }

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let (mut reports, plane) = (self.0.board.watch(), Arc::clone(&self.0));
        let (out, answers) = mpsc::channel(16);
        tokio::spawn(async move {
            let mut missed = 0;
            loop {
                match reports.recv().await {
                    Ok(report) => {
                        let role = plane.board.status().role;
                        let report = convert::report(&report, role, std::mem::take(&mut missed));
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
        let address = request.into_inner().address;
        let plane = Arc::clone(&self.0);
        let started = Instant::now();
        let asked = address.clone();
        plane.command(|reply| Command::Protect { address: asked, reply }).await?;
        let (out, answers) = mpsc::channel(16);
        tokio::spawn(async move {
            loop {
                let status = plane.board.status();
                let progress = convert::progress(&status, started.elapsed());
                let (role, done) = (status.role, status.role == Role::Paired);
                if out.send(Ok(progress)).await.is_err() || done {
                    return;
                }
                if matches!(role, Role::Alone | Role::Lost | Role::Stopped) {
                    let why = status.error.map_or_else(|| "it was given up".to_owned(), |(why, _)| why);
                    let _ =
                        out.send(Err(Status::aborted(format!("no protection by {address}: {why}")))).await;
                    return;
                }
                tokio::time::sleep(POLL * 5).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn pause_replication(
        &self,
        _: Request<PauseReplicationRequest>,
    ) -> Result<Response<PauseReplicationReply>, Status> {
        self.0.command(|reply| Command::Pause { reply }).await?;
        self.0.until(|status| status.role == Role::Alone).await?;
        Ok(Response::new(PauseReplicationReply { register: self.0.register() }))
    }

    async fn resume_replication(
        &self,
        _: Request<ResumeReplicationRequest>,
    ) -> Result<Response<ResumeReplicationReply>, Status> {
        self.0.command(|reply| Command::Resume { reply }).await?;
        Ok(Response::new(ResumeReplicationReply {}))
    }

    async fn promote(&self, request: Request<PromoteRequest>) -> Result<Response<PromoteReply>, Status> {
        if request.into_inner().force {
            return Err(Status::unimplemented("a forced promotion is not offered by this version"));
        }
        let Part::Follower(control) = self.0.part() else {
            return Err(self.0.not_here("follows"));
        };
        let started = Instant::now();
        let point = self.0.board.status().marks.staged;
        let (reply, mut why_not) = oneshot::channel();
        control.promote(reply);
        let runs = |role: Role| {
            !matches!(
                role,
                Role::Starting | Role::Waiting | Role::Following | Role::Receiving | Role::Promoting
            )
        };
        while !runs(self.0.board.status().role) {
            if let Ok(why) = why_not.try_recv() {
                return Err(Status::failed_precondition(why));
            }
            if started.elapsed() > PATIENCE {
                return Err(Status::deadline_exceeded("the promotion takes long; look at the node's status"));
            }
            tokio::time::sleep(POLL).await;
        }
        let elapsed_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        let reply =
            PromoteReply { register: self.0.register(), point: point.map(v1::Point::from), elapsed_ms };
        Ok(Response::new(reply))
    }

    async fn stop(&self, request: Request<StopRequest>) -> Result<Response<StopReply>, Status> {
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
                    self.0.until(|status| status.role == Role::Stopped).await?;
                }
            }
            Ok(v1::stop_request::Scope::Node) => match self.0.part() {
                Part::Runner(outbox) => drop(outbox.send(Event::Command(Command::Leave))),
                Part::Follower(control) => control.leave(),
                Part::None => {}
            },
            _ => return Err(Status::invalid_argument("say what is to stop: the vm, or this node")),
        }
        Ok(Response::new(StopReply { register: self.0.register() }))
    }

    async fn health(&self, _: Request<HealthRequest>) -> Result<Response<HealthReply>, Status> {
        let status = self.0.board.status();
        let protected = matches!(status.role, Role::Paired | Role::Following);
        let recent = status.error.filter(|(_, at)| at.elapsed() < Duration::from_secs(60));
        let problems: Vec<String> = recent.into_iter().map(|(what, _)| what).collect();
        let healthy = !matches!(status.role, Role::Lost | Role::Stopped);
        Ok(Response::new(HealthReply { healthy, protected, problems }))
    }

    async fn set_ack_policy(
        &self,
        request: Request<SetAckPolicyRequest>,
    ) -> Result<Response<SetAckPolicyReply>, Status> {
        let Part::Follower(control) = self.0.part() else { return Err(self.0.not_here("follows")) };
        let wanted = v1::AckPolicy::try_from(request.into_inner().policy);
        let disk = match wanted {
            Ok(v1::AckPolicy::Disk) => true,
            Ok(v1::AckPolicy::Memory) => false,
            _ => return Err(Status::invalid_argument("say what an ack shall mean: memory or disk")),
        };
        control.set_disk_policy(disk);
        tokio::time::sleep(POLL * 10).await;
        let now = control.is_disk_policy();
        let policy = if now { v1::AckPolicy::Disk } else { v1::AckPolicy::Memory };
        Ok(Response::new(SetAckPolicyReply { policy: policy.into(), pending: now != disk }))
    }
}
