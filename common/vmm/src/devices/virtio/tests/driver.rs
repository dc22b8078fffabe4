//! A driver of the plainest kind: registers by number, one descriptor table per queue, at fixed places.

use colo_common::Block;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use vm_memory::{Bytes, GuestAddress};

use crate::devices::InterruptLines;
use crate::devices::virtio::{Backends, Virtio};
use crate::disk::{Disk, FileDisk};
use crate::egress::Egress;
use crate::events::Events;
use crate::memory::GuestMemory;
use crate::spec::{BootFile, BootSource, DiskSpec, GuestSpec, NetSpec, VirtioSpec};
use crate::tap::Tap;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

/// Bytes of the guest's memory.
pub(super) const MEMORY: u64 = 8 << 20;
/// Entries of a queue, whatever its most.
pub(super) const SIZE: u16 = 8;
/// Where the queues of a window are: 64 KiB for each.
const QUEUES: u64 = 1 << 20;
/// Room for data.
pub(super) const DATA: u64 = 2 << 20;
/// Bytes of the disk.
pub(super) const DISK: u64 = 4 << 20;

pub(super) const WRITE: u16 = 2;
pub(super) const NEXT: u16 = 1;

#[derive(Default)]
pub(super) struct Lines(pub(super) Mutex<Vec<u32>>);

impl InterruptLines for Lines {
    fn set(&self, irq: u32, active: bool) -> io::Result<()> {
        if active {
            self.0.lock().unwrap().push(irq);
        }
        Ok(())
    }
}

/// A disk that fails, half-way, or that does nothing for a while.
pub(super) struct Faults {
    disk: Arc<FileDisk>,
    pub(super) fails: AtomicBool,
    /// Whoever holds it keeps changes from being done.
    pub(super) gate: Mutex<()>,
    /// Changes that have begun and are not recorded.
    pub(super) open: Mutex<Vec<Range<Block>>>,
}

impl Faults {
    fn check_open(&self, offset: u64, len: u64) {
        let open = self.open.lock().unwrap();
        let holds =
            |blocks: &Range<Block>| blocks.start.offset() <= offset && offset + len <= blocks.end.offset();
        assert!(
            open.iter().any(holds),
            "{len} bytes at {offset:#x} are changed by no request that has begun"
        );
    }
}

impl Disk for Faults {
    fn bytes(&self) -> u64 {
        self.disk.bytes()
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.disk.read(offset, bytes)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        drop(self.gate.lock().unwrap());
        self.check_open(offset, bytes.len() as u64);
        if self.fails.load(Relaxed) {
            self.disk.write(offset, &bytes[..bytes.len() / 2])?;
            return Err(io::Error::other("the medium fails"));
        }
        self.disk.write(offset, bytes)
    }

    fn zero(&self, blocks: Range<Block>, unmap: bool) -> io::Result<()> {
        drop(self.gate.lock().unwrap());
        self.check_open(blocks.start.offset(), blocks.end.offset() - blocks.start.offset());
        self.disk.zero(blocks, unmap)?;
        if self.fails.load(Relaxed) { Err(io::Error::other("the medium fails")) } else { Ok(()) }
    }

    fn flush(&self) -> io::Result<()> {
        self.disk.flush()
    }

    fn next_data(&self, from: Block) -> io::Result<Option<Range<Block>>> {
        self.disk.next_data(from)
    }

    fn change_begins(&self, blocks: Range<Block>) {
        self.open.lock().unwrap().push(blocks);
    }

    fn change_recorded(&self, blocks: Range<Block>) {
        let mut open = self.open.lock().unwrap();
        let at = open.iter().position(|begun| *begun == blocks);
        open.swap_remove(at.expect("it had begun"));
    }
}

/// Devices, and what is around them.
pub(super) struct Rig {
    pub(super) virtio: Virtio,
    pub(super) memory: Arc<GuestMemory>,
    pub(super) egress: Arc<Egress>,
    pub(super) events: Arc<Events>,
    pub(super) lines: Arc<Lines>,
    pub(super) disk: Arc<FileDisk>,
    /// What goes wrong with it.
    pub(super) faults: Arc<Faults>,
    /// The other end of the TAP.
    pub(super) wire: UnixDatagram,
    _place: tempfile::TempDir,
}

pub(super) fn spec() -> GuestSpec {
    let image = BootFile { path: "none".into(), bytes: Vec::new().into() };
    let disk = DiskSpec { bytes: DISK, read_only: false, serial: "serial".to_owned() };
    let net = NetSpec { mac: "02:00:00:12:34:56".parse().unwrap(), offloads: true };
    let virtio =
        VirtioSpec { net: Some(net), disk: Some(disk), rng: true, console: true, ..VirtioSpec::default() };
    GuestSpec { virtio, ..GuestSpec::new("test", MEMORY, BootSource::Flat { image, address: 0 }) }
}

impl Rig {
    /// Everything that a spec can name, running.
    pub(super) fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        let disk = Arc::new(FileDisk::open_sized(&place.path().join("disk"), DISK, true).unwrap());
        let (fails, gate, open) = (AtomicBool::new(false), Mutex::default(), Mutex::default());
        let faults = Arc::new(Faults { disk: disk.clone(), fails, gate, open });
        let (near, wire) = UnixDatagram::pair().unwrap();
        wire.set_nonblocking(true).unwrap();
        let tap = Arc::new(Tap::from_socket(near.into()).unwrap());
        let backends = Backends { tap: Some(tap), disk: Some(faults.clone()) };
        let memory = Arc::new(GuestMemory::new(MEMORY).unwrap());
        let (egress, events, lines) = (Arc::default(), Arc::<Events>::default(), Arc::<Lines>::default());
        let virtio = Virtio::new(&spec(), &backends, &memory, (&egress, &events), None).unwrap();
        virtio.attach(lines.clone());
        virtio.resume();
        Self { virtio, memory, egress, events, lines, disk, faults, wire, _place: place }
    }

    pub(super) fn write(&self, slot: u32, register: u32, value: u32) {
        self.virtio.write(slot as usize, register, &value.to_le_bytes());
    }

    pub(super) fn read(&self, slot: u32, register: u32) -> u32 {
        let mut bytes = [0; 4];
        self.virtio.read(slot as usize, register, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Resets the device, takes `features` and sets up `queues` queues.
    pub(super) fn start(&self, slot: u32, features: u64, queues: u32) {
        self.write(slot, 0x70, 0);
        for queue in 0..u64::from(queues) {
            let base = Self::queue(slot, queue as u32);
            self.memory.ram().write_slice(&[0; 0x4000], GuestAddress(base)).unwrap();
        }
        self.write(slot, 0x70, 3);
        for (half, value) in [features as u32, (features >> 32) as u32].into_iter().enumerate() {
            self.write(slot, 0x24, half as u32);
            self.write(slot, 0x20, value);
        }
        self.write(slot, 0x70, 11);
        assert_eq!(self.read(slot, 0x70), 11, "the features are taken");
        for queue in 0..queues {
            let base = Self::queue(slot, queue);
            self.write(slot, 0x30, queue);
            assert!(self.read(slot, 0x34) >= SIZE.into());
            self.write(slot, 0x38, SIZE.into());
            for (register, at) in [(0x80, base), (0x90, base + 0x1000), (0xa0, base + 0x2000)] {
                self.write(slot, register, at as u32);
                self.write(slot, register + 4, 0);
            }
            self.write(slot, 0x44, 1);
            assert_eq!(self.read(slot, 0x44), 1, "the queue is set up");
        }
        self.write(slot, 0x70, 15);
    }

    /// Where a queue's descriptors are; its available ring is 4 KiB after that, its used ring 8 KiB.
    pub(super) fn queue(slot: u32, queue: u32) -> u64 {
        QUEUES + u64::from(slot) * 0x20000 + u64::from(queue) * 0x10000
    }

    pub(super) fn descriptor(
        &self,
        slot: u32,
        queue: u32,
        index: u16,
        (address, len, flags, next): (u64, u32, u16, u16),
    ) {
        let at = GuestAddress(Self::queue(slot, queue) + u64::from(index) * 16);
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.memory.ram().write_slice(&bytes, at).unwrap();
    }

    /// Makes the chain that begins at `head` available as number `number`, and notifies.
    pub(super) fn offer(&self, slot: u32, queue: u32, number: u16, head: u16) {
        let ring = Self::queue(slot, queue) + 0x1000;
        self.put(ring + 4 + u64::from(number % SIZE) * 2, &head.to_le_bytes());
        self.put(ring + 2, &number.wrapping_add(1).to_le_bytes());
        self.write(slot, 0x50, queue);
    }

    pub(super) fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.ram().write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub(super) fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.ram().read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    /// Chains that were given back so far.
    pub(super) fn used(&self, slot: u32, queue: u32) -> u16 {
        let bytes = self.get(Self::queue(slot, queue) + 0x2000 + 2, 2);
        u16::from_le_bytes(bytes.try_into().unwrap())
    }

    /// The `number`th chain that was given back: its head, and the bytes in it.
    pub(super) fn used_entry(&self, slot: u32, queue: u32, number: u16) -> (u32, u32) {
        let at = Self::queue(slot, queue) + 0x2000 + 4 + u64::from(number % SIZE) * 8;
        let bytes = self.get(at, 8);
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        (word(0), word(4))
    }

    /// Waits until so many chains were given back.
    pub(super) fn wait_used(&self, slot: u32, queue: u32, count: u16) {
        self.wait(|| self.used(slot, queue) == count);
    }

    pub(super) fn wait(&self, done: impl Fn() -> bool) {
        let until = Instant::now() + Duration::from_secs(30);
        while !done() {
            assert!(Instant::now() < until, "it does not come to pass");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Whether the device asks to be reset.
    pub(super) fn is_broken(&self, slot: u32) -> bool {
        self.read(slot, 0x70) & 64 != 0
    }
}
