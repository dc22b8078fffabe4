//! The pairing service: what a runner agrees on with this node before it makes a link.

use colo_common::tls::{self, Role};
use colo_common::{NodeId, Term, VmId};
use colo_proto::convert::{id_bytes, incarnation, replica_bytes};
use colo_proto::message::Detail;
use colo_proto::v1::pairing_server::Pairing;
use colo_proto::v1::{
    AckPolicy, BootFileChunk, MissingBootFile, OfferHandBackReply, OfferHandBackRequest, PairReply,
    PairRequest, UploadBootFileReply,
};
use colo_proto::version::Versions;
use crossbeam_channel::{Sender, TrySendError};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::oneshot;
use tonic::{Request, Response, Status, Streaming};

use crate::agreement::{self, Disagreement};
use crate::boot_upload::{BootUpload, UploadError};
use crate::node::{Event, HandBack};
use crate::replica::AckPolicy as Policy;

/// The service.
#[derive(Clone)]
pub struct PairingService {
    /// The vm.
    pub vm: VmId,
    /// This node.
    pub node: NodeId,
    /// This process.
    pub incarnation: colo_common::Incarnation,
    /// The node's inbox.
    pub outbox: Sender<Event>,
    /// Where boot files are kept.
    pub boot_directory: PathBuf,
    /// Whether this process runs the guest.
    pub runs: Arc<AtomicBool>,
    /// Whether callers have shown a certificate.
    pub secured: bool,
}

impl PairingService {
    fn check_caller<T>(&self, request: &Request<T>) -> Result<(), Status> {
        if !self.secured {
            return Ok(());
        }
        let certificates = request.peer_certs();
        let first = certificates.as_ref().and_then(|certificates| certificates.first());
        let role =
            first.map(tls::peer_role).transpose().map_err(|e| Status::permission_denied(e.to_string()))?;
        if role == Some(Role::Node) {
            return Ok(());
        }
        Err(Status::permission_denied("only nodes may pair: use a node's certificate"))
    }

    fn check_vm(&self, vm: &str) -> Result<(), Status> {
        if vm == self.vm.as_str() {
            return Ok(());
        }
        let text =
            format!("this node follows {}, not {vm}: name another secondary, or set its `vm`", self.vm);
        Err(Status::failed_precondition(text))
    }

    fn send(&self, event: Event) -> Result<(), Status> {
        self.outbox.try_send(event).map_err(|_| Status::unavailable("the node is busy or ending: try again"))
    }
}

fn invalid(e: impl std::fmt::Display) -> Status {
    Status::invalid_argument(e.to_string())
}

fn disagreed(e: Disagreement) -> Status {
    if e.is_malformed() { invalid(one_line(&e)) } else { Status::failed_precondition(one_line(&e)) }
}

impl From<UploadError> for Status {
    fn from(error: UploadError) -> Self {
        match error {
            UploadError::Sent(why) => Self::invalid_argument(why),
            kept @ UploadError::Kept { .. } => Self::failed_precondition(kept.to_string()),
        }
    }
}

/// Parts of it may be a peer's words.
fn one_line(e: &impl std::fmt::Display) -> String {
    Detail::new(&e.to_string()).to_string()
}

#[tonic::async_trait]
impl Pairing for PairingService {
    async fn pair(&self, request: Request<PairRequest>) -> Result<Response<PairReply>, Status> {
        self.check_caller(&request)?;
        let request = request.into_inner();
        self.check_vm(&request.vm)?;
        let theirs = request.protocol_max;
        let ask = agreement::read(request).map_err(disagreed)?;
        let (reply, answer) = oneshot::channel();
        self.send(Event::Pair(Box::new(ask), reply))?;
        let answer = answer.await.map_err(|_| Status::unavailable("the node is ending"))?;
        let answer = answer.map_err(|e| Status::failed_precondition(one_line(&e)))?;
        let missing = answer.missing.iter().map(|file| MissingBootFile { hash: id_bytes(file.digest) });
        Ok(Response::new(PairReply {
            node: self.node.to_string(),
            incarnation: id_bytes(self.incarnation.0),
            protocol: theirs.min(Versions::OURS.max.into()),
            replica: replica_bytes(answer.replica),
            staged: answer.staged.map(Into::into),
            stale: answer.stale.map(Into::into),
            missing: missing.collect(),
            quic_port: answer.quic_port.into(),
            max_epoch_bytes: answer.max_epoch_bytes,
            ack_policy: match answer.policy {
                Policy::Memory => AckPolicy::Memory,
                Policy::Disk => AckPolicy::Disk,
            }
            .into(),
        }))
    }

    async fn upload_boot_file(
        &self,
        request: Request<Streaming<BootFileChunk>>,
    ) -> Result<Response<UploadBootFileReply>, Status> {
        self.check_caller(&request)?;
        let mut chunks = request.into_inner();
        let mut upload = BootUpload::new(&self.boot_directory);
        while let Some(chunk) = chunks.message().await? {
            upload.take(&chunk).await?;
        }
        upload.finish().await?;
        Ok(Response::new(UploadBootFileReply {}))
    }

    async fn offer_hand_back(
        &self,
        request: Request<OfferHandBackRequest>,
    ) -> Result<Response<OfferHandBackReply>, Status> {
        self.check_caller(&request)?;
        let request = request.into_inner();
        self.check_vm(&request.vm)?;
        let node: NodeId = request.node.parse().map_err(invalid)?;
        let incarnation = incarnation(&request.incarnation).map_err(invalid)?;
        let lost_to = Term(request.lost_to_term);
        match self.outbox.try_send(Event::HandBack(HandBack { node, incarnation, lost_to })) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => return Err(Status::unavailable("the node is busy: try again")),
            Err(TrySendError::Disconnected(_)) if self.runs.load(Ordering::SeqCst) => {
                return Err(Status::already_exists(format!("{} runs the guest", self.node)));
            }
            // It could not take the guest over: whoever has kept it must go on keeping it.
            Err(TrySendError::Disconnected(_)) => return Err(Status::unavailable("the node is ending")),
        }
        // What comes of it is in the register.
        Ok(Response::new(OfferHandBackReply { proposed: true, reason: String::new() }))
    }
}
