//! What the operator asks of a node that runs a guest. Whether it can be done in the phase that the node is in is
//! decided by [`judge`] alone.

use colo_common::register::StopReason;
use std::time::Instant;
use tokio::sync::oneshot;

use super::{Linking, Node, NodeError};
use crate::link::Purpose;
use crate::replicator::{End, Phase};

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
    /// It was begun and given up; everything is as before.
    #[error("{0}")]
    Aborted(String),
}

/// Something to do.
#[derive(Debug)]
pub enum Command {
    /// Protect by the secondary at this address.
    Protect {
        /// Its control plane.
        address: String,
        /// Send everything, whatever it has.
        full: bool,
        /// Told when it follows, or why it cannot.
        reply: Reply,
    },
    /// Go on without protection. While the register is asked for `Paired`, as soon as it has answered.
    Pause {
        /// Told when that is asked for, or why it cannot be.
        reply: Reply,
    },
    /// Protect by the same secondary as before.
    Resume {
        /// Told when that is asked for.
        reply: Reply,
    },
    /// Move the guest to the secondary.
    Switchover {
        /// Told when the secondary has it, or why it has not; nobody to be told if a signal asks.
        reply: Option<Reply>,
    },
    /// Press the guest's power button.
    PowerButton,
    /// Stop the vm for good.
    Stop {
        /// Told when that is asked for.
        reply: Reply,
    },
    /// End this process' part without a word to the register, if the guest lives on elsewhere.
    Leave {
        /// Told whether it does; nobody to be told if a signal asks.
        reply: Option<Reply>,
    },
    /// Stop the guest at once, let nothing more out, and end this process' part without a word to the register.
    Fence {
        /// Told when the guest stands.
        reply: Reply,
    },
    /// Console input.
    Input {
        /// The bytes; none to ask for the offset alone.
        bytes: Vec<u8>,
        /// Told how many were taken, which may be less than all, and the offset after them.
        reply: oneshot::Sender<(usize, u64)>,
    },
}

pub(super) fn answer(reply: Option<Reply>, with: Result<(), CommandError>) {
    if let Some(reply) = reply {
        // Whoever asked may have left.
        drop(reply.send(with));
    }
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Protect,
    Pause,
    Resume,
    Switchover,
    Stop,
}

/// Whether the operator can have it now; the reason if not. `proposing`: a change of the register is on its way.
/// `ending`: the vm is to stop, or its guest has failed.
fn judge(asked: Asked, phase: &Phase, proposing: bool, ending: bool) -> Result<(), &'static str> {
    use Asked::{Pause, Protect, Resume, Stop, Switchover};
    match (asked, phase) {
        // A second stop asks for what is on its way.
        (Stop, Phase::Lost { .. }) => Err(
            "another node has the register: stop the vm there; this node stops it if the guest is handed back",
        ),
        (Stop, _) => Ok(()),
        (_, Phase::Lost { .. } | Phase::Over) => Err("this node does not run the vm: ask the one that does"),
        _ if ending => Err("the vm is being stopped"),
        (Protect, Phase::Alone) if proposing => Err("the register is being changed: try again"),
        (Protect, Phase::Alone) => Ok(()),
        (Protect, Phase::Paired { .. }) => Err("the vm is protected already: pause replication first"),
        (Protect, Phase::Seeding { .. } | Phase::Joining { .. } | Phase::Pairing { .. }) => {
            Err("a secondary is joining already: pause replication first")
        }
        (Switchover, Phase::Paired { .. }) if proposing => Err("the register is being changed: try again"),
        (Switchover, Phase::Paired { .. }) => Ok(()),
        (Switchover, _) => Err("the vm is not protected: there is nobody to move it to"),
        // A proposal that nobody asked to be Solo is the vm's end: of a guest that powered itself off.
        (Pause, Phase::Alone) if proposing => Err("the vm is being stopped"),
        (Pause | Resume, _) => Ok(()),
    }
}

/// Whether the guest outlives the end of this process.
fn may_leave(phase: &Phase, follows: bool) -> Result<(), &'static str> {
    match phase {
        Phase::Over => Ok(()),
        Phase::Paired { .. } if follows => Ok(()),
        Phase::Lost { .. } => Err(
            "the guest is kept here until the other node has run it; a signal ends this process all the same",
        ),
        _ => Err(
            "the guest is not protected and would be lost with this node: protect it first, or stop the vm",
        ),
    }
}

impl Node {
    pub(super) fn on_command(&mut self, command: Command) -> Result<(), NodeError> {
        match command {
            Command::Protect { address, full, reply } => match self.judge(Asked::Protect) {
                Ok(()) => self.protect_by(address, full, reply),
                refused => answer(Some(reply), refused),
            },
            Command::Pause { reply } => {
                let verdict = self.judge(Asked::Pause);
                let paused = verdict.is_ok();
                answer(Some(reply), verdict);
                return if paused { self.pause() } else { Ok(()) };
            }
            Command::Resume { reply } => {
                let verdict = self.judge(Asked::Resume).and_then(|()| self.resume());
                answer(Some(reply), verdict);
            }
            Command::Switchover { reply } => match self.judge(Asked::Switchover) {
                Ok(()) => self.begin_switchover(reply, Instant::now()),
                refused => {
                    if let Err(why) = &refused {
                        tracing::warn!(vm = %self.vm, "no switchover: {why}");
                    }
                    answer(reply, refused);
                }
            },
            Command::PowerButton => self.guest.power_button(),
            Command::Stop { reply } => {
                let verdict = self.judge(Asked::Stop);
                self.stopping = true;
                self.park()?;
                let actions = self.replicator.stop(StopReason::Operator);
                answer(Some(reply), verdict);
                return self.act(actions);
            }
            Command::Leave { reply } => {
                // A signal has the last word: on_stop = "leave" says what it means.
                let verdict =
                    reply.as_ref().map_or(Ok(()), |_| may_leave(self.replicator.phase(), self.is_followed()));
                let leaves = verdict.is_ok();
                answer(reply, verdict.map_err(|why| CommandError::NotNow(why.to_owned())));
                if leaves {
                    self.park()?;
                    self.end = Some(End::Superseded(None));
                }
            }
            Command::Fence { reply } => {
                self.park()?;
                self.fenced = Some(reply);
            }
            Command::Input { bytes, reply } => {
                let _ = reply.send(self.take_input(&bytes));
            }
        }
        Ok(())
    }

    /// A secondary is there, and is to stay.
    fn is_followed(&self) -> bool {
        self.replicator.is_linked() && !self.replicator.is_proposing() && !self.pause_wanted
    }

    fn judge(&self, asked: Asked) -> Result<(), CommandError> {
        let ending = self.stopping || self.failure.is_some();
        let verdict = judge(asked, self.replicator.phase(), self.replicator.is_proposing(), ending);
        verdict.map_err(|why| CommandError::NotNow(why.to_owned()))
    }

    fn protect_by(&mut self, address: String, full: bool, reply: Reply) {
        self.secondary = Some(address.clone());
        self.send_all = full;
        self.stop_connecting("another secondary was named");
        self.connect(address, Purpose::Seed, Some(reply));
    }

    /// A copy on its way is given up, and nobody is looked for any more.
    fn pause(&mut self) -> Result<(), NodeError> {
        self.paused_secondary = self.secondary.take().or(self.paused_secondary.take());
        self.stop_connecting("replication was paused");
        self.pause_wanted = true;
        self.pause_if_wanted()
    }

    /// The register cannot be asked for two things at a time.
    pub(super) fn pause_if_wanted(&mut self) -> Result<(), NodeError> {
        if !self.pause_wanted || self.replicator.is_proposing() {
            return Ok(());
        }
        self.pause_wanted = matches!(self.replicator.phase(), Phase::Pairing { .. });
        let actions = self.replicator.go_solo();
        self.act(actions)
    }

    fn resume(&mut self) -> Result<(), CommandError> {
        self.pause_wanted = false;
        self.secondary = self.secondary.take().or(self.paused_secondary.take());
        let none = "no secondary is known: name one with `coloctl protect`";
        self.secondary.is_some().then_some(()).ok_or_else(|| CommandError::NotNow(none.to_owned()))
    }

    /// A link that still comes up finds nobody waiting for it, and ends.
    fn stop_connecting(&mut self, why: &str) {
        if let Linking::Connecting { asked, .. } = &mut self.linking {
            answer(asked.take(), Err(CommandError::NotNow(why.to_owned())));
            self.linking = Linking::Idle;
        }
    }

    /// Input goes to the end of what the guest has, as far as there is room.
    fn take_input(&mut self, bytes: &[u8]) -> (usize, u64) {
        let taken = if self.parked || self.holds_guest() || bytes.is_empty() {
            0
        } else {
            self.guest.console_input(bytes)
        };
        (taken, self.guest.console_input_offset())
    }
}

#[cfg(test)]
#[path = "operator_tests.rs"]
mod tests;
