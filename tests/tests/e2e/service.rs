//! A real service in a real guest, on a network and a disk of its own: what its clients were told stays true.

use colo_tests::cluster::Cluster;
use colo_tests::cluster::config::{Guest, Options};
use colo_tests::images::{Images, kvm_usable};
use colo_tests::lab::{self, GUEST, Lab, PREFIX};
use colo_tests::service::writer::{Writer, missing};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);

fn options(images: &Images) -> Options {
    let network = format!("ip={GUEST}::{}:255.255.255.0::eth0:off", lab::CLIENT);
    assert_eq!(PREFIX, 24);
    let guest = Guest::service(images, &network, "end=poweroff").unwrap();
    Options { disk: Some(images.service().unwrap().disk.to_owned()), network: true, ..Options::new(guest) }
}

#[test]
fn a_client_goes_on_over_one_connection() {
    if !kvm_usable() || !lab::usable() {
        return;
    }
    let images = Images::find().unwrap();
    let lab = Lab::enter(&["a", "b"]).unwrap();
    let mut cluster = Cluster::new(options(&images)).unwrap();
    cluster.keep();
    cluster.start_secondary("b").unwrap();
    cluster.start_primary("a", None).unwrap();
    cluster.until_said("colo-service ready").unwrap();
    println!("ready");
    let dial = lab.dial(&format!("{GUEST}:6379"), Duration::from_secs(10)).unwrap();
    let writer = Writer::start(dial, PATIENCE, "key").unwrap();
    std::thread::sleep(Duration::from_secs(5));
    println!("{} before", writer.acknowledged());
    cluster.protect("a", "b").unwrap();
    println!("{} protected", writer.acknowledged());
    std::thread::sleep(Duration::from_secs(5));
    println!("{} killing", writer.acknowledged());
    cluster.kill("a").unwrap();
    std::thread::sleep(Duration::from_secs(8));
    println!("{} after", writer.acknowledged());
    let history = writer.finish().unwrap();
    let dial = lab.dial(&format!("{GUEST}:6379"), Duration::from_secs(10)).unwrap();
    let lost = missing(dial, PATIENCE, &history).unwrap();
    println!("{} operations, lost {lost:?}", history.operations.len());
    assert!(lost.is_empty());
}
