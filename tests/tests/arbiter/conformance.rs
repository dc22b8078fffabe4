//! What every arbiter keeps: compare-and-set, repetitions, one winner of each term, reads that are never old.

use colo_common::arbiter::Arbiter;
use colo_common::arbiter::file::FileArbiter;
use colo_common::arbiter::scripted::ScriptedArbiter;
use colo_common::register::{Answer, Entry};
use colo_common::{Term, VmId};
use colo_tests::etcd::{self, EtcdCluster};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use super::history::History;
use super::{client, proposal, vm};

/// Opens one more arbiter on the same registers, as another process does.
type Open<'a> = &'a dyn Fn() -> Arc<dyn Arbiter>;

fn all(open: Open<'_>) {
    entries_follow_each_other(open);
    repetitions_change_nothing(open);
    racers_win_one_term_each(open);
}

#[test]
fn the_file_arbiter_conforms() {
    let directory = tempfile::tempdir().unwrap();
    all(&|| Arc::new(FileArbiter::open(directory.path()).unwrap()));
}

#[test]
fn the_scripted_arbiter_conforms() {
    let arbiter = Arc::new(ScriptedArbiter::new());
    all(&move || Arc::<ScriptedArbiter>::clone(&arbiter));
}

#[test]
fn the_etcd_arbiter_conforms() {
    if !etcd::usable() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let cluster = EtcdCluster::start(directory.path()).unwrap();
    all(&|| Arc::new(client(&cluster)));
    let by_tls = tempfile::tempdir().unwrap();
    let cluster = EtcdCluster::start_with_tls(by_tls.path()).unwrap();
    all(&|| Arc::new(client(&cluster)));
}

fn entries_follow_each_other(open: Open<'_>) {
    let (arbiter, vm): (_, VmId) = (open(), "following".parse().unwrap());
    assert_eq!(arbiter.read(&vm).unwrap(), None);
    let early = proposal(9, Some(proposal(1, None).entry()));
    assert_eq!(arbiter.propose(&vm, &early).unwrap(), Answer::Refused(None), "nothing is there yet");
    assert_eq!(arbiter.read(&vm).unwrap(), None);
    let mut last: Option<Entry> = None;
    for process in 1..=10 {
        let next = proposal(process, last.clone());
        assert_eq!(arbiter.propose(&vm, &next).unwrap(), Answer::Applied(next.entry()));
        let rival = proposal(100 + process, last);
        assert_eq!(open().propose(&vm, &rival).unwrap(), Answer::Refused(Some(next.entry())));
        assert_eq!(open().read(&vm).unwrap(), Some(next.entry()));
        last = Some(next.entry());
    }
    assert_eq!(last.unwrap().term, Term(10));
    assert_eq!(arbiter.read(&"following-2".parse().unwrap()).unwrap(), None, "another vm's");
}

fn repetitions_change_nothing(open: Open<'_>) {
    let (arbiter, vm): (_, VmId) = (open(), "repeated".parse().unwrap());
    let first = proposal(1, None);
    for _ in 0..3 {
        assert_eq!(arbiter.propose(&vm, &first).unwrap(), Answer::Applied(first.entry()));
        assert_eq!(open().propose(&vm, &first).unwrap(), Answer::Applied(first.entry()));
    }
    let second = proposal(2, Some(first.entry()));
    assert_eq!(arbiter.propose(&vm, &second).unwrap(), Answer::Applied(second.entry()));
    assert_eq!(arbiter.propose(&vm, &first).unwrap(), Answer::Refused(Some(second.entry())), "overtaken");
    assert_eq!(arbiter.read(&vm).unwrap(), Some(second.entry()));
}

fn racers_win_one_term_each(open: Open<'_>) {
    const RACERS: u128 = 8;
    const WINS: u64 = 10;
    let newest = AtomicU64::new(0);
    let history = History::default();
    thread::scope(|scope| {
        for process in 1..=RACERS {
            let (arbiter, newest, history) = (open(), &newest, &history);
            scope.spawn(move || {
                let mut wins = 0;
                while wins < WINS {
                    // What anybody was told before this read began, the read must know.
                    let known = newest.load(Ordering::SeqCst);
                    let found = arbiter.read(&vm()).unwrap();
                    let term = found.as_ref().map_or(0, |entry| entry.term.0);
                    assert!(term >= known, "read term {term} after term {known} was told");
                    newest.fetch_max(term, Ordering::SeqCst);
                    let wanted = proposal(process, found);
                    let answer = arbiter.propose(&vm(), &wanted).unwrap();
                    history.told(&wanted, &answer);
                    if let Answer::Applied(entry) = answer {
                        newest.fetch_max(entry.term.0, Ordering::SeqCst);
                        wins += 1;
                    }
                }
            });
        }
    });
    let last = open().read(&vm()).unwrap().unwrap();
    assert_eq!(
        u128::from(last.term.0),
        RACERS * u128::from(WINS),
        "one winner of each term, and no term else"
    );
    assert_eq!(history.check(&last), RACERS as usize * WINS as usize);
}
