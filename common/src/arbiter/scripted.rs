//! The scripted arbiter: in memory, for tests and simulation, with the faults that a real one has. Deterministic: the
//! same script, seed and order of calls give the same answers.
//!
//! A node's thread uses it as an [`Arbiter`]. A simulation that carries requests and replies itself uses
//! [`apply`](ScriptedArbiter::apply) and [`peek`](ScriptedArbiter::peek) at the instants at which they arrive.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::fates::Fates;
use super::{Arbiter, ArbiterError};
use crate::ids::VmId;
use crate::register::{Answer, Entry, Proposal};

/// What becomes of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fate {
    /// It is done and answered.
    Answered,
    /// It is done and the answer is lost.
    Unanswered,
    /// It is still on its way: no answer, and a proposal is done at [`ScriptedArbiter::deliver_late`].
    Late,
    /// It is never done, and not answered.
    Lost,
    /// Requests that are late overtake the answer: it was true when it was given, and may not be any more.
    Overtaken,
}

/// Of 1000 calls, how many meet each [`Fate`]; the rest is answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// [`Fate::Unanswered`].
    pub unanswered: u32,
    /// [`Fate::Late`].
    pub late: u32,
    /// [`Fate::Lost`].
    pub lost: u32,
    /// [`Fate::Overtaken`].
    pub overtaken: u32,
}

/// An arbiter whose faults are told to it.
#[derive(Debug)]
pub struct ScriptedArbiter {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// Per vm all entries that it ever held, ascending.
    entries: BTreeMap<VmId, Vec<Entry>>,
    fates: Fates,
    late: VecDeque<(VmId, Proposal)>,
}

impl Default for ScriptedArbiter {
    fn default() -> Self {
        Self::seeded(0, Faults::default())
    }
}

impl ScriptedArbiter {
    /// One that answers everything.
    pub fn new() -> Self {
        Self::default()
    }

    /// One with faults drawn from `seed`.
    ///
    /// # Panics
    /// The faults are more than 1000 of 1000.
    pub fn seeded(seed: u64, faults: Faults) -> Self {
        Self {
            inner: Mutex::new(Inner {
                entries: BTreeMap::new(),
                fates: Fates::seeded(seed, faults),
                late: VecDeque::new(),
            }),
        }
    }

    /// The next calls meet these fates, in this order; after them the seed decides again.
    pub fn script(&self, fates: impl IntoIterator<Item = Fate>) {
        self.lock().fates.script(fates);
    }

    /// From now on nothing is answered and nothing done, until it is told to end. The script waits meanwhile.
    pub fn set_outage(&self, outage: bool) {
        self.lock().fates.set_outage(outage);
    }

    /// Proposals that are still on their way.
    pub fn late(&self) -> usize {
        self.lock().late.len()
    }

    /// Every late proposal arrives, in the order in which they were sent; their answers are lost. Says how many.
    pub fn deliver_late(&self) -> usize {
        self.lock().deliver_late()
    }

    /// The late proposal at this place arrives before the others. Says what the lost answer was.
    pub fn deliver_one(&self, place: usize) -> Option<Answer> {
        let mut inner = self.lock();
        let (vm, proposal) = inner.late.remove(place)?;
        Some(inner.apply(&vm, &proposal))
    }

    /// The late proposal at this place never arrives.
    pub fn lose_one(&self, place: usize) -> Option<Proposal> {
        self.lock().late.remove(place).map(|(_, proposal)| proposal)
    }

    /// A proposal arrives now, past script, seed and outage.
    pub fn apply(&self, vm: &VmId, proposal: &Proposal) -> Answer {
        self.lock().apply(vm, proposal)
    }

    /// What the register holds now, past script, seed and outage.
    pub fn peek(&self, vm: &VmId) -> Option<Entry> {
        self.lock().entry(vm)
    }

    /// All entries that the register ever held, ascending: what invariants are checked against.
    pub fn entries(&self, vm: &VmId) -> Vec<Entry> {
        self.lock().entries.get(vm).cloned().unwrap_or_default()
    }

    /// What every register holds now, by name.
    pub fn peek_all(&self) -> Vec<(VmId, Entry)> {
        let inner = self.lock();
        let newest = |(vm, entries): (&VmId, &Vec<Entry>)| Some((vm.clone(), entries.last()?.clone()));
        inner.entries.iter().filter_map(newest).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Arbiter for ScriptedArbiter {
    fn read(&self, vm: &VmId) -> Result<Option<Entry>, ArbiterError> {
        let mut inner = self.lock();
        let found = inner.entry(vm);
        match inner.fates.next() {
            Fate::Answered => Ok(found),
            Fate::Overtaken => {
                inner.deliver_late();
                Ok(found)
            }
            fate => Err(no_answer(fate)),
        }
    }

    fn propose(&self, vm: &VmId, proposal: &Proposal) -> Result<Answer, ArbiterError> {
        let mut inner = self.lock();
        let fate = inner.fates.next();
        match fate {
            Fate::Answered => Ok(inner.apply(vm, proposal)),
            Fate::Overtaken => {
                let answer = inner.apply(vm, proposal);
                inner.deliver_late();
                Ok(answer)
            }
            Fate::Unanswered => {
                inner.apply(vm, proposal);
                Err(no_answer(fate))
            }
            Fate::Late => {
                inner.late.push_back((vm.clone(), proposal.clone()));
                Err(no_answer(fate))
            }
            Fate::Lost => Err(no_answer(fate)),
        }
    }
}

fn no_answer(fate: Fate) -> ArbiterError {
    ArbiterError::Unreachable { place: "of the script".to_owned(), reason: format!("{fate:?}") }
}

impl Inner {
    fn entry(&self, vm: &VmId) -> Option<Entry> {
        self.entries.get(vm).and_then(|entries| entries.last()).cloned()
    }

    fn apply(&mut self, vm: &VmId, proposal: &Proposal) -> Answer {
        let found = self.entry(vm);
        let answer = proposal.judge(found.as_ref());
        match &answer {
            Answer::Applied(entry) if found.as_ref() != Some(entry) => {
                self.entries.entry(vm.clone()).or_default().push(entry.clone());
            }
            _ => {}
        }
        answer
    }

    fn deliver_late(&mut self) -> usize {
        let late = std::mem::take(&mut self.late);
        for (vm, proposal) in &late {
            self.apply(vm, proposal);
        }
        late.len()
    }
}

#[cfg(test)]
mod tests {
    use super::{Fate, Faults, ScriptedArbiter};
    use crate::arbiter::Arbiter;
    use crate::ids::{Incarnation, ProposalId, Term, VmId};
    use crate::register::{Answer, Entry, Proposal, Value};

    fn vm() -> VmId {
        "web".parse().unwrap()
    }

    fn proposal(process: u128, expected: Option<Entry>) -> Proposal {
        let incarnation = Incarnation(process);
        let term = expected.as_ref().map_or(Term(0), |entry| entry.term);
        let value = Value::Solo { node: "a".parse().unwrap(), incarnation };
        Proposal { id: ProposalId::of(incarnation, term), expected, value }
    }

    #[test]
    fn an_answer_is_lost_and_the_change_found_again() {
        let arbiter = ScriptedArbiter::new();
        arbiter.script([Fate::Unanswered]);
        let create = proposal(1, None);
        arbiter.propose(&vm(), &create).unwrap_err();
        assert_eq!(arbiter.propose(&vm(), &create).unwrap(), Answer::Applied(create.entry()));
        assert_eq!(arbiter.entries(&vm()), [create.entry()]);
    }

    #[test]
    fn a_late_proposal_lands_after_the_old_value_was_read_back() {
        let arbiter = ScriptedArbiter::new();
        let create = proposal(1, None);
        arbiter.propose(&vm(), &create).unwrap();
        arbiter.script([Fate::Late]);
        let change = proposal(2, Some(create.entry()));
        arbiter.propose(&vm(), &change).unwrap_err();
        assert_eq!(arbiter.read(&vm()).unwrap(), Some(create.entry()));
        assert_eq!((arbiter.late(), arbiter.deliver_late(), arbiter.late()), (1, 1, 0));
        assert_eq!(arbiter.read(&vm()).unwrap(), Some(change.entry()));
    }

    #[test]
    fn late_proposals_land_in_any_order_and_one_wins() {
        let arbiter = ScriptedArbiter::new();
        arbiter.script([Fate::Late; 3]);
        for process in 1..=3 {
            arbiter.propose(&vm(), &proposal(process, None)).unwrap_err();
        }
        assert_eq!(arbiter.lose_one(2), Some(proposal(3, None)));
        let winner = proposal(2, None).entry();
        assert_eq!(arbiter.deliver_one(1), Some(Answer::Applied(winner.clone())));
        assert_eq!(arbiter.deliver_one(0), Some(Answer::Refused(Some(winner.clone()))));
        assert_eq!(arbiter.deliver_one(0), None);
        assert_eq!(arbiter.peek(&vm()), Some(winner));
    }

    #[test]
    fn a_read_is_overtaken_by_what_was_late() {
        let arbiter = ScriptedArbiter::new();
        let create = proposal(1, None);
        arbiter.script([Fate::Late, Fate::Overtaken, Fate::Lost]);
        arbiter.propose(&vm(), &create).unwrap_err();
        assert_eq!(arbiter.read(&vm()).unwrap(), None);
        arbiter.read(&vm()).unwrap_err();
        assert_eq!(arbiter.read(&vm()).unwrap(), Some(create.entry()));
    }

    #[test]
    fn an_outage_lasts_until_it_is_told_to_end() {
        let arbiter = ScriptedArbiter::new();
        arbiter.set_outage(true);
        for _ in 0..3 {
            arbiter.read(&vm()).unwrap_err();
            arbiter.propose(&vm(), &proposal(1, None)).unwrap_err();
        }
        arbiter.set_outage(false);
        assert_eq!(arbiter.read(&vm()).unwrap(), None);
    }

    #[test]
    fn a_seed_decides_everything_and_terms_never_skip() {
        let faults = Faults { unanswered: 200, late: 200, lost: 200, overtaken: 100 };
        let run = |seed| {
            let arbiter = ScriptedArbiter::seeded(seed, faults);
            let mut trace = Vec::new();
            for process in 0..500 {
                let found = arbiter.peek(&vm());
                trace.push(arbiter.propose(&vm(), &proposal(process, found)).ok());
            }
            (trace, arbiter.entries(&vm()))
        };
        let (trace, entries) = run(7);
        assert_eq!((trace.clone(), entries.clone()), run(7));
        assert_ne!(trace, run(8).0);
        assert!(entries.iter().zip(1..).all(|(entry, term)| entry.term == Term(term)));
        let lost = trace.iter().filter(|answer| answer.is_none()).count();
        assert!((200..400).contains(&lost), "{lost} of 500 without an answer");
    }
}
