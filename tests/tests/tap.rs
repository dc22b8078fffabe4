//! TAP interfaces of the real kernel: who gets one, who does not and why, what passes, and how a bridge and a neighbour
//! follow an address from one to the other. Each test has a network namespace of its own.

use anyhow::{Context, bail, ensure};
use colo_common::Mac;
use colo_common::limits::MAX_FRAME;
use colo_tests::lab::capture::Capture;
use colo_tests::lab::{self, CLIENT, GUEST, Lab, Namespace, ip, tap_of};
use colo_vmm::tap::{HEADER, Offloads, Tap, TapError, Written, announce};
use std::io::Write;
use std::net::{TcpStream, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

const NAME: &str = "tap0";
/// Far more than any of this takes.
const PATIENCE: Duration = Duration::from_secs(10);

/// Does this in a fresh namespace, if there can be one.
fn alone(test: impl FnOnce() -> anyhow::Result<()> + Send) {
    if lab::usable() {
        Namespace::fresh().unwrap().run(test).unwrap().unwrap();
    }
}

fn refusal(name: &str) -> TapError {
    Tap::open(name).expect_err("a TAP that nobody should get")
}

/// What a program prints, run in the calling thread's namespace.
fn output(program: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let done = Command::new(program).args(arguments).output()?;
    ensure!(done.status.success(), "{program}: {}", String::from_utf8_lossy(&done.stderr));
    Ok(String::from_utf8(done.stdout)?)
}

fn flags(name: &str) -> anyhow::Result<String> {
    output("ip", &["-o", "link", "show", name])
}

/// As an operator reads it. A mount of sysfs shows one namespace's interfaces: so a fresh one, in mounts of its own.
fn sys_carrier(name: &str) -> anyhow::Result<String> {
    let script = format!("mount -t sysfs none /sys && cat /sys/class/net/{name}/carrier");
    Ok(output("unshare", &["--mount", "sh", "-c", &script])?.trim().to_owned())
}

/// Takes from this thread, for good, what its process may beyond its user's rights.
fn drop_capabilities() {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    let (header, none) = (Header { version: 0x2008_0522, pid: 0 }, [0_u32; 6]);
    // SAFETY: the call reads a header and two triples of 32-bit numbers, which this version has; both live through it.
    let done = unsafe { libc::syscall(libc::SYS_capset, &raw const header, &raw const none) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

/// The next frame that `wanted` knows.
fn next(tap: &Tap, wanted: impl Fn(&[u8]) -> bool) -> anyhow::Result<Vec<u8>> {
    let started = Instant::now();
    let mut frame = vec![0; MAX_FRAME];
    while started.elapsed() < PATIENCE {
        match tap.read_frame(&mut frame)? {
            Some(len) if wanted(&frame[HEADER..len]) => return Ok(frame[..len].to_vec()),
            Some(_) => {}
            None => std::thread::sleep(Duration::from_millis(1)),
        }
    }
    bail!("the frame did not come")
}

fn has(frame: &[u8], what: &[u8]) -> bool {
    frame.windows(what.len()).any(|window| window == what)
}

fn mac() -> Mac {
    "02:00:00:12:34:56".parse().unwrap()
}

#[test]
fn an_interface_is_made_and_goes_with_its_process() {
    alone(|| {
        let tap = Tap::open(NAME)?;
        assert_eq!((tap.name(), tap.offers_offloads()), (NAME, true));
        let shown = flags(NAME)?;
        assert!(shown.contains("NO-CARRIER") && shown.contains(",UP"), "{shown}");
        drop(tap);
        assert!(flags(NAME).is_err(), "it was made for this process alone");
        Ok(())
    });
}

#[test]
fn a_lasting_interface_is_attached_to_and_stays() {
    alone(|| {
        ip(&format!("tuntap add {NAME} mode tap\n"))?;
        let tap = Tap::open(NAME)?;
        let shown = output("ip", &["-d", "link", "show", NAME])?;
        assert!(shown.contains("NO-CARRIER") && shown.contains("vnet_hdr on"), "{shown}");
        tap.set_carrier(true)?;
        drop(tap);
        assert!(flags(NAME)?.contains("NO-CARRIER"), "the carrier goes with the process");
        drop(Tap::open(NAME)?);
        Ok(())
    });
}

#[test]
fn one_that_cannot_be_had_is_refused_with_the_remedy() {
    alone(|| {
        let tap = Tap::open(NAME)?;
        let error = refusal(NAME);
        assert!(matches!(error, TapError::Busy { .. }) && error.to_string().contains(NAME), "{error}");
        drop(tap);
        ip("link add br0 type bridge\n tuntap add tun0 mode tun\n tuntap add many0 mode tap multi_queue\n")?;
        for name in ["lo", "br0", "tun0", "many0"] {
            let error = refusal(name);
            assert!(matches!(error, TapError::Kind { .. }) && error.to_string().contains(name), "{error}");
        }
        Ok(())
    });
}

#[test]
fn without_the_capability_only_what_was_made_before_can_be_used() {
    alone(|| {
        ip(
            "tuntap add down0 mode tap\n tuntap add up0 mode tap\n tuntap add other0 mode tap user 12345\n link set up0 up\n",
        )?;
        drop_capabilities();
        for name in ["new0", "other0"] {
            let error = refusal(name);
            assert!(matches!(error, TapError::Permission { .. }), "{error}");
            assert!(error.to_string().contains("CAP_NET_ADMIN"), "{error}");
        }
        let error = refusal("down0");
        assert!(
            matches!(error, TapError::Down { .. }) && error.to_string().contains("ip link set down0 up"),
            "{error}"
        );
        let tap = Tap::open("up0")?;
        tap.set_carrier(true)?;
        assert_eq!(tap.write_frame(&announce::rarp_request(mac()))?, Written::Taken);
        Ok(())
    });
}

#[test]
fn the_carrier_shows() {
    alone(|| {
        let tap = Tap::open(NAME)?;
        for on in [false, true, false, true] {
            tap.set_carrier(on)?;
            assert_eq!(sys_carrier(NAME)?, if on { "1" } else { "0" });
            let shown = flags(NAME)?;
            let (plugged, pulled) = (shown.contains("LOWER_UP"), shown.contains("NO-CARRIER"));
            assert_eq!((plugged, pulled), (on, !on), "{shown}");
        }
        Ok(())
    });
}

/// Sends from the host to the guest's address, whose card is known.
fn host_socket() -> anyhow::Result<UdpSocket> {
    ip(&format!(
        "link set {NAME} addrgenmode none\n address add {CLIENT}/24 dev {NAME}\n\
         neighbour add {GUEST} lladdr {} dev {NAME}\n",
        mac()
    ))?;
    let socket = UdpSocket::bind((CLIENT, 0))?;
    socket.connect((GUEST, 7))?;
    Ok(socket)
}

#[test]
fn frames_pass_each_way_and_checksums_are_left_out_only_if_agreed() {
    alone(|| {
        let tap = Tap::open(NAME)?;
        tap.set_carrier(true)?;
        let capture = Capture::start(NAME)?;
        assert_eq!(tap.write_frame(&announce::rarp_request(mac()))?, Written::Taken);
        let socket = host_socket()?;
        socket.send(b"with a checksum")?;
        let frame = next(&tap, |frame| has(frame, b"with a checksum"))?;
        assert_eq!((frame[0], &frame[HEADER..HEADER + 6]), (0, &mac().bytes()[..]));
        tap.set_offloads(Offloads::ALL)?;
        socket.send(b"without one")?;
        let frame = next(&tap, |frame| has(frame, b"without one"))?;
        // VIRTIO_NET_HDR_F_NEEDS_CSUM; after both headers; where UDP has it.
        assert_eq!((frame[0] & 1, &frame[6..10]), (1, &[34, 0, 6, 0][..]));
        tap.set_offloads(Offloads::default())?;
        socket.send(b"again")?;
        assert_eq!(next(&tap, |frame| has(frame, b"again"))?[0], 0);
        let (frames, missed) = capture.stop();
        assert_eq!(missed, 0);
        let rarp = frames.first().context("no frame was captured")?;
        assert_eq!((rarp.outgoing, rarp.len, rarp.ethertype()), (false, 60, Some(0x8035)));
        assert_eq!(rarp.source(), Some(mac().bytes()));
        let to_guest = frames.iter().filter(|frame| frame.outgoing && frame.bytes[..6] == mac().bytes());
        assert_eq!(to_guest.count(), 3);
        Ok(())
    });
}

/// What a guest answers to the first segment of a connection. Its checksum is left to the host.
fn syn_ack(syn: &[u8]) -> Vec<u8> {
    let at = |from: usize, len: usize| &syn[HEADER + from..HEADER + from + len];
    let mut ip = [&[0x45, 0, 0, 44, 0, 0, 0x40, 0, 64, 6, 0, 0], at(30, 4), at(26, 4)].concat();
    let words = ip.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    ip[10..12].copy_from_slice(&(!(folded as u16)).to_be_bytes());
    let next = u32::from_be_bytes(at(38, 4).try_into().unwrap()).wrapping_add(1);
    [
        // NEEDS_CSUM, from the TCP header on, where TCP has it.
        &[1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0],
        at(6, 6),
        at(0, 6),
        &[8, 0],
        &ip,
        at(36, 2),
        at(34, 2),
        &1000_u32.to_be_bytes(),
        &next.to_be_bytes(),
        // Six words, SYN and ACK, the window; the largest segment is of 1460 bytes.
        &[0x60, 0x12, 0xff, 0xff, 0, 0, 0, 0, 2, 4, 0x05, 0xb4],
    ]
    .concat()
}

#[test]
fn long_segments_come_in_one_frame_only_if_agreed() {
    alone(|| {
        let tap = Tap::open(NAME)?;
        tap.set_carrier(true)?;
        drop(host_socket()?);
        let is_syn = |frame: &[u8]| frame[12..14] == [8, 0] && frame[23] == 6 && frame[47] == 2;
        for (offloads, wanted, fill) in [(Offloads::ALL, true, 0x55), (Offloads::default(), false, 0xaa)] {
            tap.set_offloads(offloads)?;
            let client = std::thread::scope(|scope| {
                let connecting = scope.spawn(|| TcpStream::connect_timeout(&(GUEST, 7).into(), PATIENCE));
                let syn = next(&tap, is_syn)?;
                assert_eq!(tap.write_frame(&syn_ack(&syn))?, Written::Taken);
                anyhow::Ok(connecting.join().unwrap()?)
            })?;
            (&client).write_all(&[fill; 5000])?;
            let frame = next(&tap, |frame| has(frame, &[fill; 1000]))?;
            // VIRTIO_NET_HDR_GSO_TCPV4, and the length of a segment.
            let (kind, segment) = (frame[1], u16::from_le_bytes([frame[4], frame[5]]));
            let whole = frame.len() > 5000 && kind == 1 && segment == 1460;
            assert_eq!(whole, wanted, "{} bytes, {:?}", frame.len(), &frame[..HEADER]);
        }
        Ok(())
    });
}

#[test]
fn a_frame_that_is_none_a_down_interface_and_a_broken_one_are_told_apart() {
    alone(|| {
        let tap = Tap::open(NAME)?;
        let good = announce::rarp_request(mac());
        let mut bad = good;
        // A checksum to be made where the frame has ended long before.
        bad[..HEADER].copy_from_slice(&[1, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0]);
        for refused in [&bad[..], &good[..HEADER + 5], &good[..3], &[]] {
            assert_eq!(tap.write_frame(refused)?, Written::Refused, "{refused:?}");
        }
        assert_eq!(tap.write_frame(&good)?, Written::Taken);
        ip(&format!("link set {NAME} down\n"))?;
        assert_eq!(tap.write_frame(&good)?, Written::Down);
        ip(&format!("link delete {NAME}\n"))?;
        assert!(tap.write_frame(&good).is_err());
        assert!(tap.read_frame(&mut [0; 100]).is_err());
        assert!(tap.set_carrier(true).is_err());
        Ok(())
    });
}

/// Sends from the client to the guest's card; at which of the two TAPs it arrives.
fn arrives(lab: &Lab, taps: [&Tap; 2], text: &str) -> anyhow::Result<[bool; 2]> {
    lab.client(|| UdpSocket::bind((CLIENT, 0))?.send_to(text.as_bytes(), (GUEST, 7)))??;
    let mut frame = vec![0; MAX_FRAME];
    let mut got = [false; 2];
    let started = Instant::now();
    // It goes to both in one step of the bridge; a little later than the first is late enough for the other.
    let mut until = PATIENCE;
    while started.elapsed() < until {
        for (tap, got) in taps.iter().zip(&mut got) {
            while let Some(len) = tap.read_frame(&mut frame)? {
                if has(&frame[..len], text.as_bytes()) {
                    *got = true;
                    until = until.min(started.elapsed() + Duration::from_millis(100));
                }
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(got)
}

fn neighbour(lab: &Lab) -> anyhow::Result<String> {
    lab.client(|| output("ip", &["neighbour", "show", &GUEST.to_string()]))?
}

#[test]
fn bridge_and_neighbour_follow_an_announced_address() {
    if !lab::usable() {
        return;
    }
    let follow = || -> anyhow::Result<()> {
        let lab = Lab::enter(&["a", "b"])?;
        let (a, b) = (Tap::open(&tap_of("a"))?, Tap::open(&tap_of("b"))?);
        a.set_carrier(true)?;
        assert_eq!(a.write_frame(&announce::rarp_request(mac()))?, Written::Taken);
        // Somebody else had the address before: the neighbour has to learn.
        lab.client(|| ip(&format!("neighbour add {GUEST} lladdr 02:00:00:00:00:99 dev eth0 nud stale\n")))??;
        for frame in announce::announcement(mac(), [GUEST]) {
            assert_eq!(a.write_frame(&frame)?, Written::Taken);
        }
        let known = neighbour(&lab)?;
        ensure!(known.contains(&mac().to_string()), "{known}");
        assert_eq!(arrives(&lab, [&a, &b], "to a")?, [true, false]);
        // Both plugged in for an instant, as when a primary is thought dead: the bridge still sends to the old port.
        b.set_carrier(true)?;
        assert_eq!(arrives(&lab, [&a, &b], "still to a")?, [true, false]);
        let at_client = lab.capture_client()?;
        for frame in announce::announcement(mac(), [GUEST]) {
            assert_eq!(b.write_frame(&frame)?, Written::Taken);
        }
        assert_eq!(arrives(&lab, [&a, &b], "to b")?, [false, true]);
        drop(a);
        lab.client(|| UdpSocket::bind((CLIENT, 0))?.send_to(b"b alone", (GUEST, 7)))??;
        next(&b, |frame| has(frame, b"b alone"))?;
        let announced = at_client.stop().0;
        let announced = announced.iter().filter(|f| !f.outgoing && f.source() == Some(mac().bytes()));
        let kinds: Vec<_> = announced.filter_map(|frame| frame.ethertype()).collect();
        assert_eq!(kinds, [0x8035, 0x0806, 0x0806]);
        Ok(())
    };
    follow().unwrap();
}
