//! Where output goes that may go out: console bytes to whoever reads them, frames to the host's network. And what the
//! network has to see beside them: the carrier while this node runs the guest, and where the guest's address is now.

use colo_common::Mac;
use colo_vmm::egress::{Output, OutputItem};
use colo_vmm::tap::announce::{Frame, Schedule, announcement};
use colo_vmm::tap::learn::Learner;
use colo_vmm::tap::{Tap, Written};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Instant;

use crate::console::Console;
use crate::release::Sink;

/// Console and network of a guest that runs here.
pub struct Outlet {
    console: Console,
    network: Option<Network>,
}

/// The guest's side of the host's network.
pub struct Network {
    tap: Arc<Tap>,
    mac: Mac,
    learner: Learner,
    announcing: Option<Announcing>,
    /// Frames that the host did not take, by count.
    lost: u64,
}

struct Announcing {
    schedule: Schedule,
    frames: Vec<Frame>,
}

impl Outlet {
    /// A guest without a network card has no network.
    pub fn new(console: Console, network: Option<Network>) -> Self {
        Self { console, network }
    }

    /// This node runs the guest from now on: the cable is plugged in, and if the guest was elsewhere before, the network
    /// is told where it is now.
    pub fn plug_in(&mut self, moved: bool, now: Instant) {
        let Some(network) = &mut self.network else { return };
        network.set_carrier(true);
        if moved {
            let frames = announcement(network.mac, network.learner.addresses());
            network.announcing = Some(Announcing { schedule: Schedule::new(now), frames });
            network.announce_if_due(now);
        }
    }

    /// It does not any more.
    pub fn unplug(&mut self) {
        let Some(network) = &mut self.network else { return };
        network.announcing = None;
        network.set_carrier(false);
    }

    /// Tells the network again, if it is time.
    pub fn announce_if_due(&mut self, now: Instant) {
        self.network.iter_mut().for_each(|network| network.announce_if_due(now));
    }

    /// Frames that the host's network did not take, in all.
    pub fn lost(&self) -> u64 {
        self.network.as_ref().map_or(0, |network| network.lost)
    }
}

impl Sink for Outlet {
    fn let_out(&mut self, output: Output) {
        self.network.iter_mut().for_each(|network| network.let_out(&output));
        self.console.let_out(output);
    }
}

impl Network {
    /// A card with this address on this TAP. `addresses` are known to be the guest's, newest first.
    pub fn new(tap: Arc<Tap>, mac: Mac, addresses: impl IntoIterator<Item = Ipv4Addr>) -> Self {
        let mut learner = Learner::new(mac);
        let known: Vec<Ipv4Addr> = addresses.into_iter().collect();
        known.into_iter().rev().for_each(|address| learner.learn_address(address));
        Self { tap, mac, learner, announcing: None, lost: 0 }
    }

    /// Sends the frames of an output, in order.
    pub fn let_out(&mut self, output: &Output) {
        for item in &output.items {
            if let OutputItem::Frame { bytes, .. } = item {
                self.learner.observe(bytes);
                self.send(bytes);
            }
        }
    }

    /// Plugs the cable in, or pulls it.
    pub fn set_carrier(&self, on: bool) {
        if let Err(e) = self.tap.set_carrier(on) {
            let what = if on { "on" } else { "off" };
            tracing::error!(tap = self.tap.name(), "the carrier cannot be switched {what}: {e}");
        }
    }

    fn announce_if_due(&mut self, now: Instant) {
        let Some(announcing) = &mut self.announcing else { return };
        if announcing.schedule.due(now) {
            for frame in &announcing.frames {
                if !matches!(self.tap.write_frame(frame), Ok(Written::Taken)) {
                    tracing::debug!(
                        tap = self.tap.name(),
                        "an announcement of the guest's address was not taken"
                    );
                }
            }
        }
        if announcing.schedule.next().is_none() {
            self.announcing = None;
        }
    }

    /// A frame that the host does not take is lost, as on any network; said once for each doubling.
    fn send(&mut self, frame: &[u8]) {
        let why = match self.tap.write_frame(frame) {
            Ok(Written::Taken) => return,
            Ok(Written::Down) => "the interface is down: bring it up (ip link set up)".to_owned(),
            Ok(Written::Full) => "the host has no room for it".to_owned(),
            Ok(Written::Refused) => "the host does not take frames like it".to_owned(),
            Err(e) => e.to_string(),
        };
        self.lost += 1;
        if self.lost.is_power_of_two() {
            tracing::warn!(tap = self.tap.name(), lost = self.lost, "a frame of the guest is lost: {why}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Network, Outlet};
    use crate::console::Console;
    use crate::release::Sink;
    use colo_vmm::egress::{Output, OutputItem, OutputPosition};
    use colo_vmm::tap::Tap;
    use std::net::Ipv4Addr;
    use std::os::unix::net::UnixDatagram;
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);

    fn outlet(console: &Console) -> (Outlet, UnixDatagram) {
        let (near, far) = UnixDatagram::pair().unwrap();
        far.set_nonblocking(true).unwrap();
        let tap = Arc::new(Tap::from_socket(near.into()).unwrap());
        let network = Network::new(tap, "02:00:00:12:34:56".parse().unwrap(), [ADDRESS]);
        (Outlet::new(console.clone(), Some(network)), far)
    }

    fn received(far: &UnixDatagram) -> Vec<Vec<u8>> {
        let mut buffer = [0; 2048];
        std::iter::from_fn(|| far.recv(&mut buffer).ok().map(|len| buffer[..len].to_vec())).collect()
    }

    #[test]
    fn frames_go_to_the_network_and_console_bytes_to_the_console_in_order() {
        let console = Console::default();
        let (mut outlet, far) = outlet(&console);
        let frame = |n| OutputItem::Frame { slot: 0, bytes: vec![n; 60] };
        let items = vec![frame(1), OutputItem::Console(b"hi".to_vec()), frame(2)];
        outlet.let_out(Output { start: OutputPosition::default(), items });
        assert_eq!(received(&far), [vec![1; 60], vec![2; 60]]);
        assert_eq!(console.read(0).unwrap().bytes, b"hi");
    }

    #[test]
    fn a_guest_that_moved_is_announced_several_times_and_one_that_did_not_never() {
        let now = Instant::now();
        let (mut outlet, far) = outlet(&Console::default());
        outlet.plug_in(false, now);
        outlet.announce_if_due(now + Duration::from_secs(1));
        assert!(received(&far).is_empty());
        outlet.plug_in(true, now);
        let first = received(&far);
        assert_eq!(first.len(), 3, "by its card, and by its address in two forms");
        let mut times = 1;
        for ms in 0..5000 {
            outlet.announce_if_due(now + Duration::from_millis(ms));
            let more = received(&far);
            times += usize::from(!more.is_empty());
            assert!(more.is_empty() || more == first);
        }
        assert!(times > 3, "announced {times} times");
        outlet.plug_in(true, now);
        received(&far);
        outlet.unplug();
        outlet.announce_if_due(now + Duration::from_secs(1));
        assert!(received(&far).is_empty(), "it is somewhere else");
    }
}
