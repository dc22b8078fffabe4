//! Lists of all records and all registers, read in pages: what others have put below the prefix must not make an answer
//! of any size.

use super::super::{MAX_NODES, MAX_VMS, MembershipError, NodeRecord};
use super::EtcdMembership;
use crate::arbiter::etcd::entry_in;
use crate::etcd::{EtcdError, Found, Session, range_end, wire};
use crate::ids::{NodeId, VmId};
use crate::register::Entry;

/// Keys of one page: with the longest records it is half of the largest answer that is taken.
const PAGE: i64 = 256;

/// Keys that are looked at, for each that may be listed, before the rest is left out.
const SLACK: usize = 2;

impl EtcdMembership {
    pub(super) fn list_nodes(&self) -> Result<Vec<NodeRecord>, MembershipError> {
        let prefix = self.etcd.key("nodes/");
        let all = self.all(&prefix, MAX_NODES * SLACK)?;
        let records = all.iter().filter_map(|found| match split(&prefix, found, self) {
            Some((node, slot)) => self.record_in(&node.parse().ok()?, slot, Some(found)),
            None => None,
        });
        let mut records: Vec<_> = records.take(MAX_NODES).collect();
        // Keys have '/' after a name, which sorts otherwise.
        records.sort_by(|a, b| (&a.node, a.slot()).cmp(&(&b.node, b.slot())));
        Ok(records)
    }

    pub(super) fn list_vms(&self) -> Result<Vec<(VmId, Entry)>, MembershipError> {
        let prefix = self.etcd.key("vms/");
        let all = self.all(&prefix, MAX_VMS * SLACK)?;
        let registers = all.iter().filter_map(|found| {
            let (vm, "register") = split(&prefix, found, self)? else { return None };
            let vm: VmId = vm.parse().ok()?;
            let entry = entry_in(&vm, found).inspect_err(|reason| self.complain(found, reason)).ok()?;
            Some((vm, entry))
        });
        let mut registers: Vec<_> = registers.take(MAX_VMS).collect();
        registers.sort_by(|(a, _), (b, _)| a.cmp(b));
        Ok(registers)
    }

    fn complain(&self, found: &Found, reason: &str) {
        self.complaints.tell(&self.place(&String::from_utf8_lossy(&found.key)), reason);
    }

    /// All keys that begin with `prefix`, `limit` at most.
    fn all(&self, prefix: &str, limit: usize) -> Result<Vec<Found>, MembershipError> {
        let prefix = prefix.to_owned();
        let (all, too_large) =
            self.etcd.call(|session| async move { pages(&session, &prefix, limit).await })?;
        too_large.iter().for_each(|found| self.complain(found, "it is larger than anything of Colo's"));
        if all.len() >= limit {
            self.complaints
                .tell(&self.place("of everything else"), &format!("there are more than {limit} keys"));
        }
        Ok(all)
    }
}

/// Name and rest of a key below `prefix`; what is none is told once.
fn split<'a>(prefix: &str, found: &'a Found, owner: &EtcdMembership) -> Option<(&'a str, &'a str)> {
    let key = std::str::from_utf8(&found.key).ok();
    let parts = key.and_then(|key| key.strip_prefix(prefix)?.split_once('/'));
    let named = parts.filter(|(name, _)| name.parse::<NodeId>().is_ok());
    if named.is_none() {
        owner.complain(found, "its name is none of Colo's");
    }
    named
}

/// The keys with their values, and those whose values are too large to be taken.
async fn pages(session: &Session, prefix: &str, limit: usize) -> Result<(Vec<Found>, Vec<Found>), EtcdError> {
    let (mut all, mut too_large) = (Vec::new(), Vec::new());
    let (mut from, mut page) = (prefix.as_bytes().to_vec(), PAGE);
    while all.len() + too_large.len() < limit {
        let request = wire::RangeRequest {
            key: from.clone(),
            range_end: range_end(prefix),
            limit: page,
            ..Default::default()
        };
        let (found, more, whole) = match session.range(request.clone()).await {
            Ok((found, more)) => (found, more, true),
            Err(e) if e.is_too_large() && page > 1 => {
                page /= 2;
                continue;
            }
            Err(e) if e.is_too_large() => {
                let (found, more) = session.range(wire::RangeRequest { keys_only: true, ..request }).await?;
                (found, more, false)
            }
            Err(e) => return Err(e),
        };
        let last = found.last().map(|last| last.key.clone());
        if whole {
            all.extend(found);
        } else {
            too_large.extend(found);
        }
        page = (page * 2).min(PAGE);
        match last {
            // The smallest key after that one.
            Some(last) if more => from = [last.as_slice(), &[0]].concat(),
            _ => break,
        }
    }
    Ok((all, too_large))
}
