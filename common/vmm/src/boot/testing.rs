//! Small images for the tests of the loaders: valid ones, made field by field so that tests can break any of
//! them.

use std::path::PathBuf;

use super::{BootError, Entry, load};
use crate::memory::GuestMemory;
use crate::spec::{BootFile, BootSource, GuestSpec};

/// Magic, no required feature, checksum.
pub(super) const MULTIBOOT_HEADER: [u8; 12] = multiboot_header(0);

/// A multiboot header that demands `flags`.
pub(super) const fn multiboot_header(flags: u32) -> [u8; 12] {
    const MAGIC: u32 = 0x1bad_b002;
    let (magic, sum) = (MAGIC.to_le_bytes(), 0_u32.wrapping_sub(MAGIC).wrapping_sub(flags).to_le_bytes());
    let flags = flags.to_le_bytes();
    [
        magic[0], magic[1], magic[2], magic[3], flags[0], flags[1], flags[2], flags[3], sum[0], sum[1],
        sum[2], sum[3],
    ]
}

/// `mib` MiB of guest memory.
pub(super) fn memory(mib: u64) -> GuestMemory {
    GuestMemory::new(mib << 20).unwrap()
}

pub(super) fn file(bytes: Vec<u8>) -> BootFile {
    BootFile { path: PathBuf::from("/boot/image"), bytes: bytes.into() }
}

/// A kernel with modules that are named `mod0`, `mod1`...
pub(super) fn kernel(image: Vec<u8>, modules: &[&[u8]]) -> BootSource {
    let module = |(number, bytes): (usize, &&[u8])| BootFile {
        path: format!("/boot/mod{number}").into(),
        bytes: bytes.to_vec().into(),
    };
    BootSource::Kernel {
        kernel: file(image),
        modules: modules.iter().enumerate().map(module).collect(),
        command_line: "console=ttyS0".to_owned(),
    }
}

/// Loads `source` into `memory` for a guest of two vCPUs.
pub(super) fn boot(memory: &GuestMemory, source: BootSource) -> Result<Entry, BootError> {
    let mut spec = GuestSpec::new("test", memory.layout().bytes(), source);
    spec.vcpus = 2;
    load(memory.ram(), memory.layout(), &spec)
}

pub(super) fn write_u32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// A program header and the bytes of its segment.
#[derive(Clone)]
pub(super) struct Part {
    pub(super) address: u64,
    pub(super) virtual_address: u64,
    pub(super) bytes: Vec<u8>,
    pub(super) memory_bytes: u64,
}

/// An ELF file to be.
#[derive(Clone)]
pub(super) struct Elf {
    /// 64-bit.
    pub(super) wide: bool,
    pub(super) entry: u64,
    pub(super) parts: Vec<Part>,
}

impl Elf {
    /// A vmlinux: text at 1 MiB, then data with zeroes after it.
    pub(super) fn linux() -> Self {
        let text = Part {
            address: 1 << 20,
            virtual_address: 0xffff_ffff_8010_0000,
            bytes: vec![0x90; 0x1000],
            memory_bytes: 0x1000,
        };
        let data = Part {
            address: 0x10_1000,
            virtual_address: 0xffff_ffff_8010_1000,
            bytes: vec![0xda; 0x800],
            memory_bytes: 0x2000,
        };
        Self { wide: true, entry: 1 << 20, parts: vec![text, data] }
    }

    /// A 32-bit multiboot kernel at 1 MiB, entered behind its header.
    pub(super) fn multiboot() -> Self {
        let mut bytes = MULTIBOOT_HEADER.to_vec();
        bytes.extend([0xf4; 0x200]);
        let part = Part { address: 1 << 20, virtual_address: 1 << 20, bytes, memory_bytes: 0x3000 };
        Self { wide: false, entry: 0x10_000c, parts: vec![part] }
    }

    pub(super) fn build(&self) -> Vec<u8> {
        let (class, machine, header, entry) = if self.wide { (2, 62, 64, 56) } else { (1, 3, 52, 32) };
        let mut image = vec![0x7f, b'E', b'L', b'F', class, 1, 1];
        image.resize(16, 0);
        image.extend([2, 0, machine, 0, 1, 0, 0, 0]);
        self.put(&mut image, self.entry);
        self.put(&mut image, header);
        self.put(&mut image, 0);
        image.extend([0; 4]);
        image.extend([header as u8, 0, entry, 0, self.parts.len() as u8, 0, 0, 0, 0, 0, 0, 0]);
        let mut offset = header + u64::from(entry) * self.parts.len() as u64;
        for part in &self.parts {
            let (file_bytes, flags) = (part.bytes.len() as u64, 7_u32.to_le_bytes());
            image.extend(1_u32.to_le_bytes());
            if self.wide {
                image.extend(flags);
            }
            for value in [offset, part.virtual_address, part.address, file_bytes, part.memory_bytes] {
                self.put(&mut image, value);
            }
            if !self.wide {
                image.extend(flags);
            }
            self.put(&mut image, 0);
            offset += file_bytes;
        }
        for part in &self.parts {
            image.extend(&part.bytes);
        }
        image
    }

    fn put(&self, image: &mut Vec<u8>, value: u64) {
        let bytes = value.to_le_bytes();
        image.extend(if self.wide { &bytes[..] } else { &bytes[..4] });
    }
}

/// A multiboot kernel without ELF: 256 bytes at 1 MiB, then zeroes up to 8 KiB, entered at its header's end.
pub(super) fn kludge() -> Vec<u8> {
    let mut image = vec![0xee; 64];
    image.extend(multiboot_header(1 << 16 | 3));
    for field in [0x10_0010_u32, 0x10_0000, 0x10_0100, 0x10_2000, 0x10_0030] {
        image.extend(field.to_le_bytes());
    }
    image.resize(0x200, 0x90);
    image
}

/// A bzImage of 0x3000 bytes of code that unpacks itself to 2 MiB.
pub(super) fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 0x400];
    image[0x1f1] = 1; // setup sectors, besides the first
    image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    image[0x200..0x202].copy_from_slice(&[0xeb, 0x66]); // jump over the header, which ends at 0x268
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
    image[0x211] = 1; // loaded high
    write_u32(&mut image, 0x214, 0x10_0000); // code32_start
    write_u32(&mut image, 0x22c, 0x7f_ffff); // initrd_addr_max
    write_u32(&mut image, 0x230, 0x20_0000); // kernel_alignment
    image[0x234] = 1; // relocatable
    image[0x236] = 1; // XLF_KERNEL_64
    write_u32(&mut image, 0x238, 255); // cmdline_size
    write_u32(&mut image, 0x258, 0x20_0000); // pref_address
    write_u32(&mut image, 0x260, 0x30_0000); // init_size
    write_u32(&mut image, 0x268, 0xffff_ffff); // behind the header: code
    image.resize(0x3400, 0xcc);
    image
}
