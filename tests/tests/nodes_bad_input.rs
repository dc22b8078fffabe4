//! What operators, files and peers get wrong: each is one clear line that names the thing and the remedy, the process
//! ends with a status of its own where it cannot go on, and nothing is damaged.

use anyhow::{Context, ensure};
use colo_common::register::Value;
use colo_common::tls::{self, DevCerts};
use colo_common::{Incarnation, Term, VmId};
use colo_primary::quic::client_endpoint;
use colo_primary::wire::{read_control, write_control};
use colo_proto::frame::VmTag;
use colo_proto::message::{Control, Hello, Purpose, Refusal};
use colo_proto::v1::pairing_client::PairingClient;
use colo_proto::v1::{PairRequest, Role};
use colo_proto::version::Versions;
use colo_tests::cluster::config::{Guest, Options};
use colo_tests::cluster::{Cluster, scenario};
use colo_tests::seed::Seed;
use colo_vmm::PagePool;
use std::fs;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use tonic::transport::Endpoint;

fn synthetic() -> Options {
    Options::new(Guest::synthetic(Seed::new(1).below(1000)))
}

/// Both kinds of node, with their configurations changed by `edit`, end by themselves with one line that has all of
/// `wanted` in it.
fn both_refuse(edit: impl Fn(String) -> String, wanted: &[&str]) {
    scenario(synthetic(), |cluster| {
        cluster.is_refused("a", true, &edit, wanted)?;
        cluster.is_refused("b", false, &edit, wanted)
    })
    .unwrap();
}

#[test]
fn unknown_keys() {
    both_refuse(
        |text| format!("dirctory = \"x\"\n{text}"),
        &[".toml:1: dirctory", "did you mean directory?"],
    );
    both_refuse(|text| text.replace("heartbeat_ms", "heartbeats_ms"), &["did you mean heartbeat_ms?"]);
}

#[test]
fn missing_files() {
    both_refuse(|text| text.replace("\"arbiter\"", "\"elsewhere\""), &["elsewhere", "create the directory"]);
    let tls = |text: String| format!("{text}[tls]\ndirectory = \"certificates\"\n");
    both_refuse(tls, &["certificates/ca.pem", "put it there"]);
    scenario(synthetic(), |cluster| {
        let kernel = |text: String| {
            text.replace("kind = \"synthetic\"", "kernel = \"vmlinux\"").replace("seed", "# seed")
        };
        cluster.is_refused("a", true, kernel, &["vmlinux", "No such file"])?;
        let (path, mut command) = cluster.prepare("a", true, None)?;
        fs::remove_file(&path)?;
        let output = command.output()?;
        let log = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(1) && log.contains("cannot read the configuration"), "{log}");
        Ok(())
    })
    .unwrap();
}

/// Found out before anything is started: it costs no term.
#[test]
fn ports_in_use() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let admin = |text: String| listen_on(&text, "[admin]", &address);
    both_refuse(admin, &[&address, "admin.listen", "choose another port"]);
    let taken = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    scenario(synthetic(), |cluster| {
        let quic = |text: String| listen_on(&text, "[replication]", &address);
        cluster.is_refused("b", false, quic, &[&address, "replication.listen", "choose another port"])
    })
    .unwrap();
}

/// A configuration whose section has another `listen`.
fn listen_on(text: &str, section: &str, address: &str) -> String {
    let (head, tail) = text.split_once(&format!("{section}\nlisten = \"")).unwrap();
    let (_, tail) = tail.split_once('"').unwrap();
    format!("{head}{section}\nlisten = \"{address}\"{tail}")
}

#[test]
fn a_directory_in_use_and_one_of_another_vm() {
    scenario(synthetic(), |cluster| {
        cluster.start_secondary("b")?;
        cluster.start_primary("a", Some("b"))?;
        cluster.until_paired("a")?;
        for (node, primary) in [("a", true), ("b", false)] {
            cluster.is_refused(node, primary, |text| text, &["in use by another process", "end that one"])?;
        }
        for node in ["a", "b"] {
            cluster.kill(node)?;
        }
        let other = |text: String| text.replace("vm = \"demo\"", "vm = \"other\"");
        let wanted = &["demo", "other", "give each vm a directory of its own"];
        let before = files(&cluster.directory_of("b"))?;
        cluster.is_refused("b", false, other, wanted)?;
        ensure!(files(&cluster.directory_of("b"))? == before, "files were changed");
        Ok(())
    })
    .unwrap();
}

/// Name and length of every file below, but for logs and locks, which a mere look changes.
fn files(directory: &Path) -> anyhow::Result<Vec<(PathBuf, u64)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
        if path.is_dir() {
            found.extend(files(&path)?);
        } else if !name.contains("log") && !name.contains("lock") {
            let len = fs::metadata(&path)?.len();
            found.push((path, len));
        }
    }
    found.sort();
    Ok(found)
}

#[test]
fn a_damaged_register() {
    scenario(synthetic(), |cluster| {
        cluster.start_primary("a", None)?;
        cluster.until_solo("a")?;
        cluster.kill("a")?;
        let path = cluster.directory().join("arbiter/demo.register");
        let good = fs::read_to_string(&path)?;
        fs::write(&path, good.replace("term = 1", "term = 7"))?;
        let (_, mut command) = cluster.prepare("a", true, None)?;
        let output = command.output()?;
        let log = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(1), "{}: {log}", output.status);
        for part in ["demo.register", "damaged", "restore it from a backup"] {
            ensure!(log.contains(part), "it does not say {part:?}:\n{log}");
        }
        Ok(())
    })
    .unwrap();
}

/// The guest that was started here and crashed is not booted by itself.
#[test]
fn a_guest_that_crashed_here() {
    scenario(synthetic(), |cluster| {
        cluster.start_primary("a", None)?;
        cluster.until_solo("a")?;
        cluster.kill("a")?;
        cluster.is_refused("a", true, |text| text, &["solo on a", "on_crash = \"boot\""])?;
        let elsewhere = &["solo on a", "start colo-secondary here"];
        cluster.is_refused("c", true, |text| text, elsewhere)
    })
    .unwrap();
}

#[test]
fn a_runner_of_another_version() {
    scenario(synthetic(), |cluster| {
        cluster.start_secondary("b")?;
        cluster.until("b to answer", || Ok(cluster.status("b").map(drop)))?;
        let address = format!("http://{}", cluster.admin("b")?.address());
        let ask = |request: PairRequest| {
            let address = address.clone();
            cluster.runtime().block_on(async move {
                let channel = Endpoint::from_shared(address)?.connect().await?;
                let mut client = PairingClient::new(channel);
                anyhow::Ok(client.pair(request).await.err().context("it agreed")?)
            })
        };
        let request =
            PairRequest { protocol_min: 98, protocol_max: 99, vm: "demo".to_owned(), ..Default::default() };
        let answer = ask(request.clone())?;
        ensure!(answer.code() as i32 == 9, "{answer}");
        ensure!(answer.message().contains("protocol 98 to 99"), "{answer}");
        ensure!(answer.message().contains("run the same version of Colo on both"), "{answer}");
        let request = PairRequest { protocol_min: 1, state_version: 99, ..request };
        let answer = ask(request.clone())?;
        ensure!(answer.message().contains("version 99"), "{answer}");
        let answer = ask(PairRequest { vm: "web".to_owned(), ..request })?;
        ensure!(answer.message().contains("follows demo, not web"), "{answer}");
        // It is as good as before.
        cluster.start_primary("a", Some("b"))?;
        cluster.until_paired("a")
    })
    .unwrap();
}

/// The same on the replication link, for a runner that never asked.
#[test]
fn a_link_of_another_version() {
    scenario(synthetic(), |cluster| {
        cluster.start_secondary("b")?;
        cluster.start_primary("a", Some("b"))?;
        cluster.until_paired("a")?;
        let config = fs::read_to_string(cluster.directory().join("b.toml"))?;
        let (_, port) = config.split_once("[replication]\nlisten = \"127.0.0.1:").context("no listen")?;
        let port: u16 = port.split('"').next().context("no port")?.parse()?;
        let certificates = DevCerts::ensure(&cluster.directory().join("tls"))?;
        let tls = tls::client_config(&certificates.identity(tls::Role::Node)?)?;
        let answer = cluster.runtime().block_on(async {
            let endpoint = client_endpoint(tls, (Ipv4Addr::LOCALHOST, 0).into())?;
            let connection = endpoint.connect((Ipv4Addr::LOCALHOST, port).into(), tls::NODE_NAME)?.await?;
            let (mut say, mut hear) = connection.open_bi().await?;
            let vm: VmId = "demo".parse()?;
            let hello = Hello {
                versions: Versions { min: 98, max: 99 },
                node: "c".parse()?,
                incarnation: Incarnation::draw(),
                vm: vm.clone(),
                term: Term(1000),
                spec_digest: 0,
                purpose: Purpose::Seed,
            };
            write_control(&mut say, VmTag::of(&vm), &hello).await?;
            anyhow::Ok(read_control(&mut hear, VmTag::of(&vm), &PagePool::default()).await?)
        })?;
        let Control::Refused(refused) = answer else { anyhow::bail!("it was answered with {answer:?}") };
        ensure!(matches!(refused.reason, Refusal::Version { .. }), "{refused:?}");
        let text = refused.detail.as_str();
        ensure!(
            text.contains("versions 98 to 99") && text.contains("run the same version of Colo"),
            "{text}"
        );
        // The runner that it has is as good as before.
        cluster.until_released(5000)?;
        cluster.until_paired("a")
    })
    .unwrap();
}

/// Nodes with certificates of two authorities: the guest runs on, unprotected, and the status says why.
#[test]
fn a_certificate_of_another_authority() {
    scenario(synthetic(), |cluster| {
        let (_, mut command) = cluster.prepare("b", false, None)?;
        command.env("COLO_DEV_TLS", cluster.directory().join("tls-of-another"));
        cluster.start("b", command, false)?;
        cluster.start_primary("a", Some("b"))?;
        let error = cluster.until("an error", || Ok(error_of(cluster, "a")))?;
        ensure!(error.contains("certificate"), "{error}");
        ensure!(cluster.status("a").context("a does not answer")?.role() == Role::Alone, "it is not alone");
        cluster.until_released(1000)
    })
    .unwrap();
}

/// A spare that goes by another one's name is refused.
#[test]
fn two_spares_of_one_name() {
    scenario(synthetic(), |cluster| {
        cluster.start_spare("s")?;
        cluster.until("the spare to wait", || {
            let log = fs::read_to_string(cluster.directory().join("s.log"))?;
            Ok(log.contains("waiting as a spare").then_some(()))
        })?;
        let edit = |text: String| text.replace("node = \"t\"", "node = \"s\"").replace("vm = \"demo\"\n", "");
        cluster.is_refused("t", false, edit, &["is registered as s/@spare", "a name of its own"])
    })
    .unwrap();
}

/// A secondary that goes by its runner's name is told so, and the register stays as it is.
#[test]
fn two_nodes_of_one_name() {
    scenario(synthetic(), |cluster| {
        let (path, command) = cluster.prepare("b", false, None)?;
        let text = fs::read_to_string(&path)?;
        fs::write(&path, text.replace("node = \"b\"", "node = \"a\""))?;
        cluster.start("b", command, false)?;
        cluster.start_primary("a", Some("b"))?;
        let error = cluster.until("an error", || Ok(error_of(cluster, "a")))?;
        let before = cluster.register()?;
        ensure!(
            before.as_ref().is_some_and(|entry| entry.term.0 == 1),
            "the register has changed: {before:?}"
        );
        ensure!(
            error.contains("named a and so is the runner") && error.contains("a name of its own"),
            "{error}"
        );
        ensure!(cluster.status("a").context("a does not answer")?.role() == Role::Alone, "it is not alone");
        ensure!(cluster.register()? == before, "the register has changed");
        cluster.until_released(1000)
    })
    .unwrap();
}

fn error_of(cluster: &Cluster, node: &str) -> Option<String> {
    let error = cluster.status(node)?.last_error;
    (!error.is_empty() && !error.contains("no control plane answers")).then_some(error)
}

/// A secondary keeps the copy that it holds rather than take a guest of another description.
#[test]
fn a_guest_of_another_description() {
    let mut options = synthetic();
    options.ack = "disk";
    scenario(options, |cluster| {
        cluster.start_secondary("b")?;
        cluster.start_primary("a", Some("b"))?;
        cluster.until_paired("a")?;
        cluster.admin("a")?.pause_replication()?;
        cluster.until_solo("a")?;
        cluster.kill("a")?;
        cluster.kill("b")?;
        // Another cluster with a vm of the same name, whose secondary has this copy in its directory.
        fs::create_dir(cluster.directory().join("arbiter2"))?;
        let elsewhere = |path: &Path| -> anyhow::Result<()> {
            let text = fs::read_to_string(path)?.replace("\"arbiter\"", "\"arbiter2\"");
            Ok(fs::write(path, text.replace("memory_mib = 16", "memory_mib = 32"))?)
        };
        let (path, command) = cluster.prepare("b", false, None)?;
        elsewhere(&path)?;
        cluster.start("b", command, false)?;
        let (path, command) = cluster.prepare("c", true, Some("b"))?;
        elsewhere(&path)?;
        cluster.start("c", command, false)?;
        let error = cluster.until("an error", || Ok(error_of(cluster, "c")))?;
        ensure!(error.contains("with another description"), "{error}");
        ensure!(error.contains("remove") && error.contains("begin anew"), "{error}");
        ensure!(cluster.status("c").context("c does not answer")?.role() == Role::Alone, "it is not alone");
        Ok(())
    })
    .unwrap();
}

/// A small filesystem, unmounted on drop.
struct Small(PathBuf);

impl Small {
    fn mount(at: PathBuf, bytes: &str) -> Result<Self, String> {
        fs::create_dir_all(&at).map_err(|e| e.to_string())?;
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={bytes},mode=700"), "colo-test"])
            .arg(&at)
            .output()
            .map_err(|e| e.to_string())?;
        let why = String::from_utf8_lossy(&mounted.stderr).trim().to_owned();
        if mounted.status.success() {
            Ok(Self(at))
        } else {
            Err(format!("cannot mount a small tmpfs: {why}"))
        }
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// The guest goes on alone; once there is room again, the node that ran out of it is as good as before.
#[test]
fn a_full_disk_under_the_store() {
    let mut options = synthetic();
    options.ack = "disk";
    let mut small = None;
    scenario(options, |cluster| {
        match Small::mount(cluster.directory_of("b"), "24m") {
            Ok(mounted) => small = Some(mounted),
            Err(why) => {
                eprintln!("skipped: {why}");
                return Ok(());
            }
        }
        cluster.start_secondary("b")?;
        cluster.start_primary("a", Some("b"))?;
        cluster.until_paired("a")?;
        let ballast = cluster.directory_of("b").join("ballast");
        // Whatever is left.
        let _ = fs::write(&ballast, vec![1; 24 << 20]);
        cluster.until("the register to say that a runs alone", || {
            let value = cluster.register()?.map(|entry| entry.value);
            Ok(matches!(value, Some(Value::Solo { .. })).then_some(()))
        })?;
        cluster.until_released(5000)?;
        let log = cluster.process("b")?.log();
        let wanted = ["no space left on the device of the store in", "free some", "what was acked is safe"];
        for part in wanted {
            ensure!(log.contains(part), "it does not say {part:?}:\n{log}");
        }
        ensure!(!log.contains("panicked"), "it panicked:\n{log}");
        if cluster.process("b")?.status()?.is_none() {
            cluster.kill("b")?;
        }
        fs::remove_file(&ballast)?;
        cluster.start_secondary("b")?;
        cluster.until_paired("a")?;
        cluster.kill("a")?;
        cluster.until_solo("b")?;
        cluster.until_released(5000)?;
        cluster.ledger().check_chain(cluster.options.guest.seed)?;
        cluster.kill("b").map(drop)
    })
    .unwrap();
}
