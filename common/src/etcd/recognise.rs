//! Which cluster the endpoints are of, settled before the first answer is believed: a list may name a host that was
//! taken out of the cluster and has made one of its own, and that one must not be the first to answer.

use std::collections::BTreeMap;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::ask::HEDGE;
use super::error::EtcdError;
use super::wire::maintenance_client::MaintenanceClient;
use super::{Session, wire};

impl Session {
    /// Asks all members at once, unless it is known: the cluster of more than half of them is ours, or the only one that
    /// is heard of. If nobody answers, the first answer to come decides.
    pub(super) async fn recognise(&self) -> Result<(), EtcdError> {
        let members = &self.members;
        if members.is_recognised() {
            return Ok(());
        }
        let mut asked = JoinSet::new();
        for member in 0..members.len() {
            let channel = members.channel(member);
            asked.spawn(async move {
                let request = wire::StatusRequest {};
                let answer = MaintenanceClient::new(channel).status(request).await.ok()?;
                Some((member, answer.into_inner().header?.cluster_id))
            });
        }
        let mut heard: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
        let mut until = self.deadline;
        while let Ok(Some(answer)) = tokio::time::timeout_at(until, asked.join_next()).await {
            let Ok(Some((member, cluster))) = answer else { continue };
            // The others are as near as this one was.
            until = until.min(Instant::now() + 2 * HEDGE);
            let of_it = heard.entry(cluster).or_default();
            of_it.push(member);
            if of_it.len() * 2 > members.len() {
                members.recognise(cluster);
                return Ok(());
            }
        }
        match heard.len() {
            0 => {}
            1 => heard.keys().for_each(|cluster| members.recognise(*cluster)),
            _ => {
                let told = heard.values().map(|of_it| {
                    of_it.iter().map(|member| members.name(*member)).collect::<Vec<_>>().join(" and ")
                });
                return Err(EtcdError::Clusters(told.collect::<Vec<_>>().join(", ")));
            }
        }
        Ok(())
    }
}
