//! Streams of several nodes at once, as one.

use colo_common::VmId;
use tokio::sync::mpsc;
use tonic::{Response, Status, Streaming};

use crate::connect::{Node, Nodes, QUESTION_LIMIT};
use crate::error::CtlError;
use crate::locate::{Wanted, nobody, of_one_vm, survey};
use crate::output::note;

/// Messages that wait to be shown.
const WAITING: usize = 64;

/// A node and what it is called.
pub(crate) struct Source {
    /// The node.
    pub(crate) node: Node,
    /// Its name, as it says.
    pub(crate) name: String,
}

/// The nodes of a vm that answer; those that do not are told beside the answer.
pub(crate) async fn sources(nodes: &Nodes, vm: Option<&VmId>) -> Result<Vec<Source>, CtlError> {
    let sights = survey(nodes).await;
    if vm.is_none() {
        of_one_vm(&sights)?;
    }
    if sights.iter().all(|sight| sight.found.is_err()) {
        return Err(nobody(&sights, Wanted::Runner, nodes.is_secured()));
    }
    let mut sources = Vec::new();
    for sight in sights {
        match sight.found {
            Ok((node, status)) if vm.is_none_or(|vm| vm.as_str() == status.vm) => {
                sources.push(Source { node, name: status.node });
            }
            Ok(_) => {}
            Err(e) => note(&e.to_string()),
        }
    }
    if sources.is_empty() {
        let vm = vm.map(ToString::to_string).unwrap_or_default();
        return Err(CtlError::Usage(format!(
            "no node that answers is of the vm {vm}; check --vm and --node"
        )));
    }
    Ok(sources)
}

/// What all sources say, each with the name of its node, as it comes; how a source failed goes into it too.
pub(crate) async fn merged<T, F>(
    sources: Vec<Source>,
    open: impl Fn(Node) -> F,
) -> mpsc::Receiver<(String, Result<T, CtlError>)>
where
    T: Send + 'static,
    F: Future<Output = Result<Response<Streaming<T>>, Status>>,
{
    let (out, all) = mpsc::channel(WAITING);
    for Source { node, name } in sources {
        let opened = node.answer(QUESTION_LIMIT, open(node.clone())).await;
        tokio::spawn(pass(node, name, opened, out.clone()));
    }
    all
}

/// Passes on what one says, until it ends or nobody listens.
async fn pass<T>(
    node: Node,
    name: String,
    opened: Result<Streaming<T>, CtlError>,
    out: mpsc::Sender<(String, Result<T, CtlError>)>,
) {
    let mut stream = match opened {
        Ok(stream) => stream,
        Err(e) => return drop(out.send((name, Err(e))).await),
    };
    loop {
        let said = match stream.message().await {
            Ok(Some(said)) => Ok(said),
            Ok(None) => return,
            Err(status) => Err(node.error(&status)),
        };
        let ends = said.is_err();
        if out.send((name.clone(), said)).await.is_err() || ends {
            return;
        }
    }
}
