//! The synthetic guest against itself, against a mirror that lives on dirty sets, and against the checker of
//! the Linux workload's console.

#[path = "../../../../deploy/guest/workload/chain.rs"]
#[allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    reason = "the workload's own file, of which this uses a part"
)]
mod workload;

mod disk;
mod life;
mod limits;
mod tracking;
mod twins;

use super::{Program, SyntheticConfig, SyntheticGuest, Tracking};
use crate::dirty_set::DirtySet;
use crate::egress::{Output, OutputItem, OutputPosition};
use crate::guest::ProtectedGuest;
use crate::memory::GuestMemory;
use crate::spec::{BootFile, BootSource, GuestSpec, TrackerKind};
use colo_common::{Gfn, PAGE_SIZE};
use std::path::PathBuf;

const ENTRIES: u32 = 256;

fn spec(vcpus: u32, memory_bytes: u64, tracker: TrackerKind) -> GuestSpec {
    let image = BootFile { path: PathBuf::new(), bytes: Vec::new().into() };
    let spec = GuestSpec::new("test", memory_bytes, BootSource::Flat { image, address: 0 });
    GuestSpec { vcpus, tracker, ..spec }
}

fn ring_spec(vcpus: u32) -> GuestSpec {
    spec(vcpus, 4 << 20, TrackerKind::Ring { entries: 1024 })
}

/// Small rings that nobody but the test harvests.
fn bare_rings() -> Tracking {
    Tracking { ring_entries: Some(ENTRIES), harvest_every: 0, quarter: false, ..Tracking::default() }
}

fn guest(spec: GuestSpec, program: &Program, tracking: &Tracking) -> SyntheticGuest {
    let config = SyntheticConfig { program: program.clone(), tracking: tracking.clone() };
    SyntheticGuest::new(spec, config).unwrap()
}

fn guest_of(program: &Program) -> SyntheticGuest {
    guest(ring_spec(2), program, &Tracking::default())
}

fn running(program: &Program, tracking: &Tracking) -> SyntheticGuest {
    let mut guest = guest(ring_spec(2), program, tracking);
    guest.boot().unwrap();
    guest.resume().unwrap();
    guest
}

fn dirty_for(guest: &SyntheticGuest) -> DirtySet {
    DirtySet::new(guest.memory().layout().frame_limit())
}

fn cut(guest: &mut SyntheticGuest) -> crate::guest::Cut {
    let mut dirty = dirty_for(guest);
    guest.cut(&mut dirty).unwrap()
}

fn copy_all(from: &GuestMemory, to: &GuestMemory) {
    for (first, frames) in to.populated().unwrap() {
        (first.0..first.0 + frames).for_each(|gfn| to.write_page(Gfn(gfn), &[0; PAGE_SIZE]).unwrap());
    }
    let mut page = [0; PAGE_SIZE];
    for (first, frames) in from.populated().unwrap() {
        for gfn in (first.0..first.0 + frames).map(Gfn) {
            from.read_page(gfn, &mut page).unwrap();
            to.write_page(gfn, &page).unwrap();
        }
    }
}

/// Another node's copy of guest memory: takes what dirty sets name and nothing else.
struct Mirror {
    memory: GuestMemory,
    dirty: DirtySet,
}

impl Mirror {
    fn of(guest: &SyntheticGuest) -> Self {
        let memory = GuestMemory::new(guest.memory().layout().bytes()).unwrap();
        copy_all(guest.memory(), &memory);
        Self { memory, dirty: dirty_for(guest) }
    }

    /// Reads the pages of the dirty set, as an epoch builder does right after a collect or a cut.
    fn update(&mut self, guest: &SyntheticGuest) {
        let mut page = [0; PAGE_SIZE];
        for gfn in self.dirty.iter() {
            guest.memory().read_page(gfn, &mut page).unwrap();
            self.memory.write_page(gfn, &page).unwrap();
        }
        self.dirty.clear();
    }

    fn equals(&self, guest: &SyntheticGuest) -> bool {
        self.memory.digest().unwrap() == guest.memory().digest().unwrap()
    }
}

/// All output of a guest's life, joined over the cuts.
#[derive(Debug, Default, PartialEq, Eq)]
struct Transcript {
    end: OutputPosition,
    items: Vec<OutputItem>,
}

impl Transcript {
    fn add(&mut self, output: Output) {
        assert_eq!(output.start, self.end, "output is missing or came twice");
        for item in output.items {
            match (self.items.last_mut(), item) {
                (Some(OutputItem::Console(last)), OutputItem::Console(more)) => {
                    self.end.console += more.len() as u64;
                    last.extend(more);
                }
                (_, item) => {
                    match &item {
                        OutputItem::Console(bytes) => self.end.console += bytes.len() as u64,
                        OutputItem::Frame { .. } => self.end.frames += 1,
                    }
                    self.items.push(item);
                }
            }
        }
    }

    fn console(&self) -> String {
        let output = Output { start: OutputPosition::default(), items: self.items.clone() };
        String::from_utf8(output.console()).unwrap()
    }
}
