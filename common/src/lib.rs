//! What every Colo crate shares and what depends on none of them: ids, limits, telemetry.

pub mod ids;
pub mod limits;
pub mod telemetry;

pub use ids::{Epoch, Gfn, PAGE_SIZE, Point, Term};
