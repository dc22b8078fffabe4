//! Every key, every default and every refusal.

use super::{
    Ack, AdminConfig, ArbiterConfig, ArbiterKind, ConfigError, CpuModel, Endpoint, Failover, GuestKind,
    LogConfig, LogFormat, MetricsConfig, OnCrash, OnSecondaryLoss, OnStop, PrimaryConfig, ReplicationConfig,
    SecondaryConfig, Tracker,
};
use proptest::prelude::{any, proptest};
use std::fs;
use std::path::{Path, PathBuf};

const PRIMARY: &str = r#"node = "a"
vm = "web"
directory = "vm"
[guest]
kernel = "/k"
[arbiter]
directory = "/arbiter"
"#;

const SECONDARY: &str = r#"node = "b"
vm = "web"
directory = "/vm"
[arbiter]
directory = "arbiter"
"#;

fn primary(text: &str) -> Result<PrimaryConfig, String> {
    PrimaryConfig::parse(text, Path::new("/etc/p.toml")).map_err(|e| e.to_string())
}

fn secondary(text: &str) -> Result<SecondaryConfig, String> {
    SecondaryConfig::parse(text, Path::new("/etc/s.toml")).map_err(|e| e.to_string())
}

#[test]
fn little_is_needed_and_the_rest_has_defaults() {
    let config = primary(PRIMARY).unwrap();
    assert_eq!(config.directory, PathBuf::from("/etc/vm"), "relative to the file");
    assert_eq!(config.arbiter.directory, Some(PathBuf::from("/arbiter")));
    assert_eq!((config.on_crash, config.on_stop, config.max_promotions), (OnCrash::None, OnStop::Stop, 3));
    assert_eq!(config.admin.listen.to_string(), "127.0.0.1:7700");
    assert_eq!(config.replication, ReplicationConfig::default());
    assert_eq!((config.metrics, config.log), (MetricsConfig::default(), LogConfig::default()));
    assert_eq!((config.guest.kind, config.guest.tracker), (GuestKind::Kvm, Tracker::Ring));

    let config = secondary(SECONDARY).unwrap();
    assert_eq!(config.arbiter.directory, Some(PathBuf::from("/etc/arbiter")));
    assert_eq!(config.replication.listen.to_string(), "127.0.0.1:7702");
    assert_eq!((config.replication.ack, config.replication.failover), (Ack::Memory, Failover::Auto));
    assert_eq!(config.promoted, ReplicationConfig::default());
}

#[test]
fn every_key_of_a_primary_is_taken() {
    let text = r#"
        node = "a"
        vm = "web"
        directory = "vm"
        on_crash = "boot"
        on_stop = "leave"
        max_promotions = 0
        [guest]
        kind = "kvm"
        kernel = "boot/vmlinux"
        initrd = ["boot/initrd"]
        cmdline = "quiet"
        memory_mib = 1048576
        vcpus = 64
        cpu_model = "x86-64-v3"
        tracker = "bitmap"
        ring_entries = 1024
        virtio_slots = 8
        overcommit = true
        seed = 9
        [replication]
        secondary = "[2001:db8::1]:7701"
        interval_ms = 1
        window = 64
        max_epoch_mib = 65536
        heartbeat_ms = 5
        suspect_after_ms = 11
        on_secondary_loss = "hold"
        [admin]
        listen = "0.0.0.0:0"
        [tls]
        directory = "tls"
        [arbiter]
        kind = "file"
        directory = "arbiter"
        [console]
        file = "console.log"
        pty = "console"
        [metrics]
        listen = "10.0.0.1:9100"
        public = true
        [log]
        format = "json"
        level = "warn,colo_primary=debug"
    "#;
    let config = primary(text).unwrap();
    assert_eq!(config.guest.kernel, Some("/etc/boot/vmlinux".into()));
    assert_eq!(config.guest.initrd, [PathBuf::from("/etc/boot/initrd")]);
    assert_eq!(config.guest.cpu_model, CpuModel::X86_64V3);
    let peer = config.replication.secondary.unwrap();
    assert_eq!((peer.host(), peer.port(), peer.is_loopback()), ("2001:db8::1", 7701, false));
    assert_eq!(config.replication.on_secondary_loss, OnSecondaryLoss::Hold);
    assert_eq!(config.tls.unwrap().directory, PathBuf::from("/etc/tls"));
    assert_eq!(config.console.pty, Some("/etc/console".into()));
    assert_eq!(config.metrics.listen, Some("10.0.0.1:9100".parse().unwrap()));
    assert_eq!((config.log.format, config.log.level.as_str()), (LogFormat::Json, "warn,colo_primary=debug"));
    let synthetic = PRIMARY.replace("kernel = \"/k\"", "kind = \"synthetic\"");
    assert_eq!(primary(&synthetic).unwrap().guest.kind, GuestKind::Synthetic);
}

#[test]
fn every_key_of_a_secondary_is_taken() {
    let text = r#"
        node = "b"
        vm = "web"
        directory = "vm"
        on_crash = "boot"
        on_stop = "leave"
        max_promotions = 1000
        [replication]
        listen = "[::]:7702"
        advertise_port = 4702
        ack = "disk"
        failover = "manual"
        heartbeat_ms = 10000
        suspect_after_ms = 600000
        promote_delay_ms = 0
        memory_budget_mib = 64
        [promoted]
        secondary = "c.example:7701"
        interval_ms = 10000
        [admin]
        listen = "10.0.0.1:7701"
        [tls]
        directory = "/tls"
        [arbiter]
        directory = "/arbiter"
        [console]
        file = "/console"
        [metrics]
        listen = "127.0.0.1:0"
        [log]
        format = "text"
    "#;
    let config = secondary(text).unwrap();
    assert_eq!((config.replication.ack, config.replication.failover), (Ack::Disk, Failover::Manual));
    assert_eq!(config.replication.advertise_port.map(std::num::NonZeroU16::get), Some(4702));
    assert_eq!(config.promoted.secondary.unwrap().to_string(), "c.example:7701");
    assert_eq!(config.promoted.interval_ms, 10_000);
}

/// `PRIMARY` with one more line in a section, or at the top.
fn with(base: &str, section: &str, line: &str) -> String {
    let header = format!("[{section}]\n");
    if section.is_empty() {
        format!("{line}\n{base}")
    } else if base.contains(&header) {
        base.replace(&header, &format!("{header}{line}\n"))
    } else {
        format!("{base}{header}{line}\n")
    }
}

#[test]
fn what_is_out_of_its_bounds_is_refused() {
    for (section, line) in [
        ("", "max_promotions = 1001"),
        ("guest", "memory_mib = 0"),
        ("guest", "memory_mib = 1048577"),
        ("guest", "vcpus = 0"),
        ("guest", "vcpus = 65"),
        ("guest", "virtio_slots = 9"),
        ("guest", "ring_entries = 512"),
        ("guest", "ring_entries = 3000"),
        ("guest", "ring_entries = 131072"),
        ("replication", "interval_ms = 0"),
        ("replication", "interval_ms = 10001"),
        ("replication", "window = 0"),
        ("replication", "window = 65"),
        ("replication", "max_epoch_mib = 15"),
        ("replication", "max_epoch_mib = 65537"),
        ("replication", "heartbeat_ms = 4"),
        ("replication", "heartbeat_ms = 10001"),
        ("replication", "suspect_after_ms = 600001"),
    ] {
        let text = with(PRIMARY, section, line);
        let error = primary(&text).unwrap_err();
        let key = line.split(' ').next().unwrap();
        let number = text.lines().position(|l| l == line).unwrap() + 1;
        assert!(error.starts_with(&format!("/etc/p.toml:{number}: ")), "{error}");
        assert!(error.contains(key) && error.contains("choose"), "{error}");
    }
    for line in ["promote_delay_ms = 600001", "memory_budget_mib = 63", "memory_budget_mib = 1048577"] {
        let error = secondary(&with(SECONDARY, "replication", line)).unwrap_err();
        assert!(error.contains("/etc/s.toml:7: replication.") && error.contains("choose"), "{error}");
    }
    let error = secondary(&with(SECONDARY, "replication", "advertise_port = 0")).unwrap_err();
    assert!(
        error.contains("/etc/s.toml:7: replication.advertise_port: ") && error.contains("nonzero"),
        "{error}"
    );
    let error = secondary(&with(SECONDARY, "promoted", "window = 0")).unwrap_err();
    assert!(error.contains("/etc/s.toml:7: promoted.window: 0 is out of range"), "{error}");
}

#[test]
fn what_does_not_fit_together_is_refused() {
    let check = |section: &str, lines: &str, wanted: &[&str]| {
        let error = primary(&with(PRIMARY, section, lines)).unwrap_err();
        assert!(wanted.iter().all(|part| error.contains(part)), "{error} lacks one of {wanted:?}");
    };
    check(
        "replication",
        "heartbeat_ms = 100\nsuspect_after_ms = 200",
        &["p.toml:10: replication.suspect_after_ms", "two heartbeats of 100 ms", "raise it"],
    );
    // The key that is named has its default and so no line.
    check(
        "replication",
        "heartbeat_ms = 250",
        &["p.toml: replication.suspect_after_ms: 500 is not more than"],
    );
    check("admin", "listen = \"0.0.0.0:7700\"", &["p.toml:9: admin.listen", "not on loopback", "in [tls]"]);
    check(
        "replication",
        "secondary = \"b.example:7701\"",
        &["replication.secondary", "not on loopback", "in [tls]"],
    );
    check("replication", "secondary = \"127.0.0.1:7700\"", &["replication.secondary", "own admin address"]);
    check("guest", "kind = \"synthetic\"", &["guest.kernel", "boots no kernel", "remove this key"]);
    check("guest", &format!("cmdline = \"{}\"", "x".repeat(2048)), &["guest.cmdline", "2048 bytes", "2047"]);
    check("guest", "cmdline = \"a\\u0000b\"", &["guest.cmdline", "NUL"]);
    check("guest", &format!("initrd = [{}]", "\"m\",".repeat(17)), &["guest.initrd", "more than 16 files"]);
    check("console", "file = \"/x\"\npty = \"/x\"", &["console.pty", "same path", "choose another"]);
    check(
        "metrics",
        "listen = \"0.0.0.0:9100\"",
        &["p.toml:9: metrics.listen", "not on loopback", "metrics.public = true"],
    );
    check(
        "metrics",
        "listen = \"127.0.0.1:7700\"",
        &["metrics.listen", "admin.listen as well", "another port"],
    );
    check(
        "log",
        "level = \"loud=very\"",
        &["p.toml:9: log.level", "is no filter", "info,colo_secondary=debug"],
    );
    let error = primary(&PRIMARY.replace("kernel = \"/k\"\n", "")).unwrap_err();
    assert!(error.contains("guest.kernel: a kvm guest needs a kernel"), "{error}");
    let synthetic = PRIMARY.replace("kernel = \"/k\"", "kind = \"synthetic\"\ninitrd = [\"/i\"]");
    assert!(primary(&synthetic).unwrap_err().contains("p.toml:6: guest.initrd"));
    for (section, line) in [
        ("admin", "listen = \"10.1.2.3:1\""),
        ("replication", "listen = \"[::]:1\""),
        ("promoted", "secondary = \"10.1.2.3:1\""),
    ] {
        let error = secondary(&with(SECONDARY, section, line)).unwrap_err();
        assert!(
            error.contains(&format!("s.toml:7: {section}.")) && error.contains("not on loopback"),
            "{error}"
        );
    }
    let error = secondary(&with(SECONDARY, "replication", "suspect_after_ms = 100")).unwrap_err();
    assert!(error.contains("s.toml:7: replication.suspect_after_ms"), "{error}");
}

#[test]
fn what_is_misspelt_is_told_with_what_was_meant() {
    let check = |text: &str, wanted: &str| {
        let error = primary(text).unwrap_err();
        assert!(error.contains(wanted), "{error} lacks {wanted}");
    };
    let line = |section: &str, line: &str| with(PRIMARY, section, line);
    check(&line("", "on_crsh = \"boot\""), "p.toml:1: on_crsh: this key is unknown; did you mean on_crash?");
    check(
        &line("replication", "intervall_ms = 3"),
        "p.toml:9: replication.intervall_ms: this key is unknown; did you mean interval_ms?",
    );
    check(
        &line("guest", "colour = 3"),
        "p.toml:5: guest.colour: this key is unknown; known here: kind, kernel,",
    );
    check(&line("replicaton", "window = 3"), "replicaton: this key is unknown; did you mean replication?");
    check(
        &line("guest", "tracker = \"rings\""),
        "p.toml:5: guest.tracker: \"rings\" is none of its values; did you mean ring?",
    );
    check(
        &line("guest", "vcpus = \"two\""),
        "p.toml:5: guest.vcpus: invalid type: string \"two\", expected u32",
    );
    check(&line("guest", "vcpus = -1"), "p.toml:5: guest.vcpus: invalid value");
    check(
        &line("replication", "secondary = \"b\""),
        "p.toml:9: replication.secondary: \"b\" is no address; write",
    );
    check(&line("admin", "listen = \"here\""), "p.toml:9: admin.listen: invalid socket address");
    check(&PRIMARY.replace("\"a\"", "\"a/b\""), "p.toml:1: node: \"a/b\" is no name: use 1 to 64");
    check(&PRIMARY.replace("vm = \"web\"\n", ""), "vm: this key is missing; add it");
    check(
        &PRIMARY.replace("[arbiter]\ndirectory", "[arbiter]\nkind=\"file\"\n#"),
        "arbiter.directory: this key is missing",
    );
    check(&PRIMARY.replace("[guest]", "[guest"), "p.toml:4: ");
    check(&line("", "node = \"b\""), "p.toml:2: ");
    check("", "node: this key is missing");
}

/// `SECONDARY` with another `[arbiter]`.
fn arbiter(lines: &str) -> Result<ArbiterConfig, String> {
    let text = SECONDARY.replace("directory = \"arbiter\"\n", lines);
    secondary(&text).map(|config| config.arbiter)
}

#[test]
fn every_key_of_an_arbiter_in_etcd_is_taken() {
    let config = arbiter(
        "kind = \"etcd\"\nendpoints = [\"https://e1:2379\", \"https://[::1]:2379/\"]\nprefix = \"/x/\"\n\
         timeout_ms = 100\nlease_s = 600\nca = \"ca.pem\"\ncertificate = \"c.pem\"\nkey = \"/k.key\"\n\
         insecure = false\n",
    )
    .unwrap();
    assert_eq!(config.kind, ArbiterKind::Etcd);
    let names: Vec<_> = config.endpoints.iter().flatten().map(ToString::to_string).collect();
    assert_eq!(names, ["https://e1:2379", "https://[::1]:2379"]);
    assert_eq!((config.prefix(), config.timeout().as_millis(), config.lease().as_secs()), ("/x/", 100, 600));
    assert_eq!(config.certificate, Some("/etc/c.pem".into()));
    assert_eq!(config.key, Some("/k.key".into()));
    let config = arbiter("kind = \"etcd\"\nendpoints = [\"http://localhost:2379\"]\n").unwrap();
    assert_eq!(
        (config.prefix(), config.timeout().as_millis(), config.lease().as_secs()),
        ("/colo/", 2000, 5)
    );
    arbiter("kind = \"etcd\"\nendpoints = [\"http://10.0.0.1:2379\"]\ninsecure = true\n").unwrap();
}

#[test]
fn what_does_not_fit_the_arbiter_is_refused() {
    const ETCD: &str = "kind = \"etcd\"\n";
    const PLAIN: &str = "kind = \"etcd\"\nendpoints = [\"http://127.0.0.1:2379\"]\n";
    const TLS: &str = "kind = \"etcd\"\nendpoints = [\"https://e1:2379\"]\n";
    for (lines, wanted) in [
        (String::new(), "arbiter.directory: this key is missing"),
        (
            "directory = \"/a\"\nprefix = \"/x/\"".into(),
            "s.toml:6: arbiter.prefix: it is of an arbiter in etcd",
        ),
        (
            "directory = \"/a\"\nendpoints = []".into(),
            "s.toml:6: arbiter.endpoints: it is of an arbiter in etcd",
        ),
        ("kind = \"etc\"".into(), "did you mean etcd?"),
        ("kind = \"etcd\"\nendpoint = []".into(), "did you mean endpoints?"),
        (ETCD.into(), "arbiter.endpoints: this key is missing"),
        (
            format!("{PLAIN}directory = \"/a\""),
            "s.toml:7: arbiter.directory: it is of an arbiter in a directory",
        ),
        (format!("{ETCD}endpoints = []"), "name 1 to 16"),
        (format!("{ETCD}endpoints = [\"e1:2379\"]"), "write https://HOST:PORT"),
        (format!("{ETCD}endpoints = [\"https://e1\"]"), "write HOST:PORT"),
        (format!("{ETCD}endpoints = [\"http://e1:2379\"]"), "not on loopback and not encrypted"),
        (format!("{ETCD}endpoints = [\"http://[::1]:1\", \"http://[::1]:1\"]"), "is there twice"),
        (TLS.into(), "arbiter.ca: this key is missing"),
        (format!("{PLAIN}ca = \"/ca\""), "certificates are given; write https://"),
        (format!("{TLS}ca = \"/ca\"\ncertificate = \"/c\""), "arbiter.key: this key is missing"),
        (format!("{TLS}ca = \"/ca\"\nkey = \"/k\""), "arbiter.certificate: this key is missing"),
        (format!("{PLAIN}prefix = \"x/\""), "s.toml:7: arbiter.prefix: \"x/\" is no prefix"),
        (format!("{PLAIN}timeout_ms = 99"), "s.toml:7: arbiter.timeout_ms: 99 is out of range; choose"),
        (format!("{PLAIN}lease_s = 1"), "s.toml:7: arbiter.lease_s: 1 is out of range; choose"),
    ] {
        let error = arbiter(&(lines + "\n")).unwrap_err();
        assert!(error.contains(wanted), "{error} lacks {wanted}");
    }
}

#[test]
fn files_that_cannot_be_read_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("colo.toml");
    let error = PrimaryConfig::load(&path).unwrap_err();
    assert!(matches!(error, ConfigError::Read { .. }));
    assert!(
        error.to_string().contains("colo.toml") && error.to_string().contains("check the path"),
        "{error}"
    );
    fs::write(&path, [0xff, 0xfe]).unwrap();
    assert!(PrimaryConfig::load(&path).unwrap_err().to_string().contains("it is not text"));
    fs::write(&path, vec![b'#'; 300 << 10]).unwrap();
    assert!(SecondaryConfig::load(&path).unwrap_err().to_string().contains("more than 262144 bytes"));
    fs::write(&path, SECONDARY).unwrap();
    let config = SecondaryConfig::load(&path).unwrap();
    assert_eq!(config.arbiter.directory, Some(directory.path().join("arbiter")));
}

#[test]
fn a_configuration_that_was_changed_is_checked_again() {
    let mut config = primary(PRIMARY).unwrap();
    config.check().unwrap();
    config.admin = AdminConfig { listen: "10.0.0.1:1".parse().unwrap(), advertise: None };
    assert_eq!(config.check().unwrap_err().key, "admin.listen");
}

#[test]
fn addresses_of_peers_are_hosts_with_ports() {
    for (good, loopback) in [
        ("127.0.0.1:1", true),
        ("127.9.9.9:65535", true),
        ("[::1]:7701", true),
        ("localhost:7701", true),
        ("LocalHost:7701", true),
        ("node-1.example:7701", false),
        ("10.0.0.1:7701", false),
        ("localhost.example:1", false),
    ] {
        let endpoint: Endpoint = good.parse().unwrap();
        assert_eq!((endpoint.to_string().as_str(), endpoint.is_loopback()), (good, loopback));
    }
    let long = format!("{}:1", "a".repeat(300));
    for bad in [
        "",
        ":1",
        "a",
        "a:",
        "a:0",
        "a:70000",
        "::1:1",
        "[::1]",
        "[a]:1",
        "a b:1",
        "http://a:1",
        "é:1",
        &long,
    ] {
        assert!(bad.parse::<Endpoint>().is_err(), "{bad}");
    }
}

proptest! {
    #[test]
    fn any_text_is_taken_or_refused(text in any::<String>(), lines in "([a-z.]{1,9}( = [0-9\"a-z]{1,5})?|\\[[a-z]{1,9}\\])(\n[a-z]{1,9} = [0-9]{1,4}){0,5}") {
        for text in [text.clone(), lines.clone(), format!("{PRIMARY}{lines}"), format!("{lines}\n{SECONDARY}")] {
            let _ = primary(&text);
            let _ = secondary(&text);
        }
    }

    #[test]
    fn any_address_is_taken_or_refused(text in any::<String>()) {
        if let Ok(endpoint) = text.parse::<Endpoint>() {
            assert_eq!(endpoint.to_string().parse::<Endpoint>().unwrap(), endpoint);
        }
    }
}
