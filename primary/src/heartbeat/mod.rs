//! Heartbeats: small datagrams beside the streams, so that bulk data cannot hold them up. For both nodes. [`judge`]
//! decides whether the other end still lives; here is what it hears.

pub mod judge;
mod knock;

use bytes::Bytes;
use colo_common::Term;
use colo_proto::frame::VmTag;
use colo_proto::heartbeat::Heartbeat;
use quinn::Connection;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::time::sleep_until;

pub use judge::Rhythm;
use judge::{Judge, Learned, Verdict};
use knock::Knock;

/// What remains of the worst lateness after each heartbeat: half after 1 s of the usual ones.
const LATENESS_KEPT: f64 = 31.0 / 32.0;

/// What a link's heartbeats have found. Written by the link's tasks, read by the control plane.
#[derive(Debug)]
pub struct Pulse {
    heard: Mutex<Instant>,
    rtt_us: AtomicU64,
    patience_us: AtomicU64,
}

impl Pulse {
    /// A peer that is heard now, over this connection.
    pub fn new(connection: &Connection) -> Self {
        let pulse = Self::default();
        pulse.measure(connection.rtt());
        pulse
    }

    /// Something came from the peer.
    pub fn hear(&self) {
        *self.heard_at() = Instant::now();
    }

    /// How long nothing has come.
    pub fn unheard(&self) -> Duration {
        self.heard_at().elapsed()
    }

    /// The round trip, as it was measured last.
    pub fn rtt(&self) -> Duration {
        Duration::from_micros(self.rtt_us.load(Ordering::Relaxed))
    }

    /// The silence after which the peer is suspected, as things are; zero before its first heartbeats were judged.
    pub fn patience(&self) -> Duration {
        Duration::from_micros(self.patience_us.load(Ordering::Relaxed))
    }

    fn measure(&self, rtt: Duration) {
        self.rtt_us.store(micros(rtt), Ordering::Relaxed);
    }

    fn wait(&self, patience: Duration) {
        self.patience_us.store(micros(patience), Ordering::Relaxed);
    }

    fn heard_at(&self) -> MutexGuard<'_, Instant> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Pulse {
    fn default() -> Self {
        let (rtt_us, patience_us) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { heard: Mutex::new(Instant::now()), rtt_us, patience_us }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// How a node's links are watched: the rhythm, and what the link before has taught, so that a suspicion that was wrong
/// is not repeated at once.
#[derive(Clone, Debug)]
pub struct Watch {
    rhythm: Rhythm,
    learned: Arc<Mutex<Option<Learned>>>,
}

impl Watch {
    /// Nothing learned yet.
    pub fn new(rhythm: Rhythm) -> Self {
        Self { rhythm, learned: Arc::default() }
    }

    /// Sends and takes heartbeats until the peer is taken for dead, or the connection is lost; answers why. On a task of
    /// its own, which no encoding or staging of the link holds up; it ends when this is dropped.
    pub async fn beat(&self, connection: &Connection, vm: VmTag, term: Term, pulse: &Arc<Pulse>) -> String {
        let (connection, watch, pulse) = (connection.clone(), self.clone(), Arc::clone(pulse));
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(async move {
            let mut heart = Heart::new(connection, vm, term, &watch, pulse).await;
            let why = heart.beat().await;
            watch.learned().replace(heart.judge.learned());
            why
        });
        match tasks.join_next().await {
            Some(Ok(why)) => why,
            // It panicked, which ends the process, or the runtime ends.
            _ => "heartbeats have ended".to_owned(),
        }
    }

    fn learned(&self) -> MutexGuard<'_, Option<Learned>> {
        self.learned.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One end of a link's heartbeats.
struct Heart {
    connection: Connection,
    vm: VmTag,
    term: Term,
    interval: Duration,
    pulse: Arc<Pulse>,
    judge: Judge,
    knock: Knock,
    /// Frames of the peer's that QUIC has taken: acks, streams, everything, as they came and not as they are read.
    frames: u64,
    began: Instant,
    sequence: u64,
    /// How late the ticks ran lately, at worst, in milliseconds.
    late_ms: f64,
}

impl Heart {
    async fn new(connection: Connection, vm: VmTag, term: Term, watch: &Watch, pulse: Arc<Pulse>) -> Self {
        let judge = Judge::new(watch.rhythm, Duration::ZERO, *watch.learned());
        let knock = Knock::at(connection.remote_address()).await;
        let (frames, interval, began) = (0, watch.rhythm.interval, Instant::now());
        Self { connection, vm, term, interval, pulse, judge, knock, frames, began, sequence: 0, late_ms: 0.0 }
    }

    async fn beat(&mut self) -> String {
        let mut due = Instant::now();
        loop {
            let wake = due.min(Instant::now() + self.judge.rest());
            tokio::select! {
                // What has come is taken before anything is judged.
                biased;
                datagram = self.connection.read_datagram() => match datagram {
                    Ok(bytes) => self.take(&bytes),
                    Err(e) => return format!("the connection is lost: {e}"),
                },
                () = self.knock.refused() => self.judge.refused(self.began.elapsed()),
                () = sleep_until(wake.into()) => {}
            }
            if let Some(why) = self.look() {
                return why;
            }
            if Instant::now() >= due {
                if let Err(why) = self.send(due) {
                    return why;
                }
                due = Instant::now() + self.interval;
            }
        }
    }

    fn take(&mut self, datagram: &[u8]) {
        if let Ok(beat) = Heartbeat::decode(datagram)
            && beat.vm == self.vm
        {
            self.judge.beat(self.began.elapsed(), &beat);
            self.pulse.hear();
        }
    }

    /// Judges the peer; answers why it is given up.
    fn look(&mut self) -> Option<String> {
        let frames = frames(&self.connection);
        if frames != self.frames {
            self.frames = frames;
            self.judge.heard(self.began.elapsed());
            self.pulse.hear();
        }
        self.pulse.wait(self.judge.patience());
        match self.judge.poll(self.began.elapsed()) {
            Verdict::Alive => None,
            Verdict::Overdue => {
                if self.knock.ask() {
                    self.judge.refused(self.began.elapsed());
                }
                None
            }
            Verdict::Silent(silence) => Some(format!("silent for {} ms", silence.as_millis())),
            Verdict::Gone(silence) => {
                Some(format!("nobody listens there any more, silent for {} ms", silence.as_millis()))
            }
        }
    }

    fn send(&mut self, due: Instant) -> Result<(), String> {
        let late = due.elapsed().as_secs_f64() * 1e3;
        self.late_ms = (self.late_ms * LATENESS_KEPT).max(late);
        self.sequence += 1;
        // Saturates.
        let late_ms = self.late_ms as u16;
        let (vm, term, sequence) = (self.vm, self.term, self.sequence);
        let beat = Heartbeat { vm, term, sequence, sent_us: micros(self.began.elapsed()), late_ms };
        self.pulse.measure(self.connection.rtt());
        let sent = self.connection.send_datagram(Bytes::copy_from_slice(&beat.encode()));
        sent.map_err(|e| format!("heartbeats cannot be sent: {e}"))
    }
}

/// Frames that only a living peer sends, in packets that its key has signed.
fn frames(connection: &Connection) -> u64 {
    let came = connection.stats().frame_rx;
    let (streams, limits) = (came.stream + came.reset_stream, came.max_data + came.max_stream_data);
    came.acks + came.datagram + came.ping + streams + limits
}

#[cfg(test)]
mod tests {
    use super::Pulse;
    use std::time::Duration;

    #[test]
    fn a_pulse_tells_what_was_measured_last() {
        let pulse = Pulse::default();
        pulse.measure(Duration::from_micros(310));
        pulse.wait(Duration::from_millis(350));
        std::thread::sleep(Duration::from_millis(2));
        assert!(pulse.unheard() >= Duration::from_millis(2));
        pulse.hear();
        assert!(pulse.unheard() < Duration::from_secs(1));
        assert_eq!((pulse.rtt(), pulse.patience()), (Duration::from_micros(310), Duration::from_millis(350)));
    }
}
