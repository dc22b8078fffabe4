//! What proposers were told, and whether it can be one history.

use colo_common::register::{Answer, Entry, Proposal};
use colo_common::{ProposalId, Term};
use std::collections::BTreeMap;
use std::sync::Mutex;

/// Everything that was told of one register.
#[derive(Debug, Default)]
pub(super) struct History {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Every entry that anybody was shown, by its term.
    entries: BTreeMap<Term, Entry>,
    /// What an applied proposal replaced, by its term.
    before: BTreeMap<Term, Option<Entry>>,
    /// Terms whose proposer was told that it is applied.
    acked: BTreeMap<Term, ProposalId>,
}

impl Inner {
    fn shown(&mut self, entry: &Entry) {
        let known = self.entries.entry(entry.term).or_insert_with(|| entry.clone());
        assert_eq!(known, entry, "two entries of one term");
    }
}

impl History {
    /// Takes what a proposer was told.
    pub(super) fn told(&self, proposal: &Proposal, answer: &Answer) {
        let mut inner = self.inner.lock().unwrap();
        match answer {
            Answer::Applied(entry) => {
                assert_eq!(*entry, proposal.entry(), "another entry than was proposed");
                inner.shown(entry);
                let other = inner.acked.insert(entry.term, proposal.id);
                assert!(other.is_none_or(|id| id == proposal.id), "two winners of {}", entry.term);
                inner.before.insert(entry.term, proposal.expected.clone());
            }
            Answer::Refused(found) => found.iter().for_each(|entry| inner.shown(entry)),
        }
    }

    /// Checks that all of it is one chain that ends with `last`; says how many changes were told as applied.
    pub(super) fn check(&self, last: &Entry) -> usize {
        let mut inner = self.inner.lock().unwrap();
        inner.shown(last);
        let newest = inner.entries.last_key_value().map(|(term, _)| *term);
        assert_eq!(newest, Some(last.term), "an entry that somebody was shown is lost");
        for (term, before) in &inner.before {
            match before {
                None => assert_eq!(*term, Term(1), "created again"),
                Some(before) => {
                    assert_eq!(before.term.next(), *term);
                    let known = inner.entries.get(&before.term);
                    assert!(known.is_none_or(|known| known == before), "{term} replaced what never was");
                }
            }
        }
        inner.acked.len()
    }
}
