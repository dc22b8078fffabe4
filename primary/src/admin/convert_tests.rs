//! Every field of an account is told, and what is not known is absent.

use super::{account, progress, report};
use crate::checkpoint::Timing;
use crate::heartbeat::Pulse;
use crate::node::status::{
    Counters, Devices, DiskAccount, LinkState, Marks, NetworkAccount, Overlay, Policy, Report, Role, Seed,
    Status,
};
use crate::release::Size;
use colo_common::history::point;
use colo_common::register::{Entry, Value};
use colo_common::{Incarnation, ProposalId, Term};
use colo_proto::v1;
use colo_proto::v1::protect_progress::Phase;
use colo_vmm::tap::Tap;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::time::{Duration, Instant};

fn filled() -> Status {
    let long_ago = Instant::now() - Duration::from_secs(3);
    let value = Value::Solo { node: "a".parse().unwrap(), incarnation: Incarnation(1) };
    let entry = Entry { term: Term(2), proposal: ProposalId(1), value };
    let address = "192.0.2.1:7702".parse().unwrap();
    let mut link = LinkState::new("b".parse().unwrap(), address, Arc::new(Pulse::default()));
    link.since = long_ago;
    Status {
        role: Role::Paired,
        register: Some(entry),
        arbiter_answered: Some(long_ago),
        tip: Some(point(2, 9)),
        acked: Some(point(2, 8)),
        out: Some(point(2, 7)),
        stale: Some(point(1, 1)),
        epoch_at: Some(long_ago),
        marks: Marks {
            staged: Some(point(2, 8)),
            applied: Some(point(2, 6)),
            persisted: Some(point(2, 5)),
            backlog_bytes: 77,
        },
        link: Some(link),
        policy: Some(Policy { disk: true, pending: true }),
        in_flight: 1,
        counters: Counters {
            epochs: 1,
            pages: 2,
            zero_pages: 3,
            wire_bytes: 4,
            ring_overruns: 5,
            full_copies: 6,
            resyncs: 7,
            failed_epochs: 8,
            link_losses: 9,
            promotions: 10,
            rejoins: 11,
        },
        input: 12,
        ..Status::default()
    }
}

#[test]
fn ages_points_link_policy_and_counters_are_told() {
    let told = account(&filled(), v1::Console::default());
    assert!(told.register_age_ms.is_some_and(|age| age >= 3000), "{told:?}");
    assert!(told.epoch_age_ms.is_some_and(|age| age >= 3000), "{told:?}");
    let points = told.points.unwrap();
    let epochs = [
        points.tip,
        points.acked,
        points.released,
        points.staged,
        points.applied,
        points.persisted,
        points.stale,
    ];
    assert_eq!(epochs.map(|point| point.unwrap().epoch), [9, 8, 7, 8, 6, 5, 1]);
    let link = told.link.clone().unwrap();
    assert_eq!((link.peer.as_str(), link.address.as_str(), link.connected), ("b", "192.0.2.1:7702", true));
    assert!(link.since_ms >= 3000 && link.silent_ms < 3000, "{link:?}");
    assert_eq!((link.in_flight, link.backlog_bytes), (1, 77));
    assert_eq!((told.ack_policy(), told.ack_policy_pending), (v1::AckPolicy::Disk, true));
    assert_eq!(told.console.unwrap().input, 12);
    let counters = v1::Counters {
        epochs: 1,
        pages: 2,
        zero_pages: 3,
        wire_bytes: 4,
        ring_overruns: 5,
        full_resyncs: 6,
        resyncs: 7,
        failed_epochs: 8,
        link_losses: 9,
        promotions: 10,
        rejoins: 11,
    };
    assert_eq!(told.counters, Some(counters));
}

#[test]
fn what_is_not_known_is_absent() {
    let told = account(&Status::default(), v1::Console::default());
    assert_eq!((told.register_age_ms, told.epoch_age_ms), (None, None));
    assert!(told.link.is_none() && told.guest.is_none());
    assert!(told.disk.is_none() && told.network.is_none());
    assert_eq!(told.points, Some(v1::Points::default()));
    assert_eq!(told.ack_policy(), v1::AckPolicy::Unspecified);
    assert!(told.seed.is_none() && told.register.is_none());
}

/// Of a disk that has failed.
#[derive(Debug)]
struct Failed;

impl Overlay for Failed {
    fn bytes_to_fold(&self) -> u64 {
        8192
    }

    fn failure(&self) -> Option<String> {
        Some("a sync failed".to_owned())
    }
}

#[test]
fn the_disk_and_the_network_card_are_told_as_they_are_now() {
    let disk = DiskAccount { path: "/images/web.img".into(), bytes: 4096, read_only: true, overlay: None };
    let (near, far) = UnixDatagram::pair().unwrap();
    let tap = Arc::new(Tap::from_socket(near.into()).unwrap());
    let network = NetworkAccount { tap: Arc::clone(&tap), mac: "02:00:00:12:34:56".parse().unwrap() };
    let mut status = Status {
        devices: Devices { disk: Some(disk.clone()), network: Some(network) },
        held_frames: Size { bytes: 100, items: 2 },
        ..Status::default()
    };
    tap.set_carrier(true).unwrap();
    tap.write_frame(&[1; 60]).unwrap();
    far.send(&[2; 60]).unwrap();
    tap.read_frame(&mut [0; 64]).unwrap();
    drop(far);
    tap.write_frame(&[1; 60]).unwrap_err();
    let told = account(&status, v1::Console::default());
    let plain = v1::Disk {
        path: "/images/web.img".to_owned(),
        bytes: 4096,
        read_only: true,
        overlay_bytes: None,
        failure: String::new(),
    };
    assert_eq!(told.disk, Some(plain.clone()));
    let network = v1::Network {
        tap: "socket".to_owned(),
        mac: "02:00:00:12:34:56".to_owned(),
        carrier: true,
        frames_sent: 1,
        frames_received: 1,
        frames_lost: 1,
        frames_held: 2,
        held_bytes: 100,
    };
    assert_eq!(told.network, Some(network));
    status.devices.disk = Some(DiskAccount { overlay: Some(Arc::new(Failed)), ..disk });
    let told = account(&status, v1::Console::default());
    let failed = v1::Disk { overlay_bytes: Some(8192), failure: "a sync failed".to_owned(), ..plain };
    assert_eq!(told.disk, Some(failed));
}

#[test]
fn a_copy_on_its_way_is_told_with_its_phase() {
    let seed = Seed { done: 1, total: 4, compares: true, since: Instant::now() - Duration::from_secs(2) };
    let mut status = Status { role: Role::Seeding, seed: Some(seed), ..filled() };
    let told = account(&status, v1::Console::default()).seed.unwrap();
    assert_eq!((told.phase(), told.bytes_done, told.bytes_total), (Phase::Digests, 4096, 16384));
    assert!(told.elapsed_ms >= 2000 && told.secondary == "b", "{told:?}");
    status.seed = Some(Seed { compares: false, ..seed });
    let phases = [
        (Role::Seeding, Phase::Memory),
        (Role::Joining, Phase::Joining),
        (Role::Pairing, Phase::Register),
        (Role::Paired, Phase::Paired),
    ];
    for (role, phase) in phases {
        status.role = role;
        let told = progress(&status, Duration::ZERO);
        assert_eq!((told.phase(), told.register.is_some()), (phase, phase == Phase::Paired));
    }
}

#[test]
fn each_role_reports_what_it_measures() {
    let runner = Report {
        point: point(2, 9),
        role: Role::Paired,
        pages: 3,
        zero_pages: 4,
        wire_bytes: 5,
        timing: Some(Timing { pause: Duration::from_micros(640), ..Timing::default() }),
        ack: Some(Duration::from_micros(2310)),
        stage: None,
        apply: None,
        in_flight: 1,
        backlog_bytes: 6,
        console: 7,
    };
    let told = report(&runner, 2);
    assert_eq!((told.pages, told.zero_pages, told.wire_bytes, told.console_offset), (3, 4, 5, 7));
    assert_eq!(
        (told.pause.map(|pause| pause.total_us), told.ack_us, told.missed),
        (Some(640), Some(2310), 2)
    );
    assert_eq!((told.stage_us, told.apply_us, told.role()), (None, None, v1::Role::Paired));
    let us = |us| Some(Duration::from_micros(us));
    let follower =
        Report { role: Role::Following, timing: None, ack: None, stage: us(90), apply: us(80), ..runner };
    let told = report(&follower, 0);
    assert_eq!((told.pause, told.ack_us, told.stage_us, told.apply_us), (None, None, Some(90), Some(80)));
}
