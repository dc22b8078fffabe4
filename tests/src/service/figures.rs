//! What a summary says of what a client saw: rates, latencies, the longest silence, and that nothing was lost.

use serde::Serialize;
use std::ops::Range;
use std::time::{Duration, Instant};

use super::history::{History, Operation};
use crate::measure::quantile_ms;

/// A time without any reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// The last reply before it, or the beginning.
    pub from: Duration,
    /// The first one after it, or the end.
    pub until: Duration,
}

impl Gap {
    /// How long it was.
    pub fn length(self) -> Duration {
        self.until.saturating_sub(self.from)
    }
}

impl History {
    /// The longest time without a reply that ended after `from`. It may have begun before, and end with the history.
    pub fn longest_gap(&self, from: Duration) -> Gap {
        let mut last = Duration::ZERO;
        let mut longest = Gap { from, until: from };
        for until in self.replies().into_iter().chain([self.end]) {
            let gap = Gap { from: last, until };
            if until > from && gap.length() > longest.length() {
                longest = gap;
            }
            last = until;
        }
        longest
    }

    /// Latencies of requests that were sent and answered well within this time: one that met its end says something of
    /// what came then.
    pub fn latencies(&self, within: &Range<Duration>) -> Vec<Duration> {
        let inside = self.acknowledged().filter(|operation| within.contains(&operation.sent));
        let inside =
            inside.filter(|operation| operation.reply.as_ref().is_some_and(|(at, _)| *at < within.end));
        inside.filter_map(Operation::latency).collect()
    }

    /// Replies a second in this time; nothing if it is no time.
    pub fn rate(&self, within: &Range<Duration>) -> Option<f64> {
        let seconds = within.end.saturating_sub(within.start).as_secs_f64();
        let replies = self.acknowledged().filter_map(|operation| operation.reply.as_ref());
        let count = replies.filter(|(at, _)| within.contains(at)).count();
        (seconds > 0.0).then(|| count as f64 / seconds)
    }
}

/// Instants of a run that figures are told apart by.
#[derive(Clone, Copy, Debug)]
pub struct Marks {
    /// The guest was protected from then on; unprotected before.
    pub protected: Instant,
    /// Its host was killed.
    pub killed: Instant,
}

/// What is known over all runs.
#[derive(Clone, Debug, Default)]
pub struct Account {
    requests: u64,
    before: Vec<f64>,
    after: Vec<f64>,
    longest_gap: Duration,
    protected: Vec<Duration>,
    unprotected: Vec<Duration>,
    acked_lost: u64,
    resets: u64,
    timeouts: u64,
    refused: u64,
}

/// What a summary says: sums over all runs, medians of their rates, the longest gap of any.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Requests, answered or not.
    pub requests: u64,
    /// Requests a second while protected, before the kill.
    pub rps_before: f64,
    /// From the first reply after the longest gap that the kill made, to the end.
    pub rps_after: f64,
    /// The longest time without a reply in any run.
    pub longest_gap_ms: f64,
    /// Of requests before the kill.
    pub latency_ms: Latencies,
    /// Writes that were acknowledged and are not there.
    pub acked_lost: u64,
    /// Connections that were lost.
    pub resets: u64,
    /// Requests whose reply was waited for in vain.
    pub timeouts: u64,
    /// Requests that the service refused.
    pub refused: u64,
}

/// Latencies by whether output waited for a second host.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Latencies {
    /// It did.
    pub protected: Quantiles,
    /// It did not.
    pub unprotected: Quantiles,
}

/// Quantiles of latencies.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Quantiles {
    /// The median.
    pub p50: f64,
    /// All but one of a hundred.
    pub p99: f64,
}

impl Quantiles {
    fn of(samples: &[Duration]) -> Self {
        let mut samples = samples.to_vec();
        Self { p50: rounded(quantile_ms(&mut samples, 0.5)), p99: rounded(quantile_ms(&mut samples, 0.99)) }
    }
}

impl Account {
    /// Adds a run, in which so many acknowledged writes were lost.
    pub fn add(&mut self, history: &History, marks: Marks, acked_lost: u64) {
        let (protected, killed) = (history.at(marks.protected), history.at(marks.killed));
        let gap = history.longest_gap(killed);
        self.requests += history.operations.len() as u64;
        self.before.extend(history.rate(&(protected..killed)));
        self.after.extend(history.rate(&(gap.until..history.end)));
        self.longest_gap = self.longest_gap.max(history.longest_gap(Duration::ZERO).length());
        self.protected.extend(history.latencies(&(protected..killed)));
        self.unprotected.extend(history.latencies(&(Duration::ZERO..protected)));
        self.acked_lost += acked_lost;
        self.resets += history.resets;
        self.timeouts += history.timeouts;
        self.refused += history.refused.0;
    }

    /// All in all.
    pub fn summary(&self) -> Summary {
        Summary {
            requests: self.requests,
            rps_before: rounded(median(&self.before)),
            rps_after: rounded(median(&self.after)),
            longest_gap_ms: rounded(self.longest_gap.as_secs_f64() * 1e3),
            latency_ms: Latencies {
                protected: Quantiles::of(&self.protected),
                unprotected: Quantiles::of(&self.unprotected),
            },
            acked_lost: self.acked_lost,
            resets: self.resets,
            timeouts: self.timeouts,
            refused: self.refused,
        }
    }
}

/// To three digits after the point: more was not measured.
fn rounded(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::super::history::{History, Op, Operation};
    use super::super::resp::Reply;
    use super::{Account, Gap, Marks};
    use std::time::{Duration, Instant};

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// One request each 10 ms that takes 4 ms; from 1000 to 1500 ms there is no answer, but one that took so long.
    fn history() -> History {
        let mut history = History::new(Instant::now());
        let sent = (0..100).chain(150..200).map(|n| n * 10);
        for (number, sent) in sent.enumerate() {
            let until = if sent == 990 { 1500 } else { sent + 4 };
            let reply = Some((ms(until), Reply::Status("OK".to_owned())));
            let (key, op) = (format!("k:{number}"), Op::Set(Vec::new()));
            history.operations.push(Operation { client: 0, key, op, sent: ms(sent), reply });
        }
        history.end = ms(2000);
        history
    }

    #[test]
    fn the_longest_gap_is_found_where_it_is_looked_for() {
        let history = history();
        assert_eq!(history.longest_gap(Duration::ZERO), Gap { from: ms(984), until: ms(1500) });
        assert_eq!(history.longest_gap(ms(1200)), Gap { from: ms(984), until: ms(1500) });
        assert_eq!(history.longest_gap(ms(1600)).length(), ms(10));
        assert_eq!(history.longest_gap(ms(5000)).length(), Duration::ZERO);
        let mut none = History::new(Instant::now());
        none.end = ms(70);
        assert_eq!(none.longest_gap(Duration::ZERO), Gap { from: ms(0), until: ms(70) });
    }

    #[test]
    fn a_summary_tells_the_phases_apart() {
        let history = history();
        let marks = Marks { protected: history.start + ms(500), killed: history.start + ms(1000) };
        let mut account = Account::default();
        account.add(&history, marks, 0);
        account.add(&history, marks, 2);
        let summary = account.summary();
        assert_eq!((summary.requests, summary.acked_lost, summary.resets), (300, 2, 0));
        assert_eq!(summary.longest_gap_ms, 516.0);
        assert_eq!(summary.rps_before, 98.0);
        assert_eq!(summary.rps_after, 102.0);
        assert_eq!((summary.latency_ms.protected.p50, summary.latency_ms.protected.p99), (4.0, 4.0));
        let json = serde_json::to_value(&summary).unwrap();
        assert_eq!(json["latency_ms"]["unprotected"]["p99"], 4.0);
    }
}
