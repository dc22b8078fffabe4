//! The bytes of version 3, as they are on the wire. A test here that fails means that two builds of the same version
//! would not understand each other: add a version (see `version.rs`), or undo the change.

mod samples;

use bytes::Bytes;
use colo_common::history::point;
use colo_common::{Gfn, PAGE_SIZE};
use colo_proto::frame::{Frame, HEADER_LEN, Header, Kind, VmTag};
use colo_proto::heartbeat::{Heartbeat, HeartbeatError};
use colo_proto::message::{EpochEnd, Message, TransferDigest};
use colo_proto::pages::RunTable;
use std::fmt::Debug;

/// Fails with the bytes found, in a form that can be compared with the ones expected.
fn is(what: &str, found: &[u8], golden: &str) {
    let hex: String = found.iter().map(|byte| format!("{byte:02x}")).collect();
    let golden: String = golden.split_whitespace().collect();
    assert_eq!(hex, golden, "{what} is not what version 3 has");
}

fn message<M: Message + PartialEq + Debug>(message: &M, golden: &str) {
    let body = message.encode();
    is(&M::KIND.to_string(), &body, golden);
    assert_eq!(&M::decode(&body).unwrap(), message);
}

#[test]
fn numbers_of_kinds_stay() {
    let numbers: Vec<_> = Kind::ALL.iter().map(|&kind| (kind as u8, kind.to_string())).collect();
    let golden = [
        (1, "SeedBegin"),
        (2, "Pages"),
        (3, "EpochBegin"),
        (4, "State"),
        (5, "Output"),
        (6, "EpochEnd"),
        (7, "Blocks"),
        (8, "Verify"),
        (16, "Hello"),
        (17, "Welcome"),
        (18, "Refused"),
        (19, "Ack"),
        (20, "Progress"),
        (21, "TermChanged"),
        (22, "DigestRequest"),
        (23, "RangeDigests"),
        (24, "Yield"),
        (25, "Goodbye"),
        (26, "BlockDigestRequest"),
        (27, "BlockDigests"),
        (28, "Diverged"),
        (29, "Verified"),
    ];
    assert_eq!(numbers, golden.map(|(number, name)| (number, name.to_owned())));
}

#[test]
fn a_header() {
    let header = Header {
        kind: Kind::Pages,
        vm: VmTag::of(&"demo".parse().unwrap()),
        point: point(3, 1000),
        index: 7,
        table_len: 32,
        body_len: 8192,
        checksum: 0x0123_4567_89ab_cdef,
    };
    let bytes = header.encode();
    is(
        "the header",
        &bytes,
        "434f4c4603000200306345afb32ff7070300000000000000e80300000000000007000000200000000020000000000000efcdab89674523013da22d63702b7424",
    );
    assert_eq!(Header::decode(&bytes), Ok(header));
}

#[test]
fn a_frame_of_pages() {
    let runs = samples::runs();
    let table = RunTable::encode(&runs);
    is(
        "the run table",
        &table,
        "050000000000000002000000000000000700000000000000030201000100000000000f00000000000100000000000000",
    );
    assert_eq!(RunTable::decode(&table, 1 << 20), Ok(runs));
    let body = Bytes::from([[0x11; PAGE_SIZE], [0x22; PAGE_SIZE], [0x33; PAGE_SIZE]].concat());
    let frame = Frame::new(Kind::Pages, VmTag(1), point(3, 1000), 7, table.into(), body);
    let head = frame.head();
    is(
        "its header",
        &head[..HEADER_LEN],
        "434f4c460300020001000000000000000300000000000000e803000000000000070000003000000000300000000000008c3d3533d2ca871e47a0e9e0effbddd0",
    );
    assert_eq!(&head[HEADER_LEN..], frame.table());
    let mut digest = TransferDigest::new();
    digest.add(frame.header());
    digest.add(frame.header());
    is("a transfer's digest", &digest.finish().to_be_bytes(), "96ba1cc074d65f984e2620fcd2430b54");
}

#[test]
fn a_frame_of_blocks() {
    let runs = samples::block_runs();
    let table = RunTable::encode(&runs);
    is("the run table", &table, "0100000000000000010000000100000000000000010000000100000000000000");
    assert_eq!(RunTable::decode(&table, 1 << 33), Ok(runs));
    let body = Bytes::from(vec![0x11; PAGE_SIZE]);
    let frame = Frame::new(Kind::Blocks, VmTag(1), point(3, 1000), 7, table.into(), body);
    is(
        "its header",
        &frame.head()[..HEADER_LEN],
        "434f4c460300070001000000000000000300000000000000e80300000000000007000000200000000010000000000000b18373ba2b2e3b66b2f560b159e371b9",
    );
}

/// What a node of version 1 says, and is told.
#[test]
fn a_hello_of_version_1_is_understood() {
    let hello = Frame::control(VmTag(1), &samples::hellos()[0]);
    assert_eq!(hello.head()[..8], *b"COLF\x01\x00\x10\x00");
    assert_eq!(Header::decode(hello.head()[..HEADER_LEN].try_into().unwrap()), Ok(*hello.header()));
    let refused = Frame::control(VmTag(1), &samples::refusals()[0]);
    assert_eq!(refused.head()[..8], *b"COLF\x01\x00\x12\x00");
    // The end of an epoch is not: its body has other fields.
    assert!(EpochEnd::decode(&[12, 0xac, 2, 4, 0xa0, 0x9c, 1, 9, 0xff, 1]).is_err());
}

#[test]
fn a_heartbeat() {
    let beat = Heartbeat {
        vm: VmTag(0x1122),
        term: colo_common::Term(5),
        sequence: 9,
        sent_us: 1_000_000,
        late_ms: 0x0304,
    };
    is(
        "the heartbeat",
        &beat.encode(),
        "434f4c480300040322110000000000000500000000000000090000000000000040420f0000000000a1427797f50f6beb",
    );
}

/// Of two builds, the older would drop the newer one's: they part by their hellos before that.
#[test]
fn a_heartbeat_of_version_2_is_none() {
    let hex =
        "434f4c480200000022110000000000000500000000000000090000000000000040420f00000000002853a511b012737d";
    let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
    let bytes: Vec<u8> = (0..hex.len()).step_by(2).map(byte).collect();
    assert_eq!(Heartbeat::decode(&bytes), Err(HeartbeatError::Version { found: 2 }));
}

#[test]
fn messages_of_a_transfer() {
    message(&samples::seed_begin(), "0203e6070102010a03e807");
    message(&samples::epoch_begin(), "0103e70702010a03e807f0a2040c889b040b2a01");
    message(&samples::output(), "02000668656c6c6f0a010103aabbcc");
    message(&samples::epoch_end(), "0cac0204820105a09c0109ffddf7e6bcd7eacc88ef99abc5e88c9111");
}

#[test]
fn a_comparison() {
    message(
        &samples::verify(),
        "00800203000301808004
         0202d8fc4d31a9d8d440556a649ec73d6d788ef18750e3f432af786b6b797e808d10",
    );
}

#[test]
fn messages_of_the_control_stream() {
    let [seed, link] = samples::hellos();
    message(&seed, "01010161ffddf7e6bcd7eacc88ef99abc5e88c91110464656d6f03ef9bafcdf8acd1910100");
    message(
        &link,
        "01010161ffddf7e6bcd7eacc88ef99abc5e88c91110464656d6f03ef9bafcdf8acd191010180a28899c3a895b3f790e6d4ba97f3eeeeff03",
    );
    message(
        &samples::welcome(),
        "030162ffddf7e6bcd7eacc88ef99abc5e88c911101070103e607008080808001040103e60784070101090902010a03e807",
    );
    message(&samples::ack(), "03e8070704");
    message(&samples::progress(), "0103e8070103e70700808040");
    message(&samples::term_changed(), "04");
    message(&samples::digest_request(), "80028020");
    message(
        &samples::range_digests(),
        "80020200050102d8fc4d31a9d8d440556a649ec73d6d788ef18750e3f432af786b6b797e808d10",
    );
    message(&samples::block_digest_request(), "80048040");
    message(
        &samples::block_digests(),
        "80040200050102d8fc4d31a9d8d440556a649ec73d6d788ef18750e3f432af786b6b797e808d10",
    );
    message(&samples::diverged(), "01800203018080808008800201");
    message(&samples::verified(), "03e8070182800402028302848204");
    message(&samples::yields(), "01");
    message(&colo_proto::message::Goodbye, "");
    assert_eq!(samples::range_digests().end(), Gfn(0x100 + 5 + 2));
}

#[test]
fn every_reason_to_refuse() {
    let golden = [
        "0002ac0203776879",
        "0103776879",
        "0203776879",
        "030903776879",
        "0403776879",
        "0503776879",
        "0603776879",
        "0703776879",
        "0803776879",
        "0903776879",
        "0a03776879",
    ];
    for (refused, golden) in samples::refusals().iter().zip(golden) {
        message(refused, golden);
    }
    assert_eq!(samples::refusals().len(), golden.len());
}

#[test]
fn fields_and_methods_of_the_grpc_package() {
    let found = include_str!(concat!(env!("OUT_DIR"), "/v1.fields"));
    let golden = include_str!("v1.fields");
    let lines = |text: &'static str| text.lines().collect::<std::collections::BTreeSet<_>>();
    let (found, golden) = (lines(found), lines(golden));
    let gone: Vec<_> = golden.difference(&found).collect();
    assert!(gone.is_empty(), "a field, value or method of colo.v1 is changed or gone: {gone:#?}");
    let new: Vec<_> = found.difference(&golden).collect();
    assert!(new.is_empty(), "add to proto/tests/v1.fields: {new:#?}");
}
