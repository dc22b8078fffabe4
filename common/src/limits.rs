//! Every bound in one place, with the reason beside it. A length that a peer, a file or a guest names is
//! compared with one of these before anything is allocated for it.

use crate::ids::PAGE_SIZE;

/// vCPUs of one guest. vSphere FT stops at 8; the irqchip and the MP table would carry 255.
pub const MAX_VCPUS: u32 = 64;

/// Bytes of guest memory: the size up to which cuts are shown to cost the same as for a small guest.
pub const MAX_GUEST_MEMORY: u64 = 1 << 40;

/// Smallest guest memory in bytes: below it no kernel finds room for itself.
pub const MIN_GUEST_MEMORY: u64 = 1 << 20;

/// Bytes of one KVM memory slot. Bounds the buffer that reads a slot's dirty bitmap (2 MiB).
pub const MAX_SLOT_BYTES: u64 = 64 << 30;

/// Entries of a vCPU's dirty ring that KVM accepts at most.
pub const MAX_RING_ENTRIES: u32 = 65_536;

/// Bytes of one encoded machine state: 64 vCPUs of some 16 KiB, the device queues to come, and room.
pub const MAX_MACHINE_STATE: usize = 64 << 20;

/// MSRs kept per vCPU; hosts list between 40 and 150.
pub const MAX_MSRS: usize = 512;

/// CPUID entries of a model; KVM itself stops at 256.
pub const MAX_CPUID_ENTRIES: usize = 256;

/// Bytes of one vCPU's XSAVE area: AMX brings it to 11 KiB, APX above it; never near this.
pub const MAX_XSAVE: usize = 64 << 10;

/// Console bytes held in one epoch before the vCPU that writes them has to wait for the cut.
pub const MAX_EPOCH_CONSOLE: usize = 1 << 20;

/// Frames held in one epoch before the sender has to wait for the cut.
pub const MAX_EPOCH_FRAMES: usize = 4096;

/// Bytes of those frames: with what was held before, they fit the smallest epoch that a secondary may ask for.
pub const MAX_EPOCH_FRAME_BYTES: usize = 4 << 20;

/// Bytes of one frame: the largest segment that offloads hand over (64 KiB) and its headers.
pub const MAX_FRAME: usize = (64 << 10) + 256;

/// Bytes of output, over epochs, that a runner holds before its guest has to wait: with one epoch more and a machine
/// state they are stored as one value.
pub const MAX_HELD_OUTPUT: usize = 16 << 20;

/// Bytes of a guest's disk: what a block number and two levels of block sets carry without thought.
pub const MAX_DISK_BYTES: u64 = 16 << 40;

/// Bytes of disk writes that an epoch collects, and again that may be under way, before the guest's next write has to
/// wait for the cut.
pub const MAX_EPOCH_DISK: usize = 4 << 20;

/// Bytes to read or to write of one request to a disk.
pub const MAX_DISK_REQUEST: usize = 1 << 20;

/// MiB of an epoch that every secondary takes, and that a primary may be held to: room for what the guest's disk brings
/// beside pages.
pub const MIN_EPOCH_MIB: u32 = 16;

/// Pages or blocks whose digests one request may ask for: 256 MiB, which whoever answers reads at one go, and for which
/// the answer has at most 1 MiB.
pub const MAX_DIGESTS_ASKED: u64 = 1 << 16;

/// Console input bytes waiting for the guest to read them.
pub const MAX_CONSOLE_INPUT: usize = 64 << 10;

/// Bytes of a guest's name; those of a file's name.
pub const MAX_GUEST_NAME: usize = 255;

/// Bytes of a kernel image file.
pub const MAX_KERNEL_IMAGE: u64 = 512 << 20;

/// Bytes of an initramfs or a multiboot module.
pub const MAX_BOOT_MODULE: u64 = 2 << 30;

/// Bytes of a kernel command line with its end; what the x86 Linux boot protocol carries.
pub const MAX_COMMAND_LINE: usize = 2048;

/// Terms of a vm that are remembered: each is a failover or a change of protection.
pub const MAX_HISTORY: usize = 4096;

const _: () = assert!(MAX_SLOT_BYTES.is_multiple_of(PAGE_SIZE as u64));
const _: () = assert!(MAX_GUEST_MEMORY / MAX_SLOT_BYTES < 32_000);
const _: () = assert!(MAX_MACHINE_STATE > MAX_VCPUS as usize * (MAX_XSAVE + MAX_MSRS * 16));
const _: () = assert!(
    MAX_HELD_OUTPUT + MAX_EPOCH_CONSOLE + MAX_EPOCH_FRAME_BYTES + MAX_FRAME <= MAX_MACHINE_STATE * 3 / 4
);
