//! ACPI fixed hardware: the PM1a registers with the power button, and S5.

use serde::{Deserialize, Serialize};
use std::io;
use std::sync::Arc;

use super::InterruptLines;
use crate::arch::x86_64::layout::{SCI_IRQ, SLEEP_TYPE_S5};
use crate::guest::Lifecycle;

/// Status and enable bits that can raise the SCI: power button.
const POWER_BUTTON: u16 = 1 << 8;
/// Control: ACPI mode is on (it always is, there is no other).
const SCI_ENABLED: u16 = 1;
/// Control: go to the sleep state of the type field.
const SLEEP_ENABLE: u16 = 1 << 13;
/// Control: where the type field begins.
const SLEEP_TYPE_SHIFT: u32 = 10;

/// The PM1a registers at a cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcpiPmState {
    status: u16,
    enable: u16,
    control: u16,
}

pub(super) struct AcpiPm {
    state: AcpiPmState,
    lines: Arc<dyn InterruptLines>,
}

impl AcpiPm {
    pub(super) fn new(lines: Arc<dyn InterruptLines>) -> Self {
        Self { state: AcpiPmState::default(), lines }
    }

    pub(super) fn press(&mut self) -> io::Result<()> {
        self.state.status |= POWER_BUTTON;
        self.update_line()
    }

    pub(super) fn read_event(&self, offset: u16, data: &mut [u8]) {
        let word = u32::from(self.state.status) | u32::from(self.state.enable) << 16;
        copy(&word.to_le_bytes(), offset, data);
    }

    /// Status bits are cleared by writing ones; enable bits are set as written.
    pub(super) fn write_event(&mut self, offset: u16, data: &[u8]) -> io::Result<()> {
        for (at, &byte) in (offset..4).zip(data) {
            let (value, shift) = (u16::from(byte), 8 * (at % 2));
            if at < 2 {
                self.state.status &= !(value << shift);
            } else {
                self.state.enable = self.state.enable & !(0xff << shift) | value << shift;
            }
        }
        self.update_line()
    }

    pub(super) fn read_control(&self, offset: u16, data: &mut [u8]) {
        copy(&(self.state.control | SCI_ENABLED).to_le_bytes(), offset, data);
    }

    pub(super) fn write_control(&mut self, offset: u16, data: &[u8]) -> Option<Lifecycle> {
        let mut bytes = self.state.control.to_le_bytes();
        for (at, &byte) in (usize::from(offset)..2).zip(data) {
            bytes[at] = byte;
        }
        let value = u16::from_le_bytes(bytes);
        // The sleep bit is write-only.
        self.state.control = value & !SLEEP_ENABLE;
        let off = value & SLEEP_ENABLE != 0 && (value >> SLEEP_TYPE_SHIFT) & 7 == u16::from(SLEEP_TYPE_S5);
        off.then_some(Lifecycle::Shutdown)
    }

    pub(super) fn update_line(&self) -> io::Result<()> {
        self.lines.set(SCI_IRQ, self.state.status & self.state.enable & POWER_BUTTON != 0)
    }

    pub(super) fn save(&self) -> AcpiPmState {
        self.state
    }

    pub(super) fn restore(&mut self, state: &AcpiPmState) {
        self.state = *state;
    }
}

fn copy(register: &[u8], offset: u16, data: &mut [u8]) {
    for (to, from) in data.iter_mut().zip(&register[usize::from(offset)..]) {
        *to = *from;
    }
}
