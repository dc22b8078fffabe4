//! Every start of a primary, cut off at every instant, with requests that land late or never: checked exhaustively on
//! the decision that `colo-primary start` makes. What ran is not booted without a word, and what did not run is never
//! a vm that nobody may start.

use colo_common::register::{Entry, Proposal, StopReason, Value};
use colo_common::vmdir::Runner;
use colo_common::{Incarnation, NodeId, ProposalId, Term};
use colo_primary::start::{Allowed, decide};
use stateright::{Checker, HasDiscoveries, Model, Property};

/// What is left out on purpose, so that the test can show that it would notice.
#[derive(Clone, Copy, Debug, Default)]
struct Mutation {
    /// The start is not noted before it is proposed.
    not_noted: bool,
    /// What is noted stays when the guest runs.
    stays_noted: bool,
    /// The next start is another process, though the one before it was cut off.
    drawn_anew: bool,
}

#[derive(Clone, Copy, Debug)]
struct Starts {
    terms: u64,
    crashes: u8,
    mutation: Mutation,
}

/// Between a step of a start and the next it can be cut off.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Process {
    Down,
    /// The register was read, and this is to be noted and proposed.
    Decided(Proposal, u128),
    Noted(Proposal, u128),
    Proposed(Proposal, u128),
    /// It has the register.
    Granted(Term, u128),
    Runs(u128),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    register: Option<Entry>,
    kept: Option<Runner>,
    process: Process,
    /// Requests that may still land.
    requests: Vec<Proposal>,
    born: u128,
    crashes: u8,
    /// What must be allowed before a guest may be booted: it ran and crashed, or was stopped.
    needs: Option<Needs>,
    /// The proposal that was allowed it.
    word: Option<ProposalId>,
    untold: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Needs {
    Boot,
    Again,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Step {
    Start {
        boot: bool,
        again: bool,
    },
    /// The process does what comes next.
    GoOn,
    /// The request with this index reaches the register.
    Land(usize),
    /// The operator stops the vm, which is granted at once.
    Stop,
    /// With what it had sent, or that still arrives.
    Crash {
        with_requests: bool,
    },
}

fn me() -> NodeId {
    "a".parse().expect("a name")
}

impl Starts {
    /// The process of the next start.
    fn process(&self, world: &World) -> u128 {
        let cut_off = world.kept.and_then(|kept| kept.starting).filter(|_| !self.mutation.drawn_anew);
        cut_off.map_or(world.born + 1, |Incarnation(process)| process)
    }

    fn decided(&self, world: &World, allowed: Allowed) -> Option<Proposal> {
        let process = Incarnation(self.process(world));
        decide(&me(), process, world.register.as_ref(), world.kept, allowed).ok()
    }

    fn go_on(&self, world: &mut World) -> Option<()> {
        let kept = world.kept.unwrap_or_default();
        world.process = match world.process.clone() {
            Process::Decided(proposal, process) => {
                let seen = proposal.expected.as_ref().map_or(Term(0), |entry| entry.term).max(kept.seen);
                if !self.mutation.not_noted {
                    world.kept = Some(Runner { seen, starting: Some(Incarnation(process)), ..kept });
                }
                Process::Noted(proposal, process)
            }
            Process::Noted(proposal, process) => {
                world.requests.push(proposal.clone());
                Process::Proposed(proposal, process)
            }
            Process::Proposed(proposal, process) => match &world.register {
                Some(entry) if entry.proposal == proposal.id => Process::Granted(entry.term, process),
                found if *found == proposal.expected => return None,
                _ => {
                    world.kept = Some(Runner { starting: None, ..kept });
                    Process::Down
                }
            },
            Process::Granted(term, process) => {
                let starting = kept.starting.filter(|_| self.mutation.stays_noted);
                world.kept = Some(Runner { seen: term, active: Some(term), starting });
                world.untold |= world.needs.take().is_some();
                Process::Runs(process)
            }
            Process::Down | Process::Runs(_) => return None,
        };
        Some(())
    }

    fn start(&self, world: &mut World, allowed: Allowed) -> Option<()> {
        let (proposal, process) = (self.decided(world, allowed)?, self.process(world));
        let needed = match world.needs {
            Some(Needs::Boot) => allowed.boot_after_crash,
            Some(Needs::Again) => allowed.start_again,
            None => false,
        };
        if needed {
            world.word = Some(proposal.id);
        }
        world.born = world.born.max(process);
        world.process = Process::Decided(proposal, process);
        Some(())
    }
}

impl Model for Starts {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        let (register, kept, needs) = (None, None, None);
        let (process, requests) = (Process::Down, Vec::new());
        vec![World {
            register,
            kept,
            process,
            requests,
            born: 0,
            crashes: 0,
            needs,
            word: None,
            untold: false,
        }]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        match world.process {
            Process::Down => {
                let words = [(false, false), (true, false), (false, true)];
                steps.extend(words.map(|(boot, again)| Step::Start { boot, again }));
            }
            Process::Runs(_) => steps.push(Step::Stop),
            _ => steps.push(Step::GoOn),
        }
        if world.register.as_ref().is_none_or(|entry| entry.term.0 < self.terms) {
            steps.extend((0..world.requests.len()).map(Step::Land));
        }
        if world.crashes < self.crashes && world.process != Process::Down {
            steps.extend([true, false].map(|with_requests| Step::Crash { with_requests }));
        }
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        let mut next = world.clone();
        match step {
            Step::Start { boot, again } => {
                self.start(&mut next, Allowed { boot_after_crash: boot, start_again: again })?;
            }
            Step::GoOn => self.go_on(&mut next)?,
            Step::Land(request) => {
                let proposal = next.requests.swap_remove(request);
                if proposal.expected == next.register {
                    next.register = Some(proposal.entry());
                    if next.word == Some(proposal.id) {
                        (next.needs, next.word) = (None, None);
                    }
                }
                let register = next.register.clone();
                next.requests.retain(|request| request.expected == register);
            }
            Step::Stop => {
                let (Process::Runs(process), Some(entry)) = (&world.process, &world.register) else {
                    return None;
                };
                if entry.term.0 >= self.terms {
                    return None;
                }
                let id = ProposalId::of(Incarnation(*process), entry.term);
                let value = Value::Stopped { node: me(), reason: StopReason::Operator };
                next.register = Some(Proposal { id, expected: Some(entry.clone()), value }.entry());
                (next.process, next.needs) = (Process::Down, Some(Needs::Again));
                next.requests.clear();
            }
            Step::Crash { with_requests } => {
                next.crashes += 1;
                if matches!(next.process, Process::Runs(_)) {
                    next.needs = Some(Needs::Boot);
                }
                next.process = Process::Down;
                if with_requests {
                    next.requests.clear();
                }
            }
        }
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("what ran is not booted without a word", |_, world: &World| !world.untold),
            Property::always("what never ran can be started", |starts: &Self, world: &World| {
                let solo = !matches!(&world.register, Some(Entry { value: Value::Stopped { .. }, .. }));
                let free = world.process == Process::Down && world.needs.is_none() && solo;
                !free || starts.decided(world, Allowed::default()).is_some()
            }),
            Property::always("a word is enough", |starts: &Self, world: &World| {
                let all = Allowed { boot_after_crash: true, start_again: true };
                world.process != Process::Down || starts.decided(world, all).is_some()
            }),
            Property::sometimes("a start is cut off and goes on", |_, world: &World| {
                matches!(world.process, Process::Runs(_)) && world.crashes > 0 && world.born == 1
            }),
            Property::sometimes("a stopped vm runs again", |_, world: &World| {
                matches!(world.process, Process::Runs(_))
                    && world.register.as_ref().is_some_and(|e| e.term.0 > 2)
            }),
        ]
    }
}

/// What is broken, if anything is.
fn broken(mutation: Mutation) -> Option<&'static str> {
    let starts = Starts { terms: 6, crashes: 4, mutation };
    let checker = starts.checker().threads(2).finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    let found = checker.discoveries();
    let failed = |name: &&&'static str| checker.model().property(name).expectation.discovery_is_failure();
    let failed = found.keys().find(failed).copied();
    if failed.is_none() {
        for seen in ["a start is cut off and goes on", "a stopped vm runs again"] {
            assert!(found.contains_key(seen), "there was no {seen}");
        }
    }
    failed
}

#[test]
fn every_start_leaves_a_vm_that_can_be_started() {
    assert_eq!(broken(Mutation::default()), None);
}

#[test]
fn every_part_of_the_note_is_needed() {
    let none = Mutation::default();
    assert!(broken(Mutation { not_noted: true, ..none }).is_some());
    assert!(broken(Mutation { stays_noted: true, ..none }).is_some());
    assert!(broken(Mutation { drawn_anew: true, ..none }).is_some());
}
