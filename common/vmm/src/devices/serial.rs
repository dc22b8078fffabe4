//! The serial console: a 16550 (vm-superio), with what is typed waiting in front of its 64 bytes.

use colo_common::bounded::list;
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::Arc;
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, SerialState, Trigger};

use super::InterruptLines;
use super::input::ConsoleInput;
use crate::arch::x86_64::layout::COM1_IRQ;
use crate::egress::Egress;
use crate::state::StateError;

/// Bytes of the device's own queue that are kept until the device has checked them itself.
pub(super) const QUEUE_MOST: usize = 256;

/// Line status register: where a guest that polls looks for input.
const LINE_STATUS: u8 = 5;
/// Bit of the modem control register that has the device read what it writes.
const LOOPBACK: u8 = 1 << 4;

/// Raises the console's interrupt: an edge.
struct ConsoleIrq(Arc<dyn InterruptLines>);

impl Trigger for ConsoleIrq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.set(COM1_IRQ, true)?;
        self.0.set(COM1_IRQ, false)
    }
}

/// Writes into the open epoch's output.
struct ToEgress(Arc<Egress>);

impl io::Write for ToEgress {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push_console(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The 16550's registers and queue at a cut.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SerialConsoleState {
    /// In the order of vm-superio's state: divisor low and high, IER, IIR, LCR, LSR, MCR, MSR, scratch.
    registers: [u8; 9],
    #[serde(deserialize_with = "list::<_, _, QUEUE_MOST>")]
    queue: Vec<u8>,
}

impl SerialConsoleState {
    pub(crate) fn check_limits(&self) -> Result<(), StateError> {
        // The 16550 checks its own queue when it is set; this only bounds what is kept until then.
        let len = self.queue.len();
        if len > QUEUE_MOST {
            Err(StateError::Malformed(format!("a console queue of {len} bytes")))
        } else {
            Ok(())
        }
    }

    /// Input that the guest was to read next. In loopback the queue has what the guest wrote itself.
    pub(super) fn unread_input(&self) -> &[u8] {
        if self.registers[6] & LOOPBACK == 0 { &self.queue } else { &[] }
    }

    fn from_device(state: SerialState) -> Self {
        let registers = [
            state.baud_divisor_low,
            state.baud_divisor_high,
            state.interrupt_enable,
            state.interrupt_identification,
            state.line_control,
            state.line_status,
            state.modem_control,
            state.modem_status,
            state.scratch,
        ];
        Self { registers, queue: state.in_buffer }
    }

    fn to_device(&self) -> SerialState {
        let r = &self.registers;
        SerialState {
            baud_divisor_low: r[0],
            baud_divisor_high: r[1],
            interrupt_enable: r[2],
            interrupt_identification: r[3],
            line_control: r[4],
            line_status: r[5],
            modem_control: r[6],
            modem_status: r[7],
            scratch: r[8],
            in_buffer: self.queue.clone(),
        }
    }
}

pub(super) struct SerialConsole {
    device: Serial<ConsoleIrq, NoEvents, ToEgress>,
    lines: Arc<dyn InterruptLines>,
    egress: Arc<Egress>,
    /// What waits for room in the device; none if it goes to another console.
    input: Option<Arc<ConsoleInput>>,
}

impl SerialConsole {
    pub(super) fn new(
        lines: Arc<dyn InterruptLines>,
        egress: Arc<Egress>,
        input: Option<Arc<ConsoleInput>>,
    ) -> Self {
        let device = Serial::new(ConsoleIrq(Arc::clone(&lines)), ToEgress(Arc::clone(&egress)));
        Self { device, lines, egress, input }
    }

    pub(super) fn write(&mut self, register: u8, value: u8) -> io::Result<()> {
        self.device.write(register, value).map_err(failed)?;
        // Leaving loopback makes room for input.
        self.refill()
    }

    pub(super) fn read(&mut self, register: u8) -> io::Result<u8> {
        if register == LINE_STATUS {
            self.refill()?;
        }
        let value = self.device.read(register);
        if register == 0 {
            self.refill()?;
        }
        Ok(value)
    }

    pub(super) fn save(&self) -> SerialConsoleState {
        SerialConsoleState::from_device(self.device.state())
    }

    /// Input that waits gets into the device when the guest next touches it, or with the next input.
    pub(super) fn restore(&mut self, state: &SerialConsoleState) -> io::Result<()> {
        let (irq, out) = (ConsoleIrq(Arc::clone(&self.lines)), ToEgress(Arc::clone(&self.egress)));
        self.device = Serial::from_state(&state.to_device(), irq, NoEvents, out).map_err(failed)?;
        Ok(())
    }

    /// Moves input that waits into the device, as far as there is room. In loopback it takes nothing.
    pub(super) fn refill(&mut self) -> io::Result<()> {
        let room = self.device.fifo_capacity();
        match &self.input {
            Some(input) if room > 0 && !input.is_empty() => {
                input.hand_over(room, |bytes| self.device.enqueue_raw_bytes(bytes).map_err(failed)).map(drop)
            }
            _ => Ok(()),
        }
    }
}

fn failed(e: vm_superio::serial::Error<io::Error>) -> io::Error {
    match e {
        vm_superio::serial::Error::Trigger(e) | vm_superio::serial::Error::IOError(e) => e,
        vm_superio::serial::Error::FullFifo => {
            io::Error::other("the console's queue is longer than it can be")
        }
    }
}
