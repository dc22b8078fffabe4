//! Seeded choices: every test prints its seed, and `COLO_SEED` repeats it.

/// A small deterministic generator (SplitMix64).
#[derive(Clone, Debug)]
pub struct Seed(u64);

impl Seed {
    /// The seed of `COLO_SEED`, else `default`; printed either way.
    #[expect(clippy::print_stderr, reason = "a failing run must be repeatable")]
    pub fn from_env(default: u64) -> Self {
        let seed = std::env::var("COLO_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(default);
        eprintln!("seed {seed} (COLO_SEED repeats it)");
        Self(seed)
    }

    /// A generator with this seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next_u64() % bound
    }
}
