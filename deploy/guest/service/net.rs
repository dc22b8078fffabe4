// SPDX-License-Identifier: Apache-2.0
//! The guest's network: loopback, and eth0 with the address of `ip=` on the kernel's command line.
//!
//! A kernel with IP_PNP has done what `ip=` says before this process runs. Others know nothing of it, and a driver that
//! is a module comes too late for it: then it is done here, from the same word.

use crate::calls;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, UdpSocket};

const GET_FLAGS: u32 = 0x8913;
const SET_FLAGS: u32 = 0x8914;
const GET_ADDRESS: u32 = 0x8915;
const SET_ADDRESS: u32 = 0x8916;
const SET_MASK: u32 = 0x891c;
const ADD_ROUTE: u32 = 0x890b;

const NAME_BYTES: usize = 16;
const FLAG_UP: u8 = 1;
const AF_INET: u8 = 2;

/// Brings up what there is. The address of the network card, if the command line gives one.
pub(crate) fn bring_up() -> io::Result<Option<Ipv4Addr>> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    set_up(&socket, "lo")?;
    let command_line = fs::read_to_string("/proc/cmdline")?;
    let Some(plan) = find(&command_line) else { return Ok(None) };
    let plan = Plan::parse(plan).ok_or_else(|| {
        let text = format!("ip={plan} is none: give ip=ADDRESS::GATEWAY:MASK::INTERFACE:off");
        io::Error::new(io::ErrorKind::InvalidInput, text)
    })?;
    if address_of(&socket, &plan.interface).ok() != Some(plan.address) {
        plan.apply(&socket)?;
    }
    Ok(Some(plan.address))
}

/// The value of the last `ip=` word.
fn find(command_line: &str) -> Option<&str> {
    command_line.split_whitespace().rev().find_map(|word| word.strip_prefix("ip="))
}

/// What `ip=` says: address, server (unused), gateway, mask, host name (unused), interface.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    address: Ipv4Addr,
    gateway: Option<Ipv4Addr>,
    mask: Ipv4Addr,
    interface: String,
}

impl Plan {
    fn parse(text: &str) -> Option<Self> {
        let mut fields = text.split(':');
        let address = fields.next()?.parse().ok()?;
        let gateway = fields.nth(1)?;
        let mask = fields.next()?.parse().ok()?;
        let interface = fields.nth(1).unwrap_or("eth0");
        if interface.is_empty() || interface.len() >= NAME_BYTES {
            return None;
        }
        let gateway = if gateway.is_empty() { None } else { Some(gateway.parse().ok()?) };
        Some(Self { address, gateway, mask, interface: interface.to_owned() })
    }

    fn apply(&self, socket: &UdpSocket) -> io::Result<()> {
        for (request, value) in [(SET_ADDRESS, self.address), (SET_MASK, self.mask)] {
            let mut record = named(&self.interface);
            record[NAME_BYTES..][..16].copy_from_slice(&socket_address(value));
            calls::net_request(socket, request, &mut record)?;
        }
        set_up(socket, &self.interface)?;
        self.gateway.map_or(Ok(()), |gateway| add_default_route(socket, gateway))
    }
}

fn add_default_route(socket: &UdpSocket, gateway: Ipv4Addr) -> io::Result<()> {
    const FLAGS_UP_GATEWAY: u8 = 1 | 2;
    // rtentry: 8 bytes unused, destination, gateway and mask of 16 each, flags.
    let mut record = [0; 120];
    for (at, address) in [(8, Ipv4Addr::UNSPECIFIED), (24, gateway), (40, Ipv4Addr::UNSPECIFIED)] {
        record[at..at + 16].copy_from_slice(&socket_address(address));
    }
    record[56] = FLAGS_UP_GATEWAY;
    calls::net_request(socket, ADD_ROUTE, &mut record)
}

fn set_up(socket: &UdpSocket, interface: &str) -> io::Result<()> {
    let mut record = named(interface);
    calls::net_request(socket, GET_FLAGS, &mut record)?;
    if record[NAME_BYTES] & FLAG_UP != 0 {
        return Ok(());
    }
    record[NAME_BYTES] |= FLAG_UP;
    calls::net_request(socket, SET_FLAGS, &mut record)
}

fn address_of(socket: &UdpSocket, interface: &str) -> io::Result<Ipv4Addr> {
    let mut record = named(interface);
    calls::net_request(socket, GET_ADDRESS, &mut record)?;
    // sockaddr_in: family and port before the address.
    let at = NAME_BYTES + 4;
    Ok(Ipv4Addr::new(record[at], record[at + 1], record[at + 2], record[at + 3]))
}

/// An ifreq with the interface's name, which is shorter than its field.
fn named(interface: &str) -> [u8; 120] {
    let mut record = [0; 120];
    record[..interface.len()].copy_from_slice(interface.as_bytes());
    record
}

fn socket_address(address: Ipv4Addr) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[0] = AF_INET;
    bytes[4..8].copy_from_slice(&address.octets());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_word_is_understood() {
        let line =
            "console=ttyS0 ip=10.0.0.1 quiet ip=10.77.0.2::10.77.0.1:255.255.255.0::eth0:off -- mode=blk";
        let plan = Plan::parse(find(line).unwrap()).unwrap();
        assert_eq!(plan.address, Ipv4Addr::new(10, 77, 0, 2));
        assert_eq!(plan.gateway, Some(Ipv4Addr::new(10, 77, 0, 1)));
        assert_eq!(plan.mask, Ipv4Addr::new(255, 255, 255, 0));
        assert_eq!(plan.interface, "eth0");
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in
            ["", "dhcp", "10.77.0.2", "10.77.0.2::x:255.0.0.0", "1.2.3.4:::255.0.0.0::abcdefghijklmnop:off"]
        {
            assert_eq!(Plan::parse(text), None, "{text}");
        }
        assert!(Plan::parse("1.2.3.4:::255.0.0.0").is_some(), "no gateway, the usual interface");
        assert_eq!(find("quiet zip=1"), None);
    }
}
