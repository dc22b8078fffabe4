//! A node that follows: `secondary::node::Follower` without its threads and clocks. Each step names the function there
//! that it mirrors.

use colo_common::register::Entry;
use colo_common::{History, Incarnation, NodeId, PAGE_SIZE, Point, ReplicaId, Term};
use colo_primary::release::Release;
use colo_secondary::detector::Detector;
use colo_secondary::disk::DiskImage;
use colo_secondary::image::Image;
use colo_secondary::node::is_needless;
use colo_secondary::persist::{Restored, StoredState};
use colo_secondary::rejoin::Rejoin;
use colo_secondary::replica::{AckPolicy, Copy, Replica, Rules, Start, Stored};
use colo_secondary::staging::{StagedEpoch, StagedPart, Staging};
use colo_secondary::store::{Base, MemoryDisk, PageContent, Store, StoreError, StoredCopy};
use colo_vmm::memory::Page;
use colo_vmm::synthetic::SyntheticGuest;
use colo_vmm::{GuestMemory, ProtectedGuest};
use std::collections::VecDeque;
use std::sync::Arc;

use crate::asked::Asked;
use crate::common::{ArbiterClient, Common, name};
use crate::image_file::ImageFile;
use crate::intent::{Intent, LoggedDisk};
use crate::persister::{Persisted, Persister};
use crate::plan::{BLOCKS, CLAIM_LIMIT, FOLDED, FRAMES, READ_INTERVAL, STARTUP_GRACE, Time};
use crate::runner::Beginning;
use crate::switching::Left;

/// `apply::Job`.
pub(crate) enum Apply {
    BeginSeed { keep: bool },
    Seed(StagedPart),
    Epoch(Arc<StagedEpoch>),
    Digests(u64, colo_proto::message::DigestRequest),
}

/// `node::Link`, with what the receiver of the link has.
pub(crate) struct Link {
    pub(crate) number: u64,
    pub(crate) node: NodeId,
    pub(crate) term: Term,
    pub(crate) seeding: bool,
    pub(crate) asked: Option<colo_proto::message::DigestRequest>,
    pub(crate) asked_blocks: Option<colo_proto::message::BlockDigestRequest>,
    pub(crate) staging: Staging,
    /// The stream was no good; the link is being closed.
    pub(crate) over: bool,
}

/// How it ends: `node::Outcome`.
pub(crate) enum Outcome {
    Run(Box<Beginning>),
    Superseded,
    Unfollowed,
    Failed(String),
}

/// `node::Follower`.
pub(crate) struct Follower {
    pub(crate) x: usize,
    pub(crate) me: NodeId,
    pub(crate) incarnation: Incarnation,
    pub(crate) replica: Replica,
    pub(crate) guest: Option<SyntheticGuest>,
    pub(crate) image: Option<Image>,
    /// The copy of the guest's disk.
    pub(crate) disk: Arc<DiskImage>,
    pub(crate) intent: Intent,
    pub(crate) apply: VecDeque<Apply>,
    pub(crate) persister: Persister,
    pub(crate) store_failed: bool,
    pub(crate) link: Option<Link>,
    pub(crate) tip: Option<Arc<StagedEpoch>>,
    pub(crate) restored: Option<Restored>,
    pub(crate) history: History,
    pub(crate) held: Release,
    pub(crate) promotions: u32,
    pub(crate) yielded: u32,
    pub(crate) planned: bool,
    pub(crate) runner_at: Option<usize>,
    pub(crate) rejoin: Rejoin,
    pub(crate) detector: Detector<Time>,
    pub(crate) asked: Asked,
    /// Whether it takes over without the operator's word.
    pub(crate) auto_failover: bool,
    pub(crate) hand_back: Option<(NodeId, Incarnation, Term)>,
    pub(crate) reading: bool,
    pub(crate) observed: bool,
    pub(crate) arbiter: ArbiterClient,
    pub(crate) next_read: Time,
    /// `Follower::forget_running` is to be done to the vm's directory.
    pub(crate) forgets_running: bool,
    pub(crate) end: Option<Outcome>,
    /// A runner has claimed it, which is there for others if that one does not come.
    pub(crate) claimed: bool,
    /// No configuration binds it to the vm.
    pub(crate) spare: bool,
    pub(crate) needless_since: Option<Time>,
    pub(crate) followed: bool,
    began: Time,
    /// What it is to run once its disk has done what went before.
    pub(crate) taking: Option<(Start, Entry)>,
}

/// What of a node outlives its processes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Durable {
    pub(crate) disk: MemoryDisk,
    /// What the guest's disk is in, beside the store or without it.
    pub(crate) file: ImageFile,
    /// The intent log of whoever runs the guest on that.
    pub(crate) intent: Intent,
    /// The guest's description was kept beside the store.
    pub(crate) spec: bool,
    /// What the operator configured last.
    pub(crate) policy: AckPolicy,
    /// `vmdir::Runner` of `colo-primary`.
    pub(crate) runner: Option<colo_common::vmdir::Runner>,
}

impl Follower {
    /// `secondary::start`: opens the store, reads it back, and waits for a runner.
    pub(crate) fn start(
        x: usize,
        incarnation: Incarnation,
        durable: &Durable,
        left: Option<Left>,
        common: &mut Common,
    ) -> Result<Self, StoreError> {
        let mut store = Store::open_in_memory(&durable.disk, common.vm())?;
        let disk = store.attach_disk(Arc::new(durable.file.clone()))?;
        let left = left.filter(|left| keep_left(&mut store, &left.memory).is_ok());
        let summary = store.summary();
        let (whole, history) = match &summary.copy {
            StoredCopy::Whole(whole) => (Some((whole.point, whole.replica)), whole.history.clone()),
            _ => (None, History::default()),
        };
        common.note(x, || format!("starts with {whole:?}, active {:?}", summary.active));
        let stored = Stored { active: summary.active.is_some(), whole };
        // `Follower::claimed`; what is handed over has it from the process before.
        let ran = stored.active || durable.runner.is_some_and(|known| known.active.is_some());
        let trusts_log = ran || left.is_some();
        let rules = Rules { policy: durable.policy, boot_after_crash: common.plan.boot };
        let mut replica = Replica::new(name(x), incarnation, rules, stored);
        replica.mutate(common.mutations.follower);
        let loaded = match &left {
            Some(left) => Some(Loaded { memory: Arc::clone(&left.memory), point: None, restored: None }),
            None if durable.spec => Some(load(&mut store, x, common)?),
            None => None,
        };
        let mut follower = Self {
            x,
            me: name(x),
            incarnation,
            replica,
            guest: None,
            image: None,
            disk,
            intent: durable.intent.clone(),
            apply: VecDeque::new(),
            persister: Persister::new(store),
            store_failed: false,
            link: None,
            tip: None,
            restored: None,
            history,
            held: Release::default(),
            promotions: 0,
            yielded: 0,
            planned: false,
            runner_at: None,
            rejoin: Rejoin::new(FRAMES, BLOCKS),
            detector: Detector::new(),
            asked: Asked::default(),
            auto_failover: common.plan.auto_failover,
            hand_back: None,
            reading: false,
            observed: false,
            arbiter: ArbiterClient::of(x),
            next_read: common.now,
            forgets_running: false,
            end: None,
            claimed: false,
            spare: false,
            needless_since: None,
            followed: false,
            began: common.now,
            taking: None,
        };
        follower.take_left(left, trusts_log, common);
        if let Some(Loaded { memory, point, restored }) = loaded {
            follower.take_loaded(memory, point, restored, common);
        }
        if matches!(follower.replica.copy(), Copy::Whole { .. }) {
            common.count("starts with a whole copy");
            follower.detector.silent(common.now, common.now + STARTUP_GRACE);
        }
        Ok(follower)
    }

    /// What the process before left: of the disk, if its log is `trusted`, and of memory.
    fn take_left(&mut self, left: Option<Left>, trusted: bool, common: &mut Common) {
        if let Some((point, extents)) = self.intent.claimed().filter(|_| trusted) {
            common.count("disks claimed");
            self.rejoin.leave_disk(point, extents);
        }
        if let Some(Left { base: Some(base), changed, history, .. }) = left {
            common.count("memory handed over");
            self.rejoin.leave_memory(base, changed);
            self.history = history;
        }
    }

    /// `Follower::take_loaded` and `take_stored`.
    fn take_loaded(
        &mut self,
        memory: Arc<GuestMemory>,
        point: Option<Point>,
        restored: Option<Restored>,
        common: &Common,
    ) {
        if let (Some(restored), Some(point)) = (restored, point) {
            self.promotions = restored.promotions;
            self.held = Release::new(restored.held.start);
            self.held.hold(point.epoch, restored.held.clone());
            self.restored = Some(restored);
            self.rejoin.hold(point);
        }
        self.warm_up(memory, point, common);
    }

    /// `Follower::warm_up`.
    pub(crate) fn warm_up(&mut self, memory: Arc<GuestMemory>, point: Option<Point>, common: &Common) {
        let logged = LoggedDisk { image: Arc::clone(&self.disk) as _, intent: self.intent.clone() };
        self.guest = Some(common.guest(Arc::clone(&memory), Arc::new(logged)));
        self.image = Some(Image::new(memory, point));
    }

    /// A turn of `Follower::run`, and of its apply and persist threads.
    pub(crate) fn tick(&mut self, common: &mut Common) {
        if let Some((start, entry)) = self.taking.take() {
            return self.take_over(start, entry, common);
        }
        while let Some(found) = self.arbiter.poll(common) {
            self.on_arbiter(found, common);
            if self.taking.is_some() || self.end.is_some() {
                return;
            }
        }
        for _ in 0..common.plan.apply_speed {
            self.apply_one(common);
        }
        // A slow store does not get to it in every tick.
        let turns = common.plan.persist_speed.max(u64::from(common.seed.below(3) == 0));
        let works = common.now >= self.persister.stalled;
        self.persister.wall_clock = common.wall_clock(self.x);
        for _ in 0..turns * u64::from(works) {
            if let Some(persisted) = self.persister.work(common.mutations) {
                if let (Persisted::Point(_, epoch), Some(guest)) = (&persisted, &self.guest) {
                    let (memory, disk) = (Arc::clone(guest.memory()), Arc::clone(&self.disk));
                    common.check_disk("a stored mark", epoch.point, &epoch.state, memory, disk);
                }
                self.on_persisted(persisted, common);
            }
        }
        // A round of the thread that folds; a store that failed shows elsewhere.
        if common.seed.below(4) == 0 {
            common.counts.add("blocks folded", self.disk.fold(FOLDED).unwrap_or(0));
        }
        self.settle(common);
    }

    /// `Follower::settle`.
    pub(crate) fn settle(&mut self, common: &mut Common) {
        self.leave_if_unfollowed(common);
        self.suspect_if_due(common);
        if common.now >= self.next_read && self.link.is_none() {
            self.next_read = common.now + READ_INTERVAL;
            self.read();
        }
    }

    /// `Follower::leave_if_unfollowed`.
    fn leave_if_unfollowed(&mut self, common: &mut Common) {
        let waits = self.claimed && !self.followed;
        if self.end.is_none() && waits && common.now - self.began > CLAIM_LIMIT {
            self.let_go("spares that nobody followed", common);
        }
    }

    fn let_go(&mut self, why: &'static str, common: &mut Common) {
        common.count(why);
        common.note(self.x, || format!("lets go ({why})"));
        self.end = Some(Outcome::Unfollowed);
    }

    /// `Follower::look_whether_needed`.
    pub(crate) fn look_whether_needed(&mut self, found: Option<&Entry>, common: &mut Common) {
        if self.link.is_some() || !is_needless(&self.me, found) {
            self.needless_since = None;
            return;
        }
        let since = *self.needless_since.get_or_insert(common.now);
        let leaves = self.spare;
        if self.end.is_none() && leaves && common.now - since > CLAIM_LIMIT {
            self.let_go("spares that nobody needed", common);
        }
    }

    /// Where the node waits for its store, it does nothing else; its heartbeats go on.
    pub(crate) fn waits_for_disk(&self, common: &mut Common) -> bool {
        let stalled = self.persister.stalled;
        common.net.busy[self.x] = stalled;
        stalled > common.now
    }

    pub(crate) fn read(&mut self) {
        self.reading = true;
        self.arbiter.read();
    }

    pub(crate) fn replica_id(&self) -> Option<ReplicaId> {
        match self.replica.copy() {
            Copy::Whole { replica, .. } => Some(*replica),
            _ => None,
        }
    }
}

struct Loaded {
    memory: Arc<GuestMemory>,
    point: Option<Point>,
    restored: Option<Restored>,
}

/// `secondary::keep_left`.
fn keep_left(store: &mut Store, memory: &GuestMemory) -> Result<(), StoreError> {
    store.begin_copy(Base::Empty)?;
    for gfn in (0..FRAMES).map(colo_common::Gfn) {
        let mut page = [0; PAGE_SIZE];
        memory.read_page(gfn, &mut page).expect("a frame of the guest");
        store.write_pages([(gfn, PageContent::Bytes(&page))])?;
    }
    Ok(())
}

/// `node::pairing::load`.
fn load(store: &mut Store, x: usize, common: &mut Common) -> Result<Loaded, StoreError> {
    let memory = common.memory();
    let mut fill = |gfn: colo_common::Gfn, page: &Page| {
        assert!(gfn.0 < FRAMES, "the store holds a page that the guest does not have");
        memory.write_page(gfn, page).expect("a frame of the guest");
    };
    match store.summary().copy {
        StoredCopy::None => Ok(Loaded { memory, point: None, restored: None }),
        StoredCopy::Inconsistent => {
            store.load_base(&mut fill)?;
            Ok(Loaded { memory, point: None, restored: None })
        }
        StoredCopy::Whole(whole) => {
            store.load(&mut fill)?;
            common.count("stores read back");
            let restored = StoredState::restore(&store.state()?);
            let restored = restored.unwrap_or_else(|e| panic!("node {x} cannot read the stored state: {e}"));
            let disk = store.disk().map(|disk| Arc::clone(disk) as _).expect("it was opened");
            let mut guest = common.guest(Arc::clone(&memory), disk);
            guest.restore(&restored.state).expect("the stored state is of this guest");
            common.outside.check_guest("a store", whole.point, &guest);
            Ok(Loaded { memory, point: Some(whole.point), restored: Some(restored) })
        }
    }
}
