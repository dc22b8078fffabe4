// SPDX-License-Identifier: Apache-2.0
//! The disk exerciser: carries out the steps of a plan on files of the file system, or on the disk itself, and compares
//! every block that it reads.

use crate::args::Args;
use crate::calls;
use crate::during;
use crate::orders::{Order, Orders};
use crate::plan::{Action, BLOCK_BYTES, Content, Plan, SPAN_BLOCKS, STEP_BLOCKS_MAX, Step};
use crate::say;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::Duration;

/// What one step moves at most.
pub(crate) const STEP_BYTES_MAX: usize = STEP_BLOCKS_MAX as usize * BLOCK_BYTES;

/// What is exercised.
#[derive(Clone, Copy)]
pub(crate) enum Target {
    /// Files in a directory, through the page cache, which is dropped at each sync: the reads after it reach the disk.
    Directory(&'static str),
    /// A disk, past the page cache. Its content is lost.
    Device(&'static str),
}

/// Does the steps, or goes on until an order comes.
pub(crate) fn run(args: &Args, target: Target, orders: &mut Orders) -> Result<Order, String> {
    let mut exerciser = Exerciser::open(args, target).map_err(during("disk"))?;
    let last = if args.steps == 0 { u64::MAX } else { args.steps };
    for _ in 0..last {
        let line = exerciser.step()?;
        say(&line);
        let delay = Duration::from_micros(args.delay_us);
        if let Some(order) = orders.take(0) {
            return Ok(order);
        }
        if !delay.is_zero() {
            std::thread::sleep(delay);
        }
    }
    exerciser.check_all()?;
    say(&exerciser.plan.last_line());
    Ok(Order::End)
}

struct Exerciser {
    plan: Plan,
    storage: Storage,
    buffer: Buffer,
}

enum Storage {
    Files(Vec<File>),
    Disk(File),
}

impl Exerciser {
    fn open(args: &Args, target: Target) -> io::Result<Self> {
        let (storage, plan) = match target {
            Target::Directory(path) => {
                let files = args.blocks.div_ceil(SPAN_BLOCKS);
                let files = (0..files).map(|number| new_file(path, number)).collect::<io::Result<_>>()?;
                // A hole reads as zero.
                let discard = args.discard.then_some(Content::Zero);
                (Storage::Files(files), Plan::new(args.seed, args.blocks as usize, Content::Zero, discard))
            }
            Target::Device(path) => {
                let disk =
                    OpenOptions::new().read(true).write(true).custom_flags(calls::O_DIRECT).open(path)?;
                let blocks = args.blocks.min(calls::disk_bytes(&disk)? / BLOCK_BYTES as u64);
                if blocks == 0 {
                    return Err(io::Error::other("it is smaller than a block"));
                }
                let discard = args.discard.then_some(Content::Open);
                (Storage::Disk(disk), Plan::new(args.seed, blocks as usize, Content::Open, discard))
            }
        };
        Ok(Self { plan, storage, buffer: Buffer::new() })
    }

    /// One step of the plan; its line.
    fn step(&mut self) -> Result<String, String> {
        let step = self.plan.next_step();
        let Step { number, action, blocks } = &step;
        let bytes = (blocks.end - blocks.start) as usize * BLOCK_BYTES;
        let failed = |error: io::Error| format!("disk step={number} {} {blocks:?}: {error}", action.name());
        match action {
            Action::Write => {
                let buffer = self.buffer.bytes(bytes);
                self.plan.fill(*number, blocks, buffer);
                self.storage.write(blocks, buffer).map_err(failed)?;
            }
            Action::Read => self.check(blocks).map_err(|what| format!("disk step={number} read {what}"))?,
            Action::Sync => self.storage.sync().map_err(failed)?,
            Action::Discard => self.storage.discard(blocks).map_err(failed)?,
            Action::Zero => self.storage.zero(blocks).map_err(failed)?,
        }
        Ok(self.plan.done(&step))
    }

    fn check(&mut self, blocks: &Range<u64>) -> Result<(), String> {
        let buffer = self.buffer.bytes((blocks.end - blocks.start) as usize * BLOCK_BYTES);
        self.storage.read(blocks, buffer).map_err(|error| format!("{blocks:?}: {error}"))?;
        self.plan.check(blocks, buffer).map_err(|difference| difference.to_string())
    }

    /// All blocks once more, from the disk.
    fn check_all(&mut self) -> Result<(), String> {
        self.storage.sync().map_err(during("disk at the end"))?;
        let blocks = self.plan.blocks();
        for start in (0..blocks).step_by(STEP_BLOCKS_MAX as usize) {
            let range = start..(start + STEP_BLOCKS_MAX).min(blocks);
            self.check(&range).map_err(|what| format!("disk at the end: {what}"))?;
        }
        Ok(())
    }
}

fn new_file(directory: &str, number: u64) -> io::Result<File> {
    let path = format!("{directory}/colo-disk.{number}");
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)?;
    file.set_len(SPAN_BLOCKS * BLOCK_BYTES as u64)?;
    Ok(file)
}

impl Storage {
    /// The file of a range that lies in one span, and the bytes of the range in it.
    fn locate(&self, blocks: &Range<u64>) -> (&File, Range<u64>) {
        let bytes = |first: u64| {
            (blocks.start - first) * BLOCK_BYTES as u64..(blocks.end - first) * BLOCK_BYTES as u64
        };
        match self {
            Self::Disk(disk) => (disk, bytes(0)),
            Self::Files(files) => {
                let number = blocks.start / SPAN_BLOCKS;
                (&files[number as usize], bytes(number * SPAN_BLOCKS))
            }
        }
    }

    fn write(&self, blocks: &Range<u64>, buffer: &[u8]) -> io::Result<()> {
        let (file, bytes) = self.locate(blocks);
        file.write_all_at(buffer, bytes.start)
    }

    fn read(&self, blocks: &Range<u64>, buffer: &mut [u8]) -> io::Result<()> {
        let (file, bytes) = self.locate(blocks);
        file.read_exact_at(buffer, bytes.start)
    }

    fn sync(&self) -> io::Result<()> {
        match self {
            Self::Disk(disk) => disk.sync_data(),
            Self::Files(files) => files.iter().try_for_each(|file| {
                file.sync_all()?;
                calls::forget_pages(file)
            }),
        }
    }

    fn discard(&self, blocks: &Range<u64>) -> io::Result<()> {
        let (file, bytes) = self.locate(blocks);
        match self {
            Self::Disk(_) => calls::disk_discard(file, &bytes),
            Self::Files(_) => calls::punch_hole(file, &bytes),
        }
    }

    fn zero(&self, blocks: &Range<u64>) -> io::Result<()> {
        let (file, bytes) = self.locate(blocks);
        match self {
            Self::Disk(_) => calls::disk_zero(file, &bytes),
            Self::Files(_) => calls::zero_range(file, &bytes),
        }
    }
}

/// Room for one step at most, at an address that a disk past the page cache takes.
pub(crate) struct Buffer {
    memory: Vec<u8>,
    start: usize,
}

impl Buffer {
    pub(crate) fn new() -> Self {
        let memory = vec![0; STEP_BYTES_MAX + BLOCK_BYTES];
        let start = memory.as_ptr().align_offset(BLOCK_BYTES);
        Self { memory, start }
    }

    pub(crate) fn bytes(&mut self, count: usize) -> &mut [u8] {
        &mut self.memory[self.start..][..count]
    }
}
