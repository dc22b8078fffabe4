//! The released console of a vm, put together from every node that let bytes out, by absolute offset. Outside the way
//! of a page: it stands for the world that hears the guest.

use anyhow::{anyhow, bail, ensure};

use crate::chain::{Checker, Counts};

/// Bytes of console that are kept at most: hours of a guest's chatter.
const MAX_CONSOLE: usize = 256 << 20;
/// Bytes of both sides that a message about a conflict shows.
const SHOWN: usize = 60;

/// Everything that was ever let out.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    bytes: Vec<u8>,
    known: Vec<bool>,
    conflicting: u64,
    first_conflict: Option<String>,
}

impl Ledger {
    /// `node` let these bytes out.
    pub fn take(&mut self, node: &str, offset: u64, bytes: &[u8]) {
        let Some((start, end)) = place(offset, bytes.len()) else {
            self.conflicting += bytes.len() as u64;
            self.first_conflict.get_or_insert_with(|| format!("{node} let bytes out at offset {offset}"));
            return;
        };
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
            self.known.resize(end, false);
        }
        for (at, &byte) in (start..end).zip(bytes) {
            if self.known[at] && self.bytes[at] != byte {
                self.conflict(node, at, start, bytes);
            } else {
                (self.bytes[at], self.known[at]) = (byte, true);
            }
        }
    }

    fn conflict(&mut self, node: &str, at: usize, start: usize, bytes: &[u8]) {
        self.conflicting += 1;
        if self.first_conflict.is_some() {
            return;
        }
        let text = |bytes: &[u8]| String::from_utf8_lossy(&bytes[..bytes.len().min(SHOWN)]).into_owned();
        let (said, known) = (text(&bytes[at - start..]), text(&self.bytes[at..]));
        self.first_conflict =
            Some(format!("at byte {at} {node} said {said:?} where {known:?} was out already"));
    }

    /// Offset after the last byte before the first gap.
    pub fn whole(&self) -> u64 {
        self.known.iter().position(|known| !known).unwrap_or(self.known.len()) as u64
    }

    /// Offset after the newest byte.
    pub fn end(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Bytes that were let out twice and differ.
    pub fn conflicting(&self) -> u64 {
        self.conflicting
    }

    /// Everything before the first gap.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.known.iter().position(|known| !known).unwrap_or(self.known.len())]
    }

    /// No gap and no conflict.
    ///
    /// # Errors
    /// Where the first one is.
    pub fn check_history(&self) -> anyhow::Result<()> {
        if let Some(conflict) = &self.first_conflict {
            bail!("{} released bytes conflict: {conflict}", self.conflicting);
        }
        let (whole, end) = (self.whole(), self.end());
        ensure!(whole == end, "the released console has a gap at byte {whole}; it goes on up to {end}");
        Ok(())
    }

    /// One history whose hash chain, which begins with `seed`, is unbroken.
    ///
    /// # Errors
    /// What is broken.
    pub fn check_chain(&self, seed: u64) -> anyhow::Result<Counts> {
        self.check_history()?;
        let mut checker = Checker::from_start(seed);
        checker.feed(self.bytes());
        checker.verdict().map_err(|fault| anyhow!("the console's chain is broken: {fault}"))?;
        Ok(checker.counts())
    }

    /// The end of the console, for messages.
    pub fn tail(&self) -> String {
        let bytes = self.bytes();
        String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(600)..]).into_owned()
    }
}

fn place(offset: u64, len: usize) -> Option<(usize, usize)> {
    let start = usize::try_from(offset).ok()?;
    let end = start.checked_add(len)?;
    (end <= MAX_CONSOLE).then_some((start, end))
}

#[cfg(test)]
mod tests {
    use super::{Ledger, MAX_CONSOLE};

    #[test]
    fn what_two_nodes_say_is_one_console() {
        let mut ledger = Ledger::default();
        ledger.take("a", 0, b"hello wor");
        ledger.take("b", 6, b"world");
        ledger.check_history().unwrap();
        assert_eq!((ledger.bytes(), ledger.whole()), (&b"hello world"[..], 11));
    }

    #[test]
    fn gaps_and_conflicts_are_found() {
        let mut ledger = Ledger::default();
        ledger.take("a", 0, b"abc");
        ledger.take("b", 5, b"xyz");
        assert!(ledger.check_history().unwrap_err().to_string().contains("gap at byte 3"));
        assert_eq!((ledger.whole(), ledger.end()), (3, 8));
        ledger.take("b", 2, b"cde");
        ledger.check_history().unwrap();
        ledger.take("b", 1, b"bX");
        assert_eq!(ledger.conflicting(), 1);
        let text = ledger.check_history().unwrap_err().to_string();
        assert!(text.contains("at byte 2 b said \"X\""), "{text}");
        ledger.take("b", MAX_CONSOLE as u64, b"x");
        ledger.take("b", u64::MAX, b"x");
        assert_eq!(ledger.conflicting(), 3);
    }
}
