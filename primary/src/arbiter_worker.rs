//! The one thread of a node that talks to the arbiter: whatever the arbiter takes, nothing else waits.
//!
//! A register is never removed. So one that was there and is gone is not an answer but an arbiter that has lost its
//! memory, or another one: nobody moves until it has it again.

use colo_common::arbiter::Arbiter;
use colo_common::register::{Answer, Entry, Proposal};
use colo_common::telemetry::in_node;
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
        std::thread::Builder::new().name(name).spawn(in_node(run))?;
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

/// What is told of a register that is gone.
fn gone(vm: &VmId) -> Found {
    Found::Silent(format!(
        "the arbiter has no register of {vm} any more: is its directory mounted? Restore the register, and never make a new one"
    ))
}

/// A proposal waits in front of reads: it is what decides.
fn work(
    arbiter: &dyn Arbiter,
    vm: &VmId,
    to_propose: &Receiver<Proposal>,
    to_read: &Receiver<()>,
    tell: &impl Fn(Found),
) {
    let (mut proposal, mut read): (Option<Proposal>, bool) = (None, false);
    let mut seen = false;
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
            seen |= wanted.expected.is_some();
            match arbiter.propose(vm, wanted) {
                Ok(Answer::Refused(None)) if seen => tell(gone(vm)),
                Ok(answer) => {
                    seen |= !matches!(answer, Answer::Refused(None));
                    tell(Found::Answer(wanted.id, answer));
                    proposal = None;
                }
                Err(e) => tell(Found::Silent(e.to_string())),
            }
        }
        if read {
            match arbiter.read(vm) {
                Ok(None) if seen => tell(gone(vm)),
                Ok(entry) => {
                    seen |= entry.is_some();
                    tell(Found::Entry(entry));
                    read = false;
                }
                Err(e) => tell(Found::Silent(e.to_string())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{ArbiterWorker, Found};
    use colo_common::arbiter::Arbiter;
    use colo_common::arbiter::file::FileArbiter;
    use colo_common::register::{Answer, Proposal, Value};
    use colo_common::{Incarnation, ProposalId};
    use std::sync::Arc;
    use std::time::Duration;

    #[test]
    fn a_register_that_is_gone_is_no_answer() {
        let directory = tempfile::tempdir().unwrap();
        let arbiter: Arc<dyn Arbiter> = Arc::new(FileArbiter::open(directory.path()).unwrap());
        let vm = "web".parse().unwrap();
        let (tell, told) = crossbeam_channel::unbounded();
        let worker = ArbiterWorker::start(Arc::clone(&arbiter), "web".parse().unwrap(), move |found| {
            drop(tell.send(found));
        })
        .unwrap();
        let next = || told.recv_timeout(Duration::from_secs(10)).unwrap();
        worker.read();
        assert!(matches!(next(), Found::Entry(None)), "there was none yet");
        let value = Value::Solo { node: "a".parse().unwrap(), incarnation: Incarnation(1) };
        let first = Proposal { id: ProposalId(1), expected: None, value };
        assert!(matches!(arbiter.propose(&vm, &first), Ok(Answer::Applied(_))));
        worker.read();
        assert!(matches!(next(), Found::Entry(Some(_))));
        let hidden = directory.path().with_extension("away");
        std::fs::rename(directory.path(), &hidden).unwrap();
        std::fs::create_dir(directory.path()).unwrap();
        worker.read();
        assert!(matches!(next(), Found::Silent(why) if why.contains("no register of web any more")));
        let second = Proposal { id: ProposalId(2), expected: Some(first.entry()), ..first };
        worker.propose(second);
        let found = std::iter::repeat_with(next).take(3).all(|found| matches!(found, Found::Silent(_)));
        assert!(found, "tried again and again");
        std::fs::remove_dir_all(directory.path()).unwrap();
        std::fs::rename(&hidden, directory.path()).unwrap();
        let answer = std::iter::repeat_with(next).find(|found| matches!(found, Found::Answer(..)));
        assert!(matches!(answer, Some(Found::Answer(ProposalId(2), Answer::Applied(_)))), "{answer:?}");
    }
}
