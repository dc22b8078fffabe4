//! The harness that tests, benchmarks and the demo share: where the guest images are, a guest with a mirror of
//! its memory that is fed from dirty sets alone, clusters of real nodes, a real etcd, and what keeps a machine's cores busy.

pub mod chaos;
pub mod cluster;
pub mod dirtier;
pub mod etcd;
pub mod images;
pub mod lab;
pub mod load;
pub mod measure;
pub mod rig;
pub mod scrape;
pub mod seed;
pub mod service;
pub mod session;

/// The hash chain of the workload's console: the very file that the guest's program is built from.
#[path = "../../deploy/guest/workload/chain.rs"]
#[allow(dead_code, missing_docs, unreachable_pub, clippy::all, reason = "shared with the guest's program")]
pub mod chain;

/// What the guest's disk exerciser does and says: the very file that the guest's program is built from.
#[path = "../../deploy/guest/service/plan.rs"]
#[allow(dead_code, missing_docs, unreachable_pub, clippy::all, reason = "shared with the guest's program")]
pub mod disk_plan;
