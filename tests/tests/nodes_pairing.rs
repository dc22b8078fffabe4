//! Nodes that do not fit each other do not pair: the runner's guest runs on unprotected and its status says what does not
//! match and what to do, the secondary keeps the copy that it holds, and once they fit they pair. What no two processes
//! on one host differ in is changed on its way between them.

use anyhow::{Context, ensure};
use colo_common::tls::{self, DevCerts};
use colo_common::{Incarnation, Term, VmId};
use colo_primary::quic::client_endpoint;
use colo_primary::wire::{read_control, write_control};
use colo_proto::frame::VmTag;
use colo_proto::message::{Control, Hello, Purpose, Refusal, Refused};
use colo_proto::v1::{PairRequest, Role};
use colo_proto::version::Versions;
use colo_tests::cluster::between::{Between, Change};
use colo_tests::cluster::config::{Guest, Options};
use colo_tests::cluster::{Cluster, scenario};
use colo_tests::images::{Images, Kernel, kvm_usable};
use colo_tests::seed::Seed;
use colo_vmm::arch::x86_64::cpuid::ENTRY_BYTES;
use colo_vmm::{GuestKind, PagePool, WireSpec};
use std::fs;
use std::net::Ipv4Addr;
use std::sync::Arc;

/// Under `disk`, so that the stored copy can be watched.
fn options(guest: Guest) -> Options {
    Options { ack: "disk", ..Options::new(guest) }
}

fn synthetic() -> Options {
    options(Guest::synthetic(Seed::new(1).below(1000)))
}

/// Starts b, and a to be protected by it through a go-between.
fn pair(cluster: &mut Cluster) -> anyhow::Result<Between> {
    cluster.start_secondary("b")?;
    let between = stand_before(cluster, "b")?;
    let (path, command) = cluster.prepare("a", true, Some("b"))?;
    let (direct, through) = (cluster.admin("b")?.address().to_string(), between.address.to_string());
    // By itself it would find b where the membership says, and not through the go-between.
    let by_hand = ("[replication]\n", "[replication]\nreprotect = \"manual\"\n");
    let text = fs::read_to_string(&path)?.replace(&direct, &through).replace(by_hand.0, by_hand.1);
    ensure!(text.contains(by_hand.1), "{text}");
    fs::write(&path, text)?;
    cluster.start("a", command, true)?;
    cluster.until_paired("a")?;
    Ok(between)
}

fn stand_before(cluster: &Cluster, node: &str) -> anyhow::Result<Between> {
    cluster.until("the secondary to answer", || Ok(cluster.status(node).map(drop)))?;
    Between::open(cluster.runtime().handle(), cluster.admin(node)?.address())
}

/// With each change a is refused by b, with all of the words; then they pair again.
fn are_refused(cluster: &Cluster, between: &Between, cases: &[(Change, &[&str])]) -> anyhow::Result<()> {
    cluster.admin("a")?.pause_replication()?;
    cluster.until_solo("a")?;
    let copy = || {
        let status = cluster.status("b").context("b does not answer")?;
        let persisted = status.points.and_then(|points| points.persisted);
        anyhow::Ok((status.replica, persisted.context("b has stored nothing")?))
    };
    cluster.until("b to have stored all that it has staged", || {
        let points = cluster.status("b").and_then(|status| status.points).unwrap_or_default();
        Ok((points.persisted == points.staged).then_some(()))
    })?;
    let before = copy()?;
    for (n, (change, wanted)) in cases.iter().enumerate() {
        between.change(Some(*change));
        if n == 0 {
            cluster.admin("a")?.resume_replication()?;
        }
        let error = cluster.until(&format!("a to say {wanted:?}"), || {
            let error = cluster.status("a").context("a does not answer")?.last_error;
            Ok(error.contains(wanted[0]).then_some(error))
        })?;
        for part in *wanted {
            ensure!(error.contains(part), "it does not say {part:?}: {error}");
        }
        ensure!(error.lines().count() == 1, "not one line: {error}");
        let role = cluster.status("a").context("a does not answer")?.role();
        ensure!(role == Role::Alone, "a is {role:?}");
        cluster.until_released(500)?;
        ensure!(copy()? == before, "the copy was changed by {wanted:?}");
    }
    between.change(None);
    cluster.until_paired("a")
}

#[test]
fn another_description_hypervisor_or_layout() {
    let cases: &[(Change, &[&str])] = &[
        (|r| r.spec_digest ^= 1, &["with another description", "remove", "begin anew"]),
        (
            |r| r.hypervisor = "xen".to_owned(),
            &["runs on \"xen\"", "described as one on synthetic", "use nodes"],
        ),
        (
            on_kvm,
            &["a copy of this vm as a guest on synthetic (seed", "runner's is one on kvm", "begin anew"],
        ),
        (
            |r| r.slots[0].frames += 1,
            &["memory slot 0", "4097 frames", "run the same version of Colo on both"],
        ),
        (|r| r.tracker = None, &["the guest's tracker is missing"]),
        (|r| r.state_version += 1, &["machine states have version", "run the same version of Colo on both"]),
        (|r| r.spec.truncate(9), &["description is malformed"]),
    ];
    scenario(synthetic(), |cluster| {
        let between = pair(cluster)?;
        are_refused(cluster, &between, cases)?;
        // As good as ever.
        cluster.kill("a")?;
        cluster.until_solo("b")?;
        cluster.until_released(5000)?;
        cluster.ledger().check_chain(cluster.options.guest.seed)?;
        cluster.kill("b").map(drop)
    })
    .unwrap();
}

/// The same guest as if it ran on KVM: its digest, which does not have this in it, is right.
fn on_kvm(request: &mut PairRequest) {
    let spec = WireSpec::decode(&request.spec).and_then(|spec| spec.complete(|_| Some(Arc::from([]))));
    let Ok(spec) = spec else { return };
    request.spec = WireSpec::new(&spec, GuestKind::Kvm).encode();
    request.hypervisor = "kvm".to_owned();
    if let Some(cpu) = &mut request.cpu {
        (cpu.cpuid, cpu.tsc_khz) = (vec![0; ENTRY_BYTES], 2_000_000);
    }
}

/// Sets a bit of leaf 1 that no processor has, and one that no guest is given.
fn bit_of_leaf_1(request: &mut PairRequest, bit: u32) {
    let Some(cpu) = &mut request.cpu else { return };
    for entry in cpu.cpuid.chunks_exact_mut(ENTRY_BYTES) {
        if entry[..8] == [1, 0, 0, 0, 0, 0, 0, 0] {
            // ECX follows leaf, subleaf, flags, EAX and EBX.
            entry[20 + bit as usize / 8] |= 1 << (bit % 8);
        }
    }
}

#[test]
fn another_processor() {
    if !kvm_usable() {
        return;
    }
    let cases: &[(Change, &[&str])] = &[
        (
            |r| bit_of_leaf_1(r, 16),
            &["leaf 0x1.0 ecx bits 0x00010000", "CPU model host", "choose a lower CPU model"],
        ),
        (|r| bit_of_leaf_1(r, 5), &["leaf 0x1.0 ecx bits 0x00000020 (VMX)", "no guest of Colo has"]),
        (|r| r.cpu.iter_mut().for_each(|cpu| cpu.tsc_khz *= 2), &["kHz", "use hosts of one rate"]),
        (
            |r| r.cpu.iter_mut().for_each(|cpu| cpu.tsc_moves = !cpu.tsc_moves),
            &["use hosts whose KVM is alike", "KVM_CAP_VCPU_ATTRIBUTES"],
        ),
        (
            |r| r.cpu.iter_mut().for_each(|cpu| cpu.cpuid.truncate(27)),
            &["a CPUID table of 27 bytes", "same version"],
        ),
        (|r| r.cpu = None, &["the guest's processor is missing", "same version"]),
        (|r| r.hypervisor = "synthetic".to_owned(), &["described as one on kvm", "use nodes"]),
    ];
    let images = Images::find().unwrap();
    let line = "lines=0 pages=64 touch=8 pattern=rand delay_us=20000";
    let guest = Guest::linux(&images, Kernel::Up, 7, line).unwrap();
    scenario(options(guest), |cluster| {
        let between = pair(cluster)?;
        are_refused(cluster, &between, cases)?;
        a_state_with_another_processor(cluster, &between)?;
        // A guest keeps its processor over a promotion.
        let at_first = between.last()?;
        cluster.kill("a")?;
        cluster.until_solo("b")?;
        cluster.start_secondary("c")?;
        let further = stand_before(cluster, "c")?;
        cluster.until("c to know the register", || {
            Ok(cluster.status("c").and_then(|status| status.register).map(drop))
        })?;
        cluster.admin("b")?.protect(further.address, false)?;
        cluster.until_paired("b")?;
        let later = further.last()?;
        ensure!(
            later.cpu.is_some() && later.cpu == at_first.cpu,
            "{:?} became {:?}",
            at_first.cpu,
            later.cpu
        );
        ensure!((later.spec_digest, later.slots) == (at_first.spec_digest, at_first.slots), "another guest");
        cluster.kill("b")?;
        cluster.kill("c").map(drop)
    })
    .unwrap();
}

/// Within what a host may differ in, pairing takes it; the states then show that it was not the truth.
fn a_state_with_another_processor(cluster: &Cluster, between: &Between) -> anyhow::Result<()> {
    cluster.admin("a")?.pause_replication()?;
    cluster.until_solo("a")?;
    between.change(Some(|r| r.cpu.iter_mut().for_each(|cpu| cpu.tsc_khz += 1)));
    cluster.admin("a")?.resume_replication()?;
    cluster.until("b to refuse the state", || {
        let status = cluster.status("b").context("b does not answer")?;
        Ok(status.last_error.contains("another processor than the nodes agreed on").then_some(()))
    })?;
    ensure!(cluster.status("a").is_some_and(|status| status.role() != Role::Paired), "a is paired");
    between.change(None);
    cluster.until_paired("a")
}

/// Says hello to b as if it were a runner; b must not take it.
fn hello(cluster: &Cluster, incarnation: Incarnation, spec_digest: u64) -> anyhow::Result<Refused> {
    let config = fs::read_to_string(cluster.directory().join("b.toml"))?;
    let (_, port) = config.split_once("[replication]\nlisten = \"127.0.0.1:").context("no listen")?;
    let port: u16 = port.split('"').next().context("no port")?.parse()?;
    let certificates = DevCerts::ensure(&cluster.directory().join("tls"))?;
    let tls = tls::client_config(&certificates.identity(tls::Role::Node)?)?;
    let vm: VmId = "demo".parse()?;
    let hello = Hello {
        versions: Versions::OURS,
        node: "c".parse()?,
        incarnation,
        vm: vm.clone(),
        // Over long ago: a link that is agreed on is refused for this.
        term: Term(0),
        spec_digest,
        purpose: Purpose::Seed,
    };
    let answer = cluster.runtime().block_on(async {
        let endpoint = client_endpoint(tls, (Ipv4Addr::LOCALHOST, 0).into())?;
        let connection = endpoint.connect((Ipv4Addr::LOCALHOST, port).into(), tls::NODE_NAME)?.await?;
        let (mut say, mut hear) = connection.open_bi().await?;
        write_control(&mut say, VmTag::of(&vm), &hello).await?;
        anyhow::Ok(read_control(&mut hear, VmTag::of(&vm), &PagePool::default()).await?)
    })?;
    let Control::Refused(refused) = answer else { anyhow::bail!("it was answered with {answer:?}") };
    Ok(refused)
}

/// An agreement is of one process and one description; nobody else's counts.
#[test]
fn a_link_that_was_not_agreed_on() {
    scenario(synthetic(), |cluster| {
        let between = pair(cluster)?;
        let asked = between.last()?;
        let (digest, stranger) = (asked.spec_digest, Incarnation::draw());
        let is_refused = |incarnation, digest, words: &str| {
            let refused = hello(cluster, incarnation, digest)?;
            ensure!(refused.reason == Refusal::NotPaired, "{refused:?}");
            ensure!(refused.detail.as_str().contains(words), "{refused:?}");
            anyhow::Ok(())
        };
        let ask = |request: PairRequest| {
            let answer = async { between.client().await?.pair(request).await };
            cluster.runtime().block_on(answer)
        };
        is_refused(stranger, digest, "this process of c has not agreed on the guest: pair first")?;
        // The runner's own agreement, with another description.
        let runner = Incarnation(u128::from_be_bytes(asked.incarnation.as_slice().try_into()?));
        is_refused(runner, digest ^ 1, "what was agreed on is")?;
        let same = PairRequest { incarnation: stranger.0.to_be_bytes().to_vec(), ..asked };
        let other = PairRequest { spec_digest: digest ^ 1, ..same.clone() };
        ensure!(ask(other.clone()).is_err(), "it agreed on another guest");
        is_refused(stranger, digest, "has not agreed")?;
        ask(same)?;
        is_refused(stranger, digest ^ 1, "what was agreed on is")?;
        let refused = hello(cluster, stranger, digest)?;
        ensure!(matches!(refused.reason, Refusal::Fenced { .. }), "{refused:?}");
        // A refusal ends an agreement.
        ensure!(ask(other).is_err(), "it agreed on another guest");
        is_refused(stranger, digest, "has not agreed")?;
        cluster.until_released(5000)?;
        cluster.until_paired("a")
    })
    .unwrap();
}
