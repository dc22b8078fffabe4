//! The one thread of a node that talks to the arbiter: whatever the arbiter takes, nothing else waits.

use colo_common::arbiter::Arbiter;
use colo_common::register::{Answer, Entry, Proposal};
use colo_common::{ProposalId, VmId};
use crossbeam_channel::{Receiver, Sender, select};
use std::sync::Arc;
use std::time::Duration;

/// Between two tries at an arbiter that does not answer.
const RETRY: Duration = Duration::from_millis(100);
/// While there is nothing to try again.
const IDLE: Duration = Duration::from_secs(3600);

/// What it found.
#[derive(Clone, Debug)]
pub enum Found {
    /// The proposal's answer.
    Answer(ProposalId, Answer),
    /// The register, read.
    Entry(Option<Entry>),
    /// The arbiter did not answer; the worker goes on trying what it was asked.
    Silent(String),
}

/// A handle on the worker; the thread ends with it.
#[derive(Clone, Debug)]
pub struct ArbiterWorker {
    /// One is outstanding at a time, so it never waits for room.
    proposals: Sender<Proposal>,
    /// A read that waits answers for all that are asked meanwhile.
    reads: Sender<()>,
}

impl ArbiterWorker {
    /// Starts the thread. `tell` is called from it.
    ///
    /// # Errors
    /// No thread can be had.
    pub fn start(
        arbiter: Arc<dyn Arbiter>,
        vm: VmId,
        tell: impl Fn(Found) + Send + 'static,
    ) -> std::io::Result<Self> {
        let (proposals, to_propose) = crossbeam_channel::bounded(4);
        let (reads, to_read) = crossbeam_channel::bounded(1);
        let name = format!("arbiter-{vm}");
        let run = move || work(&*arbiter, &vm, &to_propose, &to_read, &tell);
        std::thread::Builder::new().name(name).spawn(run)?;
        Ok(Self { proposals, reads })
    }

    /// Sends a proposal again and again until it is answered.
    pub fn propose(&self, proposal: Proposal) {
        if self.proposals.send(proposal).is_err() {
            tracing::error!("the arbiter's thread has ended");
        }
    }

    /// Reads the register, linearizably.
    pub fn read(&self) {
        let _ = self.reads.try_send(());
    }
}

/// A proposal waits in front of reads: it is what decides.
fn work(
    arbiter: &dyn Arbiter,
    vm: &VmId,
    to_propose: &Receiver<Proposal>,
    to_read: &Receiver<()>,
    tell: &impl Fn(Found),
) {
    let (mut proposal, mut read) = (None, false);
    loop {
        let wait = if proposal.is_some() || read { RETRY } else { IDLE };
        select! {
            recv(to_propose) -> new => match new {
                Ok(new) => proposal = Some(new),
                Err(_) => return,
            },
            recv(to_read) -> wanted => match wanted {
                Ok(()) => read = true,
                Err(_) => return,
            },
            default(wait) => {}
        }
        if let Some(wanted) = &proposal {
            match arbiter.propose(vm, wanted) {
                Ok(answer) => {
                    tell(Found::Answer(wanted.id, answer));
                    proposal = None;
                }
                Err(e) => tell(Found::Silent(e.to_string())),
            }
        }
        if read {
            match arbiter.read(vm) {
                Ok(entry) => {
                    tell(Found::Entry(entry));
                    read = false;
                }
                Err(e) => tell(Found::Silent(e.to_string())),
            }
        }
    }
}
