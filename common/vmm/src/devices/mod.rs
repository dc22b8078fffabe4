//! The machine's devices and the one lock over them: what a port or MMIO access does.
//!
//! Interrupts are raised through KVM_IRQ_LINE, synchronously. An irqfd would leave an interrupt in a kernel
//! work queue where no cut can see it.

mod acpi_pm;
mod input;
mod serial;
mod virtio;

use colo_common::bounded::list;
use colo_common::limits::MAX_CONSOLE_INPUT;
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::arch::x86_64::layout::{
    COM1_PORT, DEBUG_EXIT_PORT, I8042_PORT, I8042_RESET, MAX_VIRTIO_SLOTS, PM1_CONTROL_PORT, PM1_EVENT_PORT,
    RESET_PORT, VIRTIO_BASE, VIRTIO_WINDOW,
};
use crate::egress::Egress;
use crate::guest::{Lifecycle, ResetCause};
use crate::spec::GuestSpec;
use crate::state::StateError;

pub use acpi_pm::AcpiPmState;
pub(crate) use input::ConsoleInput;
pub use serial::SerialConsoleState;
pub(crate) use virtio::DiskLog;
pub use virtio::{Backends, DiskTracking};
pub(crate) use virtio::{SlotState, Virtio};

/// Control bit of the reset register: reset the CPU (bit 1 alone chooses the kind).
const RESET_NOW: u8 = 4;

/// Console bytes that may wait: those that are taken, and after a reset those that the console held besides.
const MAX_INPUT: usize = MAX_CONSOLE_INPUT + serial::QUEUE_MOST;

/// Where devices raise interrupts.
pub(crate) trait InterruptLines: Send + Sync {
    /// Sets a line; an edge is a set and a clear.
    fn set(&self, irq: u32, active: bool) -> io::Result<()>;
}

impl InterruptLines for VmFd {
    fn set(&self, irq: u32, active: bool) -> io::Result<()> {
        Ok(self.set_irq_line(irq, active)?)
    }
}

/// The devices at a cut.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DeviceState {
    serial: SerialConsoleState,
    acpi_pm: AcpiPmState,
    /// Console bytes taken and not yet in the console's own queue. A reset puts that queue's bytes in front.
    #[serde(deserialize_with = "list::<_, _, MAX_INPUT>")]
    input: Vec<u8>,
    input_offset: u64,
    /// By window.
    #[serde(deserialize_with = "list::<_, _, { MAX_VIRTIO_SLOTS as usize }>")]
    virtio: Vec<Option<SlotState>>,
}

impl DeviceState {
    pub(crate) fn check_limits(&self) -> Result<(), StateError> {
        if self.input.len() > MAX_INPUT {
            return Err(StateError::Malformed(format!("{} bytes of console input", self.input.len())));
        }
        self.virtio.iter().flatten().try_for_each(SlotState::check_limits)?;
        self.serial.check_limits()
    }

    /// The virtio windows.
    pub(crate) fn virtio(&self) -> &[Option<SlotState>] {
        &self.virtio
    }

    /// The same with other virtio windows.
    pub(crate) fn with_virtio(self, virtio: Vec<Option<SlotState>>) -> Self {
        Self { virtio, ..self }
    }

    pub(crate) fn input_offset(&self) -> u64 {
        self.input_offset
    }

    /// This power-on state with what lies outside the machine: console input that was taken and that the guest had
    /// not read yet, the console's own queue first.
    pub(crate) fn after_reset(self, before: &Self) -> Self {
        let mut input = before.serial.unread_input().to_vec();
        input.extend(&before.input);
        Self { input, input_offset: before.input_offset, ..self }
    }
}

/// All devices of one guest; called by the vCPU threads.
pub(crate) struct Devices {
    inner: Mutex<Inner>,
    input: Arc<ConsoleInput>,
    virtio: Arc<Virtio>,
    virtio_slots: u32,
}

struct Inner {
    serial: serial::SerialConsole,
    acpi_pm: acpi_pm::AcpiPm,
}

impl Devices {
    /// The devices of a spec that interrupt by these lines; virtio and console input outlive them.
    pub(crate) fn new(
        lines: &Arc<dyn InterruptLines>,
        egress: &Arc<Egress>,
        input: &Arc<ConsoleInput>,
        virtio: &Arc<Virtio>,
        spec: &GuestSpec,
    ) -> Self {
        let typed = (!spec.virtio.console_input).then(|| Arc::clone(input));
        let serial = serial::SerialConsole::new(Arc::clone(lines), Arc::clone(egress), typed);
        let acpi_pm = acpi_pm::AcpiPm::new(Arc::clone(lines));
        virtio.attach(Arc::clone(lines));
        let (input, virtio) = (Arc::clone(input), Arc::clone(virtio));
        Self { inner: Mutex::new(Inner { serial, acpi_pm }), input, virtio, virtio_slots: spec.slots() }
    }

    /// An OUT of `data.len()` bytes (1, 2 or 4); may ask for a change of the guest's life.
    pub(crate) fn port_write(&self, port: u16, data: &[u8]) -> io::Result<Option<Lifecycle>> {
        let first = data[0];
        match port {
            _ if in_range(port, COM1_PORT, 8) => {
                self.inner().serial.write((port - COM1_PORT) as u8, first)?;
            }
            _ if in_range(port, PM1_EVENT_PORT, 4) => {
                self.inner().acpi_pm.write_event(port - PM1_EVENT_PORT, data)?;
            }
            _ if in_range(port, PM1_CONTROL_PORT, 2) => {
                return Ok(self.inner().acpi_pm.write_control(port - PM1_CONTROL_PORT, data));
            }
            I8042_PORT if first == I8042_RESET => return Ok(Some(Lifecycle::Reset(ResetCause::Keyboard))),
            RESET_PORT if first & RESET_NOW != 0 => return Ok(Some(Lifecycle::Reset(ResetCause::Port))),
            DEBUG_EXIT_PORT => return Ok(Some(Lifecycle::DebugExit(little_endian(data)))),
            _ => {}
        }
        Ok(None)
    }

    /// An IN of `data.len()` bytes; a port without a device reads as all ones.
    pub(crate) fn port_read(&self, port: u16, data: &mut [u8]) -> io::Result<()> {
        data.fill(0xff);
        match port {
            _ if in_range(port, COM1_PORT, 8) => {
                data[0] = self.inner().serial.read((port - COM1_PORT) as u8)?;
            }
            _ if in_range(port, PM1_EVENT_PORT, 4) => {
                self.inner().acpi_pm.read_event(port - PM1_EVENT_PORT, data);
            }
            _ if in_range(port, PM1_CONTROL_PORT, 2) => {
                self.inner().acpi_pm.read_control(port - PM1_CONTROL_PORT, data);
            }
            // No keyboard: nothing to read, ready for a command.
            I8042_PORT | 0x60 => data.fill(0),
            RESET_PORT => data.fill(0),
            _ => {}
        }
        Ok(())
    }

    /// A read of memory that is not RAM; outside the device windows it gives all ones.
    pub(crate) fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.virtio_offset(address) {
            Some((slot, offset)) => self.virtio.read(slot, offset, data),
            None => data.fill(0xff),
        }
    }

    /// A write to memory that is not RAM.
    pub(crate) fn mmio_write(&self, address: u64, data: &[u8]) {
        match self.virtio_offset(address) {
            Some((slot, offset)) => self.virtio.write(slot, offset, data),
            None => tracing::trace!(address, ?data, "MMIO write without a device"),
        }
    }

    /// Offers console input; returns how much was taken.
    pub(crate) fn input(&self, bytes: &[u8]) -> io::Result<usize> {
        let taken = self.input.offer(bytes);
        self.inner().serial.refill()?;
        self.virtio.wake();
        Ok(taken)
    }

    pub(crate) fn input_offset(&self) -> u64 {
        self.input.offset()
    }

    pub(crate) fn count_input_from(&self, offset: u64) {
        self.input.count_from(offset);
    }

    pub(crate) fn power_button(&self) -> io::Result<()> {
        self.inner().acpi_pm.press()
    }

    pub(crate) fn save(&self) -> DeviceState {
        let inner = self.inner();
        let (input, input_offset) = self.input.save();
        let (serial, acpi_pm) = (inner.serial.save(), inner.acpi_pm.save());
        DeviceState { serial, acpi_pm, input, input_offset, virtio: self.virtio.save() }
    }

    /// Sets the devices but virtio, before the interrupt chips: what a device raises here is overwritten by theirs.
    pub(crate) fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let refused =
            |e: io::Error| StateError::Refused { part: "devices".to_owned(), reason: e.to_string() };
        let mut inner = self.inner();
        self.input.restore(&state.input, state.input_offset);
        inner.serial.restore(&state.serial).map_err(refused)?;
        inner.acpi_pm.restore(&state.acpi_pm);
        Ok(())
    }

    /// Sets level-triggered lines as the devices hold them; after the interrupt chips.
    pub(crate) fn restore_levels(&self) -> io::Result<()> {
        self.inner().acpi_pm.update_line()
    }

    /// The window that the address is in, and its place there.
    fn virtio_offset(&self, address: u64) -> Option<(usize, u32)> {
        let offset = address.checked_sub(VIRTIO_BASE)?;
        let inside = offset < u64::from(self.virtio_slots) * VIRTIO_WINDOW;
        inside.then_some(((offset / VIRTIO_WINDOW) as usize, (offset % VIRTIO_WINDOW) as u32))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn in_range(port: u16, first: u16, count: u16) -> bool {
    (first..first + count).contains(&port)
}

fn little_endian(data: &[u8]) -> u32 {
    data.iter().take(4).rev().fold(0, |value, &byte| value << 8 | u32::from(byte))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::{Backends, Devices, InterruptLines, Virtio};
    use crate::arch::x86_64::layout::{
        COM1_IRQ, COM1_PORT, PM1_CONTROL_PORT, PM1_EVENT_PORT, SCI_IRQ, VIRTIO_BASE,
    };
    use crate::egress::Egress;
    use crate::guest::{Lifecycle, ResetCause};
    use crate::memory::GuestMemory;
    use crate::spec::{BootFile, BootSource, GuestSpec};
    use std::io;
    use std::sync::{Arc, Mutex};

    #[derive(Default)]
    pub(crate) struct Lines(pub(crate) Mutex<Vec<(u32, bool)>>);

    impl InterruptLines for Lines {
        fn set(&self, irq: u32, active: bool) -> io::Result<()> {
            self.0.lock().unwrap().push((irq, active));
            Ok(())
        }
    }

    fn devices() -> (Devices, Arc<Lines>, Arc<Egress>) {
        let (lines, egress) = (Arc::new(Lines::default()), Arc::new(Egress::default()));
        let image = BootFile { path: "none".into(), bytes: Vec::new().into() };
        let spec = GuestSpec::new("test", 1 << 20, BootSource::Flat { image, address: 0 });
        let (memory, input) = (Arc::new(GuestMemory::new(1 << 20).unwrap()), Arc::default());
        let virtio = Virtio::new(&spec, &Backends::default(), &memory, (&egress, &Arc::default()), None);
        let as_lines: Arc<dyn InterruptLines> = lines.clone();
        let devices = Devices::new(&as_lines, &egress, &input, &Arc::new(virtio.unwrap()), &spec);
        (devices, lines, egress)
    }

    #[test]
    fn the_ports_that_end_a_guests_life() {
        let (devices, ..) = devices();
        let asked = |port, data: &[u8]| devices.port_write(port, data).unwrap();
        assert_eq!(asked(0x64, &[0xfe]), Some(Lifecycle::Reset(ResetCause::Keyboard)));
        assert_eq!(asked(0x64, &[0xd1]), None);
        assert_eq!(asked(0xcf9, &[2]), None);
        assert_eq!(asked(0xcf9, &[6]), Some(Lifecycle::Reset(ResetCause::Port)));
        assert_eq!(asked(0xf4, &[0x34, 0x12, 0, 0]), Some(Lifecycle::DebugExit(0x1234)));
        assert_eq!(asked(PM1_CONTROL_PORT, &[0x01, 0x34]), Some(Lifecycle::Shutdown));
        assert_eq!(asked(PM1_CONTROL_PORT, &[0x01, 0x14]), None);
    }

    #[test]
    fn console_output_goes_to_the_epoch_and_input_survives_a_save() {
        let (one, lines, egress) = devices();
        one.port_write(COM1_PORT + 1, &[1]).unwrap();
        for byte in b"hi" {
            assert_eq!(one.port_write(COM1_PORT, &[*byte]).unwrap(), None);
        }
        assert_eq!(egress.take().console(), b"hi");
        let text: Vec<u8> = (0..200).collect();
        assert_eq!(one.input(&text).unwrap(), 200);
        assert!(lines.0.lock().unwrap().contains(&(COM1_IRQ, true)));
        let mut byte = [0];
        one.port_read(COM1_PORT, &mut byte).unwrap();
        assert_eq!(byte, [0]);
        let state = one.save();
        let (two, ..) = devices();
        two.restore(&state).unwrap();
        for expected in 1..200 {
            two.port_read(COM1_PORT, &mut byte).unwrap();
            assert_eq!(byte, [expected]);
        }
        assert_eq!(two.input_offset(), 200);
    }

    #[test]
    fn a_reset_keeps_every_byte_of_input_that_was_not_read() {
        let power_on = devices().0.save();
        let (devices, ..) = devices();
        let mut byte = [0];
        let mut read = |port| {
            devices.port_read(port, &mut byte).unwrap();
            byte[0]
        };
        // As much as is taken, so that what waits after the reset is at its most.
        let much: Vec<u8> = (0..colo_common::limits::MAX_CONSOLE_INPUT).map(|n| n as u8).collect();
        let mut taken = devices.input(&much).unwrap();
        taken += devices.input(&much[..much.len().min(64)]).unwrap();
        assert_eq!(read(COM1_PORT), 0);
        let state = power_on.after_reset(&devices.save());
        state.check_limits().unwrap();
        devices.restore(&state).unwrap();
        assert_eq!(devices.input(b"more").unwrap(), 0, "it is as full as before");
        assert_eq!(devices.input_offset(), taken as u64);
        // A guest that polls, and has not written a register since.
        for expected in 1..taken {
            assert_eq!(read(COM1_PORT + 5) & 1, 1, "byte {expected} is not ready");
            assert_eq!(read(COM1_PORT), expected as u8, "byte {expected}");
        }
        assert_eq!(read(COM1_PORT + 5) & 1, 0);
    }

    #[test]
    fn console_input_is_bounded_and_says_what_it_took() {
        let (devices, ..) = devices();
        let much = vec![b'x'; 2 * colo_common::limits::MAX_CONSOLE_INPUT];
        let mut taken = devices.input(&much).unwrap();
        assert!(taken < much.len());
        // The console's own queue made room once.
        taken += devices.input(&much).unwrap();
        assert_eq!(devices.input(&much).unwrap(), 0);
        assert_eq!(devices.input_offset(), taken as u64);
    }

    #[test]
    fn the_power_button_raises_a_level_until_it_is_acknowledged() {
        let (devices, lines, _) = devices();
        devices.port_write(PM1_EVENT_PORT + 2, &[0x00, 0x01]).unwrap();
        devices.power_button().unwrap();
        assert_eq!(lines.0.lock().unwrap().last(), Some(&(SCI_IRQ, true)));
        let mut status = [0; 2];
        devices.port_read(PM1_EVENT_PORT, &mut status).unwrap();
        assert_eq!(status, [0, 1]);
        devices.port_write(PM1_EVENT_PORT, &status).unwrap();
        assert_eq!(lines.0.lock().unwrap().last(), Some(&(SCI_IRQ, false)));
    }

    #[test]
    fn empty_virtio_windows_show_device_zero() {
        let (devices, ..) = devices();
        let mut word = [0; 4];
        devices.mmio_read(VIRTIO_BASE + 0x1000, &mut word);
        assert_eq!(&word, b"virt");
        devices.mmio_read(VIRTIO_BASE + 8, &mut word);
        assert_eq!(word, [0; 4]);
        devices.mmio_read(VIRTIO_BASE + 0x2000, &mut word);
        assert_eq!(word, [0xff; 4]);
        let mut wide = [0xee; 8];
        devices.mmio_read(VIRTIO_BASE + 1, &mut wide);
        assert_eq!(wide, [0; 8], "registers are read whole");
    }
}
