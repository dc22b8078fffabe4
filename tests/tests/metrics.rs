//! The endpoint of metrics in front of an account that is filled here, and what stands about metrics outside of the code.

use anyhow::Context;
use colo_common::Incarnation;
use colo_common::config::MetricsConfig;
use colo_primary::admin::Plane;
use colo_primary::console::Console;
use colo_primary::metrics::{self, Endpoint, Kind, TABLE, When};
use colo_primary::node::status::{Board, Devices, DiskAccount, NetworkAccount, Overlay, Role};
use colo_tests::scrape::{Scrape, ask, scrape};
use colo_vmm::tap::Tap;
use serde_json::Value;
use std::collections::BTreeSet;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Runtime;

/// A file of the tree.
fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// An endpoint that answers from `board`.
fn serve(board: &Board) -> (Runtime, SocketAddr) {
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
    let endpoint = Endpoint::bind(&MetricsConfig { listen: Some(free), public: false }).unwrap().unwrap();
    let (vm, node) = ("web".parse().unwrap(), "a".parse().unwrap());
    let plane = Plane::new(Some(vm), node, Incarnation::draw(), board.clone(), Console::default());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let entered = runtime.enter();
    endpoint.serve(&plane).unwrap();
    drop(entered);
    (runtime, free)
}

#[derive(Debug)]
struct Half;

impl Overlay for Half {
    fn bytes_to_fold(&self) -> u64 {
        4096
    }

    fn failure(&self) -> Option<String> {
        Some("it fell over".to_owned())
    }
}

/// Names of metrics in a text that no node tells.
fn unlisted(text: &str) -> Vec<&str> {
    let listed = |name: &str| {
        let histogram = |metric: &metrics::Metric| {
            let end = name.strip_prefix(metric.name).unwrap_or_default();
            metric.kind == Kind::Histogram && ["_bucket", "_sum", "_count"].contains(&end)
        };
        TABLE.iter().any(|metric| metric.name == name || histogram(metric))
    };
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("colo_") && *word != "colo_" && !listed(word)).collect()
}

#[test]
fn the_document_has_the_rows_of_the_table() {
    let document = read("docs/metrics.md");
    let (_, all) = document.split_once("## All metrics").unwrap();
    let written: Vec<&str> = all.lines().filter(|line| line.starts_with("| `colo_")).collect();
    let rows: Vec<String> = TABLE.iter().map(metrics::Metric::row).collect();
    assert!(written == rows, "docs/metrics.md must have these rows:\n{}", rows.join("\n"));
    assert_eq!(unlisted(&document), [""; 0], "in docs/metrics.md");
}

#[test]
fn the_dashboard_uses_what_is_listed() {
    let text = read("deploy/grafana/colo.json");
    let dashboard: Value = serde_json::from_str(&text).unwrap();
    assert!(dashboard["panels"].as_array().is_some_and(|panels| !panels.is_empty()));
    assert_eq!(unlisted(&text), [""; 0], "in the dashboard");
    for needed in [
        "colo_role{",
        "colo_epoch_pause_seconds_bucket{",
        "colo_epoch_ack_seconds_bucket{",
        "colo_epoch_age_seconds{",
        "colo_unprotected_age_seconds{",
        "colo_promotions_total{",
    ] {
        assert!(text.contains(needed), "{needed} is not shown");
    }
}

#[test]
fn a_node_that_has_only_begun_tells_what_it_has() {
    let (_runtime, address) = serve(&Board::default());
    let told = scrape(address).unwrap().names();
    let always = TABLE.iter().filter(|metric| metric.when == When::Always);
    let wanted: BTreeSet<String> = always.map(|metric| metric.name.to_owned()).collect();
    assert_eq!(told, wanted);
}

#[test]
fn the_words_are_those_of_the_table() {
    let (_runtime, address) = serve(&Board::default());
    let told = scrape(address).unwrap();
    for metric in TABLE.iter().filter(|metric| metric.when == When::Always) {
        let (kind, help) = told.family(metric.family()).unwrap();
        let wanted = format!("{:?}", metric.kind).to_lowercase();
        assert_eq!((kind, help), (wanted.as_str(), format!("{}.", metric.help).as_str()), "{}", metric.name);
    }
    let labels =
        |sample: &colo_tests::scrape::Sample| (sample.labels["vm"].clone(), sample.labels["node"].clone());
    assert!(told.samples().iter().all(|sample| labels(sample) == ("web".to_owned(), "a".to_owned())));
}

#[test]
fn devices_are_told_of() {
    let board = Board::default();
    let (near, far) = UnixDatagram::pair().unwrap();
    let tap = Arc::new(Tap::from_socket(near.into()).unwrap());
    let network = NetworkAccount { tap: Arc::clone(&tap), mac: "52:54:00:00:00:01".parse().unwrap() };
    let overlay = Some(Arc::new(Half) as Arc<dyn Overlay>);
    let disk = DiskAccount { path: PathBuf::from("disk"), bytes: 1 << 20, read_only: false, overlay };
    board.attach(Devices { disk: Some(disk), network: Some(network) });
    let (_runtime, address) = serve(&board);
    tap.write_frame(&[0; 72]).unwrap();
    far.send(&[0; 100]).unwrap();
    tap.read_frame(&mut [0; 256]).unwrap();
    let told = scrape(address).unwrap();
    let value = |name: &str, labels: &[(&str, &str)]| told.value(name, labels).unwrap();
    // Without the headers of virtio.
    assert_eq!(value("colo_network_bytes_total", &[("direction", "sent")]), 60.0);
    assert_eq!(value("colo_network_bytes_total", &[("direction", "received")]), 88.0);
    assert_eq!(value("colo_network_frames_total", &[("direction", "sent")]), 1.0);
    assert_eq!((value("colo_disk_overlay_bytes", &[]), value("colo_disk_failed", &[])), (4096.0, 1.0));
    let missing: Vec<_> = TABLE
        .iter()
        .filter(|metric| {
            matches!(metric.when, When::Card | When::Disk) && !told.names().contains(metric.name)
        })
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn what_happens_is_counted_as_it_happens() {
    let board = Board::default();
    let (_runtime, address) = serve(&board);
    board.arbiter_silent("it is away".to_owned());
    board.arbiter_silent("it is away".to_owned());
    board.meters().observe(metrics::EPOCH_PERSIST, Duration::from_micros(300));
    board.meters().observe_for(metrics::PROMOTION, "apply", Duration::from_millis(30));
    board.change(|status| {
        status.role = Role::Alone;
        status.unprotected_before = Duration::from_secs(7);
    });
    let told = scrape(address).unwrap();
    let value = |name: &str, labels: &[(&str, &str)]| told.value(name, labels).unwrap();
    assert_eq!((value("colo_arbiter_errors_total", &[]), value("colo_arbiter_silent", &[])), (2.0, 1.0));
    assert_eq!(value("colo_epoch_persist_seconds_bucket", &[("le", "0.00025")]), 0.0);
    assert_eq!(value("colo_epoch_persist_seconds_bucket", &[("le", "0.0005")]), 1.0);
    assert_eq!(value("colo_promotion_seconds_count", &[("part", "apply")]), 1.0);
    assert_eq!(value("colo_promotion_seconds_count", &[("part", "total")]), 0.0);
    assert_eq!(
        (value("colo_role", &[("role", "alone")]), value("colo_role", &[("role", "paired")])),
        (1.0, 0.0)
    );
    assert_eq!(value("colo_unprotected_seconds_total", &[]), 7.0);
}

#[test]
#[should_panic(expected = "colo_copy_bytes_total has no mode \"sideways\"")]
fn a_label_has_no_value_that_is_not_listed() {
    Board::default().meters().add_for(metrics::COPY_BYTES, "sideways", 1.0);
}

#[test]
fn nothing_else_is_answered() {
    let (_runtime, address) = serve(&Board::default());
    let status = |request: &[u8]| ask(address, request).map(|answer| answer.status);
    for (request, wanted) in [
        ("GET / HTTP/1.1", 404),
        ("GET /metrics/ HTTP/1.1", 404),
        ("GET /../metrics HTTP/1.1", 404),
        ("POST / HTTP/1.1", 404),
        ("POST /metrics HTTP/1.1", 405),
        ("HEAD /metrics HTTP/1.1", 405),
        ("DELETE /metrics HTTP/1.1", 405),
        ("GET /metrics?name=colo_role HTTP/1.1", 200),
    ] {
        assert_eq!(status(format!("{request}\r\nHost: x\r\n\r\n").as_bytes()).unwrap(), wanted, "{request}");
    }
    let refused =
        ask(address, b"PUT /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello").unwrap();
    assert_eq!((refused.status, refused.headers.get("allow").map(String::as_str)), (405, Some("GET")));
    let long = format!("GET /metrics HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(64 << 10));
    // Refused, or closed while it is still being sent.
    assert!(status(long.as_bytes()).map_or(true, |status| status == 431), "a long head");
    assert!(status(b"\x16\x03\x01 this is no HTTP\r\n\r\n").map_or(true, |status| status == 400));
    scrape(address).unwrap();
}

/// Connections that say nothing take all places for some seconds, and not for ever.
#[test]
fn whoever_keeps_silent_is_closed() {
    let (_runtime, address) = serve(&Board::default());
    let silent: Vec<TcpStream> = (0..40).map(|_| TcpStream::connect(address).unwrap()).collect();
    for mut stream in &silent {
        stream.write_all(b"GET /metr").unwrap();
    }
    let until = std::time::Instant::now() + Duration::from_secs(30);
    let answered = |_| (std::time::Instant::now() < until).then(|| scrape(address).ok());
    let told: Option<Scrape> = (0..).map_while(answered).flatten().next();
    told.context("nobody else is answered any more").unwrap();
    drop(silent);
}

#[test]
fn a_port_in_use_is_named() {
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let config = MetricsConfig { listen: Some(taken.local_addr().unwrap()), public: false };
    let error = format!("{:#}", Endpoint::bind(&config).unwrap_err());
    assert!(error.contains("metrics.listen") && error.contains("choose another port"), "{error}");
    assert!(Endpoint::bind(&MetricsConfig::default()).unwrap().is_none());
}
