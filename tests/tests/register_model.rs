//! Rules 1 to 5 of the design, checked exhaustively for small bounds on the very decisions that the nodes make: every
//! order of cuts, acks, losses, crashes, operators' words and late requests. A rule left out must be noticed.

#[path = "register_model/steps.rs"]
mod steps;
#[path = "register_model/world.rs"]
mod world;

use colo_common::register::Value;
use colo_primary::replicator::{self, Entitled};
use colo_secondary::replica::{self, AckPolicy, Copy};
use stateright::{Checker, HasDiscoveries, Model, Property};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};
use steps::{Step, steps, take};
use world::{Broken, Came, Config, Mutation, Role, World, incarnation, index, name};

/// Cores of a small test machine.
const THREADS: usize = 2;

/// Far more than any of these checks takes: an endless one shall say which it is.
const LIMIT: Duration = Duration::from_secs(600);

fn memory() -> Config {
    Config {
        nodes: 2,
        policy: AckPolicy::Memory,
        boot: true,
        paired: false,
        terms: 5,
        cuts: 2,
        crashes: 1,
        stops: 0,
        switches: 0,
        queue: 2,
        runner: replicator::Mutation::default(),
        follower: replica::Mutation::default(),
        surroundings: Mutation::default(),
    }
}

fn disk() -> Config {
    Config { policy: AckPolicy::Disk, ..memory() }
}

struct Protocol(Config);

impl Model for Protocol {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        let mut world = World::new(&self.0);
        if self.0.paired {
            for step in pairing(self.0.policy) {
                world = take(&world, &self.0, step).expect("a step of pairing");
            }
            world.spent = world::Spent::default();
        }
        vec![world]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Step>) {
        if world.broken.is_none() {
            steps(world, &self.0, actions);
        }
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        take(world, &self.0, step)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("what is released belongs to one history", |_, world| one_history(world)),
            Property::always("at most one node runs alone", |_, world: &World| {
                (0..world.nodes.len()).filter(|&x| runs_alone(world, x)).count() <= 1
            }),
            Property::always("no epoch on a copy that is not its ancestor", |_, world: &World| {
                world.broken != Some(Broken::NotAnAncestor)
            }),
            Property::always("no boot without a word", |_, world: &World| {
                world.broken != Some(Broken::UntoldBoot)
            }),
            Property::always("a start that was granted goes on", |protocol: &Self, world: &World| {
                (0..world.nodes.len()).all(|x| goes_on(&protocol.0, world, x))
            }),
            Property::always("no lost page", |_, world: &World| world.broken != Some(Broken::LostPage)),
            Property::always("memory: acked survives the primary", |_, world| survives_the_primary(world)),
            Property::always("disk: acked survives both", |protocol: &Self, world: &World| {
                survives_both(&protocol.0, world)
            }),
            Property::sometimes("promotion", |_, world| came(world, Came::Promoted)),
            Property::sometimes("boot", |_, world| came(world, Came::Booted)),
            Property::sometimes("hand-back", |_, world| came(world, Came::HandedBack)),
            Property::sometimes("stop", |_, world: &World| {
                matches!(world.register.value, Value::Stopped { .. })
            }),
            Property::sometimes("switch of policy", |protocol: &Self, world: &World| {
                (0..world.nodes.len()).filter_map(|x| world.follower(x)).any(|follower| {
                    matches!(follower.replica.copy(), Copy::Whole { .. })
                        && follower.replica.policy() != protocol.0.policy
                })
            }),
        ]
    }
}

/// From Solo to Paired; the last ack is on its way.
fn pairing(policy: AckPolicy) -> Vec<Step> {
    let mut steps = vec![Step::Seed(0, 1), Step::Join(0), Step::Deliver(1)];
    if policy == AckPolicy::Disk {
        steps.extend([Step::Persist(1), Step::DoOrder(1)]);
    }
    steps.extend([Step::TakeAck(0), Step::Land(0), Step::Learn(0), Step::Deliver(1)]);
    steps
}

fn runs_alone(world: &World, x: usize) -> bool {
    world.runner(x).is_some_and(|runner| runner.replicator.entitled() == Entitled::All)
}

fn came(world: &World, how: Came) -> bool {
    (0..world.nodes.len()).filter_map(|x| world.runner(x)).any(|runner| runner.came == how)
}

/// The operator's word was granted and cut off before anything ran: the next process needs no other.
fn goes_on(config: &Config, world: &World, x: usize) -> bool {
    let node = &world.nodes[x];
    let granted =
        node.told.is_some_and(|born| world.register.value.is_solo_of(&name(x), incarnation(x, born)));
    if node.role != Role::Down || !granted {
        return true;
    }
    let next = take(world, config, Step::Restart(x)).expect("a node that is down can be started");
    next.follower(x).is_some_and(|follower| follower.asked.is_some())
}

/// Also of what will be: who may let everything out, and whom the register names, has all that is out.
fn one_history(world: &World) -> bool {
    let lacks = |x: usize| {
        let Some(runner) = world.runner(x) else { return false };
        let register = runner.replicator.register();
        let named = matches!(register.value, Value::Paired { .. }) && *register == world.register;
        (named || runs_alone(world, x)) && !world.seen.is_within(runner.tip)
    };
    world.broken != Some(Broken::TwoHistories) && !(0..world.nodes.len()).any(lacks)
}

/// Whoever follows as the replica that the register names has all that is out.
fn survives_the_primary(world: &World) -> bool {
    let Value::Paired { secondary, replica: named, .. } = &world.register.value else { return true };
    world.follower(index(secondary)).is_none_or(|follower| match follower.replica.copy() {
        Copy::Whole { replica, .. } if replica == named => world.seen.is_within(follower.held),
        _ => true,
    })
}

/// The store that can show the id which the register names has all that is out; and under `disk` it can.
fn survives_both(config: &Config, world: &World) -> bool {
    let Value::Paired { secondary, replica: named, .. } = &world.register.value else { return true };
    let node = &world.nodes[index(secondary)];
    let shown = node.store.id == Some(*named);
    let must = match &node.role {
        Role::Follower(follower) => {
            let (policy, copy) = (follower.replica.policy(), follower.replica.copy());
            policy == AckPolicy::Disk && matches!(copy, Copy::Whole { named: true, .. })
        }
        _ => false,
    };
    let always = config.policy == AckPolicy::Disk && config.switches == 0;
    let has_all = node.store.image.is_some_and(|(_, held)| world.seen.is_within(held));
    if shown { has_all } else { !must && !always }
}

/// Checks everything that can happen; stops at the first rule that is broken. Answers which, and how it came about.
/// If none is, the world must have seen what `sometimes` names: else little was checked. With it a line about it all.
fn broken_rule(name: &str, config: Config, sometimes: &[&'static str]) -> (String, Option<String>) {
    let begin = Instant::now();
    let checker = Protocol(config).checker().threads(THREADS).finish_when(HasDiscoveries::AnyFailures);
    let checker = checker.timeout(LIMIT).spawn_bfs().join();
    let mut found: BTreeSet<&'static str> = BTreeSet::new();
    let mut broken = None;
    for (property, path) in checker.discoveries() {
        if checker.model().property(property).expectation.discovery_is_failure() {
            let steps: Vec<_> = path.into_actions();
            broken = Some(format!("{property} ({} steps): {steps:?}", steps.len()));
        } else {
            found.insert(property);
        }
    }
    let line = format!(
        "{name}: {} states, depth {}, {:.1} s; {}",
        checker.unique_state_count(),
        checker.max_depth(),
        begin.elapsed().as_secs_f64(),
        broken.as_deref().unwrap_or("no rule broken"),
    );
    if broken.is_none() {
        assert!(begin.elapsed() < LIMIT, "{name} takes too long");
        for property in sometimes {
            assert!(found.contains(property), "{name}: there was no {property}");
        }
    }
    (line, broken)
}

#[test]
fn every_rule_holds() {
    let (mem, disk) = (memory(), disk());
    let three = Config { nodes: 3, boot: false, paired: true, terms: 6, queue: 1, ..mem };
    let no_boot = Config { boot: false, stops: 1, terms: 6, ..mem };
    let checks: [(&str, Config, &[&'static str]); 11] = [
        ("memory", Config { cuts: 3, crashes: 2, ..mem }, &["promotion", "boot", "hand-back"]),
        ("disk", Config { cuts: 3, crashes: 2, ..disk }, &["promotion", "boot"]),
        ("memory, no boot", Config { boot: false, cuts: 3, crashes: 2, ..mem }, &["promotion", "hand-back"]),
        ("disk, no boot", Config { boot: false, crashes: 2, ..disk }, &["promotion"]),
        ("memory, stops", Config { stops: 1, terms: 6, ..mem }, &["stop", "promotion", "boot"]),
        ("memory, stops, no boot", Config { crashes: 2, ..no_boot }, &["stop", "promotion", "boot"]),
        ("disk, stops", Config { stops: 2, terms: 6, ..disk }, &["stop", "promotion", "boot"]),
        ("memory to disk", Config { paired: true, switches: 2, ..mem }, &["switch of policy", "promotion"]),
        ("disk to memory", Config { paired: true, switches: 2, ..disk }, &["switch of policy", "promotion"]),
        ("many terms", Config { paired: true, terms: 6, ..mem }, &["promotion", "boot", "hand-back"]),
        ("three nodes", three, &["promotion", "hand-back"]),
    ];
    for (name, config, sometimes) in checks {
        let (line, broken) = broken_rule(name, config, sometimes);
        println!("{line}");
        assert_eq!(broken, None, "{name}");
    }
}

/// Each rule left out is noticed, within bounds in which nothing is wrong with the rule in place.
#[test]
fn every_rule_is_needed() {
    type Runner = replicator::Mutation;
    let (mem, none) = (memory(), Runner::default());
    let paired = Config { paired: true, ..mem };
    let chain = Config { nodes: 3, boot: false, terms: 6, queue: 1, ..paired };
    let runners: [(&str, Config, Runner); 9] = [
        ("release_while_pairing", mem, Runner { release_while_pairing: true, ..none }),
        ("hold_from_proposal", mem, Runner { hold_from_proposal: true, ..none }),
        ("void_join_counts", mem, Runner { void_join_counts: true, ..none }),
        ("drop_carried", paired, Runner { drop_carried: true, ..none }),
        ("release_on_proposal", mem, Runner { release_on_proposal: true, ..none }),
        ("release_unlinked", mem, Runner { release_unlinked: true, ..none }),
        ("old_value_is_refusal", mem, Runner { old_value_is_refusal: true, ..none }),
        ("refused_changes_nothing", mem, Runner { refused_changes_nothing: true, ..none }),
        ("take_any_hand_back", chain, Runner { take_any_hand_back: true, ..none }),
    ];
    let leaves = Mutation::default();
    let promotion = Mutation { promotion_leaves_store: true, ..leaves };
    let seed = Mutation { seed_leaves_store: true, ..leaves };
    let to_memory = Config { policy: AckPolicy::Disk, switches: 1, ..paired };
    let unnoted = Mutation { start_is_not_noted: true, ..leaves };
    let noted = Mutation { run_leaves_note: true, ..leaves };
    let again = Config { boot: false, crashes: 2, stops: 1, ..mem };
    let runners = runners.map(|(name, config, runner)| (name, Config { runner, ..config }));
    let followers = followers().map(|(name, config, follower)| (name, Config { follower, ..config }));
    let stores = [
        ("promotion_leaves_store", Config { surroundings: promotion, ..mem }),
        ("seed_leaves_store", Config { surroundings: seed, ..to_memory }),
        ("start_is_not_noted", Config { surroundings: unnoted, ..again }),
        ("run_leaves_note", Config { surroundings: noted, ..again }),
    ];
    for (name, config) in runners.into_iter().chain(followers).chain(stores) {
        let (line, broken) = broken_rule(name, config, &[]);
        println!("{line}");
        assert!(broken.is_some(), "{name} went unnoticed");
    }
}

fn followers() -> [(&'static str, Config, replica::Mutation); 13] {
    type Follower = replica::Mutation;
    let (mem, disk, none) = (memory(), disk(), Follower::default());
    let to_disk = Config { paired: true, switches: 1, ..mem };
    let to_memory = Config { paired: true, switches: 1, ..disk };
    let stops = Config { stops: 1, ..mem };
    let no_boot = Config { boot: false, ..mem };
    let long = Config { paired: true, terms: 6, ..mem };
    [
        ("ack_before_sync", disk, Follower { ack_before_sync: true, ..none }),
        ("promote_any_replica", mem, Follower { promote_any_replica: true, ..none }),
        ("promote_stopped", stops, Follower { promote_stopped: true, ..none }),
        ("never_silent", mem, Follower { never_silent: true, ..none }),
        ("store_id_under_memory", mem, Follower { store_id_under_memory: true, ..none }),
        ("keep_id_on_switch", to_memory, Follower { keep_id_on_switch: true, ..none }),
        ("store_id_early", to_disk, Follower { store_id_early: true, ..none }),
        ("memory_acks_until_stored", to_disk, Follower { memory_acks_until_stored: true, ..none }),
        ("seed_keeps_active", long, Follower { seed_keeps_active: true, ..none }),
        ("boot_inactive", mem, Follower { boot_inactive: true, ..none }),
        ("boot_for_another", mem, Follower { boot_for_another: true, ..none }),
        ("start_for_another", stops, Follower { start_for_another: true, ..none }),
        ("hand_back_active", no_boot, Follower { hand_back_active: true, ..none }),
    ]
}
