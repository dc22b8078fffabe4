//! The registers of one virtio-mmio window (version 2): how a driver finds a device, agrees with it on features and
//! sets up its queues. What a register does to the device itself is an [`Effect`].

use colo_common::bounded::list;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES,
    VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING,
    VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_MAGIC_VALUE,
    VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH,
    VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_NUM_MAX,
    VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW,
    VIRTIO_MMIO_SHM_BASE_HIGH, VIRTIO_MMIO_SHM_BASE_LOW, VIRTIO_MMIO_SHM_LEN_HIGH, VIRTIO_MMIO_SHM_LEN_LOW,
    VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VENDOR_ID, VIRTIO_MMIO_VERSION,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};

use super::queue::QueueRecord;
use crate::memory::GuestRam;
use crate::state::StateError;

/// First word of every window: "virt".
const MAGIC: u32 = 0x7472_6976;
/// The version of the transport.
const VERSION: u32 = 2;
/// "COLO".
const VENDOR: u32 = 0x4f4c_4f43;
/// Queues of any device here.
pub(super) const MAX_QUEUES: usize = 2;

/// Features of the transport that every device has.
const COMMON_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// What a device is to its driver; never changes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Identity {
    pub(super) kind: u32,
    /// Its own features, beside those of the transport.
    pub(super) features: u64,
    /// The largest sizes of its queues.
    pub(super) queues: &'static [u16],
}

/// What a write did beyond the registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    None,
    /// The driver starts the device with these features.
    Start(u64),
    /// The driver resets the device.
    Reset,
    /// The driver has put something into this queue.
    Notify(usize),
}

/// The registers at a cut.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct TransportState {
    device_select: u32,
    driver_select: u32,
    driver_features: u64,
    queue_select: u32,
    status: u32,
    interrupt: u32,
    #[serde(deserialize_with = "list::<_, _, MAX_QUEUES>")]
    queues: Vec<QueueRecord>,
}

pub(super) struct Transport {
    identity: Identity,
    device_select: u32,
    driver_select: u32,
    driver_features: u64,
    queue_select: u32,
    status: u32,
    interrupt: u32,
    pub(super) queues: Vec<Queue>,
    /// How often the driver broke the rules; not part of the state.
    breaches: u64,
}

impl Transport {
    pub(super) fn new(identity: Identity) -> Self {
        let queues = identity.queues.iter().map(|&size| fresh(size)).collect();
        Self {
            identity,
            device_select: 0,
            driver_select: 0,
            driver_features: 0,
            queue_select: 0,
            status: 0,
            interrupt: 0,
            queues,
            breaches: 0,
        }
    }

    /// Whether the device works: started, and not broken.
    pub(super) fn is_running(&self) -> bool {
        self.status & VIRTIO_CONFIG_S_DRIVER_OK != 0 && self.status & VIRTIO_CONFIG_S_NEEDS_RESET == 0
    }

    /// The features that the driver took.
    pub(super) fn features(&self) -> u64 {
        self.driver_features
    }

    /// The queue, if the driver has set it up.
    pub(super) fn queue(&mut self, index: usize) -> Option<&mut Queue> {
        self.queues.get_mut(index).filter(|queue| queue.ready())
    }

    /// Tells the driver of chains that were given back.
    pub(super) fn has_used(&mut self) {
        self.interrupt |= VIRTIO_MMIO_INT_VRING;
    }

    /// The driver broke the rules: nothing is done before it resets the device.
    pub(super) fn breaks(&mut self, why: &str) {
        self.complain(why);
        self.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
        self.interrupt |= VIRTIO_MMIO_INT_CONFIG;
    }

    /// Tells of a driver that breaks the rules; ever more seldom, as it may do so as often as it likes.
    fn complain(&mut self, why: &str) {
        self.breaches += 1;
        if self.breaches.is_power_of_two() {
            let (device, times) = (self.identity.kind, self.breaches);
            tracing::warn!(device, times, "the guest's driver breaks the rules: {why}");
        }
    }

    /// A register; `config` is the device's own space.
    pub(super) fn read(&self, offset: u32, config: &[u8], data: &mut [u8]) {
        data.fill(0);
        if let Some(at) = offset.checked_sub(VIRTIO_MMIO_CONFIG) {
            let from = config.get(at as usize..).unwrap_or_default();
            data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            data.copy_from_slice(&self.register(offset).to_le_bytes());
        }
    }

    fn register(&self, offset: u32) -> u32 {
        let queue = self.queues.get(self.queue_select as usize);
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.identity.kind,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => half(self.offered(), self.device_select),
            VIRTIO_MMIO_QUEUE_NUM_MAX => queue.map_or(0, |queue| queue.max_size().into()),
            VIRTIO_MMIO_QUEUE_READY => queue.is_some_and(QueueT::ready).into(),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt,
            VIRTIO_MMIO_STATUS => self.status,
            // No shared memory: regions of no length, nowhere.
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            // What a device says of itself never changes here.
            VIRTIO_MMIO_CONFIG_GENERATION => 0,
            _ => 0,
        }
    }

    fn offered(&self) -> u64 {
        COMMON_FEATURES | self.identity.features
    }

    /// A write of a register; nothing is written to the device's own space.
    pub(super) fn write(&mut self, offset: u32, data: &[u8], ram: &GuestRam) -> Effect {
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else { return Effect::None };
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES if self.status & VIRTIO_CONFIG_S_FEATURES_OK == 0 => {
                set_half(&mut self.driver_features, self.driver_select, value);
            }
            VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
            VIRTIO_MMIO_QUEUE_NOTIFY if self.is_running() => return Effect::Notify(value as usize),
            VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt &= !value,
            VIRTIO_MMIO_STATUS => return self.set_status(value),
            _ => self.write_queue(offset, value, ram),
        }
        Effect::None
    }

    fn write_queue(&mut self, offset: u32, value: u32, ram: &GuestRam) {
        let event_idx = self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let Some(queue) = self.queues.get_mut(self.queue_select as usize) else { return };
        if offset == VIRTIO_MMIO_QUEUE_READY {
            queue.set_event_idx(event_idx);
            queue.set_ready(value == 1);
            if value == 1 && !queue.is_valid(ram) {
                queue.set_ready(false);
                self.complain("a queue that cannot be one");
            }
            return;
        }
        // A queue that is in use stays where it is.
        if queue.ready() {
            return;
        }
        match offset {
            // A size that is none is refused there, and the queue keeps its own.
            VIRTIO_MMIO_QUEUE_NUM => queue.set_size(u16::try_from(value).unwrap_or(0)),
            VIRTIO_MMIO_QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => queue.set_avail_ring_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => queue.set_avail_ring_address(None, Some(value)),
            VIRTIO_MMIO_QUEUE_USED_LOW => queue.set_used_ring_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_USED_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    fn set_status(&mut self, value: u32) -> Effect {
        if value == 0 {
            *self = Self { breaches: self.breaches, ..Self::new(self.identity) };
            return Effect::Reset;
        }
        let was_running = self.is_running();
        // Bits are only added; that it needs a reset is not the driver's to say.
        let mut added = value & 0xff & !VIRTIO_CONFIG_S_NEEDS_RESET & !self.status;
        let modern = self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0;
        if added & VIRTIO_CONFIG_S_FEATURES_OK != 0
            && (!modern || self.driver_features & !self.offered() != 0)
        {
            added &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        if (self.status | added) & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            added &= !VIRTIO_CONFIG_S_DRIVER_OK;
        }
        self.status |= added;
        if self.is_running() && !was_running { Effect::Start(self.driver_features) } else { Effect::None }
    }

    pub(super) fn save(&self) -> TransportState {
        TransportState {
            device_select: self.device_select,
            driver_select: self.driver_select,
            driver_features: self.driver_features,
            queue_select: self.queue_select,
            status: self.status,
            interrupt: self.interrupt,
            queues: self.queues.iter().map(QueueRecord::of).collect(),
        }
    }

    pub(super) fn restored(identity: Identity, state: &TransportState) -> Result<Self, StateError> {
        let known = identity.queues;
        if state.queues.len() != known.len() {
            return Err(StateError::Malformed(format!(
                "{} queues of a virtio device that has {}",
                state.queues.len(),
                known.len()
            )));
        }
        let queues = state.queues.iter().zip(known).map(|(queue, &size)| queue.to_queue(size));
        Ok(Self {
            queues: queues.collect::<Result<_, _>>()?,
            device_select: state.device_select,
            driver_select: state.driver_select,
            driver_features: state.driver_features,
            queue_select: state.queue_select,
            status: state.status,
            interrupt: state.interrupt,
            identity,
            breaches: 0,
        })
    }
}

/// What the registers of a window without a device say: a device of kind 0, which drivers pass over.
pub(super) fn read_empty(offset: u32, data: &mut [u8]) {
    let empty = Transport::new(Identity { kind: 0, features: 0, queues: &[] });
    match offset {
        VIRTIO_MMIO_MAGIC_VALUE | VIRTIO_MMIO_VERSION => empty.read(offset, &[], data),
        _ => data.fill(0),
    }
}

fn fresh(max_size: u16) -> Queue {
    Queue::new(max_size).expect("our own sizes are powers of two")
}

fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_half(value: &mut u64, select: u32, half: u32) {
    match select {
        0 => *value = *value & !0xffff_ffff | u64::from(half),
        1 => *value = *value & 0xffff_ffff | u64::from(half) << 32,
        _ => {}
    }
}
