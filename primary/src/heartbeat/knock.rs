//! Asks a peer's kernel whether anybody listens there any more. A process that died while its host lives is known by
//! that in a round trip: its socket is gone, and the kernel answers a datagram with "port unreachable".
//!
//! It takes a connected socket of its own: QUIC's is not connected, and is not told. What is sent is one byte that QUIC
//! drops as no packet. A path that lets no such answer through, or a host that died, answers nothing, as a peer that
//! lives does; then silence decides.

use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use tokio::net::UdpSocket;

/// No QUIC packet begins so: the fixed bit is missing.
const KNOCK: [u8; 1] = [0];

/// A way to a peer's port.
#[derive(Debug)]
pub(super) struct Knock(Option<UdpSocket>);

impl Knock {
    /// To the peer at `address`. Without a socket nothing is asked.
    pub(super) async fn at(address: SocketAddr) -> Self {
        let opened = open(address).await;
        Self(opened.inspect_err(|e| tracing::debug!("{address} cannot be knocked at: {e}")).ok())
    }

    /// Asks; the answer, if there is one, comes later. Answers whether the one before was refused.
    pub(super) fn ask(&self) -> bool {
        let sent = self.0.as_ref().map(|socket| socket.try_send(&KNOCK));
        sent.is_some_and(|sent| sent.is_err_and(|e| e.kind() == ErrorKind::ConnectionRefused))
    }

    /// Waits until the kernel there says that nobody listens. May be dropped at any time.
    pub(super) async fn refused(&self) {
        let Some(socket) = &self.0 else { return std::future::pending().await };
        let mut nothing = [0; 1];
        loop {
            match socket.recv(&mut nothing).await {
                Err(e) if e.kind() == ErrorKind::ConnectionRefused => return,
                // Nobody has a reason to send here; a network that is away is no answer of the peer's.
                Ok(_) | Err(_) => {}
            }
        }
    }
}

async fn open(address: SocketAddr) -> io::Result<UdpSocket> {
    let any = match address {
        SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
        SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(address).await?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::Knock;
    use std::time::Duration;
    use tokio::net::UdpSocket;

    #[tokio::test]
    async fn a_port_that_nobody_has_any_more_is_told() {
        let peer = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let knock = Knock::at(peer.local_addr().unwrap()).await;
        assert!(!knock.ask());
        let quiet = tokio::time::timeout(Duration::from_millis(50), knock.refused()).await;
        assert!(quiet.is_err(), "a peer that lives does not answer");
        drop(peer);
        assert!(!knock.ask());
        tokio::time::timeout(Duration::from_secs(5), knock.refused()).await.expect("told at once");
    }
}
