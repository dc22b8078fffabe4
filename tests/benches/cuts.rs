//! Whether a cut costs what was written, or what the guest has: the same dirty sets in a guest of 1 GiB and in
//! one of 1 TiB, with rings and with the bitmap. Both guests take turns in one run, so that whatever else the
//! machine does falls on both; the ratio is what counts.
//!
//! An epoch's cost here is what the guest or its epoch loop waits for: a collect while it runs, the cut, and the
//! resume (that in processor time). Copying the pages out is shown beside it, for comparison.

use anyhow::{Context, ensure};
use colo_common::PAGE_SIZE;
use colo_tests::dirtier::{Dirtier, Mode, Pattern};
use colo_tests::images::{Images, kvm_usable};
use colo_tests::measure::quantile_ms;
use colo_tests::rig::Rig;
use colo_vmm::tracker::Cadence;
use colo_vmm::{DirtySet, ProtectedGuest, Tracked, TrackerKind};
use std::time::{Duration, Instant};

const SMALL: u64 = 1 << 30;
const LARGE: u64 = 1 << 40;
const PAGES: [u64; 3] = [64, 1024, 4096];
const CUTS: usize = 201;
const NAMES: [&str; 2] = ["1 GiB", "1 TiB"];

/// Where the time of one epoch went.
#[derive(Clone, Copy, Default)]
struct Costs {
    collect: Duration,
    cut: Duration,
    resume: Duration,
    copy: Duration,
}

impl Costs {
    /// All but the copy.
    fn epoch(&self) -> Duration {
        self.collect + self.cut + self.resume
    }
}

/// A guest that writes all pages of its working set in every epoch; stopped between two of them.
struct Subject {
    dirtier: Dirtier,
    rig: Rig,
    dirty: DirtySet,
    copy: Vec<u8>,
    samples: Vec<Costs>,
}

impl Subject {
    fn boot(memory_bytes: u64, pages: u64, tracker: TrackerKind) -> anyhow::Result<Self> {
        let dirtier = Dirtier::new(Mode::User, Pattern::Seq, pages);
        let rig = dirtier.boot(dirtier.spec(&Images::find()?, memory_bytes, tracker)?, Cadence::default())?;
        let dirty = DirtySet::new(rig.guest_memory().layout().frame_limit());
        let copy = vec![0; (pages as usize + 65) * PAGE_SIZE];
        let mut subject = Self { dirtier, rig, dirty, copy, samples: Vec::new() };
        // From here on the guest is cut and resumed past its rig, which keeps taking it for running.
        subject.rig.resume()?;
        subject.rig.guest().cut(&mut subject.dirty)?;
        Ok(subject)
    }

    fn epoch(&mut self) -> anyhow::Result<()> {
        self.dirty.clear();
        // It waits for nothing, but to wake a vCPU is to give the core away where cores are few.
        let before = own_processor_time();
        self.rig.guest().resume()?;
        let resume = own_processor_time() - before;
        let event = self.dirtier.run_writes(&mut self.rig, self.dirtier.pages + 64)?;
        ensure!(event.is_none(), "the guest asked for {event:?}");
        let (tracked, collect) = timed(|| Ok(self.rig.guest().collect(&mut self.dirty)?))?;
        let (taken, cut) = timed(|| Ok(self.rig.guest().cut(&mut self.dirty)?))?;
        ensure!((tracked, taken.tracked) == (Tracked::Complete, Tracked::Complete), "writes were lost");
        ensure!(self.dirty.len() >= self.dirtier.pages, "only {} pages are dirty", self.dirty.len());
        let ((), copy) = timed(|| self.copy_out())?;
        self.samples.push(Costs { collect, cut, resume, copy });
        Ok(())
    }

    fn copy_out(&mut self) -> anyhow::Result<()> {
        // To an address a little past a multiple of 4096, where allocators like to begin, a page is copied at less
        // than half the speed: the processor takes each load for one that waits for a store just before it.
        let aligned = self.copy.as_ptr().align_offset(PAGE_SIZE);
        let places = self.copy[aligned..].as_chunks_mut::<PAGE_SIZE>().0;
        ensure!(self.dirty.len() <= places.len() as u64, "{} pages are dirty", self.dirty.len());
        for (gfn, page) in self.dirty.iter().zip(places) {
            self.rig.guest_memory().read_page(gfn, page)?;
        }
        Ok(())
    }

    /// The value below which `fraction` of the samples of a part lie.
    fn quantile_us(&self, fraction: f64, part: impl Fn(&Costs) -> Duration) -> f64 {
        let mut samples: Vec<Duration> = self.samples.iter().map(part).collect();
        quantile_ms(&mut samples, fraction) * 1e3
    }
}

/// Processor time that the calling thread has used.
fn own_processor_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a live `timespec`.
    let ret = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(ret, 0, "a thread can read its own clock");
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn timed<T>(f: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<(T, Duration)> {
    let started = Instant::now();
    let result = f()?;
    Ok((result, started.elapsed()))
}

/// Fixed part and slope of the straight line through (pages, time), by least squares.
fn line(points: &[(f64, f64)]) -> (f64, f64) {
    let n = points.len() as f64;
    let (x, y) = (points.iter().map(|p| p.0).sum::<f64>() / n, points.iter().map(|p| p.1).sum::<f64>() / n);
    let covariance: f64 = points.iter().map(|p| (p.0 - x) * (p.1 - y)).sum();
    let slope = covariance / points.iter().map(|p| (p.0 - x).powi(2)).sum::<f64>();
    (y - slope * x, slope)
}

#[expect(clippy::print_stdout, reason = "its result")]
fn compare(tracker: TrackerKind) -> anyhow::Result<()> {
    println!("\n{tracker:?}, user-mode writes, {CUTS} interleaved epochs: medians in us");
    println!(
        "pages  guest  collect      cut   resume |    epoch     copy | 1 TiB / 1 GiB: median, best tenth"
    );
    let mut lines = [Vec::new(), Vec::new()];
    for pages in PAGES {
        let mut both = [Subject::boot(SMALL, pages, tracker)?, Subject::boot(LARGE, pages, tracker)?];
        for _ in 0..CUTS {
            both.iter_mut()
                .try_for_each(Subject::epoch)
                .with_context(|| format!("{tracker:?}, {pages} pages"))?;
        }
        let ratio = |fraction| {
            let [small, large] = both.each_ref().map(|subject| subject.quantile_us(fraction, Costs::epoch));
            large / small
        };
        let ratios = [String::new(), format!("{:.2}, {:.2}", ratio(0.5), ratio(0.1))];
        for (n, subject) in both.iter().enumerate() {
            let parts: [fn(&Costs) -> Duration; 5] =
                [|c| c.collect, |c| c.cut, |c| c.resume, Costs::epoch, |c| c.copy];
            let [collect, cut, resume, epoch, copy] = parts.map(|part| subject.quantile_us(0.5, part));
            let (name, ratio) = (NAMES[n], &ratios[n]);
            println!(
                "{pages:5}  {name} {collect:8.0} {cut:8.0} {resume:8.0} | {epoch:8.0} {copy:8.0} | {ratio}"
            );
            lines[n].push((pages as f64, epoch));
        }
    }
    for (name, points) in NAMES.iter().zip(&lines) {
        let (fixed, slope) = line(points);
        println!("{name}: {fixed:.0} us fixed + {slope:.3} us a page");
    }
    Ok(())
}

fn main() -> anyhow::Result<()> {
    if !kvm_usable() {
        return Ok(());
    }
    compare(TrackerKind::default())?;
    compare(TrackerKind::Bitmap)
}
