//! Heartbeats: small datagrams beside the streams, so that bulk data cannot hold them up, and the judgement whether the
//! other end still lives. For both nodes.

use bytes::Bytes;
use colo_common::Term;
use colo_proto::frame::VmTag;
use colo_proto::heartbeat::Heartbeat;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

/// When the peer was last heard.
#[derive(Debug)]
pub struct Pulse {
    heard: Mutex<Instant>,
}

impl Default for Pulse {
    fn default() -> Self {
        Self { heard: Mutex::new(Instant::now()) }
    }
}

impl Pulse {
    /// Something came from the peer.
    pub fn hear(&self) {
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// How long nothing has come.
    pub fn silence(&self) -> Duration {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
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
                if late {
                    pulse.hear();
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
