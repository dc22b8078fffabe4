//! The script's own: leases that end when they are told to, and answers that are lost or late.

use colo_common::arbiter::scripted::{Fate, Faults, ScriptedArbiter};
use colo_common::membership::scripted::ScriptedMembership;
use colo_common::membership::{ClaimAnswer, ClaimRefusal, Membership};
use std::sync::Arc;

use super::{claim, follower, node, run_on, spare};

fn pair() -> (Arc<ScriptedArbiter>, ScriptedMembership) {
    let arbiter = Arc::new(ScriptedArbiter::new());
    let members = ScriptedMembership::new(Arc::clone(&arbiter));
    (arbiter, members)
}

#[test]
fn a_process_that_dies_without_a_word_stays_until_its_lease_ends() {
    let (arbiter, members) = pair();
    let entry = run_on(&*arbiter, "web", "r", 1);
    let registered = members.register(spare("s", 7)).unwrap();
    assert_eq!(members.claim(&claim("web", &entry, "s", 7)).unwrap(), ClaimAnswer::Claimed);
    members.script([Fate::Lost]);
    drop(registered);
    assert_eq!(members.peek_nodes(), [spare("s", 7)]);
    assert_eq!(members.expire(&node("s")), 1);
    assert_eq!((members.peek_nodes(), members.peek_claims()), (Vec::new(), Vec::new()));
    // One that lives is registered again by what it says next.
    let registered = members.register(spare("s", 8)).unwrap();
    members.expire_process(spare("s", 8).incarnation);
    assert!(!registered.is_registered());
    registered.update(follower("s", 8, "web")).unwrap();
    assert!(registered.is_registered());
}

#[test]
fn a_late_claim_is_judged_when_it_arrives() {
    let (arbiter, members) = pair();
    let entry = run_on(&*arbiter, "web", "r", 1);
    let _registered = members.register(spare("s", 7)).unwrap();
    let wanted = claim("web", &entry, "s", 7);
    members.script([Fate::Late, Fate::Lost, Fate::Unanswered]);
    members.claim(&wanted).unwrap_err();
    members.claim(&wanted).unwrap_err();
    assert_eq!(members.peek_claims(), []);
    let next = run_on(&*arbiter, "web", "r", 2);
    assert_eq!(members.deliver_late(), 1);
    assert_eq!(members.peek_claims(), [], "the register has moved on");
    let wanted = claim("web", &next, "s", 7);
    members.claim(&wanted).unwrap_err();
    assert_eq!(members.claim(&wanted).unwrap(), ClaimAnswer::Claimed, "it was granted");
    members.set_outage(true);
    members.nodes().unwrap_err();
    assert_eq!(members.apply_claim(&claim("web", &entry, "s", 7)), {
        ClaimAnswer::Refused(ClaimRefusal::RegisterMoved(Some(next)))
    });
}

#[test]
fn a_seed_decides_everything() {
    let run = |seed| {
        let (arbiter, _) = pair();
        let entry = run_on(&*arbiter, "web", "r", 1);
        let faults = Faults { unanswered: 200, late: 200, lost: 200, overtaken: 100 };
        let members = ScriptedMembership::seeded(Arc::clone(&arbiter), seed, faults);
        members.apply_record(&spare("s", 7)).unwrap();
        let answers: Vec<_> =
            (0..200).map(|_| members.claim(&claim("web", &entry, "s", 7)).is_ok()).collect();
        answers
    };
    assert_eq!(run(7), run(7));
    assert_ne!(run(7), run(8));
}
