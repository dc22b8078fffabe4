//! What two Colo processes must agree on. Today: the version of that agreement.

/// Version of the protocol between nodes. Nothing is spoken yet; the first exchange carries 1.
pub const PROTOCOL_VERSION: u32 = 1;
