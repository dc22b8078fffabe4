//! What an ack means, and how that changes while acks go on. The replica id in the store is the word that the store
//! has all that was acked under it: so it is stored after the last ack from memory alone, and erased before the first.
//!
//! ```text
//!              asked, and the store has every acked point: StoreId        stored
//!   Memory ----------------------------------------------------> (no acks) ----> Disk
//!     ^                                                             ^             | asked: EraseId
//!     |                     erased                                  | asked back  v
//!     +------------------------------------------------------------ (acks as under Disk)
//! ```

use colo_common::ReplicaId;

use super::{AckPolicy, Action, Copy, Replica};

impl Replica {
    /// The operator wants acks to mean something else. Takes effect when it is safe.
    pub fn change_policy(&mut self, policy: AckPolicy) -> Vec<Action> {
        if policy != self.rules.policy {
            self.changing = Some(policy);
            return self.step_policy();
        }
        if self.changing.take() == Some(AckPolicy::Memory)
            && self.ordered
            && let Copy::Whole { named, .. } = &mut self.copy
        {
            // The id is being erased: until it is stored again, a restart could not show it.
            *named = false;
        }
        Vec::new()
    }

    /// Whether a change of policy waits until it is safe.
    pub fn is_changing_policy(&self) -> bool {
        self.changing.is_some()
    }

    /// The store holds the replica id, synced.
    pub fn id_stored(&mut self, id: ReplicaId) -> Vec<Action> {
        match &mut self.copy {
            Copy::Whole { replica, named, .. } if *replica == id => *named = true,
            _ => return Vec::new(),
        }
        self.ordered = false;
        if self.mutation.memory_acks_until_stored && self.changing == Some(AckPolicy::Disk) {
            self.changing = None;
            self.rules.policy = AckPolicy::Disk;
        }
        let mut actions = if self.rules.policy == AckPolicy::Disk { self.ack() } else { Vec::new() };
        actions.extend(self.step_policy());
        actions
    }

    /// The store has forgotten the replica id, synced.
    pub fn id_erased(&mut self, id: ReplicaId) -> Vec<Action> {
        match &mut self.copy {
            Copy::Whole { replica, named, .. } if *replica == id => *named = false,
            _ => return Vec::new(),
        }
        self.ordered = false;
        if self.changing == Some(AckPolicy::Memory) {
            self.changing = None;
            self.rules.policy = AckPolicy::Memory;
            return self.ack();
        }
        if self.rules.policy == AckPolicy::Memory {
            return Vec::new();
        }
        // The operator has thought better of it: nothing was acked without the store meanwhile.
        self.ordered = true;
        vec![Action::StoreId(id)]
    }

    /// The next step of a change of policy, if there is one and it is safe.
    pub(super) fn step_policy(&mut self) -> Vec<Action> {
        let Some(wanted) = self.changing.filter(|_| !self.ordered) else { return Vec::new() };
        let Copy::Whole { replica, persisted, .. } = self.copy else {
            self.changing = None;
            self.rules.policy = wanted;
            return Vec::new();
        };
        match wanted {
            AckPolicy::Memory if self.mutation.keep_id_on_switch => {
                self.changing = None;
                self.rules.policy = wanted;
                self.ack()
            }
            AckPolicy::Memory => {
                self.ordered = true;
                vec![Action::EraseId(replica)]
            }
            AckPolicy::Disk => {
                let early = self.mutation.store_id_early;
                if persisted.is_none() || (persisted < self.acked && !early) {
                    return Vec::new();
                }
                if !self.mutation.memory_acks_until_stored {
                    // From here on acks wait for the store: one more from memory alone, and the id would speak for
                    // what the store lacks.
                    self.changing = None;
                    self.rules.policy = AckPolicy::Disk;
                }
                self.ordered = true;
                vec![Action::StoreId(replica)]
            }
        }
    }
}
