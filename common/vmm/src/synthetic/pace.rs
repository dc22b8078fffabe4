//! Makes a synthetic guest run in real time: tells its driver how many steps are due.

use std::time::Duration;

/// Steps by the clock. Time in which the guest could not run, or nobody asked, is not made up for beyond
/// [`most`](Self::new), so that a guest that waited does not race afterwards.
#[derive(Clone, Debug)]
pub struct Pace {
    step: Duration,
    most: u64,
    /// Time up to which steps were given out.
    done: Option<Duration>,
}

impl Pace {
    /// A step for every `step` of time, and at most `most` steps at once.
    pub fn new(step: Duration, most: u64) -> Self {
        Self { step: step.max(Duration::from_nanos(1)), most, done: None }
    }

    /// Steps to take now, `now` being the time since any fixed instant.
    pub fn due(&mut self, now: Duration) -> u64 {
        let done = *self.done.get_or_insert(now);
        let passed = now.saturating_sub(done).as_nanos();
        let steps = u64::try_from(passed / self.step.as_nanos()).unwrap_or(u64::MAX);
        if steps > self.most {
            self.done = Some(now);
            return self.most;
        }
        // No more than `most`, which fits into what has passed.
        self.done = Some(done + Duration::from_nanos((self.step.as_nanos() * u128::from(steps)) as u64));
        steps
    }
}

#[cfg(test)]
mod tests {
    use super::Pace;
    use std::time::Duration;

    #[test]
    fn steps_follow_the_clock_without_drift_and_never_race() {
        let ms = Duration::from_millis;
        let mut pace = Pace::new(ms(10), 8);
        assert_eq!(pace.due(ms(1000)), 0);
        assert_eq!([1009, 1010, 1025, 1030, 1030].map(|now| pace.due(ms(now))), [0, 1, 1, 1, 0]);
        assert_eq!(pace.due(ms(9000)), 8);
        assert_eq!(pace.due(ms(9009)), 0);
        assert_eq!(pace.due(ms(9010)), 1);
        assert_eq!(pace.due(ms(3)), 0);
        assert_eq!(Pace::new(Duration::ZERO, u64::MAX).due(Duration::MAX), 0);
    }
}
