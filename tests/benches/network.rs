//! What a guest's network carries, into it and out of it, unprotected and protected in one run: a client outside and Redis
//! in the guest, over the lab's bridge and the TAP. What goes in is a request with a large word that is looked for and not
//! kept, what comes out a large value; nothing of it touches the disk.

use anyhow::{Context, ensure};
use colo_tests::cluster::Cluster;
use colo_tests::cluster::config::{Guest, Options};
use colo_tests::images::{Images, kvm_usable};
use colo_tests::lab::{self, GUEST, Lab};
use colo_tests::service::resp::{Connection, Reply};
use std::time::{Duration, Instant};

/// Bytes of the word, and of the value.
const LARGE: usize = 512 << 10;
/// How long each direction is measured.
const EACH: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_secs(60);

#[expect(clippy::print_stdout, reason = "its result")]
fn main() -> anyhow::Result<()> {
    if !kvm_usable() || !lab::usable() {
        return Ok(());
    }
    let images = Images::find()?;
    let lab = Lab::enter(&["primary", "secondary"])?;
    let network = format!("ip={GUEST}::{}:255.255.255.0::eth0:off", lab::CLIENT);
    let guest = Guest::service(&images, &network, "")?;
    let disk = Some(images.service()?.disk.to_owned());
    let mut cluster = Cluster::new(Options { disk, network: true, ..Options::new(guest) })?;
    cluster.start_secondary("secondary")?;
    cluster.start_primary("primary", None)?;
    cluster.until_said("colo-service ready")?;
    let capture = lab.capture("primary")?;
    let stream = lab.connect(&format!("{GUEST}:6379"), PATIENCE)?;
    let mut connection = Connection::new(stream, PATIENCE)?;
    let large = vec![b'x'; LARGE];
    connection.call(&[b"SET", b"large", &large])?;
    let alone = measure(&mut connection, &large)?;
    cluster.protect("primary", "secondary")?;
    let protected = measure(&mut connection, &large)?;
    let (frames, _) = capture.stop();
    for (name, at) in [("into the guest", 0), ("out of the guest", 1)] {
        let ratio = protected[at] / alone[at];
        let longest = frames.iter().filter(|frame| frame.outgoing == (at == 0)).map(|frame| frame.len).max();
        let longest = longest.context("no frame was seen")?;
        println!(
            "{name}: unprotected {:.2} MB/s, protected {:.2} MB/s, {ratio:.2}; frames of up to {longest} bytes",
            alone[at], protected[at]
        );
    }
    Ok(())
}

/// MB/s into the guest and out of it.
fn measure(connection: &mut Connection, large: &[u8]) -> anyhow::Result<[f64; 2]> {
    let into = rate(|| {
        let reply = connection.call(&[b"EXISTS", large])?;
        ensure!(reply == Reply::Integer(0), "there is such a key");
        Ok(())
    })?;
    let out = rate(|| {
        let reply = connection.call(&[b"GET", b"large"])?;
        ensure!(matches!(reply, Reply::Bulk(Some(value)) if value.len() == LARGE), "another value");
        Ok(())
    })?;
    Ok([into, out])
}

fn rate(mut once: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let (start, mut bytes) = (Instant::now(), 0);
    while start.elapsed() < EACH {
        once().context("over the network")?;
        bytes += LARGE;
    }
    Ok(bytes as f64 / 1e6 / start.elapsed().as_secs_f64())
}
