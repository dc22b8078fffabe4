//! Three nodes of which one runs the guest, and all that may happen to them.

use colo_common::history::point;
use colo_common::{History, Point};
use colo_primary::last_changed::LastChanged;
use colo_proto::message::{SeedMode, SeedPart};
use colo_secondary::staging::StagedEpoch;
use colo_tests::seed::Seed;
use std::collections::BTreeMap;

use crate::copy::{Follower, Guest, SIZE};
use crate::runner::{Runner, Set};

/// Things that happen in a world.
const STEPS: u64 = 400;
/// Epochs in flight at most.
const WINDOW: usize = 4;

/// Pages and blocks of copies that were begun.
#[derive(Clone, Copy, Default)]
pub(crate) struct Sums {
    pub(crate) copies: u64,
    pub(crate) all: u64,
    /// That differed when the copy began.
    pub(crate) differ: u64,
    /// That were sent before the rounds of what changed meanwhile.
    pub(crate) sent: u64,
}

impl Sums {
    pub(crate) fn add(&mut self, other: Self) {
        self.copies += other.copies;
        self.all += other.all;
        self.differ += other.differ;
        self.sent += other.sent;
    }
}

enum Node {
    Runs(Box<Runner>),
    Follows(Box<Follower>),
}

/// The nodes.
pub(crate) struct World {
    seed: Seed,
    nodes: Vec<Option<Node>>,
    at: usize,
    term: u64,
    pub(crate) epoch: StagedEpoch,
    way: String,
    pub(crate) sums: BTreeMap<String, Sums>,
}

impl World {
    /// A world; `epoch` is an epoch of any kind.
    pub(crate) fn new(seed: u64, epoch: StagedEpoch) -> Self {
        let runner =
            Runner::new(Guest::zero(), LastChanged::none(SIZE, SIZE), History::default(), point(1, 0), 1);
        let follower = || Some(Node::Follows(Box::new(Follower::new(vec![0; SIZE as usize], None))));
        Self {
            seed: Seed::new(seed),
            nodes: vec![Some(Node::Runs(Box::new(runner))), follower(), follower()],
            at: 0,
            term: 1,
            epoch,
            way: String::new(),
            sums: BTreeMap::new(),
        }
    }

    pub(crate) fn play(&mut self) -> Result<(), String> {
        for _ in 0..STEPS {
            match self.seed.below(100) {
                0..40 => {
                    let mut seed = self.seed.clone();
                    self.runner().write(&mut seed);
                    self.seed = seed;
                }
                40..65 => self.go_on()?,
                65..80 => self.seed_or_send()?,
                80..84 => self.lose_follower(),
                84..88 => self.restart_follower(),
                88..93 => self.move_guest(),
                93..97 => self.store(),
                97 => self.forget(),
                _ => {}
            }
        }
        Ok(())
    }

    fn runner(&mut self) -> &mut Runner {
        match &mut self.nodes[self.at] {
            Some(Node::Runs(runner)) => runner,
            _ => panic!("somebody always runs the guest"),
        }
    }

    /// The runner, and a node that follows.
    fn both(&mut self, other: usize) -> (&mut Runner, &mut Follower) {
        let [runner, follower] = self.nodes.get_disjoint_mut([self.at, other]).expect("two nodes");
        match (runner, follower) {
            (Some(Node::Runs(runner)), Some(Node::Follows(follower))) => (runner, follower),
            _ => panic!("one runs the guest, the others follow"),
        }
    }

    fn other(&mut self) -> usize {
        (self.at + 1 + self.seed.below(2) as usize) % self.nodes.len()
    }

    /// A cut, or an ack.
    fn go_on(&mut self) -> Result<(), String> {
        let Some(to) = self.runner().paired else { return Ok(()) };
        let full = self.runner().flight.len() >= WINDOW;
        if full || self.seed.below(2) == 0 {
            self.runner().ack();
            return Ok(());
        }
        let base = self.runner().history.tip();
        let (point, set) = self.runner().cut();
        self.stage(to, point, base, &set);
        self.check_same(to)
    }

    fn stage(&mut self, to: usize, point: Point, base: Option<Point>, set: &Set) {
        let (guest, history) = (self.runner().guest.clone(), self.runner().history.clone());
        (self.epoch.point, self.epoch.base, self.epoch.history) = (point, base, history);
        let (pages, blocks) = set.lists();
        if let Some(Node::Follows(follower)) = &mut self.nodes[to] {
            follower.stage(&mut self.epoch, &guest, (&pages, &blocks));
        }
    }

    fn check_same(&mut self, to: usize) -> Result<(), String> {
        let way = self.way.clone();
        let (runner, follower) = self.both(to);
        if runner.guest != follower.content {
            return Err(format!(
                "{way}: the runner has {:?}, and the copy {:?}",
                runner.guest, follower.content
            ));
        }
        Ok(())
    }

    /// A copy begins, goes on, or becomes whole.
    fn seed_or_send(&mut self) -> Result<(), String> {
        if self.runner().paired.is_some() {
            return Ok(());
        }
        if self.runner().seeding.is_none() {
            return self.begin_seed();
        }
        let most = 1 + self.seed.below(2 * SIZE);
        for _ in 0..most {
            if !self.send_one() {
                return self.join();
            }
        }
        Ok(())
    }

    fn begin_seed(&mut self) -> Result<(), String> {
        let to = self.other();
        let (runner, follower) = self.both(to);
        let differ = |a: &[u8], b: &[u8]| a.iter().zip(b).filter(|(a, b)| a != b).count() as u64;
        let differ = differ(&runner.guest.memory, &follower.content.memory)
            + differ(&runner.guest.disk, &follower.content.disk);
        let mode = runner.seed(to, follower)?;
        self.way = way(mode);
        self.sums.entry(way(mode)).or_default().add(Sums { copies: 1, all: 2 * SIZE, differ, sent: 0 });
        Ok(())
    }

    /// Sends a page or block of the first pass; false if there is none left.
    fn send_one(&mut self) -> bool {
        let (at, nodes, seed) = (self.at, &mut self.nodes, &mut self.seed);
        let Some(Node::Runs(runner)) = &mut nodes[at] else { return false };
        let Some(job) = &mut runner.seeding else { return false };
        let lists = [&mut job.pages, &mut job.blocks, &mut job.compared.0, &mut job.compared.1];
        let Some((which, list)) = lists.into_iter().enumerate().find(|(_, list)| !list.is_empty()) else {
            return false;
        };
        let item = list.swap_remove(seed.below(list.len() as u64) as usize);
        let (to, value) = (job.to, if which % 2 == 0 { &runner.guest.memory } else { &runner.guest.disk });
        let value = value[item as usize];
        let Some(Node::Follows(follower)) = &mut nodes[to] else { return false };
        let theirs = if which % 2 == 0 { &follower.content.memory } else { &follower.content.disk };
        if which >= 2 && theirs[item as usize] == value {
            return true;
        }
        if which % 2 == 0 {
            follower.take_page(item, value);
        } else {
            follower.take_block(item, value);
        }
        self.sums.entry(self.way.clone()).or_default().sent += 1;
        true
    }

    /// A round of what changed, or the epoch that makes the copy whole.
    fn join(&mut self) -> Result<(), String> {
        let Some(to) = self.runner().seeding.as_ref().map(|job| job.to) else { return Ok(()) };
        if self.seed.below(3) == 0 {
            let next = self.runner().next();
            let set = std::mem::replace(&mut self.runner().open, Set::new());
            self.runner().mark(&set, next);
            let (pages, blocks) = set.lists();
            let Some(job) = &mut self.runner().seeding else { return Ok(()) };
            (job.pages, job.blocks) = (pages, blocks);
            // These are not what the copy lacked when it began.
            return self.send_round();
        }
        let (point, set) = self.runner().cut();
        self.runner().seeding = None;
        self.stage(to, point, None, &set);
        self.check_same(to)?;
        if self.seed.below(8) == 0 {
            // Its ack is lost, and this point with it.
            self.runner().alone();
            self.term = self.runner().term;
            return Ok(());
        }
        self.runner().ack();
        self.runner().paired = Some(to);
        self.term += 1;
        self.runner().term = self.term;
        Ok(())
    }

    fn send_round(&mut self) -> Result<(), String> {
        let before = self.sums.clone();
        // The link may break within it.
        let most = self.seed.below(3 * SIZE);
        (0..most).take_while(|_| self.send_one()).for_each(drop);
        self.sums = before;
        Ok(())
    }

    /// The link or the follower is lost, or the seed breaks off.
    fn lose_follower(&mut self) {
        let to = self.runner().paired.or(self.runner().seeding.as_ref().map(|job| job.to));
        let Some(to) = to else { return };
        self.runner().alone();
        self.term = self.runner().term;
        self.both(to).1.rejoin.break_off();
    }

    fn restart_follower(&mut self) {
        let x = self.other();
        let mine = [self.runner().paired, self.runner().seeding.as_ref().map(|job| job.to)];
        if mine.contains(&Some(x)) {
            self.lose_follower();
        }
        self.both(x).1.restart();
    }

    /// The follower takes the guest over; the node that ran it is dead, or follows.
    fn move_guest(&mut self) {
        let Some(to) = self.runner().paired else { return };
        let Some(point) = self.both(to).1.copy.point() else { return };
        // What it has cut and could not send.
        for _ in 0..self.seed.below(3) {
            let mut seed = self.seed.clone();
            let runner = self.runner();
            runner.write(&mut seed);
            runner.cut();
            self.seed = seed;
        }
        let (old, new) = (self.nodes[self.at].take(), self.nodes[to].take());
        let (Some(Node::Runs(old)), Some(Node::Follows(new))) = (old, new) else {
            panic!("one runs the guest, the others follow")
        };
        self.term += 1;
        let left = if self.seed.below(2) == 0 { old.hand_over() } else { old.die() };
        let Follower { content, history, rejoin, .. } = *new;
        let runner = Runner::new(content, rejoin.into_last_changed(), history, point, self.term);
        self.nodes[self.at] = Some(Node::Follows(Box::new(left)));
        self.nodes[to] = Some(Node::Runs(Box::new(runner)));
        self.at = to;
    }

    fn store(&mut self) {
        let x = self.other();
        self.both(x).1.store();
    }

    /// Too much was changed, or too long ago; or too much of the disk for its table.
    fn forget(&mut self) {
        let only_disk = self.seed.below(2) == 0;
        let runner = self.runner();
        if runner.paired.is_some() || runner.seeding.is_some() {
            return;
        }
        if only_disk {
            runner.table.blocks.forget();
        } else {
            runner.table.forget();
            runner.open = Set::new();
        }
    }
}

fn way(mode: SeedMode) -> String {
    let part = |part| match part {
        SeedPart::All => "All",
        SeedPart::Differing => "Differing",
        SeedPart::Since(_) => "Since",
    };
    format!("{}, {}", part(mode.memory), part(mode.disk))
}
