//! The frame: what one epoch, one copy or one word between the nodes is cut into. The step of the way of a page
//! between `primary/encode` and `primary/quic`, and again in `secondary/receiver`.
//!
//! A frame is a header of fixed length, a table (of a `Pages` or `Blocks` frame only) and a body. All numbers are little endian.
//!
//! | at | bytes | what |
//! |---|---|---|
//! | 0 | 4 | magic, `COLF` |
//! | 4 | 2 | version |
//! | 6 | 1 | [`Kind`] |
//! | 7 | 1 | flags; there are none, so 0 |
//! | 8 | 8 | [`VmTag`] |
//! | 16 | 8 | term of the point |
//! | 24 | 8 | epoch of the point |
//! | 32 | 4 | index of the frame within its transfer |
//! | 36 | 4 | bytes of the table |
//! | 40 | 4 | bytes of the body |
//! | 44 | 4 | reserved, 0 |
//! | 48 | 8 | XXH3-64 over table and body |
//! | 56 | 8 | XXH3-64 over the 56 bytes before |
//!
//! A *transfer* is what goes from `SeedBegin` or `EpochBegin` up to `EpochEnd`. The epoch that completes a seed belongs
//! to the seed's transfer: index and digest go on. Frames of the control stream have index 0 and point 0.0.
//!
//! The checksums find damage and own bugs; who may speak at all is what TLS is for.

mod error;
mod kind;

pub use error::FrameError;
pub use kind::{Kind, VmTag};

use bytes::{Bytes, BytesMut};
use colo_common::{Epoch, PAGE_SIZE, Point, Term};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::message::{MAX_CONTROL_BODY, MAX_DIGEST_BODY, MAX_HISTORY_BODY, Message};
use crate::pages::MAX_TABLE;
use crate::version::PROTOCOL_VERSION;

/// Bytes of a frame's header.
pub const HEADER_LEN: usize = 64;

/// Pages with bytes in one frame: 1 MiB, enough that a header weighs nothing and small enough to hold some of them.
pub const MAX_FRAME_PAGES: usize = 256;

/// Bytes of any frame's body.
pub const MAX_BODY: usize = MAX_FRAME_PAGES * PAGE_SIZE;

const MAGIC: [u8; 4] = *b"COLF";
/// Where the header's own checksum is.
const SEAL_AT: usize = HEADER_LEN - 8;

const _: () = assert!(MAX_BODY == 1 << 20);
const _: () =
    assert!(MAX_CONTROL_BODY <= MAX_BODY && MAX_DIGEST_BODY <= MAX_BODY && MAX_HISTORY_BODY <= MAX_BODY);
const _: () = assert!(MAX_BODY + MAX_TABLE <= u32::MAX as usize);

/// What is in front of every table and body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What follows.
    pub kind: Kind,
    /// Of which vm.
    pub vm: VmTag,
    /// Of which point; 0.0 on the control stream.
    pub point: Point,
    /// Index within the transfer; 0 on the control stream.
    pub index: u32,
    /// Bytes of the table.
    pub table_len: u32,
    /// Bytes of the body.
    pub body_len: u32,
    /// XXH3-64 over table and body.
    pub checksum: u64,
}

impl Header {
    /// The bytes to send.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&self.kind.version().to_le_bytes());
        bytes[6] = self.kind as u8;
        bytes[8..16].copy_from_slice(&self.vm.0.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.point.term.0.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.point.epoch.0.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.index.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.table_len.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.body_len.to_le_bytes());
        bytes[48..56].copy_from_slice(&self.checksum.to_le_bytes());
        let seal = xxh3_64(&bytes[..SEAL_AT]);
        bytes[SEAL_AT..].copy_from_slice(&seal.to_le_bytes());
        bytes
    }

    /// Reads a header that came from a peer. What it announces is within the limits of its kind, so that room for it
    /// may be made.
    ///
    /// # Errors
    /// The first thing that is wrong: magic, checksum, version, reserved fields, kind, lengths.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, FrameError> {
        let magic = array(bytes, 0);
        if magic != MAGIC {
            return Err(FrameError::Magic { found: magic });
        }
        let (found, expected) = (u64::from_le_bytes(array(bytes, SEAL_AT)), xxh3_64(&bytes[..SEAL_AT]));
        if found != expected {
            return Err(FrameError::HeaderChecksum { found, expected });
        }
        let (found, kind) = (u16::from_le_bytes(array(bytes, 4)), Kind::from_byte(bytes[6]));
        // A kind that this build does not know says less than the version that it is of.
        let expected = kind.map_or(PROTOCOL_VERSION, Kind::version);
        if found != expected {
            return Err(FrameError::Version { found, expected });
        }
        let (flags, reserved) = (bytes[7], u32::from_le_bytes(array(bytes, 44)));
        if flags != 0 || reserved != 0 {
            return Err(FrameError::Reserved { flags, reserved });
        }
        let header = Self {
            kind: kind.ok_or(FrameError::Kind { found: bytes[6] })?,
            vm: VmTag(u64::from_le_bytes(array(bytes, 8))),
            point: Point {
                term: Term(u64::from_le_bytes(array(bytes, 16))),
                epoch: Epoch(u64::from_le_bytes(array(bytes, 24))),
            },
            index: u32::from_le_bytes(array(bytes, 32)),
            table_len: u32::from_le_bytes(array(bytes, 36)),
            body_len: u32::from_le_bytes(array(bytes, 40)),
            checksum: u64::from_le_bytes(array(bytes, 48)),
        };
        header.check_lengths()?;
        Ok(header)
    }

    /// Refuses a frame of another vm.
    ///
    /// # Errors
    /// It is one.
    pub fn check_vm(&self, expected: VmTag) -> Result<(), FrameError> {
        if self.vm == expected { Ok(()) } else { Err(FrameError::OtherVm { found: self.vm, expected }) }
    }

    fn check_lengths(&self) -> Result<(), FrameError> {
        let parts =
            [("table", self.table_len, self.kind.max_table()), ("body", self.body_len, self.kind.max_body())];
        match parts.into_iter().find(|&(_, found, limit)| found as usize > limit) {
            Some((part, found, limit)) => Err(FrameError::TooLong { kind: self.kind, part, found, limit }),
            None => Ok(()),
        }
    }
}

/// The bytes from `at` on, as many as are asked for.
fn array<const N: usize, const LEN: usize>(bytes: &[u8; LEN], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("a field lies within its header")
}

/// Checks that table and body are those that the header announces.
///
/// # Errors
/// Their lengths or their checksum differ.
pub fn check_body(header: &Header, table: &[u8], body: &[u8]) -> Result<(), FrameError> {
    let (kind, index) = (header.kind, header.index);
    if (table.len(), body.len()) != (header.table_len as usize, header.body_len as usize) {
        let announced = (header.table_len, header.body_len);
        return Err(FrameError::Lengths { kind, index, announced, found: (table.len(), body.len()) });
    }
    let (found, expected) = (checksum(table, body), header.checksum);
    if found == expected { Ok(()) } else { Err(FrameError::BodyChecksum { kind, index, found, expected }) }
}

fn checksum(table: &[u8], body: &[u8]) -> u64 {
    if table.is_empty() {
        return xxh3_64(body);
    }
    let mut hasher = Xxh3::new();
    hasher.update(table);
    hasher.update(body);
    hasher.digest()
}

/// A whole frame: one to send, or one that came and was verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    header: Header,
    table: Bytes,
    body: Bytes,
}

impl Frame {
    /// A frame to send. `Pages` and `Blocks` take an encoded run table and their bytes, `State` a part of the encoded state;
    /// all others are made from a [`Message`].
    ///
    /// # Panics
    /// It is longer than its kind may be: an own bug, since whoever cuts frames knows the limits.
    pub fn new(kind: Kind, vm: VmTag, point: Point, index: u32, table: Bytes, body: Bytes) -> Self {
        let len = |part: &Bytes| u32::try_from(part.len()).expect("a frame is shorter than 4 GiB");
        let (table_len, body_len) = (len(&table), len(&body));
        let checksum = checksum(&table, &body);
        let header = Header { kind, vm, point, index, table_len, body_len, checksum };
        header.check_lengths().unwrap_or_else(|error| panic!("{error}"));
        Self { header, table, body }
    }

    /// A message of a transfer.
    pub fn transfer<M: Message>(vm: VmTag, point: Point, index: u32, message: &M) -> Self {
        Self::new(M::KIND, vm, point, index, Bytes::new(), message.encode().into())
    }

    /// A message of the control stream.
    pub fn control<M: Message>(vm: VmTag, message: &M) -> Self {
        Self::transfer(vm, Point::default(), 0, message)
    }

    /// Takes what came after a header.
    ///
    /// # Errors
    /// As [`check_body`].
    pub fn received(header: Header, table: Bytes, body: Bytes) -> Result<Self, FrameError> {
        check_body(&header, &table, &body)?;
        Ok(Self { header, table, body })
    }

    /// Its header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Its table; empty unless it carries pages or blocks.
    pub fn table(&self) -> &Bytes {
        &self.table
    }

    /// Its body.
    pub fn body(&self) -> &Bytes {
        &self.body
    }

    /// What is sent before the body: header and table in one piece.
    pub fn head(&self) -> Bytes {
        let mut head = BytesMut::with_capacity(HEADER_LEN + self.table.len());
        head.extend_from_slice(&self.header.encode());
        head.extend_from_slice(&self.table);
        head.freeze()
    }
}

#[cfg(test)]
mod tests {
    use super::{Frame, FrameError, HEADER_LEN, Header, Kind, MAX_BODY, SEAL_AT, VmTag, check_body};
    use crate::pages::MAX_TABLE;
    use bytes::Bytes;
    use colo_common::Point;
    use colo_common::history::point;
    use proptest::prelude::{any, prop_assert_eq, proptest};
    use proptest::sample::select;
    use xxhash_rust::xxh3::xxh3_64;

    const GOOD: Header = Header {
        kind: Kind::Pages,
        vm: VmTag(1),
        point: point(2, 3),
        index: 4,
        table_len: 16,
        body_len: 4096,
        checksum: 5,
    };

    /// A header that was changed and sealed again.
    fn sealed(change: impl FnOnce(&mut [u8; HEADER_LEN])) -> [u8; HEADER_LEN] {
        let mut bytes = GOOD.encode();
        change(&mut bytes);
        let seal = xxh3_64(&bytes[..SEAL_AT]);
        bytes[SEAL_AT..].copy_from_slice(&seal.to_le_bytes());
        bytes
    }

    fn refused(change: impl FnOnce(&mut [u8; HEADER_LEN])) -> FrameError {
        Header::decode(&sealed(change)).unwrap_err()
    }

    #[test]
    fn every_flipped_bit_of_a_header_is_found() {
        for bit in 0..HEADER_LEN * 8 {
            let mut bytes = GOOD.encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&bytes).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn what_is_wrong_with_a_header_is_named() {
        assert_eq!(refused(|b| b[3] = b'H'), FrameError::Magic { found: *b"COLH" });
        assert_eq!(refused(|b| b[4] = 4), FrameError::Version { found: 4, expected: 3 });
        assert_eq!(refused(|b| b[7] = 1), FrameError::Reserved { flags: 1, reserved: 0 });
        assert_eq!(refused(|b| b[45] = 1), FrameError::Reserved { flags: 0, reserved: 256 });
        assert_eq!(refused(|b| b[6] = 99), FrameError::Kind { found: 99 });
        let error = refused(|b| b[4] = 1).to_string();
        assert!(
            error.starts_with("a frame has version 1, this build speaks version 3: run the same"),
            "{error}"
        );
        let mut damaged = GOOD.encode();
        damaged[20] ^= 1;
        assert!(matches!(Header::decode(&damaged), Err(FrameError::HeaderChecksum { .. })));
        assert!(GOOD.check_vm(VmTag(1)).is_ok());
        assert!(matches!(GOOD.check_vm(VmTag(2)), Err(FrameError::OtherVm { .. })));
    }

    #[test]
    fn nodes_of_different_versions_understand_why_they_part() {
        for kind in Kind::ALL {
            let stays = matches!(kind, Kind::Hello | Kind::Refused);
            let header = Header { kind, table_len: 0, body_len: 0, ..GOOD };
            let mut bytes = header.encode();
            assert_eq!(bytes[4], if stays { 1 } else { 3 }, "{kind}");
            bytes[4] = 4 - bytes[4];
            let seal = xxh3_64(&bytes[..SEAL_AT]);
            bytes[SEAL_AT..].copy_from_slice(&seal.to_le_bytes());
            assert!(matches!(Header::decode(&bytes), Err(FrameError::Version { .. })), "{kind}");
        }
    }

    #[test]
    fn lengths_are_held_against_the_limits_of_the_kind() {
        for kind in Kind::ALL {
            for (part, at, limit) in [("table", 36, kind.max_table()), ("body", 40, kind.max_body())] {
                let header = |len: u32| {
                    sealed(|b| {
                        (b[4], b[6]) = (kind.version() as u8, kind as u8);
                        b[36..44].fill(0);
                        b[at..at + 4].copy_from_slice(&len.to_le_bytes());
                    })
                };
                assert!(Header::decode(&header(limit as u32)).is_ok());
                for found in [limit as u32 + 1, u32::MAX] {
                    let expected = FrameError::TooLong { kind, part, found, limit };
                    assert_eq!(Header::decode(&header(found)), Err(expected));
                }
            }
        }
        assert!(Kind::ALL.iter().all(|kind| kind.max_body() <= MAX_BODY && kind.max_table() <= MAX_TABLE));
    }

    #[test]
    fn table_and_body_must_be_what_the_header_announces() {
        let part = |byte: u8, len: usize| Bytes::from(vec![byte; len]);
        let frame = Frame::new(Kind::Pages, VmTag(1), point(2, 3), 4, part(1, 16), part(2, 4096));
        let header = *frame.header();
        assert_eq!(Frame::received(header, part(1, 16), part(2, 4096)), Ok(frame));
        let announced = (16, 4096);
        for found in [(0, 4096), (16, 4095), (17, 4095)] {
            let lengths = FrameError::Lengths { kind: Kind::Pages, index: 4, announced, found };
            assert_eq!(check_body(&header, &part(1, found.0), &part(2, found.1)), Err(lengths));
        }
        let damaged = check_body(&header, &part(1, 16), &part(3, 4096)).unwrap_err();
        assert!(damaged.to_string().starts_with("frame 4 (Pages) is damaged"), "{damaged}");
        assert!(check_body(&header, &part(0, 16), &part(2, 4096)).is_err());
    }

    #[test]
    #[should_panic(expected = "announces a body of 4097 bytes, more than 4096")]
    fn a_frame_that_nobody_takes_is_not_made() {
        Frame::new(Kind::Ack, VmTag(1), Point::default(), 0, Bytes::new(), vec![0; 4097].into());
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(
            kind in select(Kind::ALL.as_slice()), vm: u64, term: u64, epoch: u64, index: u32, checksum: u64,
            table in any::<proptest::sample::Index>(), body in any::<proptest::sample::Index>(),
        ) {
            let header = Header {
                kind, vm: VmTag(vm), point: point(term, epoch), index, checksum,
                table_len: table.index(kind.max_table() + 1) as u32,
                body_len: body.index(kind.max_body() + 1) as u32,
            };
            prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
        }
    }
}
