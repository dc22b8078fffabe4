//! A node that is bound to no vm: it says so to the cluster and to operators, and waits for a runner to claim it. Then it
//! follows that vm, in the same process, with its files in a directory of the vm's name.

use anyhow::{Context, bail};
use colo_common::VmId;
use colo_common::arbiter::Arbiter;
use colo_common::config::SecondaryConfig;
use colo_common::membership::{Claim, Membership, Registration};
use colo_common::register::Value;
use colo_primary::admin::{Part, Plane};
use colo_primary::console::Console;
use colo_primary::drain::Drain;
use colo_primary::metrics::Endpoint;
use colo_primary::node::status::{Board, Role};
use colo_primary::presence::{Presence, Who};
use colo_primary::serve::{self, Security};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, oneshot};

use crate::spare_plane::SparePlane;

/// Between two looks whether it is claimed.
const LOOK: Duration = Duration::from_millis(150);
/// How long the control plane lives on after the node was told to end: a reply, on a busy host too.
const LAST_REPLY: Duration = Duration::from_secs(1);

/// What a spare is bound to.
pub(crate) struct Bound {
    /// The vm.
    pub(crate) vm: VmId,
    /// Its record as a spare, to be changed.
    pub(crate) registered: Option<Box<dyn Registration>>,
    /// The claim, if it was claimed and has not come back by itself.
    pub(crate) claim: Option<Claim>,
}

/// Waits until the node is bound to a vm; nothing if the process is to end first.
///
/// # Errors
/// A port is in use, another process has the node's name, or the membership cannot be used.
pub(crate) fn bind(
    config: &SecondaryConfig,
    who: &Who,
    arbiter: &dyn Arbiter,
    membership: &Arc<dyn Membership>,
    (security, metrics): (&Security, Option<&Endpoint>),
    runtime: &Runtime,
) -> anyhow::Result<Option<Bound>> {
    if let Some(vm) = left_off(config, arbiter)? {
        tracing::info!(%vm, node = %who.node, "the register names this node: it goes on with this vm");
        return Ok(Some(Bound { vm, registered: None, claim: None }));
    }
    // Where it is said that the node is being emptied.
    std::fs::create_dir_all(&who.directory)
        .with_context(|| format!("cannot create {}", who.directory.display()))?;
    let (board, ends) = (Board::default(), mpsc::channel(1));
    let plane = Plane::new(None, who.node.clone(), who.incarnation, board.clone(), Console::default());
    plane.keep_membership(Arc::clone(membership));
    plane.keep_drain(Drain::of(&who.directory));
    let served = SparePlane::serve(config.admin.listen, security, metrics, &plane)?;
    let registered = membership.register(who.spare()).context("this node cannot be a spare")?;
    let presence =
        Presence::start(Arc::clone(membership), who.clone(), None, board.clone(), Some(registered));
    let presence = presence.context("no thread for the membership")?;
    board.change(|status| (status.role, status.arbiter_answered) = (Role::Spare, Some(Instant::now())));
    plane.set_part(Part::Spare(ends.0));
    tracing::info!(node = %who.node, "waiting as a spare at {}", who.address);
    let waiting = Waiting { membership: Arc::clone(membership), who, board, ends: ends.1 };
    let claim = runtime.block_on(waiting.claimed())?;
    // What comes next takes the port, and answers for the vm.
    drop(served);
    Ok(claim.map(|claim| {
        tracing::info!(vm = %claim.vm, node = %who.node, "claimed by {}", claim.by);
        Bound { vm: claim.vm.clone(), registered: presence.hand_on(), claim: Some(claim) }
    }))
}

/// What a spare waits with.
struct Waiting<'a> {
    membership: Arc<dyn Membership>,
    who: &'a Who,
    board: Board,
    /// Operators who want it to end.
    ends: mpsc::Receiver<oneshot::Sender<()>>,
}

impl Waiting<'_> {
    /// The claim on this very process; nothing if it is to end before there is one.
    async fn claimed(mut self) -> anyhow::Result<Option<Claim>> {
        let ended = serve::ended();
        tokio::pin!(ended);
        loop {
            if let Some(claim) = self.look().await? {
                return Ok(Some(claim));
            }
            tokio::select! {
                signal = &mut ended => {
                    signal?;
                    return Ok(None);
                }
                Some(reply) = self.ends.recv() => {
                    tracing::info!(node = %self.who.node, "an operator ends this spare");
                    // Whoever asked may have left.
                    let _ = reply.send(());
                    tokio::time::sleep(LAST_REPLY).await;
                    return Ok(None);
                }
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    /// Asks for the claim, and writes down whether there was an answer.
    async fn look(&self) -> anyhow::Result<Option<Claim>> {
        let (asked, of) = (Arc::clone(&self.membership), self.who.node.clone());
        match tokio::task::spawn_blocking(move || asked.claim_of(&of)).await? {
            Ok(found) => {
                self.board.change(|status| {
                    (status.arbiter_answered, status.arbiter_silent) = (Some(Instant::now()), None);
                });
                Ok(found.filter(|claim| claim.node_incarnation == self.who.incarnation))
            }
            Err(e) => {
                if self.board.status().arbiter_silent.is_none() {
                    tracing::warn!(node = %self.who.node, "whether this spare is claimed is not known: {e}");
                    self.board.arbiter_silent(e.to_string());
                }
                Ok(None)
            }
        }
    }
}

/// The vm that this node was bound to and that cannot do without it: its register names the node.
fn left_off(config: &SecondaryConfig, arbiter: &dyn Arbiter) -> anyhow::Result<Option<VmId>> {
    for vm in kept(&config.directory)? {
        let Some(entry) = arbiter.read(&vm).context("what this node was bound to is not known")? else {
            continue;
        };
        let named = match &entry.value {
            Value::Paired { secondary, .. } => *secondary == config.node,
            Value::Solo { node, .. } => *node == config.node,
            Value::Stopped { .. } => false,
        };
        if named {
            return Ok(Some(vm));
        }
    }
    Ok(None)
}

/// The vms that have a store here, by name.
fn kept(directory: &Path) -> anyhow::Result<Vec<VmId>> {
    let mut vms = Vec::new();
    let listed = match std::fs::read_dir(directory) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(vms),
        listed => listed.with_context(|| format!("cannot list {}", directory.display()))?,
    };
    for entry in listed {
        let entry = entry.with_context(|| format!("cannot list {}", directory.display()))?;
        let vm = entry.file_name().to_str().and_then(|name| name.parse::<VmId>().ok());
        if let Some(vm) = vm.filter(|_| entry.path().join("store").is_dir()) {
            vms.push(vm);
        }
    }
    if directory.join("store").exists() {
        bail!(
            "{} is the directory of one vm: name that vm in the configuration, or give the spare another directory",
            directory.display()
        );
    }
    vms.sort();
    Ok(vms)
}

#[cfg(test)]
mod tests {
    use super::kept;

    #[test]
    fn stores_of_vms_are_found_and_nothing_else() {
        let place = tempfile::tempdir().unwrap();
        assert!(kept(&place.path().join("none")).unwrap().is_empty());
        for path in ["web/store", "db/store", "-no/store", "empty"] {
            std::fs::create_dir_all(place.path().join(path)).unwrap();
        }
        let found: Vec<String> = kept(place.path()).unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(found, ["db", "web"]);
        std::fs::create_dir_all(place.path().join("store")).unwrap();
        assert!(kept(place.path()).unwrap_err().to_string().contains("the directory of one vm"));
    }
}
