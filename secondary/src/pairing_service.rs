//! The pairing service: what a runner agrees on with this node before it makes a link.

use colo_common::limits::{MAX_BOOT_MODULE, MAX_KERNEL_IMAGE};
use colo_common::tls::{self, Role};
use colo_common::{NodeId, Term, VmId};
use colo_proto::convert::{MAX_BOOT_FILE_CHUNK, id, id_bytes, incarnation, replica_bytes};
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
use tokio::io::AsyncWriteExt;
use tokio::sync::oneshot;
use tonic::{Request, Response, Status, Streaming};
use xxhash_rust::xxh3::xxh3_128;

use crate::agreement::{self, Disagreement};
use colo_primary::guest_files::boot_file_path;

use crate::node::{Event, HandBack};
use crate::replica::AckPolicy as Policy;

/// Bytes of a boot file in all: a kernel or a module.
const MAX_BOOT_FILE: u64 =
    if MAX_KERNEL_IMAGE > MAX_BOOT_MODULE { MAX_KERNEL_IMAGE } else { MAX_BOOT_MODULE };

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

    /// Kept under another name until it is whole and its hash is right.
    async fn upload_boot_file(
        &self,
        request: Request<Streaming<BootFileChunk>>,
    ) -> Result<Response<UploadBootFileReply>, Status> {
        self.check_caller(&request)?;
        let mut chunks = request.into_inner();
        let failed = |e: std::io::Error| {
            Status::failed_precondition(format!("{}: {e}; is the disk full?", self.boot_directory.display()))
        };
        let (mut file, mut digest, mut at) = (None, 0, 0_u64);
        while let Some(chunk) = chunks.message().await? {
            let of = id("hash", &chunk.hash).map_err(invalid)?;
            if chunk.offset != at || (file.is_some() && of != digest) {
                return Err(Status::invalid_argument("the pieces of a boot file do not follow each other"));
            }
            if chunk.bytes.len() > MAX_BOOT_FILE_CHUNK {
                return Err(Status::invalid_argument(format!(
                    "a piece of a boot file has at most {MAX_BOOT_FILE_CHUNK} bytes"
                )));
            }
            at += chunk.bytes.len() as u64;
            if at > MAX_BOOT_FILE {
                return Err(Status::invalid_argument(format!(
                    "a boot file has at most {MAX_BOOT_FILE} bytes"
                )));
            }
            digest = of;
            let path = boot_file_path(&self.boot_directory, digest).with_extension("part");
            let open = match &mut file {
                Some(open) => open,
                None => file.insert(tokio::fs::File::create(path).await.map_err(failed)?),
            };
            open.write_all(&chunk.bytes).await.map_err(failed)?;
        }
        let Some(mut file) = file else {
            return Err(Status::invalid_argument(
                "a boot file without a piece: send an empty one if it is empty",
            ));
        };
        file.flush().await.map_err(failed)?;
        file.sync_all().await.map_err(failed)?;
        let path = boot_file_path(&self.boot_directory, digest);
        let bytes = tokio::fs::read(path.with_extension("part")).await.map_err(failed)?;
        if xxh3_128(&bytes) != digest {
            return Err(Status::invalid_argument("a boot file is not what its hash says"));
        }
        tokio::fs::rename(path.with_extension("part"), path).await.map_err(failed)?;
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
