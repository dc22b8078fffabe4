//! virtio-blk: a disk.
//!
//! ```text
//!   queue --parse--> waiting --no conflict--> under way (I/O threads) --done--> log, used ring
//! ```
//!
//! Bytes to write are copied out of the guest once. The same bytes go to the [`Disk`](crate::disk::Disk) and, when the
//! request's used entry appears, into the [`DiskLog`] of the open epoch, as whole blocks. Requests that touch a block
//! which another one changes wait for it, so what ends up on the disk is what the log says, whatever the order of I/O.
//! At a cut nothing is waited for: requests that have not ended are part of the device's state, with their data, and
//! whoever restores it does them again.

mod io;
mod log;
mod request;

use colo_common::BLOCK_SIZE;
use colo_common::bounded::list;
use colo_common::limits::{MAX_DISK_REQUEST, MAX_EPOCH_DISK};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::Arc;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
};
use virtio_queue::Queue;

use super::device::{Device, DeviceBody, Served};
use super::queue::{Broken, give_back, pop, put_back, serve, wants_interrupt};
use super::transport::Identity;
use crate::memory::GuestRam;
use crate::spec::DiskSpec;
use crate::state::StateError;
use io::Ended;
pub(crate) use io::IoThreads;
pub(crate) use log::DiskLog;
pub use log::DiskTracking;
use request::{MAX_ZERO_SECTORS, Request, SECTOR, SECTORS_PER_BLOCK};

const _: () = assert!((SEG_MAX * SIZE_MAX) as usize <= MAX_DISK_REQUEST);

/// Kind of the device.
const BLOCK: u32 = 2;
/// Requests of the one queue.
const QUEUE: u16 = 128;
/// Descriptors with data in one request, and bytes in each, that drivers keep to.
const SEG_MAX: u32 = 62;
const SIZE_MAX: u32 = 16 << 10;
/// Requests that have not ended, those of drivers that are gone included.
const MAX_REQUESTS: usize = 256;
/// Requests taken from the queue, or given back to it, at once.
const BATCH: usize = 64;

/// Requests that have not ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BlockState {
    /// In the order in which they came.
    #[serde(deserialize_with = "list::<_, _, MAX_REQUESTS>")]
    requests: Vec<Request>,
}

impl BlockState {
    pub(super) fn check_limits(&self) -> Result<(), StateError> {
        self.requests.iter().try_for_each(Request::check)?;
        let bytes: usize = self.requests.iter().map(Request::bytes).sum();
        // One more is taken as long as there is room, and it may begin and end within a block.
        let most = MAX_EPOCH_DISK + MAX_DISK_REQUEST + BLOCK_SIZE;
        if bytes > most {
            return Err(StateError::Malformed(format!("{bytes} bytes of disk requests")));
        }
        Ok(())
    }
}

/// A request and where it is.
struct Open {
    request: Request,
    number: u64,
    /// It was given to the I/O threads.
    under_way: bool,
}

pub(super) struct Block {
    config: Vec<u8>,
    identity: Identity,
    sectors: u64,
    serial: String,
    read_only: bool,
    io: IoThreads,
    log: Arc<DiskLog>,
    open: VecDeque<Open>,
    /// Bytes to write of those.
    bytes: usize,
    next: u64,
    /// Ended, and not yet given back.
    ended: VecDeque<Ended>,
    /// Requests that the disk has failed.
    failed: u64,
}

impl Block {
    pub(super) fn new(spec: &DiskSpec, io: IoThreads, log: Arc<DiskLog>) -> Self {
        let mut features = 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_FLUSH;
        features |= match spec.read_only {
            true => 1 << VIRTIO_BLK_F_RO,
            false => 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES,
        };
        let sectors = spec.bytes / SECTOR as u64;
        Self {
            config: config(sectors),
            identity: Identity { kind: BLOCK, features, queues: &[QUEUE] },
            sectors,
            serial: spec.serial.clone(),
            read_only: spec.read_only,
            io,
            log,
            open: VecDeque::new(),
            bytes: 0,
            next: 0,
            ended: VecDeque::new(),
            failed: 0,
        }
    }

    /// Takes what the I/O threads have ended: what was written goes into the log. Chains are given back by
    /// [`Self::serve`], in the same turn.
    fn take_ended(&mut self) {
        while let Some(ended) = self.io.ended() {
            let Some(at) = self.open.iter().position(|open| open.number == ended.number) else { continue };
            for write in &ended.done.writes {
                self.log.record(write.clone());
            }
            self.log.record_unknown(ended.done.unknown.clone());
            self.io.recorded(&self.open[at].request);
            if let Some(open) = self.open.remove(at) {
                self.bytes -= open.request.bytes();
                if !open.request.is_orphan() {
                    self.ended.push_back(Ended { request: Some(open.request), ..ended });
                }
            }
        }
        self.go_on();
    }

    /// Starts what conflicts with nothing before it.
    fn go_on(&mut self) {
        for at in 0..self.open.len() {
            let this = &self.open[at];
            let waits = this.under_way
                || self.open.iter().take(at).any(|before| before.request.conflicts_with(&this.request));
            if !waits {
                let open = &mut self.open[at];
                open.under_way = true;
                self.io.start_request(open.number, &open.request);
            }
        }
    }

    fn admit(&mut self, request: Request) {
        self.bytes += request.bytes();
        self.open.push_back(Open { request, number: self.next, under_way: false });
        self.next += 1;
    }

    fn is_full(&self) -> bool {
        self.open.len() >= MAX_REQUESTS || self.bytes >= self.log.most_under_way()
    }

    /// Takes requests from the queue.
    fn take(&mut self, queue: &mut Queue, ram: &GuestRam) -> Result<Served, Broken> {
        let mut served = Served::default();
        for _ in 0..BATCH {
            let Some(chain) = pop(queue, ram)? else { return Ok(served) };
            if self.log.is_full() || self.is_full() {
                put_back(queue);
                // Room comes with the cut, or with requests that end.
                served.full = self.log.is_full();
                return Ok(served);
            }
            match Request::parse(chain, ram, self.sectors, self.read_only)? {
                Ok(request) => self.admit(request),
                Err(refused) => {
                    let status = if refused.unsupported { VIRTIO_BLK_S_UNSUPP } else { VIRTIO_BLK_S_IOERR };
                    refused.status.write(ram, &[status as u8])?;
                    give_back(queue, ram, refused.head, 1)?;
                    served.interrupt = true;
                }
            }
        }
        served.more = true;
        Ok(served)
    }

    /// Gives back what has ended.
    fn give_back_ended(&mut self, queue: &mut Queue, ram: &GuestRam) -> Result<bool, Broken> {
        let mut any = false;
        while let Some(ended) = self.ended.pop_front() {
            let Some(request) = ended.request else { continue };
            let written = match &ended.done.result {
                Ok(read) => request.give(ram, read, &self.serial, VIRTIO_BLK_S_OK as u8)?,
                Err(reason) => {
                    self.failed += 1;
                    if self.failed.is_power_of_two() {
                        let (failed, request) = (self.failed, request.name());
                        tracing::error!(failed, "the guest's disk: {request}: {reason}");
                    }
                    request.give(ram, &[], &self.serial, VIRTIO_BLK_S_IOERR as u8)?
                }
            };
            give_back(queue, ram, request.head(), written)?;
            any = true;
        }
        Ok(any)
    }
}

impl Device for Block {
    fn identity(&self) -> Identity {
        self.identity
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn start(&mut self, _features: u64) {}

    /// What is under way stays: it may be on the disk already, and has to be in the log then.
    fn reset(&mut self) {
        self.ended.clear();
        self.open.iter_mut().for_each(|open| open.request.orphan());
    }

    fn serve(&mut self, _index: usize, queue: &mut Queue, ram: &GuestRam) -> Result<Served, Broken> {
        self.take_ended();
        let mut served = Served { interrupt: self.give_back_ended(queue, ram)?, ..Served::default() };
        serve(queue, ram, |queue| {
            served = served.and(self.take(queue, ram)?);
            self.go_on();
            // What has no room comes again with a request that ends.
            Ok(if self.is_full() { ControlFlow::Break(()) } else { served.goes_on() })
        })?;
        served.interrupt = served.interrupt && wants_interrupt(queue, ram)?;
        Ok(served)
    }

    fn settle(&mut self) {
        self.take_ended();
    }

    fn save(&self) -> DeviceBody {
        DeviceBody::Block(BlockState {
            requests: self.open.iter().map(|open| open.request.clone()).collect(),
        })
    }

    fn restore(&mut self, body: &DeviceBody, _: Option<u64>, ram: &GuestRam) -> Result<(), StateError> {
        let DeviceBody::Block(state) = body else {
            return Err(StateError::Malformed("a disk's window with another device".to_owned()));
        };
        // What was under way here may have reached the disk: it ends first, and is in the log.
        self.io.drain();
        // What was not started is dropped, as by a loss of power: nothing of it is on the disk.
        self.open.retain(|open| open.under_way);
        self.take_ended();
        self.open.clear();
        self.ended.clear();
        self.bytes = 0;
        for request in &state.requests {
            if !request.fits(ram, self.sectors, self.read_only) {
                return Err(StateError::Malformed(
                    "a disk request outside the disk or the memory".to_owned(),
                ));
            }
            self.admit(request.clone());
        }
        Ok(())
    }
}

/// The configuration space, as far as the write-zeroes fields.
fn config(sectors: u64) -> Vec<u8> {
    let mut bytes = vec![0; 60];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, &sectors.to_le_bytes());
    put(8, &SIZE_MAX.to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    // Topology: a physical block is 2^3 sectors, aligned at 0, which is the least and the best to read and write.
    bytes[24] = SECTORS_PER_BLOCK.trailing_zeros() as u8;
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(26, &1_u16.to_le_bytes());
    put(28, &1_u32.to_le_bytes());
    put(36, &MAX_ZERO_SECTORS.to_le_bytes());
    put(40, &1_u32.to_le_bytes());
    put(44, &(SECTORS_PER_BLOCK as u32).to_le_bytes());
    put(48, &MAX_ZERO_SECTORS.to_le_bytes());
    put(52, &1_u32.to_le_bytes());
    bytes[56] = 1;
    bytes
}
