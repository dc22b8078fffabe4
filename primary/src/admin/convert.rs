//! From a node's account to the messages of the control plane.

use colo_proto::convert::{history_points, id_bytes, replica_bytes};
use colo_proto::v1;
use std::time::{Duration, Instant};

use super::Plane;
use super::health::holding;
use crate::node::status::{Policy, Promoted, Report, Role, Status};

const PAGE: u64 = colo_common::PAGE_SIZE as u64;

pub(super) fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn us(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// A role, as the API has it.
pub(crate) fn role(role: Role) -> v1::Role {
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
        Role::Spare => v1::Role::Spare,
    }
}

pub(super) fn policy(policy: Policy) -> v1::AckPolicy {
    if policy.disk { v1::AckPolicy::Disk } else { v1::AckPolicy::Memory }
}

pub(super) fn status(plane: &Plane) -> v1::StatusReply {
    let console = v1::Console { kept_from: plane.console.start(), released: plane.console.end(), input: 0 };
    v1::StatusReply {
        node: plane.node.to_string(),
        vm: plane.vm.as_ref().map(ToString::to_string).unwrap_or_default(),
        incarnation: id_bytes(plane.incarnation.0),
        uptime_ms: ms(plane.uptime()),
        ..account(&plane.board.status(), console)
    }
}

/// What the account says; the rest is the process'.
fn account(status: &Status, console: v1::Console) -> v1::StatusReply {
    let age = |at: Instant| ms(at.elapsed());
    let (error, error_age) = match &status.error {
        Some((what, at)) => (what.clone(), age(*at)),
        None => (String::new(), 0),
    };
    let seed = status.seed.map(|seed| progress(status, seed.since.elapsed()));
    v1::StatusReply {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        protocol: colo_proto::PROTOCOL_VERSION.into(),
        role: role(status.role).into(),
        register: status.register.as_ref().map(v1::RegisterEntry::from),
        register_age_ms: status.arbiter_answered.map(age),
        replica: replica_bytes(status.replica),
        points: Some(points(status)),
        history: history_points(&status.history),
        guest: guest(status),
        link: link(status),
        last_error: error,
        last_error_age_ms: error_age,
        seed,
        counters: Some(counters(status)),
        unprotected_ms: status.unprotected_since.filter(|_| status.role.runs()).map_or(0, age),
        ack_policy: status.policy.map_or(v1::AckPolicy::Unspecified, policy).into(),
        ack_policy_pending: status.policy.is_some_and(|policy| policy.pending),
        console: Some(v1::Console { input: status.input, ..console }),
        holding: holding(status).unwrap_or_default().to_owned(),
        promotion: status.promotion.and_then(promotion),
        epoch_age_ms: status.epoch_at.map(age).or(status.stale_age().map(ms)),
        disk: disk(status),
        network: network(status),
        unprotected_total_ms: ms(status.unprotected(Instant::now())),
        failover: failover(status).into(),
        ..Default::default()
    }
}

fn failover(status: &Status) -> v1::FailoverPolicy {
    match status.auto_failover.filter(|_| !status.role.runs()) {
        None => v1::FailoverPolicy::Unspecified,
        Some(true) => v1::FailoverPolicy::Auto,
        Some(false) => v1::FailoverPolicy::Manual,
    }
}

fn guest(status: &Status) -> Option<v1::Guest> {
    let guest = status.guest.as_ref()?;
    Some(v1::Guest {
        running: status.running,
        // A memfd that was mapped can be asked.
        populated_bytes: guest.memory.populated_bytes().unwrap_or_default(),
        ..guest.description.clone()
    })
}

fn disk(status: &Status) -> Option<v1::Disk> {
    let disk = status.devices.disk.as_ref()?;
    Some(v1::Disk {
        path: disk.path.display().to_string(),
        bytes: disk.bytes,
        read_only: disk.read_only,
        overlay_bytes: disk.overlay.as_ref().map(|overlay| overlay.bytes_to_fold()),
        failure: disk.failure().unwrap_or_default(),
    })
}

fn network(status: &Status) -> Option<v1::Network> {
    let network = status.devices.network.as_ref()?;
    let (traffic, held) = (network.tap.traffic(), status.held_frames);
    Some(v1::Network {
        tap: network.tap.name().to_owned(),
        mac: network.mac.to_string(),
        carrier: network.tap.has_carrier(),
        frames_sent: traffic.sent,
        frames_received: traffic.received,
        frames_lost: traffic.lost,
        frames_held: held.items as u64,
        held_bytes: held.bytes as u64,
    })
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
        released: point(status.out),
        stale: point(status.stale),
    }
}

fn link(status: &Status) -> Option<v1::Link> {
    let link = status.link.as_ref()?;
    Some(v1::Link {
        peer: link.peer.to_string(),
        address: link.address.to_string(),
        connected: link.up,
        rtt_us: us(link.pulse.rtt()),
        silent_ms: ms(link.pulse.unheard()),
        suspect_after_ms: ms(link.pulse.patience()),
        since_ms: ms(link.since.elapsed()),
        in_flight: u32::try_from(status.in_flight).unwrap_or(u32::MAX),
        backlog_bytes: status.marks.backlog_bytes,
    })
}

fn counters(status: &Status) -> v1::Counters {
    let counters = status.counters;
    v1::Counters {
        epochs: counters.epochs,
        pages: counters.pages,
        zero_pages: counters.zero_pages,
        wire_bytes: counters.wire_bytes,
        ring_overruns: counters.ring_overruns,
        full_resyncs: counters.full_copies,
        resyncs: counters.resyncs,
        rejoins: counters.rejoins,
        failed_epochs: counters.failed_epochs,
        link_losses: counters.link_losses,
        promotions: counters.promotions,
    }
}

/// The secondary has not agreed yet.
pub(super) fn agreeing(elapsed: Duration) -> v1::ProtectProgress {
    let phase = v1::protect_progress::Phase::Pairing.into();
    v1::ProtectProgress { phase, elapsed_ms: ms(elapsed), ..Default::default() }
}

pub(super) fn progress(status: &Status, elapsed: Duration) -> v1::ProtectProgress {
    use v1::protect_progress::Phase;
    let phase = match status.role {
        Role::Seeding if status.seed.is_some_and(|seed| seed.compares) => Phase::Digests,
        Role::Seeding => Phase::Memory,
        Role::Joining => Phase::Joining,
        Role::Pairing => Phase::Register,
        Role::Paired => Phase::Paired,
        _ => Phase::Pairing,
    };
    let (done, total) = status.seed.map_or((0, 0), |seed| (seed.done, seed.total));
    v1::ProtectProgress {
        phase: phase.into(),
        bytes_done: done * PAGE,
        bytes_total: total * PAGE,
        elapsed_ms: ms(elapsed),
        secondary: status.link.as_ref().map(|link| link.peer.to_string()).unwrap_or_default(),
        register: status.register.as_ref().filter(|_| phase == Phase::Paired).map(v1::RegisterEntry::from),
        why: status
            .copy
            .as_ref()
            .filter(|_| status.seed.is_some())
            .map_or(String::new(), |copy| copy.why.clone()),
    }
}

pub(super) fn report(report: &Report, missed: u64) -> v1::EpochReport {
    v1::EpochReport {
        point: Some(report.point.into()),
        pages: report.pages,
        zero_pages: report.zero_pages,
        wire_bytes: report.wire_bytes,
        pause: report.timing.map(|timing| v1::Pause {
            stop_us: us(timing.cut.stop),
            save_us: us(timing.cut.save),
            harvest_us: us(timing.cut.harvest),
            copy_us: us(timing.copy),
            total_us: us(timing.pause),
        }),
        ack_us: report.ack.map(us),
        in_flight: u32::try_from(report.in_flight).unwrap_or(u32::MAX),
        backlog_bytes: report.backlog_bytes,
        console_offset: report.console,
        missed,
        role: role(report.role).into(),
        stage_us: report.stage.map(us),
        apply_us: report.apply.map(us),
    }
}

#[cfg(test)]
#[path = "convert_tests.rs"]
mod tests;
