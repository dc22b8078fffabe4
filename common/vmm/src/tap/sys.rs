//! The kernel's requests for TAP interfaces, each as one small safe function.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixDatagram;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

fn checked(ret: libc::c_int) -> io::Result<()> {
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A request about the interface of this name.
///
/// # Panics
/// The name is too long: see [`super::check_name`].
fn about(name: &str) -> libc::ifreq {
    assert!(name.len() < libc::IFNAMSIZ, "{name:?} is no name of an interface");
    // SAFETY: a plain C structure of numbers and addresses, for which zeroes are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

/// Which flags an interface can have (`IFF_...`).
pub(super) fn features(file: &File) -> io::Result<libc::c_int> {
    let mut flags: libc::c_int = 0;
    // SAFETY: the request writes one int, and `flags` is one.
    checked(unsafe { ioctl_with_mut_ref(file, libc::TUNGETFEATURES, &mut flags) })?;
    Ok(flags)
}

/// Makes the descriptor this interface's.
pub(super) fn attach(file: &File, name: &str, flags: libc::c_int) -> io::Result<()> {
    let mut request = about(name);
    // All of them are below its sign.
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the request reads and writes one `ifreq`, and `request` is one.
    checked(unsafe { ioctl_with_mut_ref(file, libc::TUNSETIFF, &mut request) })
}

/// Sets the length of the header in front of frames.
pub(super) fn set_header(file: &File, bytes: usize) -> io::Result<()> {
    let bytes = bytes as libc::c_int;
    // SAFETY: the request reads one int, and `bytes` is one.
    checked(unsafe { ioctl_with_ref(file, libc::TUNSETVNETHDRSZ, &bytes) })
}

/// Has the numbers of that header in little endian, as virtio 1 does.
pub(super) fn set_little_endian(file: &File) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the request reads one int, and `on` is one.
    checked(unsafe { ioctl_with_ref(file, libc::TUNSETVNETLE, &on) })
}

/// Switches the carrier.
pub(super) fn set_carrier(file: &File, on: bool) -> io::Result<()> {
    let on = libc::c_int::from(on);
    // SAFETY: the request reads one int, and `on` is one.
    checked(unsafe { ioctl_with_ref(file, libc::TUNSETCARRIER, &on) })
}

/// Sets the offloads (`TUN_F_...`).
pub(super) fn set_offloads(file: &File, bits: libc::c_uint) -> io::Result<()> {
    // SAFETY: the argument of this request is a number.
    checked(unsafe { ioctl_with_val(file, libc::TUNSETOFFLOAD, libc::c_ulong::from(bits)) })
}

/// Whether there is an interface of this name, of any kind.
pub(super) fn exists(name: &str) -> bool {
    UnixDatagram::unbound().is_ok_and(|any| flags(&any, name).is_ok())
}

/// Brings an interface up that is not.
pub(super) fn bring_up(name: &str) -> io::Result<()> {
    let any = UnixDatagram::unbound()?;
    let flags = flags(&any, name)?;
    let up = libc::IFF_UP as libc::c_short;
    if flags & up != 0 {
        return Ok(());
    }
    let mut request = about(name);
    request.ifr_ifru.ifru_flags = flags | up;
    // SAFETY: the request reads one `ifreq`, and `request` is one.
    checked(unsafe { ioctl_with_ref(&any, libc::SIOCSIFFLAGS, &request) })
}

/// Flags of an interface. Any socket answers this.
fn flags(any: &UnixDatagram, name: &str) -> io::Result<libc::c_short> {
    let mut request = about(name);
    // SAFETY: the request reads and writes one `ifreq`, and `request` is one.
    checked(unsafe { ioctl_with_mut_ref(any, libc::SIOCGIFFLAGS, &mut request) })?;
    // SAFETY: the request has written this member, and it is a number.
    Ok(unsafe { request.ifr_ifru.ifru_flags })
}
