//! What the operator asks of a node that runs a guest.

use colo_common::register::StopReason;
use tokio::sync::oneshot;

use super::{Linking, Node, NodeError};
use crate::link::Purpose;
use crate::replicator::Phase;

/// Where an answer goes; dropped without one if the node ends.
pub(super) type Reply = oneshot::Sender<Result<(), CommandError>>;

/// Why something cannot be done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// Not in this state.
    #[error("{0}")]
    NotNow(String),
    /// The secondary, or the register, said no.
    #[error("{0}")]
    Refused(String),
}

/// Something to do.
#[derive(Debug)]
pub enum Command {
    /// Protect by the secondary at this address.
    Protect {
        /// Its control plane.
        address: String,
        /// Told when it follows, or why it cannot.
        reply: Reply,
    },
    /// Go on without protection.
    Pause {
        /// Told when that is asked for.
        reply: Reply,
    },
    /// Protect by the same secondary as before.
    Resume {
        /// Told when that is asked for.
        reply: Reply,
    },
    /// Press the guest's power button.
    PowerButton,
    /// Stop the vm for good.
    Stop {
        /// Told when that is asked for.
        reply: Reply,
    },
    /// End this process' part without a word to the register.
    Leave,
    /// Console input that begins at an offset, or goes on from what was taken.
    Input {
        /// Where it begins.
        offset: Option<u64>,
        /// The bytes.
        bytes: Vec<u8>,
        /// Told the offset after what was taken.
        reply: oneshot::Sender<u64>,
    },
}

pub(super) fn answer(reply: Option<Reply>, with: Result<(), CommandError>) {
    if let Some(reply) = reply {
        // Whoever asked may have left.
        drop(reply.send(with));
    }
}

impl Node {
    pub(super) fn on_command(&mut self, command: Command) -> Result<(), NodeError> {
        match command {
            Command::Protect { address, reply } => self.protect_by(address, reply),
            Command::Pause { reply } => {
                self.paused_secondary = self.secondary.take().or(self.paused_secondary.take());
                let actions = self.replicator.go_solo();
                answer(Some(reply), Ok(()));
                return self.act(actions);
            }
            Command::Resume { reply } => {
                self.secondary = self.secondary.take().or(self.paused_secondary.take());
                let known = self.secondary.is_some();
                let none = "no secondary is known: name one with `coloctl protect`";
                let told = if known { Ok(()) } else { Err(CommandError::NotNow(none.to_owned())) };
                answer(Some(reply), told);
            }
            Command::PowerButton => self.guest.power_button(),
            Command::Stop { reply } => {
                self.stopping = true;
                self.park()?;
                let actions = self.replicator.stop(StopReason::Operator);
                answer(Some(reply), Ok(()));
                return self.act(actions);
            }
            Command::Leave => {
                self.park()?;
                self.end = Some(crate::replicator::End::Superseded(None));
            }
            Command::Input { offset, bytes, reply } => {
                let _ = reply.send(self.take_input(offset, &bytes));
            }
        }
        Ok(())
    }

    fn protect_by(&mut self, address: String, reply: Reply) {
        let refusal = match self.replicator.phase() {
            Phase::Alone if self.replicator.is_proposing() => {
                Some("the register is being changed: try again")
            }
            Phase::Alone => None,
            Phase::Paired { .. } => Some("the vm is protected already: pause replication first"),
            Phase::Lost { .. } | Phase::Over => Some("this node does not run the vm"),
            _ => Some("a secondary is joining already"),
        };
        if let Some(why) = refusal {
            return answer(Some(reply), Err(CommandError::NotNow(why.to_owned())));
        }
        self.secondary = Some(address.clone());
        if let Linking::Connecting { asked, .. } = &mut self.linking {
            let other = "another secondary was named".to_owned();
            answer(asked.take(), Err(CommandError::NotNow(other)));
        }
        self.connect(address, Purpose::Seed, Some(reply));
    }

    /// Input that the guest has by offset is dropped; input that leaves a gap waits for what comes before it.
    fn take_input(&mut self, offset: Option<u64>, bytes: &[u8]) -> u64 {
        let at = self.guest.console_input_offset();
        let known = at.checked_sub(offset.unwrap_or(at)).and_then(|known| usize::try_from(known).ok());
        if let Some(fresh) = known.and_then(|known| bytes.get(known..))
            && !self.parked
        {
            self.guest.console_input(fresh);
        }
        self.guest.console_input_offset()
    }
}
