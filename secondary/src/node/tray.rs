//! What the apply and persist threads have to tell. They never wait for the node, which may be waiting for them: a tray
//! holds no more than was ordered, and that is bounded by the memory budget.

use crossbeam_channel::Sender;
use std::sync::{Arc, Mutex, PoisonError};

use super::Event;
use crate::apply::Applied;
use crate::persist::Persisted;

/// One thing told.
pub(super) enum Told {
    Applied(Applied),
    Persisted(Persisted),
}

/// Where it is put down.
#[derive(Clone)]
pub struct Tray {
    told: Arc<Mutex<Vec<Told>>>,
    wake: Sender<Event>,
}

impl Tray {
    /// A tray whose owner is woken by `wake`.
    pub fn new(wake: Sender<Event>) -> Self {
        Self { told: Arc::default(), wake }
    }

    /// From the apply thread.
    pub fn applied(&self, applied: Applied) {
        self.put(Told::Applied(applied));
    }

    /// From the persist thread.
    pub fn persisted(&self, persisted: Persisted) {
        self.put(Told::Persisted(persisted));
    }

    pub(super) fn take(&self) -> Vec<Told> {
        std::mem::take(&mut self.told.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn put(&self, told: Told) {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).push(told);
        // An inbox that is full wakes its owner as well.
        let _ = self.wake.try_send(Event::Tray);
    }
}
