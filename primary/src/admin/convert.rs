//! From a node's account to the messages of the control plane.

use colo_proto::convert::{history_points, id_bytes, replica_bytes};
use colo_proto::v1;
use std::sync::PoisonError;
use std::time::Duration;

use super::Plane;
use crate::node::status::{Promoted, Report, Role, Status};

const PAGE: u64 = colo_common::PAGE_SIZE as u64;

fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn us(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn role(role: Role) -> v1::Role {
    match role {
        Role::Starting => v1::Role::Unspecified,
        Role::Alone => v1::Role::Alone,
        Role::Seeding => v1::Role::Seeding,
        Role::Joining => v1::Role::Joining,
        Role::Pairing => v1::Role::Pairing,
        Role::Paired => v1::Role::Paired,
        Role::Lost => v1::Role::Lost,
        Role::Waiting => v1::Role::Waiting,
        Role::Following => v1::Role::Following,
        Role::Receiving => v1::Role::Receiving,
        Role::Promoting => v1::Role::Promoting,
        Role::Stopped => v1::Role::Stopped,
    }
}

pub(super) fn status(plane: &Plane, uptime: Duration) -> v1::StatusReply {
    let status = plane.board.status();
    let (error, error_age) = match &status.error {
        Some((what, at)) => (what.clone(), ms(at.elapsed())),
        None => (String::new(), 0),
    };
    let runs =
        matches!(status.role, Role::Alone | Role::Seeding | Role::Joining | Role::Pairing | Role::Paired);
    let unprotected = status.unprotected_since.filter(|_| runs).map_or(0, |at| ms(at.elapsed()));
    let guest = plane.guest.read().unwrap_or_else(PoisonError::into_inner).clone();
    let holding = match status.role {
        Role::Paired if status.peer.is_none() => {
            "the secondary is away: output is held until it is back or given up"
        }
        Role::Pairing => "output is held until the register has answered",
        Role::Lost => "another node has the register",
        _ => "",
    };
    v1::StatusReply {
        node: plane.node.to_string(),
        vm: plane.vm.to_string(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        protocol: colo_proto::PROTOCOL_VERSION.into(),
        incarnation: id_bytes(plane.incarnation.0),
        role: role(status.role).into(),
        register: status.register.as_ref().map(v1::RegisterEntry::from),
        register_age_ms: 0,
        replica: replica_bytes(status.replica),
        points: Some(points(&status)),
        history: history_points(&status.history),
        guest: guest.map(|guest| v1::Guest { running: runs, ..guest }),
        link: link(&status),
        last_error: error,
        last_error_age_ms: error_age,
        seed: (status.role == Role::Seeding).then(|| progress(&status, Duration::ZERO)),
        counters: Some(counters(&status)),
        unprotected_ms: unprotected,
        uptime_ms: ms(uptime),
        ack_policy: v1::AckPolicy::Unspecified.into(),
        console: Some(v1::Console {
            kept_from: plane.console.start(),
            released: plane.console.end(),
            input: status.input,
        }),
        holding: holding.to_owned(),
        promotion: status.promotion.and_then(promotion),
    }
}

fn promotion(promoted: Promoted) -> Option<v1::Promotion> {
    let ran = promoted.ran?;
    Some(v1::Promotion {
        point: promoted.point.map(v1::Point::from),
        register_us: us(promoted.register),
        apply_us: us(promoted.apply),
        store_us: us(promoted.store),
        restore_us: us(promoted.restore),
        total_us: us(promoted.register + (ran - promoted.granted)),
        age_us: us(ran.elapsed()),
    })
}

fn points(status: &Status) -> v1::Points {
    let point = |point: Option<colo_common::Point>| point.map(v1::Point::from);
    v1::Points {
        tip: point(status.tip),
        acked: point(status.acked),
        staged: point(status.marks.staged),
        applied: point(status.marks.applied),
        persisted: point(status.marks.persisted),
        released: None,
        stale: point(status.stale),
    }
}

fn link(status: &Status) -> Option<v1::Link> {
    let peer = status.peer.as_ref()?;
    Some(v1::Link {
        peer: peer.to_string(),
        connected: true,
        in_flight: u32::try_from(status.in_flight).unwrap_or(u32::MAX),
        backlog_bytes: status.marks.backlog_bytes,
        ..Default::default()
    })
}

fn counters(status: &Status) -> v1::Counters {
    let counters = status.counters;
    v1::Counters {
        epochs: counters.epochs,
        pages: counters.pages,
        zero_pages: 0,
        wire_bytes: counters.wire_bytes,
        ring_overruns: counters.ring_overruns,
        full_resyncs: counters.seeds,
        resyncs: counters.full_resyncs + counters.delta_resyncs,
        failed_epochs: counters.failed_epochs,
        link_losses: counters.link_losses,
        promotions: counters.promotions,
    }
}

pub(super) fn progress(status: &Status, elapsed: Duration) -> v1::ProtectProgress {
    use v1::protect_progress::Phase;
    let phase = match status.role {
        Role::Seeding => Phase::Memory,
        Role::Joining => Phase::Joining,
        Role::Pairing => Phase::Register,
        Role::Paired => Phase::Paired,
        _ => Phase::Pairing,
    };
    let (done, total) = status.seed.unwrap_or_default();
    v1::ProtectProgress {
        phase: phase.into(),
        bytes_done: done * PAGE,
        bytes_total: total * PAGE,
        elapsed_ms: ms(elapsed),
        secondary: status.peer.as_ref().map(ToString::to_string).unwrap_or_default(),
        register: status.register.as_ref().filter(|_| phase == Phase::Paired).map(v1::RegisterEntry::from),
    }
}

pub(super) fn report(report: &Report, now: Role, missed: u64) -> v1::EpochReport {
    let timing = report.timing;
    v1::EpochReport {
        point: Some(report.point.into()),
        pages: report.pages,
        zero_pages: 0,
        wire_bytes: report.wire_bytes,
        pause: Some(v1::Pause {
            stop_us: us(timing.cut.stop),
            save_us: us(timing.cut.save),
            harvest_us: us(timing.cut.harvest),
            copy_us: us(timing.copy),
            total_us: us(timing.pause),
        }),
        ack_us: Some(us(report.ack)),
        in_flight: u32::try_from(report.in_flight).unwrap_or(u32::MAX),
        backlog_bytes: report.backlog_bytes,
        console_offset: report.console,
        missed,
        role: role(now).into(),
        stage_us: 0,
        apply_us: 0,
    }
}
