//! What can happen next, and what then becomes of the world. Each step calls the decision of one node (or of two, at
//! the ends of a new link) and does what it answers, as the nodes do.

use colo_common::register::{Entry, Proposal, StopReason, Value};
use colo_common::{Point, Term};
use colo_primary::replicator::{self, Entitled, Offer, Phase, Request};
use colo_secondary::replica::{self, AckPolicy, Copy, Start};

use crate::world::{
    Broken, Came, Config, Follower, Ghost, Message, Pages, Role, Runner, Store, World, incarnation, index,
    name, replica_id,
};

/// Something that happens. The numbers are nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Step {
    /// The guest made output and is cut.
    Cut(usize),
    /// The cut of J.
    Join(usize),
    /// The guest powered itself off, and is cut.
    PowerOff(usize),
    TakeAck(usize),
    RunnerLosesLink(usize),
    Seed(usize, usize),
    Relink(usize, usize),
    GoSolo(usize),
    Stop(usize),
    /// The answer to a proposal, or a plain read.
    Learn(usize),
    /// The old value is read back while a proposal has no answer.
    ReadOldValue(usize),
    /// A runner that lost its term ends its process.
    Leave(usize),
    Deliver(usize),
    Persist(usize),
    /// The store does what it was told about the replica id.
    DoOrder(usize),
    FollowerLosesLink(usize),
    Promote(usize),
    Observe(usize),
    HandBack(usize, usize),
    SwitchPolicy(usize),
    StartAgain(usize),
    /// The request with this index reaches the register.
    Land(usize),
    /// The process dies; with what it had sent, or that still arrives.
    Crash(usize, bool),
    Restart(usize),
}

/// All steps that may be possible.
pub(crate) fn steps(world: &World, config: &Config, steps: &mut Vec<Step>) {
    let nodes = 0..world.nodes.len();
    for x in nodes.clone() {
        match &world.nodes[x].role {
            Role::Down => steps.push(Step::Restart(x)),
            Role::Runner(runner) => {
                runner_steps(world, config, x, runner, steps);
                for f in nodes.clone().filter(|&f| f != x && world.follower(f).is_some()) {
                    steps.push(match runner.replicator.phase() {
                        Phase::Alone => Step::Seed(x, f),
                        Phase::Paired { .. } => Step::Relink(x, f),
                        Phase::Lost { .. } => Step::HandBack(f, x),
                        _ => continue,
                    });
                }
            }
            Role::Follower(follower) => follower_steps(world, config, x, follower, steps),
        }
        if world.spent.crashes < config.crashes && world.nodes[x].role != Role::Down {
            steps.push(Step::Crash(x, false));
            if world.requests.iter().any(|(sender, _)| *sender == x) {
                steps.push(Step::Crash(x, true));
            }
        }
    }
    if world.register.term.0 < config.terms {
        steps.extend((0..world.requests.len()).map(Step::Land));
    }
}

fn runner_steps(world: &World, config: &Config, x: usize, runner: &Runner, steps: &mut Vec<Step>) {
    let running = !runner.halted;
    let room = runner.peer.and_then(|f| world.follower(f)).is_none_or(|f| f.inbox.len() < config.queue);
    if running && room && world.spent.cuts < config.cuts {
        let seeding = matches!(runner.replicator.phase(), Phase::Seeding { .. });
        steps.push(if seeding { Step::Join(x) } else { Step::Cut(x) });
        if world.spent.stops < config.stops {
            steps.push(Step::PowerOff(x));
        }
    }
    if runner.ack.is_some() {
        steps.push(Step::TakeAck(x));
    }
    if runner.peer.is_some() {
        steps.push(Step::RunnerLosesLink(x));
    }
    steps.push(Step::Learn(x));
    match runner.replicator.phase() {
        Phase::Paired { .. } => steps.push(Step::GoSolo(x)),
        Phase::Joining { .. } if config.runner.void_join_counts => steps.push(Step::GoSolo(x)),
        Phase::Lost { .. } => steps.push(Step::Leave(x)),
        _ => {}
    }
    if running && world.spent.stops < config.stops {
        steps.push(Step::Stop(x));
    }
    if config.runner.old_value_is_refusal {
        steps.push(Step::ReadOldValue(x));
    }
}

fn follower_steps(world: &World, config: &Config, x: usize, follower: &Follower, steps: &mut Vec<Step>) {
    if !follower.inbox.is_empty() {
        steps.push(Step::Deliver(x));
    }
    if !follower.orders.is_empty() {
        steps.push(Step::DoOrder(x));
    }
    if follower.replica.source().is_some() {
        steps.push(Step::FollowerLosesLink(x));
    }
    if matches!(follower.replica.copy(), Copy::Whole { .. }) {
        steps.push(Step::Persist(x));
    }
    if follower.asked.is_some() {
        steps.push(Step::Learn(x));
    } else {
        steps.extend([Step::Promote(x), Step::Observe(x)]);
        if config.stops > 0 {
            steps.push(Step::StartAgain(x));
        }
    }
    if world.spent.switches < config.switches {
        steps.push(Step::SwitchPolicy(x));
    }
}

/// The world after `step`, if it is possible.
pub(crate) fn take(world: &World, config: &Config, step: Step) -> Option<World> {
    let mut next = world.clone();
    let mut surroundings = Surroundings { world: &mut next, config };
    surroundings.step(step)?;
    surroundings.let_out();
    Some(next)
}

/// What carries out the decisions.
struct Surroundings<'a> {
    world: &'a mut World,
    config: &'a Config,
}

impl Surroundings<'_> {
    fn step(&mut self, step: Step) -> Option<()> {
        match step {
            Step::Cut(x) => self.cut(x, None, false),
            Step::Join(x) => self.cut(x, None, true),
            Step::PowerOff(x) => {
                self.world.spent.stops += 1;
                self.world.runner_mut(x).halted = true;
                self.cut(x, Some(Request::End), false)
            }
            Step::TakeAck(x) => self.take_ack(x),
            Step::RunnerLosesLink(x) => self.runner_loses_link(x),
            Step::Seed(x, f) => self.seed(x, f),
            Step::Relink(x, f) => self.relink(x, f),
            Step::GoSolo(x) => self.go_solo(x),
            Step::Stop(x) => self.stop(x),
            Step::Learn(x) => self.learn(x),
            Step::ReadOldValue(x) => self.read_old_value(x),
            Step::Leave(x) => {
                self.world.node(x).role = Role::Down;
                Some(())
            }
            Step::Deliver(x) => self.deliver(x),
            Step::Persist(x) => self.persist(x),
            Step::DoOrder(x) => self.do_order(x),
            Step::FollowerLosesLink(x) => {
                self.world.follower(x)?.replica.source()?;
                self.follower_loses_link(x)
            }
            Step::Promote(x) => self.promote(x),
            Step::Observe(x) => self.observe(x),
            Step::HandBack(x, runner) => self.hand_back(x, runner),
            Step::SwitchPolicy(x) => self.switch_policy(x),
            Step::StartAgain(x) => {
                let register = self.world.register.clone();
                let actions = self.world.follower_mut(x).replica.start_again(Some(&register)).ok()?;
                let this = self.world.node(x);
                this.store.starting = !self.config.surroundings.start_is_not_noted;
                this.told = Some(this.born);
                self.act_follower(x, actions);
                Some(())
            }
            Step::Land(request) => {
                let (_, proposal) = self.world.requests.swap_remove(request);
                self.world.register = proposal.entry();
                self.world.requests.clear();
                Some(())
            }
            Step::Crash(x, with_requests) => {
                self.world.spent.crashes += 1;
                self.world.node(x).role = Role::Down;
                if with_requests {
                    self.world.requests.retain(|(sender, _)| *sender != x);
                }
                Some(())
            }
            Step::Restart(x) => {
                let this = self.world.node(x);
                this.born += u8::from(!this.store.starting);
                self.world.start(x, self.config);
                let register = self.world.register.clone();
                let actions = self.world.follower_mut(x).replica.observe(Some(&register));
                self.act_follower(x, actions);
                Some(())
            }
        }
    }

    /// Rule 1: whatever may go out, does.
    fn let_out(&mut self) {
        for x in 0..self.world.nodes.len() {
            let Some(runner) = self.world.runner(x) else { continue };
            let out = match runner.replicator.entitled() {
                Entitled::Nothing => continue,
                Entitled::All => runner.tip,
                Entitled::UpTo(epoch) => runner.tip.until(epoch),
            };
            if self.world.seen.is_within(out) {
                self.world.seen = out;
            } else if !out.is_within(self.world.seen) {
                self.world.broken = Some(Broken::TwoHistories);
            }
        }
    }

    fn cut(&mut self, x: usize, request: Option<Request>, join: bool) -> Option<()> {
        self.world.spent.cuts += 1;
        let runner = self.world.runner_mut(x);
        let made = Ghost::of(x, runner.replicator.next_point());
        runner.tip = runner.tip.with(made);
        let carried = Pages(std::mem::take(&mut runner.open).0.with(made));
        let (point, ship, actions) = runner.replicator.cut(carried, request, join);
        let base = join.then(|| std::mem::take(&mut runner.base));
        let (to, term, peer) = (runner.tip, runner.replicator.register().term, runner.peer);
        self.world.node(x).store.disk = Some(to);
        if ship {
            self.send(x, peer, Message::Epoch { term, point, base, carried, to });
        }
        self.act_runner(x, actions);
        Some(())
    }

    fn go_solo(&mut self, x: usize) -> Option<()> {
        if self.world.runner(x)?.replicator.is_proposing() {
            return None;
        }
        let actions = self.world.runner_mut(x).replicator.go_solo();
        self.act_runner(x, actions);
        Some(())
    }

    fn stop(&mut self, x: usize) -> Option<()> {
        self.world.spent.stops += 1;
        let runner = self.world.runner_mut(x);
        runner.halted = true;
        let actions = runner.replicator.stop(StopReason::Operator);
        self.act_runner(x, actions);
        Some(())
    }

    fn read_old_value(&mut self, x: usize) -> Option<()> {
        let register = self.world.register.clone();
        let runner = self.world.runner_mut(x);
        runner.asked.take_if(|asked| asked.expected.as_ref() == Some(&register))?;
        let actions = runner.replicator.observe(Some(register));
        self.act_runner(x, actions);
        Some(())
    }

    /// What the other end does not listen to any more is lost.
    fn send(&mut self, x: usize, peer: Option<usize>, message: Message) {
        let Some(f) = peer else { return };
        if self.world.follower(f).is_some_and(|follower| follower.replica.source() == Some(&name(x))) {
            self.world.follower_mut(f).inbox.push(message);
        }
    }

    fn take_ack(&mut self, x: usize) -> Option<()> {
        let runner = self.world.runner_mut(x);
        let ack = runner.ack.take()?;
        match runner.replicator.ack(ack) {
            Ok(actions) => {
                self.act_runner(x, actions);
                Some(())
            }
            Err(_) => self.runner_loses_link(x),
        }
    }

    fn runner_loses_link(&mut self, x: usize) -> Option<()> {
        let runner = self.world.runner_mut(x);
        runner.peer.take()?;
        runner.ack = None;
        let actions = runner.replicator.link_lost();
        self.act_runner(x, actions);
        if matches!(self.world.runner(x)?.replicator.phase(), Phase::Alone) {
            self.forget_seed(x);
        }
        Some(())
    }

    fn forget_seed(&mut self, x: usize) {
        let runner = self.world.runner_mut(x);
        (runner.open, runner.base) = (Pages::default(), Ghost::default());
    }

    fn seed(&mut self, x: usize, f: usize) -> Option<()> {
        let runner = self.world.runner_mut(x);
        if runner.peer.is_some() || runner.halted {
            return None;
        }
        let term = runner.replicator.register().term;
        runner.replicator.seed(name(f)).ok()?;
        (runner.peer, runner.ack, runner.base) = (Some(f), None, runner.tip);
        runner.open = Pages::default();
        let follower = self.world.follower_mut(f);
        follower.replica.accept_seed(&name(x), term).ok()?;
        follower.inbox.clear();
        follower.orders.clear();
        follower.held = Ghost::default();
        let active = follower.replica.is_active();
        let store = &mut self.world.node(f).store;
        if self.config.surroundings.seed_leaves_store {
            store.active = active;
        } else {
            let disk = store.disk.filter(|_| active);
            *store = Store { active, disk, ..Store::default() };
        }
        Some(())
    }

    fn relink(&mut self, x: usize, f: usize) -> Option<()> {
        let offer = match self.world.follower(f)?.replica.copy() {
            Copy::Whole { replica, staged, .. } => {
                Offer { replica: Some(*replica), staged: Some(*staged), ..Offer::default() }
            }
            _ => return None,
        };
        let runner = self.world.runner_mut(x);
        if runner.peer.is_some() {
            return None;
        }
        runner.replicator.relink(&name(f), &offer).ok()?;
        (runner.peer, runner.ack) = (Some(f), None);
        let (term, wanted) = (runner.replicator.register().term, offer.replica?);
        let follower = self.world.follower_mut(f);
        let actions = follower.replica.accept_link(&name(x), term, wanted).ok()?;
        follower.inbox.clear();
        self.act_follower(f, actions);
        Some(())
    }

    fn learn(&mut self, x: usize) -> Option<()> {
        let register = self.world.register.clone();
        if let Role::Follower(follower) = &mut self.world.node(x).role {
            let asked = follower.asked.take_if(|asked| asked.expected.as_ref() != Some(&register))?;
            let answer = asked.judge(Some(&register));
            let actions = follower.replica.answer(asked.id, answer);
            if !follower.replica.is_starting() {
                let this = self.world.node(x);
                (this.store.starting, this.told) = (false, None);
            }
            self.act_follower(x, actions);
            return Some(());
        }
        let runner = self.world.runner_mut(x);
        let actions = if runner.asked.is_some() {
            let asked = runner.asked.take_if(|asked| asked.expected.as_ref() != Some(&register))?;
            runner.replicator.answer(asked.id, asked.judge(Some(&register)))
        } else {
            let known = match runner.replicator.phase() {
                Phase::Lost { to } => to.term,
                _ => runner.replicator.register().term,
            };
            if known >= register.term {
                return None;
            }
            runner.replicator.observe(Some(register.clone()))
        };
        self.act_runner(x, actions);
        let peer = self.world.runner(x).and_then(|runner| {
            runner.peer.filter(|_| matches!(runner.replicator.phase(), Phase::Paired { .. }))
        });
        self.send(x, peer, Message::Term(register.term));
        Some(())
    }

    fn act_runner(&mut self, x: usize, actions: Vec<replicator::Action<Pages>>) {
        for action in actions {
            match action {
                replicator::Action::Propose(proposal) => {
                    self.world.runner_mut(x).asked = Some(proposal.clone());
                    self.request(x, proposal);
                }
                replicator::Action::MergeBack(Pages(carried)) => {
                    let runner = self.world.runner_mut(x);
                    runner.open = Pages(runner.open.0.with(carried));
                }
                replicator::Action::Detach => {
                    let runner = self.world.runner_mut(x);
                    (runner.peer, runner.ack) = (None, None);
                    self.forget_seed(x);
                }
                replicator::Action::ResetGuest | replicator::Action::Covered(..) => {}
                replicator::Action::Park => self.world.runner_mut(x).halted = true,
                replicator::Action::Unpark => {
                    let runner = self.world.runner_mut(x);
                    (runner.halted, runner.came) = (false, Came::HandedBack);
                }
                replicator::Action::End(_) => {
                    self.world.node(x).role = Role::Down;
                    return;
                }
            }
        }
    }

    /// A request that expects another entry than the present one can never be applied.
    fn request(&mut self, x: usize, proposal: Proposal) {
        if proposal.expected.as_ref() == Some(&self.world.register) {
            self.world.requests.push((x, proposal));
            self.world.requests.sort_by_key(|(_, proposal)| proposal.id);
        }
    }

    fn deliver(&mut self, x: usize) -> Option<()> {
        let follower = self.world.follower_mut(x);
        let message = follower.inbox.remove(0);
        let term = match &message {
            Message::Term(term) | Message::Epoch { term, .. } => *term,
        };
        let heard = follower.replica.hear_term(term);
        let Ok(actions) = heard else { return self.follower_loses_link(x) };
        self.act_follower(x, actions);
        let Message::Epoch { point, base, carried: Pages(carried), to, .. } = message else {
            return Some(());
        };
        let follower = self.world.follower_mut(x);
        let staged = match base {
            Some(base) => {
                follower.held = base;
                follower.replica.whole(point, replica_id(x, point))
            }
            None => follower.replica.staged(point),
        };
        let Ok(actions) = staged else { return self.follower_loses_link(x) };
        let held = follower.held;
        follower.held = to;
        if !held.is_within(to) {
            self.world.broken = Some(Broken::NotAnAncestor);
        } else if held.with(carried) != to {
            self.world.broken = Some(Broken::LostPage);
        }
        self.act_follower(x, actions);
        Some(())
    }

    fn follower_loses_link(&mut self, x: usize) -> Option<()> {
        let follower = self.world.follower_mut(x);
        follower.replica.link_lost();
        follower.inbox.clear();
        Some(())
    }

    fn persist(&mut self, x: usize) -> Option<()> {
        let follower = self.world.follower(x)?;
        let Copy::Whole { replica, staged, persisted, .. } = *follower.replica.copy() else { return None };
        if persisted == Some(staged) {
            return None;
        }
        let held = follower.held;
        let store = &mut self.world.node(x).store;
        (store.disk, store.image) = (Some(held), Some((staged, held)));
        let actions = self.world.follower_mut(x).replica.persisted(replica, staged);
        self.act_follower(x, actions);
        Some(())
    }

    fn do_order(&mut self, x: usize) -> Option<()> {
        let this = self.world.node(x);
        let Role::Follower(follower) = &mut this.role else { return None };
        let &(store, id) = follower.orders.first()?;
        if store && this.store.image.is_none() {
            return None; // Not before the copy's first mark.
        }
        follower.orders.remove(0);
        this.store.id = store.then_some(id);
        let actions = if store { follower.replica.id_stored(id) } else { follower.replica.id_erased(id) };
        self.act_follower(x, actions);
        Some(())
    }

    fn promote(&mut self, x: usize) -> Option<()> {
        let register = self.world.register.clone();
        let worth_it = match &register.value {
            Value::Paired { secondary, .. } => *secondary == name(x),
            _ => self.config.follower.promote_stopped,
        };
        if !worth_it {
            return None;
        }
        let actions = self.world.follower_mut(x).replica.promote(Some(&register)).ok()?;
        self.act_follower(x, actions);
        Some(())
    }

    /// A plain read. It matters only when a request of a dead process has landed.
    fn observe(&mut self, x: usize) -> Option<()> {
        let register = self.world.register.clone();
        if !matches!(register.value, Value::Solo { .. }) {
            return None;
        }
        let actions = self.world.follower_mut(x).replica.observe(Some(&register));
        if actions.is_empty() {
            return None;
        }
        self.act_follower(x, actions);
        Some(())
    }

    fn hand_back(&mut self, x: usize, f: usize) -> Option<()> {
        let Phase::Lost { to } = self.world.runner(f)?.replicator.phase() else { return None };
        let (lost_to, process): (Term, _) = (to.term, incarnation(f, self.world.nodes[f].born));
        let register: Entry = self.world.register.clone();
        let follower = self.world.follower_mut(x);
        let actions = follower.replica.hand_back(Some(&register), &name(f), process, lost_to).ok()?;
        self.act_follower(x, actions);
        Some(())
    }

    fn switch_policy(&mut self, x: usize) -> Option<()> {
        self.world.spent.switches += 1;
        let this = self.world.node(x);
        this.policy = match this.policy {
            AckPolicy::Memory => AckPolicy::Disk,
            AckPolicy::Disk => AckPolicy::Memory,
        };
        let policy = this.policy;
        let actions = self.world.follower_mut(x).replica.change_policy(policy);
        self.act_follower(x, actions);
        Some(())
    }

    fn act_follower(&mut self, x: usize, actions: Vec<replica::Action>) {
        for action in actions {
            match action {
                replica::Action::Propose(proposal) => {
                    self.world.follower_mut(x).asked = Some(proposal.clone());
                    self.request(x, proposal);
                }
                replica::Action::Ack(ack) => {
                    let source = self.world.follower(x).and_then(|follower| follower.replica.source());
                    let Some(runner) = source.map(index) else { continue };
                    if self.world.runner(runner).is_some_and(|runner| runner.peer == Some(x)) {
                        self.world.runner_mut(runner).ack = Some(ack);
                    }
                }
                replica::Action::StoreId(id) => self.world.follower_mut(x).orders.push((true, id)),
                replica::Action::EraseId(id) => self.world.follower_mut(x).orders.push((false, id)),
                replica::Action::Run(start, entry) => {
                    assert_eq!(entry, self.world.register, "runs by an entry that is over");
                    return self.run(x, start);
                }
            }
        }
    }

    fn run(&mut self, x: usize, start: Start) {
        match start {
            Start::Promote(Point { epoch, .. }) => {
                let from = self.world.follower_mut(x).held.until(epoch);
                self.world.begin(x, from, Came::Promoted, self.config);
            }
            Start::Boot => {
                let from = self.world.nodes[x].store.disk.unwrap_or_default();
                self.world.begin(x, from, Came::Booted, self.config);
            }
        }
    }
}
