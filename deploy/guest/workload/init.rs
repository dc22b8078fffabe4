// SPDX-License-Identifier: Apache-2.0
//! What the first process of the guest does before and after its real work.
//!
//! The workload is its own /init: where kernel mode is emulated, a shell script with three mounts costs seconds of
//! fork and exec.

use crate::sys::{self, Stop};
use std::fs::{self, File};
use std::process::Command;

/// Written by the build for kernels with modules: their paths, in order of loading.
const MODULE_LIST: &str = "/lib/modules.load";

/// Whether this process is the first one, with all that has to be done once.
pub(crate) fn is_first_process() -> bool {
    std::process::id() == 1
}

/// Mounts what programs expect and loads the modules of a kernel that has some. Nothing here is fatal: the kernel may
/// lack what is asked for (no sysfs in the small one), and a workload that needs it will say so.
pub(crate) fn set_up() {
    for (kind, target) in [(c"devtmpfs", c"/dev"), (c"proc", c"/proc"), (c"sysfs", c"/sys")] {
        let _ = sys::mount(kind, target);
    }
    for path in fs::read_to_string(MODULE_LIST).unwrap_or_default().lines() {
        if let Err(error) = File::open(path).and_then(|file| sys::load_module(&file)) {
            println!("init: {path}: {error}");
        }
    }
}

/// Runs a command of the kernel's command line in place of the workload, and waits for it.
pub(crate) fn run(command: &[String]) {
    let result = Command::new(&command[0]).args(&command[1..]).env("PATH", "/bin:/sbin").status();
    match result {
        Ok(status) => println!("init: {} ended, {status}", command[0]),
        Err(error) => println!("init: {}: {error}", command[0]),
    }
}

/// Stops the machine, after the console has sent everything.
pub(crate) fn stop(how: Stop) -> ! {
    sys::drain(1);
    sys::stop(how);
    // A kernel that cannot do what was asked for has halted above, or returned an error: rest, as a halted one does.
    loop {
        std::thread::park();
    }
}
