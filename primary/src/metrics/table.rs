//! The table of all metrics: the one place that says their names, types and meanings.

/// A metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metric {
    /// Its name in a sample; samples of a histogram have `_bucket`, `_sum` or `_count` behind it.
    pub name: &'static str,
    /// Its type.
    pub kind: Kind,
    /// What is counted or measured.
    pub unit: &'static str,
    /// Which node it means something for.
    pub on: On,
    /// When it is told.
    pub when: When,
    /// Where it comes from.
    pub source: Source,
    /// Its label beside `vm` and `node`, with the values that it has. (`colo_build_info` has others.)
    pub label: Option<(&'static str, &'static [&'static str])>,
    /// What it means, without the full stop.
    pub help: &'static str,
}

/// Types of metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Goes up and down.
    Gauge,
    /// Only grows, until the process ends.
    Counter,
    /// Counts in buckets of time, [`BUCKETS`].
    Histogram,
    /// 1, and its labels say it.
    Info,
}

/// Which node a metric means something for. The other kind tells it as well, unmoved: a follower may run the guest later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    /// Both.
    Both,
    /// One that runs the guest.
    Runner,
    /// One that follows.
    Follower,
}

/// When a metric is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// From the start.
    Always,
    /// Once there is such a thing: a register that was read, a guest, a link, an acked epoch.
    Known,
    /// If the guest has a network card.
    Card,
    /// If it has a disk.
    Disk,
}

/// Where a metric comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Read from the node's account when it is asked for.
    Account,
    /// Told where it happens.
    Events,
}

/// Upper bounds of a histogram's buckets, in seconds: from a cut of few pages to a store that hangs.
pub const BUCKETS: [f64; 18] = [
    0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    5.0, 10.0, 30.0,
];

/// One line a metric: `CONSTANT = Kind "name" unit, On, When, from Source[, by "label" values]: "help";`
macro_rules! metrics {
    ($($thing:ident = $kind:ident $name:literal $unit:literal, $on:ident, $when:ident, from $source:ident
        $(, by $label:literal $values:expr)?; $help:literal;)+) => {
        $(
            #[doc = concat!($help, ".")]
            pub const $thing: Metric = Metric {
                name: $name,
                kind: Kind::$kind,
                unit: $unit,
                on: On::$on,
                when: When::$when,
                source: Source::$source,
                label: metrics!(@label $($label $values)?),
                help: $help,
            };
        )+
        /// All of them.
        pub const TABLE: &[Metric] = &[$($thing),+];
    };
    (@label) => { None };
    (@label $label:literal $values:expr) => { Some(($label, &$values)) };
}

metrics! {
    BUILD_INFO = Info "colo_build_info" "1", Both, Always, from Account;
        "Version of Colo and of the protocol, as labels version and protocol";
    START_TIME = Gauge "colo_process_start_time_seconds" "seconds", Both, Always, from Account;
        "When the process began, since 1970";
    ROLE = Gauge "colo_role" "1", Both, Always, from Account, by "role" ROLES;
        "1 for what the node does, 0 for the rest";
    HEALTHY = Gauge "colo_healthy" "1", Both, Always, from Account;
        "1 if the node does its part, as coloctl health judges it";
    PROTECTED = Gauge "colo_protected" "1", Both, Always, from Account;
        "1 if a whole copy follows the guest over a link that stands";
    FAILED = Gauge "colo_failed" "1", Both, Always, from Account;
        "1 if the node's guest or store has failed";
    TERM = Gauge "colo_term" "1", Both, Known, from Account;
        "Term of the register as it was found last";
    REGISTER_AGE = Gauge "colo_register_age_seconds" "seconds", Both, Known, from Account;
        "Since the arbiter answered last";
    ARBITER_SILENT = Gauge "colo_arbiter_silent" "1", Both, Always, from Account;
        "1 while the arbiter does not answer";
    ARBITER_ERRORS = Counter "colo_arbiter_errors_total" "errors", Both, Always, from Events;
        "Times that the arbiter gave no answer";
    PROPOSAL_PENDING = Gauge "colo_proposal_pending" "1", Both, Always, from Account;
        "1 while a proposal waits for the arbiter";
    GUEST_RUNNING = Gauge "colo_guest_running" "1", Both, Always, from Account;
        "1 while the guest's vCPUs run here";
    GUEST_VCPUS = Gauge "colo_guest_vcpus" "vCPUs", Both, Known, from Account;
        "vCPUs of the guest";
    GUEST_MEMORY = Gauge "colo_guest_memory_bytes" "bytes", Both, Known, from Account;
        "Memory of the guest";
    GUEST_POPULATED = Gauge "colo_guest_memory_populated_bytes" "bytes", Both, Known, from Account;
        "Memory of the guest, or of its copy, that the host has given";
    UNPROTECTED_AGE = Gauge "colo_unprotected_age_seconds" "seconds", Runner, Always, from Account;
        "How long the guest has run without protection; 0 while it is protected or does not run here";
    UNPROTECTED = Counter "colo_unprotected_seconds_total" "seconds", Runner, Always, from Account;
        "All time for which the guest ran here without protection";
    EPOCHS = Counter "colo_epochs_total" "epochs", Both, Always, from Account;
        "Epochs acked, of a runner, or applied, of a follower";
    PAGES = Counter "colo_pages_total" "pages", Both, Always, from Account;
        "Pages with bytes in those epochs";
    ZERO_PAGES = Counter "colo_zero_pages_total" "pages", Both, Always, from Account;
        "Pages that were zero in those epochs";
    WIRE_BYTES = Counter "colo_wire_bytes_total" "bytes", Both, Always, from Account;
        "Bytes of those epochs on the wire";
    EPOCH_AGE = Gauge "colo_epoch_age_seconds" "seconds", Both, Known, from Account;
        "What a failover would go back to: since the cut of the newest acked epoch, or since a follower staged its newest";
    EPOCH_PAUSE = Histogram "colo_epoch_pause_seconds" "seconds", Runner, Always, from Events;
        "How long the guest stood still for an epoch";
    EPOCH_PAUSE_PART = Histogram "colo_epoch_pause_part_seconds" "seconds", Runner, Always, from Events, by "part" PAUSE_PARTS;
        "Parts of the pause: stopping, saving the machine, harvesting the dirty set, copying pages";
    EPOCH_ACK = Histogram "colo_epoch_ack_seconds" "seconds", Runner, Always, from Events;
        "From the guest's resume to the epoch's ack";
    EPOCH_STAGE = Histogram "colo_epoch_stage_seconds" "seconds", Follower, Always, from Events;
        "From an epoch's last frame to its being staged";
    EPOCH_APPLY = Histogram "colo_epoch_apply_seconds" "seconds", Follower, Always, from Events;
        "Applying an epoch to the image";
    EPOCH_PERSIST = Histogram "colo_epoch_persist_seconds" "seconds", Follower, Always, from Events;
        "Storing epochs, synced; several that wait are stored at once";
    IN_FLIGHT = Gauge "colo_in_flight_epochs" "epochs", Runner, Always, from Account;
        "Epochs that are cut and not acked";
    BACKLOG = Gauge "colo_backlog_bytes" "bytes", Both, Always, from Account;
        "Bytes that the follower has staged and not yet applied and stored";
    HELD_FRAMES = Gauge "colo_held_frames" "frames", Both, Always, from Account;
        "Network frames that may not go out yet";
    HELD_BYTES = Gauge "colo_held_bytes" "bytes", Both, Always, from Account;
        "Bytes of those frames";
    FAILED_EPOCHS = Counter "colo_failed_epochs_total" "epochs", Runner, Always, from Account;
        "Epochs that failed and were merged into the next";
    RING_OVERRUNS = Counter "colo_ring_overruns_total" "losses", Runner, Always, from Account;
        "Losses of the dirty set, each of which has all memory compared";
    LINK_UP = Gauge "colo_link_up" "1", Both, Always, from Account;
        "1 while the link to the other node stands";
    LINK_LOSSES = Counter "colo_link_losses_total" "losses", Both, Always, from Account;
        "Links lost";
    LINK_RTT = Gauge "colo_link_rtt_seconds" "seconds", Both, Known, from Account;
        "Round trip of the link";
    LINK_SILENCE = Gauge "colo_link_silence_seconds" "seconds", Both, Known, from Account;
        "Since something came over the link";
    COPIES = Counter "colo_copies_total" "copies", Both, Always, from Account, by "mode" COPY_MODES;
        "Copies begun: full, resync (what differs by digests), rejoin (what was written since)";
    COPY_BYTES = Counter "colo_copy_bytes_total" "bytes", Both, Always, from Events, by "mode" COPY_MODES;
        "Page and block bytes of copies, sent or received, before the epoch that completes one";
    VERIFICATIONS = Counter "colo_verifications_total" "comparisons", Runner, Always, from Events, by "outcome" OUTCOMES;
        "Comparisons of the copy with the guest: equal, differs, ended (early)";
    VERIFY_COMPARED = Counter "colo_verify_compared_total" "pages or blocks", Runner, Always, from Events, by "part" VERIFY_PARTS;
        "Pages and blocks of the copy that were compared with the guest";
    VERIFY_DIFFERING = Counter "colo_verify_differing_total" "pages or blocks", Runner, Always, from Events, by "part" VERIFY_PARTS;
        "Pages and blocks of the copy that were found to differ from the guest";
    STORE_FAILURES = Counter "colo_store_failures_total" "failures", Follower, Always, from Events;
        "Failures of the store, or of the image file under it, while the node followed";
    PROMOTIONS = Counter "colo_promotions_total" "promotions", Both, Always, from Account;
        "Times that this process took the guest over";
    PROMOTION = Histogram "colo_promotion_seconds" "seconds", Both, Always, from Events, by "part" PROMOTION_PARTS;
        "Parts of a promotion: from the suspicion to the register's answer (0 if the operator asked), finishing the image, writing to the store, restoring the machine; total is from the suspicion to a running vCPU";
    CARRIER = Gauge "colo_network_carrier" "1", Both, Card, from Account;
        "1 if the carrier of the guest's TAP is on";
    FRAMES = Counter "colo_network_frames_total" "frames", Both, Card, from Account, by "direction" DIRECTIONS;
        "Frames that the host took from the guest (sent) or gave to it (received)";
    FRAME_BYTES = Counter "colo_network_bytes_total" "bytes", Both, Card, from Account, by "direction" DIRECTIONS;
        "Bytes of those frames";
    LOST_FRAMES = Counter "colo_network_lost_frames_total" "frames", Both, Card, from Account;
        "Frames that were let out and that the host did not take";
    DISK = Gauge "colo_disk_bytes" "bytes", Both, Disk, from Account;
        "Size of the guest's disk";
    DISK_OVERLAY = Gauge "colo_disk_overlay_bytes" "bytes", Both, Disk, from Account;
        "Bytes of the disk in the store that are still to be folded into its image file";
    DISK_FAILED = Gauge "colo_disk_failed" "1", Both, Disk, from Account;
        "1 if the image file has failed";
}

/// Roles, as [`ROLE`] names them.
pub(super) const ROLES: [&str; 13] = [
    "starting",
    "alone",
    "seeding",
    "joining",
    "pairing",
    "paired",
    "lost",
    "waiting",
    "following",
    "receiving",
    "promoting",
    "stopped",
    "spare",
];
const PAUSE_PARTS: [&str; 4] = ["stop", "save", "harvest", "copy"];
const PROMOTION_PARTS: [&str; 5] = ["register", "apply", "store", "restore", "total"];
const COPY_MODES: [&str; 3] = ["full", "resync", "rejoin"];
const OUTCOMES: [&str; 3] = ["equal", "differs", "ended"];
const VERIFY_PARTS: [&str; 2] = ["memory", "disk"];
const DIRECTIONS: [&str; 2] = ["sent", "received"];

impl Metric {
    /// The name as the format's `# TYPE` has it: without what the type adds.
    pub fn family(&self) -> &'static str {
        let end = match self.kind {
            Kind::Counter => "_total",
            Kind::Info => "_info",
            _ => "",
        };
        self.name.strip_suffix(end).unwrap_or(self.name)
    }

    /// Its row in `docs/metrics.md`.
    pub fn row(&self) -> String {
        let kind = match self.kind {
            Kind::Gauge => "gauge",
            Kind::Counter => "counter",
            Kind::Histogram => "histogram",
            Kind::Info => "info",
        };
        let labels = match (self.kind, self.label) {
            (Kind::Info, _) => "`version`, `protocol`".to_owned(),
            (_, Some((label, values))) => format!("`{label}`: {}", values.join(", ")),
            _ => String::new(),
        };
        let on = match self.on {
            On::Both => "both",
            On::Runner => "runner",
            On::Follower => "follower",
        };
        let when = match self.when {
            When::Always => "",
            When::Known => "once known",
            When::Card => "with a network card",
            When::Disk => "with a disk",
        };
        let Self { name, unit, help, .. } = self;
        format!("| `{name}` | {kind} | {unit} | {labels} | {on} | {when} | {help} |")
    }
}

#[cfg(test)]
mod tests {
    use super::{BUCKETS, Kind, Source, TABLE};
    use std::collections::BTreeSet;

    #[test]
    fn names_follow_the_scheme() {
        let mut families = BTreeSet::new();
        for metric in TABLE {
            let name = metric.name;
            let plain = name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
            assert!(name.starts_with("colo_") && plain && !name.contains("__"), "{name}");
            assert_eq!(name.ends_with("_total"), metric.kind == Kind::Counter, "{name}");
            assert_eq!(name.ends_with("_info"), metric.kind == Kind::Info, "{name}");
            for unit in ["seconds", "bytes"] {
                let ends = metric.family().ends_with(&format!("_{unit}"));
                assert_eq!(ends, metric.unit == unit, "{name} is measured in {}", metric.unit);
            }
            assert!(
                metric.kind != Kind::Histogram || metric.unit == "seconds",
                "{name}: buckets are of seconds"
            );
            assert!(metric.kind != Kind::Histogram || metric.source == Source::Events, "{name}");
            assert!(
                !metric.help.is_empty() && !metric.help.ends_with('.') && !metric.help.contains('|'),
                "{name}"
            );
            assert!(families.insert(metric.family()), "{} comes twice", metric.family());
        }
        assert!(BUCKETS.is_sorted());
    }
}
