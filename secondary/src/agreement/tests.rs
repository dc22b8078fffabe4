//! Every way in which two nodes can differ, and what a peer's bytes can do.

use colo_primary::guest_config::tracker;
use colo_proto::v1;
use colo_proto::version::Versions;
use colo_vmm::arch::x86_64::cpuid::ENTRY_BYTES;
use colo_vmm::memory::MemoryLayout;
use colo_vmm::state::STATE_VERSION;
use colo_vmm::synthetic::SyntheticConfig;
use colo_vmm::{BootFile, BootSource, GuestKind, GuestSpec, WireSpec};
use proptest::prelude::{any, proptest};
use proptest::sample::Index;

use super::{Disagreement, read};

/// What a runner of this build sends.
fn request(kind: GuestKind) -> v1::PairRequest {
    let image = BootFile { path: "image".into(), bytes: [0xf4].into() };
    let spec = GuestSpec::new("demo", 5 << 30, BootSource::Flat { image, address: 1 << 20 });
    let kvm = kind == GuestKind::Kvm;
    let slots = MemoryLayout::new(spec.memory_bytes);
    let slots = slots.slots().iter();
    v1::PairRequest {
        protocol_min: Versions::OURS.min.into(),
        protocol_max: Versions::OURS.max.into(),
        vm: "demo".to_owned(),
        node: "a".to_owned(),
        incarnation: vec![7; 16],
        term: 3,
        admin_address: "127.0.0.1:7700".to_owned(),
        spec_digest: spec.digest(),
        cpu: Some(v1::CpuModel {
            name: "host".to_owned(),
            cpuid: if kvm { vec![1; 2 * ENTRY_BYTES] } else { Vec::new() },
            tsc_khz: if kvm { 2_000_000 } else { 0 },
            tsc_moves: kvm,
            host: "A processor\nof some kind".to_owned(),
        }),
        slots: slots
            .map(|slot| v1::MemorySlot { id: slot.id, first_gfn: slot.first.0, frames: slot.frames })
            .collect(),
        tracker: Some(tracker(spec.tracker)),
        hypervisor: kind.name().to_owned(),
        state_version: STATE_VERSION,
        spec: WireSpec::new(&spec, kind).encode(),
    }
}

fn synthetic() -> GuestKind {
    GuestKind::Synthetic(SyntheticConfig::default())
}

fn cpu(request: &mut v1::PairRequest) -> &mut v1::CpuModel {
    request.cpu.get_or_insert_default()
}

#[test]
fn what_this_build_sends_is_taken() {
    for kind in [GuestKind::Kvm, synthetic()] {
        let sent = request(kind.clone());
        let taken = read(sent.clone()).unwrap();
        assert_eq!(taken.spec.kind, kind);
        assert_eq!((taken.node.as_str(), taken.incarnation.0), ("a", u128::from_be_bytes([7; 16])));
        assert_eq!((taken.digest, taken.host.as_str()), (sent.spec_digest, "A processorof some kind"));
        match taken.cpu {
            Some(cpu) => assert_eq!((cpu.tsc_khz, cpu.tsc_moves), (2_000_000, true)),
            None => assert_ne!(kind, GuestKind::Kvm),
        }
    }
}

type Change = fn(&mut v1::PairRequest);

/// Each is one line that names what differs, and a remedy.
#[test]
fn what_differs_is_named() {
    let both: [(Change, &str, &str); 9] = [
        (|r| (r.protocol_min, r.protocol_max) = (98, 99), "protocol 98 to 99", "run the same version"),
        (|r| r.state_version = 99, "version 99", "run the same version"),
        (|r| r.hypervisor = "xen".to_owned(), "runs on \"xen\"", "use nodes that both run it on"),
        (|r| r.slots[1].frames += 1, "memory slot 1", "run the same version"),
        (|r| r.slots.truncate(1), "memory slot 1 of the runner's guest is none", "run the same version"),
        (|r| r.slots.push(v1::MemorySlot::default()), "memory slot 2", "here it would be none"),
        (|r| cpu(r).name = "x\n".repeat(999), "CPU model \"xxx", "run the same version"),
        (|r| r.tracker = Some(tracker(colo_vmm::TrackerKind::Bitmap)), "by a bitmap", "rings of 65536"),
        (|r| r.tracker = Some(v1::Tracker::default()), "by nothing that is known", "run the same version"),
    ];
    let kvm: [(Change, &str, &str); 2] = [
        (
            |r| r.cpu = Some(v1::CpuModel { name: "host".to_owned(), ..Default::default() }),
            "on KVM and has no processor",
            "run the same version",
        ),
        (|r| r.hypervisor = "synthetic".to_owned(), "described as one on kvm", "use nodes"),
    ];
    let software: [(Change, &str, &str); 2] = [
        (|r| cpu(r).tsc_khz = 1, "in software and has a processor", "run the same version"),
        (|r| cpu(r).cpuid = vec![0; ENTRY_BYTES], "in software and has a processor", "run the same version"),
    ];
    let cases = both.iter().flat_map(|case| [(GuestKind::Kvm, case), (synthetic(), case)]);
    let cases = cases.chain(kvm.iter().map(|case| (GuestKind::Kvm, case)));
    for (kind, (change, what, remedy)) in cases.chain(software.iter().map(|case| (synthetic(), case))) {
        let mut changed = request(kind);
        change(&mut changed);
        let error = read(changed).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(what) && text.contains(remedy), "{what}: {text}");
        assert!(!error.is_malformed() && text.len() < 400 && !text.contains('\n'), "{text}");
    }
}

#[test]
fn what_cannot_be_read_is_malformed() {
    let changes: [Change; 9] = [
        |r| r.spec = vec![0xff; 20],
        |r| r.spec.push(0),
        |r| r.node = "/etc".to_owned(),
        |r| r.incarnation.truncate(15),
        |r| r.cpu = None,
        |r| r.tracker = None,
        |r| cpu(r).cpuid.truncate(ENTRY_BYTES - 1),
        |r| cpu(r).cpuid = vec![1; ENTRY_BYTES * 257],
        |r| cpu(r).cpuid = Vec::new(),
    ];
    for (n, change) in changes.into_iter().enumerate() {
        let mut changed = request(GuestKind::Kvm);
        change(&mut changed);
        let error: Disagreement = read(changed).unwrap_err();
        assert!(error.is_malformed(), "{n}: {error}");
    }
}

proptest! {
    #[test]
    fn no_bytes_of_a_peer_panic(
        cpuid in proptest::collection::vec(any::<u8>(), 0..300),
        changes in proptest::collection::vec((any::<Index>(), any::<u8>()), 0..4),
        (id, first_gfn, frames) in any::<(u32, u64, u64)>(),
        (tsc_khz, tsc_moves, exact, kvm) in any::<(u32, bool, bool, bool)>(),
        host in any::<String>(),
    ) {
        let mut changed = request(if kvm { GuestKind::Kvm } else { synthetic() });
        for (at, value) in changes {
            let at = at.index(changed.spec.len());
            changed.spec[at] = value;
        }
        let len = if exact { cpuid.len() / ENTRY_BYTES * ENTRY_BYTES } else { cpuid.len() };
        let name = cpu(&mut changed).name.clone();
        changed.cpu = Some(v1::CpuModel { name, cpuid: cpuid[..len].to_vec(), tsc_khz, tsc_moves, host });
        if !exact {
            changed.slots[0] = v1::MemorySlot { id, first_gfn, frames };
        }
        if let Ok(taken) = read(changed) {
            assert!(taken.host.chars().count() <= 80);
            if let Some(cpu) = taken.cpu {
                assert_eq!(cpu.cpuid.encode(), &cpuid[..len]);
            }
        }
    }
}
