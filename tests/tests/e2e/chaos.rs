//! A short form of `make chaos`: a few of its faults, in one world.

use colo_tests::chaos::plan::short;
use colo_tests::chaos::report::Report;
use colo_tests::chaos::step::Scene;
use colo_tests::etcd;
use colo_tests::seed::Seed;
use std::time::Duration;

use super::service::images;

/// A fault lasts so much longer than is needed, at most.
const HOLD: Duration = Duration::from_secs(1);

#[test]
fn hosts_of_nodes_and_of_etcd_fail() {
    let Some(images) = images().filter(|_| etcd::usable()) else { return };
    let mut seed = Seed::from_env(5301);
    let faults = short(&mut seed);
    let mut scene = Scene::begin(&images, seed, HOLD).unwrap();
    let mut report = Report::default();
    for fault in &faults {
        println!("{fault}");
        report.add(scene.play(fault).unwrap());
    }
    scene.end().unwrap();
    println!("{}", report.table());
    report.verdict().unwrap();
}
