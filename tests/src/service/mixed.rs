//! Several clients that read, write, count and append on few keys, so that they meet.

use anyhow::Context;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::Dial;
use super::history::{History, Op};
use super::session::Session;
use crate::seed::Seed;

/// What clients do.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How many there are, each with a connection of its own.
    pub clients: u32,
    /// How many keys there are for all of them.
    pub keys: u32,
    /// What the keys' names begin with: keys that nobody has used before.
    pub prefix: String,
    /// Decides what they do.
    pub seed: u64,
    /// How long each waits for a reply.
    pub patience: Duration,
}

/// Clients at work until they are told to stop.
pub struct Mixed {
    plan: Plan,
    dial: Dial,
    start: Instant,
    ending: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    threads: Vec<JoinHandle<anyhow::Result<History>>>,
}

impl Mixed {
    /// Begins.
    ///
    /// # Errors
    /// There are no more threads.
    pub fn start(dial: &Dial, plan: Plan) -> anyhow::Result<Self> {
        let (start, ending, answered) = (Instant::now(), Arc::<AtomicBool>::default(), Arc::default());
        let mut this = Self { plan, dial: Arc::clone(dial), start, ending, answered, threads: Vec::new() };
        for client in 0..this.plan.clients {
            let thread = this.client(client)?;
            this.threads.push(thread);
        }
        Ok(this)
    }

    fn client(&self, client: u32) -> anyhow::Result<JoinHandle<anyhow::Result<History>>> {
        let (plan, end, answered) = (self.plan.clone(), Arc::clone(&self.ending), Arc::clone(&self.answered));
        let mut session = self.session(client);
        let mut seed = Seed::new(plan.seed ^ (u64::from(client) << 32));
        let work = move || {
            let mut number = 0;
            while !end.load(Ordering::SeqCst) {
                number += 1;
                let key = plan.key(seed.below(u64::from(plan.keys)));
                let unique = u64::from(client) + u64::from(plan.clients) * number;
                let reply = session.perform(&key, choose(&mut seed, unique))?;
                answered.fetch_add(u64::from(reply.is_some()), Ordering::SeqCst);
            }
            Ok(session.finish())
        };
        std::thread::Builder::new()
            .name(format!("client-{client}"))
            .spawn(work)
            .context("a thread for a client")
    }

    fn session(&self, client: u32) -> Session {
        // One number more, for the reads at the end.
        Session::new(Arc::clone(&self.dial), self.plan.patience, self.start, client, self.plan.clients + 1)
    }

    /// Requests that were answered until now.
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::SeqCst)
    }

    /// Whether a client has ended by itself, which is an error that [`finish`](Self::finish) tells.
    pub fn has_ended(&self) -> bool {
        self.threads.iter().any(JoinHandle::is_finished)
    }

    /// Ends them after the requests that are under way, and reads every key once more, so that what was lost last is
    /// seen too.
    ///
    /// # Errors
    /// The service could not be reached, or what it said was no RESP.
    pub fn finish(mut self) -> anyhow::Result<History> {
        self.ending.store(true, Ordering::SeqCst);
        let mut history = History::new(self.start);
        for thread in self.threads.drain(..) {
            let done = thread.join().map_err(|_| anyhow::anyhow!("a client panicked"))?;
            history.merge(done.context("a client")?);
        }
        let mut last = self.session(self.plan.clients);
        for key in 0..self.plan.keys {
            last.perform(&self.plan.key(u64::from(key)), Op::Get)?;
        }
        history.merge(last.finish());
        Ok(history)
    }
}

impl Plan {
    fn key(&self, number: u64) -> String {
        format!("{}:{number}", self.prefix)
    }
}

/// Values that are set are each other's like only by counting and appending, so that a read says whose write it saw. What
/// builds on the value before is as frequent as what hides it, since a write that is lost can only be found out where it
/// is not hidden at once; and values are set anew often enough to stay short. No zero is appended: after a zero that began
/// a key, what follows is no number that Redis counts on ("05").
fn choose(seed: &mut Seed, unique: u64) -> Op {
    match seed.below(10) {
        0..4 => Op::Get,
        4..6 => Op::Set((unique * 1000).to_string().into_bytes()),
        6..8 => Op::Incr,
        _ => Op::Append(vec![b'1' + (unique % 9) as u8]),
    }
}

#[cfg(test)]
mod tests {
    use super::super::history::Op;
    use super::super::linear::{Verdict, check};
    use super::super::server::{Fault, Server};
    use super::{History, Mixed, Plan, choose};
    use crate::seed::Seed;
    use std::time::Duration;

    fn run(faults: &[(usize, Fault)], answers: u64) -> History {
        let server = Server::start(faults);
        let patience = Duration::from_millis(100);
        let plan = Plan { clients: 4, keys: 3, prefix: "mixed".to_owned(), seed: 7, patience };
        let mixed = Mixed::start(&server.dial(), plan).unwrap();
        while mixed.answered() < answers && !mixed.has_ended() {
            std::thread::sleep(Duration::from_millis(1));
        }
        mixed.finish().unwrap()
    }

    #[test]
    fn a_good_service_is_linearizable_whatever_is_lost() {
        let lost = [Fault::Lost, Fault::LostReply, Fault::Silent, Fault::Refused];
        let faults: Vec<_> = (1..25).map(|n| (n * 37, lost[n % 4])).collect();
        let history = run(&faults, 2000);
        assert_eq!((history.resets, history.timeouts), (12, 6));
        assert_eq!(check(&history.operations), Verdict::Linearizable);
    }

    #[test]
    fn what_is_appended_begins_a_number() {
        let mut seed = Seed::new(1);
        let zero = |op: &Op| matches!(op, Op::Append(digits) if digits.starts_with(b"0"));
        assert_eq!((0..1000).map(|unique| choose(&mut seed, unique)).filter(zero).count(), 0);
    }

    #[test]
    fn a_service_that_forgets_is_found_out() {
        let faults: Vec<_> = (1..50).map(|n| (n * 19, Fault::Forgotten)).collect();
        let history = run(&faults, 1000);
        let verdict = check(&history.operations);
        assert!(matches!(verdict, Verdict::Broken(_)), "{verdict:?}");
    }
}
