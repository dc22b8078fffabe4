//! What happens at a node, for whoever listens and for the audit trail: what has changed in its account since it was
//! looked at last.

use colo_common::register::Entry;
use colo_proto::v1::{self, AuditEntry, AuditKind, EventKind};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::admin::role as role_of;
use crate::node::status::{Policy, Role, Seed, Status};

/// Steps of a copy that are told: so many in a hundred.
const SEED_STEP: u64 = 10;

/// What was told of the account.
#[derive(Debug, Default)]
pub(crate) struct Told {
    role: Role,
    register: Option<Entry>,
    policy: Option<Policy>,
    link: Option<(bool, Instant)>,
    seed: Option<(bool, u64)>,
    copy: Option<Instant>,
    unprotected: Duration,
    ran: Option<Instant>,
    error: Option<Instant>,
}

/// Something that happened, and what the audit trail is to say of it.
pub(crate) struct News {
    pub(crate) event: v1::Event,
    pub(crate) audit: Option<AuditEntry>,
}

impl Told {
    /// So long the guest ran here without protection under processes before this one.
    pub(crate) fn was_unprotected(&mut self, before: Duration) {
        self.unprotected = before;
    }

    /// What is new in `status`; `is_own` tells the changes of the register that this process made.
    pub(crate) fn news(&mut self, status: &Status, is_own: impl Fn(&Entry) -> bool) -> Vec<News> {
        let mut news = Vec::new();
        self.register(status, is_own, &mut news);
        self.role(status, &mut news);
        self.policy(status, &mut news);
        self.link(status, &mut news);
        self.seed(status, &mut news);
        let ran = status.promotion.as_ref().and_then(|promotion| promotion.ran);
        if ran != self.ran {
            self.ran = ran;
            let point = status.promotion.as_ref().and_then(|promotion| promotion.point);
            let from = point.map_or_else(|| "its boot files".to_owned(), |point| point.to_string());
            news.push(told(status, EventKind::Promoted, format!("the guest runs here, from {from}")));
        }
        if let Some((what, at)) = status.error.as_ref().filter(|(_, at)| Some(*at) != self.error) {
            self.error = Some(*at);
            news.push(told(status, EventKind::Error, what.clone()));
        }
        news
    }

    fn register(&mut self, status: &Status, is_own: impl Fn(&Entry) -> bool, news: &mut Vec<News>) {
        if status.register == self.register {
            return;
        }
        self.register.clone_from(&status.register);
        let what = status.register.as_ref().map_or_else(|| "there is none".to_owned(), ToString::to_string);
        let own = status.register.as_ref().is_some_and(is_own);
        let kind = if own { AuditKind::RegisterChanged } else { AuditKind::RegisterSeen };
        let mut news_of = told(status, EventKind::Register, what);
        news_of.event.register = status.register.as_ref().map(v1::RegisterEntry::from);
        news.push(news_of.noted(status, kind));
    }

    fn role(&mut self, status: &Status, news: &mut Vec<News>) {
        if status.role == self.role {
            return;
        }
        let mut what = format!("{} after {}", word(status.role), word(self.role));
        // A period has ended.
        let bare = status.unprotected_before.saturating_sub(self.unprotected);
        self.unprotected = status.unprotected_before;
        if !bare.is_zero() {
            what += &format!(", {} ms without protection", bare.as_millis());
        }
        self.role = status.role;
        news.push(told(status, EventKind::Role, what).noted(status, AuditKind::Role));
    }

    fn policy(&mut self, status: &Status, news: &mut Vec<News>) {
        if status.policy == self.policy {
            return;
        }
        self.policy = status.policy;
        // A runner gives no acks: that is told by its role.
        if let Some(policy) = status.policy {
            let (now, other) = if policy.disk { ("disk", "memory") } else { ("memory", "disk") };
            let wait = if policy.pending { format!("; {other} once it is safe") } else { String::new() };
            let news_of = told(status, EventKind::AckPolicy, format!("an ack means {now}{wait}"));
            news.push(news_of.noted(status, AuditKind::AckPolicy));
        }
    }

    fn link(&mut self, status: &Status, news: &mut Vec<News>) {
        let now = status.link.as_ref().map(|link| (link.up, link.since));
        if now == self.link {
            return;
        }
        let was_up = self.link.is_some_and(|(up, _)| up);
        self.link = now;
        match status.link.as_ref() {
            Some(link) if link.up => {
                news.push(told(status, EventKind::LinkUp, format!("to {} at {}", link.peer, link.address)));
            }
            Some(link) if was_up => {
                news.push(told(status, EventKind::LinkDown, format!("to {}", link.peer)));
            }
            None if was_up => news.push(told(status, EventKind::LinkDown, "nobody is to follow".to_owned())),
            _ => {}
        }
    }

    fn seed(&mut self, status: &Status, news: &mut Vec<News>) {
        let part =
            |seed: &Seed| (seed.done * 100).checked_div(seed.total).unwrap_or(0) / SEED_STEP * SEED_STEP;
        if let Some(copy) = status.copy.as_ref().filter(|copy| Some(copy.since) != self.copy) {
            self.copy = Some(copy.since);
            let why = if copy.why.is_empty() { String::new() } else { format!("; {}", copy.why) };
            news.push(told(status, EventKind::Seed, format!("a copy begins: {}{why}", copy.what)));
        }
        let now = status.seed.as_ref().map(|seed| (seed.compares, part(seed)));
        if now == self.seed {
            return;
        }
        let before = std::mem::replace(&mut self.seed, now);
        let what = match now {
            Some((true, part)) => format!("compares digests: {part} %"),
            Some((false, part)) => format!("sends pages: {part} %"),
            None if status.role == Role::Paired => "the copy is whole".to_owned(),
            None => "the copy is over".to_owned(),
        };
        // One that grows is told where it stands, and not again and again if what there is to send grows as well.
        if now.is_none_or(|(compares, part)| before.is_none_or(|(was, at)| was != compares || part > at)) {
            news.push(told(status, EventKind::Seed, what));
        } else {
            self.seed = before;
        }
    }
}

impl News {
    fn noted(mut self, status: &Status, kind: AuditKind) -> Self {
        self.audit = Some(entry(status, kind, self.event.what.clone()));
        self
    }
}

/// An entry of the audit trail, as of this account.
pub(crate) fn entry(status: &Status, kind: AuditKind, what: String) -> AuditEntry {
    let register = status.register.as_ref();
    AuditEntry {
        term: register.map_or(0, |entry| entry.term.0),
        register: register.map(v1::RegisterEntry::from),
        kind: kind.into(),
        what,
        unprotected_ms: ms(status.unprotected(Instant::now())),
        ..AuditEntry::default()
    }
}

/// Something that happened just now.
pub(crate) fn told(status: &Status, kind: EventKind, what: String) -> News {
    let event = v1::Event {
        kind: kind.into(),
        what,
        role: role_of(status.role).into(),
        term: status.register.as_ref().map_or(0, |entry| entry.term.0),
        at_ms: now_ms(),
        ..v1::Event::default()
    };
    News { event, audit: None }
}

fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Milliseconds since 1970 by the host's clock.
pub(crate) fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

fn word(role: Role) -> String {
    format!("{role:?}").to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::Told;
    use crate::node::status::{CopyNote, Policy, Role, Seed, Status};
    use colo_common::register::{Entry, Value};
    use colo_common::{Incarnation, ProposalId, Term};
    use colo_proto::v1::{AuditKind, EventKind};
    use std::time::{Duration, Instant};

    fn kinds(told: &mut Told, status: &Status) -> Vec<EventKind> {
        told.news(status, |_| false).iter().map(|news| news.event.kind()).collect()
    }

    #[test]
    fn each_change_is_told_once() {
        let (mut told, mut status) = (Told::default(), Status::default());
        assert!(kinds(&mut told, &status).is_empty());
        let (node, incarnation) = ("a".parse().unwrap(), Incarnation(1));
        let value = Value::Solo { node, incarnation };
        status.register = Some(Entry { term: Term(1), proposal: ProposalId(9), value });
        status.role = Role::Alone;
        let news = told.news(&status, |entry| entry.term == Term(1));
        let noted: Vec<_> = news.iter().filter_map(|news| news.audit.as_ref()).collect();
        assert_eq!(noted[0].kind(), AuditKind::RegisterChanged);
        assert_eq!((noted[0].what.as_str(), noted[0].term), ("solo on a in term 1", 1));
        assert_eq!((noted[1].kind(), noted[1].what.as_str()), (AuditKind::Role, "alone after starting"));
        assert!(kinds(&mut told, &status).is_empty());
        status.register.as_mut().unwrap().term = Term(2);
        let seen = told.news(&status, |_| false);
        assert_eq!(seen[0].audit.as_ref().unwrap().kind(), AuditKind::RegisterSeen);
        status.policy = Some(Policy { disk: false, pending: true });
        let news = told.news(&status, |_| false);
        assert_eq!(news[0].event.what, "an ack means memory; disk once it is safe");
        status.error = Some(("oh".to_owned(), Instant::now()));
        assert_eq!(kinds(&mut told, &status), [EventKind::Error]);
        assert!(kinds(&mut told, &status).is_empty());
    }

    #[test]
    fn a_copy_is_told_in_steps() {
        let (mut told, mut status) = (Told::default(), Status::default());
        let mut steps = 0;
        for done in 0..=1000 {
            // What there is to look at grows, too.
            let total = 1000 + done / 100;
            status.seed = Some(Seed { done, total, compares: done < 500, since: Instant::now() });
            steps += kinds(&mut told, &status).len();
        }
        assert!((10..=12).contains(&steps), "{steps}");
        status.seed = None;
        assert_eq!(kinds(&mut told, &status), [EventKind::Seed]);
    }

    #[test]
    fn why_a_copy_is_large_is_told_once() {
        let (mut told, mut status) = (Told::default(), Status::default());
        let (what, why) = ("all pages".to_owned(), "memory: the secondary has nothing of it".to_owned());
        status.copy = Some(CopyNote { what, why, since: Instant::now() });
        let news = told.news(&status, |_| false);
        let wanted = "a copy begins: all pages; memory: the secondary has nothing of it";
        assert_eq!((news[0].event.kind(), news[0].event.what.as_str()), (EventKind::Seed, wanted));
        assert!(kinds(&mut told, &status).is_empty());
    }

    #[test]
    fn time_without_protection_is_noted_when_it_ends() {
        let (mut told, mut status) = (Told::default(), Status::default());
        told.was_unprotected(Duration::from_millis(500));
        status.unprotected_before = Duration::from_millis(500);
        let mut turns = |role, bare| {
            status.role = role;
            status.unprotected_before = Duration::from_millis(bare);
            let entry = told.news(&status, |_| false).remove(0).audit.unwrap();
            (entry.what, entry.unprotected_ms)
        };
        assert_eq!(turns(Role::Alone, 500), ("alone after starting".to_owned(), 500));
        let wanted = "paired after alone, 1250 ms without protection";
        assert_eq!(turns(Role::Paired, 1750), (wanted.to_owned(), 1750));
        assert_eq!(turns(Role::Alone, 1750).0, "alone after paired");
    }
}
