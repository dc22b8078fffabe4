//! What fails, and what is expected of it. Pure: the same seed gives the same faults.

use std::fmt;

use crate::seed::Seed;

/// What a fault hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Party {
    /// The node that runs the guest.
    Primary,
    /// The node that holds its copy.
    Secondary,
    /// The node that does neither.
    Spare,
    /// One member of etcd.
    Member,
    /// The other two.
    Majority,
}

/// What is done to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Harm {
    /// SIGKILL.
    Kill,
    /// SIGSTOP.
    Freeze,
    /// Nothing gets through to it, and nothing from it.
    Cut,
    /// It hears nobody, and is heard.
    Deaf,
    /// It hears, and nobody hears it.
    Mute,
}

/// Which way of the link between the two nodes of the guest fails; all else gets through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Way {
    /// Both.
    Both,
    /// Epochs are lost.
    ToSecondary,
    /// Acks are lost.
    ToPrimary,
}

/// One fault.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fault {
    /// Of hosts or processes, all at once.
    Harmed(Vec<(Party, Harm)>),
    /// Of the link between primary and secondary.
    Link(Way),
}

/// What must come of a fault. Whatever it is: nothing that was acknowledged is missing, no connection breaks, nobody says
/// two things, and afterwards the guest is protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Expected {
    /// The guest goes on, protected all the time: the register does not change.
    Untouched,
    /// The guest goes on where it is.
    Stays,
    /// The guest goes on at its secondary.
    Moves,
    /// The guest goes on at one of the two.
    Either,
    /// The guest may stand until the fault is repaired, and goes on then at the latest, at one of the two.
    Repaired,
    /// Nobody can go on, and the nodes say so.
    Nobody,
}

/// All parties, and all harms.
pub const PARTIES: [Party; 5] =
    [Party::Primary, Party::Secondary, Party::Spare, Party::Member, Party::Majority];
/// See [`PARTIES`].
pub const HARMS: [Harm; 5] = [Harm::Kill, Harm::Freeze, Harm::Cut, Harm::Deaf, Harm::Mute];
const WAYS: [Way; 3] = [Way::Both, Way::ToSecondary, Way::ToPrimary];

impl Fault {
    /// The harm that it does to a party.
    pub fn harm(&self, party: Party) -> Option<Harm> {
        let Self::Harmed(all) = self else { return None };
        all.iter().find(|(hit, _)| *hit == party).map(|(_, harm)| *harm)
    }

    /// What must come of it, where acks mean memory.
    pub fn expected(&self) -> Expected {
        let Self::Harmed(_) = self else { return Expected::Either };
        let has_arbiter = self.harm(Party::Majority).is_none();
        match (self.harm(Party::Primary), self.harm(Party::Secondary)) {
            (None, None) => Expected::Untouched,
            (Some(Harm::Kill), Some(Harm::Kill)) => Expected::Nobody,
            (Some(_), Some(_)) => Expected::Repaired,
            _ if !has_arbiter => Expected::Repaired,
            // Its word may reach the register while it does not hear the answer.
            (Some(Harm::Deaf), None) | (None, Some(Harm::Deaf)) => Expected::Repaired,
            (Some(_), None) => Expected::Moves,
            (None, Some(_)) => Expected::Stays,
        }
    }
}

/// `runs` faults: first each party with each harm and each way of the link, in a random order, then each pair of parties
/// with a harm drawn for each, and so on. What nobody outlives comes last, since a new world is made after it.
pub fn plan(seed: &mut Seed, runs: usize) -> Vec<Fault> {
    let mut plan = Vec::new();
    while plan.len() < runs {
        plan.extend(shuffled(seed, singles()));
        let pairs = pairs(seed);
        plan.extend(shuffled(seed, pairs));
    }
    plan.truncate(runs);
    plan.sort_by_key(|fault| fault.expected() == Expected::Nobody);
    plan
}

/// A few faults for a test that has little time: of each kind of outcome that one world can show.
pub fn short(seed: &mut Seed) -> Vec<Fault> {
    let one = |party, harm| Fault::Harmed(vec![(party, harm)]);
    let of_primary = [Harm::Kill, Harm::Cut][seed.below(2) as usize];
    let others = vec![
        one(Party::Primary, of_primary),
        one(Party::Secondary, Harm::Freeze),
        Fault::Harmed(vec![(Party::Primary, Harm::Kill), (Party::Majority, Harm::Freeze)]),
    ];
    shuffled(seed, others)
}

/// The fault of this name.
pub fn by_name(name: &str) -> Option<Fault> {
    let party = |text: &str| PARTIES.into_iter().find(|party| party.to_string() == text);
    let harm = |text: &str| HARMS.into_iter().find(|harm| harm.to_string() == text);
    if let Some(link) = WAYS.map(Fault::Link).into_iter().find(|fault| fault.to_string() == name) {
        return Some(link);
    }
    let hits = name.split(" + ").map(|part| part.split_once(' '));
    let hits = hits.map(|hit| hit.and_then(|(h, p)| Some((party(p)?, harm(h)?))));
    hits.collect::<Option<Vec<_>>>().map(Fault::Harmed)
}

fn singles() -> Vec<Fault> {
    let harmed = PARTIES.into_iter().flat_map(|party| HARMS.map(|harm| Fault::Harmed(vec![(party, harm)])));
    harmed.chain(WAYS.map(Fault::Link)).collect()
}

fn pairs(seed: &mut Seed) -> Vec<Fault> {
    let mut pairs = Vec::new();
    for (n, first) in PARTIES.into_iter().enumerate() {
        for second in PARTIES.into_iter().skip(n + 1) {
            let mut any = || HARMS[seed.below(HARMS.len() as u64) as usize];
            pairs.push(Fault::Harmed(vec![(first, any()), (second, any())]));
        }
    }
    pairs
}

fn shuffled<T>(seed: &mut Seed, mut from: Vec<T>) -> Vec<T> {
    let mut to = Vec::new();
    while !from.is_empty() {
        to.push(from.swap_remove(seed.below(from.len() as u64) as usize));
    }
    to
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Primary => "primary",
            Self::Secondary => "secondary",
            Self::Spare => "spare",
            Self::Member => "etcd-member",
            Self::Majority => "etcd-majority",
        })
    }
}

impl fmt::Display for Harm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kill => "kill",
            Self::Freeze => "freeze",
            Self::Cut => "cut",
            Self::Deaf => "deafen",
            Self::Mute => "mute",
        })
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Harmed(all) => {
                let parts: Vec<String> = all.iter().map(|(party, harm)| format!("{harm} {party}")).collect();
                f.write_str(&parts.join(" + "))
            }
            Self::Link(Way::Both) => f.write_str("cut link"),
            Self::Link(Way::ToSecondary) => f.write_str("lose epochs"),
            Self::Link(Way::ToPrimary) => f.write_str("lose acks"),
        }
    }
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Untouched => "the guest goes on, protected",
            Self::Stays => "the guest goes on where it is",
            Self::Moves => "the guest moves",
            Self::Either => "the guest goes on at one of the two",
            Self::Repaired => "the guest goes on, at the latest after the repair",
            Self::Nobody => "nobody goes on, and status says so",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{Expected, Fault, Harm, PARTIES, Party, by_name, pairs, plan, singles};
    use crate::seed::Seed;

    #[test]
    fn a_plan_has_every_fault_alone_and_every_pair_and_is_repeatable() {
        let faults = plan(&mut Seed::new(7), 38);
        assert_eq!(faults, plan(&mut Seed::new(7), 38));
        assert_ne!(faults, plan(&mut Seed::new(8), 38));
        assert!(singles().iter().all(|fault| faults.contains(fault)));
        let pairs = faults.iter().filter(|fault| matches!(fault, Fault::Harmed(hits) if hits.len() == 2));
        assert_eq!(pairs.count(), PARTIES.len() * (PARTIES.len() - 1) / 2);
    }

    #[test]
    fn names_name_one_fault_each() {
        let all: Vec<Fault> = singles().into_iter().chain(pairs(&mut Seed::new(1))).collect();
        for fault in all {
            assert_eq!(by_name(&fault.to_string()), Some(fault.clone()), "{fault}");
        }
        assert_eq!(by_name("kill"), None);
        assert_eq!(by_name("kill nobody"), None);
    }

    #[test]
    fn what_is_expected_is_the_worst_of_both() {
        let expected = |name: &str| by_name(name).unwrap().expected();
        assert_eq!(expected("kill primary"), Expected::Moves);
        assert_eq!(expected("kill primary + mute etcd-member"), Expected::Moves);
        assert_eq!(expected("kill primary + mute etcd-majority"), Expected::Repaired);
        assert_eq!(expected("freeze etcd-majority + cut etcd-member"), Expected::Untouched);
        assert_eq!(expected("cut spare + cut secondary"), Expected::Stays);
        assert_eq!(expected("kill primary + kill secondary"), Expected::Nobody);
        assert_eq!(expected("kill primary + freeze secondary"), Expected::Repaired);
        assert_eq!(expected("lose acks"), Expected::Either);
        assert_eq!(Fault::Harmed(vec![(Party::Secondary, Harm::Deaf)]).expected(), Expected::Repaired);
    }
}
