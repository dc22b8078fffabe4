//! What all nodes of a simulated cluster share: time, chance, the network, the arbiter, and the account of what happened.

use colo_common::arbiter::Arbiter;
use colo_common::arbiter::scripted::{Fate, ScriptedArbiter};
use colo_common::membership::scripted::ScriptedMembership;
use colo_common::membership::{Claim, MembershipError};
use colo_common::register::{Answer, Entry, Proposal};
use colo_common::{Incarnation, NodeId, Point, ProposalId, Term, VmId};
use colo_primary::arbiter_worker::Found;
use colo_proto::frame::VmTag;
use colo_tests::seed::Seed;
use colo_vmm::memory::GuestMemory;
use colo_vmm::synthetic::SyntheticGuest;
use colo_vmm::{BootFile, BootSource, Disk, GuestSpec, MachineState, PagePool, ProtectedGuest};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crate::net::{Msg, Net, Way};
use crate::outside::Outside;
use crate::plan::{FRAMES, HASTE, MAX_NODES, Mutations, Plan, RETRY, Time};

/// Lines of the trace that are kept.
const TRACE: usize = 120;
/// The vms of a cluster.
const VMS: [&str; 3] = ["web", "mail", "shop"];
/// Some moment for wall clocks to begin at.
const WALL_CLOCK: u64 = 1_700_000_000_000;

thread_local! {
    /// The trace of the seed that this thread runs: it outlives a panic.
    static LINES: RefCell<VecDeque<String>> = const { RefCell::new(VecDeque::new()) };
}

/// Takes the last lines of this thread's trace.
pub(crate) fn trace() -> String {
    LINES.take().iter().map(|line| format!("{line}\n")).collect()
}

/// Everything but the nodes.
pub(crate) struct Common {
    pub(crate) now: Time,
    pub(crate) seed: Seed,
    pub(crate) plan: Plan,
    pub(crate) mutations: Mutations,
    pub(crate) net: Net,
    pub(crate) arbiter: Arc<ScriptedArbiter>,
    /// Who is there, in a cluster.
    pub(crate) membership: Option<ScriptedMembership>,
    /// Claims of which the claimant has heard that they were granted.
    pub(crate) claimed: Vec<Claim>,
    /// What becomes of all that a node asks the arbiter, if it cannot speak to it both ways.
    pub(crate) cut_off: [Option<Fate>; MAX_NODES],
    /// Milliseconds that each node's wall clock is wrong by.
    pub(crate) wrong_by: [i64; MAX_NODES],
    pub(crate) outside: Outside,
    pub(crate) counts: Counts,
    /// Proposals to run the guest by an operator's word alone.
    pub(crate) forced: BTreeSet<ProposalId>,
    traced: bool,
    vm: VmId,
    spec: GuestSpec,
    pub(crate) pool: PagePool,
    /// Where virtual time begins, for parts that want an instant.
    began: Instant,
    /// Processes and copies are numbered, so that a seed repeats itself.
    drawn: u128,
}

/// How often what happened.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counts(pub(crate) BTreeMap<&'static str, u64>);

impl Counts {
    pub(crate) fn add(&mut self, what: &'static str, times: u64) {
        *self.0.entry(what).or_default() += times;
    }

    pub(crate) fn of(&self, what: &str) -> u64 {
        self.0.get(what).copied().unwrap_or(0)
    }

    pub(crate) fn merge(&mut self, other: &Self) {
        other.0.iter().for_each(|(what, times)| self.add(what, *times));
    }
}

impl Common {
    pub(crate) fn new(number: u64, mutations: Mutations, traced: bool) -> Self {
        let mut seed = Seed::new(number.wrapping_mul(0x2545_f491_4f6c_dd1d));
        let mut plan = Plan::of(&mut seed);
        if mutations.often_other_policy {
            plan.change_policy_often();
        }
        if mutations.often_failing {
            plan.fail_often();
        }
        let arbiter = Arc::new(ScriptedArbiter::seeded(seed.next_u64(), plan.arbiter));
        Self::of(0, (seed, plan), arbiter, mutations, traced)
    }

    /// Of one vm of a cluster, whose processes draw numbers of their own.
    pub(crate) fn of(
        vm: usize,
        (seed, plan): (Seed, Plan),
        arbiter: Arc<ScriptedArbiter>,
        mutations: Mutations,
        traced: bool,
    ) -> Self {
        let image = BootFile { path: "none".into(), bytes: Vec::new().into() };
        let boot = BootSource::Flat { image, address: 1 << 16 };
        let mut spec = GuestSpec::new("simulated", FRAMES * 4096, boot);
        spec.vcpus = plan.vcpus;
        Self {
            now: 0,
            net: Net::new(plan.latency),
            arbiter,
            membership: None,
            claimed: Vec::new(),
            cut_off: [None; MAX_NODES],
            wrong_by: [0; MAX_NODES],
            seed,
            mutations,
            outside: Outside::default(),
            counts: Counts::default(),
            forced: BTreeSet::new(),
            traced,
            vm: VMS[vm].parse().expect("a name"),
            spec,
            pool: PagePool::default(),
            began: Instant::now(),
            drawn: 1000 + ((vm as u128) << 32),
            plan,
        }
    }

    /// Whether a node that runs the guest by an entry of `term` does so by an operator's word: that counts until a guest
    /// has begun to run by it, also for the node's next process.
    pub(crate) fn is_forced(&self, node: usize, term: Term) -> bool {
        let begun = self.outside.begun();
        let of_node = |entry: &Entry| *entry.value.runner() == name(node);
        let forced = |entry: &&Entry| self.forced.contains(&entry.proposal) && of_node(entry);
        !self.forced.is_empty()
            && self
                .arbiter
                .entries(&self.vm)
                .iter()
                .filter(forced)
                .any(|entry| entry.term > begun && entry.term <= term)
    }

    /// Asks who is there, as far as this node can.
    pub(crate) fn ask_membership<T>(
        &self,
        node: usize,
        ask: impl FnOnce(&ScriptedMembership) -> Result<T, MembershipError>,
    ) -> Result<T, MembershipError> {
        let membership = self.membership.as_ref().expect("a cluster");
        membership.script(self.cut_off[node]);
        ask(membership)
    }

    pub(crate) fn count(&mut self, what: &'static str) {
        self.counts.add(what, 1);
    }

    /// Notes a line of the trace, if there is one.
    pub(crate) fn note(&mut self, node: usize, line: impl FnOnce() -> String) {
        if self.traced {
            let line = format!("{:5} {} {} {}", self.now, self.vm, name(node), line());
            LINES.with_borrow_mut(|lines| {
                if lines.len() == TRACE {
                    lines.pop_front();
                }
                lines.push_back(line);
            });
        }
    }

    pub(crate) fn draw(&mut self) -> u128 {
        self.drawn += 1;
        self.drawn << 64
    }

    pub(crate) fn vm(&self) -> &VmId {
        &self.vm
    }

    pub(crate) fn tag(&self) -> VmTag {
        VmTag::of(&self.vm)
    }

    pub(crate) fn digest(&self) -> u64 {
        self.spec.digest()
    }

    /// A guest around memory and a disk; it is not booted.
    pub(crate) fn guest(&self, memory: Arc<GuestMemory>, disk: Arc<dyn Disk>) -> SyntheticGuest {
        SyntheticGuest::with_memory(self.spec.clone(), self.plan.guest.clone(), memory)
            .and_then(|guest| guest.with_disk(disk))
            .expect("a guest of the plan")
    }

    /// A disk is said to be at `point`, as the machine of this state left it.
    pub(crate) fn check_disk(
        &mut self,
        what: &str,
        point: Point,
        state: &MachineState,
        memory: Arc<GuestMemory>,
        disk: Arc<dyn Disk>,
    ) {
        let mut guest = self.guest(memory, disk);
        guest.restore(state).expect("the state is of this guest");
        self.outside.check_disk(what, point, &guest);
    }

    pub(crate) fn memory(&self) -> Arc<GuestMemory> {
        Arc::new(GuestMemory::new(self.spec.memory_bytes).expect("memory for a guest"))
    }

    /// This instant of virtual time, as it is for parts that only count.
    pub(crate) fn instant(&self) -> Instant {
        self.began + Duration::from_millis(self.now)
    }

    /// What a node's wall clock shows, which may be anything.
    pub(crate) fn wall_clock(&self, node: usize) -> SystemTime {
        let right = Duration::from_millis(WALL_CLOCK + self.now * HASTE);
        let wrong = Duration::from_millis(self.wrong_by[node].unsigned_abs());
        let right = SystemTime::UNIX_EPOCH + right;
        if self.wrong_by[node] < 0 { right - wrong } else { right + wrong }
    }

    pub(crate) fn chance(&mut self, rate: u64) -> bool {
        rate > 0 && self.seed.below(10_000) < rate
    }

    pub(crate) fn send(&mut self, link: u64, way: Way, message: Msg) {
        self.net.send(link, way, message, self.now, &mut self.seed);
    }

    pub(crate) fn close(&mut self, link: u64, side: usize) {
        self.net.close(link, side, self.now, &mut self.seed);
    }
}

pub(crate) fn name(node: usize) -> NodeId {
    ["a", "b", "c", "d", "e", "f", "g", "h"][node].parse().expect("a name")
}

pub(crate) fn index(node: &NodeId) -> usize {
    (0..MAX_NODES).find(|&at| name(at) == *node).expect("a node of the cluster")
}

/// Mirrors `arbiter_worker`: one call at a time, a proposal in front of reads, and no end of trying. What is asked
/// takes effect before the answer is there.
#[derive(Debug)]
pub(crate) struct ArbiterClient {
    node: usize,
    proposal: Option<Proposal>,
    read: bool,
    busy_until: Time,
    answers: VecDeque<(Time, Found)>,
    /// What the trace has of the register.
    noted: Option<Term>,
}

impl ArbiterClient {
    /// Of a process on this node.
    pub(crate) fn of(node: usize) -> Self {
        Self { node, proposal: None, read: false, busy_until: 0, answers: VecDeque::new(), noted: None }
    }

    pub(crate) fn propose(&mut self, proposal: Proposal) {
        self.proposal = Some(proposal);
    }

    pub(crate) fn read(&mut self) {
        self.read = true;
    }

    /// What the worker has found by now.
    pub(crate) fn poll(&mut self, common: &mut Common) -> Option<Found> {
        if common.now >= self.busy_until && (self.proposal.is_some() || self.read) {
            self.call(common);
        }
        match self.answers.front() {
            Some((at, _)) if *at <= common.now => self.answers.pop_front().map(|(_, found)| found),
            _ => None,
        }
    }

    /// Notes what is news.
    pub(crate) fn note(&mut self, node: usize, found: &Found, common: &mut Common) {
        match found {
            Found::Answer(_, Answer::Applied(entry)) => common.note(node, || format!("is granted: {entry}")),
            Found::Answer(_, Answer::Refused(found)) => {
                common.note(node, || format!("is refused: {found:?}"));
            }
            Found::Entry(Some(entry)) if self.noted != Some(entry.term) => {
                self.noted = Some(entry.term);
                common.note(node, || format!("reads {entry}"));
            }
            _ => {}
        }
    }

    fn call(&mut self, common: &mut Common) {
        let answered = common.now + 1 + common.seed.below(2 * common.plan.latency);
        self.busy_until = answered.max(common.now + RETRY);
        common.arbiter.script(common.cut_off[self.node]);
        let found = match self.proposal.take() {
            Some(proposal) => match common.arbiter.propose(&common.vm, &proposal) {
                Ok(answer) => Some(Found::Answer(proposal.id, answer)),
                Err(_) => {
                    common.count("arbiter silent");
                    self.proposal = Some(proposal);
                    None
                }
            },
            None => match common.arbiter.read(&common.vm) {
                Ok(entry) => {
                    self.read = false;
                    Some(Found::Entry(entry))
                }
                Err(_) => None,
            },
        };
        if let Some(found) = found {
            self.busy_until = answered;
            self.answers.push_back((answered, found));
        }
    }
}

/// A process' number.
pub(crate) fn incarnation(common: &mut Common) -> Incarnation {
    Incarnation(common.draw())
}
