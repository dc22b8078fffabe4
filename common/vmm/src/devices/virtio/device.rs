//! What a virtio device is to its transport: the seam between the registers and queues of a window and what a card, a
//! disk or a console does.

use serde::{Deserialize, Serialize};
use std::ops::ControlFlow;
use virtio_queue::Queue;

use super::block::BlockState;
use super::queue::Broken;
use super::transport::Identity;
use crate::memory::GuestRam;
use crate::state::StateError;

/// What came of serving a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Served {
    /// The driver is to be interrupted.
    pub(super) interrupt: bool,
    /// Something was said to the outside.
    pub(super) said: bool,
    /// The epoch holds as much as it may: the rest waits for the cut.
    pub(super) full: bool,
    /// There is more to do than is done at once.
    pub(super) more: bool,
}

impl Served {
    /// Whether what is left can be taken now.
    pub(super) fn goes_on(self) -> ControlFlow<()> {
        if self.full || self.more { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    /// Both together.
    pub(super) fn and(self, other: Self) -> Self {
        Self {
            interrupt: self.interrupt || other.interrupt,
            said: self.said || other.said,
            full: self.full || other.full,
            more: self.more || other.more,
        }
    }
}

/// A device behind a window.
pub(super) trait Device: Send {
    fn identity(&self) -> Identity;

    /// Its configuration space.
    fn config(&self) -> &[u8];

    /// The driver has taken these features and begins.
    fn start(&mut self, features: u64);

    /// The driver begins anew: its queues are gone.
    fn reset(&mut self);

    /// Does what there is to do for a queue that the driver has set up. Bounded.
    fn serve(&mut self, index: usize, queue: &mut Queue, ram: &GuestRam) -> Result<Served, Broken>;

    /// Takes what has come to pass without a queue: requests that ended while the driver was away.
    fn settle(&mut self) {}

    fn save(&self) -> DeviceBody;

    /// Takes a saved state; the driver has taken `features` if it has started.
    fn restore(&mut self, body: &DeviceBody, features: Option<u64>, ram: &GuestRam)
    -> Result<(), StateError>;
}

/// A device at a cut.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum DeviceBody {
    /// Everything is in its queues.
    Plain,
    Block(BlockState),
}
