//! What a node reports of its epochs while it runs.

use colo_proto::v1::admin_client::AdminClient;
use colo_proto::v1::{EpochReport, WatchRequest};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tonic::transport::Channel;

/// Between two tries to reach a node that is not up yet.
const RETRY: Duration = Duration::from_millis(20);

/// The reports so far.
#[derive(Clone, Default)]
pub(crate) struct Reports(Arc<Mutex<Vec<EpochReport>>>);

impl Reports {
    /// All of them.
    pub(crate) fn all(&self) -> Vec<EpochReport> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Collects what a node reports, until its task is dropped.
    pub(crate) async fn follow(self, client: AdminClient<Channel>) {
        loop {
            let watched = async {
                let mut reports = client.clone().watch(WatchRequest {}).await?.into_inner();
                while let Some(report) = reports.message().await? {
                    self.0.lock().unwrap_or_else(PoisonError::into_inner).push(report);
                }
                Ok::<(), tonic::Status>(())
            };
            if let Err(status) = watched.await {
                tracing::debug!("no reports: {status}");
            }
            tokio::time::sleep(RETRY).await;
        }
    }
}

/// The pauses in these reports.
pub(crate) fn pauses(reports: &[EpochReport]) -> Vec<Duration> {
    let pause = |report: &EpochReport| Some(Duration::from_micros(report.pause.as_ref()?.total_us));
    reports.iter().filter_map(pause).collect()
}

/// From the resume to the ack.
pub(crate) fn acks(reports: &[EpochReport]) -> Vec<Duration> {
    reports.iter().filter_map(|report| report.ack_us.map(Duration::from_micros)).collect()
}
