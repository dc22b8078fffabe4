//! virtio-net: a network card.
//!
//! What the guest sends is copied into the open epoch's output ([`Egress`]) and leaves this node when that epoch is
//! acked; a hold that is full leaves it in the queue. What the host's network sends goes to the guest at once: nobody
//! outside can tell whether a frame was lost on its way in.

use std::sync::Arc;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use virtio_queue::Queue;

use super::device::{Device, DeviceBody, Served};
use super::queue::{Broken, Chain, give_back, listen_beyond, pop, put_back, serve, wants_interrupt};
use super::transport::Identity;
use crate::egress::{Egress, EgressError};
use crate::memory::GuestRam;
use crate::spec::NetSpec;
use crate::spec::virtio::NET_SLOT;
use crate::state::StateError;
use crate::tap::{Offloads, Tap};

/// Kind of the device.
const NET: u32 = 1;
/// The queue of frames for the guest; the other one is of those that it sends.
pub(super) const RECEIVE: usize = 0;
/// Frames in either queue.
const QUEUE: u16 = 256;
/// Bytes before a frame: the virtio-net header with the number of buffers.
pub(super) const HEADER: usize = 12;
/// Where the number of buffers is in it.
const BUFFERS_AT: usize = 10;
/// Bytes of a frame with its header at most: the largest segment, and its own headers.
const MAX_BYTES: usize = colo_common::limits::MAX_FRAME;
/// Frames taken or given at once.
const BATCH: usize = 32;
/// Buffers of one frame at most: of 1500 bytes each for the largest segment.
const MAX_BUFFERS: usize = 64;

const OFFLOADS: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN;

pub(super) struct Net {
    config: [u8; 8],
    identity: Identity,
    egress: Arc<Egress>,
    tap: Option<Arc<Tap>>,
    features: u64,
    /// Read, and waiting for buffers.
    waiting: Option<Vec<u8>>,
    buffer: Vec<u8>,
    /// Frames that were too long for the guest's buffers; each is told once at most.
    too_long: u64,
}

impl Net {
    /// Without a TAP nothing is received: a guest that is only restored and looked at.
    pub(super) fn new(spec: &NetSpec, egress: Arc<Egress>, tap: Option<Arc<Tap>>) -> Self {
        let mut features = 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS | 1 << VIRTIO_NET_F_MRG_RXBUF;
        if spec.offloads {
            features |= OFFLOADS;
        }
        let mut config = [0; 8];
        config[..6].copy_from_slice(&spec.mac.bytes());
        config[6..].copy_from_slice(&(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        Self {
            config,
            identity: Identity { kind: NET, features, queues: &[QUEUE, QUEUE] },
            egress,
            tap,
            features: 0,
            waiting: None,
            buffer: vec![0; MAX_BYTES],
            too_long: 0,
        }
    }

    fn has(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }

    /// The host hands over what the guest's driver can take.
    fn set_offloads(&self) {
        let offloads = Offloads {
            csum: self.has(VIRTIO_NET_F_GUEST_CSUM),
            tso4: self.has(VIRTIO_NET_F_GUEST_TSO4),
            tso6: self.has(VIRTIO_NET_F_GUEST_TSO6),
            ecn: self.has(VIRTIO_NET_F_GUEST_ECN),
        };
        if let Some(tap) = &self.tap
            && let Err(e) = tap.set_offloads(offloads)
        {
            tracing::error!(tap = tap.name(), "the TAP does not take the guest's offloads: {e}");
        }
    }

    /// Takes what the guest sends.
    fn send(&mut self, queue: &mut Queue, ram: &GuestRam) -> Result<Served, Broken> {
        let mut served = Served::default();
        for _ in 0..BATCH {
            let Some(chain) = pop(queue, ram)? else { return Ok(served) };
            let len = chain.readable.len();
            if !(HEADER + 1..=MAX_BYTES).contains(&len) {
                return Err(Broken("a frame without a header, or longer than any"));
            }
            if self.egress.is_full() {
                put_back(queue);
                return Ok(Served { full: true, ..served });
            }
            let mut frame = chain.readable.read(ram, MAX_BYTES)?;
            self.tidy(&mut frame);
            match self.egress.push_frame(NET_SLOT, frame) {
                Ok(()) => served.said = true,
                Err(EgressError::Full) => {
                    put_back(queue);
                    return Ok(Served { full: true, ..served });
                }
                Err(EgressError::FrameTooLong(_)) => return Err(Broken("a frame longer than any")),
            }
            give_back(queue, ram, chain.head, 0)?;
            served.interrupt = true;
        }
        Ok(Served { more: true, ..served })
    }

    /// Leaves of a frame's header what the driver has agreed on.
    fn tidy(&self, frame: &mut [u8]) {
        if !self.has(VIRTIO_NET_F_CSUM) {
            frame[..HEADER].fill(0);
        }
        frame[BUFFERS_AT..HEADER].fill(0);
    }

    /// Gives the guest what came for it.
    fn receive(&mut self, queue: &mut Queue, ram: &GuestRam) -> Result<Served, Broken> {
        let mut served = Served::default();
        for _ in 0..BATCH {
            let Some(frame) = self.next_frame() else { return Ok(served) };
            let Some(chains) = self.buffers(queue, ram, frame.len())? else {
                // Until the guest has room.
                self.waiting = Some(frame);
                return Ok(served);
            };
            served.interrupt |= !chains.is_empty();
            fill(queue, ram, frame, &chains)?;
        }
        Ok(Served { more: true, ..served })
    }

    fn next_frame(&mut self) -> Option<Vec<u8>> {
        if let Some(frame) = self.waiting.take() {
            return Some(frame);
        }
        let tap = self.tap.as_ref()?;
        loop {
            match tap.read_frame(&mut self.buffer) {
                // Nothing but a header: there may be frames behind it.
                Ok(Some(len)) if len <= HEADER => {}
                Ok(len) => return len.map(|len| self.buffer[..len].to_vec()),
                Err(e) => {
                    tracing::debug!(tap = tap.name(), "no frame can be read: {e}");
                    return None;
                }
            }
        }
    }

    /// Buffers for a frame of `len` bytes; none if there are too few yet, and no chain if it can never be given.
    fn buffers(
        &mut self,
        queue: &mut Queue,
        ram: &GuestRam,
        len: usize,
    ) -> Result<Option<Vec<Chain>>, Broken> {
        let most = if self.has(VIRTIO_NET_F_MRG_RXBUF) { MAX_BUFFERS } else { 1 };
        let (mut chains, mut room): (Vec<Chain>, usize) = (Vec::new(), 0);
        while room < len && chains.len() < most {
            let Some(chain) = pop(queue, ram)? else {
                chains.iter().for_each(|_| put_back(queue));
                return Ok(None);
            };
            room += chain.writable.len();
            chains.push(chain);
        }
        if room < len {
            chains.drain(..).for_each(|_| put_back(queue));
            self.too_long += 1;
            if self.too_long.is_power_of_two() {
                let dropped = self.too_long;
                tracing::warn!(len, dropped, "a frame is longer than the guest's buffers: it is dropped");
            }
        }
        Ok(Some(chains))
    }

    /// What came while nobody was there to take it.
    fn drop_stale(&mut self) {
        self.waiting = None;
        for _ in 0..QUEUE {
            if self.next_frame().is_none() {
                break;
            }
        }
    }
}

fn fill(queue: &mut Queue, ram: &GuestRam, mut frame: Vec<u8>, chains: &[Chain]) -> Result<(), Broken> {
    frame[BUFFERS_AT..HEADER].copy_from_slice(&(chains.len().max(1) as u16).to_le_bytes());
    let mut rest = &frame[..];
    for chain in chains {
        let written = chain.writable.write(ram, rest)?;
        give_back(queue, ram, chain.head, written)?;
        rest = &rest[written..];
    }
    Ok(())
}

impl Device for Net {
    fn identity(&self) -> Identity {
        self.identity
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn start(&mut self, features: u64) {
        self.features = features;
        self.set_offloads();
        self.drop_stale();
    }

    fn reset(&mut self) {
        self.features = 0;
        self.waiting = None;
    }

    fn serve(&mut self, index: usize, queue: &mut Queue, ram: &GuestRam) -> Result<Served, Broken> {
        let mut served = Served::default();
        if index == RECEIVE {
            served = self.receive(queue, ram)?;
            // New buffers are of interest only to a frame that waits for them; they may have come just now.
            if self.waiting.is_some() && listen_beyond(queue, ram)? {
                served = served.and(self.receive(queue, ram)?);
            }
        } else {
            serve(queue, ram, |queue| {
                served = served.and(self.send(queue, ram)?);
                Ok(served.goes_on())
            })?;
        }
        served.interrupt = served.interrupt && wants_interrupt(queue, ram)?;
        Ok(served)
    }

    /// Nobody takes what comes.
    fn settle(&mut self) {
        self.drop_stale();
    }

    fn save(&self) -> DeviceBody {
        DeviceBody::Plain
    }

    fn restore(&mut self, _: &DeviceBody, features: Option<u64>, _: &GuestRam) -> Result<(), StateError> {
        self.reset();
        if let Some(features) = features {
            self.start(features);
        }
        Ok(())
    }
}
