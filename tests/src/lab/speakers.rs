//! Which node speaks for the guest: who sent frames with the address of its card, in order.

use anyhow::{Context, ensure};
use colo_common::Mac;
use std::collections::BTreeMap;

use super::Lab;
use super::capture::{Capture, Frame};

/// Protocols of frames.
const ARP: u16 = 0x0806;
const RARP: u16 = 0x8035;
/// The addresses in ARP: the sender's, and the one that is asked for.
const ARP_SENDER: std::ops::Range<usize> = 28..32;
const ARP_TARGET: std::ops::Range<usize> = 38..42;

/// Listens at the TAP of every node.
pub struct Speakers {
    mac: Mac,
    captures: BTreeMap<String, Capture>,
}

/// Frames of the guest's that one node sent, with none of another's in between.
#[derive(Clone, Debug, Default)]
pub struct Turn {
    /// The node.
    pub node: String,
    /// How many.
    pub frames: usize,
    /// Announcements by the card's address alone (RARP), and by the guest's own address (ARP).
    pub announced: (usize, usize),
}

impl Speakers {
    /// Nobody is listened to yet.
    pub fn new(mac: Mac) -> Self {
        Self { mac, captures: BTreeMap::new() }
    }

    /// Listens to one node more.
    ///
    /// # Errors
    /// The lab has no such node, or the system refuses.
    pub fn listen(&mut self, lab: &Lab, node: &str) -> anyhow::Result<()> {
        let capture = lab.capture(node).with_context(|| format!("listening to {node}"))?;
        self.captures.insert(node.to_owned(), capture);
        Ok(())
    }

    /// Who spoke since the last look, turn by turn.
    ///
    /// # Errors
    /// Some frames were missed, so nobody knows.
    pub fn turns(&self) -> anyhow::Result<Vec<Turn>> {
        Ok(turns(&self.said()?))
    }

    /// What was said since the last look and by which node, in order.
    ///
    /// # Errors
    /// Some frames were missed, so nobody knows.
    pub fn said(&self) -> anyhow::Result<Vec<(&str, Frame)>> {
        let mut said: Vec<(&str, Frame)> = Vec::new();
        for (node, capture) in &self.captures {
            let (frames, missed) = capture.take();
            ensure!(missed == 0, "{missed} frames at the TAP of {node} were not seen");
            // What a node writes comes in at its TAP; what goes out there is somebody else's, or came from another port.
            let ours = frames
                .into_iter()
                .filter(|frame| !frame.outgoing && frame.source() == Some(self.mac.bytes()));
            said.extend(ours.map(|frame| (node.as_str(), frame)));
        }
        said.sort_by_key(|(_, frame)| frame.at);
        Ok(said)
    }
}

/// Whose turn it was, of frames in order.
pub fn turns(said: &[(&str, Frame)]) -> Vec<Turn> {
    let mut turns: Vec<Turn> = Vec::new();
    for (node, frame) in said {
        if turns.last().is_none_or(|turn| turn.node != *node) {
            turns.push(Turn { node: (*node).to_owned(), ..Turn::default() });
        }
        turns.last_mut().into_iter().for_each(|turn| turn.count(frame));
    }
    turns
}

impl Turn {
    fn count(&mut self, frame: &Frame) {
        self.frames += 1;
        let by_itself =
            frame.bytes.get(ARP_SENDER).is_some_and(|from| frame.bytes.get(ARP_TARGET) == Some(from));
        self.announced.0 += usize::from(frame.ethertype() == Some(RARP));
        self.announced.1 += usize::from(frame.ethertype() == Some(ARP) && by_itself);
    }
}
