//! Where the account is kept, and who is told when it changes: watchers of epochs, listeners to events, the audit trail.

use colo_proto::message::{SeedMode, SeedPart};
use colo_proto::v1::{self, AuditEntry, AuditKind, EventKind};
use colo_vmm::GuestMemory;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::broadcast;

use super::{CopyNote, Counters, Devices, GuestAccount, LinkState, Marks, Promoted, Report, Seed, Status};
use crate::admin::role;
use crate::audit::Audit;
use crate::checkpoint::Timing;
use crate::events::{self, Told};
use crate::metrics::{self, Meters};

/// Reports that a slow watcher may be behind before it misses some.
const REPORTS: usize = 1024;
/// The same of events, which are fewer.
const EVENTS: usize = 256;

/// Where the account is kept.
#[derive(Clone)]
pub struct Board {
    account: Arc<Mutex<Account>>,
    reports: broadcast::Sender<Report>,
    events: broadcast::Sender<v1::Event>,
    audit: Arc<OnceLock<Audit>>,
    meters: Meters,
}

#[derive(Default)]
struct Account {
    status: Status,
    told: Told,
}

impl Default for Board {
    fn default() -> Self {
        Self {
            account: Arc::default(),
            reports: broadcast::Sender::new(REPORTS),
            events: broadcast::Sender::new(EVENTS),
            audit: Arc::default(),
            meters: Meters::default(),
        }
    }
}

impl Board {
    /// The account as of now.
    pub fn status(&self) -> Status {
        self.lock().status.clone()
    }

    /// Where what happens is told, if it is in the [table](crate::metrics) as such.
    pub fn meters(&self) -> &Meters {
        &self.meters
    }

    /// A report of every epoch from now on.
    pub fn watch(&self) -> broadcast::Receiver<Report> {
        self.reports.subscribe()
    }

    /// Everything else that happens from now on.
    pub fn listen(&self) -> broadcast::Receiver<v1::Event> {
        self.events.subscribe()
    }

    /// Tells listeners of something that the account does not show.
    pub fn happens(&self, kind: EventKind, what: String) {
        let told = events::told(&self.lock().status, kind, what);
        // Nobody listening is no error.
        drop(self.events.send(told.event));
    }

    /// Tells listeners of an entry of the audit trail.
    pub fn noted(&self, entry: &AuditEntry) {
        let kind = EventKind::Audit.into();
        let (what, term, at_ms) = (entry.what.clone(), entry.term, entry.at_ms);
        let role = role(self.lock().status.role).into();
        let audit = Some(entry.clone());
        drop(self.events.send(v1::Event { kind, what, term, at_ms, role, audit, ..v1::Event::default() }));
    }

    /// Everything that is to be noted goes to this trail from now on; the first that is given stays.
    pub fn keep_audit(&self, audit: Audit) {
        let before = audit.trail().ok().and_then(|trail| trail.newest().ok().flatten());
        let before = Duration::from_millis(before.map_or(0, |entry| entry.unprotected_ms));
        let mut account = self.lock();
        account.status.unprotected_before = before;
        account.told.was_unprotected(before);
        drop(account);
        drop(self.audit.set(audit));
    }

    /// The audit trail, if this process keeps one.
    pub fn audit(&self) -> Option<&Audit> {
        self.audit.get()
    }

    /// Notes something in the audit trail that the account does not show; `who` asked for it, and typed this reason.
    pub fn note(&self, kind: AuditKind, what: String, who: String, reason: String) {
        if let Some(audit) = self.audit.get() {
            let entry = events::entry(&self.lock().status, kind, what);
            audit.note(AuditEntry { who, reason, ..entry });
        }
    }

    /// Changes the account, and tells what that means.
    pub fn change(&self, change: impl FnOnce(&mut Status)) {
        let mut account = self.lock();
        change(&mut account.status);
        let Account { status, told } = &mut *account;
        let audit = self.audit.get();
        // Under the lock, so that what is told is in the order of the changes; nobody waits for anything here.
        for news in told.news(status, |entry| audit.is_some_and(|audit| audit.is_own(entry))) {
            if let (Some(audit), Some(entry)) = (audit, news.audit) {
                audit.note(entry);
            }
            drop(self.events.send(news.event));
        }
    }

    /// Changes the counters.
    pub fn count(&self, change: impl FnOnce(&mut Counters)) {
        change(&mut self.lock().status.counters);
    }

    /// A vCPU runs.
    pub(in crate::node) fn ran(&self) {
        let mut took = None;
        self.change(|status| {
            let first = status.promotion.as_mut().filter(|promotion| promotion.ran.is_none());
            took = first.map(|promotion| {
                let ran = *promotion.ran.insert(Instant::now());
                let Promoted { register, apply, store, restore, granted, .. } = *promotion;
                let total = register + ran.saturating_duration_since(granted);
                [
                    ("register", register),
                    ("apply", apply),
                    ("store", store),
                    ("restore", restore),
                    ("total", total),
                ]
            });
        });
        let parts = took.into_iter().flatten();
        parts.for_each(|(part, took)| self.meters.observe_for(metrics::PROMOTION, part, took));
    }

    /// Something went wrong.
    pub fn error(&self, what: String) {
        self.change(|status| status.error = Some((what, Instant::now())));
    }

    /// The arbiter does not answer.
    pub fn arbiter_silent(&self, why: String) {
        self.change(|status| {
            status.error = Some((why.clone(), Instant::now()));
            status.arbiter_silent = Some(why);
        });
        self.meters.add(metrics::ARBITER_ERRORS, 1.0);
    }

    /// The guest is this one.
    pub fn describe(&self, description: v1::Guest, memory: Arc<GuestMemory>) {
        self.lock().status.guest = Some(GuestAccount { description, memory });
    }

    /// These are behind the guest's devices.
    pub fn attach(&self, devices: Devices) {
        self.lock().status.devices = devices;
    }

    /// A link has come up.
    pub fn linked(&self, link: LinkState) {
        self.change(|status| status.link = Some(link));
    }

    /// Tells watchers of an epoch, and counts it.
    pub fn report(&self, report: Report) {
        self.count(|counters| {
            counters.epochs += 1;
            counters.pages += report.pages;
            counters.zero_pages += report.zero_pages;
            counters.wire_bytes += report.wire_bytes;
        });
        self.measure(&report);
        // Nobody watching is no error.
        drop(self.reports.send(report));
    }

    fn measure(&self, report: &Report) {
        let observe = |metric, took: Option<Duration>| {
            if let Some(took) = took {
                self.meters.observe(metric, took);
            }
        };
        observe(metrics::EPOCH_PAUSE, report.timing.map(|timing| timing.pause));
        observe(metrics::EPOCH_ACK, report.ack);
        observe(metrics::EPOCH_STAGE, report.stage);
        observe(metrics::EPOCH_APPLY, report.apply);
        if let Some(Timing { cut, copy, .. }) = report.timing {
            let parts = [("stop", cut.stop), ("save", cut.save), ("harvest", cut.harvest), ("copy", copy)];
            parts
                .into_iter()
                .for_each(|(part, took)| self.meters.observe_for(metrics::EPOCH_PAUSE_PART, part, took));
        }
    }

    /// A copy begins, sent or received.
    pub fn copy_begins(&self, mode: SeedMode) {
        self.change(|status| {
            status.counters.copy_begins(mode);
            status.copying = Some(mode);
        });
    }

    /// So many bytes of its pages and blocks were sent or received.
    pub fn copied(&self, bytes: u64) {
        let mode = match self.lock().status.copying.map(|mode| mode.memory) {
            Some(SeedPart::All) => "full",
            Some(SeedPart::Differing) => "resync",
            Some(SeedPart::Since(_)) => "rejoin",
            None => return,
        };
        self.meters.add_for(metrics::COPY_BYTES, mode, bytes as f64);
    }

    /// A copy begins to be sent.
    pub(in crate::node) fn seed_begins(&self, mode: SeedMode, what: String, why: String) {
        self.copy_begins(mode);
        self.change(|status| {
            status.copy = Some(CopyNote { what, why, since: Instant::now() });
            let compares = mode.memory == SeedPart::Differing;
            status.seed = Some(Seed { done: 0, total: 0, compares, since: Instant::now() });
            // Of another copy.
            (status.marks, status.epoch_at) = (Marks::default(), None);
        });
    }

    /// So many pages of it were looked at.
    pub(in crate::node) fn seeding(&self, done: u64, total: u64) {
        self.change(|status| {
            if let Some(seed) = &mut status.seed {
                (seed.done, seed.total) = (done, total);
            }
        });
    }

    /// Its first pass is done: what was written meanwhile follows.
    pub(in crate::node) fn compared(&self) {
        self.change(|status| {
            if let Some(seed) = &mut status.seed {
                seed.compares = false;
            }
        });
    }

    /// This process begins to run the guest; what it was told as a follower is over.
    pub(in crate::node) fn begins_to_run(&self) {
        self.change(|status| {
            status.marks = Marks::default();
            (status.acked, status.stale, status.epoch_at) = (None, None, None);
            (status.link, status.policy, status.failure) = (None, None, None);
        });
    }

    fn lock(&self) -> MutexGuard<'_, Account> {
        self.account.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::Board;
    use crate::audit::Audit;
    use crate::node::status::Role;
    use colo_common::Incarnation;
    use std::path::Path;
    use std::time::{Duration, Instant};

    /// A process that runs the guest alone for a while; answers the time without protection that it begins with, and ends
    /// with.
    fn run_alone(path: &Path, time: Duration) -> (Duration, Duration) {
        let board = Board::default();
        let audit = Audit::open(path, "a".parse().unwrap(), Incarnation(1), |_| {});
        board.keep_audit(audit.clone());
        let before = board.status().unprotected_before;
        let turn = |role| {
            board.change(|status| {
                status.role = role;
                status.judge_protection(Instant::now());
            });
        };
        turn(Role::Alone);
        std::thread::sleep(time);
        turn(Role::Paired);
        audit.close();
        (before, board.status().unprotected_before)
    }

    #[test]
    fn time_without_protection_is_kept_over_processes() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("audit");
        let time = Duration::from_millis(20);
        let (before, first) = run_alone(&path, time);
        assert!(before.is_zero() && first >= time, "{before:?}, {first:?}");
        let (before, second) = run_alone(&path, time);
        assert_eq!(before.as_millis(), first.as_millis());
        assert!(second >= before + time, "{second:?}");
    }
}
