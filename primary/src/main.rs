//! `colo-primary`: runs a guest on this terminal, or says what this host's KVM can do.

use anyhow::{Context, bail};
use clap::{Parser, Subcommand, ValueEnum};
use colo_common::config::{DiskConfig, LogConfig, NetworkConfig};
use colo_common::{Mac, VmId, telemetry};
use colo_primary::backends;
use colo_primary::outlet::Network;
use colo_primary::terminal::{self, End};
use colo_vmm::host::Host;
use colo_vmm::spec::VirtioSpec;
use colo_vmm::tracker::Cadence;
use colo_vmm::{
    BootFile, BootSource, CpuModel, GuestMemory, GuestSpec, KvmGuest, ProtectedGuest, TrackerKind, admission,
};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;

/// Exit status when a test guest ended itself with a value other than 0. The value itself is logged: as a status it
/// could be taken for one of Colo's own (1, 2, 86, 101, and 128 and above).
const DEBUG_EXIT_STATUS: u8 = 3;

#[derive(Parser)]
#[command(name = "colo-primary", version, about = "Runs a guest that Colo can protect")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Boots a guest on this terminal, without protection; Ctrl-] ends it.
    ///
    /// Ends with status 0 when the guest powers off, 1 on an error, 2 on wrong arguments, 3 when a test guest ends
    /// itself by isa-debug-exit with a value other than 0 (which is logged), 86 when the host cannot give guest memory.
    Run(Run),
    /// Starts a guest that can be protected, by a configuration file.
    Start(Start),
    /// Says what this host's KVM can do for Colo.
    Host,
    /// Lists the audit trail of a primary that does not run, oldest first; of one that runs, `coloctl audit` does.
    Audit {
        /// Configuration file (TOML).
        #[arg(long)]
        config: PathBuf,
        /// Only so many entries, the newest.
        #[arg(long, value_name = "ENTRIES")]
        last: Option<u64>,
    },
}

#[derive(clap::Args)]
struct Start {
    /// Configuration file (TOML).
    #[arg(long)]
    config: PathBuf,
    /// Start a vm again that was stopped.
    #[arg(long)]
    again: bool,
}

#[derive(clap::Args)]
struct Run {
    /// Kernel: ELF vmlinux, bzImage or multiboot-1.
    #[arg(long)]
    kernel: PathBuf,
    /// initramfs, or a multiboot module; may be given several times for multiboot.
    #[arg(long = "initrd")]
    modules: Vec<PathBuf>,
    /// Kernel command line.
    #[arg(long, default_value = "console=ttyS0 reboot=t panic=-1")]
    cmdline: String,
    /// Guest memory in MiB.
    #[arg(long, default_value_t = 256)]
    memory: u64,
    /// Number of vCPUs.
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// CPU that the guest sees.
    #[arg(long, value_enum, default_value_t = Model::Host)]
    cpu_model: Model,
    /// How writes are tracked once the guest is protected.
    #[arg(long, value_enum, default_value_t = Tracker::Ring)]
    tracker: Tracker,
    /// Entries of each vCPU's dirty ring.
    #[arg(long, default_value_t = 65_536)]
    ring_entries: u32,
    /// Load the kernel file as raw bytes to this address and enter it there.
    #[arg(long, value_parser = address)]
    flat: Option<u64>,
    /// Allow more guest memory than the host has available.
    #[arg(long)]
    overcommit: bool,
    /// Give the guest a network card on this TAP interface.
    #[arg(long)]
    tap: Option<String>,
    /// Address of that card.
    #[arg(long, requires = "tap")]
    mac: Option<Mac>,
    /// Give the guest a disk: a raw image file.
    #[arg(long)]
    disk: Option<PathBuf>,
    /// Let the guest only read it.
    #[arg(long, requires = "disk")]
    read_only: bool,
    /// Give the guest a virtio console (hvc0) beside the serial one.
    #[arg(long)]
    virtio_console: bool,
    /// Name the guest's virtio devices on its kernel's command line, for a Linux without ACPI.
    #[arg(long)]
    virtio_cmdline: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Model {
    Host,
    X86_64V2,
    X86_64V3,
}

#[derive(Clone, Copy, ValueEnum)]
enum Tracker {
    Ring,
    Bitmap,
}

fn main() -> ExitCode {
    telemetry::end_on_panic();
    let done = match Args::parse().command {
        Command::Run(run) => {
            telemetry::init(&LogConfig::default());
            run.run()
        }
        Command::Start(start) => colo_primary::primary::start(&start.config, start.again),
        Command::Host => {
            telemetry::init(&LogConfig::default());
            host()
        }
        Command::Audit { config, last } => {
            telemetry::init(&LogConfig::default());
            colo_primary::primary::audit(&config, last)
        }
    };
    done.unwrap_or_else(|e| {
        // One that was refused with its configuration has not begun to log.
        telemetry::init(&LogConfig::default());
        tracing::error!("{}", telemetry::one_line(&*e));
        ExitCode::FAILURE
    })
}

impl Run {
    fn run(self) -> anyhow::Result<ExitCode> {
        let vm = VmId::from_str("run").expect("a name");
        let network = self.tap.clone().map(|tap| NetworkConfig { tap, mac: self.mac });
        let disk = self.disk.clone().map(|path| {
            let (read_only, serial) = (self.read_only, None);
            DiskConfig { path, read_only, serial }
        });
        let opened = backends::open(&vm, network.as_ref(), disk.as_ref())?;
        let spec = self.spec(VirtioSpec {
            net: opened.net,
            disk: opened.disk,
            rng: true,
            console: self.virtio_console,
            console_input: false,
            on_command_line: self.virtio_cmdline,
        })?;
        spec.validate()?;
        admission::check(&spec)?;
        let memory = Arc::new(GuestMemory::new(spec.memory_bytes)?);
        let network = opened.net.zip(opened.backends.tap.clone());
        let network = network.map(|(net, tap)| Network::new(tap, net.mac, []));
        let mut guest = KvmGuest::on(spec, memory, &opened.backends, Cadence::default())?;
        guest.boot()?;
        match terminal::run(&mut guest, network)? {
            End::Off => Ok(ExitCode::SUCCESS),
            End::DebugExit(value) => {
                tracing::info!(value, "the guest ended itself by isa-debug-exit");
                Ok(if value == 0 { ExitCode::SUCCESS } else { ExitCode::from(DEBUG_EXIT_STATUS) })
            }
        }
    }

    fn spec(&self, virtio: VirtioSpec) -> anyhow::Result<GuestSpec> {
        let kernel = BootFile::kernel(&self.kernel)?;
        let boot = match self.flat {
            Some(_) if !self.modules.is_empty() => bail!("a flat image takes no --initrd: leave it out"),
            Some(address) => BootSource::Flat { image: kernel, address },
            None => {
                let modules =
                    self.modules.iter().map(|path| BootFile::module(path)).collect::<Result<_, _>>()?;
                BootSource::Kernel { kernel, modules, command_line: self.cmdline.clone() }
            }
        };
        let name = guest_name(&self.kernel);
        let bytes = self
            .memory
            .checked_mul(1 << 20)
            .context("--memory is too large: a guest has at most 1048576 MiB")?;
        let tracker = match self.tracker {
            Tracker::Ring => TrackerKind::Ring { entries: self.ring_entries },
            Tracker::Bitmap => TrackerKind::Bitmap,
        };
        let cpu_model = match self.cpu_model {
            Model::Host => CpuModel::Host,
            Model::X86_64V2 => CpuModel::X86_64V2,
            Model::X86_64V3 => CpuModel::X86_64V3,
        };
        let overcommit = self.overcommit;
        Ok(GuestSpec {
            vcpus: self.cpus,
            cpu_model,
            tracker,
            overcommit,
            virtio,
            ..GuestSpec::new(&name, bytes, boot)
        })
    }
}

/// After its kernel's file, as far as a name can say it.
fn guest_name(kernel: &Path) -> String {
    let stem = kernel.file_stem().unwrap_or_default().to_string_lossy();
    let name: String = stem.chars().filter(|c| !c.is_control()).take(40).collect();
    if name.is_empty() { "guest".to_owned() } else { name }
}

fn host() -> anyhow::Result<ExitCode> {
    let host = Host::open()?;
    let answer = format!(
        "hypervisor    {}\ndirty rings   {} entries per vCPU at most\nvCPUs         {} per guest at most\nTSC rate      {}\n",
        host.virtualisation(),
        host.ring_entries(),
        host.kvm().get_max_vcpus(),
        if host.scales_tsc() { "can be scaled" } else { "fixed" },
    );
    let mut out = std::io::stdout().lock();
    let written = out.write_all(answer.as_bytes()).and_then(|()| out.flush());
    written.context("cannot write the answer to standard output; is its disk full?")?;
    Ok(ExitCode::SUCCESS)
}

fn address(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map_err(|e| format!("{e}; give a guest-physical address such as 0x100000"))
}
