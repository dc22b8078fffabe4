//! The metrics that the node's account says already: read from it when somebody asks, so there is no second account.

use colo_common::NodeId;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::{
    ARBITER_SILENT, BACKLOG, BUILD_INFO, CARRIER, COPIES, DISK, DISK_FAILED, DISK_OVERLAY, EPOCH_AGE, EPOCHS,
    FAILED, FAILED_EPOCHS, FRAME_BYTES, FRAMES, GUEST_MEMORY, GUEST_POPULATED, GUEST_RUNNING, GUEST_VCPUS,
    HEALTHY, HELD_BYTES, HELD_FRAMES, IN_FLIGHT, Kind, LINK_LOSSES, LINK_RTT, LINK_SILENCE, LINK_UP,
    LOST_FRAMES, Metric, PAGES, PROMOTIONS, PROPOSAL_PENDING, PROTECTED, REGISTER_AGE, RING_OVERRUNS, ROLE,
    START_TIME, TERM, UNPROTECTED, UNPROTECTED_AGE, WIRE_BYTES, ZERO_PAGES,
};
use crate::admin::{Plane, health};
use crate::node::status::{Role, Status};

/// Everything that a node tells, with its vm, if it is bound to one, and its name on every sample.
pub fn registry(plane: &Arc<Plane>) -> Registry {
    let vm = plane.vm.as_ref().map(|vm| ("vm".into(), vm.to_string().into()));
    let labels = vm.into_iter().chain([("node".into(), plane.node.to_string().into())]);
    let mut registry = Registry::with_labels(labels);
    let build = Info::new([
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("protocol", colo_proto::PROTOCOL_VERSION.to_string()),
    ]);
    registry.register(BUILD_INFO.family(), BUILD_INFO.help, build);
    plane.board.meters().register(&mut registry);
    let started =
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().saturating_sub(plane.uptime());
    registry.register_collector(Box::new(Account { plane: Arc::clone(plane), started }));
    registry
}

struct Account {
    plane: Arc<Plane>,
    /// When the process began, since 1970: as of the start, so a clock that is set does not move it.
    started: Duration,
}

impl fmt::Debug for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Account").field("node", &self.plane.node).finish_non_exhaustive()
    }
}

impl Collector for Account {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut sheet = Sheet::default();
        sheet.set(START_TIME, self.started.as_secs_f64());
        sheet.fill(&self.plane.board.status(), &self.plane.node, Instant::now());
        // Samples of one metric stand one after the other.
        sheet
            .samples
            .chunk_by(|a, b| a.0.name == b.0.name)
            .try_for_each(|samples| family(&mut encoder, samples))
    }
}

/// One value, under one value of the metric's label if it has one.
type Sample = (Metric, Option<&'static str>, f64);

fn family(encoder: &mut DescriptorEncoder<'_>, samples: &[Sample]) -> Result<(), fmt::Error> {
    let Some((metric, ..)) = samples.first() else { return Ok(()) };
    let kind = if metric.kind == Kind::Counter { MetricType::Counter } else { MetricType::Gauge };
    let mut all = encoder.encode_descriptor(metric.family(), &format!("{}.", metric.help), None, kind)?;
    for (_, value, number) in samples {
        let labels: Vec<_> = metric.label.map(|(label, _)| label).zip(*value).into_iter().collect();
        let mut one = all.encode_family(&labels)?;
        match metric.kind {
            Kind::Counter => one.encode_counter::<NoLabelSet, _, f64>(number, None)?,
            _ => one.encode_gauge(number)?,
        }
    }
    Ok(())
}

/// What is told of one instant.
#[derive(Default)]
struct Sheet {
    samples: Vec<Sample>,
}

impl Sheet {
    fn set(&mut self, metric: Metric, to: f64) {
        self.samples.push((metric, None, to));
    }

    fn set_for(&mut self, metric: Metric, value: &'static str, to: f64) {
        self.samples.push((metric, Some(value), to));
    }

    fn flag(&mut self, metric: Metric, stands: bool) {
        self.set(metric, f64::from(u8::from(stands)));
    }

    /// Counts of more than 2^53 lose their last digits, which nobody misses.
    fn count(&mut self, metric: Metric, count: u64) {
        self.set(metric, count as f64);
    }

    fn age(&mut self, metric: Metric, since: Option<Instant>, now: Instant) {
        if let Some(since) = since {
            self.set(metric, now.saturating_duration_since(since).as_secs_f64());
        }
    }

    fn fill(&mut self, status: &Status, node: &NodeId, now: Instant) {
        self.standing(status, node, now);
        self.epochs(status, now);
        self.link(status);
        self.guest(status);
        self.devices(status);
    }

    fn standing(&mut self, status: &Status, node: &NodeId, now: Instant) {
        for role in ROLE.label.map_or(&[][..], |(_, roles)| roles) {
            self.set_for(ROLE, role, f64::from(u8::from(*role == name(status.role))));
        }
        let health = health::of(status, node, now);
        self.flag(HEALTHY, health.healthy);
        self.flag(PROTECTED, health.protected);
        self.flag(FAILED, status.failure.is_some());
        if let Some(entry) = &status.register {
            self.count(TERM, entry.term.0);
        }
        self.age(REGISTER_AGE, status.arbiter_answered, now);
        self.flag(ARBITER_SILENT, status.arbiter_silent.is_some());
        self.flag(PROPOSAL_PENDING, status.proposing);
        let open =
            status.unprotected_since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        self.set(UNPROTECTED_AGE, open.as_secs_f64());
        self.set(UNPROTECTED, status.unprotected(now).as_secs_f64());
        self.count(PROMOTIONS, status.counters.promotions);
    }

    fn epochs(&mut self, status: &Status, now: Instant) {
        let counters = &status.counters;
        self.count(EPOCHS, counters.epochs);
        self.count(PAGES, counters.pages);
        self.count(ZERO_PAGES, counters.zero_pages);
        self.count(WIRE_BYTES, counters.wire_bytes);
        self.age(EPOCH_AGE, status.epoch_at, now);
        self.count(IN_FLIGHT, status.in_flight as u64);
        self.count(BACKLOG, status.marks.backlog_bytes);
        self.count(HELD_FRAMES, status.held_frames.items as u64);
        self.count(HELD_BYTES, status.held_frames.bytes as u64);
        self.count(FAILED_EPOCHS, counters.failed_epochs);
        self.count(RING_OVERRUNS, counters.ring_overruns);
        for (mode, copies) in
            [("full", counters.full_copies), ("resync", counters.resyncs), ("rejoin", counters.rejoins)]
        {
            self.set_for(COPIES, mode, copies as f64);
        }
    }

    fn link(&mut self, status: &Status) {
        self.flag(LINK_UP, status.is_linked());
        self.count(LINK_LOSSES, status.counters.link_losses);
        if let Some(link) = &status.link {
            self.set(LINK_RTT, link.pulse.rtt().as_secs_f64());
            self.set(LINK_SILENCE, link.pulse.unheard().as_secs_f64());
        }
    }

    fn guest(&mut self, status: &Status) {
        self.flag(GUEST_RUNNING, status.running);
        let Some(guest) = &status.guest else { return };
        self.set(GUEST_VCPUS, guest.description.vcpus.into());
        self.count(GUEST_MEMORY, guest.description.memory_bytes);
        // A memfd that was mapped can be asked.
        self.count(GUEST_POPULATED, guest.memory.populated_bytes().unwrap_or_default());
    }

    fn devices(&mut self, status: &Status) {
        if let Some(network) = &status.devices.network {
            let traffic = network.tap.traffic();
            self.flag(CARRIER, network.tap.has_carrier());
            self.set_for(FRAMES, "sent", traffic.sent as f64);
            self.set_for(FRAMES, "received", traffic.received as f64);
            self.set_for(FRAME_BYTES, "sent", traffic.sent_bytes as f64);
            self.set_for(FRAME_BYTES, "received", traffic.received_bytes as f64);
            self.count(LOST_FRAMES, traffic.lost);
        }
        if let Some(disk) = &status.devices.disk {
            self.count(DISK, disk.bytes);
            self.count(DISK_OVERLAY, disk.overlay.as_ref().map_or(0, |overlay| overlay.bytes_to_fold()));
            self.flag(DISK_FAILED, disk.failure().is_some());
        }
    }
}

/// Its name in [`ROLE`].
fn name(role: Role) -> &'static str {
    match role {
        Role::Starting => "starting",
        Role::Alone => "alone",
        Role::Seeding => "seeding",
        Role::Joining => "joining",
        Role::Pairing => "pairing",
        Role::Paired => "paired",
        Role::Lost => "lost",
        Role::Waiting => "waiting",
        Role::Following => "following",
        Role::Receiving => "receiving",
        Role::Promoting => "promoting",
        Role::Stopped => "stopped",
        Role::Spare => "spare",
    }
}
