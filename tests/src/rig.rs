//! A guest under test with an image of its memory that is fed from dirty sets alone.

use anyhow::{Context, bail, ensure};
use colo_common::{Epoch, Gfn, History, PAGE_SIZE, Point, Term};
use colo_secondary::image::Image;
use colo_secondary::staging::{Measures, StagedEpoch, StagedPages, StagedPart};
use colo_vmm::egress::Output;
use colo_vmm::guest::GuestEvent;
use colo_vmm::memory::GuestMemory;
use colo_vmm::tracker::Cadence;
use colo_vmm::{Cut, DirtySet, GuestSpec, KvmGuest, MachineState, ProtectedGuest, Tracked};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A protected KVM guest and its image.
pub struct Rig {
    /// Always there but while it is being replaced.
    guest: Option<KvmGuest>,
    spec: GuestSpec,
    cadence: Cadence,
    image: Image,
    /// Names the next point of the image.
    epoch: Epoch,
    dirty: DirtySet,
    /// What the last collect or cut alone has added to `dirty`.
    reported: DirtySet,
    console: Vec<u8>,
    stopped: bool,
    /// Cuts whose dirty set was unknown; each brought a full compare.
    pub losses: u64,
}

/// What a cut of a rig tells.
#[derive(Debug)]
pub struct Taken {
    /// The guest's own account.
    pub cut: Cut,
    /// Frames in the dirty set.
    pub pages: u64,
    /// From the first kick until the pages were copied: how long the guest stood still.
    pub pause: Duration,
}

impl Rig {
    /// Boots a guest, protects it and makes the first full copy.
    ///
    /// # Errors
    /// The guest cannot be built or booted.
    pub fn boot(spec: GuestSpec) -> anyhow::Result<Self> {
        Self::boot_with(spec, Cadence::default())
    }

    /// As [`boot`](Self::boot), with another harvest cadence.
    ///
    /// # Errors
    /// As [`boot`](Self::boot).
    pub fn boot_with(spec: GuestSpec, cadence: Cadence) -> anyhow::Result<Self> {
        let memory = Arc::new(GuestMemory::new(spec.memory_bytes)?);
        let mut guest = KvmGuest::with_memory(spec.clone(), memory, cadence)?;
        guest.boot()?;
        guest.protect()?;
        let image = Image::new(Arc::new(GuestMemory::new(spec.memory_bytes)?), None);
        let dirty = DirtySet::new(guest.memory().layout().frame_limit());
        let (reported, console) = (dirty.clone(), Vec::new());
        let (guest, epoch) = (Some(guest), Epoch(0));
        let mut rig =
            Self { guest, spec, cadence, image, epoch, dirty, reported, console, stopped: true, losses: 0 };
        rig.copy_everything()?;
        Ok(rig)
    }

    /// The guest.
    ///
    /// # Panics
    /// It could not be replaced before.
    pub fn guest(&mut self) -> &mut KvmGuest {
        self.guest.as_mut().expect("a rig has a guest between its calls")
    }

    /// The guest's memory.
    ///
    /// # Panics
    /// As [`guest`](Self::guest).
    pub fn guest_memory(&self) -> &GuestMemory {
        self.guest.as_ref().expect("a rig has a guest between its calls").memory()
    }

    /// Console bytes of all cuts so far.
    pub fn console(&self) -> &[u8] {
        &self.console
    }

    /// The image.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// Lets the guest run.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn resume(&mut self) -> anyhow::Result<()> {
        self.stopped = false;
        Ok(self.guest().resume()?)
    }

    /// Runs for `time`, or until something asks for a cut.
    ///
    /// # Errors
    /// The guest fails.
    pub fn run(&mut self, time: Duration) -> anyhow::Result<Option<GuestEvent>> {
        if self.stopped {
            self.resume()?;
        }
        match self.guest().next_event(time) {
            Some(GuestEvent::Failed(failure)) => {
                bail!("the guest failed: {failure}; console:\n{}", self.tail())
            }
            event => Ok(event),
        }
    }

    /// Takes what is known to be dirty while the guest runs; the pages come with the next cut.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn collect(&mut self) -> anyhow::Result<Tracked> {
        let guest = self.guest.as_mut().context("no guest")?;
        self.reported.clear();
        let tracked = guest.collect(&mut self.reported)?;
        self.dirty.union_with(&self.reported);
        Ok(tracked)
    }

    /// Frames that the last collect or cut reported by itself. After a collect their bytes may be read at once.
    pub fn reported(&self) -> &DirtySet {
        &self.reported
    }

    /// Cuts, copies the dirty pages into the image, and leaves the guest stopped.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn cut(&mut self) -> anyhow::Result<Taken> {
        let started = Instant::now();
        let guest = self.guest.as_mut().context("no guest")?;
        self.reported.clear();
        let cut = guest.cut(&mut self.reported)?;
        self.dirty.union_with(&self.reported);
        self.stopped = true;
        ensure!(cut.output.start.console == self.console.len() as u64, "console output left a gap");
        let pages = copy(self.guest_memory(), self.dirty.runs())?;
        let pause = started.elapsed();
        self.console.extend(cut.output.console());
        if cut.tracked == Tracked::Complete {
            let staged = self.staged(&cut, pages);
            self.image.apply(&staged)?;
        } else {
            self.losses += 1;
            self.copy_everything()?;
        }
        let pages = self.dirty.len();
        self.dirty.clear();
        Ok(Taken { pages, cut, pause })
    }

    /// The image equals the stopped guest's memory.
    ///
    /// # Errors
    /// It does not, with the first frames that differ.
    pub fn check_image(&self) -> anyhow::Result<()> {
        let guest = self.guest.as_ref().context("no guest")?;
        let (memory, image) = (guest.memory(), self.image.memory());
        if memory.digest()? == image.digest()? {
            return Ok(());
        }
        bail!("{:?} differs from the guest at frames {:?}", self.image.point(), differing(memory, image)?)
    }

    /// Tears the stopped guest down and carries on from `state` and the image in a new VM. The state goes
    /// through its encoded form, as it would over the wire. The old memory becomes the image.
    ///
    /// # Errors
    /// The image is not the guest's memory, or the new VM cannot be built or set.
    pub fn replace(&mut self, state: &MachineState) -> anyhow::Result<Duration> {
        ensure!(self.stopped, "only a stopped guest can be replaced");
        self.check_image()?;
        let bytes = state.encode();
        let old = Arc::clone(self.guest().memory());
        self.guest = None;
        let point = self.image.point();
        let image = std::mem::replace(&mut self.image, Image::new(old, point));
        let started = Instant::now();
        let mut guest = KvmGuest::with_memory(self.spec.clone(), image.into_memory(), self.cadence)?;
        // Restoring writes guest memory (kvmclock's wall clock), so tracking is on before it.
        guest.protect()?;
        guest.restore(&MachineState::decode(&bytes)?)?;
        let took = started.elapsed();
        self.image.memory().track_writes(false);
        self.guest = Some(guest);
        Ok(took)
    }

    /// Runs until the console holds `text` after byte `from`, cutting every 25 ms.
    ///
    /// # Errors
    /// It does not come within `limit`, or the guest fails.
    pub fn run_until(&mut self, text: &str, from: usize, limit: Duration) -> anyhow::Result<()> {
        let started = Instant::now();
        while !contains(&self.console[from.min(self.console.len())..], text.as_bytes()) {
            ensure!(
                started.elapsed() < limit,
                "no {text:?} within {limit:?}; console ends:\n{}",
                self.tail()
            );
            self.run(Duration::from_millis(25))?;
            self.cut()?;
        }
        Ok(())
    }

    /// The end of the console, for messages.
    pub fn tail(&self) -> String {
        let from = self.console.len().saturating_sub(2000);
        String::from_utf8_lossy(&self.console[from..]).into_owned()
    }

    /// The epoch that a cut ends, as a secondary has it once it is received whole.
    fn staged(&mut self, cut: &Cut, pages: StagedPart) -> StagedEpoch {
        self.epoch = self.epoch.next();
        let point = Point { term: Term(1), epoch: self.epoch };
        let mut history = History::default();
        history.extend(point);
        StagedEpoch {
            point,
            base: self.image.point(),
            history,
            bytes: pages.pages.as_ref().map_or(0, StagedPages::bytes),
            parts: vec![pages],
            blocks: Vec::new(),
            state: cut.state.clone(),
            output: Output { start: cut.output.start, items: Vec::new() },
            released: cut.output.start,
            promotions: 0,
            measures: Measures::default(),
        }
    }

    /// The first copy of a stopped guest, and the way back after writes that were not tracked. The next cut's epoch
    /// makes it a point.
    ///
    /// # Errors
    /// Memory cannot be read.
    pub fn copy_everything(&mut self) -> anyhow::Result<()> {
        let memory = Arc::clone(self.guest().memory());
        self.image.begin_seed(false)?;
        let everything = copy(&memory, memory.populated()?.into_iter())?;
        Ok(self.image.write_seed(&everything)?)
    }
}

/// The bytes of these frames.
fn copy(memory: &GuestMemory, runs: impl Iterator<Item = (Gfn, u64)>) -> anyhow::Result<StagedPart> {
    let runs: Vec<(Gfn, u64)> = runs.collect();
    let frames: u64 = runs.iter().map(|&(_, count)| count).sum();
    let mut bytes = vec![0; usize::try_from(frames)? * PAGE_SIZE];
    let mut rest = &mut bytes[..];
    for &(first, count) in &runs {
        let (these, after) = rest.split_at_mut(usize::try_from(count)? * PAGE_SIZE);
        memory.read_frames(first, these)?;
        rest = after;
    }
    Ok(StagedPart { zeros: Vec::new(), pages: Some(StagedPages::new(runs, bytes.into())) })
}

fn differing(a: &GuestMemory, b: &GuestMemory) -> anyhow::Result<Vec<Gfn>> {
    let mut frames = Vec::new();
    let (mut left, mut right) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
    for (first, count) in a.populated()?.into_iter().chain(b.populated()?) {
        for gfn in (first.0..first.0 + count).map(Gfn) {
            a.read_page(gfn, &mut left)?;
            b.read_page(gfn, &mut right)?;
            if left != right && !frames.contains(&gfn) && frames.len() < 16 {
                frames.push(gfn);
            }
        }
    }
    Ok(frames)
}

/// Whether `text` occurs in `bytes`.
pub fn contains(bytes: &[u8], text: &[u8]) -> bool {
    bytes.windows(text.len()).any(|window| window == text)
}
