//! The audit trail: every change of register, role and policy that this node made or saw, and what operators asked of it.
//! A thread of its own writes it, and the node never waits for that: what does not fit into the channel is counted, and
//! told by an entry in its place.
//!
//! It is filled from the [`Board`](crate::node::status::Board), which sees every change, and by the control plane.

mod offline;
mod trail;

use colo_common::register::Entry;
use colo_common::{Incarnation, NodeId, ProposalId, Term};
use colo_proto::v1::{AuditEntry, AuditKind};
use crossbeam_channel::{Receiver, Sender, bounded};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::watch;

pub use offline::print;
pub use trail::{MAX_BYTES, MAX_ENTRIES, Trail, TrailError};

/// Entries that may wait to be written: a storm of changes, and not more than a disk takes in a second.
const MAX_WAITING: usize = 1024;
/// Entries of one synced batch.
const MAX_BATCH: usize = 256;
/// Bytes of the words of an entry; more is cut off.
const MAX_WORDS: usize = 1024;

/// The trail of this process. Cheap to clone.
#[derive(Clone)]
pub struct Audit(Arc<Shared>);

struct Shared {
    node: NodeId,
    incarnation: Incarnation,
    path: PathBuf,
    /// None once it has ended, or if it could not be begun.
    drafts: Mutex<Option<Sender<AuditEntry>>>,
    missed: AtomicU64,
    trail: Mutex<Option<Arc<Trail>>>,
    writer: Mutex<Option<JoinHandle<()>>>,
    /// The sequence after the newest that is written.
    next: watch::Sender<u64>,
}

impl Audit {
    /// Opens the trail in `path` and starts its thread; `told` hears of every entry that is written. A damaged one is set
    /// aside; one that cannot be opened at all is told in the log, and the node runs on without.
    pub fn open(
        path: &Path,
        node: NodeId,
        incarnation: Incarnation,
        told: impl Fn(&AuditEntry) + Send + 'static,
    ) -> Self {
        let shared = Arc::new(Shared {
            node,
            incarnation,
            path: path.to_owned(),
            drafts: Mutex::default(),
            missed: AtomicU64::new(0),
            trail: Mutex::default(),
            writer: Mutex::default(),
            next: watch::Sender::new(0),
        });
        let audit = Self(shared);
        if let Err(e) = audit.begin(path, told) {
            tracing::error!("{e}; this process keeps no audit trail");
        }
        audit
    }

    fn begin(
        &self,
        path: &Path,
        told: impl Fn(&AuditEntry) + Send + 'static,
    ) -> Result<(), Box<dyn std::error::Error>> {
        let (trail, damage) = Trail::open_or_set_aside(path)?;
        let (trail, (drafts, waiting)) = (Arc::new(trail), bounded(MAX_WAITING));
        self.0.next.send_replace(trail.range().1);
        let (shared, written) = (Arc::clone(&self.0), Arc::clone(&trail));
        let writer = std::thread::Builder::new().name("audit".to_owned());
        let writer = writer.spawn(move || shared.write(&written, &waiting, told))?;
        *locked(&self.0.trail) = Some(trail);
        *locked(&self.0.drafts) = Some(drafts);
        *locked(&self.0.writer) = Some(writer);
        if let Some(damage) = damage {
            tracing::error!("{damage}");
            self.note(AuditEntry { kind: AuditKind::Gap.into(), what: damage, ..AuditEntry::default() });
        }
        Ok(())
    }

    /// Notes an entry, as of now, of this process. Never waits.
    pub fn note(&self, mut entry: AuditEntry) {
        self.0.sign(&mut entry);
        for text in [&mut entry.what, &mut entry.who, &mut entry.reason] {
            text.truncate(text.floor_char_boundary(MAX_WORDS));
        }
        if let Some(drafts) = &*locked(&self.0.drafts)
            && drafts.try_send(entry).is_err()
        {
            self.0.missed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Whether a change of the register was proposed by this process.
    pub fn is_own(&self, entry: &Entry) -> bool {
        let before = Term(entry.term.0.saturating_sub(1));
        entry.proposal == ProposalId::of(self.0.incarnation, before)
    }

    /// What is written, to be read.
    ///
    /// # Errors
    /// There is none.
    pub fn trail(&self) -> Result<Arc<Trail>, TrailError> {
        locked(&self.0.trail).clone().ok_or_else(|| TrailError::Missing { path: self.0.path.clone() })
    }

    /// Changes whenever entries were written: to the sequence after the newest.
    pub fn next(&self) -> watch::Receiver<u64> {
        self.0.next.subscribe()
    }

    /// Writes what waits and closes the trail; before the process ends, since RocksDB must be closed before its own
    /// statics go.
    pub fn close(&self) {
        locked(&self.0.drafts).take();
        if let Some(writer) = locked(&self.0.writer).take()
            && writer.join().is_err()
        {
            tracing::error!("the audit thread had panicked");
        }
        locked(&self.0.trail).take();
    }
}

impl Shared {
    fn sign(&self, entry: &mut AuditEntry) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        entry.at_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        entry.node = self.node.to_string();
        entry.incarnation = self.incarnation.0.to_be_bytes().to_vec();
    }

    /// The thread: until everybody who may note something has left.
    fn write(&self, trail: &Trail, waiting: &Receiver<AuditEntry>, told: impl Fn(&AuditEntry)) {
        let mut failed = 0_u64;
        let mut append = |batch: Vec<AuditEntry>| match self.append(trail, batch) {
            Ok(batch) => batch.iter().for_each(&told),
            Err(e) => {
                failed += 1;
                // For each doubling: a full disk stays full.
                if failed.is_power_of_two() {
                    tracing::error!("{e}");
                }
            }
        };
        while let Ok(first) = waiting.recv() {
            append([first].into_iter().chain(waiting.try_iter().take(MAX_BATCH)).collect());
        }
        append(Vec::new());
    }

    /// Appends what waited, after word of what is missing.
    fn append(&self, trail: &Trail, mut batch: Vec<AuditEntry>) -> Result<Vec<AuditEntry>, TrailError> {
        let noted = batch.len() as u64;
        let missed = self.missed.swap(0, Ordering::Relaxed);
        if missed > 0 {
            let what = format!("{missed} entries are missing: they came too fast, or could not be written");
            let mut gap = AuditEntry { kind: AuditKind::Gap.into(), what, missed, ..AuditEntry::default() };
            self.sign(&mut gap);
            batch.insert(0, gap);
        }
        if !batch.is_empty() {
            trail.append(&mut batch).inspect_err(|_| {
                self.missed.fetch_add(missed + noted, Ordering::Relaxed);
            })?;
            self.next.send_replace(trail.range().1);
        }
        Ok(batch)
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::{Audit, MAX_WORDS, Trail};
    use colo_common::Incarnation;
    use colo_proto::v1::{AuditEntry, AuditKind};
    use std::sync::mpsc;

    fn command(what: String) -> AuditEntry {
        AuditEntry { kind: AuditKind::Command.into(), what, ..AuditEntry::default() }
    }

    #[test]
    fn everything_that_was_noted_is_there_after_the_end() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("audit");
        let (out, told) = mpsc::channel();
        let audit = Audit::open(&path, "a".parse().unwrap(), Incarnation(7), move |entry| {
            let _ = out.send(entry.sequence);
        });
        for n in 0..100 {
            audit.note(command(n.to_string()));
        }
        audit.note(command("ä".repeat(MAX_WORDS)));
        audit.close();
        audit.note(command("too late".to_owned()));
        assert!(audit.trail().is_err());
        assert_eq!(told.iter().collect::<Vec<_>>(), (1..=101).collect::<Vec<u64>>());
        let entries = Trail::open_to_read(&path).unwrap().read(0, 1000).unwrap();
        assert_eq!(entries.len(), 101);
        assert_eq!((entries[42].what.as_str(), entries[42].node.as_str()), ("42", "a"));
        assert_eq!(entries[42].incarnation, Incarnation(7).0.to_be_bytes());
        assert!(entries[42].at_ms > 1_600_000_000_000);
        assert_eq!(entries[100].what.len(), MAX_WORDS);
    }

    #[test]
    fn what_does_not_fit_is_counted_and_nobody_waits() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("audit");
        let (go, wait) = mpsc::channel::<()>();
        // The thread stands still after its first entry.
        let audit = Audit::open(&path, "a".parse().unwrap(), Incarnation(7), move |entry| {
            if entry.sequence == 1 {
                let _ = wait.recv();
            }
        });
        const NOTED: u64 = 5000;
        for n in 0..NOTED {
            audit.note(command(n.to_string()));
        }
        drop(go);
        audit.close();
        let entries = Trail::open_to_read(&path).unwrap().read(0, usize::MAX).unwrap();
        let gaps: Vec<_> = entries.iter().filter(|entry| entry.kind() == AuditKind::Gap).collect();
        let missed: u64 = gaps.iter().map(|gap| gap.missed).sum();
        assert!(!gaps.is_empty());
        assert_eq!(entries.len() as u64 - gaps.len() as u64 + missed, NOTED);
    }

    #[test]
    fn a_trail_that_cannot_be_begun_keeps_nothing_from_running() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("audit");
        std::fs::write(&path, "a file").unwrap();
        let audit = Audit::open(&path, "a".parse().unwrap(), Incarnation(7), |_| {});
        audit.note(command("nobody hears it".to_owned()));
        assert!(audit.trail().err().unwrap().to_string().contains("no audit trail"));
        audit.close();
    }
}
