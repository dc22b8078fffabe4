//! The runner's side of pairing: agrees on the guest with a secondary by gRPC before a link is made, and sends the boot
//! files that the secondary lacks. And the words between a node that lost its vm and the one that has it.

use colo_common::telemetry::one_line;
use colo_proto::convert::MAX_BOOT_FILE_CHUNK;
use colo_proto::v1::pairing_client::PairingClient as Client;
use colo_proto::v1::{BootFileChunk, CpuModel, MemorySlot, OfferHandBackRequest, PairReply, PairRequest};
use colo_proto::version::Versions;
use colo_vmm::BootFile;
use colo_vmm::host::processor;
use colo_vmm::memory::{MemoryLayout, Slot};
use colo_vmm::state::STATE_VERSION;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use tonic::Code;
use tonic::transport::{Channel, ClientTlsConfig, Endpoint};
use xxhash_rust::xxh3::xxh3_128;

use crate::guest_config::tracker;
use crate::link::{HandBack, Request};

/// How long it may take to be connected.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// How long one call may take; an upload may take as long again for each [`UPLOAD_STEP`] of the file.
const CALL_LIMIT: Duration = Duration::from_secs(10);
/// Far below what any link that can carry a guest's epochs does in that time.
const UPLOAD_STEP: u64 = 10 << 20;

/// A secondary that agreed.
#[derive(Clone, Debug)]
pub struct Paired {
    /// Its QUIC endpoint.
    pub address: SocketAddr,
    /// Its node.
    pub node: String,
}

/// Why there is no agreement.
#[derive(Debug, thiserror::Error)]
pub enum PairingError {
    /// The address makes no sense.
    #[error("{0:?} is no address of a control plane: write HOST:PORT")]
    Address(String),
    /// Nobody answers there.
    #[error("no control plane answers at {address}: {reason}")]
    Unreachable {
        /// Where.
        address: String,
        /// What was found.
        reason: String,
    },
    /// The secondary does not want this guest.
    #[error("{0}")]
    Refused(String),
    /// It runs the guest itself.
    #[error("{0}")]
    Runs(String),
}

/// Calls secondaries.
#[derive(Clone, Debug)]
pub struct PairingClient {
    /// Without it, the control plane is spoken to in the clear: on one host only.
    tls: Option<ClientTlsConfig>,
    /// This node's own control plane, as others reach it.
    own_address: String,
}

impl PairingClient {
    /// Calls with this node's certificate, or in the clear.
    pub fn new(tls: Option<ClientTlsConfig>, own_address: String) -> Self {
        Self { tls, own_address }
    }

    /// Agrees on the guest; sends boot files first where they are missing.
    ///
    /// # Errors
    /// Nobody is there, or what the secondary has against it.
    pub async fn pair(&self, request: &Request) -> Result<Paired, PairingError> {
        let (mut client, host) = self.client(&request.address).await?;
        let wanted = self.request(request);
        let mut reply = call(&request.address, CALL_LIMIT, client.pair(wanted.clone())).await?;
        if !reply.missing.is_empty() {
            for missing in reply.missing {
                let file = request.boot_files.iter().find(|file| hash(file) == missing.hash);
                let unknown =
                    || PairingError::Refused("it asks for a boot file that is not this vm's".to_owned());
                self.upload(&request.address, &mut client, file.ok_or_else(unknown)?).await?;
            }
            reply = call(&request.address, CALL_LIMIT, client.pair(wanted)).await?;
            if !reply.missing.is_empty() {
                return Err(PairingError::Refused("it still lacks boot files that it was sent".to_owned()));
            }
        }
        let PairReply { node, quic_port, .. } = reply;
        let port = u16::try_from(quic_port).map_err(|_| PairingError::Address(quic_port.to_string()))?;
        Ok(Paired { address: SocketAddr::new(host, port), node })
    }

    /// Offers to run on what this node lost and the other has nothing to run from.
    ///
    /// # Errors
    /// Nobody is there, or it runs the guest.
    pub async fn offer_hand_back(&self, address: &str, offer: &HandBack) -> Result<(), PairingError> {
        let (mut client, _) = self.client(address).await?;
        let request = OfferHandBackRequest {
            vm: offer.vm.to_string(),
            node: offer.node.to_string(),
            incarnation: offer.incarnation.0.to_be_bytes().to_vec(),
            lost_to_term: offer.lost_to.0,
        };
        call(address, CALL_LIMIT, client.offer_hand_back(request)).await.map(drop)
    }

    async fn client(&self, address: &str) -> Result<(Client<Channel>, IpAddr), PairingError> {
        let bad = || PairingError::Address(address.to_owned());
        let unreachable = |reason: String| PairingError::Unreachable { address: address.to_owned(), reason };
        let mut found = tokio::net::lookup_host(address).await.map_err(|e| unreachable(e.to_string()))?;
        let host = found.next().ok_or_else(bad)?.ip();
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let mut endpoint = Endpoint::from_shared(format!("{scheme}://{address}")).map_err(|_| bad())?;
        if let Some(tls) = &self.tls {
            endpoint = endpoint.tls_config(tls.clone()).map_err(|e| unreachable(e.to_string()))?;
        }
        let connecting = endpoint.connect_timeout(CONNECT_LIMIT).connect().await;
        let channel = connecting.map_err(|e| unreachable(one_line(&e)))?;
        Ok((Client::new(channel), host))
    }

    fn request(&self, request: &Request) -> PairRequest {
        let spec = &request.spec;
        let layout = MemoryLayout::new(spec.memory_bytes());
        let slot = |slot: &Slot| MemorySlot { id: slot.id, first_gfn: slot.first.0, frames: slot.frames };
        PairRequest {
            protocol_min: Versions::OURS.min.into(),
            protocol_max: Versions::OURS.max.into(),
            vm: request.vm.to_string(),
            node: request.node.to_string(),
            incarnation: request.incarnation.0.to_be_bytes().to_vec(),
            term: request.term.0,
            admin_address: self.own_address.clone(),
            spec: spec.encode(),
            spec_digest: request.spec_digest,
            cpu: Some(CpuModel {
                name: spec.cpu_model().name().to_owned(),
                cpuid: request.cpu.as_ref().map_or_else(Vec::new, |cpu| cpu.cpuid.encode()),
                tsc_khz: request.cpu.as_ref().map_or(0, |cpu| cpu.tsc_khz),
                tsc_moves: request.cpu.as_ref().is_some_and(|cpu| cpu.tsc_moves),
                host: processor(),
            }),
            slots: layout.slots().iter().map(slot).collect(),
            tracker: Some(tracker(spec.tracker())),
            hypervisor: spec.kind.name().to_owned(),
            state_version: STATE_VERSION,
        }
    }

    async fn upload(
        &self,
        address: &str,
        client: &mut Client<Channel>,
        file: &BootFile,
    ) -> Result<(), PairingError> {
        let (hash, bytes) = (hash(file), file.bytes.clone());
        let limit = upload_limit(bytes.len() as u64);
        // An empty file is told as well: by one empty piece.
        let chunks = (0..bytes.len().max(1)).step_by(MAX_BOOT_FILE_CHUNK).map(move |at| BootFileChunk {
            hash: hash.clone(),
            offset: at as u64,
            bytes: bytes[at..bytes.len().min(at + MAX_BOOT_FILE_CHUNK)].to_vec().into(),
        });
        call(address, limit, client.upload_boot_file(tokio_stream::iter(chunks))).await.map(drop)
    }
}

/// How long a file of so many bytes may be on its way.
fn upload_limit(bytes: u64) -> Duration {
    let steps = u32::try_from(bytes / UPLOAD_STEP).unwrap_or(u32::MAX);
    CALL_LIMIT.saturating_mul(steps.saturating_add(1))
}

fn hash(file: &BootFile) -> Vec<u8> {
    xxh3_128(&file.bytes).to_be_bytes().to_vec()
}

/// Waits for an answer, for so long as makes sense.
async fn call<T>(
    address: &str,
    limit: Duration,
    answer: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, PairingError> {
    let unreachable = |reason: String| PairingError::Unreachable { address: address.to_owned(), reason };
    match tokio::time::timeout(limit, answer).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => match status.code() {
            Code::AlreadyExists => Err(PairingError::Runs(status.message().to_owned())),
            Code::FailedPrecondition | Code::InvalidArgument | Code::NotFound | Code::PermissionDenied => {
                Err(PairingError::Refused(status.message().to_owned()))
            }
            _ => Err(unreachable(status.message().to_owned())),
        },
        Err(_) => Err(unreachable("it takes too long".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::{CALL_LIMIT, upload_limit};
    use colo_common::limits::MAX_BOOT_MODULE;

    #[test]
    fn the_largest_file_has_the_time_that_it_takes() {
        assert_eq!(upload_limit(0), CALL_LIMIT);
        assert_eq!(upload_limit(100 << 20), CALL_LIMIT * 11);
        // At 100 Mbit/s, and with room.
        assert!(upload_limit(MAX_BOOT_MODULE).as_secs() > MAX_BOOT_MODULE / (100_000_000 / 8) * 5);
        assert!(upload_limit(u64::MAX) > upload_limit(MAX_BOOT_MODULE));
    }
}
