//! ELF executables, 32-bit and 64-bit, as far as loading a kernel needs them: entry and loadable segments,
//! checked against the file so that whoever uses them need not check again.

use linux_loader::elf::{
    EI_CLASS, EI_DATA, ELFCLASS32, ELFCLASS64, ELFDATA2LSB, ELFMAG0, ELFMAG1, ELFMAG2, ELFMAG3, EM_X86_64,
    PT_LOAD,
};

use super::{BootError, Target, u16_at, u32_at, u64_at};
use crate::spec::BootFile;

/// A loadable segment. Its bytes lie inside the file, its addresses do not overflow, and it has at least as
/// many bytes in memory as in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// Guest-physical address.
    pub(super) address: u64,
    /// Address that the linker gave it.
    pub(super) virtual_address: u64,
    /// Offset of its bytes in the file.
    pub(super) offset: usize,
    /// Bytes in the file.
    pub(super) file_bytes: usize,
    /// Bytes in memory; what the file does not have is zero.
    pub(super) memory_bytes: u64,
}

impl Segment {
    /// First guest-physical address after it.
    pub(super) fn end(&self) -> u64 {
        self.address + self.memory_bytes
    }

    /// Writes its bytes and its zeroes.
    ///
    /// # Errors
    /// It is not inside RAM.
    pub(super) fn write(&self, target: &Target<'_>, file: &[u8]) -> Result<(), BootError> {
        let bytes = &file[self.offset..self.offset + self.file_bytes];
        target.write("a kernel segment", bytes, self.address)?;
        self.write_zeroes(target)
    }

    /// Writes its zeroes alone.
    ///
    /// # Errors
    /// It is not inside RAM.
    pub(super) fn write_zeroes(&self, target: &Target<'_>) -> Result<(), BootError> {
        let file_bytes = self.file_bytes as u64;
        target.zero(self.address + file_bytes, self.memory_bytes - file_bytes)
    }
}

/// What an ELF file says about its loading.
#[derive(Debug)]
pub(super) struct Image {
    /// Entry as the header has it: physical for Linux, mostly virtual elsewhere.
    pub(super) entry: u64,
    /// Segments with memory, ascending by guest-physical address, none overlapping another, never empty.
    pub(super) segments: Vec<Segment>,
}

impl Image {
    /// First guest-physical address after the last segment.
    pub(super) fn end(&self) -> u64 {
        self.segments.last().map_or(0, Segment::end)
    }

    /// Whether a segment holds the guest-physical `address`.
    pub(super) fn contains(&self, address: u64) -> bool {
        self.segments.iter().any(|s| (s.address..s.end()).contains(&address))
    }

    /// The entry as a guest-physical address: kernels that are linked high name a virtual one. Nothing if it
    /// is in no segment.
    pub(super) fn physical_entry(&self) -> Option<u64> {
        let holds = |s: &&Segment| {
            self.entry.checked_sub(s.virtual_address).is_some_and(|offset| offset < s.memory_bytes)
        };
        match self.segments.iter().find(holds) {
            Some(segment) => Some(segment.address + (self.entry - segment.virtual_address)),
            None => self.contains(self.entry).then_some(self.entry),
        }
    }
}

/// Whether this is a 64-bit x86 ELF file.
pub(super) fn is_x86_64(bytes: &[u8]) -> bool {
    class_of(bytes) == Some(Class::Elf64) && u16_at(bytes, 18) == Some(EM_X86_64)
}

/// Reads headers and segments.
///
/// # Errors
/// The file is no little-endian ELF, ends early, or contradicts itself.
pub(super) fn parse(file: &BootFile) -> Result<Image, BootError> {
    let truncated = |what| move || BootError::Truncated { path: file.path.clone(), what };
    let malformed = |what| BootError::Malformed { path: file.path.clone(), what };
    let bytes = &file.bytes;
    let class = class_of(bytes).ok_or_else(|| BootError::NotAKernel { path: file.path.clone() })?;
    let header = Header::read(class, bytes).ok_or_else(truncated("its ELF header"))?;
    if header.entry_bytes != class.program_header_bytes() {
        return Err(malformed("its program headers have a wrong size"));
    }
    let mut segments = Vec::new();
    for number in 0..header.count {
        let at = usize::try_from(header.table).ok().and_then(|t| t.checked_add(number * header.entry_bytes));
        let entry = at.and_then(|at| bytes.get(at..at.checked_add(header.entry_bytes)?));
        let entry = entry.ok_or_else(truncated("its program headers"))?;
        let raw = RawSegment::read(class, entry).ok_or_else(truncated("its program headers"))?;
        if raw.kind != PT_LOAD {
            continue;
        }
        // One without memory is checked too: linux-loader goes by the bytes in the file alone.
        segments.push(raw.check(bytes.len()).map_err(|fault| match fault {
            Fault::Truncated => truncated("a segment")(),
            Fault::Malformed(what) => malformed(what),
        })?);
    }
    segments.retain(|segment| segment.memory_bytes > 0);
    segments.sort_by_key(|s| s.address);
    if segments.is_empty() {
        return Err(malformed("it has nothing to load"));
    }
    // Apart from being wrong, overlaps would let a small file ask for any amount of writing.
    if segments.windows(2).any(|pair| pair[0].end() > pair[1].address) {
        return Err(malformed("its segments overlap in memory"));
    }
    Ok(Image { entry: header.entry, segments })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Elf32,
    Elf64,
}

impl Class {
    fn program_header_bytes(self) -> usize {
        match self {
            Self::Elf32 => 32,
            Self::Elf64 => 56,
        }
    }
}

fn class_of(bytes: &[u8]) -> Option<Class> {
    let little_endian = bytes.get(EI_DATA) == Some(&ELFDATA2LSB);
    if !bytes.starts_with(&[ELFMAG0, ELFMAG1, ELFMAG2, ELFMAG3]) || !little_endian {
        return None;
    }
    match *bytes.get(EI_CLASS)? {
        ELFCLASS32 => Some(Class::Elf32),
        ELFCLASS64 => Some(Class::Elf64),
        _ => None,
    }
}

/// The fields of the ELF header that matter here.
struct Header {
    entry: u64,
    table: u64,
    entry_bytes: usize,
    count: usize,
}

impl Header {
    fn read(class: Class, bytes: &[u8]) -> Option<Self> {
        let (entry, table, sizes) = match class {
            Class::Elf32 => (u32_at(bytes, 24)?.into(), u32_at(bytes, 28)?.into(), 42),
            Class::Elf64 => (u64_at(bytes, 24)?, u64_at(bytes, 32)?, 54),
        };
        let (entry_bytes, count) = (u16_at(bytes, sizes)?.into(), u16_at(bytes, sizes + 2)?.into());
        Some(Self { entry, table, entry_bytes, count })
    }
}

enum Fault {
    Truncated,
    Malformed(&'static str),
}

/// A program header as the file has it.
struct RawSegment {
    kind: u32,
    offset: u64,
    virtual_address: u64,
    address: u64,
    file_bytes: u64,
    memory_bytes: u64,
}

impl RawSegment {
    fn read(class: Class, entry: &[u8]) -> Option<Self> {
        let kind = u32_at(entry, 0)?;
        // Offset, virtual address, physical address, bytes in the file, bytes in memory: in this order in both.
        let (first, width) = match class {
            Class::Elf32 => (4, 4),
            Class::Elf64 => (8, 8),
        };
        let field = |number: usize| match class {
            Class::Elf32 => u32_at(entry, first + number * width).map(u64::from),
            Class::Elf64 => u64_at(entry, first + number * width),
        };
        Some(Self {
            kind,
            offset: field(0)?,
            virtual_address: field(1)?,
            address: field(2)?,
            file_bytes: field(3)?,
            memory_bytes: field(4)?,
        })
    }

    fn check(&self, file_len: usize) -> Result<Segment, Fault> {
        if self.file_bytes > self.memory_bytes {
            return Err(Fault::Malformed("a segment has more bytes in the file than in memory"));
        }
        if self.address.checked_add(self.memory_bytes).is_none() {
            return Err(Fault::Malformed("a segment goes past the end of all addresses"));
        }
        // Without bytes in the file the offset says nothing and may be anything.
        let offset = if self.file_bytes == 0 { 0 } else { self.offset };
        let offset = usize::try_from(offset).map_err(|_| Fault::Truncated)?;
        let file_bytes = usize::try_from(self.file_bytes).map_err(|_| Fault::Truncated)?;
        if offset.checked_add(file_bytes).is_none_or(|end| end > file_len) {
            return Err(Fault::Truncated);
        }
        Ok(Segment {
            address: self.address,
            virtual_address: self.virtual_address,
            offset,
            file_bytes,
            memory_bytes: self.memory_bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{Image, is_x86_64, parse};
    use crate::boot::BootError;
    use crate::boot::testing::{Elf, Part, file, write_u32};
    use proptest::prelude::{any, proptest};
    use proptest::prop_assert;

    fn read(elf: &Elf) -> Result<Image, BootError> {
        parse(&file(elf.build()))
    }

    #[test]
    fn both_classes_give_the_same_segments() {
        let narrow = Elf::multiboot();
        let wide = Elf { wide: true, ..narrow.clone() };
        let (narrow, wide) = (read(&narrow).unwrap(), read(&wide).unwrap());
        assert_eq!((narrow.entry, narrow.segments.len()), (wide.entry, 1));
        for image in [narrow, wide] {
            let segment = image.segments[0];
            assert_eq!((segment.address, segment.file_bytes, segment.memory_bytes), (1 << 20, 0x20c, 0x3000));
            assert_eq!((image.end(), image.physical_entry()), (0x10_3000, Some(0x10_000c)));
        }
        assert!(is_x86_64(&Elf::linux().build()));
        assert!(!is_x86_64(&Elf::multiboot().build()));
    }

    #[test]
    fn segments_come_in_order_and_may_not_overlap() {
        let mut elf = Elf::linux();
        elf.parts.reverse();
        let image = read(&elf).unwrap();
        assert_eq!(image.segments.iter().map(|s| s.address).collect::<Vec<_>>(), [0x10_0000, 0x10_1000]);
        elf.parts[1].memory_bytes += 1;
        assert!(matches!(read(&elf), Err(BootError::Malformed { .. })));
        let same = vec![elf.parts[0].clone(); 200];
        assert!(matches!(read(&Elf { parts: same, ..elf }), Err(BootError::Malformed { .. })));
    }

    #[test]
    fn a_segment_without_bytes_may_name_any_offset() {
        let part = Part { address: 1 << 20, virtual_address: 0, bytes: Vec::new(), memory_bytes: 0x1000 };
        let mut image = Elf { wide: true, entry: 1 << 20, parts: vec![part] }.build();
        write_u32(&mut image, 64 + 8 + 4, u32::MAX);
        let image = parse(&file(image)).unwrap();
        assert_eq!((image.segments[0].offset, image.segments[0].file_bytes), (0, 0));
    }

    /// linux-loader would write its bytes to wherever it says, over the tables below 1 MiB too.
    #[test]
    fn a_segment_with_bytes_and_no_memory_is_refused() {
        let part = |bytes: &[u8]| Part {
            address: 0xe_0000,
            virtual_address: 0,
            bytes: bytes.to_vec(),
            memory_bytes: 0,
        };
        let with = |bytes| {
            let mut elf = Elf::linux();
            elf.parts.push(part(bytes));
            read(&elf)
        };
        assert!(matches!(with(&[0xff; 16]), Err(BootError::Malformed { .. })));
        assert_eq!(with(&[]).unwrap().segments.len(), 2, "without bytes it is nothing");
    }

    #[test]
    fn contradictions_are_named() {
        let with = |at: usize, value: u32| {
            let mut image = Elf::linux().build();
            write_u32(&mut image, at, value);
            parse(&file(image))
        };
        assert!(matches!(with(54, 55 | 2 << 16), Err(BootError::Malformed { .. })), "size of headers");
        assert!(matches!(with(54, 56), Err(BootError::Malformed { .. })), "no headers");
        assert!(matches!(with(54, 56 | 0xffff << 16), Err(BootError::Truncated { .. })), "too many");
        assert!(matches!(with(36, u32::MAX), Err(BootError::Truncated { .. })), "table behind the end");
        assert!(matches!(with(64 + 8 + 4, 1), Err(BootError::Truncated { .. })), "offset behind the end");
        assert!(matches!(with(64 + 32 + 4, 1), Err(BootError::Malformed { .. })), "more bytes than memory");
    }

    proptest! {
        #[test]
        fn what_is_accepted_lies_inside_the_file(
            changes in proptest::collection::vec((0_usize..180, any::<u8>()), 0..8), len in 0_usize..6300
        ) {
            let mut image = Elf::linux().build();
            for (at, value) in changes {
                image[at] = value;
            }
            image.truncate(len);
            let file = file(image);
            if let Ok(image) = parse(&file) {
                prop_assert!(!image.segments.is_empty());
                for segment in &image.segments {
                    prop_assert!(segment.offset + segment.file_bytes <= file.bytes.len());
                    prop_assert!(segment.file_bytes as u64 <= segment.memory_bytes);
                    prop_assert!(segment.address.checked_add(segment.memory_bytes).is_some());
                }
            }
        }
    }
}
