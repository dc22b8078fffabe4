// SPDX-License-Identifier: Apache-2.0
//! What reaches the guest from outside while it works: a word on the console, and the power button.

use crate::sys;
use std::fs::File;
use std::os::fd::AsRawFd;

const CONSOLE: i32 = 0;
/// The ACPI power button: the only input device that these guests have, where they have one.
const BUTTON_PATH: &str = "/dev/input/event0";
/// No order is longer: what does not fit is none.
const LINE_MAX: usize = 256;
const WAIT_MS: i32 = 60_000;

/// Why the work is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// As the arguments say: the work is done, or somebody wrote `poweroff`.
    End,
    /// Somebody wrote `reboot`.
    Reboot,
    /// The power button.
    Button,
}

pub(crate) struct Orders {
    /// Until the console has come to its end.
    console: bool,
    button: Option<File>,
}

impl Orders {
    pub(crate) fn open() -> Self {
        Self { console: true, button: File::open(BUTTON_PATH).ok() }
    }

    /// The order that comes within the time, if any. Waits also when nothing can come.
    pub(crate) fn take(&mut self, timeout_ms: i32) -> Option<Order> {
        // A negative descriptor is not polled.
        let console = if self.console { CONSOLE } else { -1 };
        let button = self.button.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        let [line, pressed] = sys::readable([console, button], timeout_ms);
        if pressed && is_power_key(button) {
            return Some(Order::Button);
        }
        if line { self.read_line() } else { None }
    }

    /// Waits for an order, for ever.
    pub(crate) fn wait(&mut self) -> Order {
        loop {
            if let Some(order) = self.take(WAIT_MS) {
                return order;
            }
        }
    }

    fn read_line(&mut self) -> Option<Order> {
        let mut buffer = [0; LINE_MAX];
        // The terminal gives a line at a time.
        let Ok(read @ 1..) = sys::read(CONSOLE, &mut buffer) else {
            self.console = false;
            return None;
        };
        match buffer[..read].trim_ascii() {
            b"poweroff" => Some(Order::End),
            b"reboot" => Some(Order::Reboot),
            _ => {
                crate::say("colo-service knows two orders: poweroff, reboot");
                None
            }
        }
    }
}

/// Reads events and looks for KEY_POWER going down among them. An event is 24 bytes: a time of 16, type, code, value.
fn is_power_key(button: i32) -> bool {
    const KEY_POWER_DOWN: [u8; 8] = [1, 0, 116, 0, 1, 0, 0, 0];
    let mut events = [0; 24 * 8];
    let read = sys::read(button, &mut events).unwrap_or(0);
    events[..read].chunks_exact(24).any(|event| event[16..] == KEY_POWER_DOWN)
}
