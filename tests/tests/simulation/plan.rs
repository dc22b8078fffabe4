//! What a seed stands for: a cluster, its guest, and which faults come how often. Every seed has only some of them, so
//! that rare ones meet in quiet surroundings too.

use colo_common::arbiter::scripted::Faults;
use colo_primary::replicator;
use colo_secondary::replica::{self, AckPolicy};
use colo_tests::seed::Seed;
use colo_vmm::guest::{Lifecycle, ResetCause};
use colo_vmm::synthetic::{End, Program, SyntheticConfig, Tracking};

/// Virtual milliseconds.
pub(crate) type Time = u64;

/// Nodes of a cluster at most.
pub(crate) const MAX_NODES: usize = 8;
/// Milliseconds of limits that the nodes have in seconds, to a tick.
pub(crate) const HASTE: u64 = 30;
/// Between two cuts; the nodes' default, shortened as all other times are here.
pub(crate) const INTERVAL: Time = 4;
/// Silence after which an end takes its link for lost.
pub(crate) const SUSPECT_AFTER: Time = 15;
/// How long a runner waits for the answer to its hello.
pub(crate) const HANDSHAKE_LIMIT: Time = 30;
/// As in `primary::node`, `joining` and `arbiter_worker`.
pub(crate) const RELINK_LIMIT: Time = 30;
pub(crate) const BACKOFF: Time = 8;
pub(crate) const REFUSED_BACKOFF: Time = 25;
pub(crate) const READ_INTERVAL: Time = 20;
pub(crate) const RETRY: Time = 5;
pub(crate) const STEADY: Time = 200;
pub(crate) const KEEP_LIMIT: Time = 150;
pub(crate) const MAX_ROUNDS: u32 = 3;
pub(crate) const CHUNK_PAGES: u64 = 4;
pub(crate) const DIGEST_WINDOW: u64 = 24;
/// Blocks of a disk folded in a tick at most.
pub(crate) const FOLDED: usize = 4;
/// As in `secondary::node`.
pub(crate) const PROMOTE_DELAY: Time = 12;
pub(crate) const STARTUP_GRACE: Time = 30;
pub(crate) const SUSPECT_AGAIN: Time = 6;
/// How long a spare waits for the runner that claimed it.
pub(crate) const CLAIM_LIMIT: Time = 30_000 / HASTE;
/// How long faults go on.
const FAULTS_END: Time = 450;
/// When a guest that can be protected must be protected.
const LIMIT: Time = FAULTS_END + 1200;

/// How long most clusters have for their first copies.
const QUIET: Time = 150;
/// The same of a cluster.
const CLUSTER_FAULTS_END: Time = 900;
/// Two minutes, in which every vm of a cluster is protected again that can be. The longest way there: a spare waits
/// for the runner that claimed it and has died (30 s), the records of the dead go with their leases (5 s), whoever failed
/// during the faults is left out for up to 16 s, and a candidate that does not come is waited for (10 s); and each of
/// them may come after the other.
const HEALED_WITHIN: Time = 120_000 / HASTE;
/// Hosts of a cluster at most; what is more in nodes stands beside others.
const MAX_HOSTS: usize = 5;

/// Frames of the guest's memory.
pub(crate) const FRAMES: u64 = 64;
/// Blocks of its disk.
pub(crate) const BLOCKS: u64 = 64;
/// Blocks that a runner's log names together.
pub(crate) const EXTENT: u64 = 4;
/// Writes to its disk that may end in one step.
const ENDING: u64 = 8;

/// Rules left out on purpose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mutations {
    pub(crate) runner: replicator::Mutation,
    pub(crate) follower: replica::Mutation,
    /// An epoch is acked when its first frame is there.
    pub(crate) ack_before_staged: bool,
    /// Two waiting epochs change places before they are applied.
    pub(crate) apply_out_of_order: bool,
    /// While protected, output goes out without waiting for the ack.
    pub(crate) release_before_ack: bool,
    /// A promotion leaves the stored copy and its id.
    pub(crate) promotion_leaves_store: bool,
    /// What was wrong once. An epoch of a term before the newest one is refused, with its output taken.
    pub(crate) term_overtakes: bool,
    /// Failed epochs are sent as one, whatever its size.
    pub(crate) epochs_too_large: bool,
    /// Digests that are asked for before word of the seed has come are never answered.
    pub(crate) early_digests_dropped: bool,
    /// Digests go to whatever link there is.
    pub(crate) digests_to_any_link: bool,
    /// A failed guest that nobody follows any more is left lying.
    pub(crate) failed_guest_left: bool,
    /// What waits for the cut to be part of an epoch does not fill it.
    pub(crate) kept_blocks_uncounted: bool,
    /// The disk's part of an epoch that failed is not sent again.
    pub(crate) failed_blocks_dropped: bool,
    /// The disk's part of an epoch is stored with the mark after its own.
    pub(crate) blocks_stored_late: bool,
    /// Blocks of epochs that were not stored are missing where the guest runs on.
    pub(crate) skipped_blocks_dropped: bool,
    /// The image file is never synced, whoever says so.
    pub(crate) file_never_synced: bool,
    /// Nobody is looked for who could protect a vm.
    pub(crate) nobody_heals: bool,
    /// Whoever was chosen to protect a vm is waited for without end.
    pub(crate) endless_patience: bool,
    /// A spare that was claimed stays with that vm, whatever becomes of it.
    pub(crate) spares_stay: bool,
    /// What is known of a node that died is never forgotten.
    pub(crate) endless_leases: bool,
    /// Not a mutation: the policy is changed often and both nodes crash, in quiet surroundings.
    pub(crate) often_other_policy: bool,
    /// Not a mutation: guests fail often while they are protected, and links break.
    pub(crate) often_failing: bool,
}

/// How often something happens, in 10 000 ticks.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Rates {
    pub(crate) crash: u64,
    pub(crate) crash_in_promotion: u64,
    pub(crate) die_in_write: u64,
    pub(crate) break_link: u64,
    pub(crate) one_way: u64,
    pub(crate) partition: u64,
    pub(crate) freeze: u64,
    pub(crate) outage: u64,
    pub(crate) full: u64,
    pub(crate) garble: u64,
    pub(crate) pause: u64,
    pub(crate) protect: u64,
    pub(crate) stop: u64,
    pub(crate) promote: u64,
    pub(crate) policy: u64,
    pub(crate) power: u64,
    pub(crate) corrupt: u64,
    pub(crate) input: u64,
    pub(crate) switch: u64,
}

/// All that a seed decides beforehand.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// How long faults go on, and when a guest that can be protected must be.
    pub(crate) faults_end: Time,
    pub(crate) limit: Time,
    pub(crate) nodes: usize,
    pub(crate) policy: AckPolicy,
    pub(crate) boot: bool,
    pub(crate) auto_failover: bool,
    pub(crate) solo_on_loss: bool,
    pub(crate) window: usize,
    pub(crate) max_epoch_bytes: u64,
    pub(crate) join_pages: u64,
    pub(crate) max_promotions: u32,
    pub(crate) latency: u64,
    pub(crate) steps: u64,
    pub(crate) vcpus: u32,
    pub(crate) guest: SyntheticConfig,
    pub(crate) arbiter: Faults,
    pub(crate) rates: Rates,
    /// Jobs of the threads of a node in a tick.
    pub(crate) apply_speed: u64,
    pub(crate) persist_speed: u64,
}

impl Plan {
    pub(crate) fn of(seed: &mut Seed) -> Self {
        let vcpus = 1 + seed.below(2) as u32;
        let policy = if seed.below(2) == 0 { AckPolicy::Memory } else { AckPolicy::Disk };
        let pages = [12, 24, 48][seed.below(3) as usize];
        let (steps, guest) = (1 + seed.below(3), guest(seed, pages, vcpus));
        // Less than the guest can write in the first two: then epochs have to end early. Half of it must be more than
        // what the guest writes before anybody looks.
        let least = 2 * steps * u64::from(guest.program.writes + 3) + 4 + ENDING;
        let limit = [pages / 2, pages * 3 / 4, 4 * FRAMES][seed.below(3) as usize].max(least);
        Self {
            faults_end: FAULTS_END,
            limit: LIMIT,
            nodes: 2 + usize::from(seed.below(3) == 0),
            policy,
            boot: seed.below(2) == 0,
            auto_failover: seed.below(6) != 0,
            solo_on_loss: seed.below(6) != 0,
            window: 1 + seed.below(6) as usize,
            max_epoch_bytes: limit * (4096 + 16) * 8 / 7 + 8,
            join_pages: 1 + seed.below(8),
            max_promotions: seed.below(3) as u32,
            latency: [1, 3, 8][seed.below(3) as usize],
            steps,
            vcpus,
            guest,
            arbiter: arbiter(seed),
            rates: rates(seed),
            apply_speed: 1 + seed.below(3),
            persist_speed: seed.below(3),
        }
    }

    /// What a rule about the policy is about: its change while acks are ahead of a slow store, and crashes soon after.
    pub(crate) fn change_policy_often(&mut self) {
        self.policy = AckPolicy::Memory;
        (self.persist_speed, self.auto_failover, self.solo_on_loss) = (0, true, false);
        let Rates { input, .. } = self.rates;
        self.rates = Rates { policy: 200, crash: 60, input, ..Rates::default() };
    }
}

impl Plan {
    /// What a rule about failed guests is about: one that fails while it is protected, and then loses who followed.
    pub(crate) fn fail_often(&mut self) {
        (self.max_promotions, self.solo_on_loss) = (2, true);
        let Rates { input, .. } = self.rates;
        self.rates =
            Rates { corrupt: 60, break_link: 150, crash: 30, partition: 40, input, ..Rates::default() };
    }
}

/// What a seed decides about the cluster that its vms are in.
#[derive(Clone, Debug)]
pub(crate) struct ClusterPlan {
    pub(crate) vms: usize,
    pub(crate) hosts: usize,
    pub(crate) nodes: usize,
    /// Until when only the arbiter fails: a vm that was never protected is lost with its first host, which teaches little.
    pub(crate) quiet: Time,
    pub(crate) faults_end: Time,
    pub(crate) limit: Time,
    pub(crate) arbiter: Faults,
    pub(crate) rates: ClusterRates,
    /// An operator has a vm run by force that nobody may run in the end.
    pub(crate) brings_back: bool,
}

/// How often something happens to each host, path or spare, in 10 000 ticks.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ClusterRates {
    pub(crate) crash: u64,
    pub(crate) outage: u64,
    pub(crate) partition: u64,
    pub(crate) one_way: u64,
    pub(crate) freeze: u64,
    pub(crate) slow: u64,
    pub(crate) clock: u64,
    /// What operators do, to each vm, runner, follower and node.
    pub(crate) force: u64,
    pub(crate) fence: u64,
    pub(crate) failover: u64,
    pub(crate) drain: u64,
}

impl ClusterPlan {
    pub(crate) fn of(seed: &mut Seed) -> Self {
        let vms = 1 + seed.below(3) as usize;
        // For each vm a runner and a follower, and one node that may be missing.
        let nodes = 2 * vms + 1 + (seed.below(3) as usize).min(MAX_NODES - 2 * vms - 1);
        let mut of = |one_in: u64, most: u64| if seed.below(one_in) == 0 { 1 + seed.below(most) } else { 0 };
        let rates = ClusterRates {
            crash: of(2, 20),
            outage: of(3, 40),
            partition: of(3, 60),
            one_way: of(3, 60),
            freeze: of(3, 20),
            slow: of(3, 30),
            clock: of(3, 40),
            force: of(3, 40),
            fence: of(4, 15),
            failover: of(3, 30),
            drain: of(3, 25),
        };
        Self {
            vms,
            hosts: nodes.min(MAX_HOSTS),
            nodes,
            quiet: if seed.below(4) == 0 { 0 } else { QUIET },
            faults_end: CLUSTER_FAULTS_END,
            limit: CLUSTER_FAULTS_END + HEALED_WITHIN,
            arbiter: arbiter(seed),
            rates,
            brings_back: seed.below(2) == 0,
        }
    }
}

impl Plan {
    /// Of a vm in a cluster, where hosts and paths fail as a whole, and which heals itself.
    pub(crate) fn in_cluster(mut self, cluster: &ClusterPlan) -> Self {
        let Rates { crash, .. } = self.rates;
        let none = Rates { outage: 0, one_way: 0, partition: 0, freeze: 0, ..self.rates };
        self.rates = Rates { crash: crash / 2, ..none };
        (self.auto_failover, self.solo_on_loss) = (true, true);
        (self.nodes, self.faults_end, self.limit) = (cluster.nodes, cluster.faults_end, cluster.limit);
        self
    }
}

fn guest(seed: &mut Seed, pages: u64, vcpus: u32) -> SyntheticConfig {
    let end = match seed.below(12) {
        0 => Some(Lifecycle::Shutdown),
        1..=2 => Some(Lifecycle::Reset(ResetCause::Keyboard)),
        _ => None,
    };
    let number = seed.next_u64();
    let program = Program {
        seed: number,
        pages: pages as u32 + vcpus,
        writes: 1 + seed.below(5) as u32,
        words: 4,
        line_every: 4,
        frame_every: 6,
        frame_bytes: 80,
        blocks: [4, 16, 48][(number % 3) as usize],
        block_every: 2 + (number / 3 % 3) as u32,
        flush_every: 24,
        write_steps: 1 + (number / 9 % 24) as u32,
        end: end.map(|ask| End { steps: 150 + seed.below(500), ask }),
        ..Program::default()
    };
    // Many duplicates fill the ring between two harvests; then it may be overrun.
    let overruns = seed.below(5) == 0;
    let tracking = Tracking {
        seed: seed.next_u64(),
        ring_entries: Some(128),
        duplicate_per_mille: if overruns { 700 } else { 20 },
        overrun_per_mille: if overruns { 150 } else { 0 },
        harvest_every: if overruns { 0 } else { 16 },
        quarter: !overruns,
        ..Tracking::default()
    };
    SyntheticConfig { program, tracking }
}

fn arbiter(seed: &mut Seed) -> Faults {
    let mut of = |most: u64| if seed.below(2) == 0 { seed.below(most) as u32 } else { 0 };
    Faults { unanswered: of(250), late: of(250), lost: of(200), overtaken: of(100) }
}

fn rates(seed: &mut Seed) -> Rates {
    let mut of = |one_in: u64, most: u64| if seed.below(one_in) == 0 { 1 + seed.below(most) } else { 0 };
    Rates {
        crash: of(2, 80),
        crash_in_promotion: of(3, 2000),
        die_in_write: of(5, 80),
        break_link: of(2, 120),
        one_way: of(3, 80),
        partition: of(3, 60),
        freeze: of(4, 60),
        outage: of(5, 60),
        full: of(10, 20),
        garble: of(8, 40),
        pause: of(5, 60),
        protect: of(3, 60),
        stop: of(12, 20),
        promote: of(4, 60),
        policy: of(4, 80),
        power: of(15, 15),
        corrupt: of(10, 30),
        input: of(1, 500),
        switch: of(2, 60),
    }
}
