//! virtio-rng: randomness from the host. What it gave is in guest memory, so both nodes' guests have the same.

use virtio_queue::Queue;

use super::device::{Device, DeviceBody, Served};
use super::queue::{Broken, give_back, pop, serve, wants_interrupt};
use super::transport::Identity;
use crate::memory::GuestRam;
use crate::state::StateError;

/// Kind of the device.
const RNG: u32 = 4;
/// Bytes given for one request at most; drivers ask for 64.
const MAX_BYTES: usize = 4096;
/// Requests served at once.
const BATCH: usize = 8;

pub(super) struct Rng;

impl Device for Rng {
    fn identity(&self) -> Identity {
        Identity { kind: RNG, features: 0, queues: &[8] }
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn start(&mut self, _features: u64) {}

    fn reset(&mut self) {}

    fn serve(&mut self, _index: usize, queue: &mut Queue, ram: &GuestRam) -> Result<Served, Broken> {
        let mut served = Served::default();
        serve(queue, ram, |queue| {
            served = served.and(self.give(queue, ram)?);
            Ok(served.goes_on())
        })?;
        served.interrupt = served.interrupt && wants_interrupt(queue, ram)?;
        Ok(served)
    }

    fn save(&self) -> DeviceBody {
        DeviceBody::Plain
    }

    fn restore(&mut self, _: &DeviceBody, _: Option<u64>, _: &GuestRam) -> Result<(), StateError> {
        Ok(())
    }
}

impl Rng {
    fn give(&self, queue: &mut Queue, ram: &GuestRam) -> Result<Served, Broken> {
        let mut served = Served::default();
        for _ in 0..BATCH {
            let Some(chain) = pop(queue, ram)? else { return Ok(served) };
            let mut bytes = vec![0; chain.writable.len().min(MAX_BYTES)];
            // A host without randomness for now gives none, and the driver asks again.
            let got = if getrandom::fill(&mut bytes).is_ok() { bytes.len() } else { 0 };
            let given = chain.writable.write(ram, &bytes[..got])?;
            give_back(queue, ram, chain.head, given)?;
            served.interrupt = true;
        }
        Ok(Served { more: true, ..served })
    }
}
