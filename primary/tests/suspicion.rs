//! The judge of heartbeats on simulated paths, seeded: how often a peer that lives is suspected, and how soon a dead one.
//! `COLO_PATH_SEEDS` sets how many seeds each path gets.

use colo_common::Term;
use colo_primary::heartbeat::judge::{Judge, Rhythm, Verdict};
use colo_proto::frame::VmTag;
use colo_proto::heartbeat::Heartbeat;
use proptest::prelude::*;
use std::collections::BinaryHeap;
use std::time::Duration;

const RHYTHM: Rhythm =
    Rhythm { interval: Duration::from_millis(50), suspect_after: Duration::from_millis(500) };
const INTERVAL_US: u64 = 50_000;
/// Life of a peer in one seed, until it dies.
const LIFE_US: u64 = 60_000_000;
/// Seeds of each path, if nothing else is said.
const SEEDS: u64 = 1000;

/// A generator that needs no crate: splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    fn chance(&mut self, of: f64) -> bool {
        ((self.next() >> 11) as f64) < of * (1_u64 << 53) as f64
    }
}

/// What a path and its ends do to heartbeats. Times are in microseconds.
#[derive(Clone, Copy, Debug, Default)]
struct Path {
    /// Least delay, and what comes on top of it at random.
    delay: (u64, u64),
    loss: f64,
    /// Chance that a burst of loss begins with a heartbeat, and that it goes on with the next.
    burst: (f64, f64),
    /// The sender's clock is fast by so many parts in a million.
    drift: u64,
    /// Between two stalls of the sender on average, and their longest.
    sender_stalls: (u64, u64),
    /// The same of the receiver.
    receiver_stalls: (u64, u64),
    /// Every tick of the sender is late by so much at most.
    late: u64,
}

/// What one seed gave.
#[derive(Default)]
struct Found {
    false_alarms: u64,
    detected_us: Vec<u64>,
}

/// When a heartbeat arrives, soonest first in a heap that gives the greatest.
type Arrival = (std::cmp::Reverse<u64>, u64, u64, u16);

/// All heartbeats of a peer that dies at `death`.
fn heartbeats(path: &Path, random: &mut Random, death: u64) -> BinaryHeap<Arrival> {
    let mut arrivals = BinaryHeap::new();
    let (mut at, mut sequence, mut bursts, mut late_ms) = (0, 0, false, 0.0_f64);
    let mut stall = next_stall(path.sender_stalls, random, 0);
    while at < death {
        sequence += 1;
        bursts = random.chance(if bursts { path.burst.1 } else { path.burst.0 });
        let sent_us = at + at * path.drift / 1_000_000;
        let arrives = at + path.delay.0 + random.below(path.delay.1 + 1);
        if !bursts && !random.chance(path.loss) {
            arrivals.push((std::cmp::Reverse(arrives), sequence, sent_us, late_ms as u16));
        }
        let due = at + INTERVAL_US;
        at = due + random.below(path.late + 1);
        if at >= stall.0 {
            at = at.max(stall.0 + stall.1);
            stall = next_stall(path.sender_stalls, random, at);
        }
        late_ms = (late_ms * 31.0 / 32.0).max((at - due) as f64 / 1e3);
    }
    arrivals
}

fn next_stall((mean, longest): (u64, u64), random: &mut Random, now: u64) -> (u64, u64) {
    if mean == 0 {
        return (u64::MAX, 0);
    }
    (now + random.below(2 * mean), random.below(longest + 1))
}

fn beat(sequence: u64, sent_us: u64, late_ms: u16) -> Heartbeat {
    Heartbeat { vm: VmTag(1), term: Term(1), sequence, sent_us, late_ms }
}

/// Plays one life and one death.
fn play(path: &Path, seed: u64) -> Found {
    let mut random = Random(seed);
    let death = LIFE_US + random.below(INTERVAL_US * 4);
    let mut arrivals = heartbeats(path, &mut random, death);
    let (mut judge, mut found) = (Judge::new(RHYTHM, Duration::ZERO, None), Found::default());
    let (mut now, mut stall) = (0, next_stall(path.receiver_stalls, &mut random, 0));
    let mut awake = 0;
    loop {
        // What woke the receiver: a heartbeat, its own tick, or the end of the wait.
        let rest = u64::try_from(judge.rest().as_micros()).unwrap() + 1;
        let next = arrivals.peek().map_or(u64::MAX, |arrival| arrival.0.0);
        now = (now + INTERVAL_US.min(rest)).min(next.max(now));
        if now >= stall.0 && now < death {
            now = now.max(stall.0 + stall.1);
            awake = now;
            stall = next_stall(path.receiver_stalls, &mut random, now);
        }
        while let Some(&(std::cmp::Reverse(at), sequence, sent_us, late_ms)) = arrivals.peek() {
            if at > now {
                break;
            }
            arrivals.pop();
            judge.beat(Duration::from_micros(now), &beat(sequence, sent_us, late_ms));
        }
        match judge.poll(Duration::from_micros(now)) {
            Verdict::Alive | Verdict::Overdue => {}
            Verdict::Gone(_) => panic!("nobody has refused"),
            Verdict::Silent(_) if now < death => {
                found.false_alarms += 1;
                judge = Judge::new(RHYTHM, Duration::from_micros(now), Some(judge.learned()));
            }
            Verdict::Silent(_) => {
                // Nobody sees anything while he is stopped.
                found.detected_us.push(now - death.max(awake));
                return found;
            }
        }
    }
}

/// Plays all seeds of a path; prints and answers false alarms, and p50 and p99 of the detection in milliseconds.
#[expect(clippy::print_stdout, reason = "the figures are what it is run for")]
fn measure(name: &str, path: Path) -> (u64, u64, u64) {
    let seeds = std::env::var("COLO_PATH_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(SEEDS);
    let (mut alarms, mut times) = (0, Vec::new());
    for seed in 0..seeds {
        let found = play(&path, seed);
        alarms += found.false_alarms;
        times.extend(found.detected_us);
    }
    times.sort_unstable();
    let rank = |percent: usize| times[(times.len() * percent / 100).min(times.len() - 1)] / 1000;
    let hours = seeds * LIFE_US / 3_600_000_000;
    println!(
        "{name:<34} {seeds} seeds, {hours} h alive: {alarms} false; dead after {} / {} ms (p50 / p99)",
        rank(50),
        rank(99)
    );
    (alarms, rank(50), rank(99))
}

const QUIET: Path = Path {
    delay: (200, 300),
    loss: 0.0,
    burst: (0.0, 0.0),
    drift: 0,
    sender_stalls: (0, 0),
    receiver_stalls: (0, 0),
    late: 0,
};

#[test]
fn a_dead_peer_on_a_quiet_path_is_suspected_soon() {
    let (alarms, p50, p99) = measure("constant delay", QUIET);
    assert_eq!(alarms, 0);
    assert!(p50 >= 300 && p99 <= 400, "{p50} {p99}");
    let (alarms, _, p99) = measure("drift of 500 ppm", Path { drift: 500, ..QUIET });
    assert!(alarms == 0 && p99 <= 400, "{alarms} {p99}");
    let (alarms, _, p99) = measure("ticks up to 20 ms late", Path { late: 20_000, ..QUIET });
    assert!(alarms == 0 && p99 <= 500, "{alarms} {p99}");
}

#[test]
fn a_slow_or_lossy_path_is_no_death() {
    let jitter = Path { delay: (100, 200_000), ..QUIET };
    for (name, path, slowest) in [
        ("loss of 5 %", Path { loss: 0.05, ..QUIET }, 900),
        ("loss of 20 %", Path { loss: 0.2, ..QUIET }, 2050),
        ("jitter of +-100 ms, reordering", jitter, 1100),
        ("the same with a loss of 10 %", Path { loss: 0.1, ..jitter }, 2050),
        ("the same with a loss of 20 %", Path { loss: 0.2, ..jitter }, 2050),
    ] {
        let (alarms, _, p99) = measure(name, path);
        assert_eq!(alarms, 0, "{name}");
        assert!(p99 <= slowest, "{name}: {p99}");
    }
}

#[test]
fn bursts_of_loss_are_learned() {
    // On average four heartbeats in a row, every five seconds.
    let (alarms, _, p99) = measure("bursts of loss, 4 on average", Path { burst: (0.01, 0.75), ..QUIET });
    // Nobody knows of bursts before the first long one: less than one in a minute of such a path.
    assert!(alarms <= SEEDS / 2, "{alarms}");
    assert!(p99 <= 2100, "{p99}");
}

#[test]
fn a_host_that_is_busy_or_stopped_is_no_dead_peer() {
    let busy = Path { late: 60_000, sender_stalls: (5_000_000, 250_000), ..QUIET };
    let (alarms, _, p99) = measure("sender stalls of up to 250 ms", busy);
    assert_eq!(alarms, 0);
    assert!(p99 <= 1300, "{p99}");
    let stopped = Path { receiver_stalls: (3_000_000, 10_000_000), ..QUIET };
    let (alarms, _, p99) = measure("receiver stops of up to 10 s", stopped);
    assert_eq!(alarms, 0);
    assert!(p99 <= 1300, "{p99}");
    let both = Path { receiver_stalls: (2_000_000, 400_000), loss: 0.05, ..busy };
    let (alarms, _, p99) = measure("both busy, loss of 5 %", both);
    assert_eq!(alarms, 0);
    assert!(p99 <= 2100, "{p99}");
}

#[test]
fn a_refusal_shortens_the_wait_and_a_sign_of_life_ends_it() {
    let ms = Duration::from_millis;
    let mut judge = Judge::new(RHYTHM, Duration::ZERO, None);
    for sequence in 1..=40 {
        judge.beat(ms(50 * sequence), &beat(sequence, sequence * 50_000, 0));
    }
    assert_eq!(judge.poll(ms(2050)), Verdict::Alive);
    assert_eq!(judge.poll(ms(2080)), Verdict::Overdue);
    judge.refused(ms(2081));
    assert_eq!(judge.poll(ms(2090)), Verdict::Overdue, "two heartbeats are waited for");
    assert_eq!(judge.poll(ms(2100)), Verdict::Gone(ms(100)));
    judge.heard(ms(2101));
    assert_eq!(judge.poll(ms(2150)), Verdict::Alive);
    assert_eq!(judge.poll(ms(2220)), Verdict::Overdue, "whoever was heard was not refused");
}

#[test]
fn a_false_suspicion_makes_the_next_link_patient() {
    let ms = Duration::from_millis;
    let mut judge = Judge::new(RHYTHM, Duration::ZERO, None);
    for sequence in 1..=40 {
        judge.beat(ms(50 * sequence), &beat(sequence, sequence * 50_000, 0));
    }
    let before = judge.patience();
    let silent = (2000..3000).step_by(50).find(|&now| matches!(judge.poll(ms(now)), Verdict::Silent(_)));
    assert_eq!(silent, Some(2350));
    let next = Judge::new(RHYTHM, Duration::ZERO, Some(judge.learned()));
    assert!(next.patience() >= 2 * before, "{:?}", next.patience());
    assert!(next.patience() <= RHYTHM.limit());
}

fn no_file() -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::default() }
}

#[derive(Clone, Debug)]
enum Said {
    Beat(u64, u64, u16),
    Bytes,
    Refused,
    Poll,
}

fn said() -> impl Strategy<Value = Said> {
    prop_oneof![
        4 => (any::<u64>(), any::<u64>(), any::<u16>()).prop_map(|(s, t, l)| Said::Beat(s, t, l)),
        2 => (0_u64..200, 0_u64..10_000_000, 0_u16..50).prop_map(|(s, t, l)| Said::Beat(s, t, l)),
        1 => Just(Said::Bytes),
        1 => Just(Said::Refused),
        2 => Just(Said::Poll),
    ]
}

/// A peer may say what it wants, and time may stand still or jump.
fn told(rhythm: Rhythm, events: &[(u64, Said)]) -> (Judge, Duration) {
    let (mut judge, mut now) = (Judge::new(rhythm, Duration::ZERO, None), Duration::ZERO);
    for (at, said) in events {
        // Goes back as well.
        now = Duration::from_micros(*at);
        match *said {
            Said::Beat(sequence, sent_us, late_ms) => judge.beat(now, &beat(sequence, sent_us, late_ms)),
            Said::Bytes => judge.heard(now),
            Said::Refused => judge.refused(now),
            Said::Poll => drop(judge.poll(now)),
        }
        let patience = judge.patience();
        assert!(patience <= rhythm.limit() && !patience.is_zero(), "{patience:?} after {said:?}");
        assert!(judge.rest() <= patience && (0.0..=1.0).contains(&judge.loss()), "{judge:?}");
    }
    (judge, events.iter().map(|(at, _)| Duration::from_micros(*at)).fold(now, Duration::max))
}

proptest! {
    #![proptest_config(no_file())]

    #[test]
    fn silence_is_suspected_in_the_end_whatever_was_said(
        events in prop::collection::vec((prop_oneof![0_u64..20_000_000, any::<u64>().prop_map(|t| t / 2)], said()), 0..60),
        interval_ms in 5_u64..1000,
        factor in 3_u64..20,
        poll_us in 1_000_u64..3_000_000,
    ) {
        let rhythm = Rhythm {
            interval: Duration::from_millis(interval_ms),
            suspect_after: Duration::from_millis(interval_ms * factor),
        };
        let (mut judge, mut now) = told(rhythm, &events);
        // What a look counts for, and what being stopped excuses.
        let counted = Duration::from_micros(poll_us).min(2 * rhythm.interval);
        let looks = rhythm.limit().as_micros() / counted.as_micros() + 2 + 10 * 2;
        let mut suspected = false;
        for _ in 0..looks {
            now += Duration::from_micros(poll_us);
            suspected |= matches!(judge.poll(now), Verdict::Silent(_) | Verdict::Gone(_));
        }
        prop_assert!(suspected, "{judge:?}");
    }

    #[test]
    fn no_rhythm_breaks_it(
        interval_us in 0_u64..1_000_000_000_000,
        suspect_us in 0_u64..1_000_000_000_000,
        events in prop::collection::vec((any::<u64>(), said()), 0..20),
    ) {
        let rhythm = Rhythm {
            interval: Duration::from_micros(interval_us),
            suspect_after: Duration::from_micros(suspect_us),
        };
        let mut judge = Judge::new(rhythm, Duration::ZERO, None);
        for (at, said) in events {
            let now = Duration::from_micros(at);
            if let Said::Beat(sequence, sent_us, late_ms) = said {
                judge.beat(now, &beat(sequence, sent_us, late_ms));
            }
            judge.poll(now);
            prop_assert!(judge.patience() <= rhythm.limit());
        }
    }
}
