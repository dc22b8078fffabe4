//! The console over failovers from one fake node to another.

mod fake;

use colo_proto::v1::Role;
use colo_proto::v1::console_attach::Start;
use fake::run::{Run, run, wait_for};
use fake::{Fake, paired, solo, status, stopped};

/// A runs the guest and B follows.
fn pair() -> (Fake, Fake, Vec<String>) {
    let a = Fake::start(status("a", Role::Paired, paired("a", "b", 2)));
    let b = Fake::start(status("b", Role::Following, paired("a", "b", 2)));
    let nodes = vec![a.address.to_string(), b.address.to_string()];
    (a, b, nodes)
}

#[test]
fn a_failover_shows_every_byte_once_and_types_again_what_was_not_safe() {
    let (a, b, nodes) = pair();
    {
        let mut a = a.state();
        (a.output, a.input_from) = (b"0123456789".to_vec(), 100);
    }
    let mut console = Run::start(&nodes, "console --from 2");
    wait_for("what A released", || console.out() == "23456789");
    console.say(b"hello\n");
    wait_for("input at A", || a.state().input == b"hello\n");
    assert_eq!(a.state().typed[0].0, 100);
    // The guest's state in which it has read two bytes is safe, and B has one in which it has read three.
    a.state().input_done = 102;
    a.state().output.extend(b"AB");
    wait_for("more from A", || console.out() == "23456789AB");
    drop(a);
    wait_for("the loss", || console.err().contains("the connection to"));
    console.say(b"bye\n");
    {
        let mut b = b.state();
        b.status = status("b", Role::Alone, solo("b", 3));
        (b.output, b.early) = (b"0123456789ABCDEF".to_vec(), 5);
        (b.input, b.input_from) = (b"hel".to_vec(), 100);
    }
    wait_for("what B releases", || console.out() == "23456789ABCDEF");
    wait_for("input at B", || b.state().input == b"hello\nbye\n");
    assert_eq!(b.state().typed[0].0, 103, "from where the guest goes on");
    assert_eq!(b.state().attached[0].start, Some(Start::From(12)));
    b.state().status = status("b", Role::Stopped, stopped("b", 4));
    let (code, out, err) = console.end();
    assert_eq!((code, out.as_str()), (0, "23456789ABCDEF"));
    assert!(err.contains("attached to a") && err.contains("attached to b"), "{err}");
    assert!(err.contains("stopped (powered off), ran last on b in term 4"), "{err}");
}

/// The old runner is frozen, or has not heard yet: its connection stands, and it still says that it runs the guest.
#[test]
fn a_runner_of_a_newer_term_is_followed() {
    let (a, b, nodes) = pair();
    a.state().output = b"one ".to_vec();
    let console = Run::start(&nodes, "console --follow --tail 4");
    wait_for("A", || console.out() == "one ");
    b.state().output = b"one two".to_vec();
    b.state().status = status("b", Role::Alone, solo("b", 3));
    wait_for("B", || console.out() == "one two");
    assert!(b.state().attached[0].read_only);
    a.state().output.extend(b" stale");
    b.state().output.extend(b" three");
    wait_for("B alone", || console.out() == "one two three");
}

#[test]
fn what_is_not_kept_is_told_apart_from_the_output() {
    let (a, _b, nodes) = pair();
    {
        let mut a = a.state();
        (a.output, a.kept_from) = (b"late".to_vec(), 90);
    }
    let console = Run::start(&nodes, "console --follow --from 10");
    wait_for("the rest", || console.out() == "late");
    assert!(
        console.err().contains("output from 10 to 90 (80 bytes) is not kept any more"),
        "{}",
        console.err()
    );
}

#[test]
fn input_from_a_pipe_is_data_to_its_end() {
    let (a, _b, nodes) = pair();
    let mut console = Run::start(&nodes, "console");
    console.say(b"ab\x1dcd");
    let bulk = vec![b'x'; 300 << 10];
    // More than is kept: the pipe waits until the guest's input is safe.
    let writer = {
        let mut stdin = console.stdin.take().unwrap();
        let bulk = bulk.clone();
        std::thread::spawn(move || std::io::Write::write_all(&mut stdin, &bulk).unwrap())
    };
    wait_for("all of it", || {
        let mut a = a.state();
        a.input_done = a.input.len() as u64;
        a.input.len() == 5 + bulk.len()
    });
    writer.join().unwrap();
    a.state().output = b"still here".to_vec();
    wait_for("output after the input has ended", || console.out() == "still here");
    assert!(a.state().input.starts_with(b"ab\x1dcdx"));
}

/// While the keyboard is being read, and nobody presses a key.
#[test]
fn a_console_at_a_terminal_ends_by_its_key_and_when_the_vm_is_stopped() {
    let (a, _b, nodes) = pair();
    let mut console = Run::at_terminal(&nodes, "console");
    wait_for("the console", || console.out().contains("attached to a"));
    console.say(b"ab");
    wait_for("input at A", || a.state().input == b"ab");
    console.say(b"\x1d");
    assert_eq!(console.end().0, 0);
    let console = Run::at_terminal(&nodes, "console");
    wait_for("the console", || console.out().contains("attached to a"));
    a.state().status = status("a", Role::Stopped, stopped("a", 4));
    let (code, out, _) = console.end();
    assert!(code == 0 && out.contains("stopped (powered off)"), "{code} {out}");
}

#[test]
fn a_console_that_nobody_can_read_ends_with_a_line() {
    let (a, _b, nodes) = pair();
    a.state().output = b"hello".to_vec();
    let (code, _, err) = Run::unread(&nodes, "console --from 0").end();
    assert_eq!(code, 1, "{err}");
    assert!(err.contains("coloctl: ") && !err.contains("panicked"), "{err}");
}

#[test]
fn a_console_ends_for_a_reason() {
    let (a, b, nodes) = pair();
    a.state().refusal =
        Some(tonic::Status::permission_denied("a certificate of the role operator is needed"));
    let (code, _, err) = run(&nodes, "console --follow");
    assert_eq!((code, err.as_str()), (1, "coloctl: a certificate of the role operator is needed\n"));
    drop(a);
    let (code, _, err) = run(&nodes, "console --follow --wait 1");
    assert_eq!(code, 1);
    assert!(err.contains("none of these nodes runs the guest") && err.contains("is following"), "{err}");
    drop(b);
    let (code, _, err) = run(&nodes, "console --follow");
    assert_eq!(code, 3);
    assert!(err.contains("no node answers: "), "{err}");
}
