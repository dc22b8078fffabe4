//! Looks all the time for the node that runs the guest: the console follows it.

use colo_proto::v1::StatusReply;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::connect::{Node, Nodes};
use crate::error::CtlError;
use crate::format::clean;
use crate::locate::{Wanted, nobody, of_one_vm, runner, stopped, survey};

/// Between two looks: it adds to the time of a failover.
const LOOK: Duration = Duration::from_millis(300);

/// What is known of the nodes.
pub(super) enum View {
    /// Nobody was asked yet.
    Unknown,
    /// This one runs the guest.
    Runs(Runner),
    /// Nobody runs it, for good.
    Stopped(String),
    /// Nobody says that it runs it: a failover is going on, or all nodes are gone.
    Nobody {
        /// What was found instead.
        why: CtlError,
        /// Whether any node answers.
        answers: bool,
    },
}

/// The node that runs the guest.
#[derive(Clone)]
pub(super) struct Runner {
    /// How to call it.
    pub(super) node: Node,
    /// Its name.
    pub(super) name: String,
    /// The register's term.
    pub(super) term: u64,
}

/// The task that looks; it ends with this.
pub(super) struct Scout {
    /// Marked as changed after every look.
    pub(super) views: watch::Receiver<View>,
    task: AbortHandle,
}

impl Scout {
    /// Begins to look.
    pub(super) fn start(nodes: Nodes) -> Self {
        let (tell, views) = watch::channel(View::Unknown);
        let task = tokio::spawn(async move {
            while !tell.is_closed() {
                tell.send_replace(look(&nodes).await);
                tokio::time::sleep(LOOK).await;
            }
        });
        Self { views, task: task.abort_handle() }
    }
}

impl Drop for Scout {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn look(nodes: &Nodes) -> View {
    let sights = survey(nodes).await;
    if let Err(why) = of_one_vm(&sights) {
        return View::Nobody { why, answers: true };
    }
    let runs = |(node, status, term): (&Node, &StatusReply, u64)| {
        View::Runs(Runner { node: node.clone(), name: clean(&status.node), term })
    };
    runner(&sights).map(runs).or_else(|| stopped(&sights).map(View::Stopped)).unwrap_or_else(|| {
        let answers = sights.iter().any(|sight| sight.found.is_ok());
        View::Nobody { why: nobody(&sights, Wanted::Runner, nodes.is_secured()), answers }
    })
}
