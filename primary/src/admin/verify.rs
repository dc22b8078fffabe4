//! A comparison of the copy with the guest, for whoever asked for it: progress until it ends.

use colo_proto::message::VerifyPart;
use colo_proto::v1::{self, VerifiedPart, VerifyReplicaRequest};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tonic::Status;

use super::convert;
use super::plane::Plane;
use super::reason::Reason;
use crate::node::{Command, VerifyProgress};
use crate::verify::Tally;

/// Between two messages.
const STEP: Duration = Duration::from_millis(200);

/// What was asked for, for the audit trail.
pub(super) fn words(request: &VerifyReplicaRequest) -> String {
    let what = match (request.memory, request.disk) {
        (true, false) => "memory",
        (false, true) => "disk",
        _ => "memory and disk",
    };
    format!("compare the copy with the guest: {what}")
}

/// Begins, and answers where progress will come from. Whoever drops it ends the comparison.
pub(super) async fn begin(
    plane: &Plane,
    request: VerifyReplicaRequest,
) -> Result<mpsc::Receiver<Result<v1::VerifyProgress, Status>>, Status> {
    let VerifyReplicaRequest { memory, disk, rate_mib } = request;
    let (progress, told) = watch::channel(VerifyProgress::default());
    plane.command(|reply| Command::Verify { memory, disk, rate_mib, reply, progress }).await?;
    let (out, answers) = mpsc::channel(4);
    tokio::spawn(pass_on(told, out));
    Ok(answers)
}

async fn pass_on(
    mut told: watch::Receiver<VerifyProgress>,
    out: mpsc::Sender<Result<v1::VerifyProgress, Status>>,
) {
    loop {
        let now = told.borrow_and_update().clone();
        let ended = now.ended.is_some();
        let message = match &now.ended {
            Some(Err(why)) => Err(Reason::GivenUp.status(format!("the copy was compared in part: {why}"))),
            _ => Ok(message(&now)),
        };
        if out.send(message).await.is_err() || ended {
            return;
        }
        tokio::select! {
            () = out.closed() => return,
            changed = told.changed() => if changed.is_err() {
                let gone = Reason::Unavailable.status("the node is ending; look at the other node");
                drop(out.send(Err(gone)).await);
                return;
            },
        }
        // What comes meanwhile is told with the next; the end is not held up for long.
        if told.borrow().ended.is_none() {
            tokio::time::sleep(STEP).await;
        }
    }
}

fn message(now: &VerifyProgress) -> v1::VerifyProgress {
    let of = |part| now.tallies.iter().find(|tally| tally.part == part).map(part_of);
    v1::VerifyProgress {
        done: now.ended.is_some(),
        memory: of(VerifyPart::Memory),
        disk: of(VerifyPart::Disk),
        elapsed_ms: convert::ms(now.elapsed),
        point: now.point.map(v1::Point::from),
    }
}

fn part_of(tally: &Tally) -> VerifiedPart {
    VerifiedPart {
        total: tally.total,
        looked_at: tally.looked_at,
        compared: tally.compared,
        with_bytes: tally.with_bytes,
        not_compared: tally.not_compared,
        differing: tally.differing,
        places: tally.places.clone(),
    }
}
