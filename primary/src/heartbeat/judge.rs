//! Whether the other end of a link still lives: pure, time is an argument.
//!
//! Silence is counted in time in which this process could listen, so being stopped, or too busy to look, is not held
//! against the peer. How much of it is too much is learned from the heartbeats that came:
//!
//! ```text
//!   wait = longest likely run of lost heartbeats + 4 * deviation of the delay + 2 * the peer's own lateness
//!          at least 2 * the longest gap lately,
//!          at least 7/10 of suspect_after, at most 4 * suspect_after
//! ```
//!
//! A sequence number tells a heartbeat that is lost from one that is late, and the times of sending tell a slow path
//! from a slow peer. A peer whose kernel says that nobody listens any more is not waited for beyond two heartbeats.

use std::time::Duration;

use colo_proto::heartbeat::Heartbeat;

/// The least wait, as a share of `suspect_after`: with the defaults a dead peer on a quiet path is suspected after
/// 350 ms, while six lost heartbeats in a row are forgiven.
const FLOOR: f64 = 0.7;
/// The longest wait, in times of `suspect_after`: on a path that is worse, a dead peer must be seen too.
pub const MAX_FACTOR: u32 = 4;
/// Chance of a run of lost heartbeats at which a peer is taken for dead: one in a thousand million is one in two years.
const RUN_CHANCE: f64 = 1e-9;
/// Loss of a path that has lost nothing yet, and the most that is believed.
const LOSS: (f64, f64) = (1e-3, 0.8);
/// What was learned of loss may be too good by a third.
const LOSS_MARGIN: f64 = 1.33;
/// Heartbeats that a path with the least loss may lose in a row; what the floor is for.
const CALM_RUN: f64 = 3.0;
/// Weight of one heartbeat in what is learned of loss: a hundred of them, some seconds.
const LOSS_WEIGHT: f64 = 1.0 / 128.0;
/// Weight of one lost heartbeat in what is learned of bursts: few are lost, so each says more.
const BURST_WEIGHT: f64 = 1.0 / 8.0;
/// Weight of one heartbeat in what is learned of delay and pace (Jacobson's).
const WEIGHT: f64 = 1.0 / 16.0;
/// Deviations of the delay that are still usual (Jacobson's).
const DEVIATIONS: f64 = 4.0;
/// What remains of the longest gap, and of bursts, after each heartbeat: half after 18 s of the usual ones.
const KEPT: f64 = 1.0 - 1.0 / 512.0;
/// Heartbeats before anything that was learned shortens the wait.
const WARM: u32 = 20;
/// Heartbeats that one sequence number may skip, as far as is counted: a peer may say any number.
const MAX_SKIP: u64 = 64;
/// Longest step of a time that is believed, in microseconds, for the same reason.
const MAX_STEP_US: f64 = 10e6;
/// Heartbeats after which one that does not come is overdue.
const OVERDUE: f64 = 1.5;
/// Heartbeats that a peer whose kernel refuses is waited for: the refusal may be of a socket that was before.
const REFUSED: f64 = 2.0;
/// Times within one silence that this process may have been stopped before the silence counts all the same.
const MAX_EXCUSES: u32 = 10;

/// How heartbeats are sent and judged.
#[derive(Clone, Copy, Debug)]
pub struct Rhythm {
    /// Between two of them.
    pub interval: Duration,
    /// Silence after which a peer is suspected on a calm path, at most.
    pub suspect_after: Duration,
}

impl Rhythm {
    /// The longest silence that any path excuses.
    pub fn limit(self) -> Duration {
        self.suspect_after.saturating_mul(MAX_FACTOR)
    }
}

/// What is thought of the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It lives.
    Alive,
    /// Its heartbeat is late: its kernel may be asked.
    Overdue,
    /// Nothing has come for so long that it is taken for dead.
    Silent(Duration),
    /// Its kernel says that nobody listens there, and nothing has come for so long.
    Gone(Duration),
}

/// What heartbeats have taught of a path and its ends, in microseconds.
#[derive(Clone, Copy, Debug)]
pub struct Learned {
    beats: u32,
    /// Between two that were sent.
    pace: f64,
    /// Share that is lost.
    loss: f64,
    /// Share of those after a lost one that are lost too.
    burst: f64,
    /// Delay, from any origin, and its deviation.
    delay: f64,
    deviation: f64,
    /// The longest gap lately.
    gap: f64,
}

#[derive(Clone, Copy, Debug)]
struct Newest {
    sequence: u64,
    sent_us: u64,
    /// When it came, by this host's clock.
    came: Duration,
    /// The same in time listened.
    heard: f64,
    /// Its delay, from any origin.
    delay: f64,
}

/// The judge of one link.
#[derive(Clone, Debug)]
pub struct Judge {
    rhythm: Rhythm,
    learned: Learned,
    newest: Option<Newest>,
    /// How late the peer said that it runs.
    late: f64,
    now: Duration,
    /// Time listened, in microseconds.
    listened: f64,
    /// When the peer was heard last, in time listened.
    heard: f64,
    excuses: u32,
    /// Until then, delays are those of this process and not of the path.
    settling: f64,
    refused: bool,
}

fn us(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn time(us: f64) -> Duration {
    Duration::try_from_secs_f64(us / 1e6).unwrap_or(Duration::MAX)
}

impl Judge {
    /// A peer that is heard `now`, by any monotonic clock; `learned` on the link before, if there was one.
    pub fn new(rhythm: Rhythm, now: Duration, learned: Option<Learned>) -> Self {
        let interval = us(rhythm.interval).max(1.0);
        let (loss, burst, delay, deviation) = (0.0, 0.0, 0.0, 0.0);
        let fresh = Learned { beats: 0, pace: interval, loss, burst, delay, deviation, gap: interval };
        // Delays were of another connection's clock; how much they vary was not.
        let learned = learned.map_or(fresh, |learned| Learned { delay: 0.0, ..learned });
        Self {
            rhythm,
            learned,
            newest: None,
            late: 0.0,
            now,
            listened: 0.0,
            heard: 0.0,
            excuses: 0,
            settling: 0.0,
            refused: false,
        }
    }

    /// A heartbeat came.
    pub fn beat(&mut self, now: Duration, beat: &Heartbeat) {
        self.listen(now);
        self.late = f64::from(beat.late_ms) * 1e3;
        let Some(newest) = self.newest else {
            self.follow(beat, 0.0);
            return self.hear();
        };
        let came = us(now.saturating_sub(newest.came)).min(MAX_STEP_US);
        let sent = step(newest.sent_us, beat.sent_us);
        let delay = newest.delay + came - sent;
        if beat.sequence <= newest.sequence {
            // Overtaken and not lost; the peer sent newer ones, so it says nothing of now.
            self.learned.loss = (self.learned.loss - LOSS_WEIGHT).max(0.0);
            self.learned.burst = (self.learned.burst - BURST_WEIGHT).max(0.0);
            return self.learn_delay(delay);
        }
        let steps = beat.sequence - newest.sequence;
        self.learn_loss(steps - 1);
        if beat.sent_us >= newest.sent_us {
            self.learn_pace(sent / steps as f64);
            self.learn_delay(delay);
        }
        self.learned.gap = (self.learned.gap * KEPT).max((self.listened - newest.heard).min(self.limit()));
        self.learned.beats = self.learned.beats.saturating_add(1);
        self.follow(beat, delay);
        self.hear();
    }

    /// Something else came from the peer, just now.
    pub fn heard(&mut self, now: Duration) {
        self.listen(now);
        self.hear();
    }

    /// The peer's kernel says that nobody listens there.
    pub fn refused(&mut self, now: Duration) {
        self.listen(now);
        self.refused = true;
    }

    /// What is to be thought now. Asked at least once in each interval; a longer pause is this process' own.
    pub fn poll(&mut self, now: Duration) -> Verdict {
        self.listen(now);
        let silence = self.listened - self.heard;
        if self.refused && silence >= (REFUSED * self.pace()).min(self.wait()) {
            Verdict::Gone(time(silence))
        } else if silence >= self.wait() {
            // Were it alive, this would have been too hasty: the next link waits longer for a while.
            self.learned.gap = self.learned.gap.max(silence.min(self.limit()));
            Verdict::Silent(time(silence))
        } else if silence > OVERDUE * self.pace() {
            Verdict::Overdue
        } else {
            Verdict::Alive
        }
    }

    /// How long until a peer that stays silent is suspected, if this process can listen for all of it.
    pub fn rest(&self) -> Duration {
        time((self.wait() - (self.listened - self.heard)).max(0.0))
    }

    /// The silence after which the peer is suspected, as things are.
    pub fn patience(&self) -> Duration {
        time(self.wait())
    }

    /// Share of heartbeats that were lost lately.
    pub fn loss(&self) -> f64 {
        self.learned.loss
    }

    /// What the next link to this peer may begin with.
    pub fn learned(&self) -> Learned {
        self.learned
    }

    fn hear(&mut self) {
        (self.heard, self.excuses, self.refused) = (self.listened, 0, false);
    }

    fn follow(&mut self, beat: &Heartbeat, mut delay: f64) {
        // Clocks drift apart, and a peer may say any time: far from its origin a delay would lose precision.
        if delay.abs() > MAX_STEP_US {
            delay = (delay - self.learned.delay).clamp(-MAX_STEP_US, MAX_STEP_US);
            self.learned.delay = 0.0;
        }
        let (came, heard) = (self.now, self.listened);
        self.newest = Some(Newest { sequence: beat.sequence, sent_us: beat.sent_us, came, heard, delay });
    }

    /// Time goes on. What is more than two intervals since the last look was not listened: this process was stopped, or
    /// had no core, and what the peer sent waits unread. It gets two more intervals to be read.
    fn listen(&mut self, now: Duration) {
        let passed = us(now.saturating_sub(self.now));
        self.now = self.now.max(now);
        let most = 2.0 * us(self.rhythm.interval).max(1.0);
        self.listened += passed.min(most);
        if passed > most {
            self.settling = self.listened + most;
            if self.excuses < MAX_EXCUSES {
                self.excuses += 1;
                self.heard = self.heard.max(self.listened + most - self.wait()).min(self.listened);
            }
        }
    }

    fn learn_loss(&mut self, lost: u64) {
        let learned = &mut self.learned;
        for _ in 0..lost.min(MAX_SKIP) {
            learned.loss += (1.0 - learned.loss) * LOSS_WEIGHT;
        }
        for _ in 1..lost.min(MAX_SKIP) {
            learned.burst += (1.0 - learned.burst) * BURST_WEIGHT;
        }
        learned.loss *= 1.0 - LOSS_WEIGHT;
        learned.burst *= if lost > 0 { 1.0 - BURST_WEIGHT } else { KEPT };
    }

    fn learn_pace(&mut self, pace: f64) {
        self.learned.pace += (pace - self.learned.pace) * WEIGHT;
    }

    fn learn_delay(&mut self, delay: f64) {
        if self.listened < self.settling {
            return;
        }
        let off = (delay - self.learned.delay).clamp(-MAX_STEP_US, MAX_STEP_US);
        self.learned.delay += off * WEIGHT;
        self.learned.deviation += (off.abs() - self.learned.deviation) * WEIGHT;
    }

    fn limit(&self) -> f64 {
        us(self.rhythm.limit())
    }

    /// Between two heartbeats of the peer.
    fn pace(&self) -> f64 {
        self.learned.pace.min(self.limit()).max(us(self.rhythm.interval)).max(1.0)
    }

    fn wait(&self) -> f64 {
        let after = us(self.rhythm.suspect_after);
        let (pace, learned) = (self.pace(), &self.learned);
        let floor = after * FLOOR;
        let loss = (learned.loss * LOSS_MARGIN).clamp(LOSS.0, LOSS.1);
        let more = (learned.burst * LOSS_MARGIN).clamp(loss, LOSS.1);
        // One is lost, and then one after the other.
        let run = 1.0 + (RUN_CHANCE / loss).ln() / more.ln() - CALM_RUN;
        let calm = (floor / us(self.rhythm.interval).max(1.0) - 1.0).clamp(1.0, CALM_RUN);
        let usual = pace * (1.0 + calm + run) + DEVIATIONS * learned.deviation + 2.0 * self.late;
        let least = if learned.beats < WARM { after } else { floor };
        usual.max(2.0 * learned.gap).max(least).min(self.limit())
    }
}

/// From one time of sending to another, as far as it is believed.
fn step(from: u64, to: u64) -> f64 {
    let size = from.abs_diff(to) as f64;
    if to >= from { size.min(MAX_STEP_US) } else { -size.min(MAX_STEP_US) }
}
