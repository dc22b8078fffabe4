//! When a runner is taken for dead: pure, time is an argument.
//!
//! A suspicion begins when nothing is heard of the runner any more, and stands until one comes again: the register may
//! not name this node yet, since a dead runner's request can land late. It only leads to reading the register, which
//! decides.

/// What is suspected of the runner, by whatever clock `T` is of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Detector<T>(Option<Suspicion<T>>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Suspicion<T> {
    since: T,
    /// Until when the runner is given time, or the register is not read again.
    until: T,
    /// The register was asked because of it.
    asked: bool,
}

impl<T: Copy + Ord> Detector<T> {
    /// Nothing suspected.
    pub fn new() -> Self {
        Self(None)
    }

    /// Nothing is heard any more since `now`; a runner that lives is given time until `until`. An older suspicion
    /// stands as it is.
    pub fn silent(&mut self, now: T, until: T) {
        self.0.get_or_insert(Suspicion { since: now, until, asked: false });
    }

    /// The runner said itself that it cannot go on.
    pub fn yielded(&mut self, now: T) {
        self.0 = Some(Suspicion { since: now, until: now, asked: false });
    }

    /// A runner is there.
    pub fn heard(&mut self) {
        self.0 = None;
    }

    /// Whether the runner has had its time.
    pub fn is_due(&self, now: T) -> bool {
        self.0.is_some_and(|suspicion| now >= suspicion.until)
    }

    /// The register is asked now, and again at `again` if nothing comes of it.
    pub fn ask(&mut self, again: T) {
        if let Some(suspicion) = &mut self.0 {
            (suspicion.until, suspicion.asked) = (again, true);
        }
    }

    /// Whether the register was asked because of it: one that was read for another reason must not cut the runner's
    /// time short.
    pub fn has_asked(&self) -> bool {
        self.0.is_some_and(|suspicion| suspicion.asked)
    }

    /// Since when the runner is suspected.
    pub fn since(&self) -> Option<T> {
        self.0.map(|suspicion| suspicion.since)
    }
}

#[cfg(test)]
mod tests {
    use super::Detector;

    #[test]
    fn a_runner_has_its_time_and_the_suspicion_stands_until_one_comes() {
        let mut detector = Detector::new();
        assert!(!detector.is_due(100));
        detector.silent(100, 125);
        detector.silent(110, 135);
        assert!(!detector.is_due(124) && detector.is_due(125), "the first silence counts");
        assert!(!detector.has_asked());
        detector.ask(1125);
        assert!(detector.has_asked() && !detector.is_due(1124) && detector.is_due(1125));
        assert_eq!(detector.since(), Some(100));
        detector.heard();
        assert!(!detector.is_due(2000) && !detector.has_asked());
        detector.yielded(3000);
        assert!(detector.is_due(3000));
    }
}
