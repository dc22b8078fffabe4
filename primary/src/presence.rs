//! What a node says of itself to the cluster while it lives: a thread that keeps its record true.

use colo_common::config::Endpoint;
use colo_common::membership::{Membership, NodeRecord, NodeRole, Registration};
use colo_common::telemetry::in_node;
use colo_common::{Incarnation, NodeId, VmId};
use colo_proto::PROTOCOL_VERSION;
use colo_vmm::host::{self, Host};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::drain::Drain;
use crate::node::status::{Board, Role, Status};

/// Between two looks whether the record is still true.
const LOOK: Duration = Duration::from_millis(200);
/// Between two looks at what is free.
const MEASURE: Duration = Duration::from_secs(10);
/// What is free is told in such steps: a record that changes with every page would be written all the time.
const STEP: u64 = 64 << 20;
/// After a failure.
const RETRY: Duration = Duration::from_secs(2);

/// Who a process is.
#[derive(Clone, Debug)]
pub struct Who {
    /// Its node.
    pub node: NodeId,
    /// The process.
    pub incarnation: Incarnation,
    /// Its control plane, as others reach it.
    pub address: Endpoint,
    /// Where its stores are.
    pub directory: PathBuf,
}

impl Who {
    /// The record of a process that is bound to no vm.
    pub fn spare(&self) -> NodeRecord {
        NodeRecord {
            node: self.node.clone(),
            incarnation: self.incarnation,
            address: self.address.clone(),
            role: NodeRole::Spare,
            vm: None,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol: PROTOCOL_VERSION.into(),
            cpu: host::processor(),
            hypervisor: if Host::open().is_ok() { "kvm" } else { "none" }.to_owned(),
            memory_free: steps(memory_free()),
            disk_free: steps(disk_free(&self.directory)),
            copy: None,
            draining: Drain::of(&self.directory).is_on(),
        }
    }
}

/// Says that this process lives, for as long as it is kept.
#[derive(Debug)]
pub struct Presence {
    /// Dropped to end the thread.
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<Option<Box<dyn Registration>>>>,
}

impl Presence {
    /// Says so of a process that is bound to `vm`, or to none yet, by its account. `registered`: before, as a spare.
    ///
    /// # Errors
    /// No thread can be had.
    pub fn start(
        membership: Arc<dyn Membership>,
        who: Who,
        vm: Option<VmId>,
        board: Board,
        registered: Option<Box<dyn Registration>>,
    ) -> std::io::Result<Self> {
        let (end, ended) = crossbeam_channel::bounded(0);
        let worker = Worker { membership, who, vm, board, registered, complained: false };
        let thread = std::thread::Builder::new().name("presence".to_owned());
        let thread = thread.spawn(in_node(move || worker.run(&ended)))?;
        Ok(Self { end: Some(end), thread: Some(thread) })
    }

    /// Says no more, and hands on what there is to be changed.
    pub fn hand_on(mut self) -> Option<Box<dyn Registration>> {
        drop(self.end.take());
        self.thread.take().and_then(|thread| thread.join().ok().flatten())
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            // It has nothing that could be lost.
            drop(thread.join());
        }
    }
}

struct Worker {
    membership: Arc<dyn Membership>,
    who: Who,
    vm: Option<VmId>,
    board: Board,
    registered: Option<Box<dyn Registration>>,
    complained: bool,
}

impl Worker {
    fn run(mut self, ended: &Receiver<()>) -> Option<Box<dyn Registration>> {
        let (mut record, mut measured) = (self.who.spare(), Instant::now());
        let drain = Drain::of(&self.who.directory);
        let mut told: Option<NodeRecord> = None;
        loop {
            if measured.elapsed() > MEASURE {
                measured = Instant::now();
                record.memory_free = steps(memory_free());
                record.disk_free = steps(disk_free(&self.who.directory));
            }
            fill(&mut record, self.vm.as_ref(), &self.board.status());
            record.draining = drain.is_on();
            let mut wait = LOOK;
            if told.as_ref() != Some(&record) {
                match self.say(&record) {
                    Ok(()) => (told, self.complained) = (Some(record.clone()), false),
                    Err(why) => {
                        self.complain(&why);
                        wait = RETRY;
                    }
                }
            }
            if ended.recv_timeout(wait) != Err(RecvTimeoutError::Timeout) {
                return self.registered;
            }
        }
    }

    fn say(&mut self, record: &NodeRecord) -> Result<(), String> {
        match &self.registered {
            Some(registered) => registered.update(record.clone()).map_err(|e| e.to_string()),
            None => {
                let registered = self.membership.register(record.clone()).map_err(|e| e.to_string())?;
                self.registered = Some(registered);
                Ok(())
            }
        }
    }

    fn complain(&mut self, why: &str) {
        if !std::mem::replace(&mut self.complained, true) {
            let vm = self.vm.as_ref().map(tracing::field::display);
            tracing::warn!(vm, "the cluster is not told of this node: {why}");
            self.board.error(format!("the cluster is not told of this node: {why}"));
        }
    }
}

/// What the account says of a process that is bound to `vm`; a spare's record stays that of a spare.
fn fill(record: &mut NodeRecord, vm: Option<&VmId>, status: &Status) {
    let Some(vm) = vm else { return };
    record.vm = Some(vm.clone());
    record.role = match status.role {
        role if role.runs() => NodeRole::Runner,
        // With or without a link: it is the copy that the register names, and it may be about to take over.
        Role::Following => NodeRole::Follower,
        Role::Receiving if status.link.is_some() => NodeRole::Follower,
        _ => NodeRole::Waiting,
    };
    record.copy = if status.role.runs() { status.tip } else { status.marks.staged.or(status.stale) };
    if status.role.runs() || status.link.is_some() {
        // It changes with each epoch, and only a copy that waits is chosen by it.
        record.copy = None;
    }
}

fn steps(bytes: u64) -> u64 {
    bytes / STEP * STEP
}

/// Bytes of memory that a guest could have; 0 where the system does not say.
fn memory_free() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.map_or(0, |kib| kib << 10)
}

/// Bytes of disk that a store below `directory` could have, or below the nearest directory above it that is there.
fn disk_free(directory: &Path) -> u64 {
    let there = directory.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    host::disk_free(there).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::{Presence, Who, disk_free, memory_free};
    use crate::drain::Drain;
    use crate::node::status::{Board, Role};
    use colo_common::Incarnation;
    use colo_common::history::point;
    use colo_common::membership::file::FileMembership;
    use colo_common::membership::{Membership, NodeRecord, NodeRole};
    use std::path::Path;
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    #[test]
    fn a_record_follows_the_account_and_ends_with_its_process() {
        let place = tempfile::tempdir().unwrap();
        let membership: Arc<dyn Membership> = Arc::new(FileMembership::open(place.path()).unwrap());
        let who = Who {
            node: "b".parse().unwrap(),
            incarnation: Incarnation(7),
            address: "127.0.0.1:7701".parse().unwrap(),
            directory: place.path().join("not/there/yet"),
        };
        let board = Board::default();
        let presence =
            Presence::start(Arc::clone(&membership), who, "web".parse().ok(), board.clone(), None).unwrap();
        let until = |wanted: &dyn Fn(&[NodeRecord]) -> bool| {
            let began = Instant::now();
            while !wanted(&membership.nodes().unwrap()) {
                assert!(began.elapsed() < Duration::from_secs(20), "{:?}", membership.nodes());
                std::thread::sleep(Duration::from_millis(10));
            }
        };
        until(&|nodes| matches!(nodes, [one] if one.role == NodeRole::Waiting && one.disk_free > 0));
        board.change(|status| (status.role, status.marks.staged) = (Role::Following, Some(point(1, 7))));
        until(&|nodes| matches!(nodes, [one] if one.copy == Some(point(1, 7))));
        board.change(|status| status.role = Role::Paired);
        until(&|nodes| matches!(nodes, [one] if one.role == NodeRole::Runner && one.copy.is_none()));
        drop(presence);
        until(&|nodes| nodes.is_empty());
        assert!(memory_free() > 0 && disk_free(Path::new("/no/such/place")) > 0);
    }

    #[test]
    fn a_spare_says_that_it_is_emptied_and_hands_its_record_on() {
        let place = tempfile::tempdir().unwrap();
        let membership: Arc<dyn Membership> = Arc::new(FileMembership::open(place.path()).unwrap());
        let (node, incarnation) = ("s".parse().unwrap(), Incarnation(7));
        let directory = place.path().to_owned();
        let who = Who { node, incarnation, address: "127.0.0.1:7701".parse().unwrap(), directory };
        let registered = Some(membership.register(who.spare()).unwrap());
        let start = |vm, registered| {
            Presence::start(Arc::clone(&membership), who.clone(), vm, Board::default(), registered).unwrap()
        };
        let until = |role: NodeRole, draining: bool| {
            let began = Instant::now();
            let is =
                |nodes: &[NodeRecord]| matches!(nodes, [one] if (one.role, one.draining) == (role, draining));
            while !is(&membership.nodes().unwrap()) {
                assert!(began.elapsed() < Duration::from_secs(20), "{:?}", membership.nodes());
                std::thread::sleep(Duration::from_millis(10));
            }
        };
        let presence = start(None, registered);
        until(NodeRole::Spare, false);
        Drain::of(place.path()).begin().unwrap();
        until(NodeRole::Spare, true);
        let presence = start("web".parse().ok(), presence.hand_on());
        until(NodeRole::Waiting, true);
        Drain::of(place.path()).end().unwrap();
        until(NodeRole::Waiting, false);
        drop(presence);
        assert!(membership.nodes().unwrap().is_empty());
    }
}
