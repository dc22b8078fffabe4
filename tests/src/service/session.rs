//! One client: one operation after another over one connection, all of them recorded.

use anyhow::Context;
use std::time::{Duration, Instant};

use super::Dial;
use super::history::{History, Op, Operation, is_error};
use super::resp::{CallError, Connection, Reply};

/// Operations of one session at most: some hundred MiB.
pub const MAX_OPERATIONS: usize = 1 << 20;

/// A client. A connection that is lost is counted and replaced.
pub struct Session {
    dial: Dial,
    patience: Duration,
    connection: Option<Connection>,
    client: u32,
    /// How many clients there are beside this one, whose numbers it must not take.
    stride: u32,
    history: History,
}

impl Session {
    /// Client `client` of `clients`; it waits `patience` for each reply.
    pub fn new(dial: Dial, patience: Duration, start: Instant, client: u32, clients: u32) -> Self {
        let history = History::new(start);
        Self { dial, patience, connection: None, client, stride: clients.max(1), history }
    }

    /// Performs an operation and records it; nothing if no reply came, and then it is not known whether it happened.
    ///
    /// # Errors
    /// The service cannot be reached, does not speak RESP, or the session is full.
    pub fn perform(&mut self, key: &str, op: Op) -> anyhow::Result<Option<Reply>> {
        anyhow::ensure!(
            self.history.operations.len() < MAX_OPERATIONS,
            "{MAX_OPERATIONS} operations are enough"
        );
        let mut connection = self.connect()?;
        let sent = self.history.start.elapsed();
        let called = connection.call(&words(key, &op));
        let at = self.history.start.elapsed();
        let reply = called.as_ref().ok().cloned();
        let client = self.client;
        let record =
            Operation { client, key: key.to_owned(), op, sent, reply: reply.clone().map(|r| (at, r)) };
        self.history.operations.push(record);
        self.history.end = at;
        match called {
            Ok(reply) => {
                self.connection = Some(connection);
                self.note_refusal(&reply);
            }
            Err(e) => self.lose(e)?,
        }
        Ok(reply)
    }

    /// Reads several keys, which no history has.
    ///
    /// # Errors
    /// The service does not answer.
    pub fn read(&mut self, keys: &[String]) -> anyhow::Result<Vec<Option<Vec<u8>>>> {
        let mut connection = self.connect()?;
        let request: Vec<&[u8]> =
            std::iter::once(&b"MGET"[..]).chain(keys.iter().map(String::as_bytes)).collect();
        let reply = connection.call(&request).context("reading keys back")?;
        self.connection = Some(connection);
        let Reply::Array(values) = reply else { anyhow::bail!("MGET was answered by {reply:?}") };
        anyhow::ensure!(values.len() == keys.len(), "MGET of {} keys gave {}", keys.len(), values.len());
        let value = |reply| match reply {
            Reply::Bulk(value) => Ok(value),
            other => Err(anyhow::anyhow!("MGET gave {other:?}")),
        };
        values.into_iter().map(value).collect()
    }

    /// What it did.
    pub fn finish(mut self) -> History {
        self.history.end = self.history.start.elapsed();
        self.history
    }

    fn connect(&mut self) -> anyhow::Result<Connection> {
        match self.connection.take() {
            Some(connection) => Ok(connection),
            None => Ok(Connection::new((self.dial)()?, self.patience)?),
        }
    }

    fn note_refusal(&mut self, reply: &Reply) {
        if let (true, Reply::Error(text)) = (is_error(reply), reply) {
            self.history.refused.0 += 1;
            self.history.refused.1.get_or_insert_with(|| text.clone());
        }
    }

    /// The operation may still happen at any time: what follows is done by another client.
    fn lose(&mut self, why: CallError) -> anyhow::Result<()> {
        self.client += self.stride;
        match why {
            CallError::Timeout => self.history.timeouts += 1,
            CallError::Lost(_) => self.history.resets += 1,
            CallError::Malformed(_) => return Err(why.into()),
        }
        Ok(())
    }
}

fn words<'a>(key: &'a str, op: &'a Op) -> Vec<&'a [u8]> {
    let key = key.as_bytes();
    match op {
        Op::Get => vec![b"GET", key],
        Op::Set(value) => vec![b"SET", key, value],
        Op::Incr => vec![b"INCR", key],
        Op::Append(bytes) => vec![b"APPEND", key, bytes],
    }
}
