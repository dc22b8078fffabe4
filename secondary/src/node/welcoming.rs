//! A runner that wants a link: whether it gets one, and what it is told if not.

use colo_primary::node::status::LinkState;
use colo_proto::message::{Hello, Purpose, Refusal as WireRefusal, Welcome};
use colo_proto::version::Versions;
use std::sync::Arc;

use super::pairing::offered;
use super::{Follower, Link};
use crate::receiver::{Agreed, Caller, refused};
use crate::replica::Refusal;

impl Follower {
    /// A runner says hello.
    pub(super) fn on_caller(&mut self, caller: Caller) {
        let Caller { number, hello, address, pulse, say, reply } = caller;
        let answer = self.judge(&hello).map_err(|(reason, why)| refused(reason, &why));
        let agreed = match answer {
            Ok(agreed) => agreed,
            Err(refusal) => {
                tracing::info!(vm = %self.vm, runner = %hello.node, "a link is refused: {}", refusal.detail);
                let _ = reply.send(Err(refusal));
                return;
            }
        };
        if reply.send(Ok(agreed)).is_err() {
            return;
        }
        // A runner that comes again has lost its old link, whether this end knows it or not.
        self.break_off_seed();
        self.needless_since = None;
        self.link = Some(Link {
            number,
            say,
            node: hello.node.clone(),
            term: hello.term,
            seeding: false,
            asked: None,
            asked_blocks: None,
        });
        self.board.linked(LinkState::new(hello.node.clone(), address, pulse));
        self.runner_at = self.address_of(hello.incarnation);
        self.detector.heard();
        self.planned = false;
        self.followed = true;
        if let Purpose::Link { replica } = hello.purpose {
            match self.replica.accept_link(&hello.node, hello.term, replica) {
                Ok(actions) => self.act(actions),
                Err(e) => self.refuse(reason_of(&e), &e.to_string()),
            }
        }
    }

    fn judge(&self, hello: &Hello) -> Result<Agreed, (WireRefusal, String)> {
        let version = Versions::OURS.agree(hello.versions);
        let version =
            version.map_err(|e| (WireRefusal::Version { versions: Versions::OURS }, e.to_string()))?;
        if hello.vm != self.vm {
            return Err((WireRefusal::OtherVm, format!("this node follows {}, not {}", self.vm, hello.vm)));
        }
        if !self.observed {
            return Err((
                WireRefusal::NotReady,
                "this node has not read the register yet: try again".to_owned(),
            ));
        }
        let (warm, cpu) = self.agreed_on(hello).map_err(|why| (WireRefusal::NotPaired, why))?;
        if let Some(why) = &self.store_failed {
            return Err((WireRefusal::Failed, format!("the store has failed: {why}")));
        }
        let wanted = match hello.purpose {
            Purpose::Seed => None,
            Purpose::Link { replica } => Some(replica),
        };
        self.replica.check_runner(hello.term).map_err(|e| (reason_of(&e), e.to_string()))?;
        if let Some(wanted) = wanted.filter(|wanted| self.replica_id() != Some(*wanted)) {
            let e = Refusal::NotThisReplica { wanted };
            return Err((reason_of(&e), e.to_string()));
        }
        let (replica, staged, stale) = offered(self.replica.copy());
        let bases = warm.rejoin.bases(self.replica.copy());
        let welcome = Welcome {
            bases,
            history: self.history.clone(),
            version,
            node: self.me.clone(),
            incarnation: self.incarnation,
            replica,
            staged,
            stale,
            max_epoch_bytes: self.settings.max_epoch_bytes,
            window: self.settings.window,
        };
        let disk_blocks = warm.disk.as_ref().map_or(0, |disk| disk.blocks());
        Ok(Agreed { welcome, memory: Arc::clone(&warm.memory), disk_blocks, spec_digest: warm.digest, cpu })
    }
}

pub(super) fn reason_of(refusal: &Refusal) -> WireRefusal {
    match refusal {
        Refusal::Fenced { known, .. } => WireRefusal::Fenced { known: *known },
        Refusal::Promoting => WireRefusal::Promoting,
        Refusal::NotThisReplica { .. } => WireRefusal::NotThisReplica,
        Refusal::OutOfPlace(_) => WireRefusal::OutOfPlace,
        // Refusals of the future are told in words.
        #[allow(unreachable_patterns)]
        _ => WireRefusal::Failed,
    }
}
