//! Heartbeats: small datagrams beside the streams, so that bulk data cannot hold them up, and the judgement whether the
//! other end still lives. For both nodes.

use bytes::Bytes;
use colo_common::Term;
use colo_proto::frame::VmTag;
use colo_proto::heartbeat::Heartbeat;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What a link's heartbeats have found. Written by the link's tasks, read by the control plane.
#[derive(Debug)]
pub struct Pulse {
    times: Mutex<Times>,
    rtt_us: AtomicU64,
}

#[derive(Clone, Copy, Debug)]
struct Times {
    /// When the peer was heard last.
    heard: Instant,
    /// Silence before this is not the peer's fault.
    excused: Instant,
}

impl Pulse {
    /// A peer that is heard now, over this connection.
    pub fn new(connection: &quinn::Connection) -> Self {
        let pulse = Self::default();
        pulse.measure(connection.rtt());
        pulse
    }

    /// Something came from the peer.
    pub fn hear(&self) {
        self.times().heard = Instant::now();
    }

    /// This process could not listen: what silence there was does not count.
    pub fn excuse(&self) {
        self.times().excused = Instant::now();
    }

    /// How long nothing has come.
    pub fn unheard(&self) -> Duration {
        self.times().heard.elapsed()
    }

    /// How long nothing has come that should have.
    pub fn silence(&self) -> Duration {
        let Times { heard, excused } = *self.times();
        heard.max(excused).elapsed()
    }

    /// The round trip, as it was measured last.
    pub fn rtt(&self) -> Duration {
        Duration::from_micros(self.rtt_us.load(Ordering::Relaxed))
    }

    fn measure(&self, rtt: Duration) {
        self.rtt_us.store(u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn times(&self) -> MutexGuard<'_, Times> {
        self.times.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Pulse {
    fn default() -> Self {
        let now = Instant::now();
        Self { times: Mutex::new(Times { heard: now, excused: now }), rtt_us: AtomicU64::new(0) }
    }
}

/// How heartbeats are sent and judged.
#[derive(Clone, Copy, Debug)]
pub struct Rhythm {
    /// Between two of them.
    pub interval: Duration,
    /// Silence after which the peer is suspected.
    pub suspect_after: Duration,
}

/// Sends and takes heartbeats until the peer has been silent for too long, or the connection is lost; answers why.
/// While this process itself could not run, the peer is given the benefit of the doubt.
pub async fn beat(
    connection: &quinn::Connection,
    vm: VmTag,
    term: Term,
    rhythm: Rhythm,
    pulse: &Pulse,
) -> String {
    let started = Instant::now();
    let mut ticks = tokio::time::interval(rhythm.interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut sequence, mut last_tick) = (0, Instant::now());
    loop {
        tokio::select! {
            _ = ticks.tick() => {
                sequence += 1;
                let sent_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
                let beat = Heartbeat { vm, term, sequence, sent_us };
                if let Err(e) = connection.send_datagram(Bytes::copy_from_slice(&beat.encode())) {
                    return format!("heartbeats cannot be sent: {e}");
                }
                // A tick that comes late means that this host was busy or stopped, and the peer's beats wait unread.
                let late = last_tick.elapsed() > rhythm.suspect_after / 2;
                last_tick = Instant::now();
                pulse.measure(connection.rtt());
                if late {
                    pulse.excuse();
                }
                if pulse.silence() > rhythm.suspect_after {
                    return format!("silent for {} ms", pulse.silence().as_millis());
                }
            }
            datagram = connection.read_datagram() => match datagram {
                Ok(bytes) => {
                    if Heartbeat::decode(&bytes).is_ok_and(|beat| beat.vm == vm) {
                        pulse.hear();
                    }
                }
                Err(e) => return format!("the connection is lost: {e}"),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Pulse;
    use std::time::Duration;

    #[test]
    fn an_excuse_ends_the_silence_and_not_the_time_unheard() {
        let pulse = Pulse::default();
        pulse.measure(Duration::from_micros(310));
        std::thread::sleep(Duration::from_millis(2));
        pulse.excuse();
        assert!(pulse.silence() < pulse.unheard());
        assert_eq!(pulse.rtt(), Duration::from_micros(310));
    }
}
