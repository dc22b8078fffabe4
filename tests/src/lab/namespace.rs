//! Network namespaces without a name: each lives as long as a thread is in it or a descriptor of it is open.

use anyhow::Context;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// A network namespace.
#[derive(Debug)]
pub struct Namespace {
    file: File,
}

impl Namespace {
    /// The one that the calling thread is in.
    ///
    /// # Errors
    /// It cannot be told.
    pub fn of_this_thread() -> anyhow::Result<Self> {
        let path = "/proc/thread-self/ns/net";
        Ok(Self { file: File::open(path).with_context(|| format!("cannot open {path}"))? })
    }

    /// A new, empty one; nobody is in it yet.
    ///
    /// # Errors
    /// This process may not: it takes CAP_SYS_ADMIN.
    pub fn fresh() -> anyhow::Result<Self> {
        // Made by a thread that ends: a thread can make a namespace only for itself.
        on_a_thread(|| {
            // SAFETY: the call changes what this thread sees of the network, and touches no memory of ours.
            let made = unsafe { libc::unshare(libc::CLONE_NEWNET) };
            checked(made).context("cannot make a network namespace")?;
            Self::of_this_thread()
        })
    }

    /// Moves the calling thread into it, and with it all threads and processes that it starts from then on.
    ///
    /// # Errors
    /// The system refuses.
    pub fn enter(&self) -> anyhow::Result<()> {
        // SAFETY: the descriptor is a namespace's and open through the call, which touches no memory of ours.
        let entered = unsafe { libc::setns(self.file.as_raw_fd(), libc::CLONE_NEWNET) };
        checked(entered).context("cannot enter a network namespace")
    }

    /// Does something in it, on a thread of its own.
    ///
    /// # Errors
    /// It cannot be entered.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
        on_a_thread(|| self.enter().map(|()| work()))
    }

    /// Has `command` run in it.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn house(&self, command: &mut Command) -> anyhow::Result<()> {
        let inside = self.try_clone()?;
        let enter = move || {
            // SAFETY: as in `enter`; the closure owns the descriptor, which is open in the child as well.
            checked(unsafe { libc::setns(inside.file.as_raw_fd(), libc::CLONE_NEWNET) })
        };
        // SAFETY: between fork and exec only calls that are safe in a signal handler are allowed; setns is a plain system
        // call, and an error of the system's takes no memory.
        unsafe { command.pre_exec(enter) };
        Ok(())
    }

    /// Another descriptor of it.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn try_clone(&self) -> anyhow::Result<Self> {
        Ok(Self { file: self.file.try_clone().context("a namespace's descriptor")? })
    }

    /// Where programs find it, as long as this value lives.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }
}

/// The result of `work`, done by a thread that ends with it. A panic is passed on.
fn on_a_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| scope.spawn(work).join())
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn checked(ret: libc::c_int) -> io::Result<()> {
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
