//! The network: links as QUIC gives them. Each has streams that never reorder; as a whole it breaks, at any frame, and
//! what was on the way is lost. Mirrors `primary::quic` and `secondary::receiver`, and the heartbeats of both.

use colo_common::{Incarnation, NodeId, Term};
use colo_primary::link::Purpose;
use colo_primary::replicator::{Ack, Offer};
use colo_proto::frame::Frame;
use colo_proto::message::{BlockDigestRequest, BlockDigests, DigestRequest, Diverged, RangeDigests};
use colo_tests::seed::Seed;
use std::collections::{BTreeMap, VecDeque};

use crate::plan::{HANDSHAKE_LIMIT, MAX_NODES, SUSPECT_AFTER, Time};

/// What travels.
#[derive(Debug)]
pub(crate) enum Msg {
    Hello {
        node: NodeId,
        term: Term,
        purpose: Purpose,
    },
    Welcome {
        node: NodeId,
        offer: Offer,
        max_epoch_bytes: u64,
    },
    Refused(String),
    /// The follower has not read the register yet.
    NotReady,
    Term(Term),
    DigestRequest(DigestRequest),
    BlockDigestRequest(BlockDigestRequest),
    /// Whether the guest failed.
    Yield(bool),
    Goodbye,
    Frame(Box<Frame>),
    Ack(Ack),
    Digests(RangeDigests),
    BlockDigests(BlockDigests),
    Diverged(Diverged),
    /// Not a message: the link is of no more use to this end.
    Down(String),
}

/// The streams of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Control, from the runner.
    Say,
    /// Transfers, from the runner.
    Transfers,
    /// Control, from the follower.
    Hear,
}

const WAYS: [Way; 3] = [Way::Say, Way::Transfers, Way::Hear];

#[derive(Debug)]
struct End {
    node: usize,
    process: Option<Incarnation>,
    open: bool,
    heard: Time,
    /// The other end's word that it has closed arrives then.
    closing: Option<Time>,
}

#[derive(Debug)]
struct Link {
    /// The runner's and the follower's.
    ends: [End; 2],
    streams: [VecDeque<(Time, Msg)>; 3],
    last_due: [Time; 3],
    /// Nothing goes through any more.
    broken: bool,
    made: Time,
}

/// All links.
#[derive(Debug)]
pub(crate) struct Net {
    links: BTreeMap<u64, Link>,
    next: u64,
    latency: u64,
    /// Until when nothing passes from one node to another.
    blocked: [[Time; MAX_NODES]; MAX_NODES],
    pub(crate) processes: [Option<Incarnation>; MAX_NODES],
    /// Until when a node's process stands still.
    pub(crate) frozen: [Time; MAX_NODES],
    /// Until when a node's thread waits for its disk; its heartbeats go on.
    pub(crate) busy: [Time; MAX_NODES],
    /// Messages that were lost with their link.
    pub(crate) lost: u64,
    /// Links of a node that had another one to the same peer.
    pub(crate) doubled: u64,
}

impl Net {
    pub(crate) fn new(latency: u64) -> Self {
        let (links, processes) = (BTreeMap::new(), [None; MAX_NODES]);
        let (blocked, frozen, busy) = ([[0; MAX_NODES]; MAX_NODES], [0; MAX_NODES], [0; MAX_NODES]);
        Self { links, next: 1, latency, blocked, processes, frozen, busy, lost: 0, doubled: 0 }
    }

    /// A runner begins to make a link; the hello is on its way.
    pub(crate) fn connect(&mut self, from: usize, to: usize, hello: Msg, now: Time, seed: &mut Seed) -> u64 {
        let number = self.next;
        self.next += 1;
        let same = |link: &&Link| link.ends[0].node == from && link.ends[1].node == to && link.ends[1].open;
        self.doubled += u64::from(self.links.values().any(|link| same(&link)));
        let end = |node, process| End { node, process, open: true, heard: now, closing: None };
        let ends = [end(from, self.processes[from]), End { open: false, ..end(to, None) }];
        let streams = Default::default();
        self.links.insert(number, Link { ends, streams, last_due: [now; 3], broken: false, made: now });
        self.send(number, Way::Say, hello, now, seed);
        number
    }

    /// The follower's process takes the link.
    pub(crate) fn accept(&mut self, number: u64, process: Incarnation, now: Time) {
        if let Some(link) = self.links.get_mut(&number) {
            let end = &mut link.ends[1];
            (end.process, end.open, end.heard) = (Some(process), true, now);
        }
    }

    pub(crate) fn send(&mut self, number: u64, way: Way, message: Msg, now: Time, seed: &mut Seed) {
        let latency = self.latency;
        if let Some(link) = self.links.get_mut(&number) {
            if link.broken {
                self.lost += 1;
                return;
            }
            let due = (now + 1 + seed.below(latency)).max(link.last_due[way as usize]);
            link.last_due[way as usize] = due;
            link.streams[way as usize].push_back((due, message));
        }
    }

    /// Messages that wait on a stream.
    pub(crate) fn waiting(&self, number: u64, way: Way) -> usize {
        self.links.get(&number).map_or(0, |link| link.streams[way as usize].len())
    }

    /// An end closes: it hears nothing more, and the other hears of it if that gets through.
    pub(crate) fn close(&mut self, number: u64, side: usize, now: Time, seed: &mut Seed) {
        let latency = self.latency;
        if let Some(link) = self.links.get_mut(&number) {
            link.ends[side].open = false;
            let due = now + 1 + seed.below(latency);
            link.ends[1 - side].closing.get_or_insert(due);
        }
    }

    /// The follower ends a link once its last word is said: `receiver::speak`.
    pub(crate) fn close_after(&mut self, number: u64, now: Time) {
        if let Some(link) = self.links.get_mut(&number) {
            link.ends[1].open = false;
            let due = link.last_due[Way::Hear as usize].max(now) + 1;
            link.ends[0].closing.get_or_insert(due);
        }
    }

    /// The path of one link is gone; what is on the way is lost from some message on.
    pub(crate) fn break_one(&mut self, seed: &mut Seed) -> bool {
        let open: Vec<u64> = self
            .links
            .iter()
            .filter(|(_, link)| !link.broken && link.ends[1].open)
            .map(|(n, _)| *n)
            .collect();
        if open.is_empty() {
            return false;
        }
        let number = open[seed.below(open.len() as u64) as usize];
        let Some(link) = self.links.get_mut(&number) else { return false };
        link.broken = true;
        for stream in &mut link.streams {
            let kept = seed.below(stream.len() as u64 + 1) as usize;
            self.lost += (stream.len() - kept) as u64;
            stream.truncate(kept);
        }
        true
    }

    pub(crate) fn block(&mut self, from: usize, to: usize, until: Time) {
        self.blocked[from][to] = self.blocked[from][to].max(until);
    }

    pub(crate) fn heal(&mut self) {
        self.blocked = [[0; MAX_NODES]; MAX_NODES];
        self.frozen = [0; MAX_NODES];
    }

    pub(crate) fn is_blocked(&self, from: usize, to: usize, now: Time) -> bool {
        self.blocked[from][to] > now
    }

    /// The next message that arrives now: link, node and its end.
    pub(crate) fn deliver(&mut self, now: Time) -> Option<(u64, usize, Msg)> {
        let Self { links, blocked, processes, frozen, busy, .. } = self;
        for (&number, link) in links {
            for way in WAYS {
                let side = usize::from(way != Way::Hear);
                let (to, from) = (&link.ends[side], &link.ends[1 - side]);
                let node = to.node;
                let hello = matches!(link.streams[way as usize].front(), Some((_, Msg::Hello { .. })));
                let listens = hello || (to.open && to.process == processes[node]);
                let works = frozen[node] <= now && busy[node] <= now;
                let through = listens && works && blocked[from.node][node] <= now;
                let gone = to.closing.is_some_and(|at| at <= now);
                let stream = &mut link.streams[way as usize];
                if through && !gone && stream.front().is_some_and(|(due, _)| *due <= now) {
                    return stream.pop_front().map(|(_, message)| (number, node, message));
                }
            }
        }
        None
    }

    /// The next end that finds its link down.
    pub(crate) fn down(&mut self, now: Time) -> Option<(u64, usize, Msg)> {
        let Self { links, blocked, processes, frozen, lost, .. } = self;
        let alive = |end: &End| end.process.is_some() && end.process == processes[end.node];
        links.retain(|_, link| {
            let used =
                link.ends.iter().any(|end| end.open && alive(end)) || link.made + HANDSHAKE_LIMIT > now;
            *lost += if used { 0 } else { link.streams.iter().map(VecDeque::len).sum::<usize>() as u64 };
            used
        });
        for (&number, link) in links {
            for side in [0, 1] {
                let (end, peer) = (&link.ends[side], &link.ends[1 - side]);
                let (node, other) = (end.node, peer.node);
                if !end.open || !alive(end) || frozen[node] > now {
                    continue;
                }
                let beats = peer.open && alive(peer) && frozen[other] <= now;
                let heard = beats && !link.broken && blocked[other][node] <= now;
                let through = blocked[other][node] <= now && !link.broken;
                let closed = end.closing.is_some_and(|at| at <= now) && through;
                let silent = now.saturating_sub(end.heard) > SUSPECT_AFTER;
                let end = &mut link.ends[side];
                if heard {
                    end.heard = now;
                }
                if closed || (silent && !heard && link.ends[1].process.is_some()) {
                    link.ends[side].open = false;
                    link.ends[1 - side].closing.get_or_insert(now + 2);
                    let why = if closed { "closed by the peer" } else { "silent" };
                    return Some((number, node, Msg::Down(why.to_owned())));
                }
            }
        }
        None
    }

    /// A process that stood still gives its peers the benefit of the doubt.
    pub(crate) fn thaw(&mut self, node: usize, now: Time) {
        for end in self.links.values_mut().flat_map(|link| &mut link.ends).filter(|end| end.node == node) {
            end.heard = now;
        }
    }
}
