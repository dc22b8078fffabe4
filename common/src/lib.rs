//! What every Colo crate shares and what depends on none of them: ids, limits, the register and its arbiter, who
//! else is there, histories, configuration, the vm's directory, TLS, telemetry.

pub mod arbiter;
pub mod bounded;
pub mod config;
pub mod durable;
pub mod etcd;
pub mod history;
pub mod ids;
pub mod life;
pub mod limits;
pub mod mac;
pub mod membership;
pub mod register;
pub mod stamp;
pub mod telemetry;
pub mod tls;
pub mod vmdir;

pub use history::History;
pub use ids::{
    BLOCK_SIZE, BadName, Block, Epoch, Gfn, Incarnation, NodeId, PAGE_SIZE, Point, ProposalId, ReplicaId,
    Term, VmId,
};
pub use mac::Mac;
