//! The network that tests and the demo stand on: that a cluster in it is one as anywhere, and that a client gets through.

use anyhow::ensure;
use colo_tests::cluster::config::{Guest, Options};
use colo_tests::cluster::scenario;
use colo_tests::lab::hosts::Host;
use colo_tests::lab::{self, GUEST, Lab, Namespace, PREFIX, ip};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(10);

/// Enters a lab with the test's thread and plays in it, if there can be one here.
fn play(nodes: &[&str], test: impl FnOnce(&Lab) -> anyhow::Result<()>) {
    if lab::usable() {
        let lab = Lab::enter(nodes).unwrap();
        test(&lab).unwrap();
    }
}

#[test]
fn nodes_in_a_lab_are_a_cluster_as_anywhere() {
    play(&["a", "b"], |_| {
        scenario(Options::new(Guest::synthetic(1)), |cluster| {
            cluster.start_secondary("b")?;
            cluster.start_primary("a", Some("b"))?;
            cluster.until_paired("a")?;
            cluster.kill("a")?;
            cluster.until_solo("b")?;
            cluster.until_released(1000)?;
            cluster.ledger().check_chain(cluster.options.guest.seed)?;
            Ok(())
        })
    });
}

#[test]
fn a_client_gets_through_as_soon_as_somebody_answers() {
    play(&[], |lab| {
        // The lab itself stands where a guest would.
        ip(&format!("address add {GUEST}/{PREFIX} dev lan\n"))?;
        let to = format!("{GUEST}:6379");
        ensure!(lab.connect(&to, Duration::from_millis(200)).is_err());
        let dial = lab.dial(&to, PATIENCE)?;
        let client = std::thread::spawn(move || dial());
        std::thread::sleep(Duration::from_millis(200));
        let listener = TcpListener::bind(&to)?;
        let (mut near, from) = listener.accept()?;
        let mut far = client.join().unwrap()?;
        ensure!(from.ip() == lab::CLIENT && far.nodelay()?);
        near.write_all(b"hello")?;
        let mut text = [0; 5];
        far.read_exact(&mut text)?;
        ensure!(&text == b"hello");
        Ok(())
    });
}

/// Both ways, one way, and not at all; the harness reaches both all the time.
#[test]
fn hosts_hear_each_other_unless_they_are_cut_off() {
    if !lab::usable() {
        return;
    }
    let mut lab = Lab::enter(&[]).unwrap();
    lab.add_host("a", true).unwrap();
    lab.add_host("m0", false).unwrap();
    assert!(lab.add_host("a-very-long-name", false).is_err());
    let (a, m) = (lab.host("a").unwrap(), lab.host("m0").unwrap());
    let socket = |host: &Host| {
        let socket = host.run(|| UdpSocket::bind((host.address, 7000))).unwrap().unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        socket
    };
    let (at_a, at_m) = (socket(a), socket(m));
    let outside = UdpSocket::bind("0.0.0.0:0").unwrap();
    let hears = |from: &UdpSocket, to: &UdpSocket| {
        from.send_to(b"hello", to.local_addr().unwrap()).unwrap();
        to.recv_from(&mut [0; 16]).is_ok()
    };
    let arrives = || {
        assert!(hears(&outside, &at_a) && hears(&outside, &at_m));
        (hears(&at_a, &at_m), hears(&at_m, &at_a))
    };
    assert_eq!(arrives(), (true, true));
    a.cut_to(&[m]).unwrap();
    assert_eq!(arrives(), (false, true));
    m.cut_to(&[a]).unwrap();
    assert_eq!(arrives(), (false, false));
    a.heal().unwrap();
    assert_eq!(arrives(), (true, false));
    lab.heal().unwrap();
    assert_eq!(arrives(), (true, true));
    drop(lab.capture("a").unwrap());
    assert!(lab.capture("m0").is_err());
}

#[test]
fn labs_do_not_meet_and_are_left_at_the_end() {
    if !lab::usable() {
        return;
    }
    let outside = Namespace::of_this_thread().unwrap();
    let here = || std::fs::read_link("/proc/thread-self/ns/net").unwrap();
    let before = here();
    let lab = Lab::enter(&["a"]).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    TcpStream::connect(address).unwrap();
    // The same address is another host's there, and the client's is a third.
    assert!(outside.run(|| TcpStream::connect(address)).unwrap().is_err());
    assert!(lab.client(|| TcpStream::connect(address)).unwrap().is_err());
    // Another one with the same names, beside it.
    std::thread::scope(|scope| scope.spawn(|| Lab::enter(&["a"]).map(drop)).join().unwrap()).unwrap();
    assert_ne!(here(), before);
    drop(lab);
    assert_eq!(here(), before);
}

#[test]
fn a_node_that_is_there_or_has_a_long_name_is_refused() {
    play(&["a"], |lab| {
        let error = lab.add_node("a").unwrap_err();
        ensure!(format!("{error:#}").contains("the network of a"), "{error:#}");
        ensure!(lab.add_node("a-very-long-name").is_err());
        lab.add_node("b")
    });
}
