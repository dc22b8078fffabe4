//! One question to a cluster: the member that answered last is asked first, and while it is silent the next ones as well.
//! The first answer counts.
//!
//! ```text
//!   a  ----------------------------------------x            (frozen)
//!   b       150 ms -----x refused                           (down)
//!   c                   ----> answer: it is preferred from now on
//! ```
//!
//! Every question may reach etcd more than once, and late: so only such are asked for which that does no harm. When all
//! were asked, they are asked again at growing distances: what was sent through a leader that died is lost without a
//! word, and only a new question finds its successor.

use std::future::Future;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tonic::transport::Channel;
use tonic::{Request, Status};

use super::Session;
use super::error::{EtcdError, is_final, is_vague, remedy, words};
use super::members::Members;
use super::wire;

/// How long one member is waited for alone: ten times what a healthy one takes, and less than a suspicion of death.
pub(super) const HEDGE: Duration = Duration::from_millis(150);

/// Before members that have all failed are asked again.
const PAUSE: Duration = Duration::from_millis(100);

/// How many [`HEDGE`]s are between two questions at most, when all were asked before.
const MAX_SPREAD: u32 = 8;

/// A member that has said nothing for this long is connected to anew. Elections take less than twice as long.
const STALE: Duration = Duration::from_millis(500);

/// What every answer of etcd has.
pub(super) trait Answered {
    /// Who answered.
    fn header(&self) -> Option<&wire::ResponseHeader>;
}

macro_rules! answered {
    ($($kind:ident),*) => {$(
        impl Answered for wire::$kind {
            fn header(&self) -> Option<&wire::ResponseHeader> {
                self.header.as_ref()
            }
        }
    )*};
}
answered!(RangeResponse, TxnResponse, LeaseGrantResponse, LeaseRevokeResponse, LeaseKeepAliveResponse);

/// A message for a member that knows a leader: another one is to say so instead of keeping it.
pub(super) fn with_leader<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("hasleader", tonic::metadata::MetadataValue::from_static("true"));
    request
}

/// Whom was asked when, and what came of it.
struct Asked {
    /// Per member, since when it owes an answer.
    since: Vec<Option<Instant>>,
    /// Per member, its last complaint, and whether it is final.
    failed: Vec<Option<(Status, bool)>>,
}

impl Session {
    /// The first answer of any member.
    pub(super) async fn ask<T, F>(
        &self,
        call: impl Fn(Channel, Duration) -> F + Send + Sync,
    ) -> Result<T, EtcdError>
    where
        T: Answered + Send + 'static,
        F: Future<Output = Result<T, Status>> + Send + 'static,
    {
        self.recognise().await?;
        let members = &*self.members;
        let count = members.len();
        let first = members.preferred();
        let mut asked = Asked { since: vec![None; count], failed: vec![None; count] };
        let mut attempts: JoinSet<(usize, Result<T, Status>)> = JoinSet::new();
        let (mut next, mut next_at) = (0_usize, Instant::now());
        loop {
            tokio::select! {
                biased;
                Some(done) = attempts.join_next(), if !attempts.is_empty() => {
                    // An attempt that panicked is a bug in a library: it counts as silence.
                    let Ok((member, done)) = done else { continue };
                    match done {
                        Ok(answer) if is_ours(members, &answer) => {
                            members.prefer(member);
                            asked.leave(members);
                            return Ok(answer);
                        }
                        Ok(_) => asked.fail(member, Status::unavailable("it is of another cluster")),
                        Err(status) => asked.fail(member, status),
                    }
                    if let Some(refused) = asked.verdict(members.has_tls()) {
                        return Err(refused);
                    }
                    let pause = if next < count { Duration::ZERO } else { PAUSE };
                    next_at = next_at.min(Instant::now() + pause);
                }
                () = sleep_until(self.deadline) => break,
                () = sleep_until(next_at) => {
                    let (member, now) = ((first + next) % count, Instant::now());
                    let left = self.deadline.saturating_duration_since(now);
                    let attempt = call(members.channel(member), left);
                    attempts.spawn(async move { (member, attempt.await) });
                    asked.since[member].get_or_insert(now);
                    let spread = 1 << (next / count).min(8);
                    next_at = now + HEDGE * MAX_SPREAD.min(spread);
                    next += 1;
                }
            }
        }
        asked.leave(members);
        Err(asked.silence(members, self.bound))
    }
}

fn is_ours(members: &Members, answer: &impl Answered) -> bool {
    answer.header().is_some_and(|header| members.is_ours(header.cluster_id))
}

impl Asked {
    fn fail(&mut self, member: usize, status: Status) {
        self.since[member] = None;
        let is_final = is_final(&status);
        if self.failed[member].is_none() || !is_vague(&words(&status)) {
            self.failed[member] = Some((status, is_final));
        }
    }

    /// What most of the members say for good.
    fn verdict(&self, tls: bool) -> Option<EtcdError> {
        let (status, _) = self.failed.iter().flatten().find(|(status, is_final)| {
            let same = self.failed.iter().flatten().filter(|(other, _)| other.code() == status.code());
            *is_final && same.count() > self.failed.len() / 2
        })?;
        let told = words(status);
        Some(EtcdError::Refused { code: status.code(), remedy: remedy(&told, tls), told })
    }

    /// Connects anew to whoever owes an answer for long.
    fn leave(&self, members: &Members) {
        for (member, since) in self.since.iter().enumerate() {
            if since.is_some_and(|since| since.elapsed() >= STALE) {
                members.reconnect(member);
            }
        }
    }

    fn silence(&self, members: &Members, within: Duration) -> EtcdError {
        let told = (0..members.len()).map(|member| match &self.failed[member] {
            Some((status, _)) => format!("{}: {}", members.name(member), words(status)),
            None => format!("{}: silent", members.name(member)),
        });
        let told = told.collect::<Vec<_>>().join("; ");
        EtcdError::Silent { within, remedy: remedy(&told, members.has_tls()), told }
    }
}
