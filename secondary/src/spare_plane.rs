//! The control plane of a node that is bound to no vm, and its metrics: on a thread and a runtime of their own, so that all
//! of it, every connection too, is closed when a vm claims the node, and the ports are free for what serves that vm.

use anyhow::Context;
use colo_common::NodeId;
use colo_primary::admin::Plane;
use colo_primary::metrics::Endpoint;
use colo_primary::serve::{self, Security};
use colo_proto::v1::pairing_server::{Pairing, PairingServer};
use colo_proto::v1::{
    BootFileChunk, OfferHandBackReply, OfferHandBackRequest, PairReply, PairRequest, UploadBootFileReply,
};
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use tokio::sync::oneshot;
use tonic::service::Routes;
use tonic::{Request, Response, Status, Streaming};

/// Serves until it is dropped; the port is free then.
pub(crate) struct SparePlane {
    /// Dropped to end the thread.
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl SparePlane {
    /// Begins to answer from `plane`.
    ///
    /// # Errors
    /// The port is in use, TLS cannot be set up, or no thread can be had.
    pub(crate) fn serve(
        listen: SocketAddr,
        security: &Security,
        metrics: Option<&Endpoint>,
        plane: &Arc<Plane>,
    ) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.context("no runtime for the control plane; raise the limit on open files")?;
        let routes = Routes::new(PairingServer::new(Unbound { node: plane.node.clone() }));
        runtime.block_on(async {
            serve::control_plane(listen, security, Arc::clone(plane), routes).await?;
            metrics.map_or(Ok(()), |metrics| metrics.serve(plane))
        })?;
        let (end, ended) = oneshot::channel::<()>();
        let thread = std::thread::Builder::new().name("spare".to_owned()).spawn(move || {
            // It is never sent.
            drop(runtime.block_on(ended));
            // A call of the membership that hangs is not waited for.
            runtime.shutdown_background();
        });
        let thread = thread.context("no thread for the control plane; raise the limit on processes")?;
        Ok(Self { end: Some(end), thread: Some(thread) })
    }
}

impl Drop for SparePlane {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            // It has nothing that could be lost.
            drop(thread.join());
        }
    }
}

/// What a runner is told that comes before the node is bound to its vm: to come again.
struct Unbound {
    node: NodeId,
}

impl Unbound {
    fn refuse<T>(&self) -> Result<Response<T>, Status> {
        Err(Status::unavailable(format!("{} is a spare, and not bound to this vm", self.node)))
    }
}

#[tonic::async_trait]
impl Pairing for Unbound {
    async fn pair(&self, _: Request<PairRequest>) -> Result<Response<PairReply>, Status> {
        self.refuse()
    }

    async fn upload_boot_file(
        &self,
        _: Request<Streaming<BootFileChunk>>,
    ) -> Result<Response<UploadBootFileReply>, Status> {
        self.refuse()
    }

    async fn offer_hand_back(
        &self,
        _: Request<OfferHandBackRequest>,
    ) -> Result<Response<OfferHandBackReply>, Status> {
        self.refuse()
    }
}

#[cfg(test)]
mod tests {
    use super::SparePlane;
    use colo_common::Incarnation;
    use colo_primary::admin::Plane;
    use colo_primary::console::Console;
    use colo_primary::node::status::Board;
    use colo_primary::serve::Security;
    use std::io::{ErrorKind, Read};
    use std::net::{Ipv4Addr, TcpListener, TcpStream};
    use std::time::Duration;

    #[test]
    fn the_port_and_every_connection_are_closed_with_it() {
        let security = Security::load(None).unwrap();
        let listen = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
        let plane =
            Plane::new(None, "s".parse().unwrap(), Incarnation(1), Board::default(), Console::default());
        for _ in 0..3 {
            let served = SparePlane::serve(listen, &security, None, &plane).unwrap();
            let mut open = TcpStream::connect(listen).unwrap();
            open.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            // The settings of HTTP/2: it is served.
            assert!(open.read(&mut [0; 9]).unwrap() > 0);
            drop(served);
            let ended = open.read_to_end(&mut Vec::new()).map_err(|e| e.kind());
            assert!(matches!(ended, Ok(_) | Err(ErrorKind::ConnectionReset)), "{ended:?}");
            assert_eq!(TcpStream::connect(listen).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        }
    }
}
