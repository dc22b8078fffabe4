//! The streams of what happened: the audit trail from any entry on, and events as they come; and who asked for what.

use colo_common::tls;
use colo_proto::v1::{AuditEntry, AuditKind, Event, ListAuditRequest, list_audit_request::Start};
use std::sync::Arc;
use tokio::sync::{broadcast, mpsc, watch};
use tonic::{Request, Status};

use super::Plane;
use super::reason::Reason;
use crate::audit::{Trail, TrailError};

/// Entries read at once; a reader that is slow holds no more of them.
const CHUNK: usize = 256;
/// Answers that wait for a reader.
const WAITING: usize = 16;

type Answers<T> = mpsc::Receiver<Result<T, Status>>;

impl Plane {
    /// Notes that an operator asks for something.
    pub(super) fn asked<T>(&self, request: &Request<T>, what: String, reason: &str) {
        self.board.note(AuditKind::Command, what, who(request), reason.to_owned());
    }

    /// The audit trail, as it is asked for.
    pub(super) fn list_audit(&self, request: ListAuditRequest) -> Result<Answers<AuditEntry>, Status> {
        self.bound()?;
        let none = || Reason::NotNow.status("this node keeps no audit trail; its log says why");
        let audit = self.board.audit().ok_or_else(none)?;
        let (trail, next) = (audit.trail().map_err(|_| none())?, audit.next());
        let (first, end) = trail.range();
        let from = match request.start {
            None => first,
            Some(Start::From(from)) => from,
            Some(Start::Last(last)) => end.saturating_sub(last),
        };
        let (out, answers) = mpsc::channel(WAITING);
        // A trail that is closed meanwhile ends with the process; nothing here keeps it open.
        let trail = Arc::downgrade(&trail);
        let follow = request.follow.then_some(next);
        tokio::spawn(async move {
            if let Err(e) = send(trail, from.max(first), follow, &out).await {
                // Whoever asked may have left.
                let _ = out.send(Err(Reason::DataLoss.status(e.to_string()))).await;
            }
        });
        Ok(answers)
    }

    /// Everything that happens from now on.
    pub(super) fn events(&self) -> Answers<Event> {
        let mut events = self.board.listen();
        let (out, answers) = mpsc::channel(WAITING);
        tokio::spawn(async move {
            let mut missed = 0;
            loop {
                match events.recv().await {
                    Ok(event) => {
                        let event = Event { missed: std::mem::take(&mut missed), ..event };
                        if out.send(Ok(event)).await.is_err() {
                            return;
                        }
                    }
                    Err(broadcast::error::RecvError::Lagged(count)) => missed += count,
                    Err(broadcast::error::RecvError::Closed) => return,
                }
            }
        });
        answers
    }
}

/// Sends entries from `from` on until there are no more, or the reader has left.
async fn send(
    trail: std::sync::Weak<Trail>,
    mut from: u64,
    mut follow: Option<watch::Receiver<u64>>,
    out: &mpsc::Sender<Result<AuditEntry, Status>>,
) -> Result<(), TrailError> {
    loop {
        if let Some(next) = &mut follow {
            next.mark_unchanged();
        }
        let Some(open) = trail.upgrade() else { return Ok(()) };
        // Reads from the disk: not on a thread that others wait for.
        let read = tokio::task::spawn_blocking(move || open.read(from, CHUNK)).await;
        let Ok(entries) = read else { return Ok(()) };
        let entries = entries?;
        let some = !entries.is_empty();
        for entry in entries {
            from = entry.sequence + 1;
            if out.send(Ok(entry)).await.is_err() {
                return Ok(());
            }
        }
        match &mut follow {
            _ if some => {}
            None => return Ok(()),
            Some(next) => tokio::select! {
                changed = next.changed() => if changed.is_err() { return Ok(()) },
                () = out.closed() => return Ok(()),
            },
        }
    }
}

/// Who asks: the name in the certificate, and the address.
fn who<T>(request: &Request<T>) -> String {
    let certificates = request.peer_certs();
    let first = certificates.as_ref().and_then(|certificates| certificates.first());
    let name = first.map_or_else(
        || "somebody without a certificate".to_owned(),
        |first| {
            tls::common_name(first).unwrap_or_else(|| "somebody whose certificate has no name".to_owned())
        },
    );
    request.remote_addr().map_or_else(|| name.clone(), |address| format!("{name}, from {address}"))
}
