//! `coloctl status --json`: one object with stable keys. A key is never renamed or given another meaning; new ones may
//! come. What a node does not know is null.

use colo_common::register::{Entry, Value};
use colo_proto::v1::{self, StatusReply};
use serde::Serialize;

use crate::devices::{Disk, Network};
use crate::format::clean;
use crate::locate::{Sight, runner};
use crate::words;

/// The whole answer.
#[derive(Serialize)]
pub(crate) struct Answer {
    /// Node that runs the guest.
    runner: Option<String>,
    /// Whether that node says that the vm is protected.
    protected: bool,
    nodes: Vec<Node>,
}

#[derive(Serialize)]
struct Node {
    address: String,
    answers: bool,
    /// Why it does not answer.
    error: Option<String>,
    status: Option<Status>,
}

#[derive(Serialize)]
struct Status {
    node: String,
    /// Empty at a spare.
    vm: String,
    version: String,
    protocol: u32,
    incarnation: String,
    role: &'static str,
    register: Option<Register>,
    register_age_ms: Option<u64>,
    replica: Option<String>,
    points: Points,
    /// Epochs cut and not acked.
    lag_epochs: Option<u64>,
    history: Vec<Point>,
    guest: Option<Guest>,
    disk: Option<Disk>,
    network: Option<Network>,
    link: Option<Link>,
    last_error: Option<LastError>,
    seed: Option<Progress>,
    counters: Counters,
    unprotected_ms: u64,
    unprotected_total_ms: u64,
    uptime_ms: u64,
    failover: Option<&'static str>,
    ack_policy: Option<&'static str>,
    ack_policy_pending: bool,
    epoch_age_ms: Option<u64>,
    console: Option<Console>,
    holding: Option<String>,
}

/// The register.
#[derive(Serialize)]
pub(crate) struct Register {
    term: u64,
    /// solo, paired or stopped.
    value: &'static str,
    /// Who runs the vm, or ran it last.
    runner: String,
    secondary: Option<String>,
    replica: Option<String>,
    stop_reason: Option<String>,
}

/// A point.
#[derive(Clone, Copy, Serialize)]
pub(crate) struct Point {
    term: u64,
    epoch: u64,
}

#[derive(Serialize)]
struct Points {
    tip: Option<Point>,
    acked: Option<Point>,
    staged: Option<Point>,
    applied: Option<Point>,
    persisted: Option<Point>,
    released: Option<Point>,
    stale: Option<Point>,
}

#[derive(Serialize)]
struct Guest {
    hypervisor: String,
    tracker: &'static str,
    cpu_model: String,
    memory_bytes: u64,
    populated_bytes: u64,
    vcpus: u32,
    running: bool,
}

#[derive(Serialize)]
struct Link {
    peer: String,
    address: String,
    connected: bool,
    rtt_us: u64,
    silent_ms: u64,
    suspect_after_ms: Option<u64>,
    since_ms: u64,
    in_flight: u32,
    backlog_bytes: u64,
}

#[derive(Serialize)]
struct LastError {
    text: String,
    age_ms: u64,
}

/// How far a protection is.
#[derive(Serialize)]
pub(crate) struct Progress {
    phase: &'static str,
    bytes_done: u64,
    bytes_total: u64,
    elapsed_ms: u64,
    secondary: Option<String>,
    register: Option<Register>,
    why: Option<String>,
}

#[derive(Serialize)]
struct Counters {
    epochs: u64,
    pages: u64,
    zero_pages: u64,
    wire_bytes: u64,
    ring_overruns: u64,
    full_resyncs: u64,
    resyncs: u64,
    rejoins: u64,
    failed_epochs: u64,
    link_losses: u64,
    promotions: u64,
}

#[derive(Serialize)]
struct Console {
    kept_from: u64,
    released: u64,
    input: u64,
}

/// What was found, for scripts.
pub(crate) fn answer(sights: &[Sight]) -> Answer {
    let runs = runner(sights);
    Answer {
        runner: runs.map(|(_, status, _)| clean(&status.node)),
        protected: runs.is_some_and(|(_, status, _)| protected(status)),
        nodes: sights.iter().map(node).collect(),
    }
}

fn node(sight: &Sight) -> Node {
    let address = sight.address.to_string();
    match &sight.found {
        Ok((_, found)) => Node { address, answers: true, error: None, status: Some(status(found)) },
        Err(e) => Node { address, answers: false, error: Some(e.to_string()), status: None },
    }
}

fn status(status: &StatusReply) -> Status {
    let error = filled(&status.last_error);
    Status {
        node: clean(&status.node),
        vm: clean(&status.vm),
        version: clean(&status.version),
        protocol: status.protocol,
        incarnation: words::id(&status.incarnation),
        role: words::role(status.role),
        register: register(status.register.as_ref()),
        register_age_ms: status.register_age_ms,
        replica: filled(&words::id(&status.replica)),
        points: points(&status.points.unwrap_or_default()),
        lag_epochs: lag(status),
        history: status.history.iter().copied().map(Point::from).collect(),
        guest: status.guest.as_ref().map(guest),
        disk: status.disk.as_ref().map(Disk::from),
        network: status.network.as_ref().map(Network::from),
        link: status.link.as_ref().map(link),
        last_error: error.map(|text| LastError { text, age_ms: status.last_error_age_ms }),
        seed: status.seed.as_ref().map(progress),
        counters: counters(&status.counters.unwrap_or_default()),
        unprotected_ms: status.unprotected_ms,
        unprotected_total_ms: status.unprotected_total_ms,
        uptime_ms: status.uptime_ms,
        failover: Some(words::failover(status.failover)).filter(|word| !word.is_empty()),
        ack_policy: Some(words::policy(status.ack_policy)).filter(|word| !word.is_empty()),
        ack_policy_pending: status.ack_policy_pending,
        epoch_age_ms: status.epoch_age_ms,
        console: status.console.map(|console| Console {
            kept_from: console.kept_from,
            released: console.released,
            input: console.input,
        }),
        holding: filled(&status.holding),
    }
}

/// Whether the node that runs the guest is protected: paired, and linked to the node that protects it.
pub(crate) fn protected(status: &StatusReply) -> bool {
    status.role == v1::Role::Paired as i32 && status.link.as_ref().is_none_or(|link| link.connected)
}

/// Epochs that a runner has cut and nobody has acked. Known only within one term.
pub(crate) fn lag(status: &StatusReply) -> Option<u64> {
    let points = status.points.as_ref()?;
    let (tip, acked) = (points.tip?, points.acked?);
    (words::runs(status.role) && tip.term == acked.term).then(|| tip.epoch.saturating_sub(acked.epoch))
}

fn filled(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| clean(text))
}

/// A register, if it can be read.
pub(crate) fn register(entry: Option<&v1::RegisterEntry>) -> Option<Register> {
    let entry = Entry::try_from(entry?).ok()?;
    let (value, secondary, replica, stop_reason) = match &entry.value {
        Value::Solo { .. } => ("solo", None, None, None),
        Value::Paired { secondary, replica, .. } => {
            ("paired", Some(secondary.to_string()), Some(format!("{:032x}", replica.0)), None)
        }
        Value::Stopped { reason, .. } => ("stopped", None, None, Some(reason.to_string())),
    };
    let runner = entry.value.runner().to_string();
    Some(Register { term: entry.term.0, value, runner, secondary, replica, stop_reason })
}

impl From<v1::Point> for Point {
    fn from(point: v1::Point) -> Self {
        Self { term: point.term, epoch: point.epoch }
    }
}

fn points(points: &v1::Points) -> Points {
    let point = |point: Option<v1::Point>| point.map(Point::from);
    Points {
        tip: point(points.tip),
        acked: point(points.acked),
        staged: point(points.staged),
        applied: point(points.applied),
        persisted: point(points.persisted),
        released: point(points.released),
        stale: point(points.stale),
    }
}

fn guest(guest: &v1::Guest) -> Guest {
    Guest {
        hypervisor: clean(&guest.hypervisor),
        tracker: words::tracker(guest.tracker.as_ref()),
        cpu_model: clean(&guest.cpu_model),
        memory_bytes: guest.memory_bytes,
        populated_bytes: guest.populated_bytes,
        vcpus: guest.vcpus,
        running: guest.running,
    }
}

fn link(link: &v1::Link) -> Link {
    Link {
        peer: clean(&link.peer),
        address: clean(&link.address),
        connected: link.connected,
        rtt_us: link.rtt_us,
        silent_ms: link.silent_ms,
        suspect_after_ms: Some(link.suspect_after_ms).filter(|&ms| ms > 0),
        since_ms: link.since_ms,
        in_flight: link.in_flight,
        backlog_bytes: link.backlog_bytes,
    }
}

/// A progress, for scripts.
pub(crate) fn progress(progress: &v1::ProtectProgress) -> Progress {
    Progress {
        phase: words::phase(progress.phase),
        bytes_done: progress.bytes_done,
        bytes_total: progress.bytes_total,
        elapsed_ms: progress.elapsed_ms,
        secondary: filled(&progress.secondary),
        register: register(progress.register.as_ref()),
        why: filled(&progress.why),
    }
}

fn counters(counters: &v1::Counters) -> Counters {
    Counters {
        epochs: counters.epochs,
        pages: counters.pages,
        zero_pages: counters.zero_pages,
        wire_bytes: counters.wire_bytes,
        ring_overruns: counters.ring_overruns,
        full_resyncs: counters.full_resyncs,
        resyncs: counters.resyncs,
        rejoins: counters.rejoins,
        failed_epochs: counters.failed_epochs,
        link_losses: counters.link_losses,
        promotions: counters.promotions,
    }
}
