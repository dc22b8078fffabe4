// SPDX-License-Identifier: Apache-2.0
//! The guest's workload: dirties memory in user mode, checks it, and prints a chain of lines that anyone who holds the
//! console can verify. Started as the first process it is the guest's whole user space.
//!
//! Built by prepare.sh with plain rustc into one static program; see README.md for the arguments.

#[allow(dead_code, reason = "the checker is for the other end of the console")]
mod chain;

mod args;
mod init;
mod input;
mod memory;
mod ring;
mod sys;

use args::{Args, End};
use input::Input;
use memory::Slice;
use ring::Ring;
use std::sync::Mutex;
use std::thread;
use sys::Stop;

/// Where QEMU's isa-debug-exit device is, and ours.
const DEBUG_EXIT_PORT: u16 = 0xf4;
/// What isa-debug-exit gets when the workload failed, whatever code was asked for.
const FAILED: u8 = 255;

fn main() {
    let first = init::is_first_process();
    if first {
        init::set_up();
    }
    let words: Vec<String> = std::env::args().skip(1).collect();
    if first && words.first().is_some_and(|word| !word.contains('=')) {
        init::run(&words);
        init::stop(Stop::Reset);
    }
    let default_end = if first { End::Stop(Stop::Reset) } else { End::Process };
    match Args::new(default_end).parse(&words) {
        Ok(args) => {
            let chain = run(&args);
            say(&chain::done_line(args.lines, chain));
            finish(args.end, true)
        }
        Err(word) => {
            say(&format!("colo-error argument {word}"));
            finish(default_end, false)
        }
    }
}

/// Steps until the lines are printed, then reads all memory once more. The chain of the last line.
fn run(args: &Args) -> u64 {
    sys::echo_off(0);
    let ring = Ring::new(args.threads, args.seed, args.sleep);
    // Lines come from all threads, so whoever printed one listens.
    let input = Input::open(args.echo, args.button)
        .unwrap_or_else(|error| fail(args, &format!("colo-error argument button: {error}")));
    let input = Mutex::new(input);
    thread::scope(|scope| {
        for me in 1..args.threads {
            let (ring, input) = (&ring, &input);
            scope.spawn(move || work(args, ring, input, me));
        }
        work(args, &ring, &input, 0);
    });
    ring.chain()
}

/// One thread's part of every step. A failure ends the program from here: the other threads would wait for ever.
fn work(args: &Args, ring: &Ring, input: &Mutex<Input>, me: usize) {
    if args.threads > 1 {
        sys::pin_to(me)
            .unwrap_or_else(|error| fail(args, &format!("colo-error argument threads: CPU {me}: {error}")));
    }
    let first_page = args.pages * me / args.threads;
    let pages = args.pages * (me + 1) / args.threads - first_page;
    let touch = args.touch * (me + 1) / args.threads - args.touch * me / args.threads;
    let mut slice = Slice::new(args.seed, args.pattern, first_page as u64, pages, args.words)
        .unwrap_or_else(|error| fail(args, &format!("colo-error argument pages: {error}")));

    let last_step = if args.lines == 0 { u64::MAX } else { args.lines };
    for step in 1..=last_step {
        let after_line = |printed_ns| pause(args, &mut input.lock().unwrap(), printed_ns);
        ring.step(me, step, &mut slice, touch, after_line)
            .unwrap_or_else(|failure| fail(args, &failure.to_string()));
    }
    slice.verify_all().unwrap_or_else(|found| fail(args, &ring::Failure::Memory(found).to_string()));
}

/// Input and the time between two steps, counted from the clock reading of the line.
fn pause(args: &Args, input: &mut Input, printed_ns: u64) {
    let until_ns = printed_ns + args.delay_us * 1000;
    input.take(0).unwrap_or_else(|end| finish(end, true));
    loop {
        let left_ns = until_ns.saturating_sub(sys::monotonic_ns());
        match (left_ns, args.sleep) {
            (0, _) => return,
            (_, false) => std::hint::spin_loop(),
            // Input wakes a sleeping guest, so that its echo need not wait for the next line.
            (1_000_000.., true) if input.is_open() => {
                input.take((left_ns / 1_000_000) as i32).unwrap_or_else(|end| finish(end, true));
            }
            (_, true) => sys::sleep_until(until_ns),
        }
    }
}

/// A line besides those of the steps, in one write as they are.
fn say(line: &str) {
    sys::write_all(1, format!("{line}\n").as_bytes());
}

fn fail(args: &Args, line: &str) -> ! {
    say(line);
    finish(args.end, false)
}

/// Ends what was asked for: the machine, or only this process.
fn finish(end: End, good: bool) -> ! {
    match end {
        End::Process => std::process::exit(i32::from(!good)),
        End::Stop(how) => init::stop(how),
        End::Exit(code) => {
            sys::drain(1);
            if let Err(error) = sys::port_write(DEBUG_EXIT_PORT, if good { code } else { FAILED }) {
                say(&format!("colo-error exit {error}"));
            }
            // Still here: the machine has no such port.
            init::stop(Stop::Reset)
        }
    }
}
