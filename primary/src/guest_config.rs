//! From the configuration's `[guest]` to what the machine takes.

use colo_common::config::{ConsoleDevice, CpuModel as Model, GuestConfig, GuestKind as Kind, Tracker};
use colo_proto::v1;
use colo_vmm::spec::{DiskSpec, NetSpec, SpecError, VirtioSpec};
use colo_vmm::synthetic::{Program, SyntheticConfig};
use colo_vmm::{BootFile, BootSource, CpuModel, GuestKind, GuestSpec, TrackerKind};

/// The guest that a configuration describes, with this network card and disk; reads its boot files.
///
/// # Errors
/// A boot file cannot be read, or a number is out of its range.
pub fn describe(
    name: &str,
    config: &GuestConfig,
    (net, disk): (Option<NetSpec>, Option<DiskSpec>),
) -> Result<(GuestSpec, GuestKind), SpecError> {
    let (boot, kind) = match (config.kind, &config.kernel) {
        (Kind::Kvm, Some(kernel)) => {
            let kernel = BootFile::kernel(kernel)?;
            let modules =
                config.initrd.iter().map(|path| BootFile::module(path)).collect::<Result<_, _>>()?;
            let command_line = config.cmdline.clone();
            (BootSource::Kernel { kernel, modules, command_line }, GuestKind::Kvm)
        }
        // The configuration was checked: only a synthetic guest has no kernel.
        _ => {
            let image = BootFile { path: "synthetic".into(), bytes: Vec::new().into() };
            let program = Program { seed: config.seed, ..Program::default() };
            let synthetic = SyntheticConfig { program, ..SyntheticConfig::default() };
            (BootSource::Flat { image, address: 0 }, GuestKind::Synthetic(synthetic))
        }
    };
    // A guest in software has no devices that could be told from its program.
    let virtio = match kind {
        GuestKind::Kvm => VirtioSpec {
            net,
            disk,
            rng: config.rng,
            console: config.virtio_console,
            console_input: config.console_input == ConsoleDevice::Virtio,
            on_command_line: config.virtio_cmdline,
        },
        GuestKind::Synthetic(_) => VirtioSpec::default(),
    };
    let spec = GuestSpec {
        vcpus: config.vcpus,
        cpu_model: match config.cpu_model {
            Model::Host => CpuModel::Host,
            Model::X86_64V2 => CpuModel::X86_64V2,
            Model::X86_64V3 => CpuModel::X86_64V3,
        },
        tracker: match config.tracker {
            Tracker::Ring => TrackerKind::Ring { entries: config.ring_entries },
            Tracker::Bitmap => TrackerKind::Bitmap,
        },
        virtio_slots: config.virtio_slots,
        virtio,
        overcommit: config.overcommit,
        ..GuestSpec::new(name, config.memory_mib << 20, boot)
    };
    spec.validate()?;
    Ok((spec, kind))
}

/// A tracker as it travels.
pub fn tracker(kind: TrackerKind) -> v1::Tracker {
    let kind = match kind {
        TrackerKind::Ring { entries } => v1::tracker::Kind::RingEntries(entries),
        TrackerKind::Bitmap => v1::tracker::Kind::Bitmap(v1::tracker::Bitmap {}),
    };
    v1::Tracker { kind: Some(kind) }
}

/// The same for the control plane.
pub fn account(spec: &GuestSpec, kind: &GuestKind) -> v1::Guest {
    v1::Guest {
        hypervisor: kind.name().to_owned(),
        tracker: Some(tracker(spec.tracker)),
        memory_bytes: spec.memory_bytes,
        populated_bytes: 0,
        vcpus: spec.vcpus,
        running: false,
        cpu_model: match spec.cpu_model {
            CpuModel::Host => "host",
            CpuModel::X86_64V2 => "x86-64-v2",
            CpuModel::X86_64V3 => "x86-64-v3",
        }
        .to_owned(),
    }
}
