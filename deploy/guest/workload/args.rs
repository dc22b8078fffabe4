// SPDX-License-Identifier: Apache-2.0
//! The arguments of the workload: `name=value` words, as they stand behind `--` on the kernel's command line.
//! A word that is not understood is an error, since a test that misspells its load would test another one.

use crate::memory::Pattern;
use crate::sys::Stop;

/// What happens to the machine when the workload has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Stop(Stop),
    /// A byte to the isa-debug-exit port.
    Exit(u8),
    /// Only the process ends: what a shell wants.
    Process,
}

/// What the workload is to do. README.md has the meaning of each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Args {
    pub(crate) pages: usize,
    pub(crate) touch: usize,
    pub(crate) words: usize,
    pub(crate) pattern: Pattern,
    pub(crate) lines: u64,
    pub(crate) delay_us: u64,
    pub(crate) threads: usize,
    pub(crate) seed: u64,
    pub(crate) end: End,
    pub(crate) echo: bool,
    pub(crate) button: bool,
    pub(crate) sleep: bool,
}

impl Args {
    /// Without arguments: a small load that ends by itself.
    pub(crate) fn new(end: End) -> Self {
        Self {
            pages: 256,
            touch: 16,
            words: 8,
            pattern: Pattern::Sequential,
            lines: 100,
            delay_us: 0,
            threads: 1,
            seed: 1,
            end,
            echo: false,
            button: false,
            sleep: false,
        }
    }

    /// Takes every word; the error names the first that is wrong.
    pub(crate) fn parse(mut self, words: &[String]) -> Result<Self, String> {
        for word in words {
            self.take(word).ok_or_else(|| word.clone())?;
        }
        Ok(self)
    }

    fn take(&mut self, word: &str) -> Option<()> {
        let (name, value) = word.split_once('=')?;
        match name {
            "pages" => self.pages = bounded(value, 0, 1 << 30)?,
            "touch" => self.touch = bounded(value, 0, 1 << 30)?,
            "words" => self.words = bounded(value, 1, 512)?,
            "pattern" => self.pattern = pattern(value)?,
            "lines" => self.lines = value.parse().ok()?,
            "delay_us" => self.delay_us = bounded(value, 0, 3_600_000_000)? as u64,
            "threads" => self.threads = bounded(value, 1, 64)?,
            "seed" => self.seed = value.parse().ok()?,
            "end" => self.end = end(value)?,
            "echo" => self.echo = switch(value)?,
            "button" => self.button = switch(value)?,
            "sleep" => self.sleep = switch(value)?,
            _ => return None,
        }
        Some(())
    }
}

fn bounded(value: &str, low: usize, high: usize) -> Option<usize> {
    value.parse().ok().filter(|number| (low..=high).contains(number))
}

fn switch(value: &str) -> Option<bool> {
    bounded(value, 0, 1).map(|number| number == 1)
}

fn pattern(value: &str) -> Option<Pattern> {
    match value {
        "seq" => Some(Pattern::Sequential),
        "rand" => Some(Pattern::Random),
        _ => None,
    }
}

fn end(value: &str) -> Option<End> {
    match value {
        "reset" => Some(End::Stop(Stop::Reset)),
        "poweroff" => Some(End::Stop(Stop::PowerOff)),
        "halt" => Some(End::Stop(Stop::Halt)),
        "process" => Some(End::Process),
        _ => value.strip_prefix("exit:")?.parse().ok().map(End::Exit),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Args, String> {
        let words: Vec<_> = text.split_whitespace().map(str::to_owned).collect();
        Args::new(End::Process).parse(&words)
    }

    #[test]
    fn every_argument_is_taken() {
        let text = "pages=1 touch=2 words=3 pattern=rand lines=4 delay_us=5 threads=6 seed=7 end=exit:8 echo=1 button=1 sleep=1";
        let expected = Args {
            pages: 1,
            touch: 2,
            words: 3,
            pattern: Pattern::Random,
            lines: 4,
            delay_us: 5,
            threads: 6,
            seed: 7,
            end: End::Exit(8),
            echo: true,
            button: true,
            sleep: true,
        };
        assert_eq!(parse(text), Ok(expected));
    }

    #[test]
    fn a_wrong_word_is_named() {
        for word in
            ["page=1", "pages", "pages=-1", "words=0", "words=513", "end=exit:256", "echo=2", "threads=0"]
        {
            assert_eq!(parse(word), Err(word.to_owned()));
        }
    }
}
