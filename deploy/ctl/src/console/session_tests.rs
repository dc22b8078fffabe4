//! Scripted attachments and losses, and any sequence of them.

use super::{Event, MAX_INPUT, Session, SessionError, Start};
use colo_common::life::LIFE;
use colo_common::limits::MAX_CONSOLE_INPUT;
use colo_proto::v1::console_attach::Start as Place;
use colo_proto::v1::console_output::Message;
use colo_proto::v1::{ConsoleAttached, ConsoleBytes, ConsoleGap, ConsoleTaken};
use proptest::prelude::{Strategy, any, prop, proptest};

fn attached(output_offset: u64, input_offset: u64) -> Option<Message> {
    Some(Message::Attached(ConsoleAttached { output_offset, input_offset }))
}

fn output(offset: u64, bytes: &[u8]) -> Option<Message> {
    Some(Message::Output(ConsoleBytes { offset, bytes: bytes.to_vec() }))
}

fn gap(from: u64, to: u64) -> Option<Message> {
    Some(Message::Gap(ConsoleGap { from, to }))
}

fn done(offset: u64) -> Option<Message> {
    Some(Message::InputDone(offset))
}

fn taken(count: u64, offset: u64) -> Option<Message> {
    Some(Message::Taken(ConsoleTaken { count, offset }))
}

/// Who types.
const ME: Option<u128> = Some(7);

fn input(session: &mut Session) -> Option<(u64, Vec<u8>)> {
    session.next_input().map(|bytes| (bytes.offset, bytes.bytes))
}

/// A session that is attached with output at 100 and input at 10.
fn fresh() -> Session {
    let mut session = Session::new(Start::Tail(50), ME);
    assert_eq!(session.attach().start, Some(Place::Tail(50)));
    assert_eq!(session.receive(attached(100, 10)), Ok(vec![Event::Attached { output: 100 }]));
    session
}

#[test]
fn output_goes_on_over_a_failover_with_no_gap_and_no_repetition() {
    let mut session = fresh();
    let show = |bytes: &[u8]| Ok(vec![Event::Show(bytes.to_vec())]);
    assert_eq!(session.receive(output(100, b"hello ")), show(b"hello "));
    session.lost();
    assert_eq!(session.attach().start, Some(Place::From(106)));
    // The other node may begin earlier than it was asked.
    session.receive(attached(98, 10)).unwrap();
    assert_eq!(session.receive(output(98, b"..hello")), Ok(vec![]));
    assert_eq!(session.receive(output(105, b" world")), show(b"world"));
    assert_eq!(session.receive(output(111, b"!")), show(b"!"));
}

#[test]
fn a_gap_shows_once_and_only_its_new_part() {
    let mut session = Session::new(Start::From(0), None);
    assert_eq!(session.attach().start, Some(Place::From(0)));
    session.receive(attached(0, 0)).unwrap();
    assert_eq!(session.receive(gap(0, 40)), Ok(vec![Event::Gap { from: 0, to: 40 }]));
    assert_eq!(session.receive(gap(0, 40)), Ok(vec![]));
    assert_eq!(session.receive(gap(20, 50)), Ok(vec![Event::Gap { from: 40, to: 50 }]));
    assert_eq!(session.receive(output(50, b"x")), Ok(vec![Event::Show(b"x".to_vec())]));
    let untold = vec![Event::Gap { from: 51, to: 60 }, Event::Show(b"x".to_vec())];
    assert_eq!(session.receive(output(60, b"x")), Ok(untold), "a node need not say that it is one");
}

#[test]
fn input_is_kept_until_it_is_safe_and_typed_again_from_there() {
    let mut session = fresh();
    assert_eq!(session.typed(b"abcdef"), 6);
    assert_eq!(input(&mut session), Some((10, b"abcdef".to_vec())));
    assert_eq!(input(&mut session), None);
    session.receive(taken(4, 14)).unwrap();
    session.receive(done(12)).unwrap();
    session.typed(b"gh");
    assert_eq!(input(&mut session), Some((16, b"gh".to_vec())));
    session.lost();
    session.typed(b"i");
    assert_eq!(input(&mut session), None, "there is nobody to send it to");
    session.attach();
    session.receive(attached(100, 13)).unwrap();
    assert_eq!(input(&mut session), Some((13, b"defghi".to_vec())), "c was read before the last ack");
    session.receive(taken(6, 19)).unwrap();
    session.receive(done(19)).unwrap();
    assert_eq!(session.room(), MAX_CONSOLE_INPUT);
}

/// The node was lost before it said that it had taken them.
#[test]
fn bytes_that_were_taken_without_a_word_are_not_typed_twice() {
    let mut session = fresh();
    session.typed(b"abcdef");
    session.next_input();
    session.receive(taken(2, 12)).unwrap();
    session.attach();
    session.receive(attached(100, 15)).unwrap();
    assert_eq!(input(&mut session), Some((15, b"f".to_vec())));
}

#[test]
fn what_is_typed_before_the_first_attachment_is_not_lost() {
    let mut session = Session::new(Start::Tail(0), ME);
    session.typed(b"early");
    assert_eq!(input(&mut session), None);
    session.attach();
    session.receive(attached(0, 7)).unwrap();
    assert_eq!(input(&mut session), Some((7, b"early".to_vec())));
}

#[test]
fn what_another_console_types_neither_hides_nor_repeats_input() {
    let mut session = fresh();
    // The other one's twenty bytes are safe.
    session.receive(done(30)).unwrap();
    session.typed(b"ab");
    assert_eq!(input(&mut session), Some((30, b"ab".to_vec())));
    // It was quicker again.
    session.receive(taken(2, 37)).unwrap();
    session.receive(done(36)).unwrap();
    session.typed(b"cd");
    assert_eq!(input(&mut session), Some((37, b"cd".to_vec())));
    session.receive(taken(4, 43)).unwrap();
    session.lost();
    // The guest goes on with b, and some of what the other one typed.
    session.attach();
    session.receive(attached(100, 40)).unwrap();
    assert_eq!(input(&mut session), Some((40, b"cd".to_vec())));
}

#[test]
fn input_that_nobody_took_is_not_taken_for_the_other_consoles() {
    let mut session = fresh();
    session.receive(done(30)).unwrap();
    session.typed(b"ab");
    session.next_input();
    session.attach();
    session.receive(attached(100, 30)).unwrap();
    assert_eq!(input(&mut session), Some((30, b"ab".to_vec())));
}

#[test]
fn a_guest_that_is_started_anew_is_told_from_and_gets_no_old_input() {
    let mut session = fresh();
    session.typed(b"old");
    assert_eq!(input(&mut session), Some((10, b"old".to_vec())));
    session.lost();
    session.typed(b"new");
    assert_eq!(session.attach().start, Some(Place::From(100)));
    let first = [Event::Attached { output: 100 }, Event::InputGone(3)];
    assert_eq!(session.receive(attached(100, 3 * LIFE)), Ok(first.to_vec()));
    assert_eq!(input(&mut session), Some((3 * LIFE, b"new".to_vec())));
    let anew = Event::StartedAnew { missing: 0, to: 3 * LIFE };
    assert_eq!(session.receive(gap(100, 3 * LIFE)), Ok(vec![anew]));
    assert_eq!(session.receive(output(3 * LIFE, b"boot")), Ok(vec![Event::Show(b"boot".to_vec())]));
    let later = Event::StartedAnew { missing: 7, to: 4 * LIFE + 7 };
    assert_eq!(session.receive(gap(3 * LIFE + 4, 4 * LIFE + 7)), Ok(vec![later]));
}

#[test]
fn a_broken_promise_shows() {
    let mut session = fresh();
    session.typed(b"abcd");
    session.next_input();
    session.receive(taken(4, 14)).unwrap();
    session.receive(done(14)).unwrap();
    session.attach();
    assert_eq!(
        session.receive(attached(100, 11)),
        Ok(vec![Event::Attached { output: 100 }, Event::InputGone(3)])
    );
    session.typed(b"e");
    assert_eq!(input(&mut session), Some((11, b"e".to_vec())));
}

#[test]
fn more_than_was_sent_cannot_be_taken() {
    let mut session = fresh();
    session.typed(b"abcd");
    assert_eq!(session.receive(taken(1, 11)), Err(SessionError::Taken { count: 1, offset: 11 }));
    session.next_input();
    assert_eq!(session.receive(taken(5, 15)), Err(SessionError::Taken { count: 5, offset: 15 }));
    assert_eq!(session.receive(taken(4, 13)), Err(SessionError::Taken { count: 4, offset: 13 }));
    session.receive(taken(4, 14)).unwrap();
    assert_eq!(session.receive(taken(3, 14)), Err(SessionError::Taken { count: 3, offset: 14 }));
}

#[test]
fn input_is_bounded_and_sent_in_parts() {
    let mut session = fresh();
    assert_eq!(session.typed(&vec![0; MAX_CONSOLE_INPUT + 5]), MAX_CONSOLE_INPUT);
    assert_eq!(session.room(), 0);
    assert_eq!(session.next_input().unwrap().bytes.len(), MAX_INPUT);
    assert_eq!(session.next_input().unwrap().offset, 10 + MAX_INPUT as u64);
}

#[test]
fn one_that_only_looks_types_nothing() {
    let mut session = Session::new(Start::Tail(0), None);
    let attach = session.attach();
    assert!(attach.read_only && attach.typist.is_empty());
    session.receive(attached(0, 0)).unwrap();
    session.typed(b"x");
    assert_eq!(session.next_input(), None);
}

#[test]
fn nonsense_is_an_error() {
    let mut session = Session::new(Start::From(5), ME);
    session.attach();
    assert_eq!(session.receive(output(5, b"x")), Err(SessionError::NotAttached));
    assert_eq!(session.receive(None), Err(SessionError::Unknown));
    session.receive(attached(5, u64::MAX)).unwrap();
    assert_eq!(session.receive(output(u64::MAX, b"xy")), Err(SessionError::Offset(u64::MAX)));
    assert_eq!(session.receive(gap(9, 3)), Err(SessionError::Gap { from: 9, to: 3 }));
    session.typed(b"abc");
    assert_eq!(input(&mut session), Some((u64::MAX, b"abc".to_vec())));
    session.typed(b"d");
    assert_eq!(input(&mut session), None, "there is no such offset");
}

fn message() -> impl Strategy<Value = Option<Message>> {
    let offset = || prop::sample::select(vec![0, 1, 5, 20, 1 << 40, u64::MAX - 1, u64::MAX]);
    let bytes = prop::collection::vec(any::<u8>(), 0..9);
    (0..6, offset(), offset(), bytes).prop_map(|(kind, a, b, bytes)| match kind {
        0 => attached(a, b),
        1 => output(a, &bytes),
        2 => gap(a, b),
        3 => done(a),
        4 => taken(a.min(40), b),
        _ => None,
    })
}

proptest! {
    #[test]
    fn no_node_can_make_it_panic_or_go_back(
        steps in prop::collection::vec((message(), prop::collection::vec(any::<u8>(), 0..9), any::<bool>()), 0..40)
    ) {
        let mut session = Session::new(Start::Tail(9), ME);
        session.attach();
        let mut shown = None;
        for (message, typed, lost) in steps {
            let _ = session.receive(message);
            session.typed(&typed);
            session.next_input();
            assert!(session.next >= shown);
            shown = session.next;
            assert!(session.input.sent <= session.input.tried);
            assert!(session.input.tried <= session.input.kept.len());
            assert!(session.input.taken_len() <= session.input.sent);
            if lost {
                session.attach();
            }
        }
    }

    /// Two nodes that keep to the rules, kills at any moment, another console that types: the guest reads every byte
    /// once and in order, and the reader sees every byte of output once.
    #[test]
    fn every_byte_is_typed_and_shown_once(
        steps in prop::collection::vec((0..5_u8, 0..9_usize), 0..60)
    ) {
        let mut world = World::default();
        for (what, count) in steps {
            world.step(what, count);
        }
        world.settle();
    }
}

/// A guest that echoes, its newest acked state, and a console.
struct World {
    session: Session,
    typed: Vec<u8>,
    shown: Vec<u8>,
    /// What the guest has read, and whether from this console.
    read: Vec<(u8, bool)>,
    /// Bytes of this attachment that were taken.
    count: u64,
    /// Input and output up to here are acked.
    acked: usize,
    /// Released output that was sent to the console on this attachment.
    told: usize,
}

impl Default for World {
    fn default() -> Self {
        let session = Session::new(Start::From(0), ME);
        let mut world =
            Self { session, typed: vec![], shown: vec![], read: vec![], count: 0, acked: 0, told: 0 };
        world.attach();
        world
    }
}

impl World {
    fn attach(&mut self) {
        let Some(Place::From(from)) = self.session.attach().start else { unreachable!() };
        // Begins a little early, as a node may.
        (self.told, self.count) = (usize::try_from(from).unwrap().saturating_sub(3), 0);
        let hello = attached(self.told as u64, self.read.len() as u64);
        assert!(matches!(self.session.receive(hello).unwrap()[..], [Event::Attached { .. }]));
    }

    fn step(&mut self, what: u8, count: usize) {
        match what {
            0 => {
                let fresh: Vec<u8> = (0..count).map(|n| (self.typed.len() + n) as u8).collect();
                assert_eq!(self.session.typed(&fresh), count);
                self.typed.extend(fresh);
                while let Some(ConsoleBytes { bytes, .. }) = self.session.next_input() {
                    self.count += bytes.len() as u64;
                    self.read.extend(bytes.into_iter().map(|byte| (byte, true)));
                    self.session.receive(taken(self.count, self.read.len() as u64)).unwrap();
                }
            }
            // An ack: what was read is echoed and released, input up to there is safe.
            1 => {
                self.acked = (self.acked + count).min(self.read.len());
                self.session.receive(done(self.acked as u64)).unwrap();
            }
            2 => self.show(count),
            3 => self.read.extend((0..count).map(|_| (b'#', false))),
            _ => {
                self.read.truncate(self.acked);
                self.attach();
            }
        }
    }

    fn show(&mut self, count: usize) {
        let end = (self.told + count).min(self.acked);
        let bytes: Vec<u8> = self.read[self.told..end].iter().map(|(byte, _)| *byte).collect();
        for event in self.session.receive(output(self.told as u64, &bytes)).unwrap() {
            let Event::Show(bytes) = event else { panic!("{event:?}") };
            self.shown.extend(bytes);
        }
        self.told = end;
    }

    fn settle(&mut self) {
        self.step(0, 0);
        self.step(1, usize::MAX / 2);
        self.show(usize::MAX / 2);
        let mine: Vec<u8> = self.read.iter().filter(|(_, mine)| *mine).map(|(byte, _)| *byte).collect();
        let all: Vec<u8> = self.read.iter().map(|(byte, _)| *byte).collect();
        assert_eq!(mine, self.typed);
        assert_eq!(self.shown, all);
        assert_eq!(self.session.room(), MAX_CONSOLE_INPUT, "all of it is safe");
    }
}
