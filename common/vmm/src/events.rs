//! What asks for a cut, on its way from the vCPU threads to the epoch loop. Each kind waits at most once until it
//! is told, so an owner that does not ask gains no more than one of each, whatever the guest does.

use std::mem::discriminant;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::guest::{GuestEvent, Wake};

/// The events of one guest that wait to be told.
#[derive(Default)]
pub(crate) struct Events {
    waiting: Mutex<Waiting>,
    raised: Condvar,
}

#[derive(Default)]
struct Waiting {
    /// In the order in which they were raised, no two of one kind.
    events: Vec<GuestEvent>,
    wake: Option<Wake>,
}

impl Events {
    /// Raises an event; the first of its kind stands.
    pub(crate) fn raise(&self, event: GuestEvent) {
        let mut waiting = self.waiting();
        if waiting.events.iter().any(|other| discriminant(other) == discriminant(&event)) {
            return;
        }
        waiting.events.push(event);
        let wake = waiting.wake.clone();
        // Whoever is woken may ask at once.
        drop(waiting);
        self.raised.notify_all();
        if let Some(wake) = wake {
            wake();
        }
    }

    /// The next event; waits up to `timeout` for one.
    pub(crate) fn next(&self, timeout: Duration) -> Option<GuestEvent> {
        let (mut waiting, _) = self
            .raised
            .wait_timeout_while(self.waiting(), timeout, |waiting| waiting.events.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        (!waiting.events.is_empty()).then(|| waiting.events.remove(0))
    }

    /// Calls `wake` whenever an event is raised from now on, and at once if one waits already.
    pub(crate) fn on_event(&self, wake: Wake) {
        let mut waiting = self.waiting();
        waiting.wake = Some(Wake::clone(&wake));
        let any = !waiting.events.is_empty();
        drop(waiting);
        if any {
            wake();
        }
    }

    /// Forgets what was not told: a cut has it in its state.
    pub(crate) fn clear(&self) {
        self.waiting().events.clear();
    }

    /// Forgets the events for which `gone` holds, since what they told of is over.
    pub(crate) fn withdraw(&self, gone: impl Fn(&GuestEvent) -> bool) {
        self.waiting().events.retain(|event| !gone(event));
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::Events;
    use crate::guest::{GuestEvent, Lifecycle, TrackingLoss};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::{Duration, Instant};

    #[test]
    fn each_kind_waits_once_and_in_order() {
        let events = Events::default();
        let lost = |vcpu| GuestEvent::TrackingLost(TrackingLoss::RingOverrun { vcpu });
        for vcpu in 0..1000 {
            events.raise(GuestEvent::OutputFull);
            events.raise(lost(vcpu));
        }
        assert_eq!(events.next(Duration::ZERO), Some(GuestEvent::OutputFull));
        events.raise(GuestEvent::OutputFull);
        let rest: Vec<_> = std::iter::from_fn(|| events.next(Duration::ZERO)).collect();
        assert_eq!(rest, [lost(0), GuestEvent::OutputFull]);
        events.raise(GuestEvent::OutputFull);
        events.raise(lost(1));
        events.withdraw(|event| *event == GuestEvent::OutputFull);
        assert_eq!(events.next(Duration::ZERO), Some(lost(1)));
        events.raise(lost(2));
        events.clear();
        assert_eq!(events.next(Duration::from_millis(1)), None);
    }

    #[test]
    fn whoever_waits_is_woken_and_may_ask_at_once() {
        let (events, calls) = (Arc::new(Events::default()), Arc::new(AtomicU32::new(0)));
        events.raise(GuestEvent::OutputFull);
        let (asked, count) = (Arc::clone(&events), Arc::clone(&calls));
        events.on_event(Arc::new(move || {
            assert!(asked.next(Duration::ZERO).is_some(), "woken for nothing");
            count.fetch_add(1, Ordering::SeqCst);
        }));
        assert_eq!(calls.load(Ordering::SeqCst), 1, "one waited already");
        events.raise(GuestEvent::Lifecycle(Lifecycle::Shutdown));
        events.raise(GuestEvent::OutputFull);
        assert_eq!(calls.load(Ordering::SeqCst), 3);

        let events = Arc::new(Events::default());
        let (raiser, started) = (Arc::clone(&events), Instant::now());
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            raiser.raise(GuestEvent::OutputFull);
        });
        assert_eq!(events.next(Duration::from_secs(60)), Some(GuestEvent::OutputFull));
        assert!(started.elapsed() < Duration::from_secs(30));
        thread.join().unwrap();
    }
}
