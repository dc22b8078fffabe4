//! A guest that writes, cuts and reads at any instants, a copy that follows late, and a comparison of the two.

use super::{Source, Tally, Verification, Wanted, Written, compare, look};
use colo_common::history::point;
use colo_common::{Gfn, PAGE_SIZE, Point};
use colo_proto::message::{PageDigest, Verified, Verify, VerifyPart};
use proptest::prelude::{ProptestConfig, any, prop_assert, prop_assert_eq, proptest};
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::time::Duration;

const PLACES: u64 = 40;
/// Nothing goes on for ever: after so many steps the guest is quiet.
const BUSY: u64 = 600;

/// Small numbers from a seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) % n
    }
}

/// A write to the disk on its way: where, what, and whether the file has it.
struct Request {
    at: u64,
    value: u8,
    landed: bool,
}

/// An epoch on its way, and the list behind it.
type Sent = (Point, Vec<(u64, u8)>, Option<Verify>);

/// A rule that is left out.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Without {
    Nothing,
    /// What is under way is not told.
    UnderWay,
    /// Epochs that end while something is read tell nothing.
    EpochsWhileReading,
}

struct World {
    dice: Dice,
    part: VerifyPart,
    without: Without,
    steps: u64,
    /// What the guest has: its memory, or its disk's file.
    here: Vec<u8>,
    under_way: Vec<Request>,
    /// What the open epoch has written.
    open: Vec<(u64, u8)>,
    epoch: u64,
    sent: VecDeque<Sent>,
    copy: Vec<u8>,
    answers: VecDeque<Verified>,
    corrupted: Option<u64>,
    healed: bool,
    verification: Verification,
}

impl World {
    fn new(seed: u64, part: VerifyPart, without: Without) -> Self {
        let mut dice = Dice(seed | 1);
        let here: Vec<u8> = (0..PLACES).map(|_| dice.below(4) as u8).collect();
        let wanted = Wanted {
            frames: (part == VerifyPart::Memory).then_some(PLACES),
            blocks: (part == VerifyPart::Disk).then_some(PLACES),
            rate_mib: 1,
        };
        Self {
            dice,
            part,
            without,
            steps: 0,
            copy: here.clone(),
            here,
            under_way: Vec::new(),
            open: Vec::new(),
            epoch: 0,
            sent: VecDeque::new(),
            answers: VecDeque::new(),
            corrupted: None,
            healed: false,
            verification: Verification::new(wanted),
        }
    }

    /// A byte of the copy is not what it was, behind its back.
    fn corrupt(&mut self) {
        let at = self.dice.below(PLACES);
        self.copy[at as usize] ^= 0x80;
        self.corrupted = Some(at);
    }

    fn step(&mut self, reading: bool) {
        self.steps += 1;
        match self.dice.below(12) {
            0..=2 if self.steps < BUSY => self.write(),
            3 if self.steps < BUSY && self.part == VerifyPart::Disk => self.begin(),
            4 | 5 => self.land(),
            6 | 7 => self.record(),
            8 => self.cut(reading),
            9 | 10 => self.deliver(),
            11 => {
                if let Some(answer) = self.answers.pop_front() {
                    self.verification.answer(&answer).unwrap();
                }
            }
            _ => {}
        }
    }

    /// Memory is written at once; few places are written again and again.
    fn write(&mut self) {
        if self.part == VerifyPart::Disk {
            return;
        }
        let (bound, value) = (if self.dice.below(3) == 0 { PLACES } else { 4 }, self.dice.below(4) as u8);
        let at = self.dice.below(bound);
        self.here[at as usize] = value;
        self.open.push((at, value));
    }

    fn begin(&mut self) {
        let (at, value) = (self.dice.below(PLACES), self.dice.below(4) as u8);
        if self.under_way.iter().all(|request| request.at != at) {
            self.under_way.push(Request { at, value, landed: false });
        }
    }

    fn land(&mut self) {
        let next = self.dice.below(1 + self.under_way.len() as u64) as usize;
        if let Some(request) = self.under_way.get_mut(next) {
            request.landed = true;
            self.here[request.at as usize] = request.value;
        }
    }

    fn record(&mut self) {
        let next = self.dice.below(1 + self.under_way.len() as u64) as usize;
        if self.under_way.get(next).is_some_and(|request| request.landed) {
            let request = self.under_way.swap_remove(next);
            self.open.push((request.at, request.value));
        }
    }

    fn cut(&mut self, reading: bool) {
        self.epoch += 1;
        let (at, writes) = (point(1, self.epoch), std::mem::take(&mut self.open));
        let pages: Vec<_> = writes.iter().map(|&(at, _)| (Gfn(at), 1)).collect();
        let blocks: Vec<_> = writes.iter().map(|&(at, _)| at..at + 1).collect();
        let under_way: Vec<_> = self.under_way.iter().map(|request| request.at..request.at + 1).collect();
        let silent = reading && self.without == Without::EpochsWhileReading;
        let changes = Written {
            pages: &pages,
            blocks: &blocks,
            under_way: if self.without == Without::UnderWay { &[] } else { &under_way },
        };
        let changes = if silent { Written::default() } else { changes };
        let list = self.verification.cut(at, changes);
        self.sent.push_back((at, writes, list));
    }

    fn deliver(&mut self) {
        let Some((at, writes, list)) = self.sent.pop_front() else { return };
        for (place, value) in writes {
            self.copy[place as usize] = value;
            self.healed |= self.corrupted == Some(place);
        }
        if let Some(list) = list {
            let answer = compare(at, &list, &mut Bytes(&self.copy)).unwrap();
            self.answers.push_back(answer);
        }
    }

    /// Compares all of it; answers what was found.
    fn run(mut self) -> (Tally, Self) {
        let mut now = Duration::ZERO;
        while !self.verification.is_over() {
            assert!(self.steps < 1_000_000, "it does not end");
            now += Duration::from_millis(1);
            match self.verification.order(now) {
                Some(mut order) => {
                    order.most = 1 + self.dice.below(24);
                    let list = look(&order, &mut Guest(&mut self)).unwrap();
                    self.verification.read(list);
                }
                None => self.step(false),
            }
        }
        let tally = self.verification.tallies().remove(0);
        (tally, self)
    }
}

fn digest(byte: u8) -> Option<PageDigest> {
    (byte != 0).then(|| PageDigest::of(&[byte; PAGE_SIZE]))
}

fn next_data(bytes: &[u8], from: u64) -> Option<Range<u64>> {
    let first = (from as usize..bytes.len()).find(|&at| bytes[at] != 0)?;
    let end = (first..bytes.len()).find(|&at| bytes[at] == 0).unwrap_or(bytes.len());
    Some(first as u64..end as u64)
}

/// The copy, at rest.
struct Bytes<'a>(&'a [u8]);

impl Source for Bytes<'_> {
    fn next_data(&mut self, from: u64) -> io::Result<Option<Range<u64>>> {
        Ok(next_data(self.0, from))
    }

    fn digest(&mut self, at: u64) -> io::Result<Option<PageDigest>> {
        Ok(digest(self.0[at as usize]))
    }
}

/// The guest, which runs on while it is looked at.
struct Guest<'a>(&'a mut World);

impl Guest<'_> {
    fn pass_time(&mut self) {
        for _ in 0..self.0.dice.below(3) {
            self.0.step(true);
        }
    }
}

impl Source for Guest<'_> {
    fn next_data(&mut self, from: u64) -> io::Result<Option<Range<u64>>> {
        self.pass_time();
        Ok(next_data(&self.0.here, from))
    }

    fn digest(&mut self, at: u64) -> io::Result<Option<PageDigest>> {
        self.pass_time();
        Ok(digest(self.0.here[at as usize]))
    }
}

fn parts() -> [VerifyPart; 2] {
    [VerifyPart::Memory, VerifyPart::Disk]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]
    #[test]
    fn a_copy_that_is_right_is_never_found_to_differ(seed in any::<u64>()) {
        for part in parts() {
            let (tally, world) = World::new(seed, part, Without::Nothing).run();
            prop_assert_eq!((tally.differing, &tally.places), (0, &Vec::new()), "{:?} {}", part, seed);
            prop_assert_eq!(tally.compared + tally.not_compared, PLACES);
            prop_assert_eq!((tally.total, tally.looked_at), (PLACES, PLACES));
            prop_assert!(tally.with_bytes <= tally.compared && world.corrupted.is_none());
        }
    }

    #[test]
    fn what_is_wrong_in_the_copy_is_found(seed in any::<u64>()) {
        for part in parts() {
            let mut world = World::new(seed, part, Without::Nothing);
            world.corrupt();
            let (tally, world) = world.run();
            let at = world.corrupted.unwrap();
            prop_assert!(tally.places.iter().all(|&place| place == at), "{:?} {}", part, seed);
            // Unless the guest has written it since, and the epoch made it right, or it is never still.
            let found = tally.differing == 1;
            prop_assert!(found || world.healed || tally.not_compared > 0, "{:?} {} {:?}", part, seed, tally);
        }
    }
}

#[test]
fn each_rule_is_needed() {
    let alarms = |part, without| {
        (1..400_u64).filter(|&seed| World::new(seed * 7919, part, without).run().0.differing > 0).count()
    };
    assert!(alarms(VerifyPart::Disk, Without::UnderWay) > 0);
    assert!(alarms(VerifyPart::Disk, Without::EpochsWhileReading) > 0);
    assert!(alarms(VerifyPart::Memory, Without::EpochsWhileReading) > 0);
    assert_eq!(alarms(VerifyPart::Memory, Without::UnderWay), 0, "memory has nothing under way");
}

#[test]
fn a_guest_that_writes_all_the_time_costs_a_bounded_number_of_looks() {
    let wanted = Wanted { frames: Some(100), blocks: None, rate_mib: 1 };
    let (mut verification, mut orders) = (Verification::new(wanted), 0);
    while !verification.is_over() {
        let Some(order) = verification.order(Duration::from_secs(orders)) else { continue };
        orders += 1;
        let memory = [1; 100];
        verification.read(look(&order, &mut Bytes(&memory)).unwrap());
        let list =
            verification.cut(point(1, orders), Written { pages: &[(Gfn(0), 100)], ..Written::default() });
        assert_eq!(list, None, "nothing is left to compare");
    }
    let tally = &verification.tallies()[0];
    assert_eq!((orders, tally.compared, tally.not_compared), (2 * 5, 0, 100), "64 at one go, five times");
}

#[test]
fn it_reads_no_faster_than_it_may() {
    let wanted = Wanted { frames: Some(4096), blocks: Some(64), rate_mib: 2 };
    let (mut verification, memory) = (Verification::new(wanted), vec![1; 4096]);
    let (mut now, mut epoch) = (Duration::ZERO, 0);
    while !verification.is_over() {
        now += Duration::from_millis(1);
        let Some(order) = verification.order(now) else { continue };
        epoch += 1;
        verification.read(
            look(&order, &mut Bytes(&memory[..order.spans[0].1 as usize + order.spans[0].0 as usize]))
                .unwrap(),
        );
        let list = verification.cut(point(1, epoch), Written::default()).unwrap();
        let answer = compare(point(1, epoch), &list, &mut Bytes(&memory)).unwrap();
        verification.answer(&answer).unwrap();
    }
    // 16 MiB at 2 MiB a second.
    assert!((7900..8400).contains(&now.as_millis()), "{now:?}");
    let compared: Vec<_> = verification.tallies().iter().map(|tally| tally.with_bytes).collect();
    assert_eq!(compared, [4096, 64]);
}

#[test]
fn answers_to_what_was_given_up_are_passed_over_and_wrong_ones_refused() {
    let wanted = Wanted { frames: Some(8), blocks: None, rate_mib: 0 };
    let mut verification = Verification::new(wanted);
    let answer =
        |epoch, compared| Verified { compared, ..Verified::new(point(1, epoch), VerifyPart::Memory) };
    verification.answer(&answer(1, 8)).unwrap();
    let order = verification.order(Duration::ZERO).unwrap();
    verification.read(look(&order, &mut Bytes(&[1; 8])).unwrap());
    assert_eq!(verification.cut(point(1, 2), Written::default()).unwrap().told(), 8);
    verification.answer(&answer(1, 8)).unwrap();
    let error = verification.answer(&answer(2, 7)).unwrap_err().to_string();
    assert!(error.contains("compared 7") && error.contains("where 8 were told"), "{error}");
    verification.answer(&answer(2, 8)).unwrap();
    assert!(verification.order(Duration::from_secs(1)).is_none() && verification.is_over());
}
