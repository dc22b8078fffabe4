//! The guest's virtio devices: windows with registers, queues in guest memory, and one thread for what the vCPUs do not
//! do themselves.
//!
//! A driver's notification is served on its vCPU's thread, which never waits for the host there: frames go into the
//! epoch's output, disk requests to the disk's own threads. What comes from outside (a frame, a request that has ended,
//! room after a cut) is served by the thread in [`worker`]. Each window has one lock. At a cut the vCPUs are stopped and
//! then the worker, so the windows stand still.
//!
//! This outlives a VM that is built anew around the same memory; only the interrupt lines change.

mod block;
mod console;
mod device;
mod net;
mod queue;
mod rng;
mod transport;
mod worker;

use serde::{Deserialize, Serialize};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use super::InterruptLines;
use super::input::ConsoleInput;
use crate::arch::x86_64::layout::VIRTIO_IRQ_BASE;
use crate::block_set::BlockSet;
use crate::disk::{Disk, DiskDelta};
use crate::egress::Egress;
use crate::events::Events;
use crate::guest::GuestEvent;
use crate::memory::GuestMemory;
use crate::spec::GuestSpec;
use crate::spec::virtio::{CONSOLE_SLOT, DISK_SLOT, NET_SLOT, RNG_SLOT};
use crate::state::StateError;
use crate::tap::Tap;
pub(crate) use block::DiskLog;
pub use block::DiskTracking;
use block::{Block, IoThreads};
use device::{Device, DeviceBody};
use queue::Broken;
use transport::{Effect, Transport, TransportState, read_empty};
use worker::Worker;

#[cfg(test)]
mod tests;

/// What of the host stands behind a guest's devices.
#[derive(Clone, Default)]
pub struct Backends {
    /// Behind its network card.
    pub tap: Option<Arc<Tap>>,
    /// Behind its disk.
    pub disk: Option<Arc<dyn Disk>>,
}

impl std::fmt::Debug for Backends {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let disk = self.disk.as_ref().map(|disk| disk.bytes());
        write!(f, "Backends({:?}, a disk of {disk:?} bytes)", self.tap)
    }
}

/// A window at a cut.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SlotState {
    transport: TransportState,
    device: DeviceBody,
}

impl SlotState {
    pub(crate) fn check_limits(&self) -> Result<(), StateError> {
        match &self.device {
            DeviceBody::Plain => Ok(()),
            DeviceBody::Block(block) => block.check_limits(),
        }
    }
}

/// A device and its registers.
struct Slot {
    transport: Transport,
    device: Box<dyn Device>,
}

/// All windows.
struct Windows {
    slots: Vec<Option<Mutex<Slot>>>,
    lines: RwLock<Option<Arc<dyn InterruptLines>>>,
    memory: Arc<GuestMemory>,
    events: Arc<Events>,
}

/// The guest's virtio devices.
pub(crate) struct Virtio {
    /// Ended before the windows that it serves.
    worker: Option<Worker>,
    windows: Arc<Windows>,
    log: Arc<DiskLog>,
}

impl Virtio {
    /// The devices of a spec, on these parts of the host; stopped.
    pub(crate) fn new(
        spec: &GuestSpec,
        backends: &Backends,
        memory: &Arc<GuestMemory>,
        (egress, events): (&Arc<Egress>, &Arc<Events>),
        input: Option<Arc<ConsoleInput>>,
    ) -> io::Result<Self> {
        let bell = worker::bell()?;
        let blocks = spec.virtio.disk.as_ref().map_or(0, |disk| disk.bytes / colo_common::BLOCK_SIZE as u64);
        let log = Arc::new(DiskLog::new(blocks));
        let mut slots: Vec<Option<Mutex<Slot>>> = (0..spec.slots()).map(|_| None).collect();
        let mut place = |slot: u32, device: Box<dyn Device>| {
            let transport = Transport::new(device.identity());
            slots[slot as usize] = Some(Mutex::new(Slot { transport, device }));
        };
        if let Some(net) = &spec.virtio.net {
            place(NET_SLOT, Box::new(net::Net::new(net, Arc::clone(egress), backends.tap.clone())));
        }
        if let (Some(disk), Some(backend)) = (&spec.virtio.disk, &backends.disk) {
            let ring = Arc::clone(&bell);
            let io = IoThreads::start(&spec.name, Arc::clone(backend), move || worker::ring(&ring))?;
            place(DISK_SLOT, Box::new(Block::new(disk, io, Arc::clone(&log))));
        }
        if spec.virtio.rng {
            place(RNG_SLOT, Box::new(rng::Rng));
        }
        if spec.virtio.console {
            place(CONSOLE_SLOT, Box::new(console::Console::new(Arc::clone(egress), input)));
        }
        let any = slots.iter().any(Option::is_some);
        let (lines, memory, events) = (RwLock::new(None), Arc::clone(memory), Arc::clone(events));
        let windows = Arc::new(Windows { slots, lines, memory, events });
        let start = || Worker::start(&spec.name, bell, backends.tap.clone(), Arc::clone(&windows));
        let worker = any.then(start).transpose()?;
        Ok(Self { worker, windows, log })
    }

    /// Interrupts are raised on these lines from now on.
    pub(crate) fn attach(&self, lines: Arc<dyn InterruptLines>) {
        *self.windows.lines.write().unwrap_or_else(PoisonError::into_inner) = Some(lines);
    }

    /// A read of a window.
    pub(crate) fn read(&self, slot: usize, offset: u32, data: &mut [u8]) {
        match self.windows.slot(slot) {
            Some(slot) => slot.transport.read(offset, slot.device.config(), data),
            None => read_empty(offset, data),
        }
    }

    /// A write to a window; what it asks for is done before this returns, or on its way.
    pub(crate) fn write(&self, slot: usize, offset: u32, data: &[u8]) {
        let Some(mut window) = self.windows.slot(slot) else { return };
        let effect = window.transport.write(offset, data, self.windows.memory.ram());
        match effect {
            Effect::None => {}
            Effect::Start(features) => window.device.start(features),
            Effect::Reset => window.device.reset(),
            Effect::Notify(queue) => {
                drop(window);
                if self.windows.serve(slot, queue) {
                    self.wake();
                }
            }
        }
    }

    /// Something may be there to serve: input that was typed, room for output.
    pub(crate) fn wake(&self) {
        self.worker.iter().for_each(Worker::wake);
    }

    /// Stops what is done beside the vCPUs; they are stopped already.
    pub(crate) fn pause(&self) {
        self.worker.iter().for_each(Worker::pause);
    }

    /// Lets it go on, with whatever has been waiting.
    pub(crate) fn resume(&self) {
        self.worker.iter().for_each(Worker::resume);
    }

    /// The windows; nothing runs.
    pub(crate) fn save(&self) -> Vec<Option<SlotState>> {
        let save = |slot: MutexGuard<'_, Slot>| SlotState {
            transport: slot.transport.save(),
            device: slot.device.save(),
        };
        (0..self.windows.slots.len()).map(|slot| self.windows.slot(slot).map(save)).collect()
    }

    /// The windows as after power-on.
    pub(crate) fn power_on(&self) -> Vec<Option<SlotState>> {
        let fresh = |slot: MutexGuard<'_, Slot>| {
            let device = match slot.device.save() {
                DeviceBody::Plain => DeviceBody::Plain,
                DeviceBody::Block(_) => DeviceBody::Block(Default::default()),
            };
            SlotState { transport: Transport::new(slot.device.identity()).save(), device }
        };
        (0..self.windows.slots.len()).map(|slot| self.windows.slot(slot).map(fresh)).collect()
    }

    /// Sets the windows; nothing runs. Waits for the disk: what was under way is in the log then.
    pub(crate) fn restore(&self, states: &[Option<SlotState>]) -> Result<(), StateError> {
        let other = || StateError::Malformed("other virtio devices than the guest has".to_owned());
        if states.len() != self.windows.slots.len() {
            return Err(other());
        }
        for (number, state) in states.iter().enumerate() {
            match (self.windows.slot(number), state) {
                (None, None) => {}
                (Some(mut slot), Some(state)) => {
                    let transport = Transport::restored(slot.device.identity(), &state.transport)?;
                    let features = transport.is_running().then(|| transport.features());
                    slot.transport = transport;
                    slot.device.restore(&state.device, features, self.windows.memory.ram())?;
                }
                _ => return Err(other()),
            }
        }
        Ok(())
    }

    /// Changes how writes to the disk are kept.
    pub(crate) fn track_disk(&self, tracking: DiskTracking) {
        self.log.track(tracking);
        // There may be room now.
        self.wake();
    }

    /// What was written to the disk since the last time.
    pub(crate) fn take_disk(&self) -> DiskDelta {
        let (writes, blocks) = self.log.take();
        DiskDelta { writes, blocks }
    }

    /// The blocks that are known to be written, without stopping anything, and what is kept with its bytes for the cut.
    pub(crate) fn collect_blocks(&self) -> (BlockSet, usize) {
        self.log.collect()
    }
}

impl Windows {
    fn slot(&self, number: usize) -> Option<MutexGuard<'_, Slot>> {
        let slot = self.slots.get(number)?.as_ref()?;
        // Devices answer errors; a panic in one ends the guest by its thread.
        Some(slot.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Serves a queue; whether there is more to do than was done.
    fn serve(&self, number: usize, index: usize) -> bool {
        let Some(mut slot) = self.slot(number) else { return false };
        let Slot { transport, device } = &mut *slot;
        let running = transport.is_running();
        let Some(queue) = transport.queue(index).filter(|_| running) else {
            device.settle();
            return false;
        };
        let served = match device.serve(index, queue, self.memory.ram()) {
            Ok(served) => served,
            Err(Broken(why)) => {
                transport.breaks(why);
                self.pulse(number);
                return false;
            }
        };
        if served.interrupt {
            transport.has_used();
            self.pulse(number);
        }
        drop(slot);
        if served.full {
            self.events.raise(GuestEvent::OutputFull);
        } else if served.said {
            self.events.raise(GuestEvent::Output);
        }
        served.more
    }

    /// Serves everything; whether there is more to do.
    fn serve_all(&self) -> bool {
        let mut more = false;
        for number in 0..self.slots.len() {
            let queues = self.slot(number).map_or(0, |slot| slot.transport.queues.len());
            for index in 0..queues {
                more |= self.serve(number, index);
            }
        }
        more
    }

    /// An edge on the window's line.
    fn pulse(&self, number: usize) {
        let lines = self.lines.read().unwrap_or_else(PoisonError::into_inner);
        let Some(lines) = &*lines else { return };
        let irq = VIRTIO_IRQ_BASE + number as u32;
        if let Err(e) = lines.set(irq, true).and_then(|()| lines.set(irq, false)) {
            tracing::error!(slot = number, "a virtio device cannot raise its interrupt: {e}");
        }
    }
}
