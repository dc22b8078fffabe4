//! Descriptor chains as devices take them from a queue and give them back: every address and length of a guest is
//! checked here, once.

use colo_common::bounded::list;
use serde::{Deserialize, Serialize};
use std::ops::ControlFlow;
use std::sync::atomic::Ordering;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::memory::GuestRam;
use crate::state::StateError;

/// Pieces of one chain at most: twice what any device here asks its driver to use.
pub(super) const MAX_SEGMENTS: usize = 512;

/// The driver broke the rules of the queue: the device needs a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct Broken(pub(super) &'static str);

/// A piece of guest memory, wholly inside RAM when it was checked. RAM never goes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Segment {
    pub(super) address: u64,
    pub(super) len: u32,
}

impl Segment {
    pub(super) fn is_ram(&self, ram: &GuestRam) -> bool {
        GuestMemoryBackend::check_range(ram, GuestAddress(self.address), self.len as usize)
    }
}

/// Pieces of guest memory, one after the other.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Segments(#[serde(deserialize_with = "list::<_, _, MAX_SEGMENTS>")] pub(super) Vec<Segment>);

impl Segments {
    /// Bytes in all: the chain's own bound keeps that below 4 GiB.
    pub(super) fn len(&self) -> usize {
        self.0.iter().map(|segment| segment.len as usize).sum()
    }

    /// Takes the first `len` bytes off; nothing if there are fewer.
    pub(super) fn take_front(&mut self, mut len: usize) -> Option<Self> {
        if self.len() < len {
            return None;
        }
        let mut front = Vec::new();
        while len > 0 {
            let first = self.0.first_mut()?;
            let part = len.min(first.len as usize) as u32;
            front.push(Segment { address: first.address, len: part });
            first.address += u64::from(part);
            first.len -= part;
            len -= part as usize;
            if first.len == 0 {
                self.0.remove(0);
            }
        }
        Some(Self(front))
    }

    /// The bytes in them, at most `limit`.
    pub(super) fn read(&self, ram: &GuestRam, limit: usize) -> Result<Vec<u8>, Broken> {
        let mut bytes = vec![0; self.len().min(limit)];
        let mut rest = &mut bytes[..];
        for segment in &self.0 {
            let (part, after) = rest.split_at_mut(rest.len().min(segment.len as usize));
            ram.read_slice(part, GuestAddress(segment.address)).map_err(|_| OUTSIDE)?;
            rest = after;
        }
        Ok(bytes)
    }

    /// Writes as much of `bytes` as fits; answers how much.
    pub(super) fn write(&self, ram: &GuestRam, bytes: &[u8]) -> Result<usize, Broken> {
        let mut rest = bytes;
        for segment in &self.0 {
            let (part, after) = rest.split_at(rest.len().min(segment.len as usize));
            ram.write_slice(part, GuestAddress(segment.address)).map_err(|_| OUTSIDE)?;
            rest = after;
        }
        Ok(bytes.len() - rest.len())
    }
}

const OUTSIDE: Broken = Broken("a descriptor is not within the guest's memory");

/// What a driver has made available.
#[derive(Debug)]
pub(super) struct Chain {
    /// Names it when it is given back.
    pub(super) head: u16,
    pub(super) readable: Segments,
    pub(super) writable: Segments,
}

/// The next chain that the driver has made available.
pub(super) fn pop(queue: &mut Queue, ram: &GuestRam) -> Result<Option<Chain>, Broken> {
    let mut available = queue.iter(ram).map_err(|_| Broken("its available ring makes no sense"))?;
    available.next().map(|chain| walk(chain, ram)).transpose()
}

/// The chain that was popped last is left for another time.
pub(super) fn put_back(queue: &mut Queue) {
    queue.go_to_previous_position();
}

fn walk(mut chain: DescriptorChain<&GuestRam>, ram: &GuestRam) -> Result<Chain, Broken> {
    let (head, mut readable, mut writable) = (chain.head_index(), Vec::new(), Vec::new());
    let mut more = true;
    for descriptor in chain.by_ref() {
        more = descriptor.has_next();
        let segment = Segment { address: descriptor.addr().0, len: descriptor.len() };
        if segment.len == 0 {
            continue;
        }
        if !segment.is_ram(ram) {
            return Err(OUTSIDE);
        }
        if readable.len() + writable.len() == MAX_SEGMENTS {
            return Err(Broken("a chain has too many descriptors"));
        }
        match descriptor.is_write_only() {
            true => writable.push(segment),
            false if writable.is_empty() => readable.push(segment),
            false => return Err(Broken("a chain has something to read after something to write")),
        }
    }
    if more {
        // The walk ended before the chain did: a loop, an index out of range, a table that is none.
        return Err(Broken("a chain of descriptors has no end"));
    }
    Ok(Chain { head, readable: Segments(readable), writable: Segments(writable) })
}

/// Gives a chain back with `written` bytes in it.
pub(super) fn give_back(queue: &mut Queue, ram: &GuestRam, head: u16, written: usize) -> Result<(), Broken> {
    let written = u32::try_from(written).unwrap_or(u32::MAX);
    queue.add_used(ram, head, written).map_err(|_| Broken("its used ring is not within the guest's memory"))
}

/// Whether the driver wants to be interrupted for what was given back since this was asked last.
pub(super) fn wants_interrupt(queue: &mut Queue, ram: &GuestRam) -> Result<bool, Broken> {
    queue.needs_notification(ram).map_err(|_| Broken("its available ring is not within the guest's memory"))
}

/// Serves a queue until nothing is left in it, and then has the driver notify. `step` takes what it can and says whether
/// it goes on: not if what is left has to wait for something else.
pub(super) fn serve(
    queue: &mut Queue,
    ram: &GuestRam,
    mut step: impl FnMut(&mut Queue) -> Result<ControlFlow<()>, Broken>,
) -> Result<(), Broken> {
    let mut idle = false;
    loop {
        let before = queue.next_avail();
        if step(queue)?.is_break() || !listen(queue, ram)? {
            return Ok(());
        }
        // A driver that saw no need to notify has put something there just before; but then there is something to take.
        if queue.next_avail() == before && std::mem::replace(&mut idle, true) {
            return Err(Broken("its available ring announces what it does not have"));
        }
    }
}

/// Has the driver notify of what it makes available from now on; whether something came in the meantime.
fn listen(queue: &mut Queue, ram: &GuestRam) -> Result<bool, Broken> {
    queue.enable_notification(ram).map_err(|_| OUTSIDE_RINGS)
}

/// The same beyond what is there already and is not enough.
pub(super) fn listen_beyond(queue: &mut Queue, ram: &GuestRam) -> Result<bool, Broken> {
    let at = queue.next_avail();
    let end = queue.avail_idx(ram, Ordering::Acquire).map_err(|_| OUTSIDE_RINGS)?;
    queue.set_next_avail(end.0);
    let more = listen(queue, ram);
    queue.set_next_avail(at);
    more
}

const OUTSIDE_RINGS: Broken = Broken("its rings are not within the guest's memory");

/// A queue at a cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct QueueRecord {
    size: u16,
    ready: bool,
    event_idx: bool,
    next_avail: u16,
    next_used: u16,
    descriptors: u64,
    available: u64,
    used: u64,
}

impl QueueRecord {
    pub(super) fn of(queue: &Queue) -> Self {
        let state = queue.state();
        Self {
            size: state.size,
            ready: state.ready,
            event_idx: state.event_idx_enabled,
            next_avail: state.next_avail,
            next_used: state.next_used,
            descriptors: state.desc_table,
            available: state.avail_ring,
            used: state.used_ring,
        }
    }

    /// The queue, whose size is at most `max_size`.
    pub(super) fn to_queue(self, max_size: u16) -> Result<Queue, StateError> {
        let state = QueueState {
            max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: self.event_idx,
            size: self.size,
            ready: self.ready,
            desc_table: self.descriptors,
            avail_ring: self.available,
            used_ring: self.used,
        };
        Queue::try_from(state).map_err(|e| StateError::Malformed(format!("a virtio queue: {e}")))
    }
}
