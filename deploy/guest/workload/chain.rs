// SPDX-License-Identifier: Apache-2.0
//! What the workload says on its console, and how the other side checks it.
//!
//! The workload of a guest prints one line for every step it takes. Each line carries its number, a hash over all
//! lines before it, the guest's clock and a digest of the memory that the step found. So a console that went through
//! failovers can be checked end to end: a line that was lost, repeated, reordered or changed, memory that fell back
//! to an older state, and a clock that stepped back are all visible in the bytes alone.
//!
//! This file has no dependencies and does no I/O: the guest program includes it as a module, and so does the test
//! harness, by `#[path]`.
//!
//! ```text
//! colo 00000012 91c2e3d15f00a7b4 t=1843920017 cpu=1 m=5d0c8a6b11f2e397
//!      |        |                |            |     digest of the memory found so far, 16 hex digits
//!      |        |                |            CPU on which the clock was read last
//!      |        |                CLOCK_MONOTONIC in ns
//!      |        chain_n, a hash of chain_{n-1}, n, t and m, 16 hex digits; chain_0 comes from the seed
//!      number n, decimal, at least 8 digits, from 1
//! ```
//!
//! Other lines of the workload: `colo-done lines=N chain=...` after the last one, `colo-error WHAT ...` when the guest
//! itself saw something wrong, `echo TEXT` for a line of input. Lines without these prefixes (kernel messages) are
//! foreign and are counted, not judged.

use std::fmt;

/// The longest line that the workload prints, with its newline: every number at its widest.
pub const LINE_MAX: usize = 128;

/// How much of an unfinished line the checker keeps: longer lines cannot be ours and are foreign. Bounds the memory
/// that a guest can make the checker hold.
const PENDING_MAX: usize = 512;

/// What every line of a step begins with.
const PREFIX: &str = "colo ";
const DONE_PREFIX: &str = "colo-done ";
const ERROR_PREFIX: &str = "colo-error ";

/// Mixes one word into a running hash.
///
/// A multiplication by an odd constant after the xor makes each step a bijection of the state for any given word, so
/// no state is ever forgotten; the shift-and-multiply finish of the splitmix64 generator spreads every bit over the
/// whole word. Not cryptographic: it tells accidents apart, not attackers.
#[must_use]
pub const fn mix(state: u64, word: u64) -> u64 {
    let mut z = (state ^ word.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(word);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The chain's value before the first line.
#[must_use]
pub const fn chain_start(seed: u64) -> u64 {
    mix(0x636f_6c6f_6368_6e30, seed)
}

/// The chain's value at line `number`, given the one before it.
#[must_use]
pub const fn chain_next(previous: u64, number: u64, clock_ns: u64, memory: u64) -> u64 {
    mix(mix(mix(previous, number), clock_ns), memory)
}

/// One step of the workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Line {
    /// Counts the steps from 1.
    pub number: u64,
    /// Hash over this line and all before it.
    pub chain: u64,
    /// The guest's CLOCK_MONOTONIC in nanoseconds.
    pub clock_ns: u64,
    /// CPU on which the clock was read.
    pub cpu: u32,
    /// Running digest of the memory that the steps found.
    pub memory: u64,
}

impl Line {
    /// The line that follows one whose chain value is `previous`.
    #[must_use]
    pub const fn next(previous: u64, number: u64, clock_ns: u64, cpu: u32, memory: u64) -> Self {
        Self { number, chain: chain_next(previous, number, clock_ns, memory), clock_ns, cpu, memory }
    }

    /// The line's bytes, newline included, in the caller's buffer: nothing is allocated.
    #[must_use]
    pub fn format<'b>(&self, buffer: &'b mut [u8; LINE_MAX]) -> &'b [u8] {
        let mut out = Cursor { buffer, used: 0 };
        // LINE_MAX holds the widest line, so this cannot fail.
        let written = fmt::Write::write_fmt(&mut out, format_args!("{self}\n"));
        debug_assert!(written.is_ok());
        let used = out.used;
        &buffer[..used]
    }

    /// Reads back what [`Line::format`] writes, with or without its line end, and nothing else: a field that is
    /// written in another way than ours is `None`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.strip_suffix('\n').unwrap_or(text);
        let text = text.strip_suffix('\r').unwrap_or(text);
        let mut fields = text.strip_prefix(PREFIX)?.split(' ');
        let number = fields.next()?;
        let chain = fields.next()?;
        let clock_ns = fields.next()?.strip_prefix("t=")?;
        let cpu = fields.next()?.strip_prefix("cpu=")?;
        let memory = fields.next()?.strip_prefix("m=")?;
        if fields.next().is_some() {
            return None;
        }
        let line = Self {
            number: decimal(number, 8)?,
            chain: hex(chain)?,
            clock_ns: decimal(clock_ns, 1)?,
            cpu: u32::try_from(decimal(cpu, 1)?).ok()?,
            memory: hex(memory)?,
        };
        Some(line)
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { number, chain, clock_ns, cpu, memory } = self;
        write!(f, "{PREFIX}{number:08} {chain:016x} t={clock_ns} cpu={cpu} m={memory:016x}")
    }
}

/// A decimal number in its one spelling: digits only, zeros in front only up to `width`.
fn decimal(text: &str, width: usize) -> Option<u64> {
    let digits_only = text.bytes().all(|b| b.is_ascii_digit());
    let padded = text.len() > width && text.starts_with('0');
    (digits_only && text.len() >= width && !padded).then(|| text.parse().ok())?
}

/// Sixteen lower-case hex digits.
fn hex(text: &str) -> Option<u64> {
    let ours = text.len() == 16 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    ours.then(|| u64::from_str_radix(text, 16).ok())?
}

/// Writes into a fixed buffer.
struct Cursor<'b> {
    buffer: &'b mut [u8],
    used: usize,
}

impl fmt::Write for Cursor<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = self.used + text.len();
        self.buffer.get_mut(self.used..end).ok_or(fmt::Error)?.copy_from_slice(text.as_bytes());
        self.used = end;
        Ok(())
    }
}

/// What is wrong with a console. `at` is the offset of the line's first byte from the start of the console.
#[allow(missing_docs, reason = "the fields are what the variant's own line says")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A line with our prefix that is not of our form: bytes were lost, changed, or mixed with others.
    Garbled { at: u64, text: String },
    /// The first line is not number 1, and the console was expected to be whole.
    NotFromStart { at: u64, number: u64 },
    /// Lines are missing (`number` above `expected`) or repeated (below).
    Gap { at: u64, expected: u64, number: u64 },
    /// The number is right and the hash is not: this line does not follow from the lines before it.
    Broken { at: u64, number: u64, expected: u64, chain: u64 },
    /// The clock reads less than on the line before.
    ClockBack { at: u64, number: u64, before_ns: u64, clock_ns: u64 },
    /// `colo-done` names another count or chain than the lines gave.
    WrongEnd { at: u64, text: String },
    /// Lines after `colo-done`.
    AfterEnd { at: u64, number: u64 },
    /// The workload itself found an error (`colo-error`).
    Reported { at: u64, text: String },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Garbled { at, text } => write!(f, "byte {at}: garbled line {text:?}"),
            Self::NotFromStart { at, number } => {
                write!(f, "byte {at}: the console begins with line {number}")
            }
            Self::Gap { at, expected, number } => {
                write!(f, "byte {at}: line {number} where {expected} was due")
            }
            Self::Broken { at, number, expected, chain } => {
                write!(
                    f,
                    "byte {at}: line {number} breaks the chain: {chain:016x} where {expected:016x} was due"
                )
            }
            Self::ClockBack { at, number, before_ns, clock_ns } => {
                write!(f, "byte {at}: the clock of line {number} went back from {before_ns} to {clock_ns} ns")
            }
            Self::WrongEnd { at, text } => write!(f, "byte {at}: the end does not match the lines: {text:?}"),
            Self::AfterEnd { at, number } => write!(f, "byte {at}: line {number} after the end"),
            Self::Reported { at, text } => write!(f, "byte {at}: the guest reports {text:?}"),
        }
    }
}

impl std::error::Error for Fault {}

/// Checks a console as its bytes arrive, in whatever pieces.
///
/// The first fault is kept and ends the judging; the counts go on, so a report can say how much came after it.
#[derive(Clone, Debug)]
pub struct Checker {
    /// The chain before the next line; `None` until a console that may begin in the middle has shown its first line.
    chain: Option<u64>,
    last: Option<Line>,
    /// Bytes of the line that has not ended yet; cut off at `PENDING_MAX`, which `overlong` notes.
    pending: Vec<u8>,
    overlong: bool,
    /// Offset of the pending line's first byte.
    line_start: u64,
    position: u64,
    counts: Counts,
    done: bool,
    fault: Option<Fault>,
}

/// How many lines of each kind were seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Lines of the workload that follow from those before them.
    pub lines: u64,
    /// `echo` lines.
    pub echoes: u64,
    /// Whole lines that are none of ours.
    pub foreign: u64,
}

impl Checker {
    /// For a console that begins with the guest: the first line must be number 1 and follow from `seed`.
    #[must_use]
    pub fn from_start(seed: u64) -> Self {
        Self::new(Some(chain_start(seed)))
    }

    /// For a console that was attached late: the first whole line is believed, and all after it must follow from it.
    /// The piece of a line that such a console begins with is foreign if its prefix is cut off.
    #[must_use]
    pub fn from_middle() -> Self {
        Self::new(None)
    }

    fn new(chain: Option<u64>) -> Self {
        Self {
            chain,
            last: None,
            pending: Vec::with_capacity(PENDING_MAX),
            overlong: false,
            line_start: 0,
            position: 0,
            counts: Counts::default(),
            done: false,
            fault: None,
        }
    }

    /// Takes the console's next bytes.
    pub fn feed(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.position += 1;
            if byte == b'\n' {
                self.end_of_line();
            } else if self.pending.len() < PENDING_MAX {
                self.pending.push(byte);
            } else {
                self.overlong = true;
            }
        }
    }

    /// What is wrong, or `Ok` if nothing is so far. A line without its end is still on its way, and not judged.
    ///
    /// # Errors
    /// The first fault seen.
    pub fn verdict(&self) -> Result<(), Fault> {
        self.fault.clone().map_or(Ok(()), Err)
    }

    /// Lines counted so far.
    #[must_use]
    pub const fn counts(&self) -> Counts {
        self.counts
    }

    /// The last line that followed from those before it.
    #[must_use]
    pub const fn last(&self) -> Option<Line> {
        self.last
    }

    /// Whether the workload has said that it is done, and the lines agreed.
    #[must_use]
    pub const fn is_done(&self) -> bool {
        self.done
    }

    fn end_of_line(&mut self) {
        let at = std::mem::replace(&mut self.line_start, self.position);
        let mut bytes = std::mem::take(&mut self.pending);
        let overlong = std::mem::take(&mut self.overlong);
        if !overlong && self.fault.is_none() {
            // The terminal driver sends a newline as "\r\n".
            let text = String::from_utf8_lossy(&bytes);
            self.fault = self.judge(at, text.trim_end_matches('\r')).err();
        } else {
            self.counts.foreign += 1;
        }
        // The buffer is used again: a console of any length costs one allocation.
        bytes.clear();
        self.pending = bytes;
    }

    fn judge(&mut self, at: u64, text: &str) -> Result<(), Fault> {
        if text.starts_with(PREFIX) {
            let line = Line::parse(text).ok_or_else(|| Fault::Garbled { at, text: text.to_owned() })?;
            return self.follow(at, line);
        }
        if text.starts_with(DONE_PREFIX) {
            return self.end(at, text);
        }
        if text.starts_with(ERROR_PREFIX) {
            return Err(Fault::Reported { at, text: text.to_owned() });
        }
        if text.starts_with("echo ") {
            self.counts.echoes += 1;
        } else {
            self.counts.foreign += 1;
        }
        Ok(())
    }

    fn follow(&mut self, at: u64, line: Line) -> Result<(), Fault> {
        let number = line.number;
        if self.done {
            return Err(Fault::AfterEnd { at, number });
        }
        if let Some(chain) = self.chain {
            let due = self.last.map_or(1, |last| last.number + 1);
            if number != due {
                return Err(match self.last {
                    None => Fault::NotFromStart { at, number },
                    Some(_) => Fault::Gap { at, expected: due, number },
                });
            }
            let expected = chain_next(chain, number, line.clock_ns, line.memory);
            if line.chain != expected {
                return Err(Fault::Broken { at, number, expected, chain: line.chain });
            }
        }
        if let Some(last) = self.last.filter(|last| line.clock_ns < last.clock_ns) {
            return Err(Fault::ClockBack { at, number, before_ns: last.clock_ns, clock_ns: line.clock_ns });
        }
        self.chain = Some(line.chain);
        self.last = Some(line);
        self.counts.lines += 1;
        Ok(())
    }

    /// The last line counts all lines since the start, also for a checker that came late. One that came after the
    /// last line has nothing to compare.
    fn end(&mut self, at: u64, text: &str) -> Result<(), Fault> {
        let wrong = || Fault::WrongEnd { at, text: text.to_owned() };
        let (lines, chain) = parse_done(text).ok_or_else(wrong)?;
        let count = self.last.map_or(0, |last| last.number);
        let known = self.chain.is_some();
        if self.done || (known && (lines != count || Some(chain) != self.chain)) {
            return Err(wrong());
        }
        self.done = true;
        Ok(())
    }
}

/// The last line of a workload that took `lines` steps, without its newline.
#[must_use]
pub fn done_line(lines: u64, chain: u64) -> String {
    format!("{DONE_PREFIX}lines={lines} chain={chain:016x}")
}

fn parse_done(text: &str) -> Option<(u64, u64)> {
    let (lines, chain) = text.strip_prefix(DONE_PREFIX)?.split_once(' ')?;
    Some((decimal(lines.strip_prefix("lines=")?, 1)?, hex(chain.strip_prefix("chain=")?)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEED: u64 = 7;

    /// A console of `count` lines with one foreign line after each.
    fn console(count: u64) -> Vec<u8> {
        let mut chain = chain_start(SEED);
        let mut out = Vec::new();
        let mut buffer = [0; LINE_MAX];
        for number in 1..=count {
            let line = Line::next(chain, number, number * 1000, (number % 2) as u32, number ^ 0xabcd);
            chain = line.chain;
            out.extend_from_slice(line.format(&mut buffer));
            out.extend_from_slice(b"[    1.0] a kernel message\r\n");
        }
        out.extend_from_slice(done_line(count, chain).as_bytes());
        out.push(b'\n');
        out
    }

    /// The console's lines as strings, to leave out, repeat and change.
    fn lines(count: u64) -> Vec<String> {
        let text = String::from_utf8(console(count)).unwrap();
        text.lines().filter(|line| line.starts_with("colo")).map(|line| format!("{line}\n")).collect()
    }

    fn check(mut checker: Checker, text: &str) -> (Checker, Result<(), Fault>) {
        checker.feed(text.as_bytes());
        let verdict = checker.verdict();
        (checker, verdict)
    }

    #[test]
    fn a_line_reads_back_as_it_was_written() {
        let mut buffer = [0; LINE_MAX];
        for line in [
            Line { number: 12, chain: 0x91c2_e3d1_5f00_a7b4, clock_ns: 1_843_920_017, cpu: 1, memory: 0x5d },
            Line { number: 0, chain: 0, clock_ns: 0, cpu: 0, memory: 0 },
            Line { number: u64::MAX, chain: u64::MAX, clock_ns: u64::MAX, cpu: u32::MAX, memory: u64::MAX },
        ] {
            let text = std::str::from_utf8(line.format(&mut buffer)).unwrap();
            assert!(text.ends_with('\n'));
            assert_eq!(Line::parse(text), Some(line));
        }
    }

    #[test]
    fn only_the_one_spelling_of_a_line_is_read() {
        let good = "colo 00000012 91c2e3d15f00a7b4 t=1843920017 cpu=1 m=5d0c8a6b11f2e397";
        assert!(Line::parse(good).is_some());
        for (from, to) in [
            ("00000012", "12"),
            ("00000012", "000000012"),
            ("00000012", "+0000012"),
            ("91c2", "91C2"),
            ("91c2", "91c"),
            ("t=", "t=0"),
            ("t=1843920017", "t="),
            ("t=1843920017", "t=18439200170000000000000"),
            ("cpu=1", "cpu=4294967296"),
            ("cpu=1 ", ""),
            ("m=5d0c", "m=0x5d0c"),
            ("e397", "e397 "),
            ("colo ", "colo  "),
        ] {
            assert_eq!(Line::parse(&good.replace(from, to)), None, "{from} -> {to}");
        }
    }

    #[test]
    fn the_hash_is_what_it_was() {
        // Consoles are kept across versions: a change of the hash must be seen.
        assert_eq!(format!("{:016x}", chain_next(chain_start(7), 1, 1000, 2)), "97c5a087df290f8d");
    }

    #[test]
    fn every_input_of_the_hash_counts() {
        let base = chain_next(1, 2, 3, 4);
        for other in
            [chain_next(0, 2, 3, 4), chain_next(1, 3, 3, 4), chain_next(1, 2, 2, 4), chain_next(1, 2, 3, 5)]
        {
            assert_ne!(base, other);
        }
        assert_ne!(chain_next(1, 2, 3, 4), chain_next(1, 3, 2, 4));
    }

    #[test]
    fn a_whole_console_is_good_in_any_pieces() {
        let bytes = console(50);
        for size in [1, 2, 7, 64, 1000, bytes.len()] {
            let mut checker = Checker::from_start(SEED);
            bytes.chunks(size).for_each(|chunk| checker.feed(chunk));
            assert_eq!(checker.verdict(), Ok(()));
            assert_eq!(checker.counts(), Counts { lines: 50, echoes: 0, foreign: 50 });
            assert!(checker.is_done());
        }
    }

    #[test]
    fn carriage_returns_and_echoes_are_fine() {
        let text = format!("{}echo hello\r\n", lines(1)[0].replace('\n', "\r\n"));
        let (checker, verdict) = check(Checker::from_start(SEED), &text);
        assert_eq!(verdict, Ok(()));
        assert_eq!(checker.counts(), Counts { lines: 1, echoes: 1, foreign: 0 });
    }

    #[test]
    fn an_unfinished_line_is_not_judged() {
        let all = lines(3).concat();
        let cut = all.find("00000003").unwrap() + 12;
        let (checker, verdict) = check(Checker::from_start(SEED), &all[..cut]);
        assert_eq!(verdict, Ok(()));
        assert_eq!(checker.last().unwrap().number, 2);
        assert!(!checker.is_done());
    }

    #[test]
    fn a_lost_or_repeated_line_is_a_gap() {
        let all = lines(5);
        let without = [&all[..2], &all[3..]].concat().concat();
        let at = all[..2].concat().len() as u64;
        let (_, verdict) = check(Checker::from_start(SEED), &without);
        assert_eq!(verdict, Err(Fault::Gap { at, expected: 3, number: 4 }));
        let twice = [&all[..2], &all[1..]].concat().concat();
        let (checker, verdict) = check(Checker::from_start(SEED), &twice);
        assert_eq!(verdict, Err(Fault::Gap { at, expected: 3, number: 2 }));
        assert_eq!(checker.counts().lines, 2);
        assert!(!checker.is_done());
    }

    #[test]
    fn a_changed_line_breaks_the_chain() {
        let mut all = lines(5);
        all[2] = all[2].replace("cpu=1", "cpu=0");
        // The CPU is not part of the hash: where a step ran is no part of what it did.
        assert_eq!(check(Checker::from_start(SEED), &all.concat()).1, Ok(()));
        all[2] = all[2].replace("t=3000", "t=3001");
        assert!(matches!(
            check(Checker::from_start(SEED), &all.concat()).1,
            Err(Fault::Broken { number: 3, .. })
        ));
    }

    #[test]
    fn another_seed_is_another_console() {
        assert!(matches!(
            check(Checker::from_start(8), &lines(1).concat()).1,
            Err(Fault::Broken { number: 1, .. })
        ));
    }

    #[test]
    fn the_middle_is_an_error_unless_asked_for() {
        let tail = lines(5)[2..].concat();
        assert_eq!(check(Checker::from_start(SEED), &tail).1, Err(Fault::NotFromStart { at: 0, number: 3 }));
        let (checker, verdict) = check(Checker::from_middle(), &tail[5..]);
        assert_eq!(verdict, Ok(()));
        assert_eq!(checker.counts(), Counts { lines: 2, echoes: 0, foreign: 1 });
        assert!(checker.is_done());
    }

    #[test]
    fn a_clock_that_steps_back_is_a_fault() {
        let first = Line::next(chain_start(SEED), 1, 1000, 0, 0);
        let second = Line::next(first.chain, 2, 999, 0, 0);
        let (_, verdict) = check(Checker::from_start(SEED), &format!("{first}\n{second}\n"));
        assert!(matches!(verdict, Err(Fault::ClockBack { number: 2, before_ns: 1000, clock_ns: 999, .. })));
    }

    #[test]
    fn a_line_mixed_with_another_is_garbled() {
        let text = lines(1)[0].replace(" cpu", "[ 1.0] watchdog\r\n cpu");
        assert!(matches!(check(Checker::from_start(SEED), &text).1, Err(Fault::Garbled { at: 0, .. })));
    }

    #[test]
    fn the_end_must_match_and_be_the_end() {
        let all = lines(3);
        let early = [&all[..2], &all[3..]].concat().concat();
        assert!(matches!(check(Checker::from_start(SEED), &early).1, Err(Fault::WrongEnd { .. })));
        let twice = [&all[..], &all[3..]].concat().concat();
        assert!(matches!(check(Checker::from_start(SEED), &twice).1, Err(Fault::WrongEnd { .. })));
        let after = [&all[..], &all[2..3]].concat().concat();
        assert!(matches!(check(Checker::from_start(SEED), &after).1, Err(Fault::AfterEnd { number: 3, .. })));
        assert_eq!(check(Checker::from_start(SEED), &lines(0).concat()).1, Ok(()));
    }

    #[test]
    fn what_the_guest_reports_is_a_fault() {
        let text = "colo-error clock cpu=1 before=5 now=4\r\n";
        let (_, verdict) = check(Checker::from_start(SEED), text);
        assert_eq!(verdict, Err(Fault::Reported { at: 0, text: text.trim_end().to_owned() }));
    }

    #[test]
    fn the_first_fault_stays_and_bytes_of_any_kind_are_taken() {
        let mut checker = Checker::from_start(SEED);
        checker.feed(b"colo nonsense\n");
        let first = checker.verdict();
        checker.feed(&[0xff; 3 * PENDING_MAX]);
        checker.feed(b"\ncolo-error memory\n");
        assert!(matches!(first, Err(Fault::Garbled { .. })));
        assert_eq!(checker.verdict(), first);
        assert_eq!(checker.counts().foreign, 2);
        assert!(checker.pending.capacity() <= 2 * PENDING_MAX);
    }
}
