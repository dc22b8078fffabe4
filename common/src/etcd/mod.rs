//! A client of an etcd cluster, as far as the [arbiter](crate::arbiter::etcd) and the
//! membership need one: every call is bounded in time and answered by whichever member
//! answers first.
//!
//! The callers block and the client does not: it has a runtime of one thread of its own, so a call can be made from any
//! thread. Only the few calls that Colo makes are described (`rpc.proto`), which etcd has kept as they are since 3.0.
//! Reads are linearizable, so it does not matter which member answers; changes are transactions that may land twice
//! without harm.

mod ask;
mod error;
mod members;
mod ops;
mod recognise;

/// The calls of etcd, as `rpc.proto` has them: for whoever needs more than the arbiter does, as tests do.
#[allow(missing_docs, unused_qualifications, unreachable_pub, clippy::all, reason = "generated")]
pub mod wire {
    tonic::include_proto!("etcdserverpb");
}

use std::future::Future;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;
use tokio::runtime::Runtime;
use tokio::time::Instant;

pub use error::EtcdError;
pub(crate) use ops::{Found, Txn, range_end};

use crate::config::ArbiterConfig;
use members::Members;

/// What a caller waits beyond a call's own bound: the client's thread may be late on a loaded host.
const GRACE: Duration = Duration::from_secs(1);

/// Threads for what blocks the client's runtime, which is looking up names, at most.
const BLOCKING_THREADS: usize = 4;

/// A client of one cluster. Cheap to share; the connections end with the last owner.
#[derive(Debug)]
pub struct Etcd {
    /// There until it is dropped.
    runtime: Option<Runtime>,
    members: Arc<Members>,
    prefix: String,
    timeout: Duration,
    lease: Duration,
}

impl Etcd {
    /// A client of the cluster that `config` names. Nothing is connected before the first call.
    ///
    /// # Errors
    /// A certificate cannot be used, or the host has no thread for it.
    pub fn open(config: &ArbiterConfig) -> Result<Self, EtcdError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .max_blocking_threads(BLOCKING_THREADS)
            .thread_name("etcd")
            .enable_all()
            .build()
            .map_err(|e| EtcdError::Setup(format!("no thread for it: {e}; raise this process' limits")))?;
        let members = {
            // Channels belong to the runtime that they are made in.
            let _entered = runtime.enter();
            Arc::new(Members::of(config)?)
        };
        Ok(Self {
            runtime: Some(runtime),
            members,
            prefix: config.prefix().to_owned(),
            timeout: config.timeout(),
            lease: config.lease(),
        })
    }

    /// `name` below the prefix.
    pub fn key(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// How long a call may take.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// How long a lease lasts that is not renewed.
    pub fn lease(&self) -> Duration {
        self.lease
    }

    /// How messages call it.
    pub fn place(&self) -> String {
        format!("in etcd ({})", self.members)
    }

    /// Does `work` with a handle on the members, within the bound of one call. Blocks, and may be called from anywhere.
    pub(crate) fn call<T, E, F>(&self, work: impl FnOnce(Session) -> F) -> Result<T, E>
    where
        F: Future<Output = Result<T, E>> + Send + 'static,
        T: Send + 'static,
        E: From<EtcdError> + Send + 'static,
    {
        self.call_within(self.timeout, work)
    }

    /// The same, within a bound of the caller's.
    pub(crate) fn call_within<T, E, F>(
        &self,
        bound: Duration,
        work: impl FnOnce(Session) -> F,
    ) -> Result<T, E>
    where
        F: Future<Output = Result<T, E>> + Send + 'static,
        T: Send + 'static,
        E: From<EtcdError> + Send + 'static,
    {
        let (tell, told) = mpsc::sync_channel(1);
        let session = Session { members: Arc::clone(&self.members), deadline: Instant::now() + bound, bound };
        let silent = EtcdError::Silent {
            within: bound,
            told: "this process was too busy".to_owned(),
            remedy: "look at the load of this host",
        };
        let late = silent.clone();
        let work = work(session);
        self.spawn(async move {
            let done = tokio::time::timeout(bound + GRACE / 2, work).await;
            // Nobody waits any more if it is late.
            let _ = tell.try_send(done.unwrap_or_else(|_| Err(late.into())));
        });
        told.recv_timeout(bound + GRACE).unwrap_or_else(|_| Err(silent.into()))
    }

    /// Runs `work` in the background for as long as this client lives.
    pub(crate) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let runtime = self.runtime.as_ref().expect("it is there until the client is dropped");
        runtime.spawn(work);
    }

    /// What makes sessions in the background without owning the client.
    pub(crate) fn sessions(&self) -> Sessions {
        Sessions { members: Arc::clone(&self.members), timeout: self.timeout }
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        // Never waits, so it may be dropped by an asynchronous task too.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Makes sessions.
#[derive(Clone, Debug)]
pub(crate) struct Sessions {
    members: Arc<Members>,
    timeout: Duration,
}

impl Sessions {
    /// One whose calls take at most as long as one call may, counted from now.
    pub(crate) fn start(&self) -> Session {
        let (members, bound) = (Arc::clone(&self.members), self.timeout);
        Session { members, deadline: Instant::now() + bound, bound }
    }
}

/// Some calls that must be over at one instant.
#[derive(Clone, Debug)]
pub(crate) struct Session {
    members: Arc<Members>,
    deadline: Instant,
    bound: Duration,
}
