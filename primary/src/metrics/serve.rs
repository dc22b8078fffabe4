//! The endpoint: `GET /metrics` over HTTP/1, in the clear, one answer a connection.

use anyhow::Context;
use bytes::Bytes;
use colo_common::config::MetricsConfig;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_TYPE as CONTENT_TYPE_HEADER, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::registry::Registry;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tracing::Instrument;

use super::text;
use crate::admin::Plane;

/// The format of an answer: OpenMetrics, which Prometheus and its like read.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// Bytes of a request at most, which has no body: the least that hyper takes, and many times what a scraper sends.
const MAX_REQUEST: usize = 8 << 10;
/// Connections at a time: a few scrapers and a person. More wait in the system's queue.
const MAX_CONNECTIONS: usize = 16;
/// How long a connection may take: whoever sends its request byte by byte does not keep others out for longer.
const PATIENCE: Duration = Duration::from_secs(5);
/// After a connection that could not be taken, mostly for want of descriptors.
const BREATH: Duration = Duration::from_millis(100);

/// A port that nobody is answered on yet.
#[derive(Debug)]
pub struct Endpoint {
    listener: std::net::TcpListener,
    address: SocketAddr,
}

impl Endpoint {
    /// Takes the port, if one is configured: before anything is started, so that one in use costs nothing.
    ///
    /// # Errors
    /// The port is in use, or not this host's.
    pub fn bind(config: &MetricsConfig) -> anyhow::Result<Option<Self>> {
        let Some(listen) = config.listen else { return Ok(None) };
        let bind = || {
            let listener = std::net::TcpListener::bind(listen)?;
            listener.set_nonblocking(true)?;
            let address = listener.local_addr()?;
            Ok::<_, std::io::Error>(Self { listener, address })
        };
        bind().map(Some).with_context(|| {
            format!(
                "cannot listen on {listen} (metrics.listen): is another process using it? choose another port"
            )
        })
    }

    /// Answers from `plane` for as long as the runtime lives, which the caller is in. The port stays taken for longer than
    /// that: whoever comes between two that serve waits for the second.
    ///
    /// # Errors
    /// The socket cannot be waited for.
    pub fn serve(&self, plane: &Arc<Plane>) -> anyhow::Result<()> {
        let listener = self.listener.try_clone().and_then(TcpListener::from_std);
        let listener = listener.context("the socket of the metrics cannot be used")?;
        tracing::info!(listen = %self.address, "metrics are at http://{}/metrics", self.address);
        tokio::spawn(accept(listener, Arc::new(super::registry(plane))).in_current_span());
        Ok(())
    }
}

async fn accept(listener: TcpListener, registry: Arc<Registry>) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let registry = Arc::clone(&registry);
                let answering = async move {
                    // Whoever is slow or breaks off has no answer, and nobody else is harmed.
                    let _ = tokio::time::timeout(PATIENCE, connection(stream, &registry)).await;
                    drop(place);
                };
                tokio::spawn(answering.in_current_span());
            }
            Err(e) => {
                tracing::warn!(
                    "a connection to the metrics cannot be taken: {e}; raise the limit on files (ulimit -n)"
                );
                tokio::time::sleep(BREATH).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, registry: &Registry) -> Result<(), hyper::Error> {
    let answer = service_fn(|request| async move { Ok::<_, Infallible>(respond(&request, registry)) });
    let mut server = http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(PATIENCE).keep_alive(false).max_buf_size(MAX_REQUEST);
    server.serve_connection(TokioIo::new(stream), answer).await
}

fn respond(request: &Request<Incoming>, registry: &Registry) -> Response<Full<Bytes>> {
    let (status, body) = match (request.uri().path(), request.method()) {
        ("/metrics", &Method::GET) => (StatusCode::OK, text(registry)),
        ("/metrics", _) => (StatusCode::METHOD_NOT_ALLOWED, "only GET is answered\n".to_owned()),
        _ => (StatusCode::NOT_FOUND, "there is only /metrics\n".to_owned()),
    };
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    let kind = if status == StatusCode::OK { CONTENT_TYPE } else { "text/plain; charset=utf-8" };
    response.headers_mut().insert(CONTENT_TYPE_HEADER, HeaderValue::from_static(kind));
    if status == StatusCode::METHOD_NOT_ALLOWED {
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET"));
    }
    response
}
