//! The console lines of a synthetic guest: the same bytes that the Linux workload prints
//! (`deploy/guest/workload/chain.rs` has their grammar and their checker), so that one checker judges both.

/// Mixes a word into a running hash: a bijection of the state for any word, then splitmix64's finish.
pub(super) const fn mix(state: u64, word: u64) -> u64 {
    let folded = (state ^ word.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut hash = folded.wrapping_add(word);
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

/// The chain before the first line.
pub(super) const fn start(seed: u64) -> u64 {
    mix(u64::from_be_bytes(*b"colochn0"), seed)
}

/// The chain at line `number`.
pub(super) const fn next(previous: u64, number: u64, clock_ns: u64, memory: u64) -> u64 {
    mix(mix(mix(previous, number), clock_ns), memory)
}

/// The line `number` whose chain value is `chain`, without its newline.
pub(super) fn line(number: u64, chain: u64, clock_ns: u64, cpu: u32, memory: u64) -> String {
    format!("colo {number:08} {chain:016x} t={clock_ns} cpu={cpu} m={memory:016x}")
}

/// The last line of a guest that ends, without its newline.
pub(super) fn done(lines: u64, chain: u64) -> String {
    format!("colo-done lines={lines} chain={chain:016x}")
}
