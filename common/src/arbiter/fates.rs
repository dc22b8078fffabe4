//! What becomes of the calls to something scripted: told one by one, or drawn from a seed.

use std::collections::VecDeque;

use super::scripted::{Fate, Faults};

/// Decides; the same script, seed and order of calls give the same fates.
#[derive(Debug)]
pub(crate) struct Fates {
    script: VecDeque<Fate>,
    faults: Faults,
    random: u64,
    outage: bool,
}

impl Fates {
    /// # Panics
    /// The faults are more than 1000 of 1000.
    pub(crate) fn seeded(seed: u64, faults: Faults) -> Self {
        let Faults { unanswered, late, lost, overtaken } = faults;
        assert!([unanswered, late, lost, overtaken].iter().all(|f| *f <= 1000));
        assert!(unanswered + late + lost + overtaken <= 1000, "{faults:?}");
        Self { script: VecDeque::new(), faults, random: seed, outage: false }
    }

    /// The next calls meet these fates.
    pub(crate) fn script(&mut self, fates: impl IntoIterator<Item = Fate>) {
        self.script.extend(fates);
    }

    /// Whether nothing is answered and nothing done. The script waits meanwhile.
    pub(crate) fn set_outage(&mut self, outage: bool) {
        self.outage = outage;
    }

    /// The next one.
    pub(crate) fn next(&mut self) -> Fate {
        if self.outage {
            return Fate::Lost;
        }
        if let Some(fate) = self.script.pop_front() {
            return fate;
        }
        let mut draw = self.draw();
        let Faults { unanswered, late, lost, overtaken } = self.faults;
        for (chance, fate) in [
            (unanswered, Fate::Unanswered),
            (late, Fate::Late),
            (lost, Fate::Lost),
            (overtaken, Fate::Overtaken),
        ] {
            match draw.checked_sub(chance) {
                None => return fate,
                Some(rest) => draw = rest,
            }
        }
        Fate::Answered
    }

    /// 0 to 999, by splitmix64.
    fn draw(&mut self) -> u32 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % 1000) as u32
    }
}
