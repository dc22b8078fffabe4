//! A network between two nodes that can be cut: datagrams of the replication link, one direction at a time, and the
//! control plane's connections. It can also lose datagrams and hold them up at random. In user space, so that it needs no
//! privilege.

use anyhow::Context;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::seed::Seed;

/// Bytes of a datagram at most.
const MAX_DATAGRAM: usize = 65_536;

/// What gets through.
#[derive(Debug)]
struct Gates {
    to_secondary: AtomicBool,
    to_runner: AtomicBool,
    /// The control plane; connections end when it turns false.
    control: watch::Sender<bool>,
    /// Of a thousand datagrams so many are lost.
    loss: AtomicU64,
    /// Each of the others is held up by so many microseconds at most, so that they overtake each other.
    jitter_us: AtomicU64,
}

impl Gates {
    /// Sends a datagram on, as the weather is.
    async fn pass(&self, from: &Arc<UdpSocket>, to: SocketAddr, datagram: &[u8], random: &mut Seed) {
        if random.below(1000) < self.loss.load(Ordering::Relaxed) {
            return;
        }
        match self.jitter_us.load(Ordering::Relaxed) {
            // Whatever is wrong, it is lost as on a network.
            0 => drop(from.send_to(datagram, to).await),
            jitter => {
                let (from, datagram, wait) = (Arc::clone(from), datagram.to_vec(), random.below(jitter));
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_micros(wait)).await;
                    drop(from.send_to(&datagram, to).await);
                });
            }
        }
    }
}

/// The way to one secondary.
#[derive(Debug)]
pub struct Link {
    gates: Arc<Gates>,
    /// Where a runner finds the secondary's control plane.
    pub control: SocketAddr,
    /// Where a runner is told to send its datagrams.
    pub datagrams: SocketAddr,
    tasks: Vec<JoinHandle<()>>,
}

impl Link {
    /// Passes on to a secondary's control plane and to its QUIC endpoint.
    ///
    /// # Errors
    /// No ports can be had.
    pub fn open(runtime: &Handle, control: SocketAddr, quic: SocketAddr) -> anyhow::Result<Self> {
        let gates = Arc::new(Gates {
            to_secondary: AtomicBool::new(true),
            to_runner: AtomicBool::new(true),
            control: watch::Sender::new(true),
            loss: AtomicU64::new(0),
            jitter_us: AtomicU64::new(0),
        });
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let bound = runtime.block_on(async { (TcpListener::bind(any).await, UdpSocket::bind(any).await) });
        let (listener, socket) = (bound.0.context("no port")?, bound.1.context("no port")?);
        let (here, datagrams) = (listener.local_addr()?, socket.local_addr()?);
        let tasks = vec![
            runtime.spawn(pass_connections(listener, control, Arc::clone(&gates))),
            runtime.spawn(pass_datagrams(Arc::new(socket), quic, Arc::clone(&gates))),
        ];
        Ok(Self { gates, control: here, datagrams, tasks })
    }

    /// Nothing gets through any more.
    pub fn cut(&self) {
        self.set(false, false);
    }

    /// Only what the runner sends gets through: its epochs arrive and it hears no ack.
    pub fn cut_acks(&self) {
        self.set(true, false);
    }

    /// Only what the secondary sends gets through.
    pub fn cut_epochs(&self) {
        self.set(false, true);
    }

    /// From now on so many of a thousand datagrams are lost, each way, and the others held up by up to `jitter`.
    pub fn weather(&self, loss: u64, jitter: Duration) {
        self.gates.loss.store(loss, Ordering::Relaxed);
        let jitter = u64::try_from(jitter.as_micros()).unwrap_or(u64::MAX);
        self.gates.jitter_us.store(jitter, Ordering::Relaxed);
    }

    /// Everything gets through again.
    pub fn heal(&self) {
        self.set(true, true);
    }

    fn set(&self, to_secondary: bool, to_runner: bool) {
        self.gates.to_secondary.store(to_secondary, Ordering::SeqCst);
        self.gates.to_runner.store(to_runner, Ordering::SeqCst);
        self.gates.control.send_replace(to_secondary && to_runner);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

async fn pass_connections(listener: TcpListener, to: SocketAddr, gates: Arc<Gates>) {
    while let Ok((mut near, _)) = listener.accept().await {
        let mut open = gates.control.subscribe();
        if !*open.borrow_and_update() {
            continue;
        }
        tokio::spawn(async move {
            let Ok(mut far) = TcpStream::connect(to).await else { return };
            tokio::select! {
                // Either end may close it at any time.
                _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                _ = open.wait_for(|open| !open) => {}
            }
        });
    }
}

/// Each runner's process gets a socket of its own, so that answers find it.
async fn pass_datagrams(socket: Arc<UdpSocket>, to: SocketAddr, gates: Arc<Gates>) {
    let mut runners: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
    let mut datagram = vec![0; MAX_DATAGRAM];
    let mut random = Seed::new(to.port().into());
    // A datagram to a process that is gone comes back as an error of the next call.
    loop {
        let Ok((len, runner)) = socket.recv_from(&mut datagram).await else { continue };
        if !gates.to_secondary.load(Ordering::SeqCst) {
            continue;
        }
        let far = match runners.entry(runner) {
            Entry::Occupied(known) => Arc::clone(known.get()),
            Entry::Vacant(fresh) => {
                let Ok(far) = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await else { continue };
                let far = Arc::clone(fresh.insert(Arc::new(far)));
                tokio::spawn(answers(Arc::clone(&far), Arc::clone(&socket), runner, Arc::clone(&gates)));
                far
            }
        };
        gates.pass(&far, to, &datagram[..len], &mut random).await;
    }
}

async fn answers(far: Arc<UdpSocket>, near: Arc<UdpSocket>, runner: SocketAddr, gates: Arc<Gates>) {
    let mut datagram = vec![0; MAX_DATAGRAM];
    let mut random = Seed::new(runner.port().into());
    // It ends with the runtime; a datagram to a process that is gone comes back as an error of the next call.
    loop {
        let Ok((len, _)) = far.recv_from(&mut datagram).await else { continue };
        if gates.to_runner.load(Ordering::SeqCst) {
            gates.pass(&near, runner, &datagram[..len], &mut random).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Link;
    use std::net::{TcpListener, UdpSocket};
    use std::time::Duration;

    /// Sends a datagram each way; which of them arrive.
    fn arrive(near: &UdpSocket, far: &UdpSocket, link: &Link) -> (bool, bool) {
        let mut datagram = [0; 16];
        near.send_to(b"epoch", link.datagrams).unwrap();
        let Ok((5, from)) = far.recv_from(&mut datagram) else { return (false, false) };
        far.send_to(b"ack", from).unwrap();
        (true, near.recv_from(&mut datagram).is_ok())
    }

    #[test]
    fn datagrams_get_through_as_the_gates_stand() {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let control = TcpListener::bind("127.0.0.1:0").unwrap();
        let (near, far) = (UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
        for socket in [&near, &far] {
            socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        }
        let (to, quic) = (control.local_addr().unwrap(), far.local_addr().unwrap());
        let link = Link::open(runtime.handle(), to, quic).unwrap();
        assert_eq!(arrive(&near, &far, &link), (true, true));
        link.cut_acks();
        assert_eq!(arrive(&near, &far, &link), (true, false));
        link.cut_epochs();
        assert_eq!(arrive(&near, &far, &link), (false, false));
        link.heal();
        assert_eq!(arrive(&near, &far, &link), (true, true));
        link.weather(1000, Duration::ZERO);
        assert_eq!(arrive(&near, &far, &link), (false, false));
        link.weather(0, Duration::from_millis(20));
        assert_eq!(arrive(&near, &far, &link), (true, true));
    }
}
