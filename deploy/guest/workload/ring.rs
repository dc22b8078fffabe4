// SPDX-License-Identifier: Apache-2.0
//! The steps of all threads: each dirties its slice at the same time as the others, then they read the clock one after
//! the other, each on its own CPU, and the last one prints the line.
//!
//! One counter orders everything. In step n (from 1) of N threads, tickets n*N .. n*N+N-1 are the clock readings;
//! a step begins when its first ticket is due, and the thread with the last ticket is the writer. The writer moves
//! on by one thread with each step, so lines come from every CPU.

use crate::chain::{self, LINE_MAX, Line, mix};
use crate::memory::{Mismatch, Slice};
use crate::sys;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// What the guest found wrong by itself.
#[derive(Debug)]
pub(crate) enum Failure {
    Memory(Mismatch),
    /// The clock read less than an earlier reading, here or on another CPU.
    Clock {
        cpu: u32,
        before_ns: u64,
        now_ns: u64,
    },
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Memory(Mismatch { page, word, touched_in_step, expected, found }) => write!(
                f,
                "colo-error memory page={page} expected={expected:016x} found={found:016x} word={word} \
                 touched_in_step={touched_in_step}"
            ),
            Self::Clock { cpu, before_ns, now_ns } => {
                write!(f, "colo-error clock cpu={cpu} before={before_ns} now={now_ns}")
            }
        }
    }
}

/// What the threads share.
pub(crate) struct Ring {
    threads: u64,
    /// Waiting threads sleep in the kernel instead of spinning.
    sleep: bool,
    ticket: AtomicU64,
    /// Changes with every ticket; what sleepers wait on, since a futex is 32 bits wide.
    bell: AtomicU32,
    last_clock_ns: AtomicU64,
    digests: Vec<AtomicU64>,
    /// Chain and running memory digest: only the writer of a step reads and writes them.
    chain: AtomicU64,
    memory: AtomicU64,
}

impl Ring {
    pub(crate) fn new(threads: usize, seed: u64, sleep: bool) -> Self {
        Self {
            threads: threads as u64,
            sleep,
            // The first ticket of step 1.
            ticket: AtomicU64::new(threads as u64),
            bell: AtomicU32::new(0),
            last_clock_ns: AtomicU64::new(0),
            digests: (0..threads).map(|_| AtomicU64::new(0)).collect(),
            chain: AtomicU64::new(chain::chain_start(seed)),
            memory: AtomicU64::new(mix(seed, 0)),
        }
    }

    /// Chain value of the last line.
    pub(crate) fn chain(&self) -> u64 {
        self.chain.load(Ordering::Relaxed)
    }

    /// One step of the thread `me`; `after_line` is run by the thread that printed, before the next step begins.
    pub(crate) fn step(
        &self,
        me: usize,
        step: u64,
        slice: &mut Slice,
        count: usize,
        after_line: impl FnOnce(u64),
    ) -> Result<(), Failure> {
        self.wait_for(step * self.threads);
        let digest = slice.touch(step, count).map_err(Failure::Memory)?;
        self.digests[me].store(digest, Ordering::Relaxed);

        // Thread (step mod N) is last.
        let place = (me as u64 + 2 * self.threads - 1 - step % self.threads) % self.threads;
        let ticket = step * self.threads + place;
        self.wait_for(ticket);
        let (cpu, now_ns) = self.read_clock()?;
        if place == self.threads - 1 {
            self.print(step, cpu, now_ns);
            after_line(now_ns);
        }
        self.pass(ticket + 1);
        Ok(())
    }

    /// Release and acquire of the ticket order all that the threads share, the clock readings too.
    fn pass(&self, next: u64) {
        self.ticket.store(next, Ordering::Release);
        if self.sleep && self.threads > 1 {
            self.bell.fetch_add(1, Ordering::Release);
            sys::futex_wake_all(&self.bell);
        }
    }

    fn wait_for(&self, ticket: u64) {
        loop {
            let seen = self.bell.load(Ordering::Acquire);
            if self.ticket.load(Ordering::Acquire) >= ticket {
                return;
            }
            if self.sleep {
                // A ticket passed after the bell was read has changed the bell: then this does not sleep.
                sys::futex_wait(&self.bell, seen);
            } else {
                std::hint::spin_loop();
            }
        }
    }

    /// No CPU may read less than any CPU read before it.
    fn read_clock(&self) -> Result<(u32, u64), Failure> {
        let before_ns = self.last_clock_ns.load(Ordering::Relaxed);
        let now_ns = sys::monotonic_ns();
        let cpu = sys::current_cpu();
        if now_ns < before_ns {
            return Err(Failure::Clock { cpu, before_ns, now_ns });
        }
        self.last_clock_ns.store(now_ns, Ordering::Relaxed);
        Ok((cpu, now_ns))
    }

    fn print(&self, step: u64, cpu: u32, now_ns: u64) {
        let found = self.digests.iter().map(|digest| digest.load(Ordering::Relaxed));
        let memory = found.fold(self.memory.load(Ordering::Relaxed), mix);
        let line = Line::next(self.chain(), step, now_ns, cpu, memory);
        self.memory.store(memory, Ordering::Relaxed);
        self.chain.store(line.chain, Ordering::Relaxed);
        sys::write_all(1, line.format(&mut [0; LINE_MAX]));
    }
}
