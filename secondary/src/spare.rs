//! A node that is bound to no vm: it says so to the cluster, and waits for a runner to claim it. Then it follows that vm, in
//! the same process, with its files in a directory of the vm's name.

use anyhow::{Context, bail};
use colo_common::arbiter::Arbiter;
use colo_common::config::SecondaryConfig;
use colo_common::membership::{Claim, Membership, Registration};
use colo_common::register::Value;
use colo_common::{Incarnation, NodeId, VmId};
use colo_primary::presence::Who;
use colo_primary::serve;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Runtime;

/// Between two looks whether it is claimed.
const LOOK: Duration = Duration::from_millis(150);

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
/// Another process has the node's name, or the membership cannot be used.
pub(crate) fn bind(
    config: &SecondaryConfig,
    arbiter: &dyn Arbiter,
    membership: &Arc<dyn Membership>,
    incarnation: Incarnation,
    runtime: &Runtime,
) -> anyhow::Result<Option<Bound>> {
    if let Some(vm) = left_off(config, arbiter)? {
        tracing::info!(%vm, node = %config.node, "the register names this node: it goes on with this vm");
        return Ok(Some(Bound { vm, registered: None, claim: None }));
    }
    let who = Who {
        node: config.node.clone(),
        incarnation,
        address: config.admin.address(),
        directory: config.directory.clone(),
    };
    let registered = membership.register(who.spare()).context("this node cannot be a spare")?;
    tracing::info!(node = %config.node, "waiting as a spare at {}", who.address);
    let claim = runtime.block_on(claimed(Arc::clone(membership), config.node.clone(), incarnation))?;
    Ok(claim.map(|claim| {
        tracing::info!(vm = %claim.vm, node = %config.node, "claimed by {}", claim.by);
        Bound { vm: claim.vm.clone(), registered: Some(registered), claim: Some(claim) }
    }))
}

/// The claim on this very process; nothing if a signal ends it before there is one.
async fn claimed(
    membership: Arc<dyn Membership>,
    node: NodeId,
    process: Incarnation,
) -> anyhow::Result<Option<Claim>> {
    let ended = serve::ended();
    tokio::pin!(ended);
    let mut complained = false;
    loop {
        let (asked, of) = (Arc::clone(&membership), node.clone());
        let found = tokio::task::spawn_blocking(move || asked.claim_of(&of)).await?;
        match found {
            Ok(Some(claim)) if claim.node_incarnation == process => return Ok(Some(claim)),
            Ok(_) => complained = false,
            Err(e) if !complained => {
                tracing::warn!(%node, "whether this spare is claimed is not known: {e}");
                complained = true;
            }
            Err(_) => {}
        }
        tokio::select! {
            signal = &mut ended => {
                signal?;
                return Ok(None);
            }
            () = tokio::time::sleep(LOOK) => {}
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
