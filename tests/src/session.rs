//! An unprotected guest and its console, for tests that go by what the guest says.

use anyhow::{Context, bail, ensure};
use colo_vmm::guest::{GuestEvent, GuestFailure, Lifecycle};
use colo_vmm::tracker::Cadence;
use colo_vmm::{Backends, GuestMemory, GuestSpec, KvmGuest, ProtectedGuest};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often output is taken while nothing else happens.
const POLL: Duration = Duration::from_millis(5);

/// Longer than any step of a guest takes on a host that others load as well: only a guest that stands still
/// comes near it.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// A guest that runs, and what it has said.
pub struct Session {
    guest: KvmGuest,
    console: Vec<u8>,
    /// Where the search for the next text begins.
    seen: usize,
    /// What ended the guest's run.
    ended: Option<GuestEvent>,
}

impl Session {
    /// Boots a guest and lets it run.
    ///
    /// # Errors
    /// It cannot be built or booted.
    pub fn start(spec: GuestSpec) -> anyhow::Result<Self> {
        Self::start_on(spec, &Backends::default())
    }

    /// The same, with devices on these parts of the host.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_on(spec: GuestSpec, backends: &Backends) -> anyhow::Result<Self> {
        let memory = Arc::new(GuestMemory::new(spec.memory_bytes)?);
        let mut guest = KvmGuest::on(spec, memory, backends, Cadence::default())?;
        guest.boot()?;
        guest.resume()?;
        Ok(Self { guest, console: Vec::new(), seen: 0, ended: None })
    }

    /// The guest.
    pub fn guest(&mut self) -> &mut KvmGuest {
        &mut self.guest
    }

    /// Everything it said.
    pub fn console(&self) -> &[u8] {
        &self.console
    }

    /// As [`console`](Self::console), for people and for searching.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.console).into_owned()
    }

    /// Runs until the guest says `text`, later than all texts waited for before; returns what it said up to
    /// there, `text` included.
    ///
    /// # Errors
    /// It ends before, or does not say it in time.
    pub fn until(&mut self, text: &str) -> anyhow::Result<String> {
        let started = Instant::now();
        // Only new bytes are searched, with an overlap in which the text could have begun.
        let mut from = self.seen;
        loop {
            if let Some(at) = find(&self.console[from..], text.as_bytes()) {
                let said = self.seen..from + at + text.len();
                self.seen = said.end;
                return Ok(String::from_utf8_lossy(&self.console[said]).into_owned());
            }
            from = from.max(self.console.len().saturating_sub(text.len()));
            if let Some(event) = &self.ended {
                bail!("{event:?} before {text:?}; console:\n{}", self.text());
            }
            ensure!(started.elapsed() < PATIENCE, "no {text:?} in {PATIENCE:?}; console:\n{}", self.text());
            self.step();
        }
    }

    /// Types `text`; waits while the guest has not read what was typed before.
    ///
    /// # Errors
    /// It does not read.
    pub fn type_in(&mut self, text: &str) -> anyhow::Result<()> {
        let started = Instant::now();
        let mut rest = text.as_bytes();
        loop {
            rest = &rest[self.guest.console_input(rest)..];
            if rest.is_empty() {
                return Ok(());
            }
            ensure!(started.elapsed() < PATIENCE, "the guest reads no input; console:\n{}", self.text());
            self.step();
        }
    }

    /// Runs until the guest asks for a change of its life.
    ///
    /// # Errors
    /// It fails, or does not ask in time.
    pub fn end(&mut self) -> anyhow::Result<Lifecycle> {
        match self.ended()? {
            GuestEvent::Lifecycle(lifecycle) => Ok(lifecycle),
            other => bail!("{other:?}; console:\n{}", self.text()),
        }
    }

    /// Runs until the guest fails.
    ///
    /// # Errors
    /// It ends in another way, or does not end in time.
    pub fn failure(&mut self) -> anyhow::Result<GuestFailure> {
        match self.ended()? {
            GuestEvent::Failed(failure) => Ok(failure),
            other => bail!("{other:?} of a guest that should fail; console:\n{}", self.text()),
        }
    }

    fn ended(&mut self) -> anyhow::Result<GuestEvent> {
        let started = Instant::now();
        while self.ended.is_none() {
            ensure!(started.elapsed() < PATIENCE, "no end in {PATIENCE:?}; console:\n{}", self.text());
            self.step();
        }
        self.ended.clone().context("ended")
    }

    fn step(&mut self) {
        let event = self.guest.next_event(POLL);
        self.console.extend(self.guest.drain_output().console());
        if !matches!(event, None | Some(GuestEvent::OutputFull)) {
            self.ended = event;
        }
    }
}

/// Where `text` begins in `bytes`.
pub fn find(bytes: &[u8], text: &[u8]) -> Option<usize> {
    bytes.windows(text.len()).position(|window| window == text)
}
