//! Writes numbered keys over one connection, as fast as answers come, and looks whether they are there afterwards.

use anyhow::Context;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::Dial;
use super::history::{History, Op, is_error};
use super::session::Session;

/// Keys that are read back at once: few enough that a slow guest answers soon.
const BATCH: usize = 64;

/// Writes until it is told to stop.
pub struct Writer {
    ending: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    thread: JoinHandle<anyhow::Result<History>>,
}

impl Writer {
    /// Begins to write `PREFIX:0`, `PREFIX:1` and so on, each key once. Whoever writes to a service a second time takes
    /// another prefix.
    ///
    /// # Errors
    /// There are no more threads.
    pub fn start(dial: Dial, patience: Duration, prefix: &str) -> anyhow::Result<Self> {
        let (ending, acknowledged) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (end, count, prefix) = (Arc::clone(&ending), Arc::clone(&acknowledged), prefix.to_owned());
        let mut session = Session::new(dial, patience, Instant::now(), 0, 1);
        let thread = std::thread::Builder::new().name("writer".to_owned()).spawn(move || {
            for number in 0_u64.. {
                if end.load(Ordering::SeqCst) {
                    break;
                }
                let reply = session.perform(&key(&prefix, number), Op::Set(value(number)))?;
                let good = reply.is_some_and(|reply| !is_error(&reply));
                count.fetch_add(u64::from(good), Ordering::SeqCst);
            }
            Ok(session.finish())
        });
        Ok(Self { ending, acknowledged, thread: thread.context("a thread for the writer")? })
    }

    /// Writes that were acknowledged until now.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::SeqCst)
    }

    /// Whether it has ended by itself, which is an error that [`finish`](Self::finish) tells.
    pub fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// Ends it after the request that is under way.
    ///
    /// # Errors
    /// The service could not be reached, or what it said was no RESP.
    pub fn finish(self) -> anyhow::Result<History> {
        self.ending.store(true, Ordering::SeqCst);
        self.thread.join().map_err(|_| anyhow::anyhow!("the writer panicked"))?.context("the writer")
    }
}

fn key(prefix: &str, number: u64) -> String {
    format!("{prefix}:{number}")
}

fn value(number: u64) -> Vec<u8> {
    format!("value {number}").into_bytes()
}

/// A key that does not hold what it must.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// The key.
    pub key: String,
    /// What was written to it.
    pub written: Vec<u8>,
    /// Whether that was acknowledged.
    pub acknowledged: bool,
    /// What it holds.
    pub found: Option<Vec<u8>>,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let written = String::from_utf8_lossy(&self.written);
        let found = self.found.as_deref().map(String::from_utf8_lossy);
        let how = if self.acknowledged { "acknowledged" } else { "never acknowledged" };
        write!(f, "{} holds {found:?}; {written:?} was written to it, {how}", self.key)
    }
}

/// Reads back what a writer wrote: which acknowledged writes are not there, and which others are there otherwise than
/// they were written.
///
/// # Errors
/// The service does not answer.
pub fn missing(dial: Dial, patience: Duration, written: &History) -> anyhow::Result<Vec<Missing>> {
    let mut session = Session::new(dial, patience, Instant::now(), 0, 1);
    let mut missing = Vec::new();
    for batch in written.operations.chunks(BATCH) {
        let keys: Vec<String> = batch.iter().map(|operation| operation.key.clone()).collect();
        for (operation, found) in batch.iter().zip(session.read(&keys)?) {
            let Op::Set(written) = &operation.op else { continue };
            let acknowledged = matches!(&operation.reply, Some((_, reply)) if !is_error(reply));
            let good = match &found {
                Some(found) => found == written,
                None => !acknowledged,
            };
            if !good {
                let (key, written) = (operation.key.clone(), written.clone());
                missing.push(Missing { key, written, acknowledged, found });
            }
        }
    }
    Ok(missing)
}

#[cfg(test)]
mod tests {
    use super::super::server::{Fault, Server};
    use super::{Writer, missing};
    use std::time::Duration;

    const PATIENCE: Duration = Duration::from_millis(200);

    fn write(server: &Server, writes: u64) -> super::History {
        let writer = Writer::start(server.dial(), PATIENCE, "key").unwrap();
        while writer.acknowledged() < writes && !writer.has_ended() {
            std::thread::sleep(Duration::from_millis(1));
        }
        writer.finish().unwrap()
    }

    #[test]
    fn what_a_good_service_acknowledged_is_there() {
        let server = Server::start(&[]);
        let history = write(&server, 200);
        assert!(history.acknowledged().count() >= 200);
        assert_eq!((history.resets, history.timeouts, history.refused.0), (0, 0, 0));
        assert_eq!(missing(server.dial(), PATIENCE, &history).unwrap(), []);
    }

    #[test]
    fn faults_are_counted_and_what_was_never_acknowledged_may_be_there_or_not() {
        let faults = [(10, Fault::Lost), (20, Fault::LostReply), (30, Fault::Silent), (40, Fault::Refused)];
        let server = Server::start(&faults);
        let history = write(&server, 60);
        assert_eq!((history.resets, history.timeouts, history.refused.0), (2, 1, 1));
        assert!(history.refused.1.as_ref().unwrap().contains("MISCONF"));
        assert_eq!(history.operations.iter().filter(|o| o.reply.is_none()).count(), 3);
        assert_eq!(missing(server.dial(), PATIENCE, &history).unwrap(), []);
    }

    #[test]
    fn an_acknowledged_write_that_is_gone_is_found() {
        let server = Server::start(&[(10, Fault::Forgotten), (20, Fault::Forgotten)]);
        let history = write(&server, 40);
        let missing = missing(server.dial(), PATIENCE, &history).unwrap();
        let keys: Vec<_> = missing.iter().map(|missing| missing.key.as_str()).collect();
        assert_eq!(keys, ["key:10", "key:20"]);
        assert!(missing.iter().all(|missing| missing.acknowledged && missing.found.is_none()));
        assert!(missing[0].to_string().contains("value 10"), "{}", missing[0]);
    }
}
