// SPDX-License-Identifier: Apache-2.0
//! The arguments of the service's init: `name=value` words, as they stand behind `--` on the kernel's command line.
//! A word that is not understood is an error, since a test that misspells its load would test another one.

use crate::sys::Stop;

/// What the guest does with its devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Redis,
    /// Writes and reads files of the disk's file system.
    Blk,
    /// Writes, reads and discards blocks of the disk itself, whatever was on it.
    Raw,
    /// Writes to the disk and sends frames as fast as it can.
    Flood,
}

/// When Redis syncs its file, in Redis's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fsync {
    Always,
    EverySecond,
    Never,
}

impl Fsync {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Always => "always",
            Self::EverySecond => "everysec",
            Self::Never => "no",
        }
    }
}

/// What happens to the machine when it was told to end, or has done its steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Stop(Stop),
    /// A byte to the isa-debug-exit port.
    Exit(u8),
}

/// What the guest is to do. README.md has the meaning of each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Args {
    pub(crate) mode: Mode,
    pub(crate) fsync: Fsync,
    pub(crate) steps: u64,
    pub(crate) blocks: u64,
    pub(crate) delay_us: u64,
    pub(crate) seed: u64,
    pub(crate) discard: bool,
    pub(crate) disk: bool,
    pub(crate) net: bool,
    pub(crate) frame: usize,
    pub(crate) end: End,
}

impl Args {
    /// Takes every word; the error is the first that is wrong.
    pub(crate) fn parse(words: &[String]) -> Result<Self, String> {
        let mut args = Self {
            mode: Mode::Redis,
            fsync: Fsync::EverySecond,
            steps: 0,
            blocks: 2048,
            delay_us: 0,
            seed: 1,
            discard: true,
            disk: true,
            net: true,
            frame: 1400,
            end: End::Stop(Stop::Reset),
        };
        for word in words {
            args.take(word).ok_or_else(|| word.clone())?;
        }
        Ok(args)
    }

    fn take(&mut self, word: &str) -> Option<()> {
        let (name, value) = word.split_once('=')?;
        match name {
            "mode" => self.mode = mode(value)?,
            "fsync" => self.fsync = fsync(value)?,
            "steps" => self.steps = value.parse().ok()?,
            // The plan remembers each block: 1 << 20 of them are 4 GiB of disk and 8 MiB of guest memory.
            "blocks" => self.blocks = bounded(value, 1, 1 << 20)?,
            "delay_us" => self.delay_us = bounded(value, 0, 3_600_000_000)?,
            "seed" => self.seed = value.parse().ok()?,
            "discard" => self.discard = bounded(value, 0, 1)? == 1,
            "disk" => self.disk = bounded(value, 0, 1)? == 1,
            "net" => self.net = bounded(value, 0, 1)? == 1,
            // The largest datagram; more than 1472 goes out as several frames, which costs the guest less than as many.
            "frame" => self.frame = bounded(value, 1, 65_507)? as usize,
            "end" => self.end = end(value)?,
            // The network's, which reads it from the whole command line.
            "ip" => {}
            _ => return None,
        }
        Some(())
    }
}

fn bounded(value: &str, low: u64, high: u64) -> Option<u64> {
    value.parse().ok().filter(|number| (low..=high).contains(number))
}

fn mode(value: &str) -> Option<Mode> {
    match value {
        "redis" => Some(Mode::Redis),
        "blk" => Some(Mode::Blk),
        "raw" => Some(Mode::Raw),
        "flood" => Some(Mode::Flood),
        _ => None,
    }
}

fn fsync(value: &str) -> Option<Fsync> {
    [Fsync::Always, Fsync::EverySecond, Fsync::Never].into_iter().find(|fsync| fsync.name() == value)
}

fn end(value: &str) -> Option<End> {
    match value {
        "reset" => Some(End::Stop(Stop::Reset)),
        "poweroff" => Some(End::Stop(Stop::PowerOff)),
        "halt" => Some(End::Stop(Stop::Halt)),
        _ => value.strip_prefix("exit:")?.parse().ok().map(End::Exit),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Args, String> {
        let words: Vec<_> = text.split_whitespace().map(str::to_owned).collect();
        Args::parse(&words)
    }

    #[test]
    fn every_argument_is_taken() {
        let text = "mode=raw fsync=always steps=1 blocks=2 delay_us=3 seed=4 discard=0 disk=0 net=0 frame=5 end=exit:6 ip=x";
        let expected = Args {
            mode: Mode::Raw,
            fsync: Fsync::Always,
            steps: 1,
            blocks: 2,
            delay_us: 3,
            seed: 4,
            discard: false,
            disk: false,
            net: false,
            frame: 5,
            end: End::Exit(6),
        };
        assert_eq!(parse(text), Ok(expected));
    }

    #[test]
    fn a_wrong_word_is_named() {
        for word in [
            "mode=Redis",
            "blocks=0",
            "discard=2",
            "frame=65508",
            "step=1",
            "mode",
            "fsync=1",
            "end=exit:256",
        ] {
            assert_eq!(parse(&format!("mode=blk {word}")), Err(word.to_owned()));
        }
    }
}
