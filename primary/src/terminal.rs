//! Runs a guest without protection on the terminal that started it: what the guest says goes out at once.

use anyhow::{Context, bail};
use colo_common::limits::MAX_CONSOLE_INPUT;
use colo_vmm::egress::Output;
use colo_vmm::guest::{GuestEvent, Lifecycle};
use colo_vmm::{KvmGuest, ProtectedGuest};
use std::io::{IsTerminal, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};
use vmm_sys_util::terminal::Terminal;

use crate::outlet::Network;

/// How often console output is handed on while nothing else happens.
const POLL: Duration = Duration::from_millis(5);
/// A guest that resets itself sooner than this after it began waits until then: one whose kernel faults at once
/// would else do nothing but load its images, as fast as this host can.
const RESET_INTERVAL: Duration = Duration::from_secs(1);
/// Typed at the terminal, ends the run: Ctrl-] as in telnet.
const ESCAPE: u8 = 0x1d;

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest powered off, or the operator ended the run.
    Off,
    /// A test guest ended itself with this value.
    DebugExit(u32),
}

/// Runs a booted guest until it ends, resetting it when it asks for that.
///
/// # Errors
/// The guest fails, or the terminal does.
pub fn run(guest: &mut KvmGuest, mut network: Option<Network>) -> anyhow::Result<End> {
    network.iter().for_each(|network| network.set_carrier(true));
    let stdin = std::io::stdin();
    let raw = stdin.is_terminal().then(|| stdin.lock().set_raw_mode());
    if let Some(Err(e)) = &raw {
        tracing::warn!("the terminal stays in line mode: {e}");
    }
    let end = serve(guest, network.as_mut(), &keyboard());
    if let Some(Ok(())) = raw {
        stdin.lock().set_canon_mode().context("cannot set the terminal back to line mode")?;
    }
    end
}

fn serve(
    guest: &mut KvmGuest,
    mut network: Option<&mut Network>,
    keys: &Receiver<Vec<u8>>,
) -> anyhow::Result<End> {
    guest.resume()?;
    let mut typed = Vec::new();
    // Until then it stands still after a reset.
    let mut begins = None;
    let mut began = Instant::now();
    loop {
        if begins.is_some_and(|at| at <= Instant::now()) {
            guest.resume()?;
            (begins, began) = (None, Instant::now());
        }
        let event = guest.next_event(POLL);
        pass_on(guest, network.as_deref_mut())?;
        // What the guest does not read waits at the keyboard, not here.
        if typed.len() < MAX_CONSOLE_INPUT {
            typed.extend(keys.try_recv().unwrap_or_default());
        }
        if typed.contains(&ESCAPE) {
            return Ok(End::Off);
        }
        let taken = guest.console_input(&typed);
        typed.drain(..taken);
        match event {
            None | Some(GuestEvent::OutputFull | GuestEvent::Output) => {}
            Some(GuestEvent::Failed(failure)) => bail!("the guest cannot run on: {failure}"),
            Some(GuestEvent::TrackingLost(loss)) => bail!("{loss} in a guest that is not tracked"),
            Some(GuestEvent::Lifecycle(lifecycle)) => {
                if let Some(end) = obey(guest, network.as_deref_mut(), lifecycle)? {
                    return Ok(end);
                }
                begins = Some(began + RESET_INTERVAL);
            }
        }
    }
}

/// Does what the guest asked for; after a reset it has still to be resumed.
fn obey(
    guest: &mut KvmGuest,
    mut network: Option<&mut Network>,
    lifecycle: Lifecycle,
) -> anyhow::Result<Option<End>> {
    let end = match lifecycle {
        Lifecycle::Shutdown => Some(End::Off),
        Lifecycle::DebugExit(value) => Some(End::DebugExit(value)),
        Lifecycle::Reset(cause) => {
            tracing::info!(?cause, "the guest resets itself");
            let mut unused = colo_vmm::DirtySet::new(guest.memory().layout().frame_limit());
            let cut = guest.cut(&mut unused)?;
            say(&cut.output, network.as_deref_mut())?;
            guest.reset()?;
            None
        }
    };
    pass_on(guest, network)?;
    Ok(end)
}

fn pass_on(guest: &mut KvmGuest, network: Option<&mut Network>) -> anyhow::Result<()> {
    say(&guest.drain_output(), network)
}

fn say(output: &Output, network: Option<&mut Network>) -> anyhow::Result<()> {
    if let Some(network) = network {
        network.let_out(output);
    }
    write_out(&output.console())
}

fn write_out(bytes: &[u8]) -> anyhow::Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    let mut out = std::io::stdout().lock();
    out.write_all(bytes)
        .and_then(|()| out.flush())
        .context("cannot write the guest's console to standard output")
}

/// Reads standard input on a thread of its own; it ends with the input or with the process.
fn keyboard() -> Receiver<Vec<u8>> {
    let (keys_in, keys) = mpsc::sync_channel(16);
    let reader = move || {
        let mut stdin = std::io::stdin();
        let mut buffer = [0; 1024];
        while let Ok(count @ 1..) = stdin.read(&mut buffer) {
            if keys_in.send(buffer[..count].to_vec()).is_err() {
                break;
            }
        }
        tracing::debug!(fd = stdin.as_raw_fd(), "console input ended");
    };
    if let Err(e) = std::thread::Builder::new().name("keyboard".to_owned()).spawn(reader) {
        tracing::warn!("no console input: {e}");
    }
    keys
}
