// SPDX-License-Identifier: Apache-2.0
//! What reaches the guest from outside while it works: lines on the console, and the power button.

use crate::args::End;
use crate::sys::{self, Stop};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

const CONSOLE: i32 = 0;
/// The ACPI power button: the only input device that these guests have.
const BUTTON_PATH: &str = "/dev/input/event0";

pub(crate) struct Input {
    /// Until the console has come to its end.
    echo: bool,
    button: Option<File>,
}

impl Input {
    pub(crate) fn open(echo: bool, button: bool) -> io::Result<Self> {
        let button = button.then(|| File::open(BUTTON_PATH)).transpose()?;
        Ok(Self { echo, button })
    }

    /// Whether there is anything to listen to.
    pub(crate) fn is_open(&self) -> bool {
        self.echo || self.button.is_some()
    }

    /// Takes what comes within the time, if anything: a line is printed back, the power button is an end.
    pub(crate) fn take(&mut self, timeout_ms: i32) -> Result<(), End> {
        if !self.is_open() {
            return Ok(());
        }
        // A negative descriptor is not polled.
        let console = if self.echo { CONSOLE } else { -1 };
        let button = self.button.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        let [line, pressed] = sys::readable([console, button], timeout_ms);
        if line {
            self.echo = echo_line();
        }
        if pressed && is_power_key(button) {
            sys::write_all(1, b"colo-button power\n");
            return Err(End::Stop(Stop::PowerOff));
        }
        Ok(())
    }
}

/// Prints a line of input back. False if there will be no more input.
fn echo_line() -> bool {
    const PREFIX: &[u8] = b"echo ";
    let mut buffer = [0; 256];
    let end = buffer.len() - 1;
    buffer[..PREFIX.len()].copy_from_slice(PREFIX);
    // The terminal gives a line at a time; one too long for the buffer comes back in pieces.
    let Ok(read @ 1..) = sys::read(CONSOLE, &mut buffer[PREFIX.len()..end]) else { return false };
    let mut used = PREFIX.len() + read;
    if buffer[used - 1] != b'\n' {
        buffer[used] = b'\n';
        used += 1;
    }
    sys::write_all(1, &buffer[..used]);
    true
}

/// Reads events and looks for KEY_POWER going down among them. An event is 24 bytes: a time of 16, type, code, value.
fn is_power_key(button: i32) -> bool {
    const KEY_POWER_DOWN: [u8; 8] = [1, 0, 116, 0, 1, 0, 0, 0];
    let mut events = [0; 24 * 8];
    let read = sys::read(button, &mut events).unwrap_or(0);
    events[..read].chunks_exact(24).any(|event| event[16..] == KEY_POWER_DOWN)
}
