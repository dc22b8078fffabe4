//! virtio-console: a console without a register for each byte. What the guest says is in the one order of its output;
//! what is typed comes from the same input as the serial console's, if the spec says that it goes here.

use std::ops::ControlFlow;
use std::sync::Arc;
use virtio_queue::Queue;

use super::super::input::ConsoleInput;
use super::device::{Device, DeviceBody, Served};
use super::queue::{Broken, give_back, pop, put_back, serve, wants_interrupt};
use super::transport::Identity;
use crate::egress::Egress;
use crate::memory::GuestRam;
use crate::state::StateError;

/// Kind of the device.
const CONSOLE: u32 = 3;
/// The queue that input goes to.
pub(super) const INPUT: usize = 0;
/// Bytes of one chain at most; drivers write a page.
const MAX_BYTES: usize = 64 << 10;
/// Chains served at once.
const BATCH: usize = 32;

pub(super) struct Console {
    egress: Arc<Egress>,
    /// None if what is typed goes to the serial console.
    input: Option<Arc<ConsoleInput>>,
}

impl Console {
    pub(super) fn new(egress: Arc<Egress>, input: Option<Arc<ConsoleInput>>) -> Self {
        Self { egress, input }
    }

    fn say(&self, queue: &mut Queue, ram: &GuestRam) -> Result<Served, Broken> {
        let mut served = Served::default();
        for _ in 0..BATCH {
            let Some(chain) = pop(queue, ram)? else { return Ok(served) };
            if self.egress.is_full() {
                put_back(queue);
                return Ok(Served { full: true, ..served });
            }
            if chain.readable.len() > MAX_BYTES {
                return Err(Broken("more than 64 KiB for the console in one chain"));
            }
            self.egress.push_console(&chain.readable.read(ram, MAX_BYTES)?);
            give_back(queue, ram, chain.head, 0)?;
            served.interrupt = true;
        }
        Ok(Served { more: true, ..served })
    }

    fn hear(&self, queue: &mut Queue, ram: &GuestRam) -> Result<Served, Broken> {
        let mut served = Served::default();
        let Some(input) = &self.input else { return Ok(served) };
        while !input.is_empty() {
            let Some(chain) = pop(queue, ram)? else { break };
            let room = chain.writable.len();
            let given = input.hand_over(room, |bytes| chain.writable.write(ram, bytes))?;
            give_back(queue, ram, chain.head, given)?;
            served.interrupt = true;
        }
        Ok(served)
    }
}

impl Device for Console {
    fn identity(&self) -> Identity {
        Identity { kind: CONSOLE, features: 0, queues: &[64, 64] }
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn start(&mut self, _features: u64) {}

    fn reset(&mut self) {}

    fn serve(&mut self, index: usize, queue: &mut Queue, ram: &GuestRam) -> Result<Served, Broken> {
        let mut served = Served::default();
        serve(queue, ram, |queue| {
            served = served.and(if index == INPUT { self.hear(queue, ram)? } else { self.say(queue, ram)? });
            let nothing = index == INPUT && self.input.as_ref().is_none_or(|input| input.is_empty());
            Ok(if nothing { ControlFlow::Break(()) } else { served.goes_on() })
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
