//! No bytes panic a decoder: one bounded target for each. What is taken is taken for good: it encodes again, and that
//! decodes to the same.

mod samples;

use bolero::check;
use bolero::generator::produce;
use bytes::Bytes;
use colo_common::limits::MAX_DIGESTS_ASKED;
use colo_common::register::Entry;
use colo_common::{Block, Gfn};
use colo_proto::convert;
use colo_proto::frame::{Frame, HEADER_LEN, Header, Kind, VmTag, check_body};
use colo_proto::heartbeat::{HEARTBEAT_LEN, Heartbeat};
use colo_proto::message::{
    Ack, BlockDigestRequest, BlockDigests, Compared, Control, DigestRequest, Diverged, EpochBegin, EpochEnd,
    Goodbye, Hello, Message, Output, Progress, RangeDigests, Refused, SeedBegin, TermChanged, Welcome, Yield,
};
use colo_proto::pages::{MAX_RUNS, RunTable};
use colo_proto::v1;
use colo_proto::version::PROTOCOL_VERSION;
use prost::Message as _;
use std::fmt::Debug;
use xxhash_rust::xxh3::xxh3_64;

/// Enough for a run on every `make test`; a fuzzer proper takes the same targets.
const ITERATIONS: usize = 20_000;
const LONGEST: usize = 512;

/// Numbers that arithmetic trips over; random bytes hardly ever spell them.
const EDGES: [u64; 8] = [0, 1, 127, 128, u32::MAX as u64, 1 << 62, u64::MAX - 1, u64::MAX];

/// Puts the right checksum at the end, so that the fuzzer gets past it.
fn seal(bytes: &mut [u8]) {
    let (content, seal) = bytes.split_at_mut(bytes.len() - 8);
    seal.copy_from_slice(&xxh3_64(content).to_le_bytes());
}

/// A target over bytes of up to [`LONGEST`]; without a generator of its own, bolero stops at 64.
macro_rules! bytes {
    ($test:expr) => {
        check!()
            .with_generator(produce::<Vec<u8>>().with().len(0..LONGEST))
            .with_iterations(ITERATIONS)
            .for_each(|bytes: &Vec<u8>| $test(bytes.as_slice()))
    };
}

/// Any bytes; and so that the fuzzer gets far, the sample with some of its bytes changed or replaced.
fn decodes<M: Message + PartialEq + Debug>(sample: &[u8], bytes: &[u8]) {
    let one = |body: &[u8]| {
        if let Ok(message) = M::decode(body) {
            assert_eq!(M::decode(&message.encode()), Ok(message));
        }
    };
    one(bytes);
    let Some((&at, change)) = bytes.split_first() else { return };
    let mut body = sample.to_vec();
    for pair in change.chunks_exact(2).take(1 + bytes.len() % 4) {
        let at = usize::from(pair[0]) % (body.len() + 1);
        body.get_mut(at).into_iter().for_each(|byte| *byte = pair[1]);
    }
    one(&body);
    let at = usize::from(at) % (sample.len() + 1);
    let replaced =
        |len: usize, by: &[u8]| [&sample[..at], by, &sample[sample.len().min(at + len)..]].concat();
    let part = &change[..change.len().min(16)];
    one(&replaced(part.len(), part));
    let [edge, len, ..] = *part else { return };
    let edge = postcard::to_stdvec(&EDGES[usize::from(edge) % EDGES.len()]).unwrap();
    one(&replaced(usize::from(len) % 4, &edge));
}

#[test]
fn header() {
    bytes!(|bytes: &[u8]| {
        let mut header = Header {
            kind: Kind::Ack,
            vm: VmTag(1),
            point: colo_common::history::point(1, 2),
            index: 3,
            table_len: 0,
            body_len: 4,
            checksum: 5,
        }
        .encode();
        let raw: Vec<u8> = bytes.iter().copied().chain(std::iter::repeat(0)).take(HEADER_LEN).collect();
        let _ = Header::decode(raw.as_slice().try_into().unwrap());
        // From the version on, anything.
        header[4..].iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        seal(&mut header);
        if let Ok(found) = Header::decode(&header) {
            assert_eq!(found.encode(), header);
            assert!(found.body_len as usize <= found.kind.max_body());
            let _ = check_body(&found, &[], bytes);
        }
    });
}

#[test]
fn control_frame() {
    bytes!(|bytes: &[u8]| {
        let Some((&kind, body)) = bytes.split_first() else { return };
        let kind = Kind::ALL[usize::from(kind) % Kind::ALL.len()];
        let body = Bytes::copy_from_slice(&body[..body.len().min(kind.max_body())]);
        let frame = Frame::new(kind, VmTag(1), colo_common::Point::default(), 0, Bytes::new(), body);
        let _ = Control::decode(&frame);
    });
}

/// A table that is mostly right: each four bytes are a run's distance from the one before, its length, its content, and
/// now and then a number to put in place of one of them.
fn nearly_right(bytes: &[u8]) -> Vec<u8> {
    let (mut free, mut table) = (0_u64, Vec::new());
    for &[gap, count, content, odd] in bytes.as_chunks().0 {
        let (mut first, mut count, mut content) =
            (free + u64::from(gap), u32::from(count % 8) + 1, u32::from(content % 2));
        let edge = EDGES[usize::from(odd) % EDGES.len()];
        match odd / 8 {
            0 => first = edge,
            1 => count = edge as u32,
            2 => content = edge as u32,
            3 => first = free.saturating_sub(1),
            _ => {}
        }
        free = first.saturating_add(count.into()).min(1 << 40);
        table.extend(first.to_le_bytes());
        table.extend(count.to_le_bytes().into_iter().chain(content.to_le_bytes()));
    }
    table
}

#[test]
fn run_table() {
    bytes!(|bytes: &[u8]| {
        let Some((&limit, table)) = bytes.split_first() else { return };
        let nearly_right = nearly_right(table);
        for table in [table, nearly_right.as_slice()] {
            let _ = RunTable::decode::<Block>(table, 1 << (limit % 64));
            if let Ok(runs) = RunTable::decode::<Gfn>(table, 1 << (limit % 64)) {
                assert!(runs.len() <= MAX_RUNS);
                assert_eq!(RunTable::encode(&runs), table);
                let _ = RunTable::bytes(&runs, bytes).map(Iterator::count);
            }
        }
    });
}

#[test]
fn heartbeat() {
    bytes!(|bytes: &[u8]| {
        let _ = Heartbeat::decode(bytes);
        let mut datagram: Vec<u8> =
            bytes.iter().copied().chain(std::iter::repeat(0)).take(HEARTBEAT_LEN).collect();
        datagram[..4].copy_from_slice(b"COLH");
        datagram[4..6].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
        seal(&mut datagram);
        let beat = Heartbeat::decode(&datagram).expect("whatever its numbers are, it is one");
        assert_eq!(beat.encode().as_slice(), datagram);
    });
}

#[test]
fn register_entry() {
    bytes!(|bytes: &[u8]| {
        let Ok(sent) = v1::RegisterEntry::decode(bytes) else { return };
        if let Ok(entry) = Entry::try_from(&sent) {
            assert_eq!(Entry::try_from(&v1::RegisterEntry::from(&entry)), Ok(entry));
        }
    });
}

#[test]
fn history_points() {
    check!().with_type::<Vec<(u8, u8)>>().with_iterations(ITERATIONS).for_each(|points| {
        let points: Vec<_> = points
            .iter()
            .map(|&(term, epoch)| v1::Point { term: term.into(), epoch: epoch.into() })
            .collect();
        if let Ok(history) = convert::history(&points) {
            assert_eq!(convert::history_points(&history), points);
        }
    });
}

#[test]
fn requests_for_digests_are_bounded() {
    check!().with_type::<(u64, u64, u8, u8)>().with_iterations(ITERATIONS).for_each(
        |&(first, count, near, edge)| {
            let edge = EDGES[usize::from(edge) % EDGES.len()];
            for (first, count) in [
                (first, count),
                (edge, count % (2 * MAX_DIGESTS_ASKED)),
                (first % Block::END, MAX_DIGESTS_ASKED - 2 + u64::from(near % 5)),
                (Block::END - u64::from(near), 1 + count % 512),
            ] {
                let request = BlockDigestRequest { first: Block(first), count };
                let good = (1..=MAX_DIGESTS_ASKED).contains(&count)
                    && first.checked_add(count).is_some_and(|end| end <= Block::END);
                let decoded = BlockDigestRequest::decode(&postcard::to_stdvec(&request).unwrap());
                assert_eq!(decoded.is_ok(), good, "{request:?}");
            }
        },
    );
}

/// A target for each message.
macro_rules! messages {
    ($($name:ident: $kind:ty = $sample:expr;)*) => {
        $(#[test]
        fn $name() {
            let sample = $sample.encode();
            bytes!(|bytes: &[u8]| decodes::<$kind>(&sample, bytes));
        })*
    };
}

messages! {
    seed_begin: SeedBegin = samples::seed_begin();
    epoch_begin: EpochBegin = samples::epoch_begin();
    output: Output = samples::output();
    epoch_end: EpochEnd = samples::epoch_end();
    hello: Hello = samples::hellos()[1];
    welcome: Welcome = samples::welcome();
    refused: Refused = samples::refusals()[0];
    ack: Ack = samples::ack();
    progress: Progress = samples::progress();
    term_changed: TermChanged = samples::term_changed();
    digest_request: DigestRequest = samples::digest_request();
    range_digests: RangeDigests = samples::range_digests();
    block_digest_request: BlockDigestRequest = samples::block_digest_request();
    block_digests: BlockDigests = samples::block_digests();
    diverged: Diverged = samples::diverged();
    yields: Yield = samples::yields();
    goodbye: Goodbye = Goodbye;
}
