//! A go-between of two nodes' pairing: passes on what a runner and a secondary say to each other before they make a link,
//! and changes it as a test wants, so that real nodes meet hosts that nobody has at hand.

use anyhow::Context;
use colo_proto::v1::pairing_client::PairingClient;
use colo_proto::v1::pairing_server::{Pairing, PairingServer};
use colo_proto::v1::{
    BootFileChunk, OfferHandBackReply, OfferHandBackRequest, PairReply, PairRequest, UploadBootFileReply,
};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};

/// What is done to a request on its way.
pub type Change = fn(&mut PairRequest);

#[derive(Default)]
struct State {
    change: Option<Change>,
    /// As the runner sent it.
    last: Option<PairRequest>,
}

/// The go-between; it ends with the runtime.
#[derive(Clone)]
pub struct Between {
    /// Where runners find it.
    pub address: SocketAddr,
    to: SocketAddr,
    state: Arc<Mutex<State>>,
}

impl Between {
    /// Stands before the secondary whose control plane is at `to`.
    ///
    /// # Errors
    /// No port can be had.
    pub fn open(runtime: &Handle, to: SocketAddr) -> anyhow::Result<Self> {
        let listener = runtime.block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))?;
        let this = Self { address: listener.local_addr()?, to, state: Arc::default() };
        let server = Server::builder().add_service(PairingServer::new(this.clone()));
        runtime.spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        Ok(this)
    }

    /// What becomes of requests from now on; nothing passes them on as they are.
    pub fn change(&self, change: Option<Change>) {
        self.state().change = change;
    }

    /// The last request, as the runner sent it.
    ///
    /// # Errors
    /// None has come.
    pub fn last(&self) -> anyhow::Result<PairRequest> {
        self.state().last.clone().context("no runner has asked")
    }

    /// A client of the secondary itself.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn client(&self) -> Result<PairingClient<Channel>, Status> {
        let unavailable = |e: tonic::transport::Error| Status::unavailable(e.to_string());
        let endpoint = Endpoint::from_shared(format!("http://{}", self.to)).map_err(unavailable)?;
        Ok(PairingClient::new(endpoint.connect().await.map_err(unavailable)?))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[tonic::async_trait]
impl Pairing for Between {
    async fn pair(&self, request: Request<PairRequest>) -> Result<Response<PairReply>, Status> {
        let mut request = request.into_inner();
        {
            let mut state = self.state();
            state.last = Some(request.clone());
            if let Some(change) = state.change {
                change(&mut request);
            }
        }
        self.client().await?.pair(request).await
    }

    async fn upload_boot_file(
        &self,
        request: Request<Streaming<BootFileChunk>>,
    ) -> Result<Response<UploadBootFileReply>, Status> {
        // A chunk that does not come ends the stream, which then has not the whole file.
        let chunks = request.into_inner().map_while(Result::ok);
        self.client().await?.upload_boot_file(chunks).await
    }

    async fn offer_hand_back(
        &self,
        request: Request<OfferHandBackRequest>,
    ) -> Result<Response<OfferHandBackReply>, Status> {
        self.client().await?.offer_hand_back(request.into_inner()).await
    }
}
