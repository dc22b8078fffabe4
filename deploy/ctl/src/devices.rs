//! The guest's disk and network card at a node, as `coloctl status` shows them: cells of its table, and JSON.

use colo_proto::v1::{self, StatusReply};
use serde::Serialize;

use crate::format::{bytes, clean};

#[derive(Serialize)]
pub(crate) struct Disk {
    path: String,
    bytes: u64,
    read_only: bool,
    /// Still to go into the image file.
    overlay_bytes: Option<u64>,
    /// Why it is of no more use.
    failure: Option<String>,
}

#[derive(Serialize)]
pub(crate) struct Network {
    tap: String,
    mac: String,
    carrier: bool,
    frames_sent: u64,
    frames_received: u64,
    frames_lost: u64,
    frames_held: u64,
    held_bytes: u64,
}

impl From<&v1::Disk> for Disk {
    fn from(disk: &v1::Disk) -> Self {
        Self {
            path: clean(&disk.path),
            bytes: disk.bytes,
            read_only: disk.read_only,
            overlay_bytes: disk.overlay_bytes,
            failure: (!disk.failure.is_empty()).then(|| clean(&disk.failure)),
        }
    }
}

impl From<&v1::Network> for Network {
    fn from(network: &v1::Network) -> Self {
        Self {
            tap: clean(&network.tap),
            mac: clean(&network.mac),
            carrier: network.carrier,
            frames_sent: network.frames_sent,
            frames_received: network.frames_received,
            frames_lost: network.frames_lost,
            frames_held: network.frames_held,
            held_bytes: network.held_bytes,
        }
    }
}

/// The disk, in a cell.
pub(crate) fn disk(status: &StatusReply) -> String {
    let Some(disk) = status.disk.as_ref() else { return String::new() };
    let mut text = format!("{}, {}", bytes(disk.bytes), clean(&disk.path));
    if disk.read_only {
        text.push_str(", read only");
    }
    if let Some(left) = disk.overlay_bytes.filter(|left| *left > 0) {
        text.push_str(&format!(", {} to fold", bytes(left)));
    }
    if !disk.failure.is_empty() {
        // Why is too long for a column, and stands below the table.
        text.push_str(", FAILED");
    }
    text
}

/// The network card, in a cell.
pub(crate) fn network(status: &StatusReply) -> String {
    let Some(network) = status.network.as_ref() else { return String::new() };
    let carrier = if network.carrier { "on" } else { "off" };
    format!("{}, carrier {carrier}, {}", clean(&network.tap), clean(&network.mac))
}

/// Its frames, in a cell.
pub(crate) fn frames(status: &StatusReply) -> String {
    let Some(network) = status.network.as_ref() else { return String::new() };
    let mut text = format!("{} sent, {} received", network.frames_sent, network.frames_received);
    if network.frames_held > 0 {
        text.push_str(&format!(", {} held ({})", network.frames_held, bytes(network.held_bytes)));
    }
    if network.frames_lost > 0 {
        text.push_str(&format!(", {} LOST", network.frames_lost));
    }
    text
}

/// What is below the table: why a disk has failed.
pub(crate) fn failure(status: &StatusReply) -> Option<String> {
    let disk = status.disk.as_ref().filter(|disk| !disk.failure.is_empty())?;
    Some(format!("{}: the guest's disk has failed: {}\n", clean(&status.node), clean(&disk.failure)))
}

#[cfg(test)]
mod tests {
    use super::{disk, failure, frames, network};
    use colo_proto::v1::{Disk, Network, StatusReply};

    #[test]
    fn a_disk_is_told_with_what_is_wrong_with_it() {
        let plain = Disk { path: "/web\x1b.img".to_owned(), bytes: 64 << 20, ..Default::default() };
        let told = |disk: Disk| StatusReply { node: "b".to_owned(), disk: Some(disk), ..Default::default() };
        assert_eq!(disk(&told(plain.clone())), "64.0 MiB, /web?.img");
        assert_eq!(failure(&told(plain.clone())), None);
        let folding = Disk { overlay_bytes: Some(8192), read_only: true, ..plain.clone() };
        assert_eq!(disk(&told(folding)), "64.0 MiB, /web?.img, read only, 8.0 KiB to fold");
        let failed = told(Disk { failure: "a sync failed".to_owned(), overlay_bytes: Some(0), ..plain });
        assert_eq!(disk(&failed), "64.0 MiB, /web?.img, FAILED");
        assert_eq!(failure(&failed).unwrap(), "b: the guest's disk has failed: a sync failed\n");
    }

    #[test]
    fn a_network_card_is_told_with_its_frames() {
        let card = Network {
            tap: "colo-a".to_owned(),
            mac: "02:00:00:12:34:56".to_owned(),
            frames_sent: 7,
            frames_received: 5,
            ..Default::default()
        };
        let told = |network| StatusReply { network: Some(network), ..Default::default() };
        let quiet = told(card.clone());
        assert_eq!(network(&quiet), "colo-a, carrier off, 02:00:00:12:34:56");
        assert_eq!(frames(&quiet), "7 sent, 5 received");
        let busy = told(Network { carrier: true, frames_held: 2, held_bytes: 3000, frames_lost: 1, ..card });
        assert_eq!(network(&busy), "colo-a, carrier on, 02:00:00:12:34:56");
        assert_eq!(frames(&busy), "7 sent, 5 received, 2 held (2.9 KiB), 1 LOST");
    }
}
