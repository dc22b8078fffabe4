//! What nodes send, in words: the same ones in tables and in JSON.

use colo_common::Point;
use colo_common::register::Entry;
use colo_proto::v1::protect_progress::Phase;
use colo_proto::v1::{self, AckPolicy, FailoverPolicy, Role};

/// A role, in one word.
pub(crate) fn role(role: i32) -> &'static str {
    match Role::try_from(role) {
        Ok(Role::Unspecified) => "starting",
        Ok(Role::Alone) => "alone",
        Ok(Role::Seeding) => "seeding",
        Ok(Role::Joining) => "joining",
        Ok(Role::Pairing) => "pairing",
        Ok(Role::Paired) => "paired",
        Ok(Role::Lost) => "lost",
        Ok(Role::Waiting) => "waiting",
        Ok(Role::Following) => "following",
        Ok(Role::Receiving) => "receiving",
        Ok(Role::Promoting) => "promoting",
        Ok(Role::Stopped) => "stopped",
        Ok(Role::Spare) => "spare",
        Err(_) => "unknown",
    }
}

/// Whether a node of this role runs the guest.
pub(crate) fn runs(role: i32) -> bool {
    use Role::{Alone, Joining, Paired, Pairing, Seeding};
    matches!(Role::try_from(role), Ok(Alone | Seeding | Joining | Pairing | Paired))
}

/// Whether a node of this role follows, or would.
pub(crate) fn follows(role: i32) -> bool {
    use Role::{Following, Promoting, Receiving, Waiting};
    matches!(Role::try_from(role), Ok(Waiting | Following | Receiving | Promoting))
}

/// The register, in one line.
pub(crate) fn register(entry: Option<&v1::RegisterEntry>) -> String {
    match entry.map(Entry::try_from) {
        None => String::new(),
        Some(Ok(entry)) => entry.to_string(),
        Some(Err(e)) => format!("not readable: {}", crate::format::clean(&e.to_string())),
    }
}

/// A point, as term.epoch.
pub(crate) fn point(point: Option<v1::Point>) -> String {
    point.map(|point| Point::from(point).to_string()).unwrap_or_default()
}

/// What an ack means.
pub(crate) fn policy(policy: i32) -> &'static str {
    match AckPolicy::try_from(policy) {
        Ok(AckPolicy::Memory) => "memory",
        Ok(AckPolicy::Disk) => "disk",
        Ok(AckPolicy::Unspecified) | Err(_) => "",
    }
}

/// Who decides on a failover.
pub(crate) fn failover(policy: i32) -> &'static str {
    match FailoverPolicy::try_from(policy) {
        Ok(FailoverPolicy::Auto) => "auto",
        Ok(FailoverPolicy::Manual) => "manual",
        Ok(FailoverPolicy::Unspecified) | Err(_) => "",
    }
}

/// A step to protection.
pub(crate) fn phase(phase: i32) -> &'static str {
    match Phase::try_from(phase) {
        Ok(Phase::Pairing) => "pairing",
        Ok(Phase::Digests) => "digests",
        Ok(Phase::Memory) => "memory",
        Ok(Phase::Joining) => "joining",
        Ok(Phase::Register) => "register",
        Ok(Phase::Paired) => "paired",
        Ok(Phase::Unspecified) | Err(_) => "unknown",
    }
}

/// How writes are tracked.
pub(crate) fn tracker(tracker: Option<&v1::Tracker>) -> &'static str {
    use v1::tracker::Kind;
    match tracker.and_then(|tracker| tracker.kind.as_ref()) {
        Some(Kind::RingEntries(_)) => "ring",
        Some(Kind::Bitmap(_)) => "bitmap",
        None => "",
    }
}

/// A random number as it is written in logs and registers; empty if there is none.
pub(crate) fn id(bytes: &[u8]) -> String {
    // Peers choose the length; a real one has 16 bytes.
    bytes.iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::{follows, id, phase, role, runs};

    #[test]
    fn every_role_runs_or_follows_or_neither() {
        let run: Vec<i32> = (0..20).filter(|&role| runs(role)).collect();
        let follow: Vec<i32> = (0..20).filter(|&role| follows(role)).collect();
        assert_eq!((run, follow), (vec![1, 2, 3, 4, 5], vec![7, 8, 9, 10]));
        assert_eq!(
            [role(5), role(8), role(12), role(99), phase(4), phase(99)],
            ["paired", "following", "spare", "unknown", "memory", "unknown"]
        );
        assert_eq!(id(&[0xab; 99]).len(), 32);
    }
}
