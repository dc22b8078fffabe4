//! What the operator can have in each phase.

use super::Asked::{self, Pause, Protect, Resume, Stop, Switchover, Verify};
use super::{judge, may_leave};
use crate::replicator::Phase;
use colo_common::history::point;
use colo_common::register::{Entry, Value};
use colo_common::{Incarnation, NodeId, ProposalId, ReplicaId, Term};

const ASKED: [Asked; 6] = [Protect, Pause, Resume, Switchover, Verify, Stop];

fn phases() -> [(&'static str, Phase, bool); 9] {
    let (peer, join): (NodeId, _) = ("b".parse().unwrap(), point(1, 5));
    let value = Value::Solo { node: peer.clone(), incarnation: Incarnation(2) };
    let to = Entry { term: Term(3), proposal: ProposalId(1), value };
    let paired = Phase::Paired { peer: peer.clone(), replica: ReplicaId(1) };
    [
        ("alone", Phase::Alone, false),
        ("alone, the end proposed", Phase::Alone, true),
        ("seeding", Phase::Seeding { peer: peer.clone() }, false),
        ("joining", Phase::Joining { peer: peer.clone(), join }, false),
        ("pairing", Phase::Pairing { peer, join }, true),
        ("paired", paired.clone(), false),
        ("paired, solo proposed", paired, true),
        ("lost", Phase::Lost { to }, false),
        ("over", Phase::Over, false),
    ]
}

/// For each phase: protect, pause, resume, switchover, verify, stop; `-` is done, a word is part of why not.
const TABLE: [[&str; 6]; 9] = [
    ["-", "-", "-", "not protected", "no whole copy", "-"],
    ["try again", "being stopped", "-", "not protected", "no whole copy", "-"],
    ["joining already", "-", "-", "not protected", "no whole copy", "-"],
    ["joining already", "-", "-", "not protected", "no whole copy", "-"],
    ["joining already", "-", "-", "not protected", "no whole copy", "-"],
    ["protected already", "-", "-", "-", "-", "-"],
    ["protected already", "-", "-", "try again", "try again", "-"],
    ["does not run", "does not run", "does not run", "does not run", "does not run", "handed back"],
    ["does not run", "does not run", "does not run", "does not run", "does not run", "-"],
];

#[test]
fn every_phase_answers_every_wish() {
    for ((name, phase, proposing), row) in phases().into_iter().zip(TABLE) {
        for (asked, wanted) in ASKED.into_iter().zip(row) {
            let found = judge(asked, &phase, proposing, false).map_or_else(|why| why, |()| "-");
            assert!(found.contains(wanted), "{asked:?} while {name}: {found:?}, not {wanted:?}");
        }
    }
}

#[test]
fn a_vm_that_is_being_stopped_can_only_be_stopped() {
    for (name, phase, proposing) in phases() {
        for asked in [Protect, Pause, Resume, Switchover, Verify] {
            assert!(judge(asked, &phase, proposing, true).is_err(), "{asked:?} while {name}");
        }
    }
}

#[test]
fn a_node_does_not_leave_with_the_only_guest() {
    for (name, phase, _) in phases() {
        let alone = may_leave(&phase, false).is_ok();
        let followed = may_leave(&phase, true).is_ok();
        let wanted = match name {
            "over" => (true, true),
            "paired" | "paired, solo proposed" => (false, true),
            _ => (false, false),
        };
        assert_eq!((alone, followed), wanted, "{name}");
    }
}
