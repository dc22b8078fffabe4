//! The program that a synthetic guest runs, a step at a time: vCPU `n` of `N` takes every `N`-th step.
//!
//! ```text
//! page 0        ledger: steps, hash over all vCPUs' steps, boots, seed; by the loader, then by every step
//! page 1        inbox: number, length, bytes; by the console's device, read by vCPU 0
//! page 2..2+N   one per vCPU: its steps and its hash
//! the others    swept over, a share for each vCPU (see `pages`)
//! the disk      the same, a block at a time (see `disk`)
//! ```
//!
//! Whatever a step reads it checks, and mixes into the digest that the console's lines carry. So memory or a disk that
//! is not of the same instant as the registers stops the guest, and one of another history changes its console. What is
//! written to the disk follows from that digest as well: its blocks are chained to memory.

use colo_common::{Block, PAGE_SIZE};

use super::bus::{CpuView, bytes_of};
use super::chain::{self, mix};
use super::config::{MIN_FRAME_BYTES, Program, fixed_pages};
use super::disk::{BlockDevice, Filling, MAX_REQUESTS, Request};
use super::pages::{Fill, Sweep, order};
use super::state::{INBOX_BYTES, MAX_LINE, Medium, SyntheticState, VcpuRegisters, WrongContent};
use super::tracker::Tracker;
use crate::egress::Egress;
use crate::guest::Lifecycle;

const LEDGER: u32 = 0;
const INBOX: u32 = 1;
const FIRST_OWN: u32 = 2;

/// What the loader does at power-on and reset.
pub(super) fn load(state: &SyntheticState, view: &CpuView) {
    view.device_store(LEDGER, &bytes_of(&[0, state.ledger, state.boots, state.program.seed]));
}

/// The page that every step writes.
pub(super) const ALWAYS_WRITTEN: u32 = LEDGER;

/// One step of one vCPU.
pub(super) struct Step<'a> {
    pub(super) state: &'a mut SyntheticState,
    pub(super) view: &'a CpuView,
    pub(super) tracker: &'a mut Tracker,
    pub(super) egress: &'a Egress,
    pub(super) disk: Option<&'a mut BlockDevice>,
}

impl Step<'_> {
    /// Takes the step; returns what the guest asks for after it. Console and frames are in `egress` then, which
    /// must not have been full.
    pub(super) fn run(mut self) -> Result<Option<Lifecycle>, WrongContent> {
        let vcpu = self.state.turn();
        self.check_ledger(vcpu)?;
        if self.state.time == 0 {
            self.greet();
        }
        self.sweep(vcpu)?;
        self.work_on_disk(vcpu)?;
        self.own_page(vcpu)?;
        self.write_ledger(vcpu);
        self.maybe_frame(vcpu);
        self.maybe_line(vcpu);
        if vcpu == 0 {
            self.read_inbox()?;
            self.deliver();
        }
        self.state.time += 1;
        Ok(self.ask(vcpu))
    }

    fn greet(&mut self) {
        let (boots, seed, vcpus) = (self.state.boots, self.state.program.seed, self.state.vcpus.len());
        self.say(&format!("synthetic guest: boot {boots}, {vcpus} vCPUs, seed {seed}"));
    }

    fn check_ledger(&mut self, vcpu: u32) -> Result<(), WrongContent> {
        let found: [u64; 4] = self.view.read_words(LEDGER);
        let state = &self.state;
        let expected = [state.time, state.ledger, state.boots, state.program.seed];
        self.compare(vcpu, LEDGER, &found, &expected)
    }

    fn write_ledger(&mut self, vcpu: u32) {
        self.state.ledger = mix(self.state.ledger, self.state.vcpus[vcpu as usize].chain);
        let words = [self.state.time + 1, self.state.ledger];
        self.view.store(self.tracker, vcpu, LEDGER, 0, &bytes_of(&words));
    }

    fn own_page(&mut self, vcpu: u32) -> Result<(), WrongContent> {
        let page = FIRST_OWN + vcpu;
        let cpu = &self.state.vcpus[vcpu as usize];
        let (steps, before) = (cpu.steps, cpu.chain);
        if steps > 0 {
            let found: [u64; 2] = self.view.read_words(page);
            self.compare(vcpu, page, &found, &[steps, before])?;
        }
        let chain = mix(before, self.state.found);
        let cpu = &mut self.state.vcpus[vcpu as usize];
        (cpu.steps, cpu.chain) = (steps + 1, chain);
        self.view.store(self.tracker, vcpu, page, 0, &bytes_of(&[steps + 1, chain]));
        Ok(())
    }

    fn sweep(&mut self, vcpu: u32) -> Result<(), WrongContent> {
        let visits = 1 + self.draw(vcpu) % u64::from(self.state.program.writes);
        (0..visits).try_for_each(|_| self.visit(vcpu))
    }

    /// Checks the next page of the vCPU's share and writes it.
    fn visit(&mut self, vcpu: u32) -> Result<(), WrongContent> {
        let (program, vcpus) = (&self.state.program, self.state.vcpus.len() as u64);
        let fixed = fixed_pages(vcpus as u32);
        let (first, count) = share(u64::from(program.pages - fixed), vcpu, vcpus);
        let seed = program.seed;
        let cpu = &mut self.state.vcpus[vcpu as usize];
        let (round, position) = (cpu.round, cpu.position.min(count - 1));
        cpu.position = position + 1;
        if cpu.position == count {
            (cpu.round, cpu.position) = (round + 1, 0);
        }

        let at = first + order(mix(seed, u64::from(vcpu)), round, position, count);
        let sweep = Sweep { seed, page: at, words: self.state.program.words };
        let page = fixed + at as u32;
        let mut content = [0; PAGE_SIZE];
        self.view.read(page, &mut content);
        let before = sweep.check(round - 1, &content).map_err(|wrong| {
            let address = self.view.frame(page).address() + wrong.word * 8;
            WrongContent {
                vcpu,
                medium: Medium::Memory,
                address,
                found: wrong.found,
                expected: wrong.expected,
            }
        })?;
        self.state.found = mix(self.state.found, before);
        let link = mix(before, self.draw(vcpu));
        match sweep.fill(round, link) {
            Fill::Clear => self.view.store(self.tracker, vcpu, page, 0, &[0; PAGE_SIZE]),
            Fill::Words { head, body_at, body, tail } => {
                self.view.store(self.tracker, vcpu, page, 0, &bytes_of(&head));
                self.view.store(self.tracker, vcpu, page, body_at, &bytes_of(&body));
                let last = (PAGE_SIZE / 8 - 1) as u64;
                self.view.store(self.tracker, vcpu, page, last, &tail.to_le_bytes());
            }
        }
        Ok(())
    }

    /// What a guest with a disk does there: some steps check the next block of the vCPU's share and write it anew.
    fn work_on_disk(&mut self, vcpu: u32) -> Result<(), WrongContent> {
        let Program { seed, words, blocks, block_every, flush_every, .. } = *self.state.program;
        let Some(disk) = self.disk.as_mut().filter(|_| blocks > 0) else { return Ok(()) };
        disk.go_on(&mut self.state.requests, Filling { seed, words }, self.state.time);
        let is_one_in = |drawn: u64, every: u32| every > 0 && drawn.is_multiple_of(u64::from(every));
        if is_one_in(self.draw(vcpu), block_every) {
            self.visit_block(vcpu)?;
        }
        if is_one_in(mix(self.draw(vcpu), 1), flush_every)
            && let Some(disk) = &self.disk
        {
            disk.flush();
        }
        Ok(())
    }

    fn visit_block(&mut self, vcpu: u32) -> Result<(), WrongContent> {
        let (program, vcpus) = (&self.state.program, self.state.vcpus.len() as u64);
        let (seed, words, steps) = (program.seed, program.words, u64::from(program.write_steps));
        let (first, count) = share(program.blocks.into(), vcpu, vcpus);
        let VcpuRegisters { disk_round: round, disk_position, .. } = self.state.vcpus[vcpu as usize];
        let position = disk_position.min(count - 1);
        let block = (first + order(mix(seed, u64::from(vcpu)), round, position, count)) as u32;
        let waits = self.state.requests.iter().any(|request| request.block == block);
        let Some(disk) = self.disk.as_mut().filter(|_| !waits && self.state.requests.len() < MAX_REQUESTS)
        else {
            return Ok(());
        };
        let content = disk.read(block);
        let sweep = Sweep { seed, page: u64::from(block), words };
        let before = sweep.check(round - 1, &content).map_err(|wrong| WrongContent {
            vcpu,
            medium: Medium::Disk,
            address: Block(block.into()).offset() + wrong.word * 8,
            found: wrong.found,
            expected: wrong.expected,
        })?;
        let cpu = &mut self.state.vcpus[vcpu as usize];
        cpu.disk_position = position + 1;
        if cpu.disk_position == count {
            (cpu.disk_round, cpu.disk_position) = (round + 1, 0);
        }
        self.state.found = mix(self.state.found, before);
        let link = mix(mix(before, self.draw(vcpu)), self.state.found);
        let ends = self.state.time + 1 + mix(self.draw(vcpu), 2) % steps;
        let request = Request { block, round, link, ends };
        if let Some(disk) = &mut self.disk {
            disk.submit(&mut self.state.requests, request);
        }
        Ok(())
    }

    fn maybe_frame(&mut self, vcpu: u32) {
        let program = &self.state.program;
        let (every, slot, longest) = (program.frame_every, program.frame_slot, program.frame_bytes);
        if every == 0 || !self.draw(vcpu).is_multiple_of(u64::from(every)) {
            return;
        }
        let length = MIN_FRAME_BYTES + (self.draw(vcpu) % u64::from(longest - MIN_FRAME_BYTES + 1)) as u32;
        self.state.frames += 1;
        let number = self.state.frames;
        self.state.frame_chain = mix(mix(self.state.frame_chain, number), self.state.found);
        let frame = frame(vcpu, number, self.state.frame_chain, length as usize);
        let pushed = self.egress.push_frame(slot, frame);
        assert_eq!(pushed, Ok(()), "a step begins with room for a frame of a length that was checked");
    }

    fn maybe_line(&mut self, vcpu: u32) {
        let every = u64::from(self.state.program.line_every);
        if every == 0 || !self.draw(vcpu).is_multiple_of(every) {
            return;
        }
        let state = &mut self.state;
        let clock_ns = state.time.saturating_mul(state.program.step_ns);
        state.lines += 1;
        state.line_chain = chain::next(state.line_chain, state.lines, clock_ns, state.found);
        let line = chain::line(state.lines, state.line_chain, clock_ns, vcpu, state.found);
        self.say(&line);
    }

    /// The device's half of console input: puts a piece into memory, where the guest finds it at its next turn.
    fn deliver(&mut self) {
        let state = &mut self.state;
        if state.unread > 0 || state.input.is_empty() {
            return;
        }
        let rest = state.input.split_off(state.input.len().min(INBOX_BYTES));
        let piece = std::mem::replace(&mut state.input, rest);
        state.deliveries += 1;
        state.unread = piece.len() as u32;
        let head = bytes_of(&[state.deliveries, piece.len() as u64]);
        self.view.device_store(INBOX, &[head, piece].concat());
    }

    /// The guest's half: echoes whole lines.
    fn read_inbox(&mut self) -> Result<(), WrongContent> {
        let unread = std::mem::take(&mut self.state.unread) as usize;
        if unread == 0 {
            return Ok(());
        }
        let found: [u64; 2] = self.view.read_words(INBOX);
        self.compare(0, INBOX, &found, &[self.state.deliveries, unread as u64])?;
        let mut content = [0; PAGE_SIZE];
        self.view.read(INBOX, &mut content);
        for &byte in &content[16..16 + unread] {
            let end = byte == b'\n' || byte == b'\r';
            if !end {
                self.state.line.push(byte);
            }
            if end || self.state.line.len() >= MAX_LINE {
                let line = [b"echo ", std::mem::take(&mut self.state.line).as_slice()].concat();
                self.say_bytes(&line);
            }
        }
        Ok(())
    }

    /// What the guest asks its machine for, now that the step is done.
    fn ask(&mut self, vcpu: u32) -> Option<Lifecycle> {
        let end = self.state.program.end.filter(|end| self.state.time >= end.steps);
        let pressed = vcpu == 0 && std::mem::take(&mut self.state.power_button);
        let ask = if pressed { Some(Lifecycle::Shutdown) } else { end.map(|end| end.ask) };
        if ask.is_some() {
            self.say(&chain::done(self.state.lines, self.state.line_chain));
        }
        ask
    }

    fn compare(&self, vcpu: u32, page: u32, found: &[u64], expected: &[u64]) -> Result<(), WrongContent> {
        let address = self.view.frame(page).address();
        let mut words = (address..).step_by(8).zip(found.iter().zip(expected));
        match words.find(|(_, (found, expected))| found != expected) {
            None => Ok(()),
            Some((address, (&found, &expected))) => {
                Err(WrongContent { vcpu, medium: Medium::Memory, address, found, expected })
            }
        }
    }

    fn draw(&mut self, vcpu: u32) -> u64 {
        let cpu = &mut self.state.vcpus[vcpu as usize];
        cpu.rng = cpu.rng.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(cpu.rng, cpu.steps)
    }

    fn say(&self, line: &str) {
        self.say_bytes(line.as_bytes());
    }

    fn say_bytes(&self, line: &[u8]) {
        self.egress.push_console(&[line, b"\n"].concat());
    }
}

/// The part of `all` that is a vCPU's: its first, and how many.
fn share(all: u64, vcpu: u32, vcpus: u64) -> (u64, u64) {
    let first = all * u64::from(vcpu) / vcpus;
    (first, all * u64::from(vcpu + 1) / vcpus - first)
}

/// virtio-net header, Ethernet header (broadcast, an ethertype for experiments), number, hash, filling.
fn frame(vcpu: u32, number: u64, hash: u64, length: usize) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend([0xff; 6]);
    frame.extend([0x02, 0xc0, 0x10, 0, 0, vcpu as u8]);
    frame.extend([0x88, 0xb5]);
    frame.extend(number.to_be_bytes());
    frame.extend(hash.to_be_bytes());
    let filling = (0..).flat_map(|at| mix(hash, at).to_le_bytes());
    let missing = length.saturating_sub(frame.len());
    frame.extend(filling.take(missing));
    frame
}
