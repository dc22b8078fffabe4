//! The first look at the register after the start of the process: whether this node follows, starts a stopped vm again,
//! goes on with such a start, or ends. Boots after a crash and promotions are the [`Replica`]'s, at this look and later.
//!
//! A start again is noted in the vm's directory before it is proposed, and that is taken back before a vCPU runs. So a
//! process that is cut off in between is followed by one with the same incarnation, which goes on if the register says
//! that it was granted.
//!
//! [`Replica`]: crate::replica::Replica

use colo_common::register::{Entry, Value};
use colo_common::vmdir::Runner;
use colo_common::{Incarnation, NodeId};

use super::{Follower, Outcome};

/// What a node knows at its first look.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    /// Its name.
    pub me: &'a NodeId,
    /// Its process.
    pub incarnation: Incarnation,
    /// The store is `active`: this node ran the guest last, as far as it knows.
    pub active: bool,
    /// This incarnation was starting the vm again when it was cut off.
    pub starting: bool,
    /// The operator's word.
    pub again: bool,
    /// `on_crash = boot`.
    pub boots: bool,
}

/// What follows from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FirstLook {
    /// Follow; a start that was cut off is over.
    Follow,
    /// A start that was cut off goes on.
    GoOn,
    /// Start the stopped vm again.
    Again,
    /// Follow, although the register names a dead process of this node: with a line for the operator.
    Wait(String),
    /// End, with a line for the operator.
    End(String),
}

/// What the first look at the register lets this node do.
pub fn first_look(known: Known<'_>, found: Option<&Entry>) -> FirstLook {
    let Some(entry) = found else {
        let none = "there is no register of this vm: --again starts a vm that was stopped on this node";
        return if known.again { FirstLook::End(none.to_owned()) } else { FirstLook::Follow };
    };
    match &entry.value {
        Value::Stopped { node, .. } if node == known.me => match (known.active, known.again) {
            (true, true) => FirstLook::Again,
            (true, false) => {
                FirstLook::End(format!("the register says: {entry}. Start it again with --again"))
            }
            (false, _) => FirstLook::End(format!(
                "the register says: {entry}, and this node's store does not say that it ran the guest: restore the \
                 vm's directory"
            )),
        },
        Value::Solo { node, incarnation }
            if node == known.me && *incarnation == known.incarnation && known.starting =>
        {
            FirstLook::GoOn
        }
        Value::Solo { node, .. } if node == known.me && known.active && !known.boots && !known.again => {
            FirstLook::Wait(format!(
                "the register says: {entry}, and the guest's memory was lost with the process that ran it: set \
                 on_crash = \"boot\" to boot the guest anew from its disk"
            ))
        }
        _ if known.again => FirstLook::End(format!(
            "the register says: {entry}; --again starts a vm that was stopped on this node: leave it out"
        )),
        _ => FirstLook::Follow,
    }
}

impl Follower {
    /// The register was read for the first time. Whether the node goes on.
    pub(super) fn on_first_look(&mut self, found: Option<&Entry>) -> bool {
        let known = Known {
            me: &self.me,
            incarnation: self.incarnation,
            active: self.replica.is_active(),
            starting: self.replica.is_starting(),
            again: std::mem::take(&mut self.again),
            boots: self.replica.boots_after_crash(),
        };
        let done = match first_look(known, found) {
            FirstLook::Follow => self.end_start(),
            FirstLook::Wait(why) => {
                tracing::warn!(vm = %self.vm, "{why}");
                self.board.error(why);
                self.end_start()
            }
            FirstLook::GoOn => Ok(()),
            FirstLook::Again => self.start_again(found),
            FirstLook::End(why) => Err(why),
        };
        if let Err(why) = done {
            self.end = Some(Outcome::Failed(why));
        }
        self.end.is_none()
    }

    fn start_again(&mut self, found: Option<&Entry>) -> Result<(), String> {
        if self.warm.is_none() {
            return Err("the guest's description is not known here: restore the vm's directory".to_owned());
        }
        let actions = self.replica.start_again(found).map_err(|e| e.to_string())?;
        let known = self.directory.runner().map_err(|e| e.to_string())?.unwrap_or_default();
        let seen = known.seen.max(found.map_or(known.seen, |entry| entry.term));
        let noted = Runner { seen, starting: Some(self.incarnation), ..known };
        self.directory.set_runner(noted).map_err(|e| e.to_string())?;
        self.act(actions);
        Ok(())
    }

    /// The register refused a start again; whether nothing else follows from what it holds.
    pub(super) fn start_refused(&mut self, found: Option<&Entry>, idle: bool) {
        let ended = self.end_start();
        if let Err(why) = ended {
            self.end = Some(Outcome::Failed(why));
        } else if idle {
            let says = found.map_or_else(|| "nothing".to_owned(), ToString::to_string);
            let why = format!("nothing is started: the register has changed and says: {says}");
            self.end = Some(Outcome::Failed(why));
        }
    }

    /// No start again goes on any more: the guest is about to run, or the register is another's.
    pub(super) fn end_start(&mut self) -> Result<(), String> {
        self.replica.go_on_starting(false);
        match self.directory.runner().map_err(|e| e.to_string())? {
            Some(known) if known.starting.is_some() => {
                self.directory.set_runner(Runner { starting: None, ..known }).map_err(|e| e.to_string())
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{FirstLook, Known, first_look};
    use colo_common::register::{Entry, StopReason, Value};
    use colo_common::{Incarnation, NodeId, ProposalId, ReplicaId, Term};

    const ME: Incarnation = Incarnation(9);

    fn node(name: &str) -> NodeId {
        name.parse().unwrap()
    }

    fn entry(value: Value) -> Entry {
        Entry { term: Term(5), proposal: ProposalId(1), value }
    }

    fn stopped(name: &str) -> Entry {
        entry(Value::Stopped { node: node(name), reason: StopReason::PowerOff })
    }

    fn solo(name: &str, incarnation: Incarnation) -> Entry {
        entry(Value::Solo { node: node(name), incarnation })
    }

    fn look(active: bool, starting: bool, again: bool, found: Option<&Entry>) -> FirstLook {
        let me = node("b");
        first_look(Known { me: &me, incarnation: ME, active, starting, again, boots: false }, found)
    }

    fn ends(look: &FirstLook, word: &str) -> bool {
        matches!(look, FirstLook::End(why) if why.contains(word) && !why.contains('\n'))
    }

    #[test]
    fn a_vm_that_was_stopped_here_starts_on_the_operators_word_alone() {
        let ours = stopped("b");
        assert_eq!(look(true, false, true, Some(&ours)), FirstLook::Again);
        assert!(ends(&look(true, false, false, Some(&ours)), "Start it again with --again"));
        assert!(ends(&look(true, true, false, Some(&ours)), "Start it again with --again"), "never granted");
        assert!(ends(&look(false, false, true, Some(&ours)), "restore"));
        // Whoever ran it last may start it, and this node then follows.
        assert_eq!(look(true, false, false, Some(&stopped("a"))), FirstLook::Follow);
    }

    #[test]
    fn a_granted_start_goes_on_and_any_other_is_over() {
        assert_eq!(look(true, true, false, Some(&solo("b", ME))), FirstLook::GoOn);
        assert_eq!(look(true, true, true, Some(&solo("b", ME))), FirstLook::GoOn);
        let waits = |look: FirstLook| matches!(look, FirstLook::Wait(why) if why.contains("on_crash"));
        assert!(waits(look(true, false, false, Some(&solo("b", ME)))));
        assert!(waits(look(true, true, false, Some(&solo("b", Incarnation(1))))));
        assert_eq!(look(false, false, false, Some(&solo("b", Incarnation(1)))), FirstLook::Follow);
        assert_eq!(look(true, true, false, Some(&solo("a", ME))), FirstLook::Follow);
        assert_eq!(look(false, false, false, None), FirstLook::Follow);
    }

    #[test]
    fn the_word_means_nothing_else() {
        let (primary, secondary) = (node("a"), node("b"));
        let paired = entry(Value::Paired { primary, secondary, replica: ReplicaId(1) });
        for found in [paired, stopped("a"), solo("a", ME), solo("b", Incarnation(1))] {
            assert!(ends(&look(true, false, true, Some(&found)), "leave it out"), "{found}");
        }
        assert!(ends(&look(true, false, true, None), "there is no register"));
    }
}
