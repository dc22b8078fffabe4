//! The guest program dirty.elf from the host's side: it writes the number that the host gives it to the pages of
//! its working set, for ever, so that a tracker of writes can be proved right.

use anyhow::{Context, ensure};
use colo_common::Gfn;
use colo_vmm::guest::GuestEvent;
use colo_vmm::tracker::Cadence;
use colo_vmm::{GuestMemory, GuestSpec, TrackerKind};
use std::fmt;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};

use crate::images::Images;
use crate::rig::Rig;

/// Frame of the words that host and guest share.
pub const CONTROL: Gfn = Gfn(0x200);

const MAGIC: u64 = 0x5452_4944_4f4c_4f43;
const READY_WORD: u64 = 0;
const NUMBER_WORD: u64 = 1;
const FIRST_COUNT_WORD: u64 = 8;

/// Longest time that anything here may take; emulated guests on a busy host are slow.
const LIMIT: Duration = Duration::from_secs(120);

/// Which of the guest's privilege levels writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// CPL 0, which some hosts emulate: then every single write is logged.
    Kernel,
    /// CPL 3, always native: the first write to each protected page is logged.
    User,
}

/// In which order pages are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Round and round.
    Seq,
    /// Drawn from a seed.
    Rand,
}

/// What the program shall do.
#[derive(Clone, Debug)]
pub struct Dirtier {
    /// Who writes.
    pub mode: Mode,
    /// In which order.
    pub pattern: Pattern,
    /// How many pages.
    pub pages: u64,
    /// Address of the first one.
    pub base: u64,
    /// Bytes from one to the next.
    pub stride: u64,
    /// vCPUs that write: each its own word of every page.
    pub cpus: u32,
    /// Fill whole pages with `rep stosq` instead of one word.
    pub fill: bool,
    /// For [`Pattern::Rand`].
    pub seed: u64,
}

impl Dirtier {
    /// One vCPU that writes a word into each of `pages` pages from 16 MiB on.
    pub fn new(mode: Mode, pattern: Pattern, pages: u64) -> Self {
        Self { mode, pattern, pages, base: 16 << 20, stride: 4096, cpus: 1, fill: false, seed: 1 }
    }

    /// The guest.
    ///
    /// # Errors
    /// The program was not prepared.
    pub fn spec(
        &self,
        images: &Images,
        memory_bytes: u64,
        tracker: TrackerKind,
    ) -> anyhow::Result<GuestSpec> {
        let mode = if self.mode == Mode::User { "user" } else { "kernel" };
        let pattern = if self.pattern == Pattern::Seq { "seq" } else { "rand" };
        let Self { pages, base, stride, cpus, seed, .. } = self;
        let fill = u8::from(self.fill);
        let line = format!(
            "pages={pages} base={base} stride={stride} cpus={cpus} seed={seed} rep={fill} mode={mode} pattern={pattern}"
        );
        Ok(GuestSpec {
            tracker,
            overcommit: true,
            ..images.bare("dirty.elf", self.cpus, memory_bytes, &line)?
        })
    }

    /// A rig whose guest has begun to write; stopped.
    ///
    /// # Errors
    /// The guest cannot be built, or does not get that far.
    pub fn boot(&self, spec: GuestSpec, cadence: Cadence) -> anyhow::Result<Rig> {
        let mut rig = Rig::boot_with(spec, cadence)?;
        self.run_until_ready(&mut rig)?;
        Ok(rig)
    }

    /// Runs a guest that was booted or reset until it writes; leaves it stopped.
    ///
    /// # Errors
    /// It does not get that far.
    pub fn run_until_ready(&self, rig: &mut Rig) -> anyhow::Result<()> {
        let started = Instant::now();
        // What an earlier life of the guest left there would pass for readiness.
        write_word(rig.guest_memory(), READY_WORD, 0)?;
        while read_word(rig.guest_memory(), READY_WORD)? != MAGIC || self.fewest_writes(rig)? == 0 {
            ensure!(started.elapsed() < LIMIT, "dirty.elf does not start; console:\n{}", rig.tail());
            rig.run(Duration::from_millis(2))?;
            rig.cut()?;
        }
        Ok(())
    }

    /// Frames of the working set.
    pub fn frames(&self) -> impl Iterator<Item = Gfn> + '_ {
        (0..self.pages).map(|n| Gfn::containing(self.base + n * self.stride))
    }

    /// Writes that the slowest vCPU has made, as far as the guest has told.
    ///
    /// # Errors
    /// Memory cannot be read.
    pub fn fewest_writes(&self, rig: &Rig) -> anyhow::Result<u64> {
        let counts =
            (0..u64::from(self.cpus)).map(|cpu| read_word(rig.guest_memory(), FIRST_COUNT_WORD + cpu));
        let counts = counts.collect::<anyhow::Result<Vec<_>>>()?;
        counts.into_iter().min().context("no vCPU")
    }

    /// Runs until every vCPU has made `count` writes more, or until something asks for a cut.
    ///
    /// # Errors
    /// The guest fails, or does not write.
    pub fn run_writes(&self, rig: &mut Rig, count: u64) -> anyhow::Result<Option<GuestEvent>> {
        let (started, until) = (Instant::now(), self.fewest_writes(rig)? + count);
        while self.fewest_writes(rig)? < until {
            if let Some(event) = rig.run(Duration::from_micros(100))? {
                return Ok(Some(event));
            }
            ensure!(started.elapsed() < LIMIT, "dirty.elf makes no {count} writes in {LIMIT:?}");
        }
        Ok(None)
    }

    /// Has the guest write `number` from now on: a write of this process, as a device would make it.
    ///
    /// # Errors
    /// Memory cannot be written.
    pub fn set_number(rig: &Rig, number: u64) -> anyhow::Result<()> {
        write_word(rig.guest_memory(), NUMBER_WORD, number)
    }
}

impl fmt::Display for Dirtier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { mode, pattern, pages, cpus, fill, .. } = self;
        write!(f, "{mode:?} {pattern:?} pages={pages} cpus={cpus}{}", if *fill { " fill" } else { "" })
    }
}

fn read_word(memory: &GuestMemory, word: u64) -> anyhow::Result<u64> {
    Ok(memory.ram().load(word_address(word), Ordering::Acquire)?)
}

fn write_word(memory: &GuestMemory, word: u64, value: u64) -> anyhow::Result<()> {
    Ok(memory.ram().store(value, word_address(word), Ordering::Release)?)
}

fn word_address(word: u64) -> GuestAddress {
    GuestAddress(CONTROL.address() + 8 * word)
}
